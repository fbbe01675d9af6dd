//! Activations, elementwise: ReLU; GELU exact, `x * Phi(x)` with `Phi` by erf; GELU by tanh, `0.5 x (1 + tanh(sqrt(2/pi)
//! (x + 0.044715 x^3)))` (Hendrycks & Gimpel 2016). The fused epilogues of other rooms use the same functions.

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Error, Result, ensure, op_common};
use std::str::FromStr;

/// Which function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Act {
    /// `max(x, 0)`; NaN stays NaN.
    Relu,
    /// GELU by erf.
    Gelu,
    /// GELU by tanh.
    GeluTanh,
}

impl Act {
    /// Its number in shaders; 0 is none.
    pub fn code(self) -> u32 {
        match self {
            Act::Relu => 1,
            Act::Gelu => 2,
            Act::GeluTanh => 3,
        }
    }

    /// `f(x)` in float64.
    pub fn value(self, x: f64) -> f64 {
        match self {
            Act::Relu if x < 0.0 => 0.0,
            Act::Relu => x,
            Act::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Act::GeluTanh => 0.5 * x * (1.0 + gelu_inner(x).tanh()),
        }
    }

    /// `f'(x)` in float64.
    pub fn slope(self, x: f64) -> f64 {
        match self {
            Act::Relu => f64::from(u8::from(x.is_nan() || x > 0.0)),
            Act::Gelu => {
                let phi = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                0.5 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)) + x * phi
            }
            Act::GeluTanh => {
                let t = gelu_inner(x).tanh();
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
            }
        }
    }

    /// `f(x)` in float32.
    #[inline(always)]
    pub fn value_f32(self, x: f32) -> f32 {
        match self {
            Act::Relu if x < 0.0 => 0.0,
            Act::Relu => x,
            Act::Gelu => 0.5 * x * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2)),
            Act::GeluTanh => 0.5 * x * (1.0 + tanh_f32(gelu_inner_f32(x))),
        }
    }

    /// `f'(x)` in float32.
    #[inline(always)]
    pub fn slope_f32(self, x: f32) -> f32 {
        match self {
            Act::Relu => f32::from(u8::from(x.is_nan() || x > 0.0)),
            Act::Gelu => {
                let phi = exp_f32(-0.5 * x * x) * 0.398_942_3;
                0.5 * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2)) + x * phi
            }
            Act::GeluTanh => {
                let t = tanh_f32(gelu_inner_f32(x));
                let inner = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
            }
        }
    }
}

impl FromStr for Act {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "relu" => Ok(Act::Relu),
            "gelu" => Ok(Act::Gelu),
            "gelu_tanh" => Ok(Act::GeluTanh),
            _ => Err(Error::input(format!(
                "no activation is called {s}; there are relu, gelu and gelu_tanh"
            ))),
        }
    }
}

fn gelu_inner(x: f64) -> f64 {
    (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)
}

#[inline(always)]
fn gelu_inner_f32(x: f32) -> f32 {
    0.797_884_6 * (x + 0.044_715 * x * x * x)
}

/// erf in float64: the Maclaurin series near zero, the continued fraction of erfc further out (Abramowitz & Stegun
/// 7.1.5 and 7.1.14), to about 1e-15.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a > 6.0 {
        return x.signum();
    }
    if a < 2.5 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while f64::abs(term) > 1e-18 * f64::abs(sum) && n < 200.0 {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        return x.signum() * sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let mut f = 0.0;
    for k in (1..=80).rev() {
        f = f64::from(k) * 0.5 / (a + f);
    }
    x.signum() * (1.0 - (-a * a).exp() / ((a + f) * std::f64::consts::PI.sqrt()))
}

/// erf in float32, without branches so that loops over it vectorise: Abramowitz & Stegun 7.1.26's form is too coarse;
/// this is a Taylor/minimax pair joined by selection, within 2e-7 absolute of erf.
#[inline(always)]
pub fn erf_f32(x: f32) -> f32 {
    // 7.1.28-style rational in t with exp, split at |x| = 1 where the odd polynomial takes over for relative accuracy.
    let a = x.abs();
    let s = x * x;
    // Odd Taylor series to x^15: truncation below 2e-7 for |x| < 1.
    let small = x
        * (std::f32::consts::FRAC_2_SQRT_PI
            + s * (-0.376_126_4
                + s * (0.112_837_92
                    + s * (-0.026_866_17
                        + s * (0.005_223_978
                            + s * (-8.548_327e-4
                                + s * (1.205_533_3e-4
                                    + s * (-1.492_565e-5 + s * 1.646_211_4e-6))))))));
    // erfc(a) = t * exp(-a^2 + P(t)), t = 1 / (1 + a/2) (Numerical Recipes' Chebyshev fit, 1.2e-7 relative).
    let t = 1.0 / (1.0 + 0.5 * a);
    let p = -1.265_512_2
        + t * (1.000_023_7
            + t * (0.374_091_96
                + t * (0.096_784_18
                    + t * (-0.186_288_06
                        + t * (0.278_868_07
                            + t * (-1.135_204
                                + t * (1.488_515_9 + t * (-0.822_152_23 + t * 0.170_872_77))))))));
    let large = (1.0 - t * exp_f32(p - s)).copysign(x);
    if a < 1.0 { small } else { large }
}

/// exp in float32 without a library call, so that loops vectorise: 2^n by the exponent bits times a polynomial on
/// [-ln2/2, ln2/2]; relative error below 2e-7, 0 below -87.3.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.7);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (0.166_666_66 + r * (0.041_666_64 + r * (8.333_367e-3 + r * 1.389_38e-3)))));
    // SAFETY-free bit trick: n is in [-126, 128] here; split the power so that n = 128 does not overflow the exponent.
    let half = (n as i32) >> 1;
    let rest = n as i32 - half;
    p * f32::from_bits(((half + 127) as u32) << 23) * f32::from_bits(((rest + 127) as u32) << 23)
}

/// tanh in float32 by [`exp_f32`].
#[inline(always)]
pub fn tanh_f32(x: f32) -> f32 {
    let e = exp_f32(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

/// Runs `$body` with `$a` bound to each activation as a constant, so that each loop is compiled for its function.
#[macro_export]
macro_rules! for_act {
    ($act:expr, |$a:ident| $body:expr) => {
        match $act {
            $crate::ops::act::Act::Relu => {
                let $a = $crate::ops::act::Act::Relu;
                $body
            }
            $crate::ops::act::Act::Gelu => {
                let $a = $crate::ops::act::Act::Gelu;
                $body
            }
            $crate::ops::act::Act::GeluTanh => {
                let $a = $crate::ops::act::Act::GeluTanh;
                $body
            }
        }
    };
}

crate::multiversion! {
    /// `y = f(x)`.
    fn values(act: Act, x: &[f32], y: &mut [f32]) {
        for_act!(act, |f| for (y, &x) in y.iter_mut().zip(x) {
            *y = f.value_f32(x);
        })
    }
}

crate::multiversion! {
    /// `y = dy f'(x)`.
    fn slopes(act: Act, dy: &[f32], x: &[f32], y: &mut [f32]) {
        for_act!(act, |f| for ((y, &d), &x) in y.iter_mut().zip(dy).zip(x) {
            *y = d * f.slope_f32(x);
        })
    }
}

/// `y = f(x)`, any shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ActFwd {
    /// Which function.
    pub act: Act,
}

impl Op for ActFwd {
    op_common!("act");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        Ok(vec![x[0].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        // ReLU's slope is read off its result, so that the operand need not be kept.
        let saved = if self.act == Act::Relu {
            node.outputs[0]
        } else {
            node.inputs[0]
        };
        let dy = b.need(node.outputs[0])?;
        let dx = b.emit1(ActBwd { act: self.act }, &[dy, saved])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (y, &x) in y[0].data.iter_mut().zip(&x[0].data) {
            *y = self.act.value(x);
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let act = self.act;
        Ok(Box::new(move |a| {
            let x = a.x(0);
            par::rows(a.y(0), 1, |at, y| values(act, &x[at..][..y.len()], y));
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.y[0].len();
        let args = [Arg::In(0), Arg::Out(0)];
        cx.map("elementwise.wgsl", "act", n, &args, &[self.act.code()])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let args = [Arg::In(0), Arg::Out(0)];
        let consts = vec![("ACT", self.act.code().to_string())];
        cx.map(("elementwise.cu", "act"), consts, cx.y[0].len(), &args)
    }
}

/// `dx = dy * f'(x)`. Operands: dy, x; for ReLU x may be the result as well as the operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ActBwd {
    /// Which function.
    pub act: Act,
}

impl Op for ActBwd {
    op_common!("act_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        ensure!(
            x[0] == x[1],
            "has a gradient of shape {:?} for {:?}",
            x[0].shape,
            x[1].shape
        );
        Ok(vec![x[0].clone()])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (i, y) in y[0].data.iter_mut().enumerate() {
            *y = x[0].data[i] * self.act.slope(x[1].data[i]);
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let act = self.act;
        Ok(Box::new(move |a| {
            let (dy, x) = (a.x(0), a.x(1));
            par::rows(a.y(0), 1, |at, y| {
                let n = y.len();
                slopes(act, &dy[at..][..n], &x[at..][..n], y);
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.y[0].len();
        let args = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        cx.map("elementwise.wgsl", "act_bwd", n, &args, &[self.act.code()])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let args = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        let consts = vec![("ACT", self.act.code().to_string())];
        cx.map(("elementwise.cu", "act_bwd"), consts, cx.y[0].len(), &args)
    }
}

impl Graph {
    /// `f(x)`.
    ///
    /// # Errors
    /// None for a well-formed graph.
    pub fn act(&mut self, act: Act, x: Tid) -> Result<Tid> {
        self.push1(ActFwd { act }, &[x])
    }

    /// `max(x, 0)`; NaN stays NaN.
    ///
    /// # Errors
    /// None for a well-formed graph.
    pub fn relu(&mut self, x: Tid) -> Result<Tid> {
        self.act(Act::Relu, x)
    }
}

/// The room of [`ActFwd`].
pub const ROOM: Room = Room {
    name: "act",
    about: "y = f(x): relu, gelu (erf) or gelu_tanh",
    case: |p| {
        let act: Act = p.get("f", "relu".to_string())?.parse()?;
        Ok(Case::new(ActFwd { act }).x(&[p.get("n", 2)?, p.get("c", 8)?]))
    },
    cases: &[
        "f=relu,n=1,c=1",
        "f=gelu,n=3,c=5",
        "f=gelu_tanh,n=3,c=5",
        "f=relu,n=7,c=4099",
        "f=gelu,n=65,c=512",
        "f=gelu_tanh,n=65,c=513",
    ],
    bench: &["f=gelu,n=1576,c=3072"],
    refused: &["f=swish"],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relu_lets_nan_through() {
        assert!(Act::Relu.value_f32(f32::NAN).is_nan());
        assert!(Act::Relu.value(f64::NAN).is_nan());
        assert_eq!(
            [Act::Relu.slope_f32(f32::NAN), Act::Relu.slope_f32(0.0)],
            [1.0, 0.0]
        );
    }

    #[test]
    fn float32_functions_follow_float64() {
        for i in -120_000..=120_000 {
            let x = i as f32 * 1e-4;
            assert!(
                (f64::from(erf_f32(x)) - erf(f64::from(x))).abs() < 3e-7,
                "erf({x})"
            );
            assert!(
                (f64::from(tanh_f32(x)) - f64::from(x).tanh()).abs() < 3e-7,
                "tanh({x})"
            );
            let e = f64::from(x).exp();
            assert!((f64::from(exp_f32(x)) - e).abs() <= 4e-7 * e, "exp({x})");
        }
        // Known values: erf(0.5), erf(1), erf(2), erf(3) from Abramowitz & Stegun table 7.1.
        for (x, v) in [
            (0.5, 0.520_499_877_8),
            (1.0, 0.842_700_792_9),
            (2.0, 0.995_322_265),
            (3.0, 0.999_977_909_5),
        ] {
            assert!((erf(x) - v).abs() < 1e-9);
        }
    }
}
