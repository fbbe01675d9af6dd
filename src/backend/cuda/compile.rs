//! From a kernel's source and constants to an image for the device, by way of a cache on disk.

use super::launch::Consts;
use super::nvrtc::{Nvrtc, Target};
use super::sources::KernelSource;
use crate::report::write_atomic;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"twcuda1\n";

/// Compiles, and keeps what it compiled.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// Where sources come from.
    pub source: KernelSource,
    /// What is compiled for.
    pub target: Target,
    nvrtc: &'static Nvrtc,
    cache: Option<PathBuf>,
}

/// `$TILEWRIGHT_CACHE`, else the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let user = || {
        var("XDG_CACHE_HOME")
            .or_else(|| Some(var("HOME")?.join(".cache")))
            .or_else(|| var("LOCALAPPDATA"))
            .map(|d| d.join("tilewright"))
    };
    Some(var("TILEWRIGHT_CACHE").or_else(user)?.join("cuda"))
}

impl Compiler {
    /// A compiler for `target`.
    ///
    /// # Errors
    /// There is no NVRTC.
    pub fn new(source: KernelSource, target: Target) -> Result<Self> {
        Ok(Compiler {
            source,
            target,
            nvrtc: Nvrtc::get()?,
            cache: cache_folder(),
        })
    }

    /// The same for another target.
    pub fn with_target(&self, target: Target) -> Compiler {
        Compiler {
            target,
            ..self.clone()
        }
    }

    /// The NVRTC that is used.
    pub fn nvrtc(&self) -> &'static Nvrtc {
        self.nvrtc
    }

    /// The image of `name` with `consts`.
    ///
    /// # Errors
    /// A file is missing, or does not compile.
    pub fn image(&self, name: &str, consts: &Consts) -> Result<Vec<u8>> {
        let files = self.source.with_includes(name)?;
        let mut options: Vec<String> = ["--std=c++17", "-default-device", "-lineinfo"]
            .map(String::from)
            .to_vec();
        options.extend(consts.iter().map(|(k, v)| format!("-D{k}={v}")));
        let compile = || self.nvrtc.compile(&files, &options, self.target);
        let Some(folder) = &self.cache else {
            return compile();
        };
        let mut key = Sha256::new();
        let mut part = |bytes: &[u8]| {
            key.update((bytes.len() as u64).to_le_bytes());
            key.update(bytes);
        };
        part(self.nvrtc.version_text().as_bytes());
        part(self.target.option().as_bytes());
        options.iter().for_each(|o| part(o.as_bytes()));
        for (name, text) in &files {
            part(name.as_bytes());
            part(text.as_bytes());
        }
        let path = folder.join(hex(&key.finalize()));
        if let Some(image) = read(&path) {
            return Ok(image);
        }
        let image = compile()?;
        // A cache that cannot be written costs time, not results.
        if std::fs::create_dir_all(folder).is_ok() {
            let _ = write(&path, &image);
        }
        Ok(image)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// An entry whose checksum holds.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (head, image) = bytes.split_at_checked(MAGIC.len() + 32)?;
    let whole = head[..MAGIC.len()] == *MAGIC && head[MAGIC.len()..] == Sha256::digest(image)[..];
    whole.then(|| image.to_vec())
}

fn write(path: &Path, image: &[u8]) -> Result<(), Error> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&Sha256::digest(image));
    bytes.extend_from_slice(image);
    write_atomic(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::super::nvrtc::tests::present;
    use super::*;

    #[test]
    fn damaged_entries_are_rebuilt() {
        if present().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut compiler = Compiler::new(KernelSource::default(), Target::Ptx(80)).unwrap();
        compiler.cache = Some(dir.path().to_path_buf());
        let consts = vec![("VEC", "4".to_string())];
        let image = |c: &Compiler| c.image("elementwise.cu", &consts).unwrap();
        let first = image(&compiler);
        let files = || {
            std::fs::read_dir(dir.path())
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect::<Vec<_>>()
        };
        let [file] = &files()[..] else {
            panic!("one entry")
        };
        let good = std::fs::read(file).unwrap();
        for damage in [vec![], good[..good.len() - 1].to_vec(), {
            let mut b = good.clone();
            b[100] ^= 1;
            b
        }] {
            std::fs::write(file, &damage).unwrap();
            assert_eq!(image(&compiler), first);
            assert_eq!(std::fs::read(file).unwrap(), good);
        }
        compiler.image("elementwise.cu", &vec![]).unwrap();
        assert_eq!(files().len(), 2);
    }

    /// Every kernel file compiles for every rung of devices with its default constants.
    #[test]
    fn every_kernel_compiles() {
        if present().is_none() {
            return;
        }
        for name in KernelSource::default().0.names() {
            if !name.ends_with(".cu") {
                continue;
            }
            let compiler = Compiler::new(KernelSource::default(), Target::Ptx(80)).unwrap();
            compiler
                .image(name, &vec![])
                .unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
