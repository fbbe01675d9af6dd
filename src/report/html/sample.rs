//! Sample predictions: images inside the page, each with its true and predicted class.

use super::super::png_data_uri;
use super::escape;
use crate::{Error, Result};

/// Longest side of a sample image in pixels; larger ones are reduced.
pub(super) const SAMPLE_SIDE: u32 = 96;
/// Most sample images on a page.
pub(super) const SAMPLES: usize = 64;

/// One image with its true and predicted class, ready to be shown.
#[derive(Clone, Debug)]
pub struct Sample {
    uri: String,
    side: u32,
    truth: String,
    predicted: String,
    right: bool,
    confidence: f64,
}

impl Sample {
    /// An image `[height, width, 3]` of 8-bit RGB (before normalisation), the names of its true and predicted class,
    /// whether they are the same class, and the probability of the prediction (0 to 1).
    ///
    /// # Errors
    /// [`Error::Input`] where the size and the number of bytes disagree.
    pub fn new(
        rgb: &[u8],
        width: u32,
        height: u32,
        truth: &str,
        predicted: &str,
        right: bool,
        confidence: f64,
    ) -> Result<Self> {
        let Some(image) =
            image::RgbImage::from_raw(width, height, rgb.to_vec()).filter(|i| !i.is_empty())
        else {
            return Err(Error::input(format!(
                "sample image: {} bytes for {width} x {height} RGB pixels",
                rgb.len()
            )));
        };
        let longest = width.max(height);
        let image = if longest > SAMPLE_SIDE {
            let scaled = |v: u32| (v * SAMPLE_SIDE).div_ceil(longest);
            image::imageops::resize(
                &image,
                scaled(width),
                scaled(height),
                image::imageops::FilterType::Triangle,
            )
        } else {
            image
        };
        let uri = png_data_uri(
            image.as_raw(),
            image.width(),
            image.height(),
            image::ExtendedColorType::Rgb8,
        )?;
        let (truth, predicted) = (truth.to_string(), predicted.to_string());
        Ok(Sample {
            uri,
            side: image.width().max(image.height()),
            truth,
            predicted,
            right,
            confidence,
        })
    }

    fn html(&self) -> String {
        let percent = if self.confidence.is_finite() {
            format!(
                " <span class=\"soft\">{:.0}&nbsp;%</span>",
                100.0 * self.confidence
            )
        } else {
            String::new()
        };
        let (truth, predicted) = (escape(&self.truth), escape(&self.predicted));
        let (class, words) = if self.right {
            ("yes", format!("<b>✓ {predicted}</b>{percent}"))
        } else {
            ("no", format!("<b>✗ {predicted}</b>{percent}<br>is {truth}"))
        };
        // Photographs are smoothed, tiny images shown pixel by pixel.
        let tiny = if self.side <= 48 {
            " class=\"tiny\""
        } else {
            ""
        };
        let uri = &self.uri;
        format!(
            "<li class=\"{class}\"><img{tiny} src=\"{uri}\" alt=\"true class {truth}, predicted {predicted}\">{words}</li>\n"
        )
    }
}

pub(super) fn samples_html(samples: &[Sample], most: usize) -> String {
    let mut out = String::from("<ul class=\"sheet\">\n");
    samples
        .iter()
        .take(most)
        .for_each(|s| out.push_str(&s.html()));
    out.push_str("</ul>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_checked_and_reduced() {
        assert!(Sample::new(&[0; 11], 2, 2, "a", "b", true, 1.0).is_err());
        assert!(Sample::new(&[], 0, 0, "a", "b", true, 1.0).is_err());
        let s = Sample::new(&[9; 3 * 12_000], 12_000, 1, "a", "b", true, f64::NAN).unwrap();
        assert_eq!(s.side, SAMPLE_SIDE);
        assert!(!s.html().contains('%'));
    }
}
