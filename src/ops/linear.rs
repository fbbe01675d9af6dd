//! Linear: `y = act(x W^T + bias + residual)` with `x` `[.., I]`, `W` `[O, I]`, `y` `[.., O]`, as torch.nn.Linear keeps
//! them. With an activation whose slope needs its operand (GELU), the value before it is a second result.

use super::act::{Act, ActBwd};
use super::conv2d::{ConvShape, cuda, wgpu};
use super::{Case, Cost, Fill, Host, Op, Product, Room, traffic};
use crate::backend::cpu::gemm::{Mat, PackedB, column_sums, gemm, gemm_packed};
use crate::backend::cpu::{CpuCx, CpuKernel, Epilogue};
use crate::backend::cuda::{self as device, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Init, Layout, Spec, Tid};
use crate::{Result, ensure, op_common};
use std::sync::OnceLock;

/// Forward. Operands: x, w, then bias `[O]`, then residual (as the result), where present. Results: y, and the value
/// before the activation where `keep_pre`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Linear {
    /// Has a bias.
    pub bias: bool,
    /// Adds a residual before the activation.
    pub residual: bool,
    /// Activation at the end.
    pub act: Option<Act>,
    /// Also gives the value before the activation, for the backward pass.
    pub keep_pre: bool,
}

impl Linear {
    /// Without bias, residual or activation.
    pub const PLAIN: Linear = Linear {
        bias: false,
        residual: false,
        act: None,
        keep_pre: false,
    };

    fn residual_at(&self) -> usize {
        2 + usize::from(self.bias)
    }
}

fn flops(rows: usize, i: usize, o: usize) -> u64 {
    2 * rows as u64 * i as u64 * o as u64
}

impl Op for Linear {
    op_common!("linear");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let want = self.residual_at() + usize::from(self.residual);
        ensure!(x.len() == want, "takes {want} operands, got {}", x.len());
        let w = &x[1].shape;
        ensure!(w.len() == 2, "wants weights [O, I], got {w:?}");
        ensure!(
            x[0].channels() == w[1],
            "has weights {w:?} for an input {:?}",
            x[0].shape
        );
        let mut y = x[0].clone();
        *y.shape.last_mut().expect("a tensor has an extent") = w[0];
        if self.bias {
            ensure!(
                x[2].shape == [w[0]],
                "has a bias {:?} for {} outputs",
                x[2].shape,
                w[0]
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
        Ok(vec![y; 1 + usize::from(self.keep_pre)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: flops(x[0].rows(), x[0].channels(), y[0].channels()),
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let mut dy = b.need(node.outputs[0])?;
        if let Some(act) = self.act {
            let saved = if self.keep_pre {
                node.outputs[1]
            } else {
                node.outputs[0]
            };
            if act != Act::Relu && !self.keep_pre {
                return Err(crate::Error::run(
                    "was built without the value before its activation",
                ));
            }
            dy = b.emit1(ActBwd { act }, &[dy, saved])?;
        }
        if self.residual {
            b.give(node.inputs[self.residual_at()], dy)?;
        }
        let (x, w) = (node.inputs[0], node.inputs[1]);
        if b.wants(w) || (self.bias && b.wants(node.inputs[2])) {
            let d = b.emit(LinearWgrad { bias: self.bias }, &[x, dy])?;
            b.give(w, d[0])?;
            if self.bias {
                b.give(node.inputs[2], d[1])?;
            }
        }
        if b.wants(x) {
            let addend = b.take_partial(x);
            let operands: Vec<Tid> = [dy, w].into_iter().chain(addend).collect();
            let dx = b.emit1(
                LinearDgrad {
                    addend: addend.is_some(),
                },
                &operands,
            )?;
            b.give(x, dx)?;
        }
        Ok(())
    }

    fn product(&self, x: &[Spec]) -> Option<Product> {
        Some(Product {
            m: x[0].rows(),
            n: x[1].shape[0],
            k: x[0].channels(),
            ta: false,
            tb: true,
        })
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (i, o) = (x[0].channels(), y[0].channels());
        for r in 0..x[0].rows() {
            for k in 0..o {
                let mut v: f64 = (0..i)
                    .map(|c| x[0].data[r * i + c] * x[1].data[k * i + c])
                    .sum();
                if self.bias {
                    v += x[2].data[k];
                }
                if self.residual {
                    v += x[self.residual_at()].data[r * o + k];
                }
                if self.keep_pre {
                    y[1].data[r * o + k] = v;
                }
                y[0].data[r * o + k] = self.act.map_or(v, |a| a.value(v));
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (m, k, n, op) = (
            cx.x[0].rows(),
            cx.x[0].channels(),
            cx.y[0].channels(),
            *self,
        );
        let constant = cx.constant(1);
        if constant {
            cx.release(1);
        }
        // Weights that do not change are packed at the first run, and the plain copy's memory is given back.
        let packed: OnceLock<PackedB> = OnceLock::new();
        Ok(Box::new(move |a| {
            let ep = Epilogue {
                bias: a.x_if(op.bias, 2),
                addend: a.x_if(op.residual, op.residual_at()),
                act: op.act,
                preact: op.keep_pre.then(|| a.y(1)),
            };
            let x = Mat::new(a.x(0), k);
            if constant {
                let w = packed.get_or_init(|| PackedB::new(k, n, a.x(1), |done| a.spent(1, done)));
                gemm_packed(m, x, w, a.y(0), n, false, ep);
            } else {
                gemm(m, n, k, x, Mat::transposed(a.x(1), k), a.y(0), n, false, ep);
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let s = product(&cx.x[0], cx.y[0].channels())?;
        let ep = wgpu::Epilogue {
            bias: self.bias.then_some(Arg::In(2)),
            addend: self.residual.then_some(Arg::In(self.residual_at())),
            pre: self.keep_pre.then_some(Arg::Out(1)),
            act: self.act.map_or(0, Act::code),
        };
        wgpu::fprop(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), ep)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use device::Arg;
        let s = product(&cx.x[0], cx.y[0].channels())?;
        let ep = cuda::Epilogue {
            bias: Arg::in_if(self.bias, 2),
            addend: Arg::in_if(self.residual, self.residual_at()),
            pre: if self.keep_pre {
                Arg::Out(1)
            } else {
                Arg::Null
            },
            act: self.act.map_or(0, Act::code),
        };
        cuda::fprop(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), ep)
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::VARIANTS
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// The 1x1 convolution over rows that `[.., I]` times `[O, I]` is.
fn product(x: &Spec, outputs: usize) -> Result<ConvShape> {
    let input = [x.rows(), 1, 1, x.channels()];
    ConvShape::new(input, [outputs, 1, 1], [1, 1], [0, 0], 1)
}

/// `dx = dy W (+ addend)`. Operands: dy, w, then the addend where present.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinearDgrad {
    /// Adds a gradient that is already there.
    pub addend: bool,
}

impl Op for LinearDgrad {
    op_common!("linear_dgrad");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 2 + usize::from(self.addend),
            "got {} operands",
            x.len()
        );
        ensure!(
            x[1].shape.len() == 2 && x[0].channels() == x[1].shape[0],
            "has dy {:?} for w {:?}",
            x[0].shape,
            x[1].shape
        );
        let mut dx = x[0].clone();
        *dx.shape.last_mut().expect("a tensor has an extent") = x[1].shape[1];
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
            flops: flops(x[0].rows(), y[0].channels(), x[0].channels()),
            bytes: traffic(x, y),
        }
    }

    fn product(&self, x: &[Spec]) -> Option<Product> {
        Some(Product {
            m: x[0].rows(),
            n: x[1].shape[1],
            k: x[0].channels(),
            ta: false,
            tb: false,
        })
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (o, i) = (x[0].channels(), y[0].channels());
        for r in 0..x[0].rows() {
            for c in 0..i {
                let v: f64 = (0..o)
                    .map(|k| x[0].data[r * o + k] * x[1].data[k * i + c])
                    .sum();
                y[0].data[r * i + c] = v + if self.addend {
                    x[2].data[r * i + c]
                } else {
                    0.0
                };
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (m, k, n, addend) = (
            cx.x[0].rows(),
            cx.x[0].channels(),
            cx.y[0].channels(),
            self.addend,
        );
        Ok(Box::new(move |a| {
            let ep = Epilogue {
                addend: a.x_if(addend, 2),
                ..Default::default()
            };
            gemm(
                m,
                n,
                k,
                Mat::new(a.x(0), k),
                Mat::new(a.x(1), n),
                a.y(0),
                n,
                false,
                ep,
            );
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let s = product(&cx.y[0], cx.x[0].channels())?;
        let addend = self.addend.then_some(Arg::In(2));
        wgpu::dgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), addend)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use device::Arg;
        let s = product(&cx.y[0], cx.x[0].channels())?;
        let addend = self.addend.then_some(Arg::In(2));
        cuda::dgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0), addend)
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::VARIANTS
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// `dW = dy^T x`, and the bias's gradient where there is one. Operands: x, dy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinearWgrad {
    /// Also the bias's gradient.
    pub bias: bool,
}

impl Op for LinearWgrad {
    op_common!("linear_wgrad");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "got {} operands", x.len());
        ensure!(
            x[0].rows() == x[1].rows(),
            "has x {:?} for dy {:?}",
            x[0].shape,
            x[1].shape
        );
        let o = x[1].channels();
        let mut y = vec![Spec::f32([o, x[0].channels()])];
        if self.bias {
            y.push(Spec::f32([o]));
        }
        Ok(y)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: flops(x[0].rows(), x[0].channels(), x[1].channels()),
            bytes: traffic(x, y),
        }
    }

    fn product(&self, x: &[Spec]) -> Option<Product> {
        Some(Product {
            m: x[1].channels(),
            n: x[0].channels(),
            k: x[0].rows(),
            ta: true,
            tb: false,
        })
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (i, o) = (x[0].channels(), x[1].channels());
        for r in 0..x[0].rows() {
            for k in 0..o {
                let d = x[1].data[r * o + k];
                for c in 0..i {
                    y[0].data[k * i + c] += d * x[0].data[r * i + c];
                }
                if self.bias {
                    y[1].data[k] += d;
                }
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (rows, i, o, bias) = (
            cx.x[0].rows(),
            cx.x[0].channels(),
            cx.x[1].channels(),
            self.bias,
        );
        Ok(Box::new(move |a| {
            gemm(
                o,
                i,
                rows,
                Mat::transposed(a.x(1), o),
                Mat::new(a.x(0), i),
                a.y(0),
                i,
                false,
                Epilogue::default(),
            );
            if bias {
                column_sums(rows, o, a.x(1), a.y(1), false);
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let outputs = cx.x[1].channels();
        let s = product(&cx.x[0], outputs)?;
        wgpu::wgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0))?;
        if self.bias {
            wgpu::column_sums(cx, Arg::In(1), Arg::Out(1), s.n, outputs)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use device::Arg;
        let outputs = cx.x[1].channels();
        let s = product(&cx.x[0], outputs)?;
        cuda::wgrad(cx, &s, Arg::In(0), Arg::In(1), Arg::Out(0))?;
        if self.bias {
            cuda::column_sums(cx, Arg::In(1), Arg::Out(1), s.n, outputs)?;
        }
        Ok(())
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::WGRAD_VARIANTS
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// A linear layer's attributes, as a model writes them.
#[derive(Clone, Copy, Debug)]
pub struct LinearLayer {
    /// Output features.
    pub out: usize,
    /// With a bias.
    pub bias: bool,
    /// How the weights start.
    pub init: Init,
    /// How the bias starts.
    pub bias_init: Init,
}

impl LinearLayer {
    /// With a bias, and PyTorch's default initialisation for `inputs` features.
    pub fn new(inputs: usize, out: usize) -> Self {
        let init = Init::UniformFanIn(inputs);
        LinearLayer {
            out,
            bias: true,
            init,
            bias_init: init,
        }
    }

    /// With a bias of zero and weights as given.
    pub fn with(out: usize, init: Init) -> Self {
        LinearLayer {
            out,
            bias: true,
            init,
            bias_init: Init::Zeros,
        }
    }
}

impl Graph {
    /// A linear layer with parameters `name.weight` (and `name.bias`) under the current scope: `[.., I]` to `[.., O]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn linear(&mut self, x: Tid, name: &str, l: LinearLayer) -> Result<Tid> {
        self.scoped(name, |g| {
            let i = g.spec(x).channels();
            let mut operands = vec![
                x,
                g.param("weight", &[l.out, i], Layout::Plain, l.init, true),
            ];
            if l.bias {
                operands.push(g.param("bias", &[l.out], Layout::Plain, l.bias_init, false));
            }
            g.push1(
                Linear {
                    bias: l.bias,
                    ..Linear::PLAIN
                },
                &operands,
            )
        })
    }
}

/// The room of [`Linear`].
pub const ROOM: Room = Room {
    name: "linear",
    about: "y = act(x W^T + bias + residual)",
    case: |p| {
        let (m, i, o): (usize, usize, usize) = (p.get("m", 4)?, p.get("i", 8)?, p.get("o", 8)?);
        let act: Option<Act> = match p.get("act", "none".to_string())?.as_str() {
            "none" => None,
            name => Some(name.parse()?),
        };
        let keep_pre = act.is_some_and(|a| a != Act::Relu);
        let op = Linear {
            bias: p.flag("bias")?,
            residual: p.flag("residual")?,
            act,
            keep_pre,
        };
        let w = Spec::f32([o, i]);
        let case = Case::new(op).x(&[m, i]).operand(
            w,
            Fill::Normal(1.0 / (i as f32).max(1.0).sqrt()),
            true,
        );
        Ok(case.x_if(op.bias, &[o]).x_if(op.residual, &[m, o]))
    },
    cases: &[
        "m=1,i=1,o=1",
        "m=1,i=17,o=10,bias=1",
        "m=3,i=5,o=7,bias=1,act=relu",
        "m=5,i=33,o=19,bias=1,act=gelu",
        "m=6,i=16,o=48,bias=1,act=gelu_tanh",
        "m=2,i=64,o=1,bias=1",
        "m=65,i=128,o=384,bias=1",
        "m=130,i=64,o=65,bias=1,residual=1",
        "m=197,i=192,o=130,bias=1,act=gelu",
        "m=63,i=257,o=15",
    ],
    bench: &[
        "m=1576,i=768,o=3072,bias=1",
        "m=197,i=768,o=2304,bias=1",
        "m=8320,i=128,o=512,bias=1,act=gelu",
    ],
    refused: &[],
};
