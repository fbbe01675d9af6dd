//! Layer normalisation (Ba et al. 2016) over the innermost axis: `y = (x - mean) * rstd * gamma + beta`, with
//! `rstd = 1 / sqrt(var + eps)` and the biased variance, as PyTorch's `nn.LayerNorm`.

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx, CudaLaunch};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, column_parts, fold};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Init, Layout, Spec, Tid};
use crate::{Result, ensure, multiversion, op_common};

/// Operands: x `[.., C]`, gamma `[C]`, beta `[C]`. Results: y `[.., C]`, mean `[rows]`, rstd `[rows]`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

impl Op for LayerNorm {
    op_common!("layer_norm");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 3, "takes three operands");
        let c = x[0].channels();
        ensure!(
            x[1].shape == [c] && x[2].shape == [c],
            "has a weight of shape {:?} and a bias of shape {:?} for {c} channels",
            x[1].shape,
            x[2].shape
        );
        let rows = Spec::f32([x[0].rows()]);
        Ok(vec![x[0].clone(), rows.clone(), rows])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        // Mean 1, variance 3, normalisation 2, scale and shift 2.
        Cost {
            flops: 8 * y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let [x, gamma, beta] = node.inputs[..] else {
            unreachable!("the shape rule demands three operands")
        };
        let dy = b.need(node.outputs[0])?;
        // In a pre-norm block the residual stream's gradient is there already: its sum costs no pass of its own.
        let partial = b.take_partial(x);
        let mut operands = vec![dy, x, node.outputs[1], node.outputs[2], gamma];
        operands.extend(partial);
        let op = LayerNormBwd {
            addend: partial.is_some(),
        };
        let out = b.emit(op, &operands)?;
        b.give(x, out[0])?;
        b.give(gamma, out[1])?;
        b.give(beta, out[2])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let c = x[0].channels();
        for r in 0..x[0].rows() {
            let row = x[0].row(r);
            let mean = row.iter().sum::<f64>() / c as f64;
            let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / c as f64;
            let rstd = 1.0 / (var + f64::from(self.eps)).sqrt();
            for (i, v) in row.iter().enumerate() {
                y[0].row_mut(r)[i] = (v - mean) * rstd * x[1].data[i] + x[2].data[i];
            }
            y[1].data[r] = mean;
            y[2].data[r] = rstd;
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (rows, c, eps) = (cx.x[0].rows(), cx.x[0].channels(), self.eps);
        let per = par::rows_per_chunk(c);
        Ok(Box::new(move |a| {
            let (x, gamma, beta) = (a.x(0), a.x(1), a.x(2));
            let y = par::SharedMut::new(a.y(0));
            let (mean, rstd) = (par::SharedMut::new(a.y(1)), par::SharedMut::new(a.y(2)));
            par::for_each(rows.div_ceil(per), |chunk| {
                let from = chunk * per;
                let n = per.min(rows - from);
                // SAFETY: chunks are disjoint.
                let (y, mean, rstd) = unsafe {
                    (
                        y.slice(from * c, n * c),
                        mean.slice(from, n),
                        rstd.slice(from, n),
                    )
                };
                normalise(
                    &x[from * c..(from + n) * c],
                    gamma,
                    beta,
                    eps,
                    y,
                    mean,
                    rstd,
                );
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (rows, c) = (cx.x[0].rows(), cx.x[0].channels());
        for cut in cx.cuts(rows, &[c, 1])? {
            let args = [
                cut.of(Arg::In(0), c),
                Arg::In(1),
                Arg::In(2),
                cut.of(Arg::Out(0), c),
                cut.of(Arg::Out(1), 1),
                cut.of(Arg::Out(2), 1),
            ];
            launch_rows(cx, "forward", cut.rows, c, self.eps, 0, &args)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (rows, c) = (cx.x[0].rows(), cx.x[0].channels());
        let k = cuda::Rows::new(c, 64);
        cx.launch(CudaLaunch {
            source: "layer_norm.cu",
            entry: "layer_norm",
            consts: k.consts(),
            args: vec![
                Arg::n(rows),
                Arg::n(k.items),
                Arg::In(0),
                Arg::In(1),
                Arg::In(2),
                Arg::F32(self.eps),
                Arg::Out(0),
                Arg::Out(1),
                Arg::Out(2),
            ],
            grid: [rows.div_ceil(k.per_block()) as u32, 1, 1],
            block: [256, 1, 1],
            smem: 0,
        })
    }
}

/// Lanes of the partial sums below: fixed, so that the bits do not depend on the processor's vector width.
const LANES: usize = 16;

/// The lanes' sum, halves by halves.
#[inline(always)]
fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `sum of f(x[0][i], x[1][i], ..)` in interleaved partial sums: two sets of [`LANES`], as one alone would wait for its
/// own additions.
#[inline(always)]
fn sum_by<const K: usize>(x: [&[f32]; K], f: impl Fn([f32; K]) -> f32) -> f32 {
    let n = x[0].len();
    let blocks = x.map(|x| x[..n].as_chunks::<LANES>());
    let add = |lanes: &mut [f32; LANES], b: usize| {
        for (l, sum) in lanes.iter_mut().enumerate() {
            *sum += f(std::array::from_fn(|k| blocks[k].0[b][l]));
        }
    };
    let (mut even, mut odd) = ([0.0; LANES], [0.0; LANES]);
    for pair in 0..n / LANES / 2 {
        add(&mut even, 2 * pair);
        add(&mut odd, 2 * pair + 1);
    }
    if n / LANES % 2 == 1 {
        add(&mut even, n / LANES - 1);
    }
    even.iter_mut().zip(odd).for_each(|(e, o)| *e += o);
    for (i, sum) in even.iter_mut().enumerate().take(n % LANES) {
        *sum += f(std::array::from_fn(|k| blocks[k].1[i]));
    }
    sum(even)
}

multiversion! {
    /// Rows of `x` to rows of `y`; two passes for the variance.
    fn normalise(x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, y: &mut [f32], mean: &mut [f32], rstd: &mut [f32]) {
        let c = gamma.len();
        for (r, (x, y)) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).enumerate() {
            let m = sum_by([x], |[x]| x) / c as f32;
            let var = sum_by([x], |[x]| (x - m) * (x - m)) / c as f32;
            let s = 1.0 / (var + eps).sqrt();
            for (((y, x), g), b) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
                *y = (x - m) * s * g + b;
            }
            mean[r] = m;
            rstd[r] = s;
        }
    }
}

/// The gradients of [`LayerNorm`]. Operands: dy, x, mean, rstd, gamma and, where `addend`, the gradient that x has
/// already. Results: dx (plus the addend), dgamma, dbeta.
///
/// With `g = dy * gamma` and `h = (x - mean) * rstd`: `dx = rstd * (g - mean(g) - h * mean(g * h))`,
/// `dgamma = sum(dy * h)`, `dbeta = sum(dy)` over rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerNormBwd {
    /// A gradient is added to dx.
    pub addend: bool,
}

impl Op for LayerNormBwd {
    op_common!("layer_norm_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 5 + usize::from(self.addend),
            "takes five operands, and one more with an addend"
        );
        let (rows, c) = (x[1].rows(), x[1].channels());
        ensure!(
            x[0] == x[1] && (!self.addend || x[5] == x[1]),
            "has gradients of another shape than {:?}",
            x[1].shape
        );
        ensure!(
            x[2].len() == rows && x[3].len() == rows && x[4].shape == [c],
            "has statistics {:?} and weight {:?} for {rows} rows of {c}",
            x[2].shape,
            x[4].shape
        );
        Ok(vec![x[1].clone(), Spec::f32([c]), Spec::f32([c])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: (14 + u64::from(self.addend)) * y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let c = x[1].channels();
        for r in 0..x[1].rows() {
            let (mean, rstd) = (x[2].data[r], x[3].data[r]);
            let g = |i: usize| x[0].row(r)[i] * x[4].data[i];
            let h = |i: usize| (x[1].row(r)[i] - mean) * rstd;
            let mg = (0..c).map(g).sum::<f64>() / c as f64;
            let mgh = (0..c).map(|i| g(i) * h(i)).sum::<f64>() / c as f64;
            for i in 0..c {
                let old = if self.addend { x[5].row(r)[i] } else { 0.0 };
                y[0].row_mut(r)[i] = rstd * (g(i) - mg - h(i) * mgh) + old;
                y[1].data[i] += x[0].row(r)[i] * h(i);
                y[2].data[i] += x[0].row(r)[i];
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (rows, c, addend) = (cx.x[1].rows(), cx.x[1].channels(), self.addend);
        let scratch = par::column_sums_scratch(rows, 2 * c);
        cx.workspace(scratch + 2 * c);
        Ok(Box::new(move |a| {
            let (dy, x, mean, rstd, gamma) = (a.x(0), a.x(1), a.x(2), a.x(3), a.x(4));
            let old = a.x_if(addend, 5);
            let dx = par::SharedMut::new(a.y(0));
            let (partial, sums) = a.work().split_at_mut(scratch);
            par::column_sums(rows, 2 * c, partial, sums, |r, sums| {
                let at = r * c..(r + 1) * c;
                // SAFETY: one call per row.
                let dx = unsafe { dx.slice(r * c, c) };
                let (dgamma, dbeta) = sums.split_at_mut(c);
                let old = old.map(|o| &o[at.clone()]);
                differentiate(
                    &dy[at.clone()],
                    &x[at],
                    mean[r],
                    rstd[r],
                    gamma,
                    old,
                    dx,
                    dgamma,
                    dbeta,
                );
            });
            a.y(1).copy_from_slice(&sums[..c]);
            a.y(2).copy_from_slice(&sums[c..]);
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (rows, c) = (cx.x[1].rows(), cx.x[1].channels());
        let (width, consts) = item(c);
        let items = c / width;
        let cuts = cx.cuts(rows, &[c, 1])?;
        let parts: usize = cuts.iter().map(|k| column_parts(k.rows, items)).sum();
        let part_gamma = Arg::Work(cx.workspace(parts * c));
        let part_beta = Arg::Work(cx.workspace(parts * c));
        let mut part0 = 0;
        for cut in cuts {
            let (dy, x) = (cut.of(Arg::In(0), c), cut.of(Arg::In(1), c));
            let (mean, rstd) = (cut.of(Arg::In(2), 1), cut.of(Arg::In(3), 1));
            let old = cut.of(Arg::In(if self.addend { 5 } else { 0 }), c);
            let args = [dy, x, mean, rstd, Arg::In(4), old, cut.of(Arg::Out(0), c)];
            let flags = u32::from(self.addend);
            launch_rows(cx, "backward", cut.rows, c, 0.0, flags, &args)?;
            let parts = column_parts(cut.rows, items);
            let groups = fold(parts * items, 64);
            cx.launch(Launch {
                shader: "layer_norm.wgsl",
                entry: "bwd_sums",
                consts: consts.clone(),
                args: vec![dy, x, mean, rstd, part_gamma, part_beta],
                params: params([cut.rows, groups[0] as usize, c, parts], 0.0, 0, part0),
                groups,
            })?;
            part0 += parts;
        }
        cx.sum_parts(part_gamma, Arg::Out(1), parts, c, c)?;
        cx.sum_parts(part_beta, Arg::Out(2), parts, c, c)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (rows, c) = (cx.x[1].rows(), cx.x[1].channels());
        // A lane holds dy, x and two sums of each of its channels.
        let k = cuda::Rows::new(c, 32);
        let mut consts = k.consts();
        consts.push(("ADDEND", u32::from(self.addend).to_string()));
        let blocks = rows.div_ceil(k.per_block()).min(2 * cx.traits.sms as usize);
        let part_gamma = Arg::Work(cx.workspace(blocks * c));
        let part_beta = Arg::Work(cx.workspace(blocks * c));
        let mut args = vec![Arg::n(rows), Arg::n(k.items)];
        args.extend((0..5).map(Arg::In));
        args.extend([
            Arg::in_if(self.addend, 5),
            Arg::Out(0),
            part_gamma,
            part_beta,
        ]);
        cx.launch(CudaLaunch {
            source: "layer_norm.cu",
            entry: "layer_norm_bwd",
            consts,
            args,
            grid: [blocks as u32, 1, 1],
            block: [256, 1, 1],
            smem: 0,
        })?;
        cx.sum_parts(part_gamma, Arg::Out(1), blocks, c, c)?;
        cx.sum_parts(part_beta, Arg::Out(2), blocks, c, c)
    }
}

/// Channels per item of the shader, and its constants for that.
fn item(c: usize) -> (usize, Vec<(&'static str, String)>) {
    if c.is_multiple_of(4) {
        return (4, vec![]);
    }
    (1, vec![("T", "f32".into()), ("WIDTH", "1".into())])
}

fn params([rows, groups_x, c, parts]: [usize; 4], eps: f32, flags: u32, part0: usize) -> Vec<u32> {
    let items = c / item(c).0;
    let sizes = [rows, groups_x, items, parts].map(|v| v as u32);
    let rest = [(c as f32).to_bits(), eps.to_bits(), flags, part0 as u32];
    [sizes, rest].concat()
}

/// A launch over rows: one row per invocation on software adapters, where barriers are dear, else one per workgroup.
fn launch_rows(
    cx: &mut WgpuCx,
    entry: &'static str,
    rows: usize,
    c: usize,
    eps: f32,
    flags: u32,
    args: &[Arg],
) -> Result<()> {
    let (_, mut consts) = item(c);
    let mut per_group = 64;
    if !cx.traits.software {
        per_group = 1;
        consts.push(("GROUP", "64".into()));
    }
    let groups = fold(rows, per_group);
    cx.launch(Launch {
        shader: "layer_norm.wgsl",
        entry,
        consts,
        args: args.to_vec(),
        params: params([rows, groups[0] as usize, c, 0], eps, flags, 0),
        groups,
    })
}

multiversion! {
    /// One row: dx, and its terms of dgamma and dbeta.
    fn differentiate(
        dy: &[f32], x: &[f32], mean: f32, rstd: f32, gamma: &[f32], old: Option<&[f32]>,
        dx: &mut [f32], dgamma: &mut [f32], dbeta: &mut [f32],
    ) {
        let c = gamma.len();
        let (dy, x, dx, dgamma, dbeta) = (&dy[..c], &x[..c], &mut dx[..c], &mut dgamma[..c], &mut dbeta[..c]);
        let mg = sum_by([dy, gamma], |[dy, g]| dy * g) / c as f32;
        let mgh = sum_by([dy, gamma, x], |[dy, g, x]| dy * g * ((x - mean) * rstd)) / c as f32;
        for i in 0..c {
            let h = (x[i] - mean) * rstd;
            dx[i] = rstd * (dy[i] * gamma[i] - mg - h * mgh);
            dgamma[i] += dy[i] * h;
            dbeta[i] += dy[i];
        }
        if let Some(old) = old {
            dx.iter_mut().zip(old).for_each(|(d, o)| *d += o);
        }
    }
}

impl Graph {
    /// Layer normalisation over the innermost axis, with `name.weight` and `name.bias` under the current scope.
    ///
    /// # Errors
    /// None for a well-formed graph.
    pub fn layer_norm(&mut self, x: Tid, name: &str, eps: f32) -> Result<Tid> {
        let c = self.spec(x).channels();
        self.scoped(name, |g| {
            let gamma = g.param("weight", &[c], Layout::Plain, Init::Ones, false);
            let beta = g.param("bias", &[c], Layout::Plain, Init::Zeros, false);
            g.push1(LayerNorm { eps }, &[x, gamma, beta])
        })
    }
}

/// The room of [`LayerNorm`].
pub const ROOM: Room = Room {
    name: "layer_norm",
    about: "y = (x - mean) / sqrt(var + eps) * gamma + beta over the innermost axis",
    case: |p| {
        let (n, t, c) = (p.get("n", 2)?, p.get("t", 3)?, p.get("c", 8)?);
        let eps = p.get("eps", 1e-6)?;
        let x = [n, t, c];
        if !p.flag("addend")? {
            return Ok(Case::new(LayerNorm { eps })
                .x(&x)
                .x(&[c])
                .x(&[p.get("weights", c)?]));
        }
        // The backward op by itself, as it is emitted where the residual stream has a gradient already.
        let rows = Spec::f32([n * t]);
        Ok(Case::new(LayerNormBwd { addend: true })
            .x(&x)
            .x(&x)
            .fixed(rows.clone(), Fill::Normal(0.1))
            .fixed(rows, Fill::Uniform(0.5, 1.5))
            .x(&[c])
            .x(&x)
            .forward_only())
    },
    cases: &[
        "n=1,t=1,c=1",
        "n=1,t=1,c=3",
        "n=2,t=3,c=5",
        "n=3,t=17,c=31,eps=1e-5",
        "n=2,t=65,c=128",
        "n=1,t=50,c=1024",
        "n=2,t=197,c=192",
        "n=1,t=1,c=4099",
        "n=3,t=7,c=20,addend=1",
        "n=2,t=197,c=384,addend=1",
    ],
    bench: &["n=128,t=65,c=128,eps=1e-5", "n=8,t=197,c=768"],
    refused: &["c=8,weights=7"],
};
