//! Changes of colour on decoded images, as Pillow's `ImageEnhance` and `ImageOps` compute them, in bytes.

/// One change of colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Colour {
    /// Towards black (below 1) or away from it.
    Brightness(f32),
    /// Towards the mean grey.
    Contrast(f32),
    /// Towards the grey image.
    Saturation(f32),
    /// Hue turned by this share of the circle.
    Hue(f32),
    /// Towards the smoothed image.
    Sharpness(f32),
    /// So many bits of each channel are kept.
    Posterize(u32),
    /// Values from this one on are inverted.
    Solarize(f32),
    /// Each channel stretched to 0..255.
    AutoContrast,
    /// Each channel's histogram levelled.
    Equalize,
}

impl Colour {
    /// Applies all to `rgb`, `[rows, side, 3]`, in order.
    pub fn apply_all(all: &[Colour], rgb: &mut [u8], side: usize) {
        for change in all {
            change.apply(rgb, side);
        }
    }

    fn apply(self, rgb: &mut [u8], side: usize) {
        match self {
            Colour::Brightness(f) => table(rgb, |_, v| blend(0, v, f)),
            Colour::Contrast(f) => {
                let pixels = (rgb.len() / 3).max(1) as f64;
                let sum: u64 = rgb.chunks_exact(3).map(|p| u64::from(grey(p))).sum();
                let mean = (sum as f64 / pixels + 0.5) as u8;
                table(rgb, |_, v| blend(mean, v, f));
            }
            Colour::Saturation(f) => {
                for p in rgb.chunks_exact_mut(3) {
                    let g = grey(p);
                    p.iter_mut().for_each(|v| *v = blend(g, *v, f));
                }
            }
            Colour::Hue(turn) => rgb.chunks_exact_mut(3).for_each(|p| turn_hue(p, turn)),
            Colour::Sharpness(f) => sharpen(rgb, side, f),
            Colour::Posterize(bits) => {
                let mask = !(0xffu32 >> bits.min(8)) as u8;
                table(rgb, |_, v| v & mask);
            }
            Colour::Solarize(from) => {
                table(rgb, |_, v| if f32::from(v) < from { v } else { 255 - v });
            }
            Colour::AutoContrast => {
                let histograms = histograms(rgb);
                table(rgb, |c, v| {
                    let h = &histograms[c];
                    let low = h.iter().position(|&n| n > 0).unwrap_or(0);
                    let high = h.iter().rposition(|&n| n > 0).unwrap_or(0);
                    if high <= low {
                        return v;
                    }
                    let scale = 255.0 / (high - low) as f64;
                    (f64::from(v) * scale - low as f64 * scale).clamp(0.0, 255.0) as u8
                });
            }
            Colour::Equalize => {
                let tables = histograms(rgb).map(|h| level(&h));
                table(rgb, |c, v| tables[c][usize::from(v)]);
            }
        }
    }
}

/// Pillow's `Image.blend`: from `a` towards `b`, beyond it where `f` is above 1.
fn blend(a: u8, b: u8, f: f32) -> u8 {
    let v = f32::from(a) + f * (f32::from(b) - f32::from(a));
    v.clamp(0.0, 255.0) as u8
}

/// Pillow's luma (ITU-R 601-2) in fixed point.
fn grey(p: &[u8]) -> u8 {
    let [r, g, b] = [p[0], p[1], p[2]].map(u32::from);
    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
}

/// Applies `f(channel, value)` by a table.
fn table(rgb: &mut [u8], f: impl Fn(usize, u8) -> u8) {
    let tables: [[u8; 256]; 3] = std::array::from_fn(|c| std::array::from_fn(|v| f(c, v as u8)));
    for p in rgb.chunks_exact_mut(3) {
        for (v, t) in p.iter_mut().zip(&tables) {
            *v = t[usize::from(*v)];
        }
    }
}

fn histograms(rgb: &[u8]) -> [[u32; 256]; 3] {
    let mut h = [[0; 256]; 3];
    for p in rgb.chunks_exact(3) {
        for (h, &v) in h.iter_mut().zip(p) {
            h[usize::from(v)] += 1;
        }
    }
    h
}

/// Pillow's `ImageOps.equalize` for one channel.
fn level(h: &[u32; 256]) -> [u8; 256] {
    let identity = std::array::from_fn(|v| v as u8);
    let last = h.iter().rfind(|&&n| n > 0).copied().unwrap_or(0);
    let step = (h.iter().sum::<u32>() - last) / 255;
    if h.iter().filter(|&&n| n > 0).count() <= 1 || step == 0 {
        return identity;
    }
    let mut n = step / 2;
    std::array::from_fn(|v| {
        let out = (n / step).min(255) as u8;
        n += h[v];
        out
    })
}

/// Pillow's `ImageFilter.SMOOTH` (weights 1, in the middle 5, of 13; the edge as it is), blended with the image.
fn sharpen(rgb: &mut [u8], side: usize, f: f32) {
    let (w, h) = (side, rgb.len() / 3 / side.max(1));
    let from = rgb.to_vec();
    for y in 1..h.saturating_sub(1) {
        for x in 1..w - 1 {
            for c in 0..3 {
                let at =
                    |dy: usize, dx: usize| u32::from(from[((y + dy - 1) * w + x + dx - 1) * 3 + c]);
                let all: u32 = (0..9).map(|k| at(k / 3, k % 3)).sum();
                let smooth = ((all + 4 * at(1, 1)) as f32 / 13.0 + 0.5) as u8;
                let i = (y * w + x) * 3 + c;
                rgb[i] = blend(smooth, from[i], f);
            }
        }
    }
}

/// Through hue, saturation and value, as torchvision's `adjust_hue`.
fn turn_hue(p: &mut [u8], turn: f32) {
    let [r, g, b] = [p[0], p[1], p[2]].map(|v| f32::from(v) / 255.0);
    let (top, low) = (r.max(g).max(b), r.min(g).min(b));
    let range = top - low;
    if range == 0.0 {
        return;
    }
    let sixth = if top == r {
        (g - b) / range
    } else if top == g {
        2.0 + (b - r) / range
    } else {
        4.0 + (r - g) / range
    };
    let hue = (sixth / 6.0 + turn).rem_euclid(1.0) * 6.0;
    for (v, n) in p.iter_mut().zip([5.0, 3.0, 1.0f32]) {
        let k = (n + hue) % 6.0;
        let channel = top - range * k.min(4.0 - k).clamp(0.0, 1.0);
        *v = (channel * 255.0).round() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 4x4 image of no symmetry.
    fn image() -> Vec<u8> {
        (0..48u32)
            .map(|i| ((i * i * 7 + i * 31 + 5) % 256) as u8)
            .collect()
    }

    fn applied(change: Colour) -> Vec<u8> {
        let mut rgb = image();
        change.apply(&mut rgb, 4);
        rgb
    }

    /// Pillow 12 (`ImageEnhance`, `ImageOps`) on the same image: the sums of all values, and the two pixels in the
    /// middle of the second row.
    #[test]
    fn pillow_gives_the_same() {
        let want = [
            (Colour::Brightness(0.6), 3861, [151, 147, 150, 9, 29, 58]),
            (Colour::Brightness(1.5), 8285, [255, 255, 255, 22, 73, 145]),
            (Colour::Contrast(0.4), 6572, [184, 181, 183, 89, 103, 122]),
            (Colour::Contrast(1.7), 6223, [255, 255, 255, 0, 0, 67]),
            (Colour::Saturation(0.3), 6588, [249, 247, 248, 35, 45, 59]),
            (Colour::Saturation(1.9), 6321, [255, 242, 253, 0, 53, 144]),
            (Colour::Sharpness(0.1), 6459, [166, 158, 181, 87, 121, 133]),
            (Colour::Sharpness(1.9), 6354, [255, 255, 255, 0, 0, 60]),
            (Colour::Posterize(3), 5664, [224, 224, 224, 0, 32, 96]),
            (Colour::Solarize(128.0), 2621, [2, 10, 4, 15, 49, 97]),
            (Colour::AutoContrast, 6266, [255, 252, 254, 10, 39, 85]),
        ];
        for (change, sum, middle) in want {
            let got = applied(change);
            let total: u32 = got.iter().map(|&v| u32::from(v)).sum();
            assert_eq!((total, &got[15..21]), (sum, &middle[..]), "{change:?}");
        }
    }

    #[test]
    fn histograms_are_levelled_as_in_pillow() {
        let mut rgb: Vec<u8> = (0..4800u32)
            .map(|i| ((i * i * 7 + i * 31 + 5) % 97) as u8 + 20)
            .collect();
        Colour::Equalize.apply(&mut rgb, 40);
        let total: u32 = rgb.iter().map(|&v| u32::from(v)).sum();
        assert_eq!(
            (total, &rgb[15..21]),
            (626516, &[28, 187, 104, 61, 55, 99][..])
        );
    }

    /// torchvision's `adjust_hue` on tensors, within a level.
    #[test]
    fn hue_turns_as_in_torchvision() {
        let want = [
            75u8, 5, 95, 79, 241, 192, 189, 78, 53, 83, 128, 247, 52, 105, 19, 253, 249, 245, 79,
            15, 97, 69, 235, 178, 173, 68, 35, 57, 107, 217, 229, 13, 132, 203, 203, 191, 27, 239,
            99, 203, 85, 243, 73, 190, 201, 92, 215, 29,
        ];
        for (got, want) in applied(Colour::Hue(0.2)).iter().zip(want) {
            assert!(got.abs_diff(want) <= 1, "{got} {want}");
        }
        assert_eq!(applied(Colour::Hue(0.0)), image());
    }
}
