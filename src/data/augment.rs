//! What happens to a training sample: its geometry as one affine map, changes of colour, an erased rectangle.
//!
//! The pixels are resampled elsewhere; here the numbers are drawn. They depend on (seed, epoch, sample) alone: not on
//! the batch size, the threads, or where a run was resumed.

use super::colour::Colour;
use super::random::{Use, stream};
use crate::philox::Philox;
use crate::{Error, Result};

/// What may happen to a sample, in this order: random resized crop, padded crop, flip, rotation and translation,
/// RandAugment's geometry; colour jitter and RandAugment's changes of colour; random erasing.
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
    /// Cut out a rectangle of this share of the area or more, of 3:4 to 4:3, and stretch it to the size
    /// (`RandomResizedCrop(scale=(crop_scale, 1))`; cut from the image at the network's size); 0: none.
    pub crop_scale: f32,
    /// Brightness by a factor of up to 1 +- this (`ColorJitter`).
    pub brightness: f32,
    /// Contrast by a factor of up to 1 +- this.
    pub contrast: f32,
    /// Saturation by a factor of up to 1 +- this.
    pub saturation: f32,
    /// Hue by up to this share of the circle either way.
    pub hue: f32,
    /// Operations of RandAugment a sample (Cubuk et al. 2020; torchvision's fourteen); 0: none.
    pub rand_ops: u32,
    /// Their strength, 0 to 30.
    pub rand_magnitude: f32,
    /// Probability that a rectangle of 2 to 33 % of the area is erased (Zhong et al. 2020; `RandomErasing`).
    pub erase: f32,
}

/// What happens to one sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Where each output pixel lies in the input.
    pub map: Affine,
    /// Changes of colour, in order.
    pub colours: Vec<Colour>,
    /// Left, top, width and height of a rectangle to erase.
    pub erase: Option<[u32; 4]>,
}

/// An output pixel's place in the input: `x_in = m[0] x + m[1] y + m[2]`, `y_in = m[3] x + m[4] y + m[5]`, where the
/// centre of the pixel in column `x` and row `y` has coordinates `(x, y)`.
pub type Affine = [f32; 6];

/// The map that changes nothing.
pub const IDENTITY: Affine = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];

impl Augment {
    /// Whether nothing ever happens.
    #[must_use]
    pub fn is_none(&self) -> bool {
        let off = Augment {
            rand_magnitude: self.rand_magnitude,
            ..Augment::default()
        };
        *self == off
    }

    /// Whether pixels are moved.
    #[must_use]
    pub fn moves(&self) -> bool {
        let colours = Augment {
            brightness: self.brightness,
            contrast: self.contrast,
            saturation: self.saturation,
            hue: self.hue,
            rand_magnitude: self.rand_magnitude,
            erase: self.erase,
            ..Augment::default()
        };
        *self != colours
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
        for (name, v, most) in [
            ("random resized crop", self.crop_scale, 1.0),
            ("brightness", self.brightness, 10.0),
            ("contrast", self.contrast, 10.0),
            ("saturation", self.saturation, 10.0),
            ("hue", self.hue, 0.5),
            ("strength of RandAugment", self.rand_magnitude, 30.0),
            ("random erasing", self.erase, 1.0),
        ] {
            if !(0.0..=most).contains(&v) {
                return Err(Error::input(format!("{name} {v}: give 0 to {most}")));
            }
        }
        if self.rand_ops > 14 {
            return Err(Error::input(format!(
                "{} operations of RandAugment: give 0 to 14",
                self.rand_ops
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

    /// What happens to sample `sample` (its index in the data set) in `epoch`, for images of `size` pixels.
    #[must_use]
    pub fn draw(&self, size: u32, seed: u64, epoch: u32, sample: u32) -> Drawn {
        let mut random = stream(seed, Use::Augment, epoch, sample);
        // Every number is drawn whether or not it is used, so that switching one part off leaves the others as they are.
        let flip = random.below(2) == 1;
        let span = 2 * self.crop_pad + 1;
        let (dx, dy) = (random.below(span), random.below(span));
        let degrees = (2.0 * random.uniform() - 1.0) * self.rotate_degrees;
        let reach = self.translate * size as f32;
        let shift = [random.uniform(), random.uniform()].map(|u| ((2.0 * u - 1.0) * reach).round());
        let crop = [dx, dy].map(|d| d as f32 - self.crop_pad as f32);
        let mut map = compose(size, self.hflip && flip, crop, degrees, shift);
        if self.crop_scale > 0.0 {
            map = after(&resized_crop(self.crop_scale, size, &mut random), &map);
        }
        let mut colours = self.jitter(&mut random);
        for _ in 0..self.rand_ops {
            let geometry = self.rand_augment(size, &mut random, &mut colours);
            if let Some(g) = geometry {
                map = after(&map, &g);
            }
        }
        let erase = (self.erase > 0.0 && random.uniform() < self.erase)
            .then(|| rectangle(size, &mut random))
            .flatten();
        Drawn {
            map,
            colours,
            erase,
        }
    }

    /// Colour jitter, in a random order as torchvision does it.
    fn jitter(&self, random: &mut Philox) -> Vec<Colour> {
        let mut all = vec![];
        let mut factor = |by: f32| {
            let low = (1.0 - by).max(0.0);
            low + (1.0 + by - low) * random.uniform()
        };
        if self.brightness > 0.0 {
            all.push(Colour::Brightness(factor(self.brightness)));
        }
        if self.contrast > 0.0 {
            all.push(Colour::Contrast(factor(self.contrast)));
        }
        if self.saturation > 0.0 {
            all.push(Colour::Saturation(factor(self.saturation)));
        }
        if self.hue > 0.0 {
            all.push(Colour::Hue((2.0 * random.uniform() - 1.0) * self.hue));
        }
        for i in (1..all.len()).rev() {
            all.swap(i, random.below(i as u32 + 1) as usize);
        }
        all
    }

    /// One operation of RandAugment with torchvision's strengths: a map, or a change of colour.
    fn rand_augment(
        &self,
        size: u32,
        random: &mut Philox,
        colours: &mut Vec<Colour>,
    ) -> Option<Affine> {
        let strength = self.rand_magnitude / 30.0;
        let op = random.below(14);
        let sign = if random.below(2) == 1 { -1.0 } else { 1.0 };
        let side = size as f32;
        let enhance = 1.0 + sign * 0.9 * strength;
        let shear = sign * 0.3 * strength;
        let shift = (sign * 150.0 / 331.0 * side * strength).trunc();
        let colour = match op {
            0 => return None,
            1 => return Some([1.0, shear, 0.0, 0.0, 1.0, 0.0]),
            2 => return Some([1.0, 0.0, 0.0, shear, 1.0, 0.0]),
            3 => return Some([1.0, 0.0, -shift, 0.0, 1.0, 0.0]),
            4 => return Some([1.0, 0.0, 0.0, 0.0, 1.0, -shift]),
            5 => {
                return Some(compose(
                    size,
                    false,
                    [0.0; 2],
                    sign * 30.0 * strength,
                    [0.0; 2],
                ));
            }
            6 => Colour::Brightness(enhance),
            7 => Colour::Saturation(enhance),
            8 => Colour::Contrast(enhance),
            9 => Colour::Sharpness(enhance),
            10 => Colour::Posterize(8 - (4.0 * strength).round() as u32),
            11 => Colour::Solarize(255.0 * (1.0 - strength)),
            12 => Colour::AutoContrast,
            _ => Colour::Equalize,
        };
        colours.push(colour);
        None
    }
}

/// The map of `first` after that of `second`: where an output pixel of the second lies in the input of the first.
fn after(first: &Affine, second: &Affine) -> Affine {
    let [a, b] = [first, second].map(|m| m.map(f64::from));
    let row = |r: usize| {
        let (u, v, w) = (a[3 * r], a[3 * r + 1], a[3 * r + 2]);
        [
            u * b[0] + v * b[3],
            u * b[1] + v * b[4],
            u * b[2] + v * b[5] + w,
        ]
    };
    let ([p, q, r], [s, t, u]) = (row(0), row(1));
    [p, q, r, s, t, u].map(|v| v as f32)
}

/// A crop of `scale` to all of the area and an aspect of 3:4 to 4:3 (uniform in its logarithm), stretched to the size.
/// Ten tries, then the whole image, as torchvision.
fn resized_crop(scale: f32, size: u32, random: &mut Philox) -> Affine {
    let side = f64::from(size);
    for _ in 0..10 {
        let share = f64::from(scale) + (1.0 - f64::from(scale)) * f64::from(random.uniform());
        let ratio = ((2.0 * f64::from(random.uniform()) - 1.0) * (4f64 / 3.0).ln()).exp();
        let w = (side * (share * ratio).sqrt()).round();
        let h = (side * (share / ratio).sqrt()).round();
        if (1.0..=side).contains(&w) && (1.0..=side).contains(&h) {
            let left = f64::from(random.below((side - w) as u32 + 1));
            let top = f64::from(random.below((side - h) as u32 + 1));
            let (sx, sy) = (w / side, h / side);
            // Pixel centres lie at whole numbers: corner to corner is from -1/2 to size - 1/2.
            let (x, y) = (left + sx / 2.0 - 0.5, top + sy / 2.0 - 0.5);
            return [sx, 0.0, x, 0.0, sy, y].map(|v| v as f32);
        }
    }
    IDENTITY
}

/// A rectangle of 2 to 33 % of the area and an aspect of 0.3 to 3.3; ten tries, as torchvision.
fn rectangle(size: u32, random: &mut Philox) -> Option<[u32; 4]> {
    for _ in 0..10 {
        let area = f64::from(size).powi(2) * (0.02 + 0.31 * f64::from(random.uniform()));
        let (low, high) = (0.3f64.ln(), 3.3f64.ln());
        let ratio = (low + (high - low) * f64::from(random.uniform())).exp();
        let h = (area * ratio).sqrt().round() as u32;
        let w = (area / ratio).sqrt().round() as u32;
        if h < size && w < size && h * w > 0 {
            return Some([random.below(size - w + 1), random.below(size - h + 1), w, h]);
        }
    }
    None
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
            ..Augment::default()
        };
        assert_eq!(a.draw(32, 1, 2, 3), a.draw(32, 1, 2, 3));
        assert_ne!(a.draw(32, 1, 2, 3), a.draw(32, 1, 2, 4));
        assert_ne!(a.draw(32, 1, 2, 3), a.draw(32, 1, 3, 3));
        assert_ne!(a.draw(32, 1, 2, 3), a.draw(32, 2, 2, 3));
        let flips = Augment {
            hflip: true,
            ..Augment::default()
        };
        let n = (0..1000)
            .filter(|&i| flips.draw(32, 0, 0, i).map[0] < 0.0)
            .count();
        assert!((440..560).contains(&n), "{n} flips of 1000");
        let crops = Augment {
            crop_pad: 2,
            ..Augment::default()
        };
        let mut seen = [false; 5];
        for i in 0..200 {
            let m = crops.draw(32, 0, 0, i).map;
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

    #[test]
    fn resized_crops_are_of_the_image_and_of_every_size() {
        let mut random = Philox::new(1, 0);
        let mut areas = vec![];
        for _ in 0..500 {
            let m = resized_crop(0.08, 32, &mut random);
            // The corners of the output, at -1/2 and 31.5, lie within the image's.
            for (x, y) in [(-0.5, -0.5), (31.5, 31.5)] {
                let (u, v) = at(&m, x, y);
                assert!(
                    (-0.51..=31.51).contains(&u) && (-0.51..=31.51).contains(&v),
                    "{m:?}"
                );
            }
            areas.push(m[0] * m[4]);
        }
        let mean = areas.iter().sum::<f32>() / 500.0;
        assert!((0.45..0.62).contains(&mean), "{mean}");
        assert!(areas.iter().any(|&a| a < 0.15) && areas.iter().any(|&a| a > 0.9));
    }

    #[test]
    fn maps_follow_each_other() {
        let flip = compose(8, true, [0.0; 2], 0.0, [0.0; 2]);
        let shift = [1.0, 0.0, -3.0, 0.0, 1.0, 0.0];
        // Flipped, then shifted right by 3: column 4 shows column 1 of the flipped image, 6 of the first.
        assert_eq!(at(&after(&flip, &shift), 4.0, 2.0), (6.0, 2.0));
    }

    #[test]
    fn parts_are_drawn_as_often_as_asked() {
        let a = Augment {
            brightness: 0.4,
            saturation: 0.2,
            rand_ops: 2,
            rand_magnitude: 9.0,
            erase: 0.25,
            ..Augment::default()
        };
        a.check().unwrap();
        assert!(a.moves() && !Augment { rand_ops: 0, ..a }.moves());
        let all: Vec<Drawn> = (0..2000).map(|i| a.draw(32, 3, 1, i)).collect();
        let erased = all.iter().filter_map(|d| d.erase).collect::<Vec<_>>();
        assert!((400..600).contains(&erased.len()), "{}", erased.len());
        assert!(erased.iter().all(|[x, y, w, h]| x + w <= 32 && y + h <= 32));
        let mean = erased.iter().map(|r| r[2] * r[3]).sum::<u32>() as f64 / erased.len() as f64;
        assert!((0.14..0.2).contains(&(mean / 1024.0)), "{mean}");
        // Eight of fourteen operations change colours, five move pixels.
        let colours: usize = all.iter().map(|d| d.colours.len() - 2).sum();
        assert!((2150..2450).contains(&colours), "{colours}");
        let moved = all.iter().filter(|d| d.map != IDENTITY).count();
        // 1 - (9/14)^2 of the samples.
        assert!((1100..1250).contains(&moved), "{moved}");
        assert!(Augment { hue: 0.7, ..a }.check().is_err());
    }
}
