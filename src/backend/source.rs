//! Folders of kernel sources: built into the program, or read from disk (`--kernels DIR`, `--shaders DIR`).

use crate::{Error, Result};
use include_dir::{Dir, include_dir};
use std::borrow::Cow;
use std::path::{Path, PathBuf};

static CUDA: Dir = include_dir!("$CARGO_MANIFEST_DIR/kernels");
static WGSL: Dir = include_dir!("$CARGO_MANIFEST_DIR/shaders");

/// A folder of sources in one language.
#[derive(Clone, Debug)]
pub struct SourceFolder {
    built_in: &'static Dir<'static>,
    on_disk: Option<PathBuf>,
}

impl SourceFolder {
    /// `kernels/` as built in.
    pub fn cuda() -> SourceFolder {
        SourceFolder {
            built_in: &CUDA,
            on_disk: None,
        }
    }

    /// `shaders/` as built in.
    pub fn wgsl() -> SourceFolder {
        SourceFolder {
            built_in: &WGSL,
            on_disk: None,
        }
    }

    /// The same, read from `dir` in place of what is built in.
    ///
    /// # Errors
    /// [`Error::Input`] where it is not a folder.
    pub fn replaced_by(mut self, dir: &Path) -> Result<SourceFolder> {
        if !dir.is_dir() {
            return Err(Error::input(format!("{}: not a folder", dir.display())));
        }
        self.on_disk = Some(dir.to_path_buf());
        Ok(self)
    }

    /// The text of `name`, a path within the folder, as it was written.
    ///
    /// # Errors
    /// [`Error::Input`] where the file cannot be read or is not built in.
    pub fn read(&self, name: &str) -> Result<Cow<'static, str>> {
        if let Some(dir) = &self.on_disk {
            let path = dir.join(name);
            let text = std::fs::read_to_string(&path).map_err(|e| Error::reading(&path, e))?;
            return Ok(text.into());
        }
        let file = self.built_in.get_file(name);
        let text = file.and_then(|f| f.contents_utf8());
        text.map(Cow::Borrowed)
            .ok_or_else(|| Error::input(format!("no kernel file named {name} is built in")))
    }

    /// The built-in files directly in the folder, by name.
    pub fn names(&self) -> Vec<&'static str> {
        let files = self.built_in.files();
        files.filter_map(|f| f.path().to_str()).collect()
    }
}
