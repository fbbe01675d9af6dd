//! An image file checked, resized and written anew.

use super::get::Failure;
use super::{BuildOptions, Cause};
use crate::data::decode::{Rgb, decode, looks_like_image};
use crate::data::preprocess::{resize_shorter, squared};
use libjpeg_turbo_rs as jpeg;
use sha2::{Digest, Sha256};
use std::collections::HashSet;

/// Share of the pixels that may differ in an image that counts as one colour, and by how much the others may.
const STRAY: f64 = 0.005;
const SPREAD: usize = 4;

/// An image as it goes into a shard.
#[derive(Debug)]
pub(super) struct Picture {
    pub jpeg: Vec<u8>,
    pub size: [u32; 2],
    /// Before it was resized.
    pub original: [u32; 2],
    /// SHA-256 of the file that it came as.
    pub sha256: String,
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Decodes, checks, resizes and encodes.
pub(super) fn make(
    bytes: &[u8],
    options: &BuildOptions,
    placeholders: &HashSet<String>,
) -> Result<Picture, Failure> {
    if bytes.is_empty() {
        return Err(Failure::new(Cause::ShortBody, "nothing"));
    }
    if !looks_like_image(&bytes[..bytes.len().min(64)]) {
        let text = bytes
            .iter()
            .take(64)
            .all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace());
        let what = if text { "a text" } else { "no known format" };
        return Err(Failure::new(Cause::WrongType, what));
    }
    let sha256 = sha256(bytes);
    if placeholders.contains(&sha256) {
        return Err(Failure::new(Cause::Placeholder, "a known one"));
    }
    let image = decode(bytes).map_err(|e| Failure::new(Cause::Corrupt, e))?;
    let original = [image.width, image.height];
    let shown = format!("{}x{} pixels", image.width, image.height);
    if image.width.min(image.height) < options.min_side {
        return Err(Failure::new(Cause::TooSmall, shown));
    }
    if let Some([r, g, b]) = one_colour(&image) {
        return Err(Failure::new(
            Cause::Placeholder,
            format!("{shown} of one colour, #{r:02x}{g:02x}{b:02x}"),
        ));
    }
    let resized = match options.square {
        true => squared(&image, options.size),
        false => resize_shorter(image, options.size),
    };
    let image = resized.map_err(|e| Failure::new(Cause::Corrupt, e))?;
    let jpeg = jpeg::compress(
        &image.pixels,
        image.width as usize,
        image.height as usize,
        jpeg::PixelFormat::Rgb,
        options.quality,
        jpeg::Subsampling::S420,
    )
    .map_err(|e| Failure::new(Cause::Corrupt, format!("cannot be written as JPEG: {e}")))?;
    Ok(Picture {
        jpeg,
        size: [image.width, image.height],
        original,
        sha256,
    })
}

/// The colour of an image that has no other, but for a few pixels and a few levels.
fn one_colour(image: &Rgb) -> Option<[u8; 3]> {
    let mut counts = [[0usize; 256]; 3];
    let (pixels, _) = image.pixels.as_chunks::<3>();
    for p in pixels {
        for (count, v) in counts.iter_mut().zip(p) {
            count[usize::from(*v)] += 1;
        }
    }
    let most = pixels.len() - (pixels.len() as f64 * STRAY) as usize;
    let mut colour = [0; 3];
    for (count, c) in counts.iter().zip(&mut colour) {
        // Levels within the spread of the most frequent one.
        let top = (0..256).max_by_key(|v| count[*v])?;
        let near = top.saturating_sub(SPREAD)..(top + SPREAD + 1).min(256);
        if count[near].iter().sum::<usize>() < most {
            return None;
        }
        *c = top as u8;
    }
    Some(colour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_of_one_colour_and_photographs_are_not() {
        let image = |f: &dyn Fn(u32) -> [u8; 3]| Rgb {
            width: 40,
            height: 40,
            pixels: (0..1600).flat_map(f).collect(),
        };
        assert_eq!(one_colour(&image(&|_| [0; 3])), Some([0; 3]));
        assert_eq!(
            one_colour(&image(&|i| [200, 100 + (i % 3) as u8, 9])).map(|c| c[2]),
            Some(9)
        );
        // A few pixels of dirt; more than a few.
        assert!(one_colour(&image(&|i| if i < 8 { [255; 3] } else { [0; 3] })).is_some());
        assert!(one_colour(&image(&|i| if i < 30 { [255; 3] } else { [0; 3] })).is_none());
        assert!(one_colour(&image(&|i| [(i % 40) as u8, 0, 0])).is_none());
    }
}
