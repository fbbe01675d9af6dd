//! Files that are often given where a safetensors file is wanted, told apart by how they begin.

use super::header::clip;

/// What the file that begins with `file` really is and what to do about it, as the rest of a sentence that begins
/// with its name; `None` where it is nothing known. To be asked only once `file` is known not to be safetensors:
/// any header length is also the beginning of something.
pub(super) fn recognise(file: &[u8]) -> Option<String> {
    const TO_SAFETENSORS: &str = "convert it in Python: safetensors.torch.save_file(torch.load(FILE, \
                                  map_location=\"cpu\", weights_only=True), \"model.safetensors\")";
    let head = &file[..file.len().min(4096)];
    let starts = |magic: &[u8]| head.starts_with(magic);
    let says = |word: &[u8]| head.windows(word.len()).any(|w| w == word);
    let text = match head {
        // A length below 4 GiB with a `{` behind it: a damaged safetensors header, whatever its first bytes.
        _ if head.get(4..8).is_some_and(|b| b == [0; 4]) && head.get(8) == Some(&b'{') => return None,
        _ if starts(b"PK\x03\x04") && says(b".npy") => {
            "is a NumPy .npz archive; save its arrays in Python with safetensors.numpy.save_file".into()
        }
        _ if starts(b"PK\x03\x04") && says(b"data.pkl") => format!("is a PyTorch .pt/.pth file; {TO_SAFETENSORS}"),
        _ if starts(b"PK\x03\x04") => format!("is a zip archive; if it is a PyTorch .pt/.pth file, {TO_SAFETENSORS}"),
        [0x80, 2..=5, ..] => format!("is a Python pickle (an old PyTorch .pt/.pth file); {TO_SAFETENSORS}"),
        _ if starts(b"GGUF") => {
            "is a GGUF file (llama.cpp); this program reads safetensors: get the model's .safetensors file".into()
        }
        _ if starts(b"\x89HDF\r\n\x1a\n") => {
            "is an HDF5 file (Keras .h5); this program reads safetensors: get the PyTorch weights or convert it".into()
        }
        _ if starts(b"\x93NUMPY") => {
            "is a NumPy .npy array; save it in Python with safetensors.numpy.save_file".into()
        }
        _ if head.first() == Some(&8) && (says(b"pytorch") || says(b"onnx")) => {
            "is an ONNX model; this program reads safetensors: get the model's .safetensors file".into()
        }
        _ if starts(&[0x1f, 0x8b]) => "is compressed with gzip; unpack it first (gunzip, tar xzf)".into(),
        _ if starts(&[0x28, 0xb5, 0x2f, 0xfd]) => "is compressed with zstd; unpack it first (unzstd)".into(),
        _ if starts(b"\xfd7zXZ\0") => "is compressed with xz; unpack it first (unxz)".into(),
        _ if head.get(257..262) == Some(b"ustar") => "is a tar archive; unpack it first (tar xf)".into(),
        _ => match image::guess_format(head) {
            Ok(format) => format!(
                "is a picture ({}), not weights; are the arguments in the right order?",
                format.extensions_str().first().unwrap_or(&"image")
            ),
            Err(_) => return text_file(head),
        },
    };
    Some(text)
}

/// The same for a file that begins with readable text.
fn text_file(head: &[u8]) -> Option<String> {
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // The cut at the end of `head` may fall inside a character.
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&head[..e.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    let text = text.trim_start_matches('\u{feff}').trim_start();
    if text.is_empty() || text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    let lower = text.to_ascii_lowercase();
    Some(if text.starts_with("version https://git-lfs") {
        let size = text.lines().find_map(|l| l.strip_prefix("size "));
        let of = size.map_or(String::new(), |n| {
            format!(" for a file of {} bytes", clip(n, 20))
        });
        format!("is a Git LFS pointer{of}, not the weights; run `git lfs pull` where it came from")
    } else if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
        "is an HTML page, not weights; the download got a web page (an error or a login): take the direct link".into()
    } else if text.starts_with('{') && text.contains("\"weight_map\"") {
        "is the index of a model split over several files; give the .safetensors file it names"
            .into()
    } else {
        format!(
            "is a text file, not safetensors; it begins \"{}\"",
            clip(text.lines().next().unwrap_or(""), 60)
        )
    })
}
