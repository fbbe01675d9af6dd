//! `synthetic[:CLASSESxSIZE]`: made-up images that a network can learn, for trying things without data.

use super::random::{Use, stream};
use super::split::{Pixels, Split};
use crate::Result;
use rayon::prelude::*;
use std::sync::Arc;

/// Images of each class: for training, for testing.
const PER_CLASS: [usize; 2] = [100, 20];

/// Each class is a sum of three coloured plane waves; each image shifts it by up to an eighth of its size, varies its
/// contrast and adds noise. The same seed gives the same images.
pub(crate) fn open(classes: u32, size: u32, seed: u64) -> Result<(Split, Split)> {
    let names = Arc::new(
        (0..classes)
            .map(|c| format!("class {c}"))
            .collect::<Vec<_>>(),
    );
    let make = |first: usize, per_class: usize| {
        let one = (size * size * 3) as usize;
        let mut bytes = vec![0; one * per_class * classes as usize];
        bytes
            .par_chunks_exact_mut(one)
            .enumerate()
            .for_each(|(i, out)| {
                let class = i as u32 % classes;
                draw(
                    out,
                    size,
                    class,
                    (first + i / classes as usize) as u32,
                    seed,
                );
            });
        let labels = (0..per_class as u32 * classes)
            .map(|i| i % classes)
            .collect();
        Split::new(Pixels::Memory { size, bytes }, labels, names.clone())
    };
    Ok((
        make(1, PER_CLASS[0])?,
        make(1 + PER_CLASS[0], PER_CLASS[1])?,
    ))
}

fn draw(out: &mut [u8], size: u32, class: u32, image: u32, seed: u64) {
    // Image 0 of a class is its pattern; the images themselves count from 1.
    let mut pattern = stream(seed, Use::Synthetic, class, 0);
    let tau = std::f32::consts::TAU;
    let waves: [[f32; 6]; 3] = std::array::from_fn(|_| {
        let [kx, ky] = [(); 2].map(|()| (pattern.uniform() * 2.0 - 1.0) * 3.0 * tau / size as f32);
        [
            kx,
            ky,
            pattern.uniform() * tau,
            pattern.uniform(),
            pattern.uniform(),
            pattern.uniform(),
        ]
    });
    let mut random = stream(seed, Use::Synthetic, class, image);
    let [dx, dy] = [(); 2].map(|()| (random.uniform() - 0.5) * size as f32 / 4.0);
    let contrast = 60.0 + 40.0 * random.uniform();
    for (i, pixel) in out.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((i as u32 % size) as f32 + dx, (i as u32 / size) as f32 + dy);
        let heights = waves.map(|[kx, ky, phase, ..]| (kx * x + ky * y + phase).sin());
        for (c, value) in pixel.iter_mut().enumerate() {
            let signal: f32 = waves
                .iter()
                .zip(heights)
                .map(|(w, h)| h * (w[3 + c] * 2.0 - 1.0))
                .sum();
            let noise = (random.uniform() - 0.5) * 50.0;
            *value = (128.0 + contrast * signal * 0.6 + noise).clamp(0.0, 255.0) as u8;
        }
    }
}
