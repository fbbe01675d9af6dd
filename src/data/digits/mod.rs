//! `digits`: 1,797 handwritten digits of 8x8 pixels, in the binary itself (see ATTRIBUTION.md beside this file).

use super::split::{Pixels, Split};
use crate::{Error, Result};
use std::io::Read;
use std::sync::Arc;

const FILE: &[u8] = include_bytes!("digits.csv.gz");

/// Side of an image.
pub(crate) const SIZE: u32 = 8;
/// Mean of the pixels in `[0, 1]`.
pub(crate) const MEAN: f32 = 0.3053;
/// Standard deviation of the pixels in `[0, 1]`.
pub(crate) const STD: f32 = 0.3760;

/// Train (1,437) and test (360): a stratified fifth, always the same. Values 0..=16 become 0..=255, and the grey is
/// repeated over three channels, so that every model takes them.
pub(crate) fn open() -> Result<(Split, Split)> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(FILE)
        .read_to_string(&mut text)
        .map_err(|e| Error::run(format!("the built-in digits do not unpack: {e}")))?;
    let (mut bytes, mut labels) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let values: Vec<u32> = line.split(',').filter_map(|v| v.parse().ok()).collect();
        let Some((&label, pixels)) = values.split_last().filter(|(_, p)| p.len() == 64) else {
            return Err(Error::run("the built-in digits are damaged"));
        };
        bytes.extend(pixels.iter().flat_map(|v| [((v * 255 + 8) / 16) as u8; 3]));
        labels.push(label);
    }
    let classes = Arc::new((0..10).map(|d| d.to_string()).collect());
    Split::new(Pixels::Memory { size: SIZE, bytes }, labels, classes)?.split_off(0.2, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_scikit_learn() {
        let (train, test) = open().unwrap();
        assert_eq!((train.len(), test.len()), (1437, 360));
        let Pixels::Memory { bytes, .. } = &train.source.pixels else {
            panic!("in memory")
        };
        // load_digits().images[0][0] is 0 0 5 13 9 1 0 0, and the first labels are 0 1 2 3.
        let row: Vec<u8> = bytes[..24].iter().step_by(3).copied().collect();
        assert_eq!(
            row,
            [0, 0, 5, 13, 9, 1, 0, 0].map(|v: u32| (f64::from(v) * 255.0 / 16.0).round() as u8)
        );
        assert_eq!(train.source.labels[..4], [0, 1, 2, 3]);
        // numpy.bincount(load_digits().target)
        let counts: Vec<usize> = train
            .counts()
            .iter()
            .zip(test.counts())
            .map(|(a, b)| a + b)
            .collect();
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        let mean = bytes.iter().map(|&b| f64::from(b)).sum::<f64>() / bytes.len() as f64 / 255.0;
        assert!((mean - f64::from(MEAN)).abs() < 1e-3, "{mean}");
    }
}
