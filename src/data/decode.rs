//! Bytes of an image file to RGB pixels, as PIL's `Image.open(..).convert("RGB")` gives them.

use crate::{Error, Result};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use libjpeg_turbo_rs as jpeg;
use std::io::Cursor;
use std::path::Path;
use std::sync::Mutex;

/// The most pixels an image may have (a 12,000 x 9,000 photograph has 108 million).
const MAX_PIXELS: u64 = 300_000_000;
/// The most memory a decoder may ask for.
const MAX_BYTES: u64 = 3 << 30;
/// Images above this many pixels are decoded one at a time, so that a folder of huge ones fits in memory.
const HUGE_PIXELS: u64 = 16_000_000;

/// Pixels of one image, 8 bits a channel.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `[height, width, 3]`
    pub pixels: Vec<u8>,
}

impl std::fmt::Debug for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rgb({}x{})", self.width, self.height)
    }
}

/// Whether `head` (the first 16 bytes or more) starts like a format that [`decode`] reads.
#[must_use]
pub fn looks_like_image(head: &[u8]) -> bool {
    image::guess_format(head).is_ok_and(|f| f.reading_enabled())
}

/// Reads and decodes an image file.
///
/// # Errors
/// [`Error::Input`] naming the file and what is wrong with it.
pub fn decode_file(path: &Path) -> Result<Rgb> {
    let bytes = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
    decode(&bytes).map_err(|e| e.context(path.display()))
}

/// Decodes an image by its content (the file's name is not looked at): JPEG, PNG, BMP, GIF (first frame), WebP, TIFF
/// (first page), PNM. Grey is repeated over the channels, 16 bits are scaled to 8, alpha is dropped, CMYK is converted
/// as PIL does, and EXIF orientation is ignored as PIL's default does.
///
/// # Errors
/// [`Error::Input`]: empty, not an image, truncated or corrupt, or too large.
pub fn decode(bytes: &[u8]) -> Result<Rgb> {
    if bytes.is_empty() {
        return Err(Error::input("the file is empty"));
    }
    let format = image::guess_format(bytes).map_err(|_| {
        Error::input("not an image (no known format starts with these bytes); known are JPEG, PNG, BMP, GIF, WebP, TIFF and PNM")
    })?;
    // A codec's panic on hostile bytes must not take the run down: it becomes the report of one bad file.
    std::panic::catch_unwind(|| match format {
        ImageFormat::Jpeg => decode_jpeg(bytes),
        _ => decode_other(bytes, format),
    })
    .unwrap_or_else(|_| Err(Error::input("the decoder failed on corrupt data")))
}

/// Held while a huge image is decoded.
fn one_at_a_time(pixels: u64) -> Option<std::sync::MutexGuard<'static, ()>> {
    static HUGE: Mutex<()> = Mutex::new(());
    (pixels > HUGE_PIXELS).then(|| HUGE.lock().unwrap_or_else(|e| e.into_inner()))
}

fn check_size(width: u64, height: u64) -> Result<()> {
    if width == 0 || height == 0 {
        return Err(Error::input(format!("an image of {width}x{height} pixels")));
    }
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(Error::input(format!(
            "{width}x{height} pixels, more than the limit of {} million",
            MAX_PIXELS / 1_000_000
        )));
    }
    Ok(())
}

/// JPEG goes through a decoder that gives libjpeg-turbo's bits (PIL's and torchvision's too): pretrained weights lose
/// accuracy on small JPEG images where the inverse DCT or the chroma upsampling rounds in another way.
fn decode_jpeg(bytes: &[u8]) -> Result<Rgb> {
    let bad = |e: jpeg::JpegError| Error::input(format!("JPEG: {e}"));
    let limits = jpeg::DecodeLimits {
        max_pixels: MAX_PIXELS,
        max_scans: 1000,
        max_memory: Some(MAX_BYTES),
        ..Default::default()
    };
    let mut decoder = jpeg::Decoder::new_with_limits(bytes, limits).map_err(bad)?;
    let (width, height) = (decoder.header().width, decoder.header().height);
    check_size(width.into(), height.into())?;
    let _guard = one_at_a_time(u64::from(width) * u64::from(height));
    let cmyk = decoder.header().components.len() == 4;
    let format = if cmyk {
        jpeg::PixelFormat::Cmyk
    } else {
        jpeg::PixelFormat::Rgb
    };
    decoder.set_output_format(format);
    let image = decoder.decode_image().map_err(bad)?;
    if let Some(warning) = image.warnings.first() {
        return Err(Error::input(format!("JPEG: {warning}")));
    }
    let pixels = if cmyk {
        cmyk_to_rgb(&image.data)
    } else {
        image.data
    };
    whole(image.width as u32, image.height as u32, pixels)
}

/// Adobe's CMYK is stored inverted (255 is no ink), which is how every CMYK JPEG in the wild is. The product is PIL's.
fn cmyk_to_rgb(cmyk: &[u8]) -> Vec<u8> {
    let mul = |a: u32, b: u32| {
        let t = a * b + 128;
        ((t >> 8) + t) >> 8
    };
    let (quads, _) = cmyk.as_chunks::<4>();
    quads
        .iter()
        .flat_map(|&[c, m, y, k]| {
            // With c' = 255 - c inks and k' = 255 - k black, PIL's r = (255 - k') - (255 - k') c' / 255.
            let light = u32::from(k);
            [c, m, y].map(|ink| (light - mul(255 - u32::from(ink), light)) as u8)
        })
        .collect()
}

fn decode_other(bytes: &[u8], format: ImageFormat) -> Result<Rgb> {
    let bad = |e: image::ImageError| Error::input(format!("{format:?}: {e}"));
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(bad)?;
    let (width, height) = decoder.dimensions();
    check_size(width.into(), height.into())?;
    let _guard = one_at_a_time(u64::from(width) * u64::from(height));
    let pixels = DynamicImage::from_decoder(decoder)
        .map_err(bad)?
        .into_rgb8();
    whole(width, height, pixels.into_raw())
}

fn whole(width: u32, height: u32, pixels: Vec<u8>) -> Result<Rgb> {
    if pixels.len() as u64 != u64::from(width) * u64::from(height) * 3 {
        return Err(Error::input(format!(
            "{width}x{height} pixels, but {} bytes were decoded",
            pixels.len()
        )));
    }
    Ok(Rgb {
        width,
        height,
        pixels,
    })
}
