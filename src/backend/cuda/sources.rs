//! The CUDA C++ sources: embedded, or read from a folder (`--kernels DIR`).

use crate::{Error, Result};
use std::borrow::Cow;
use std::path::{Path, PathBuf};

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../kernels/", $name)))),*]
    };
}

/// Every file of `kernels/`, as built into the program. `#include` names them as they are written here.
pub const EMBEDDED: &[(&str, &str)] = embedded![
    "attention.cu",
    "augment.cu",
    "batch_norm.cu",
    "common/cp_async.cuh",
    "common/div.cuh",
    "common/epilogue.cuh",
    "common/gemm_core.cuh",
    "common/loaders.cuh",
    "common/math.cuh",
    "common/mma.cuh",
    "common/philox.cuh",
    "common/reduce.cuh",
    "common/targets.cuh",
    "common/vec.cuh",
    "conv2d.cu",
    "elementwise.cu",
    "gemm.cu",
    "layer_norm.cu",
    "layer_scale.cu",
    "linear.cu",
    "loss.cu",
    "optim.cu",
    "pad2d.cu",
    "patch_merge.cu",
    "pool.cu",
    "random.cu",
    "reduce.cu",
    "tokens.cu",
    "window_attention.cu",
];

/// Where sources come from.
#[derive(Clone, Debug, Default)]
pub struct KernelSource {
    dir: Option<PathBuf>,
}

impl KernelSource {
    /// A source that reads from `dir`.
    ///
    /// # Errors
    /// [`Error::Input`] where it is not a folder.
    pub fn from_dir(dir: &Path) -> Result<KernelSource> {
        if !dir.is_dir() {
            return Err(Error::input(format!(
                "--kernels {}: not a folder",
                dir.display()
            )));
        }
        Ok(KernelSource {
            dir: Some(dir.to_path_buf()),
        })
    }

    /// The text of `name`.
    ///
    /// # Errors
    /// [`Error::Input`] where the file does not exist.
    pub fn read(&self, name: &str) -> Result<Cow<'static, str>> {
        if let Some(dir) = &self.dir {
            let path = dir.join(name);
            let text = std::fs::read_to_string(&path).map_err(|e| Error::reading(&path, e))?;
            return Ok(text.into());
        }
        EMBEDDED
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, text)| Cow::Borrowed(*text))
            .ok_or_else(|| Error::run(format!("no kernel file named {name} is built in")))
    }

    /// `name` and, after it, every file that it includes with quotes, directly or not: (name, text) of each, once.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn with_includes(&self, name: &str) -> Result<Vec<(String, Cow<'static, str>)>> {
        let mut files: Vec<(String, Cow<'static, str>)> = vec![];
        let mut wanted = vec![name.to_string()];
        while let Some(name) = wanted.pop() {
            if files.iter().any(|f| f.0 == name) {
                continue;
            }
            let text = self.read(&name)?;
            for line in text.lines() {
                let file = line.trim().strip_prefix("#include \"");
                if let Some(file) = file.and_then(|f| f.split('"').next()) {
                    wanted.push(file.to_string());
                }
            }
            files.push((name, text));
        }
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_is_built_in_and_its_includes_are_found() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut found = vec![];
        for (folder, prefix) in [(dir.clone(), ""), (dir.join("common"), "common/")] {
            for entry in std::fs::read_dir(folder).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if name.ends_with(".cu") || name.ends_with(".cuh") {
                    found.push(format!("{prefix}{name}"));
                }
            }
        }
        let source = KernelSource::default();
        for name in &found {
            assert!(
                EMBEDDED.iter().any(|e| e.0 == name),
                "{name} is not built in"
            );
            source.with_includes(name).unwrap();
        }
        assert_eq!(found.len(), EMBEDDED.len());
    }
}
