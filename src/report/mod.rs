//! Results out: metrics, plots, tables and self-contained HTML reports.

pub mod metrics;
pub mod runlog;
pub mod table;

use crate::{Error, Result};
use std::io::Write;
use std::path::Path;

/// Writes `bytes` to `path` whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// [`Error::Run`] naming the path where the disk is full or the folder cannot be written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = match path.parent() {
        Some(d) if !d.as_os_str().is_empty() => d,
        _ => Path::new("."),
    };
    let fail = |e| Error::writing(path, e);
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path)
        .map_err(|e| Error::writing(path, e.error))?;
    if let Ok(d) = std::fs::File::open(dir) {
        // Not every file system can fsync a folder; the rename itself is already atomic.
        let _ = d.sync_all();
    }
    Ok(())
}
