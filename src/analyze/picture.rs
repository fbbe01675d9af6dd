//! Maps over photographs, as PNG.

use crate::data::Preprocess;
use crate::{Error, Result};
use image::{ImageBuffer, Luma, RgbImage, imageops};
use plotters::style::colors::colormaps::ViridisRGB;
use std::path::Path;

/// The picture that a normalised image `[H, W, 3]` was made from, as the network sees it.
pub fn unnormalise(pixels: &[f32], p: &Preprocess) -> RgbImage {
    let side = p.size;
    let byte = |i: usize| {
        (255.0 * (pixels[i] * p.std[i % 3] + p.mean[i % 3]))
            .round()
            .clamp(0.0, 255.0) as u8
    };
    RgbImage::from_fn(side, side, |x, y| {
        let at = ((y * side + x) * 3) as usize;
        image::Rgb([byte(at), byte(at + 1), byte(at + 2)])
    })
}

/// `map` `[rows, columns]`, scaled from its smallest to its largest value, in viridis over the picture in grey.
pub fn overlay(picture: &RgbImage, map: &[f32], (rows, columns): (usize, usize)) -> RgbImage {
    let (low, high) = map
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| {
            (l.min(v), h.max(v))
        });
    let scale = if high > low { 1.0 / (high - low) } else { 0.0 };
    let (w, h) = picture.dimensions();
    let small = ImageBuffer::from_fn(columns as u32, rows as u32, |x, y| {
        Luma([(map[y as usize * columns + x as usize] - low) * scale])
    });
    let large = imageops::resize(&small, w, h, imageops::FilterType::Triangle);
    RgbImage::from_fn(w, h, |x, y| {
        let [r, g, b] = picture.get_pixel(x, y).0.map(f32::from);
        let grey = 0.299 * r + 0.587 * g + 0.114 * b;
        let hue = ViridisRGB::get_color(f64::from(large.get_pixel(x, y).0[0]));
        let mix = |c: u8| (0.35 * grey + 0.65 * f32::from(c)).round() as u8;
        image::Rgb([mix(hue.0), mix(hue.1), mix(hue.2)])
    })
}

/// Pictures of one size side by side, `columns` to a row, with a white margin between.
pub fn sheet(pictures: &[RgbImage], columns: usize) -> RgbImage {
    const GAP: u32 = 4;
    let (w, h) = pictures.first().map_or((1, 1), |p| p.dimensions());
    let columns = (columns.max(1) as u32).min(pictures.len().max(1) as u32);
    let rows = (pictures.len() as u32).div_ceil(columns).max(1);
    let size = (columns * (w + GAP) - GAP, rows * (h + GAP) - GAP);
    let mut out = RgbImage::from_pixel(size.0, size.1, image::Rgb([255; 3]));
    for (i, p) in pictures.iter().enumerate() {
        let (row, column) = (i as u32 / columns, i as u32 % columns);
        imageops::replace(
            &mut out,
            p,
            (column * (w + GAP)).into(),
            (row * (h + GAP)).into(),
        );
    }
    out
}

/// Writes a PNG in one go.
///
/// # Errors
/// The file cannot be written.
pub fn save(path: &Path, picture: &RgbImage) -> Result<()> {
    let mut bytes = std::io::Cursor::new(vec![]);
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .map_err(|e| Error::run(format!("{}: {e}", path.display())))?;
    crate::report::write_atomic(path, bytes.get_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hot_patch_is_where_the_map_says() {
        let grey = RgbImage::from_pixel(32, 32, image::Rgb([128; 3]));
        let mut map = [0.0f32; 16];
        map[4 + 2] = 1.0; // row 1, column 2
        let got = overlay(&grey, &map, (4, 4));
        let yellow = |x, y| got.get_pixel(x, y).0[0];
        let (hot, cold) = (yellow(20, 12), yellow(4, 4));
        assert!(hot > cold + 60, "{hot} {cold}");
        assert_eq!(
            sheet(&[grey.clone(), grey.clone(), grey], 2).dimensions(),
            (68, 68)
        );
    }
}
