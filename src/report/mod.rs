//! Results out: metrics, plots, tables and self-contained HTML reports.

pub mod html;
pub mod metrics;
pub mod plot;
pub mod progress;
pub mod runlog;
pub mod table;

use crate::{Error, Result};
use base64::Engine;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Beginning and end of the names of files that are being written.
const PART: (&str, &str) = (".tilewright-", ".part");

/// Removes what killed processes were writing in `dir`. Nothing else may be writing there.
///
/// # Errors
/// [`crate::Error::Run`] where the folder cannot be read or a file not removed.
pub fn remove_parts(dir: &Path) -> Result<()> {
    let fail = |e| Error::writing(dir, e);
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(PART.0) && name.ends_with(PART.1) {
            std::fs::remove_file(entry.path()).map_err(fail)?;
        }
    }
    Ok(())
}

/// Writes `bytes` to `path` whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// [`Error::Run`] naming the path where the disk is full or the folder cannot be written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| {
        file.write_all(bytes).map_err(|e| Error::writing(path, e))
    })
}

/// As [`write_atomic`], for what is too large to hold: `write` streams into a buffered temporary file. Where it
/// fails, the file at `path` stays as it was.
///
/// # Errors
/// What `write` returns, and as [`write_atomic`].
pub fn write_atomic_with(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let dir = match path.parent() {
        Some(d) if !d.as_os_str().is_empty() => d,
        _ => Path::new("."),
    };
    let fail = |e| Error::writing(path, e);
    let mut builder = tempfile::Builder::new();
    builder.prefix(PART.0).suffix(PART.1);
    #[cfg(unix)]
    {
        // As any new file: the umask decides. A temporary file's own mode would lock everyone else out.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(dir).map_err(fail)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, file);
    write(&mut buffered)?;
    let file = buffered.into_inner().map_err(|e| fail(e.into_error()))?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path)
        .map_err(|e| Error::writing(path, e.error))?;
    if let Ok(d) = std::fs::File::open(dir) {
        // Not every file system can fsync a folder; the rename itself is already atomic.
        let _ = d.sync_all();
    }
    Ok(())
}

/// Pixels as a `data:` URI that holds a PNG.
pub(crate) fn png_data_uri(
    pixels: &[u8],
    width: u32,
    height: u32,
    colour: image::ExtendedColorType,
) -> Result<String> {
    use image::ImageEncoder;
    use image::codecs::png::{CompressionType, FilterType, PngEncoder};
    let mut png = Vec::new();
    PngEncoder::new_with_quality(&mut png, CompressionType::Best, FilterType::Adaptive)
        .write_image(pixels, width, height, colour)
        .map_err(|e| Error::run(format!("cannot encode a {width} x {height} PNG: {e}")))?;
    Ok(format!(
        "data:image/png;base64,{}",
        base64::engine::general_purpose::STANDARD.encode(png)
    ))
}
