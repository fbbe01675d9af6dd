//! Random masks: dropout (Srivastava et al. 2014) per element and drop path (Huang et al. 2016, "Deep Networks with
//! Stochastic Depth") per sample, both scaled by `1 / (1 - p)`.
//!
//! The numbers are Philox4x32-10 of the counter `(i / 4, 0, id, step)` and the key `seed`; element (or sample) `i`
//! takes word `i % 4` and is kept where its [`unit()`] is at least p. The backward pass draws the same numbers again, so
//! nothing is saved, and every backend draws the same ones.

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx, CudaLaunch};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{DType, Graph, Spec, Tid};
use crate::philox::{philox4x32, unit};
use crate::{Result, ensure, multiversion, op_common};

/// Whether element `i` of mask `id` is kept, for the state `rng` = (seed low, seed high, step, 0).
fn kept(i: usize, id: u32, rng: [u32; 3], p: f32) -> bool {
    let words = philox4x32([(i / 4) as u32, 0, id, rng[2]], [rng[0], rng[1]]);
    unit(words[i % 4]) >= p
}

fn host_rng(x: &Host) -> [u32; 3] {
    [x.data[0] as u32, x.data[1] as u32, x.data[2] as u32]
}

fn check_rng(x: &Spec, p: f32) -> Result<(), String> {
    ensure!(
        x.dtype == DType::U32 && x.len() == 4,
        "wants the random state as four uint32, not {:?}",
        x.shape
    );
    ensure!(
        (0.0..1.0).contains(&p),
        "has the probability {p}; it must be at least 0 and below 1"
    );
    Ok(())
}

/// `y = x * mask / (1 - p)`, any shape. Operands: x, rng uint32 `[4]` = (seed low, seed high, step, 0).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Dropout {
    /// Probability of a zero.
    pub p: f32,
    /// Which mask of the graph it is.
    pub id: u32,
}

impl Op for Dropout {
    op_common!("dropout");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        check_rng(&x[1], self.p)?;
        Ok(vec![x[0].clone()])
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let dx = b.emit1(*self, &[dy, node.inputs[1]])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (rng, scale) = (host_rng(x[1]), 1.0 / (1.0 - f64::from(self.p)));
        for (i, y) in y[0].data.iter_mut().enumerate() {
            let keep = kept(i, self.id, rng, self.p);
            *y = if keep { x[0].data[i] * scale } else { 0.0 };
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let Dropout { p, id } = *self;
        Ok(Box::new(move |a| {
            let (x, rng) = (a.x(0), a.xu(1));
            par::rows(a.y(0), 1, |at, y| {
                mask(&x[at..at + y.len()], at / 4, id, rng, p, y);
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.y[0].len();
        let (width, entry) = if n.is_multiple_of(4) {
            (4, "dropout4")
        } else {
            (1, "dropout1")
        };
        for cut in cx.cuts(n, &[1])? {
            let args = [cut.of(Arg::In(0), 1), Arg::In(1), cut.of(Arg::Out(0), 1)];
            let params = mask_params(self.id, self.p, cut.first / 4, 1, false);
            let n = cut.rows / width;
            cx.items(("random.wgsl", entry), &[], n, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let n = cx.y[0].len();
        let consts = vec![("VEC", cuda::vector(&[n]).to_string())];
        let args = vec![
            Arg::n(n),
            Arg::In(0),
            Arg::In(1),
            Arg::U32(self.id),
            Arg::F32(self.p),
            Arg::F32(1.0 / (1.0 - self.p)),
            Arg::Out(0),
        ];
        cx.launch(CudaLaunch {
            source: "random.cu",
            entry: "dropout",
            consts,
            args,
            grid: [n.div_ceil(4 * 256) as u32, 1, 1],
            block: [256, 1, 1],
            smem: 0,
        })
    }
}

/// Philox blocks drawn side by side.
const BLOCKS: usize = 16;

multiversion! {
    /// `y = x * mask / (1 - p)` for elements that begin with Philox block `first`.
    fn mask(x: &[f32], first: usize, id: u32, rng: &[u32], p: f32, y: &mut [f32]) {
        let scale = 1.0 / (1.0 - p);
        for (chunk, (x, y)) in x.chunks(4 * BLOCKS).zip(y.chunks_mut(4 * BLOCKS)).enumerate() {
            let from = (first + chunk * BLOCKS) as u32;
            let mut words = [[0u32; 4]; BLOCKS];
            for (b, w) in words.iter_mut().enumerate() {
                *w = philox4x32([from + b as u32, 0, id, rng[2]], [rng[0], rng[1]]);
            }
            for ((y, x), w) in y.iter_mut().zip(x).zip(words.as_flattened()) {
                *y = if unit(*w) >= p { x * scale } else { 0.0 };
            }
        }
    }
}

/// `y[n] = x[n] * mask[n] / (1 - p)`, plus a residual where fused. Operands: x `[N, ..]`, rng uint32 `[4]` = (seed
/// low, seed high, step, 0) and, where `residual`, a tensor of x's shape.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DropPath {
    /// Probability of a zero.
    pub p: f32,
    /// Which mask of the graph it is.
    pub id: u32,
    /// A residual is added.
    pub residual: bool,
}

impl Op for DropPath {
    op_common!("drop_path");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 2 + usize::from(self.residual),
            "takes two operands, and one more with a residual"
        );
        check_rng(&x[1], self.p)?;
        ensure!(
            !self.residual || x[2] == x[0],
            "adds {:?} to {:?}: the shapes differ",
            x[2].shape,
            x[0].shape
        );
        Ok(vec![x[0].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: (1 + u64::from(self.residual)) * y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        if b.wants(node.inputs[0]) {
            let op = DropPath {
                residual: false,
                ..*self
            };
            let dx = b.emit1(op, &[dy, node.inputs[1]])?;
            b.give(node.inputs[0], dx)?;
        }
        if self.residual {
            b.give(node.inputs[2], dy)?;
        }
        Ok(())
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (rng, scale) = (host_rng(x[1]), 1.0 / (1.0 - f64::from(self.p)));
        let width = x[0].data.len() / x[0].shape[0];
        for (i, y) in y[0].data.iter_mut().enumerate() {
            let keep = kept(i / width, self.id, rng, self.p);
            let branch = if keep { x[0].data[i] * scale } else { 0.0 };
            *y = branch + if self.residual { x[2].data[i] } else { 0.0 };
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let DropPath { p, id, residual } = *self;
        let width = cx.x[0].len() / cx.x[0].shape[0];
        Ok(Box::new(move |a| {
            let (x, rng, old) = (a.x(0), a.xu(1), a.x_if(residual, 2));
            let rng = [rng[0], rng[1], rng[2]];
            let scale = 1.0 / (1.0 - p);
            par::rows(a.y(0), width, |first, y| {
                for (n, y) in y.chunks_exact_mut(width).enumerate() {
                    let at = (first + n) * width..(first + n + 1) * width;
                    let x = kept(first + n, id, rng, p).then(|| &x[at.clone()]);
                    match (x, old.map(|o| &o[at])) {
                        (Some(x), Some(o)) => {
                            let terms = x.iter().zip(o);
                            y.iter_mut()
                                .zip(terms)
                                .for_each(|(y, (x, o))| *y = x * scale + o);
                        }
                        (Some(x), None) => y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale),
                        (None, Some(o)) => y.copy_from_slice(o),
                        (None, None) => y.fill(0.0),
                    }
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let samples = cx.x[0].shape[0];
        let width = cx.x[0].len() / samples;
        for cut in cx.cuts(samples, &[width])? {
            let y = cut.of(Arg::Out(0), width);
            let old = if self.residual {
                cut.of(Arg::In(2), width)
            } else {
                y
            };
            let args = [cut.of(Arg::In(0), width), Arg::In(1), y, old];
            let params = mask_params(self.id, self.p, cut.first, width, self.residual);
            let n = cut.rows * width;
            cx.items(("random.wgsl", "drop_path"), &[], n, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let samples = cx.x[0].shape[0];
        let width = cx.x[0].len() / samples;
        let vec = cuda::vector(&[width]);
        let chunks = (width / vec).div_ceil(256);
        let args = vec![
            Arg::n(width / vec),
            Arg::n(chunks),
            Arg::In(0),
            Arg::In(1),
            Arg::U32(self.id),
            Arg::F32(self.p),
            Arg::F32(1.0 / (1.0 - self.p)),
            Arg::in_if(self.residual, 2),
            Arg::Out(0),
        ];
        cx.launch(CudaLaunch {
            source: "random.cu",
            entry: "drop_path",
            consts: vec![
                ("VEC", vec.to_string()),
                ("RESIDUAL", u32::from(self.residual).to_string()),
            ],
            args,
            grid: [(samples * chunks) as u32, 1, 1],
            block: [256, 1, 1],
            smem: 0,
        })
    }
}

/// The shader's parameters after the number of items and groups.
fn mask_params(id: u32, p: f32, first: usize, width: usize, residual: bool) -> [u32; 6] {
    let scale = 1.0 / (1.0 - p);
    [
        id,
        p.to_bits(),
        scale.to_bits(),
        first as u32,
        width as u32,
        u32::from(residual),
    ]
}

impl Graph {
    /// The random state that masks read: an input `rng`, uint32 `[4]` = (seed low, seed high, step, 0), made on first
    /// use; and the number of the next mask.
    fn mask_state(&mut self) -> (Tid, u32) {
        let rng = match self.rng {
            Some(t) => t,
            None => {
                let t = self.input("rng", Spec::u32([4]));
                self.rng = Some(t);
                t
            }
        };
        let masks = self
            .nodes
            .iter()
            .filter(|n| n.op_as::<Dropout>().is_some() || n.op_as::<DropPath>().is_some());
        (rng, masks.count() as u32)
    }

    /// Dropout; x itself where the graph is not [random](crate::graph::Mode) or p is 0.
    ///
    /// # Errors
    /// p is not in [0, 1).
    pub fn dropout(&mut self, x: Tid, p: f32) -> Result<Tid> {
        if !self.mode.random || p == 0.0 {
            return Ok(x);
        }
        let (rng, id) = self.mask_state();
        self.push1(Dropout { p, id }, &[x, rng])
    }

    /// Drop path per sample (the first axis); x itself where the graph is not [random](crate::graph::Mode) or p is 0.
    ///
    /// # Errors
    /// p is not in [0, 1).
    pub fn drop_path(&mut self, x: Tid, p: f32) -> Result<Tid> {
        if !self.mode.random || p == 0.0 {
            return Ok(x);
        }
        let (rng, id) = self.mask_state();
        let op = DropPath {
            p,
            id,
            residual: false,
        };
        self.push1(op, &[x, rng])
    }
}

fn rng_operand(case: Case) -> Case {
    case.fixed(Spec::u32([4]), Fill::U32(vec![42, 7, 1000, 0]))
}

/// The room of [`Dropout`].
pub const DROPOUT: Room = Room {
    name: "dropout",
    about: "y = x * mask / (1 - p), one draw per element",
    case: |p| {
        let op = Dropout {
            p: p.get("p", 0.5)?,
            id: p.get("id", 0)?,
        };
        let shape = [p.get("n", 2)?, p.get("c", 8)?];
        Ok(rng_operand(Case::new(op).x(&shape)))
    },
    cases: &[
        "n=1,c=1,p=0.1",
        "n=3,c=5,p=0.9,id=1",
        "n=7,c=1031,p=0.1,id=2",
        "n=65,c=512,p=0.5,id=3",
    ],
    bench: &["n=8320,c=128,p=0.1"],
    refused: &["p=1", "p=-0.1", "p=NaN"],
};

/// The room of [`DropPath`].
pub const DROP_PATH: Room = Room {
    name: "drop_path",
    about: "y = x * mask / (1 - p), one draw per sample, plus a residual where fused",
    case: |p| {
        let op = DropPath {
            p: p.get("p", 0.5)?,
            id: p.get("id", 0)?,
            residual: p.flag("residual")?,
        };
        let shape = [p.get("n", 2)?, p.get("t", 3)?, p.get("c", 8)?];
        let case = rng_operand(Case::new(op).x(&shape));
        Ok(case.x_if(op.residual, &shape))
    },
    cases: &[
        "n=5,t=1,c=1,p=0.1",
        "n=9,t=3,c=5,p=0.5,id=1",
        "n=9,t=3,c=5,p=0.5,id=1,residual=1",
        "n=33,t=65,c=16,p=0.1,id=2,residual=1",
    ],
    bench: &["n=128,t=65,c=128,p=0.1,residual=1"],
    refused: &["p=1"],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_numbered_and_share_the_random_state() {
        let mut g = Graph::new();
        let x = g.input("x", Spec::f32([4, 8]));
        assert_eq!(
            g.dropout(x, 0.5).unwrap(),
            x,
            "an evaluated graph has no masks"
        );
        g.mode.random = true;
        assert_eq!(g.drop_path(x, 0.0).unwrap(), x);
        let y = g.dropout(x, 0.5).unwrap();
        g.drop_path(y, 0.1).unwrap();
        assert_eq!(g.nodes[0].op_as::<Dropout>().unwrap().id, 0);
        assert_eq!(g.nodes[1].op_as::<DropPath>().unwrap().id, 1);
        assert_eq!(g.nodes[0].inputs[1], g.nodes[1].inputs[1]);
        assert!(g.dropout(x, 1.0).is_err());
    }

    #[test]
    fn the_share_of_zeros_is_p() {
        let n = 100_000;
        let zeros = (0..n).filter(|&i| !kept(i, 3, [1, 2, 3], 0.1)).count();
        assert!((zeros as f64 / n as f64 - 0.1).abs() < 0.004, "{zeros}");
    }
}
