//! A result beside the reference's: what is allowed, and what is reported.

use crate::backend::cuda::Precision;
use std::fmt;

/// Largest error allowed in float32, relative to the reference tensor's scale (its root mean square and, per element,
/// its own size), before the allowance for the length of sums.
pub const F32_TOLERANCE: f64 = 2e-6;

/// How much larger than the error of rounding the operands alone the error of a kernel in tf32 or bf16 may be.
pub const ROUNDING_FACTOR: f64 = 2.5;

/// One compared tensor.
#[derive(Clone, Debug)]
pub struct Finding {
    /// `y0`, `d1` (gradient of operand 1).
    pub tensor: String,
    /// Worst error over its allowance; at most 1 passes. NaN where a NaN or infinity stands in the wrong place.
    pub worst: f64,
    /// Where.
    pub index: usize,
    /// What the backend gave there.
    pub got: f64,
    /// What the reference says.
    pub want: f64,
    /// The error that was allowed there.
    pub allowed: f64,
    /// The tensor's shape, where it is known.
    pub shape: Vec<usize>,
}

impl Finding {
    /// Within the tolerance.
    pub fn ok(&self) -> bool {
        self.worst <= 1.0
    }

    /// Tensor and element: `y0[2, 0, 7]`.
    pub fn place(&self) -> String {
        let mut rest = self.index;
        let mut at: Vec<usize> = vec![];
        for &extent in self.shape.iter().rev().filter(|&&e| e > 0) {
            at.push(rest % extent);
            rest /= extent;
        }
        match at.is_empty() {
            true => self.tensor.clone(),
            false => {
                at.reverse();
                format!("{}{at:?}", self.tensor)
            }
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let place = self.place();
        match (self.got.is_nan(), self.want.is_nan()) {
            (true, false) => write!(
                f,
                "{place} is NaN, or nobody wrote it; the reference says {}",
                self.want
            ),
            _ => write!(
                f,
                "{place} is {}, the reference says {}: off by {:.3e}, allowed {:.3e}",
                self.got,
                self.want,
                (self.got - self.want).abs(),
                self.allowed
            ),
        }
    }
}

/// Compares `got` with `want`: places of NaN and infinity first, then `!(error <= allowance)`.
pub fn compare(tensor: &str, got: &[f64], want: &[f64], tolerance: f64) -> Finding {
    compare_by(tensor, got, want, |w, rms| tolerance * (rms + w.abs()))
}

/// [`compare`] with the allowance of an element by its value and the tensor's root mean square.
fn compare_by(
    tensor: &str,
    got: &[f64],
    want: &[f64],
    allowance: impl Fn(f64, f64) -> f64,
) -> Finding {
    let finite: Vec<f64> = want.iter().copied().filter(|v| v.is_finite()).collect();
    let rms = (finite.iter().map(|v| v * v).sum::<f64>() / finite.len().max(1) as f64).sqrt();
    let mut worst = Finding {
        tensor: tensor.into(),
        worst: 0.0,
        index: 0,
        got: 0.0,
        want: 0.0,
        allowed: 0.0,
        shape: vec![],
    };
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let allowed = allowance(w, rms);
        let ratio = if w.is_nan() || w.is_infinite() {
            if g == w || (g.is_nan() && w.is_nan()) {
                0.0
            } else {
                f64::NAN
            }
        } else {
            (g - w).abs() / (allowed + 1e-30)
        };
        if ratio.is_nan() || ratio > worst.worst {
            worst = Finding {
                tensor: tensor.into(),
                worst: ratio,
                index: i,
                got: g,
                want: w,
                allowed,
                shape: vec![],
            };
            if ratio.is_nan() {
                break;
            }
        }
    }
    worst
}

/// `v` rounded to the operands of a precision, to nearest even.
pub(crate) fn round_to(v: f64, precision: Precision) -> f64 {
    let drop = match precision {
        Precision::F32 => return v,
        Precision::Tf32 => 13,
        Precision::Bf16 => 16,
    };
    let bits = (v as f32).to_bits();
    if !(v as f32).is_finite() {
        return v;
    }
    let odd = (bits >> drop) & 1;
    let rounded = bits + (1 << (drop - 1)) - 1 + odd;
    f64::from(f32::from_bits(rounded >> drop << drop))
}

/// Half a unit in the last place of a precision's operands, relative to their size.
pub(super) fn unit(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2f64.powi(-24),
        Precision::Tf32 => 2f64.powi(-11),
        Precision::Bf16 => 2f64.powi(-8),
    }
}

/// Results with fewer elements than this may miss the worst that rounding can do by luck.
const FEW: usize = 256;

/// Compares what was computed from operands rounded in the kernel with `want`, and allows [`ROUNDING_FACTOR`] times the
/// error of `other`, the reference's result from rounded operands: the largest error against the largest, and the root
/// mean square against the root mean square. Results of few elements may be half a unit in the last place off in any
/// case.
pub(super) fn compare_rounded(
    tensor: &str,
    got: &[f64],
    want: &[f64],
    other: &[f64],
    unit: f64,
    tolerance: f64,
) -> Finding {
    let n = want.len().max(1) as f64;
    let off = |v: &[f64]| -> (f64, f64) {
        let d = v.iter().zip(want).map(|(a, b)| (a - b).abs());
        d.fold((0.0, 0.0), |(most, sum), d| (d.max(most), sum + d * d))
    };
    let (worst, square) = off(other);
    let floor = if want.len() < FEW { unit } else { 0.0 };
    let mut found = compare_by(tensor, got, want, |w, rms| {
        let scale = rms + w.abs();
        ROUNDING_FACTOR * worst.max(floor * scale) + tolerance * scale
    });
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / n).sqrt();
    let allowed = ROUNDING_FACTOR * (square / n).sqrt().max(floor * rms) + tolerance * rms + 1e-30;
    let error = (off(got).1 / n).sqrt();
    if error / allowed > found.worst {
        found.tensor = format!("{tensor} (root mean square)");
        found.worst = error / allowed;
    }
    found
}
