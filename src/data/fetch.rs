//! `data fetch`: data sets from their home pages, with a checksum, and from where it broke off.

use super::{Spec, data_dir};
use crate::download::{Patience, download};
use crate::{Error, Result};
use indicatif::ProgressBar;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where to download from instead of a data set's home page (a base URL), for a mirror or a test.
pub const MIRROR_VARIABLE: &str = "TILEWRIGHT_DATA_MIRROR";

/// A file on a home page.
#[derive(Debug, Clone, Copy)]
struct Remote<'a> {
    base: &'a str,
    name: &'a str,
    bytes: u64,
    sha256: &'a str,
}

impl Remote<'_> {
    /// Downloads it into `dir`.
    fn get(&self, dir: &Path) -> Result<PathBuf> {
        let target = dir.join(self.name);
        let remote = crate::download::Remote {
            url: &format!("{}/{}", self.base.trim_end_matches('/'), self.name),
            name: self.name,
            bytes: self.bytes,
            sha256: Some(self.sha256),
            token: None,
        };
        download(&remote, &target, Patience::USUAL)?;
        Ok(target)
    }
}

const CIFAR10: Remote = Remote {
    base: "https://www.cs.toronto.edu/~kriz",
    name: "cifar-10-binary.tar.gz",
    bytes: 170_052_171,
    sha256: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
};
const CIFAR100: Remote = Remote {
    base: "https://www.cs.toronto.edu/~kriz",
    name: "cifar-100-binary.tar.gz",
    bytes: 168_513_733,
    sha256: "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
};
const TINY_IMAGENET: Remote = Remote {
    base: "http://cs231n.stanford.edu",
    name: "tiny-imagenet-200.zip",
    bytes: 248_100_043,
    sha256: "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
};

/// Downloads `cifar10`, `cifar100` or `tiny-imagenet` into a folder (the spec's own, else [`data_dir`]) and returns
/// where the data set lies. What is there already is not fetched again; a download that broke off goes on where it
/// stopped. The CIFAR archives stay packed; Tiny ImageNet is unpacked.
///
/// # Errors
/// [`Error::Input`] for a data set that cannot be fetched; [`Error::Run`] where the server or the disk fails, or the
/// checksum differs.
pub fn fetch(spec: &str) -> Result<PathBuf> {
    let parsed: Spec = spec.parse()?;
    let (remote, dir) = match &parsed {
        Spec::Cifar10(dir) => (CIFAR10, dir),
        Spec::Cifar100(dir) => (CIFAR100, dir),
        Spec::TinyImagenet(dir) => (TINY_IMAGENET, dir),
        _ => {
            return Err(Error::input(format!(
                "`{spec}` is not fetched from anywhere; cifar10, cifar100 and tiny-imagenet are"
            )));
        }
    };
    let dir = dir.clone().unwrap_or_else(data_dir);
    let mirror = std::env::var(MIRROR_VARIABLE)
        .ok()
        .filter(|m| !m.is_empty());
    let remote = Remote {
        base: mirror.as_deref().unwrap_or(remote.base),
        ..remote
    };
    if !matches!(parsed, Spec::TinyImagenet(_)) {
        return remote.get(&dir);
    }
    let unpacked = dir.join("tiny-imagenet-200");
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let archive = remote.get(&dir)?;
    unpack(&archive, &dir, "tiny-imagenet-200")?;
    // It has served: what is unpacked takes its place.
    fs::remove_file(&archive).map_err(|e| Error::writing(&archive, e))?;
    Ok(unpacked)
}

/// Unpacks the folder `name` of a zip archive into `dir`, whole or not at all.
fn unpack(archive: &Path, dir: &Path, name: &str) -> Result<()> {
    let bad =
        |e: zip::result::ZipError| Error::run(format!("cannot unpack {}: {e}", archive.display()));
    let file = File::open(archive).map_err(|e| Error::reading(archive, e))?;
    let mut zip = zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(bad)?;
    let staging = tempfile::Builder::new()
        .prefix(".unpacking-")
        .tempdir_in(dir)
        .map_err(|e| Error::writing(dir, e))?;
    let bar = ProgressBar::new(zip.len() as u64).with_message("unpacking");
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).map_err(bad)?;
        let Some(path) = entry.enclosed_name() else {
            return Err(Error::run(format!(
                "{}: entry {i} has a name that leads out of the archive",
                archive.display()
            )));
        };
        let path = staging.path().join(path);
        let write = |entry: &mut dyn Read| {
            fs::create_dir_all(path.parent().unwrap_or(staging.path()))?;
            std::io::copy(entry, &mut File::create(&path)?)
        };
        if entry.is_dir() {
            fs::create_dir_all(&path).map_err(|e| Error::writing(&path, e))?;
        } else {
            write(&mut entry).map_err(|e| Error::writing(&path, e))?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let from = staging.path().join(name);
    if !from.is_dir() {
        return Err(Error::run(format!(
            "{} holds no folder {name}",
            archive.display()
        )));
    }
    let to = dir.join(name);
    fs::rename(&from, &to).map_err(|e| Error::writing(&to, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_nowhere_is_not_fetched() {
        assert!(fetch("digits").unwrap_err().to_string().contains("cifar10"));
    }

    #[test]
    fn an_archive_is_unpacked_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let pack = |names: &[&str]| {
            let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
            for name in names {
                zip.start_file(*name, zip::write::SimpleFileOptions::default())
                    .unwrap();
                zip.write_all(b"hello").unwrap();
            }
            zip.finish().unwrap().into_inner()
        };
        let archive = dir.path().join("a.zip");
        let bytes = pack(&["set/wnids.txt", "set/train/x/1.txt"]);
        fs::write(&archive, &bytes[..bytes.len() - 30]).unwrap();
        assert!(unpack(&archive, dir.path(), "set").is_err());
        fs::write(&archive, pack(&["set/a", "../outside"])).unwrap();
        assert!(
            unpack(&archive, dir.path(), "set")
                .unwrap_err()
                .to_string()
                .contains("leads out")
        );
        fs::write(&archive, pack(&["other/a"])).unwrap();
        assert!(
            unpack(&archive, dir.path(), "set")
                .unwrap_err()
                .to_string()
                .contains("no folder set")
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing is left behind"
        );
        fs::write(&archive, &bytes).unwrap();
        unpack(&archive, dir.path(), "set").unwrap();
        assert_eq!(
            fs::read(dir.path().join("set/train/x/1.txt")).unwrap(),
            b"hello"
        );
    }
}
