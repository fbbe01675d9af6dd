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

    /// `f(x)` in float32, to 4e-7 of the larger of 1 and `|x|`.
    #[inline(always)]
    pub fn value_f32(self, x: f32) -> f32 {
        match self {
            Act::Relu if x < 0.0 => 0.0,
            Act::Relu => x,
            Act::Gelu => {
                let (tail, _) = normal_tail(x);
                if x < 0.0 { x * tail } else { x - x * tail }
            }
            Act::GeluTanh => x * sigmoid(2.0 * gelu_inner_f32(x)),
        }
    }

    /// `f'(x)` in float32.
    #[inline(always)]
    pub fn slope_f32(self, x: f32) -> f32 {
        match self {
            Act::Relu => f32::from(u8::from(x.is_nan() || x > 0.0)),
            Act::Gelu => {
                let (tail, density) = normal_tail(x);
                (if x < 0.0 { tail } else { 1.0 - tail }) + x * density
            }
            Act::GeluTanh => {
                // With t = 2 s - 1: (1 + t) / 2 = s and (1 - t^2) / 2 = 2 s (1 - s).
                let s = sigmoid(2.0 * gelu_inner_f32(x));
                let inner = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
                s + 2.0 * x * s * (1.0 - s) * inner
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

/// Of the normal distribution: what lies beyond `|x|`, `1 - Phi(|x|)`, to 1e-6 relative, and the density at `x`; without
/// branches, so that loops vectorise. The tail is `exp(-x^2 / 2) t P(t)` with `t = 1 / (1 + 0.3 |x| / sqrt(2))`, the form
/// of Abramowitz & Stegun 7.1.26, with a polynomial of degree 8 fitted for the least relative error, 2e-8 in exact
/// arithmetic; half of it is in the coefficients.
#[inline(always)]
fn normal_tail(x: f32) -> (f32, f32) {
    let t = 1.0 / (1.0 + 0.212_132_03 * x.abs());
    let mut p = COEFFICIENTS[8];
    for c in COEFFICIENTS[..8].iter().rev() {
        p = p * t + c;
    }
    let e = exp_f32(-0.5 * x * x);
    (e * (t * p), 0.398_942_3 * e)
}

const COEFFICIENTS: [f32; 9] = [
    0.08459459,
    0.08534903,
    0.07422244,
    0.107282065,
    -0.046948124,
    0.27336898,
    -0.25574872,
    0.2426081,
    -0.06472838,
];

/// `1 / (1 + e^-x)`.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let e = exp_f32(-x.abs());
    let s = 1.0 / (1.0 + e);
    if x < 0.0 { e * s } else { s }
}

/// `e^x` for `x <= 88`, to about 1 ulp, in operations that vectorise; 0 below -87.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite) keeps r exact.
    let shifted = x * std::f32::consts::LOG2_E + 12_582_912.0; // adding 1.5 * 2^23 rounds to an integer, in the low bits
    let n = shifted - 12_582_912.0;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    // Taylor polynomial to r^7 / 7!: the rest is below 1e-8 there.
    let mut p = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + c;
    }
    let e = p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { e }
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
            let wide = f64::from(x);
            for act in [Act::Gelu, Act::GeluTanh] {
                let scale = wide.abs().max(1.0) * 4e-7;
                let off = f64::from(act.value_f32(x)) - act.value(wide);
                assert!(off.abs() <= scale, "{act:?}({x}) is off by {off}");
                let off = f64::from(act.slope_f32(x)) - act.slope(wide);
                assert!(off.abs() <= 3.0 * scale, "{act:?}'({x}) is off by {off}");
            }
            let e = wide.exp();
            assert!((f64::from(exp_f32(x)) - e).abs() <= 4e-7 * e, "exp({x})");
        }
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        for act in [Act::Gelu, Act::GeluTanh] {
            assert!(act.value_f32(f32::NAN).is_nan() && act.slope_f32(f32::NAN).is_nan());
            assert_eq!([act.value_f32(90.0), act.slope_f32(90.0)], [90.0, 1.0]);
            assert_eq!([act.value_f32(-90.0), act.slope_f32(-90.0)], [0.0, 0.0]);
        }
        assert!(exp_f32(f32::NAN).is_nan());
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
