//! Corruptions of decoded images: what a camera, a codec or a rearrangement does to them, at several levels.
//!
//! Levels of blur and translation are shares of the shorter side and levels of noise shares of the full range, so that they
//! mean the same for images of any size. What is moved in from outside repeats the image's edge.

use crate::data::{Rgb, decode};
use crate::philox::Philox;
use crate::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{ExtendedColorType, RgbImage};

/// The shorter side of what is corrupted, at most: a blur or a codec at full camera resolution would vanish in the resize.
const LARGEST: u32 = 256;
/// What covers an occluded place.
const GREY: u8 = 128;

/// A kind of corruption.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Corruption {
    /// JPEG at lower and lower quality
    Jpeg,
    /// Gaussian blur
    Blur,
    /// Gaussian noise on each channel
    Noise,
    /// Rotation about the centre, to either side
    Rotation,
    /// Translation in any direction
    Translation,
    /// The image cut into a grid of pieces, which are shuffled (Naseer et al. 2021)
    Shuffle,
    /// Places of an 8 by 8 grid covered with grey (Naseer et al. 2021)
    Occlusion,
}

impl Corruption {
    /// All of them.
    pub const ALL: [Corruption; 7] = [
        Corruption::Jpeg,
        Corruption::Blur,
        Corruption::Noise,
        Corruption::Rotation,
        Corruption::Translation,
        Corruption::Shuffle,
        Corruption::Occlusion,
    ];

    /// As `--only` has it.
    pub fn id(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or(String::new(), |v| v.get_name().to_string())
    }

    /// Name and what its levels are.
    pub fn about(self) -> (&'static str, &'static str) {
        match self {
            Corruption::Jpeg => ("JPEG", "quality"),
            Corruption::Blur => ("Gaussian blur", "standard deviation (% of the side)"),
            Corruption::Noise => ("Gaussian noise", "standard deviation (% of the range)"),
            Corruption::Rotation => ("rotation", "degrees"),
            Corruption::Translation => ("translation", "distance (% of the side)"),
            Corruption::Shuffle => ("patch shuffling", "pieces along each side"),
            Corruption::Occlusion => ("occlusion", "covered (% of the image)"),
        }
    }

    /// Its levels, mildest first.
    pub fn levels(self) -> [f64; 5] {
        match self {
            Corruption::Jpeg => [80.0, 50.0, 25.0, 10.0, 5.0],
            Corruption::Blur => [1.0, 1.5, 2.0, 3.0, 4.0],
            Corruption::Noise => [2.0, 5.0, 10.0, 20.0, 30.0],
            Corruption::Rotation => [10.0, 20.0, 30.0, 60.0, 90.0],
            Corruption::Translation => [5.0, 10.0, 15.0, 20.0, 30.0],
            Corruption::Shuffle => [2.0, 3.0, 4.0, 6.0, 8.0],
            Corruption::Occlusion => [10.0, 25.0, 50.0, 75.0, 90.0],
        }
    }

    /// `image` corrupted at `level`; what is random is taken from `draw`.
    ///
    /// # Errors
    /// The JPEG codec fails.
    pub fn apply(self, image: &Rgb, level: f64, draw: &mut Philox) -> Result<Rgb> {
        let side = f64::from(image.width.min(image.height));
        match self {
            Corruption::Jpeg => jpeg(image, level as u8),
            Corruption::Blur => {
                let blurred = imageops::blur(&picture(image)?, (level / 100.0 * side) as f32);
                Ok(of(blurred))
            }
            Corruption::Noise => {
                let std = 255.0 * level as f32 / 100.0;
                let mut out = image.clone();
                for v in &mut out.pixels {
                    *v = (f32::from(*v) + std * draw.normal())
                        .round()
                        .clamp(0.0, 255.0) as u8;
                }
                Ok(out)
            }
            Corruption::Rotation => {
                let turn = if draw.below(2) == 0 { level } else { -level };
                let (sin, cos) = turn.to_radians().sin_cos();
                let (cx, cy) = centre(image);
                Ok(moved(image, |x, y| {
                    let (x, y) = (x - cx, y - cy);
                    (cx + cos * x + sin * y, cy - sin * x + cos * y)
                }))
            }
            Corruption::Translation => {
                let angle = f64::from(draw.uniform()) * std::f64::consts::TAU;
                let far = level / 100.0 * side;
                let (dx, dy) = (far * angle.cos(), far * angle.sin());
                Ok(moved(image, |x, y| (x - dx, y - dy)))
            }
            Corruption::Shuffle => Ok(shuffled(image, level as u32, draw)),
            Corruption::Occlusion => Ok(covered(image, level / 100.0, draw)),
        }
    }
}

/// `image`, reduced so that its shorter side has at most 256 pixels.
///
/// # Errors
/// Its pixels are not as many as its sides say.
pub fn reduced(image: Rgb) -> Result<Rgb> {
    let short = image.width.min(image.height);
    if short <= LARGEST {
        return Ok(image);
    }
    let scaled = |v: u32| (u64::from(v) * u64::from(LARGEST)).div_ceil(u64::from(short)) as u32;
    let (w, h) = (scaled(image.width), scaled(image.height));
    Ok(of(imageops::resize(
        &picture(&image)?,
        w,
        h,
        FilterType::Triangle,
    )))
}

fn picture(image: &Rgb) -> Result<RgbImage> {
    RgbImage::from_raw(image.width, image.height, image.pixels.clone())
        .ok_or_else(|| Error::run(format!("{image:?} has {} bytes", image.pixels.len())))
}

fn of(picture: RgbImage) -> Rgb {
    Rgb {
        width: picture.width(),
        height: picture.height(),
        pixels: picture.into_raw(),
    }
}

fn jpeg(image: &Rgb, quality: u8) -> Result<Rgb> {
    let mut bytes = vec![];
    JpegEncoder::new_with_quality(&mut bytes, quality)
        .encode(
            &image.pixels,
            image.width,
            image.height,
            ExtendedColorType::Rgb8,
        )
        .map_err(|e| Error::run(format!("encoding {image:?} as JPEG: {e}")))?;
    decode(&bytes)
}

fn centre(image: &Rgb) -> (f64, f64) {
    (
        f64::from(image.width - 1) / 2.0,
        f64::from(image.height - 1) / 2.0,
    )
}

/// Each pixel from where `from` says, between pixels bilinearly, beyond the edge the edge.
fn moved(image: &Rgb, from: impl Fn(f64, f64) -> (f64, f64)) -> Rgb {
    let (w, h) = (image.width as usize, image.height as usize);
    let mut out = Vec::with_capacity(image.pixels.len());
    for y in 0..h {
        for x in 0..w {
            let (fx, fy) = from(x as f64, y as f64);
            let (fx, fy) = (fx.clamp(0.0, w as f64 - 1.0), fy.clamp(0.0, h as f64 - 1.0));
            let (x0, y0) = (fx as usize, fy as usize);
            let (x1, y1) = ((x0 + 1).min(w - 1), (y0 + 1).min(h - 1));
            let (u, v) = (fx - x0 as f64, fy - y0 as f64);
            for c in 0..3 {
                let p = |x: usize, y: usize| f64::from(image.pixels[(y * w + x) * 3 + c]);
                let above = p(x0, y0) * (1.0 - u) + p(x1, y0) * u;
                let below = p(x0, y1) * (1.0 - u) + p(x1, y1) * u;
                out.push((above * (1.0 - v) + below * v).round() as u8);
            }
        }
    }
    Rgb {
        pixels: out,
        ..*image
    }
}

/// `pieces` by `pieces` whole pieces, each in another's place (Sattolo's algorithm); what does not fill a piece stays at the
/// right and lower edge.
fn shuffled(image: &Rgb, pieces: u32, draw: &mut Philox) -> Rgb {
    let pieces = pieces.min(image.width).min(image.height).max(1) as usize;
    let (w, h) = (
        image.width as usize / pieces,
        image.height as usize / pieces,
    );
    let mut order: Vec<usize> = (0..pieces * pieces).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, draw.below(i as u32) as usize);
    }
    let row = image.width as usize * 3;
    let mut out = image.clone();
    for (to, from) in order.into_iter().enumerate() {
        let corner = |i: usize| (i / pieces * h) * row + i % pieces * w * 3;
        for y in 0..h {
            let (a, b) = (corner(to) + y * row, corner(from) + y * row);
            out.pixels[a..a + w * 3].copy_from_slice(&image.pixels[b..b + w * 3]);
        }
    }
    out
}

/// A `share` of the places of a grid, chosen at random, in grey.
fn covered(image: &Rgb, share: f64, draw: &mut Philox) -> Rgb {
    const GRID: usize = 8;
    let (w, h) = (image.width as usize, image.height as usize);
    let mut order: Vec<usize> = (0..GRID * GRID).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, draw.below(i as u32 + 1) as usize);
    }
    order.truncate((share * order.len() as f64).round() as usize);
    let mut out = image.clone();
    for y in 0..h {
        for x in 0..w {
            let place = y * GRID / h * GRID + x * GRID / w;
            if order.contains(&place) {
                out.pixels[(y * w + x) * 3..][..3].fill(GREY);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(w: u32, h: u32) -> Rgb {
        let pixels = (0..w * h * 3).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8);
        Rgb {
            width: w,
            height: h,
            pixels: pixels.collect(),
        }
    }

    fn draw() -> Philox {
        Philox::new(3, 1)
    }

    #[test]
    fn every_corruption_keeps_the_size_and_repeats_with_its_seed() {
        let one = image(64, 48);
        for c in Corruption::ALL {
            for level in c.levels() {
                let a = c.apply(&one, level, &mut draw()).unwrap();
                assert_eq!((a.width, a.height, a.pixels.len()), (64, 48, 64 * 48 * 3));
                assert_eq!(a, c.apply(&one, level, &mut draw()).unwrap());
                assert_ne!(a, one, "{c:?} {level}");
            }
        }
    }

    #[test]
    fn quarter_turns_and_whole_pixels_are_exact() {
        let one = image(5, 5);
        let turned = Corruption::Rotation.apply(&one, 90.0, &mut draw()).unwrap();
        let at = |r: &Rgb, x: usize, y: usize| r.pixels[(y * 5 + x) * 3];
        let left = (0..25).all(|i| at(&turned, i % 5, i / 5) == at(&one, 4 - i / 5, i % 5));
        let right = (0..25).all(|i| at(&turned, i % 5, i / 5) == at(&one, i / 5, 4 - i % 5));
        assert!(left != right);
        let shifted = moved(&one, |x, y| (x - 2.0, y));
        assert_eq!(at(&shifted, 3, 1), at(&one, 1, 1));
        assert_eq!(at(&shifted, 0, 1), at(&one, 0, 1));
    }

    #[test]
    fn shuffling_keeps_every_pixel_and_occlusion_its_share() {
        let one = image(16, 16);
        let sorted = |r: &Rgb| {
            let mut p = r.pixels.clone();
            p.sort_unstable();
            p
        };
        let pieces = Corruption::Shuffle.apply(&one, 4.0, &mut draw()).unwrap();
        assert_eq!(sorted(&pieces), sorted(&one));
        let mut white = one;
        white.pixels.fill(255);
        let half = Corruption::Occlusion
            .apply(&white, 50.0, &mut draw())
            .unwrap();
        let grey = half.pixels.iter().filter(|&&v| v == GREY).count();
        assert_eq!(grey, 16 * 16 * 3 / 2);
    }

    #[test]
    fn noise_has_its_deviation() {
        let mut grey = image(64, 64);
        grey.pixels.fill(128);
        let noisy = Corruption::Noise.apply(&grey, 10.0, &mut draw()).unwrap();
        let n = noisy.pixels.len() as f64;
        let square = |&v: &u8| (f64::from(v) - 128.0).powi(2);
        let std = (noisy.pixels.iter().map(square).sum::<f64>() / n).sqrt();
        assert!((std - 25.5).abs() < 0.5, "{std}");
    }

    #[test]
    fn large_photographs_are_reduced() {
        let big = reduced(image(1024, 512)).unwrap();
        assert_eq!((big.width, big.height), (512, 256));
        assert_eq!(reduced(image(40, 30)).unwrap(), image(40, 30));
    }
}
