//! The forward convolution with float64 sums, rounded once: for comparing gradients with other programs', where the
//! rounding of a sum may put an activation on the other side of ReLU's kink.

use super::{ConvShape, check_len};
use crate::backend::cpu::par;
use crate::multiversion;

/// Output channels and pixels of a register tile.
const KB: usize = 16;
const QB: usize = 4;

/// `y = relu?(conv(x, w) + bias + residual)`, summed in float64.
pub fn fprop(
    s: &ConvShape,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    relu: bool,
    y: &mut [f32],
) {
    check_len("x", x, s.input_len());
    check_len("w", w, s.weight_len());
    check_len("y", y, s.output_len());
    let (kg, taps) = (s.kg(), s.r * s.s * s.cg());
    let blocks = kg.div_ceil(KB);
    // [group][block of KB outputs][tap][KB], zero beyond the group.
    let mut packed = vec![0.0; s.groups * blocks * taps * KB];
    for k in 0..s.k {
        let (g, o) = (k / kg, k % kg);
        let first = (g * blocks + o / KB) * taps * KB + o % KB;
        for t in 0..taps {
            packed[first + t * KB] = f64::from(w[k * taps + t]);
        }
    }
    let width = s.wo * s.k;
    if width == 0 {
        return;
    }
    par::rows(y, width, |first, rows| {
        for (i, row) in rows.chunks_mut(width).enumerate() {
            line(s, x, &packed, first + i, row);
            let at = (first + i) * width;
            for (j, v) in row.iter_mut().enumerate() {
                // Adding the rest in float32 rounds once more, as every other kernel does.
                *v += bias.map_or(0.0, |b| b[j % s.k]);
                *v += residual.map_or(0.0, |a| a[at + j]);
                if relu && *v < 0.0 {
                    *v = 0.0;
                }
            }
        }
    });
}

multiversion! {
    /// Row `line` of all images' output rows, without the epilogue.
    fn line(s: &ConvShape, x: &[f32], packed: &[f64], line: usize, y: &mut [f32]) {
        let (n, p) = (line / s.ho, line % s.ho);
        let (kg, cg, taps) = (s.kg(), s.cg(), s.r * s.s * s.cg());
        let blocks = kg.div_ceil(KB);
        for block in 0..s.groups * blocks {
            let (g, k0) = (block / blocks, block % blocks * KB);
            let w = &packed[block * taps * KB..][..taps * KB];
            for q0 in (0..s.wo).step_by(QB) {
                let pixels = QB.min(s.wo - q0);
                let mut sums = [[0.0f64; KB]; QB];
                for i in 0..s.r {
                    let h = (p * s.stride[0] + i).wrapping_sub(s.pad[0]);
                    if h >= s.h {
                        continue;
                    }
                    for j in 0..s.s {
                        // Pixels in the padding read a zero.
                        let mut from = [None; QB];
                        for (q, from) in from.iter_mut().enumerate().take(pixels) {
                            let v = ((q0 + q) * s.stride[1] + j).wrapping_sub(s.pad[1]);
                            *from = (v < s.w).then(|| ((n * s.h + h) * s.w + v) * s.c + g * cg);
                        }
                        let w = &w[(i * s.s + j) * cg * KB..][..cg * KB];
                        for (c, w) in w.chunks_exact(KB).enumerate() {
                            for q in 0..QB {
                                let v = from[q].map_or(0.0, |f| f64::from(x[f + c]));
                                for (sum, w) in sums[q].iter_mut().zip(w) {
                                    *sum = v.mul_add(*w, *sum);
                                }
                            }
                        }
                    }
                }
                for (q, sums) in sums.iter().enumerate().take(pixels) {
                    let to = (q0 + q) * s.k + g * kg + k0;
                    let many = KB.min(kg - k0);
                    for (y, v) in y[to..to + many].iter_mut().zip(sums) {
                        *y = *v as f32;
                    }
                }
            }
        }
    }
}
