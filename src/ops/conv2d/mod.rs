//! 2-D convolution: `y[n,p,q,k] = sum over r,s,c of x[n, p*stride+r-pad, q*stride+s-pad, c] * w[k,r,s,c]`, with bias,
//! residual sum and ReLU as an epilogue. Activations `[N, H, W, C]`, weights `[K, R, S, C / groups]`.
//!
//! Patch embedding is the case whose stride is its kernel.

pub mod cpu;
pub mod cuda;
mod reference;
pub mod shape;
pub mod wgpu;

pub use shape::{ConvShape, Pass};

use super::act::{Act, ActBwd};
use super::{Case, Cost, Host, Op, Product, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{self as device, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Init, Layout, Spec, Tid};
use crate::{Result, ensure, op_common};
use std::sync::OnceLock;

/// How the kernel moves over the input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// Vertical, horizontal.
    pub stride: [usize; 2],
    /// Zero rows above and below, zero columns left and right.
    pub pad: [usize; 2],
    /// Groups of channels.
    pub groups: usize,
}

impl Window {
    fn shape(&self, x: &[usize], w: &[usize]) -> Result<ConvShape, String> {
        ensure!(x.len() == 4, "wants an input [N, H, W, C], got {x:?}");
        ensure!(
            w.len() == 4,
            "wants weights [K, R, S, C / groups], got {w:?}"
        );
        let shape = ConvShape::new(
            [x[0], x[1], x[2], x[3]],
            [w[0], w[1], w[2]],
            self.stride,
            self.pad,
            self.groups,
        )
        .map_err(|e| e.to_string())?;
        ensure!(
            w[3] == shape.cg(),
            "has weights {w:?} for {} input channels in {} groups: the last extent should be {}",
            x[3],
            self.groups,
            shape.cg()
        );
        Ok(shape)
    }
}

/// Forward. Operands: x, w, then bias `[K]`, then residual (as the result), where present.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2d {
    /// Stride, padding, groups.
    pub window: Window,
    /// Has a bias.
    pub bias: bool,
    /// Adds a residual before the ReLU.
    pub residual: bool,
    /// ReLU at the end.
    pub relu: bool,
}

impl Conv2d {
    fn shape(&self, x: &[Spec]) -> ConvShape {
        self.window
            .shape(&x[0].shape, &x[1].shape)
            .expect("checked by the shape rule")
    }
}

impl Op for Conv2d {
    op_common!("conv2d");

    fn reach(&self, x: &[Spec]) -> super::Reach {
        super::Reach::Window {
            size: [x[1].shape[1], x[1].shape[2]],
            stride: self.window.stride,
            pad: self.window.pad,
        }
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let want = 2 + usize::from(self.bias) + usize::from(self.residual);
        ensure!(x.len() == want, "takes {want} operands, got {}", x.len());
        let s = self.window.shape(&x[0].shape, &x[1].shape)?;
        let y = Spec::f32([s.n, s.ho, s.wo, s.k]);
        if self.bias {
            ensure!(
                x[2].shape == [s.k],
                "has a bias {:?} for {} output channels",
                x[2].shape,
                s.k
            );
        }
        if self.residual {
            ensure!(
                x[want - 1] == y,
                "has a residual {:?} for a result {:?}",
                x[want - 1].shape,
                y.shape
            );
        }
        Ok(vec![y])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: self.shape(x).flops(),
            bytes: traffic(x, y),
        }
    }

    fn executed(&self, backend: &str, variant: Option<&str>, x: &[Spec], _y: &[Spec]) -> u64 {
        executed((backend, variant), &self.shape(x), Pass::Fprop)
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let mut dy = b.need(node.outputs[0])?;
        if self.relu {
            dy = b.emit1(ActBwd { act: Act::Relu }, &[dy, node.outputs[0]])?;
        }
        if self.residual {
            b.give(node.inputs[node.inputs.len() - 1], dy)?;
        }
        let (x, w) = (node.inputs[0], node.inputs[1]);
        let (xs, ws) = (b.graph.shape(x).to_vec(), b.graph.shape(w).to_vec());
        if b.wants(w) || (self.bias && b.wants(node.inputs[2])) {
            let op = Conv2dWgrad {
                window: self.window,
                kernel: [ws[1], ws[2]],
                bias: self.bias,
            };
            let d = b.emit(op, &[x, dy])?;
            b.give(w, d[0])?;
            if self.bias {
                b.give(node.inputs[2], d[1])?;
            }
        }
        if b.wants(x) {
            let addend = b.take_partial(x);
            let op = Conv2dDgrad {
                window: self.window,
                input: [xs[1], xs[2]],
                addend: addend.is_some(),
            };
            let operands: Vec<Tid> = [dy, w].into_iter().chain(addend).collect();
            let dx = b.emit1(op, &operands)?;
            b.give(x, dx)?;
        }
        Ok(())
    }

    fn product(&self, x: &[Spec]) -> Option<Product> {
        let s = Some(self.shape(x)).filter(ConvShape::is_matrix_product)?;
        let pixels = s.n * s.h * s.w;
        Some(Product {
            m: pixels,
            n: s.k,
            k: s.c,
            ta: false,
            tb: true,
        })
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        reference::fprop(self, x, &mut y[0]);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let s = ConvShape {
            algorithm: cpu::algorithm(cx.variant)?,
            ..self.shape(cx.x)
        };
        if cx.variant == Some("float64_sums") {
            return Ok(Box::new(move |a| {
                let residual = a.x_if(op.residual, 2 + usize::from(op.bias));
                let (x, w, bias) = (a.x(0), a.x(1), a.x_if(op.bias, 2));
                cpu::exact::fprop(&s, x, w, bias, residual, op.relu, a.y(0));
            }));
        }
        if cx.constant(1) {
            cx.release(1);
            // The weights do not change: packed at the first run, and the plain copy's memory given back.
            let packed: OnceLock<cpu::PackedFilter> = OnceLock::new();
            return Ok(Box::new(move |a| {
                let w = packed
                    .get_or_init(|| cpu::PackedFilter::new(&s, a.x(1), |done| a.spent(1, done)));
                let residual = a.x_if(op.residual, 2 + usize::from(op.bias));
                cpu::fprop_packed(&s, a.x(0), w, a.x_if(op.bias, 2), residual, op.relu, a.y(0));
            }));
        }
        Ok(Box::new(move |a| {
            let residual = a.x_if(op.residual, 2 + usize::from(op.bias));
            cpu::fprop(
                &s,
                a.x(0),
                a.x(1),
                a.x_if(op.bias, 2),
                residual,
                op.relu,
                a.y(0),
            );
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let ep = wgpu::Epilogue {
            bias: self.bias.then_some(Arg::In(2)),
            addend: self.residual.then_some(Arg::In(2 + usize::from(self.bias))),
            pre: None,
            act: if self.relu { Act::Relu.code() } else { 0 },
        };
        let s = self.shape(cx.x);
        wgpu::fprop(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), ep)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use device::Arg;
        let ep = cuda::Epilogue {
            bias: Arg::in_if(self.bias, 2),
            addend: Arg::in_if(self.residual, 2 + usize::from(self.bias)),
            pre: Arg::Null,
            act: if self.relu { Act::Relu.code() } else { 0 },
        };
        let s = self.shape(cx.x);
        cuda::fprop(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), ep)
    }

    fn cpu_variants(&self) -> &'static [&'static str] {
        cpu::FPROP_VARIANTS
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::VARIANTS
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// Which convolution `op` computes but for its epilogue, where it is one.
pub fn convolution(op: &dyn Op, x: &[Spec]) -> Option<(ConvShape, Pass)> {
    if let Some(op) = op.downcast::<Conv2d>() {
        return Some((op.shape(x), Pass::Fprop));
    }
    if let Some(op) = op.downcast::<Conv2dDgrad>() {
        return Some((op.shape(x).ok()?, Pass::Dgrad));
    }
    let op = op.downcast::<Conv2dWgrad>()?;
    Some((op.shape(x).ok()?, Pass::Wgrad))
}

/// Operations that a backend's kernel does in a variant.
fn executed((backend, variant): (&str, Option<&str>), shape: &ConvShape, pass: Pass) -> u64 {
    match (backend, cpu::algorithm(variant)) {
        ("cpu", Ok(algorithm)) if variant != Some("float64_sums") => {
            let shape = ConvShape {
                algorithm,
                ..*shape
            };
            cpu::executed(&shape, pass)
        }
        _ => shape.flops(),
    }
}

/// Gradient of the input. Operands: dy, w, then an addend (a gradient that is already there) where present.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2dDgrad {
    /// Stride, padding, groups of the forward convolution.
    pub window: Window,
    /// Height and width of the input.
    pub input: [usize; 2],
    /// `dx = dgrad + addend`.
    pub addend: bool,
}

impl Conv2dDgrad {
    fn shape(&self, x: &[Spec]) -> Result<ConvShape, String> {
        let (dy, w) = (&x[0].shape, &x[1].shape);
        ensure!(
            dy.len() == 4 && w.len() == 4,
            "wants dy [N, P, Q, K] and w [K, R, S, C], got {dy:?} and {w:?}"
        );
        let s = self.window.shape(
            &[
                dy[0],
                self.input[0],
                self.input[1],
                w[3] * self.window.groups,
            ],
            w,
        )?;
        ensure!(
            *dy == [s.n, s.ho, s.wo, s.k],
            "has dy {dy:?}, the forward result is {:?}",
            [s.n, s.ho, s.wo, s.k]
        );
        Ok(s)
    }
}

impl Op for Conv2dDgrad {
    op_common!("conv2d_dgrad");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 2 + usize::from(self.addend),
            "got {} operands",
            x.len()
        );
        let s = self.shape(x)?;
        let dx = Spec::f32([s.n, s.h, s.w, s.c]);
        if self.addend {
            ensure!(
                x[2] == dx,
                "has an addend {:?} for {:?}",
                x[2].shape,
                dx.shape
            );
        }
        Ok(vec![dx])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: self.shape(x).expect("checked by the shape rule").flops(),
            bytes: traffic(x, y),
        }
    }

    fn executed(&self, backend: &str, variant: Option<&str>, x: &[Spec], _y: &[Spec]) -> u64 {
        let shape = self.shape(x).expect("checked by the shape rule");
        executed((backend, variant), &shape, Pass::Dgrad)
    }

    fn product(&self, x: &[Spec]) -> Option<Product> {
        let s = self.shape(x).ok().filter(ConvShape::is_matrix_product)?;
        let pixels = s.n * s.h * s.w;
        Some(Product {
            m: pixels,
            n: s.c,
            k: s.k,
            ta: false,
            tb: false,
        })
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        reference::dgrad(self, x, &mut y[0]);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let s = ConvShape {
            algorithm: cpu::algorithm(cx.variant)?,
            ..self.shape(cx.x).map_err(crate::Error::run)?
        };
        Ok(Box::new(move |a| {
            cpu::dgrad(&s, a.x(0), a.x(1), a.x_if(op.addend, 2), a.y(0))
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let s = self.shape(cx.x).map_err(crate::Error::run)?;
        let addend = self.addend.then_some(Arg::In(2));
        wgpu::dgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), addend)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use device::Arg;
        let s = self.shape(cx.x).map_err(crate::Error::run)?;
        let addend = self.addend.then_some(Arg::In(2));
        cuda::dgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), addend)
    }

    fn cpu_variants(&self) -> &'static [&'static str] {
        cpu::VARIANTS
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::VARIANTS
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// Gradient of the weights, and of the bias where there is one. Operands: x, dy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2dWgrad {
    /// Stride, padding, groups of the forward convolution.
    pub window: Window,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Also the bias's gradient.
    pub bias: bool,
}

impl Conv2dWgrad {
    fn shape(&self, x: &[Spec]) -> Result<ConvShape, String> {
        let (xs, dy) = (&x[0].shape, &x[1].shape);
        ensure!(
            dy.len() == 4 && xs.len() == 4,
            "wants x [N, H, W, C] and dy [N, P, Q, K], got {xs:?} and {dy:?}"
        );
        ensure!(
            xs[3].is_multiple_of(self.window.groups.max(1)),
            "{} groups do not divide {}",
            self.window.groups,
            xs[3]
        );
        let w = [
            dy[3],
            self.kernel[0],
            self.kernel[1],
            xs[3] / self.window.groups.max(1),
        ];
        let s = self.window.shape(xs, &w)?;
        ensure!(
            *dy == [s.n, s.ho, s.wo, s.k],
            "has dy {dy:?}, the forward result is {:?}",
            [s.n, s.ho, s.wo, s.k]
        );
        Ok(s)
    }
}

impl Op for Conv2dWgrad {
    op_common!("conv2d_wgrad");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "got {} operands", x.len());
        let s = self.shape(x)?;
        let mut y = vec![Spec::f32([s.k, s.r, s.s, s.cg()])];
        if self.bias {
            y.push(Spec::f32([s.k]));
        }
        Ok(y)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: self.shape(x).expect("checked by the shape rule").flops(),
            bytes: traffic(x, y),
        }
    }

    fn executed(&self, backend: &str, variant: Option<&str>, x: &[Spec], _y: &[Spec]) -> u64 {
        let shape = self.shape(x).expect("checked by the shape rule");
        executed((backend, variant), &shape, Pass::Wgrad)
    }

    fn product(&self, x: &[Spec]) -> Option<Product> {
        let s = self.shape(x).ok().filter(ConvShape::is_matrix_product)?;
        let pixels = s.n * s.h * s.w;
        Some(Product {
            m: s.k,
            n: s.c,
            k: pixels,
            ta: true,
            tb: false,
        })
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        reference::wgrad(self, x, y);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let bias = self.bias;
        let s = ConvShape {
            algorithm: cpu::algorithm(cx.variant)?,
            ..self.shape(cx.x).map_err(crate::Error::run)?
        };
        Ok(Box::new(move |a| {
            cpu::wgrad(&s, a.x(0), a.x(1), a.y(0), false);
            if bias {
                cpu::bias_grad(&s, a.x(1), a.y(1), false);
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let s = self.shape(cx.x).map_err(crate::Error::run)?;
        wgpu::wgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0))?;
        if self.bias {
            wgpu::column_sums(cx, Arg::In(1), Arg::Out(1), s.n * s.ho * s.wo, s.k)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use device::Arg;
        let s = self.shape(cx.x).map_err(crate::Error::run)?;
        cuda::wgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0))?;
        if self.bias {
            cuda::column_sums(cx, Arg::In(1), Arg::Out(1), s.n * s.ho * s.wo, s.k)?;
        }
        Ok(())
    }

    fn cpu_variants(&self) -> &'static [&'static str] {
        cpu::VARIANTS
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::WGRAD_VARIANTS
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// A convolution layer's sizes, as a model writes them.
#[derive(Clone, Copy, Debug)]
pub struct ConvLayer {
    /// Output channels.
    pub out: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Padding on every side.
    pub pad: usize,
    /// Groups of channels.
    pub groups: usize,
    /// With a bias.
    pub bias: bool,
    /// How the weights start.
    pub init: Init,
}

impl ConvLayer {
    /// `kernel` x `kernel` with padding that keeps the size at stride 1, without bias, He initialisation.
    pub fn new(out: usize, kernel: usize, stride: usize) -> Self {
        ConvLayer {
            out,
            kernel,
            stride,
            pad: kernel / 2,
            groups: 1,
            bias: false,
            init: Init::KaimingFanOut,
        }
    }
}

impl Graph {
    /// A convolution with parameters `name.weight` (and `name.bias`) under the current scope: `[N, H, W, C]` to
    /// `[N, P, Q, K]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn conv2d(&mut self, x: Tid, name: &str, l: ConvLayer) -> Result<Tid> {
        self.scoped(name, |g| {
            let c = g.spec(x).channels() / l.groups.max(1);
            let fan_in = c * l.kernel * l.kernel;
            let mut operands = vec![
                x,
                g.param(
                    "weight",
                    &[l.out, l.kernel, l.kernel, c],
                    Layout::Ohwi,
                    l.init,
                    true,
                ),
            ];
            if l.bias {
                operands.push(g.param(
                    "bias",
                    &[l.out],
                    Layout::Plain,
                    Init::UniformFanIn(fan_in),
                    false,
                ));
            }
            let window = Window {
                stride: [l.stride; 2],
                pad: [l.pad; 2],
                groups: l.groups,
            };
            g.push1(
                Conv2d {
                    window,
                    bias: l.bias,
                    residual: false,
                    relu: false,
                },
                &operands,
            )
        })
    }
}

/// The room of [`Conv2d`].
pub const ROOM: Room = Room {
    name: "conv2d",
    about: "2-D convolution, NHWC x OHWI, with bias, residual and ReLU as epilogue",
    case: |p| {
        let (n, h, c, k, r) = (
            p.get("n", 1)?,
            p.get("h", 8)?,
            p.get("c", 3)?,
            p.get("k", 4)?,
            p.get("r", 3)?,
        );
        let (w, s, groups): (usize, usize, usize) =
            (p.get("w", h)?, p.get("s", r)?, p.get("groups", 1)?);
        let (stride, pad): (usize, usize) = (p.get("stride", 1)?, p.get("pad", 0)?);
        let window = Window {
            stride: [stride, p.get("stride_w", stride)?],
            pad: [pad, p.get("pad_w", pad)?],
            groups,
        };
        let op = Conv2d {
            window,
            bias: p.flag("bias")?,
            residual: p.flag("residual")?,
            relu: p.flag("relu")?,
        };
        let cg = if groups > 0 && c % groups == 0 {
            c / groups
        } else {
            c
        };
        let fan_in = (cg * r * s) as f32;
        let case = Case::new(op).x(&[n, h, w, c]).operand(
            Spec::f32([k, r, s, cg]),
            super::Fill::Normal(1.0 / fan_in.max(1.0).sqrt()),
            true,
        );
        let case = case.x_if(op.bias, &[k]);
        let y = window
            .shape(&[n, h, w, c], &[k, r, s, cg])
            .map_err(crate::Error::input)?;
        Ok(case.x_if(op.residual, &[n, y.ho, y.wo, k]))
    },
    cases: &[
        "n=1,h=1,c=1,k=1,r=1",
        "n=1,h=1,c=3,k=5,r=3,pad=1",
        "n=2,h=5,w=7,c=3,k=7,r=3,pad=1,bias=1",
        "n=1,h=9,c=5,k=33,r=5,pad=2,stride=2",
        "n=2,h=8,w=6,c=17,k=16,r=3,s=1,pad=1,pad_w=0",
        "n=3,h=7,c=4,k=6,r=2,stride=3",
        "n=2,h=12,c=3,k=20,r=4,stride=4,bias=1",
        "n=1,h=14,c=3,k=24,r=7,stride=7",
        "n=2,h=6,c=8,k=12,r=3,pad=1,groups=4,bias=1",
        "n=1,h=6,c=6,k=6,r=3,pad=1,groups=6,stride=2",
        "n=2,h=5,c=16,k=8,r=3,pad=1,bias=1,residual=1,relu=1",
        "n=1,h=3,c=65,k=130,r=1,bias=1,relu=1",
        "n=2,h=7,c=64,k=32,r=1,stride=2",
        "n=1,h=23,w=25,c=3,k=64,r=7,pad=3,stride=2",
        "n=3,h=16,c=16,k=16,r=3,pad=1",
        "n=2,h=16,c=16,k=32,r=3,pad=1,stride=2",
        "n=2,h=8,c=64,k=64,r=3,pad=1",
        "n=4,h=4,c=128,k=64,r=3,pad=1",
        "n=2,h=1,c=96,k=80,r=3,pad=1",
    ],
    bench: &[
        "n=8,h=56,c=64,k=64,r=3,pad=1",
        "n=16,h=224,c=3,k=64,r=7,pad=3,stride=2",
        "n=16,h=14,c=256,k=256,r=3,pad=1",
        "n=128,h=32,c=16,k=16,r=3,pad=1",
        "n=128,h=8,c=64,k=64,r=3,pad=1",
        "n=8,h=56,c=64,k=256,r=1",
    ],
    refused: &[
        "n=1,h=2,c=3,k=4,r=3",
        "n=1,h=8,c=5,k=4,groups=2",
        "n=1,h=8,c=4,k=4,stride=0",
        "n=0",
    ],
};
