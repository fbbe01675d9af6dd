//! Pictures in pixels: maps over photographs, captioned sheets.

use crate::data::{Preprocess, Rgb};
use crate::report::plot::shorten;
use crate::{Error, Result};
use embedded_graphics::mono_font::iso_8859_1::FONT_7X13;
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::{Gray8, GrayColor};
use embedded_graphics::prelude::{Dimensions, DrawTarget, Drawable, Pixel, Point, Size};
use embedded_graphics::primitives::Rectangle;
use embedded_graphics::text::{Baseline, Text};
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma, RgbImage};
use plotters::style::colors::colormaps::ViridisRGB;
use std::path::Path;

/// Side of a picture on a sheet, which smaller ones are enlarged to and larger ones reduced to.
pub const SIDE: u32 = 128;
const FONT: MonoFont = FONT_7X13;
/// White around each cell.
const GAP: u32 = 6;

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

/// A decoded image as a picture.
pub fn of(rgb: &Rgb) -> RgbImage {
    let at = |x: u32, y: u32| ((y * rgb.width + x) * 3) as usize;
    RgbImage::from_fn(rgb.width, rgb.height, |x, y| {
        let p = &rgb.pixels[at(x, y)..][..3];
        image::Rgb([p[0], p[1], p[2]])
    })
}

/// Colour of `v` in 0 to 1.
pub fn viridis(v: f32) -> image::Rgb<u8> {
    let c = ViridisRGB::get_color(f64::from(v));
    image::Rgb([c.0, c.1, c.2])
}

/// Smallest value, and what makes the largest one 1.
fn range(map: &[f32]) -> (f32, f32) {
    let (low, high) = map
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| {
            (l.min(v), h.max(v))
        });
    (low, if high > low { 1.0 / (high - low) } else { 0.0 })
}

/// `map` `[rows, columns]`, scaled from its smallest to its largest value, in viridis over the picture in grey.
pub fn overlay(picture: &RgbImage, map: &[f32], (rows, columns): (usize, usize)) -> RgbImage {
    let (low, scale) = range(map);
    let (w, h) = picture.dimensions();
    let small = ImageBuffer::from_fn(columns as u32, rows as u32, |x, y| {
        Luma([(map[y as usize * columns + x as usize] - low) * scale])
    });
    let large = imageops::resize(&small, w, h, FilterType::Triangle);
    RgbImage::from_fn(w, h, |x, y| {
        let [r, g, b] = picture.get_pixel(x, y).0.map(f32::from);
        let grey = 0.299 * r + 0.587 * g + 0.114 * b;
        let hue = viridis(large.get_pixel(x, y).0[0]).0;
        image::Rgb(hue.map(|c| (0.35 * grey + 0.65 * f32::from(c)).round() as u8))
    })
}

/// `map` `[rows, columns]` alone, scaled from its smallest to its largest value, a pixel a value.
pub fn map(map: &[f32], (rows, columns): (usize, usize)) -> RgbImage {
    let (low, scale) = range(map);
    RgbImage::from_fn(columns as u32, rows as u32, |x, y| {
        viridis((map[y as usize * columns + x as usize] - low) * scale)
    })
}

/// A picture with lines of text below it.
#[derive(Clone, Debug)]
pub struct Cell {
    picture: RgbImage,
    lines: Vec<String>,
}

impl Cell {
    /// Characters beyond Latin-1 become question marks, long lines lose their middle.
    pub fn new(picture: RgbImage, lines: impl IntoIterator<Item = String>) -> Cell {
        Cell {
            picture,
            lines: lines.into_iter().collect(),
        }
    }
}

/// `picture` within a square of [`SIDE`]: tiny ones pixel by pixel, others smoothed.
fn fitted(picture: &RgbImage) -> RgbImage {
    let (w, h) = picture.dimensions();
    let longest = w.max(h).max(1);
    if longest <= SIDE {
        let times = SIDE / longest;
        return imageops::resize(picture, w * times, h * times, FilterType::Nearest);
    }
    let scaled = |v: u32| (v * SIDE).div_ceil(longest).max(1);
    imageops::resize(picture, scaled(w), scaled(h), FilterType::Triangle)
}

/// A picture that text is drawn on.
struct Paper<'a>(&'a mut RgbImage);

impl Dimensions for Paper<'_> {
    fn bounding_box(&self) -> Rectangle {
        let (w, h) = self.0.dimensions();
        Rectangle::new(Point::zero(), Size::new(w, h))
    }
}

impl DrawTarget for Paper<'_> {
    type Color = Gray8;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Gray8>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Self::Error> {
        for Pixel(at, colour) in pixels {
            let (x, y) = (at.x as u32, at.y as u32);
            if let Some(p) = self.0.get_pixel_mut_checked(x, y) {
                *p = image::Rgb([colour.luma(); 3]);
            }
        }
        Ok(())
    }
}

/// `text` with its upper left corner at `x`, `y`, cut to `width` pixels; returns its height.
fn write_text(on: &mut RgbImage, text: &str, (x, y): (u32, u32), width: u32) -> u32 {
    let size = FONT.character_size;
    let short = shorten(text, (width / size.width) as usize);
    // The bitmap font has no ellipsis.
    let short = short.replace('…', "~");
    let style = MonoTextStyle::new(&FONT, Gray8::new(40));
    let at = Point::new(x as i32, y as i32);
    let Ok(_) = Text::with_baseline(&short, at, style, Baseline::Top).draw(&mut Paper(on));
    size.height
}

/// Captioned pictures side by side, `columns` to a row, on white; smaller pictures are enlarged by whole numbers.
pub fn captioned(cells: &[Cell], columns: usize) -> RgbImage {
    let columns = (columns.max(1)).min(cells.len().max(1));
    let pictures: Vec<RgbImage> = cells.iter().map(|c| fitted(&c.picture)).collect();
    let widest = pictures.iter().map(RgbImage::width).max().unwrap_or(1);
    let line = FONT.character_size.height;
    let row_height = |row: usize| {
        let range = row * columns..((row + 1) * columns).min(cells.len());
        let tall = |i: usize| pictures[i].height() + line * cells[i].lines.len() as u32;
        range.map(tall).max().unwrap_or(0) + GAP
    };
    let rows = cells.len().div_ceil(columns);
    let tops: Vec<u32> = (0..=rows)
        .scan(GAP, |y, row| {
            let top = *y;
            *y += if row < rows { row_height(row) + GAP } else { 0 };
            Some(top)
        })
        .collect();
    let width = GAP + columns as u32 * (widest + GAP);
    let mut out = RgbImage::from_pixel(width, tops[rows].max(1), image::Rgb([255; 3]));
    for (i, (cell, picture)) in cells.iter().zip(&pictures).enumerate() {
        let x = GAP + (i % columns) as u32 * (widest + GAP);
        let mut y = tops[i / columns];
        imageops::replace(&mut out, picture, x.into(), y.into());
        y += picture.height() + 2;
        for text in &cell.lines {
            y += write_text(&mut out, text, (x, y), widest);
        }
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
    }

    #[test]
    fn captions_are_drawn_below_their_pictures() {
        let grey = RgbImage::from_pixel(32, 16, image::Rgb([128; 3]));
        let cell = |text: &str| Cell::new(grey.clone(), [text.to_string(), String::new()]);
        let sheet = captioned(&[cell("a"), cell("naïve 漢"), cell(&"x".repeat(99))], 2);
        // 32 x 16 becomes 128 x 64, with two lines of 13 below.
        let row = 64 + 26 + 2 * GAP;
        assert_eq!(sheet.dimensions(), (2 * (128 + GAP) + GAP, 2 * row + GAP));
        assert_eq!(sheet.get_pixel(GAP + 127, GAP + 63).0, [128; 3]);
        let dark = |x0: u32| {
            let area = (x0..x0 + 128).flat_map(|x| (GAP + 64..GAP + 64 + 16).map(move |y| (x, y)));
            area.filter(|&(x, y)| sheet.get_pixel(x, y).0[0] == 40)
                .count()
        };
        assert!(dark(GAP) > 5 && dark(GAP) < dark(2 * GAP + 128));
        assert_eq!(captioned(&[], 3).width(), 2 * GAP + 1);
    }
}
