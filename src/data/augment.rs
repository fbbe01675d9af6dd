//! Geometry of a training sample: flip, padded crop, rotation and translation as one affine map.
//!
//! The pixels are resampled on the device; here only the six numbers of each map are drawn. They depend on (seed,
//! epoch, sample) alone: not on the batch size, the threads, or where a run was resumed.

use super::random::{Use, stream};
use crate::{Error, Result};

/// What may happen to a sample, in this order: padded crop, flip, then rotation and translation.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Augment {
    /// Mirror left and right, with probability one half (`RandomHorizontalFlip`).
    pub hflip: bool,
    /// Pad by this many pixels on every side, then cut the size out anywhere (`RandomCrop(size, padding)`).
    pub crop_pad: u32,
    /// Rotate about the centre by up to this many degrees either way (`RandomAffine(degrees)`).
    pub rotate_degrees: f32,
    /// Shift by up to this share of the size either way, in whole pixels (`RandomAffine(translate)`).
    pub translate: f32,
}

/// An output pixel's place in the input: `x_in = m[0] x + m[1] y + m[2]`, `y_in = m[3] x + m[4] y + m[5]`, where the
/// centre of the pixel in column `x` and row `y` has coordinates `(x, y)`.
pub type Affine = [f32; 6];

/// The map that changes nothing.
pub const IDENTITY: Affine = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];

impl Augment {
    /// Whether every map is the identity.
    #[must_use]
    pub fn is_none(&self) -> bool {
        !self.hflip && self.crop_pad == 0 && self.rotate_degrees == 0.0 && self.translate == 0.0
    }

    /// # Errors
    /// [`Error::Input`] for a rotation outside 0..=180 or a translation outside 0..=1.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=180.0).contains(&self.rotate_degrees) {
            return Err(Error::input(format!(
                "rotation {}: give 0 to 180 degrees",
                self.rotate_degrees
            )));
        }
        if !(0.0..=1.0).contains(&self.translate) {
            return Err(Error::input(format!(
                "translation {}: give a share of the size, 0 to 1",
                self.translate
            )));
        }
        if self.crop_pad > 4096 {
            return Err(Error::input(format!(
                "crop padding {}: give up to 4096 pixels",
                self.crop_pad
            )));
        }
        Ok(())
    }

    /// The map of sample `sample` (its index in the data set) in `epoch`, for images of `size` pixels.
    #[must_use]
    pub fn affine(&self, size: u32, seed: u64, epoch: u32, sample: u32) -> Affine {
        let mut random = stream(seed, Use::Augment, epoch, sample);
        // Every number is drawn whether or not it is used, so that switching one part off leaves the others as they are.
        let flip = random.below(2) == 1;
        let span = 2 * self.crop_pad + 1;
        let (dx, dy) = (random.below(span), random.below(span));
        let degrees = (2.0 * random.uniform() - 1.0) * self.rotate_degrees;
        let reach = self.translate * size as f32;
        let shift = [random.uniform(), random.uniform()].map(|u| ((2.0 * u - 1.0) * reach).round());
        let crop = [dx, dy].map(|d| d as f32 - self.crop_pad as f32);
        compose(size, self.hflip && flip, crop, degrees, shift)
    }
}

/// Output to input: undo the shift, then the rotation about the centre, then the flip, then the crop.
fn compose(size: u32, flip: bool, crop: [f32; 2], degrees: f32, shift: [f32; 2]) -> Affine {
    let centre = (f64::from(size) - 1.0) / 2.0;
    let (sin, cos) = f64::from(degrees).to_radians().sin_cos();
    let [tx, ty] = shift.map(f64::from);
    // Rotating the image by `degrees` clockwise (rows go down) reads the input at the place turned back.
    let mut m = [cos, sin, 0.0, -sin, cos, 0.0];
    m[2] = centre - cos * (centre + tx) - sin * (centre + ty);
    m[5] = centre + sin * (centre + tx) - cos * (centre + ty);
    if flip {
        m = [-m[0], -m[1], 2.0 * centre - m[2], m[3], m[4], m[5]];
    }
    m[2] += f64::from(crop[0]);
    m[5] += f64::from(crop[1]);
    m.map(|v| v as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(m: &Affine, x: f32, y: f32) -> (f32, f32) {
        (m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5])
    }

    #[test]
    fn flips_and_crops_are_exact() {
        assert_eq!(compose(32, false, [0.0; 2], 0.0, [0.0; 2]), IDENTITY);
        assert_eq!(
            compose(32, true, [0.0; 2], 0.0, [0.0; 2]),
            [-1.0, 0.0, 31.0, 0.0, 1.0, 0.0]
        );
        // Crop corner (1, 6) of a 4-padded image: output (0, 0) is input (-3, 2).
        assert_eq!(
            at(&compose(32, false, [-3.0, 2.0], 0.0, [0.0; 2]), 0.0, 0.0),
            (-3.0, 2.0)
        );
        // Cropped first, flipped second: the output's left edge is the crop's right edge.
        assert_eq!(
            at(&compose(32, true, [-3.0, 2.0], 0.0, [0.0; 2]), 0.0, 0.0),
            (28.0, 2.0)
        );
        // Shifted right by 2: output column 2 is input column 0.
        assert_eq!(
            at(&compose(32, false, [0.0; 2], 0.0, [2.0, 0.0]), 2.0, 5.0),
            (0.0, 5.0)
        );
    }

    /// torchvision 0.29, `_get_inverse_affine_matrix([0, 0], angle, translate, 1, [0, 0])` about the centre of 32 px.
    #[test]
    fn rotation_is_torchvisions() {
        let close =
            |a: (f32, f32), b: (f32, f32)| (a.0 - b.0).abs() < 1e-4 && (a.1 - b.1).abs() < 1e-4;
        let quarter = compose(5, false, [0.0; 2], 90.0, [0.0; 2]);
        // Clockwise by 90 degrees: the top left of the output was the bottom left.
        assert!(close(at(&quarter, 0.0, 0.0), (0.0, 4.0)), "{quarter:?}");
        let m = compose(32, false, [0.0; 2], 10.0, [3.0, -2.0]);
        // [cos, sin, -3 cos + 2 sin], [-sin, cos, 3 sin + 2 cos] relative to the centre 15.5.
        let (s, c) = 10f32.to_radians().sin_cos();
        let (x, y) = (4.0 - 15.5, 20.0 - 15.5);
        let want = (
            c * x + s * y - 3.0 * c + 2.0 * s + 15.5,
            -s * x + c * y + 3.0 * s + 2.0 * c + 15.5,
        );
        assert!(
            close(at(&m, 4.0, 20.0), want),
            "{:?} {want:?}",
            at(&m, 4.0, 20.0)
        );
    }

    #[test]
    fn draws_depend_on_seed_epoch_and_sample_alone() {
        let a = Augment {
            hflip: true,
            crop_pad: 4,
            rotate_degrees: 10.0,
            translate: 0.1,
        };
        assert_eq!(a.affine(32, 1, 2, 3), a.affine(32, 1, 2, 3));
        assert_ne!(a.affine(32, 1, 2, 3), a.affine(32, 1, 2, 4));
        assert_ne!(a.affine(32, 1, 2, 3), a.affine(32, 1, 3, 3));
        assert_ne!(a.affine(32, 1, 2, 3), a.affine(32, 2, 2, 3));
        let flips = Augment {
            hflip: true,
            ..Augment::default()
        };
        let n = (0..1000)
            .filter(|&i| flips.affine(32, 0, 0, i)[0] < 0.0)
            .count();
        assert!((440..560).contains(&n), "{n} flips of 1000");
        let crops = Augment {
            crop_pad: 2,
            ..Augment::default()
        };
        let mut seen = [false; 5];
        for i in 0..200 {
            let m = crops.affine(32, 0, 0, i);
            assert_eq!(m[..2], [1.0, 0.0]);
            seen[(m[2] + 2.0) as usize] = true;
        }
        assert_eq!(seen, [true; 5]);
        assert!(
            Augment {
                translate: 2.0,
                ..a
            }
            .check()
            .is_err()
        );
        assert!(Augment::default().is_none());
    }
}
