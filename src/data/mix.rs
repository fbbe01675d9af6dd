//! Mixing of samples within a batch: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), each batch with its mirror
//! image, one ratio a batch, as timm does.

use super::loader::Batch;
use super::random::{Use, stream};
use crate::philox::Philox;

/// How batches are mixed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mix {
    /// Parameter of the beta distribution of mixup's ratio; 0: no mixup.
    pub mixup: f32,
    /// The same of CutMix; with both, each batch takes one of them at even odds.
    pub cutmix: f32,
    /// Classes, for the targets.
    pub classes: usize,
}

impl Mix {
    /// Mixes slot `i` with slot `n - 1 - i` and writes the targets.
    pub(crate) fn apply(&self, batch: &mut Batch, size: usize, seed: u64) {
        let mut random = stream(seed, Use::Mix, batch.epoch, batch.step as u32);
        let n = batch.labels.len();
        let pixels = size * size * 3;
        let cut = match (self.mixup > 0.0, self.cutmix > 0.0) {
            (true, true) => random.below(2) == 1,
            (_, cut) => cut,
        };
        let alpha = if cut { self.cutmix } else { self.mixup };
        let mut keep = beta(&mut random, f64::from(alpha));
        let mut area = [0, 0, size, size];
        if cut {
            area = cut_box(&mut random, size, keep);
            keep = 1.0 - ((area[2] - area[0]) * (area[3] - area[1])) as f64 / (size * size) as f64;
        }
        let (first, second) = batch.images.split_at_mut(n.div_ceil(2) * pixels);
        for i in 0..n / 2 {
            // The second half begins behind the middle one of an odd number.
            let a = &mut first[i * pixels..(i + 1) * pixels];
            let b = &mut second[(n / 2 - 1 - i) * pixels..][..pixels];
            for y in area[1]..area[3] {
                let row = (y * size + area[0]) * 3..(y * size + area[2]) * 3;
                let (a, b) = (&mut a[row.clone()], &mut b[row]);
                if cut {
                    a.swap_with_slice(b);
                } else {
                    let (k, rest) = (keep as f32, 1.0 - keep as f32);
                    for (a, b) in a.iter_mut().zip(b) {
                        (*a, *b) = (k * *a + rest * *b, k * *b + rest * *a);
                    }
                }
            }
        }
        batch.targets.resize(n * self.classes, 0.0);
        for i in 0..batch.valid {
            let row = &mut batch.targets[i * self.classes..(i + 1) * self.classes];
            row[batch.labels[i] as usize] += keep as f32;
            row[batch.labels[n - 1 - i] as usize] += 1.0 - keep as f32;
        }
    }
}

/// Left, top, right, bottom of a box of `1 - keep` of the area about a centre anywhere, cut off at the edges.
fn cut_box(random: &mut Philox, size: usize, keep: f64) -> [usize; 4] {
    let side = (size as f64 * (1.0 - keep).sqrt()) as i64;
    let [x, y] = [random.below(size as u32), random.below(size as u32)].map(i64::from);
    let clip = |v: i64| v.clamp(0, size as i64) as usize;
    [
        clip(x - side / 2),
        clip(y - side / 2),
        clip(x + side / 2),
        clip(y + side / 2),
    ]
}

/// From the beta distribution of parameters `(alpha, alpha)`.
fn beta(random: &mut Philox, alpha: f64) -> f64 {
    let (a, b) = (gamma(random, alpha), gamma(random, alpha));
    // Both can underflow where alpha is tiny: then one of the ends.
    if a + b > 0.0 {
        a / (a + b)
    } else {
        f64::from(random.below(2))
    }
}

/// From the gamma distribution (Marsaglia & Tsang 2000).
fn gamma(random: &mut Philox, alpha: f64) -> f64 {
    let mut uniform = || (f64::from(random.word()) + 0.5) / 4_294_967_296.0;
    if alpha < 1.0 {
        let u = uniform();
        return gamma(random, alpha + 1.0) * u.powf(1.0 / alpha);
    }
    let d = alpha - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = f64::from(random.normal());
        let v = (1.0 + c * x).powi(3);
        let u = (f64::from(random.word()) + 0.5) / 4_294_967_296.0;
        if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A batch of five images of 4x4 pixels, image `i` all `i`, the last slot a repetition.
    fn batch(step: usize) -> Batch {
        Batch {
            step,
            valid: 4,
            images: (0..5u8).flat_map(|i| [f32::from(i % 4); 48]).collect(),
            labels: vec![0, 1, 2, 0, 0],
            indices: vec![0; 5],
            ..Default::default()
        }
    }

    #[test]
    fn what_a_sample_is_made_of_is_its_target() {
        for (mixup, cutmix) in [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)] {
            let mix = Mix {
                mixup,
                cutmix,
                classes: 3,
            };
            let mut ratios = vec![];
            for step in 0..50 {
                let mut b = batch(step);
                mix.apply(&mut b, 4, 9);
                let again = &mut batch(step);
                mix.apply(again, 4, 9);
                assert_eq!(&b, again);
                // Sample 1 (all ones) is mixed with sample 3 (all threes), of classes 1 and 0.
                let share = b.images[48..96]
                    .iter()
                    .map(|v| (v - 1.0) / 2.0)
                    .sum::<f32>()
                    / 48.0;
                assert!((b.targets[3] - share).abs() < 1e-5, "{:?}", b.targets);
                assert!((b.targets[4] - (1.0 - share)).abs() < 1e-5);
                // The middle one is mixed with itself.
                assert!(b.targets[6..8] == [0.0; 2] && (b.targets[8] - 1.0).abs() < 1e-6);
                assert_eq!(b.targets[12..], [0.0; 3], "a repetition has no target");
                if mixup == 0.0 {
                    assert!(b.images.iter().all(|v| v.fract() == 0.0));
                }
                ratios.push(share);
            }
            let mean = ratios.iter().sum::<f32>() / 50.0;
            assert!((0.3..0.7).contains(&mean) || cutmix > 0.0, "{mean}");
            assert!(ratios.iter().any(|&r| r != ratios[0]));
        }
    }

    #[test]
    fn ratios_follow_the_beta_distribution() {
        let mut random = Philox::new(3, 0);
        for alpha in [0.2, 1.0, 3.0] {
            let draws: Vec<f64> = (0..20_000).map(|_| beta(&mut random, alpha)).collect();
            let mean = draws.iter().sum::<f64>() / 2e4;
            let var = draws.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 2e4;
            let want = 1.0 / (4.0 * (2.0 * alpha + 1.0));
            assert!((mean - 0.5).abs() < 0.01 && (var / want - 1.0).abs() < 0.04);
        }
    }
}
