//! An image of any size to the square that a network takes, as torchvision's and timm's evaluation transforms do it.

use super::decode::Rgb;
use crate::{Error, Result};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use std::borrow::Cow;

/// How pixels between pixels are made. Bilinear and bicubic widen their support when they shrink an image
/// (antialiasing), as PIL does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interpolation {
    /// The nearest pixel.
    Nearest,
    /// Linear (torchvision's usual choice).
    Bilinear,
    /// Cubic with a = -0.5 (timm's usual choice).
    Bicubic,
}

/// How an image that is not square becomes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResizeMode {
    /// The shorter side becomes `size / crop_ratio`, then the centre is cut out.
    Shorter,
    /// Both sides become `size / crop_ratio`, whatever the shape was, then the centre is cut out.
    Squash,
}

/// From an image to a network's input.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Preprocess {
    /// Side of the square that comes out.
    pub size: u32,
    /// Share of the resized side that the centre crop keeps (0.875 is 224 of 256; 1 cuts nothing off).
    pub crop_ratio: f32,
    /// Filter.
    pub interpolation: Interpolation,
    /// Shape rule.
    pub resize_mode: ResizeMode,
    /// Subtracted from values in `[0, 1]`, red, green, blue.
    pub mean: [f32; 3],
    /// Divides what is left.
    pub std: [f32; 3],
}

/// ImageNet's mean, in `[0, 1]`.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's standard deviation, in `[0, 1]`.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

impl Preprocess {
    /// Bilinear, shorter side, no crop, ImageNet's mean and standard deviation.
    #[must_use]
    pub fn new(size: u32) -> Self {
        Preprocess {
            size,
            crop_ratio: 1.0,
            interpolation: Interpolation::Bilinear,
            resize_mode: ResizeMode::Shorter,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        }
    }

    /// # Errors
    /// [`Error::Input`] for a size of 0 or above 8,192, a crop ratio outside (0, 1], or a standard deviation that is
    /// not positive.
    pub fn check(&self) -> Result<()> {
        if !(1..=8192).contains(&self.size) {
            return Err(Error::input(format!(
                "image size {}: give 1 to 8192 pixels",
                self.size
            )));
        }
        if !(self.crop_ratio > 0.0 && self.crop_ratio <= 1.0) {
            return Err(Error::input(format!(
                "crop ratio {}: give a share above 0 and up to 1",
                self.crop_ratio
            )));
        }
        let finite = self.mean.iter().chain(&self.std).all(|v| v.is_finite());
        if !finite || self.std.iter().any(|s| *s <= 0.0) {
            return Err(Error::input(format!(
                "mean {:?}, std {:?}: std must be positive",
                self.mean, self.std
            )));
        }
        Ok(())
    }

    /// The value of each channel for each of the 256 levels: `(level / 255 - mean) / std`, in float32 as torchvision's
    /// `ToTensor` and `Normalize` round it.
    #[must_use]
    pub fn levels(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|c| {
            std::array::from_fn(|v| (v as f32 / 255.0 - self.mean[c]) / self.std[c])
        })
    }

    /// What black is after normalisation: the fill of pixels that an augmentation brings in from outside.
    #[must_use]
    pub fn black(&self) -> [f32; 3] {
        std::array::from_fn(|c| -self.mean[c] / self.std[c])
    }

    /// One image as the network takes it: `[size, size, 3]`, normalised.
    ///
    /// # Errors
    /// [`Error::Input`] where [`Preprocess::check`] fails.
    pub fn apply(&self, image: &Rgb) -> Result<Vec<f32>> {
        let mut squares = Squares::new(self)?;
        let mut pixels = vec![0; squares.bytes()];
        squares.make(image, &mut pixels)?;
        let levels = self.levels();
        Ok(pixels
            .iter()
            .enumerate()
            .map(|(i, &v)| levels[i % 3][usize::from(v)])
            .collect())
    }
}

/// Makes squares, keeping the resizer's buffers between images.
pub(crate) struct Squares {
    preprocess: Preprocess,
    resizer: Resizer,
}

impl Squares {
    pub(crate) fn new(preprocess: &Preprocess) -> Result<Self> {
        preprocess.check()?;
        Ok(Squares {
            preprocess: *preprocess,
            resizer: Resizer::new(),
        })
    }

    /// Bytes of one square: `size * size * 3`.
    pub(crate) fn bytes(&self) -> usize {
        let size = self.preprocess.size as usize;
        size * size * 3
    }

    /// Resizes and crops `image` into `out` (`[size, size, 3]`).
    pub(crate) fn make(&mut self, image: &Rgb, out: &mut [u8]) -> Result<()> {
        self.make_from(image.width, image.height, &image.pixels, out)
    }

    /// As [`Squares::make`], from `[height, width, 3]` pixels.
    pub(crate) fn make_from(
        &mut self,
        width: u32,
        height: u32,
        pixels: &[u8],
        out: &mut [u8],
    ) -> Result<()> {
        let size = self.preprocess.size;
        let (w, h) = resized(&self.preprocess, width, height)?;
        if (w, h) == (width, height) {
            return copy_centre(pixels, (w, h), size, out);
        }
        let scaled = self.scale(pixels, (width, height), (w, h))?;
        copy_centre(&scaled, (w, h), size, out)
    }

    /// `[height, width, 3]` pixels at another size.
    fn scale<'a>(
        &mut self,
        pixels: &'a [u8],
        (width, height): (u32, u32),
        (w, h): (u32, u32),
    ) -> Result<Cow<'a, [u8]>> {
        // The horizontal pass first, as PIL does it: the order shows where a bicubic filter overshoots and is clipped
        // between the passes. (Pillow 13 turns the order round for some shapes, where it is faster; Pillow up to 12,
        // with which published accuracies were measured, never does.)
        let steps = match self.preprocess.interpolation {
            Interpolation::Nearest => [(width, height), (w, h)],
            _ => [(w, height), (w, h)],
        };
        let (mut from, mut at) = (Cow::Borrowed(pixels), (width, height));
        for to in steps {
            if to != at {
                from = Cow::Owned(self.resize(&from, at, to)?);
                at = to;
            }
        }
        Ok(from)
    }

    fn resize(&mut self, pixels: &[u8], from: (u32, u32), to: (u32, u32)) -> Result<Vec<u8>> {
        let fail = |e: &dyn std::fmt::Display| {
            Error::run(format!("resizing {from:?} to {to:?} pixels: {e}"))
        };
        // Typed for the one pixel format there is: the untyped call compiles every format into this crate.
        let source =
            TypedImageRef::<U8x3>::from_buffer(from.0, from.1, pixels).map_err(|e| fail(&e))?;
        let mut out = vec![0; to.0 as usize * to.1 as usize * 3];
        let mut target =
            TypedImage::<U8x3>::from_buffer(to.0, to.1, &mut out).map_err(|e| fail(&e))?;
        let algorithm = match self.preprocess.interpolation {
            Interpolation::Nearest => ResizeAlg::Nearest,
            Interpolation::Bilinear => ResizeAlg::Convolution(FilterType::Bilinear),
            Interpolation::Bicubic => ResizeAlg::Convolution(FilterType::CatmullRom),
        };
        let options = ResizeOptions::new().resize_alg(algorithm);
        self.resizer
            .resize_typed(&source, &mut target, &options)
            .map_err(|e| fail(&e))?;
        drop(target);
        Ok(out)
    }
}

/// An image whose shorter side is `size` at most (0: any), resized by a bicubic filter where it is longer.
pub(crate) fn resize_shorter(image: Rgb, size: u32) -> Result<Rgb> {
    if size == 0 || image.width.min(image.height) <= size {
        return Ok(image);
    }
    let p = bicubic(size);
    let to = resized(&p, image.width, image.height)?;
    let pixels = Squares::new(&p)?
        .scale(&image.pixels, (image.width, image.height), to)?
        .into_owned();
    Ok(Rgb {
        width: to.0,
        height: to.1,
        pixels,
    })
}

/// The centre of an image, its shorter side brought to `size` by a bicubic filter.
pub(crate) fn squared(image: &Rgb, size: u32) -> Result<Rgb> {
    let mut squares = Squares::new(&bicubic(size))?;
    let mut pixels = vec![0; squares.bytes()];
    squares.make(image, &mut pixels)?;
    Ok(Rgb {
        width: size,
        height: size,
        pixels,
    })
}

fn bicubic(size: u32) -> Preprocess {
    Preprocess {
        interpolation: Interpolation::Bicubic,
        ..Preprocess::new(size)
    }
}

/// Width and height after resizing, before the centre crop: timm's `floor(size / crop_ratio)` for the side, and
/// torchvision's `int(side * long / short)` for the longer one.
fn resized(p: &Preprocess, width: u32, height: u32) -> Result<(u32, u32)> {
    let side = ((f64::from(p.size) / f64::from(p.crop_ratio) + 1e-3).floor() as u32).max(p.size);
    let (short, long) = (width.min(height).max(1), width.max(height));
    let long = match p.resize_mode {
        ResizeMode::Squash => side,
        ResizeMode::Shorter => (f64::from(side) * f64::from(long) / f64::from(short)) as u32,
    };
    // A strip of a million to one would ask for an image of terabytes.
    if u64::from(long) * u64::from(side) > 300_000_000 {
        return Err(Error::input(format!(
            "{width}x{height} pixels: resizing the shorter side to {side} makes the longer {long}"
        )));
    }
    Ok(if width <= height {
        (side, long)
    } else {
        (long, side)
    })
}

/// torchvision's `center_crop`: the corner is `round((side - size) / 2)` with halves going to the even number.
fn copy_centre(pixels: &[u8], (w, h): (u32, u32), size: u32, out: &mut [u8]) -> Result<()> {
    let corner = |side: u32| (f64::from(side - size) / 2.0).round_ties_even() as usize;
    let (left, top) = (corner(w), corner(h));
    let row = size as usize * 3;
    for (y, line) in out.chunks_exact_mut(row).enumerate() {
        let at = ((top + y) * w as usize + left) * 3;
        line.copy_from_slice(&pixels[at..at + row]);
    }
    Ok(())
}
