//! Real images in: data sets, decoding, resizing, splits and views.

use std::path::PathBuf;

/// The folder of test material (real data, weights, PyTorch's answers): `TILEWRIGHT_SHARED` if set, else `../shared`
/// beside the crate. `None` where it is absent; tests then say `skipped: no ../shared`.
pub fn shared_dir() -> Option<PathBuf> {
    let dir = match std::env::var_os("TILEWRIGHT_SHARED") {
        Some(d) => PathBuf::from(d),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    dir.is_dir().then_some(dir)
}
