//! LayerScale (Touvron et al. 2021, "Going deeper with Image Transformers"): a learnt factor per channel on a residual
//! branch, `y = x * g` or, fused with the sum that follows, `y = x * g + residual`. DINOv2 and CaiT use it.

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx, column_parts};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, multiversion, op_common};

/// Operands: x `[.., C]`, g `[C]` and, where `residual`, a tensor of x's shape. Result: y of x's shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerScale {
    /// A residual is added.
    pub residual: bool,
}

impl Op for LayerScale {
    op_common!("layer_scale");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 2 + usize::from(self.residual),
            "takes two operands, and one more with a residual"
        );
        let c = x[0].channels();
        ensure!(
            x[1].len() == c,
            "has factors of shape {:?} for {c} channels",
            x[1].shape
        );
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
        let (x, g) = (node.inputs[0], node.inputs[1]);
        let dy = b.need(node.outputs[0])?;
        if b.wants(x) || b.wants(g) {
            let out = b.emit(LayerScaleBwd, &[dy, x, g])?;
            let shape = b.graph.shape(g).to_vec();
            let dg = b.graph.view(out[1], &shape)?;
            b.give(x, out[0])?;
            b.give(g, dg)?;
        }
        if self.residual {
            b.give(node.inputs[2], dy)?;
        }
        Ok(())
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for r in 0..x[0].rows() {
            for i in 0..x[0].channels() {
                let old = if self.residual { x[2].row(r)[i] } else { 0.0 };
                y[0].row_mut(r)[i] = x[0].row(r)[i] * x[1].data[i] + old;
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (c, residual) = (cx.x[0].channels(), self.residual);
        Ok(Box::new(move |a| {
            let (x, g, old) = (a.x(0), a.x(1), a.x_if(residual, 2));
            par::rows(a.y(0), c, |row, y| {
                let at = row * c..row * c + y.len();
                scale_rows(&x[at.clone()], g, old.map(|o| &o[at]), y);
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let old = self.residual.then_some(Arg::In(2));
        let (rows, c) = (cx.x[0].rows(), cx.x[0].channels());
        scale(cx, Arg::In(0), Arg::In(1), old, rows, c)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let k = cuda::Columns::new(cx, cx.x[0].rows(), cx.x[0].channels());
        let mut consts = k.consts();
        consts.push(("RESIDUAL", u32::from(self.residual).to_string()));
        let args = vec![
            Arg::n(k.rows),
            Arg::n(k.items),
            Arg::In(0),
            Arg::In(1),
            Arg::in_if(self.residual, 2),
            Arg::Out(0),
        ];
        let kernel = ("layer_scale.cu", "layer_scale");
        k.launch(cx, kernel, &consts, k.map_grid(), args)
    }
}

multiversion! {
    fn scale_rows(x: &[f32], g: &[f32], old: Option<&[f32]>, y: &mut [f32]) {
        let c = g.len();
        for (r, (x, y)) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).enumerate() {
            match old {
                Some(old) => {
                    let old = &old[r * c..(r + 1) * c];
                    for i in 0..c {
                        y[i] = x[i] * g[i] + old[i];
                    }
                }
                None => {
                    for i in 0..c {
                        y[i] = x[i] * g[i];
                    }
                }
            }
        }
    }
}

/// The gradients of [`LayerScale`]. Operands: dy, x, g. Results: `dx = dy * g`, `dg[C] = sum(dy * x)` over rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerScaleBwd;

impl Op for LayerScaleBwd {
    op_common!("layer_scale_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 3, "takes three operands");
        let c = x[1].channels();
        ensure!(
            x[0] == x[1] && x[2].len() == c,
            "has a gradient of shape {:?} and factors of shape {:?} for {:?}",
            x[0].shape,
            x[2].shape,
            x[1].shape
        );
        Ok(vec![x[1].clone(), Spec::f32([c])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: 3 * y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for r in 0..x[1].rows() {
            for i in 0..x[1].channels() {
                let dy = x[0].row(r)[i];
                y[0].row_mut(r)[i] = dy * x[2].data[i];
                y[1].data[i] += dy * x[1].row(r)[i];
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (rows, c) = (cx.x[1].rows(), cx.x[1].channels());
        cx.workspace(par::column_sums_scratch(rows, c));
        Ok(Box::new(move |a| {
            let (dy, x, g) = (a.x(0), a.x(1), a.x(2));
            let dx = par::SharedMut::new(a.y(0));
            par::column_sums(rows, c, a.work(), a.y(1), |r, dg| {
                let at = r * c..(r + 1) * c;
                // SAFETY: one call per row.
                let dx = unsafe { dx.slice(r * c, c) };
                differentiate(&dy[at.clone()], &x[at], g, dx, dg);
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (rows, c) = (cx.x[1].rows(), cx.x[1].channels());
        scale(cx, Arg::In(0), Arg::In(2), None, rows, c)?;
        let (width, consts) = item(c);
        let items = c / width;
        let cuts = cx.cuts(rows, &[c])?;
        let parts: usize = cuts.iter().map(|k| column_parts(k.rows, items)).sum();
        let work = Arg::Work(cx.workspace(parts * c));
        let mut part0 = 0;
        for cut in cuts {
            let parts = column_parts(cut.rows, items);
            let (dy, x) = (cut.of(Arg::In(0), c), cut.of(Arg::In(1), c));
            let params = [items, 0, cut.rows, parts, part0].map(|v| v as u32);
            let n = parts * items;
            let args = [dy, x, x, work];
            cx.items(("layer_scale.wgsl", "bwd_sums"), &consts, n, &args, &params)?;
            part0 += parts;
        }
        cx.sum_parts(work, Arg::Out(1), parts, c, c)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let k = cuda::Columns::new(cx, cx.x[1].rows(), cx.x[1].channels());
        let part = Arg::Work(cx.workspace(k.parts * k.channels));
        let mut args = [k.rows, k.items, k.per_part].map(Arg::n).to_vec();
        args.extend([Arg::In(0), Arg::In(1), Arg::In(2), Arg::Out(0), part]);
        let kernel = ("layer_scale.cu", "layer_scale_bwd");
        k.launch(cx, kernel, &k.consts(), k.sum_grid(), args)?;
        cx.sum_parts(part, Arg::Out(1), k.parts, k.channels, k.channels)
    }
}

fn item(c: usize) -> (usize, Vec<(&'static str, String)>) {
    if c.is_multiple_of(4) {
        return (4, vec![]);
    }
    (1, vec![("T", "f32".into())])
}

/// Result 0 is `x * g`, plus `old` where there is one.
fn scale(cx: &mut WgpuCx, x: Arg, g: Arg, old: Option<Arg>, rows: usize, c: usize) -> Result<()> {
    let (width, consts) = item(c);
    for cut in cx.cuts(rows, &[c])? {
        let y = cut.of(Arg::Out(0), c);
        let args = [cut.of(x, c), g, old.map_or(y, |o| cut.of(o, c)), y];
        let params = [(c / width) as u32, u32::from(old.is_some()), 0, 0, 0];
        let n = cut.rows * c / width;
        cx.items(("layer_scale.wgsl", "scale"), &consts, n, &args, &params)?;
    }
    Ok(())
}

multiversion! {
    fn differentiate(dy: &[f32], x: &[f32], g: &[f32], dx: &mut [f32], dg: &mut [f32]) {
        let c = g.len();
        let (dy, x, dx, dg) = (&dy[..c], &x[..c], &mut dx[..c], &mut dg[..c]);
        for i in 0..c {
            dx[i] = dy[i] * g[i];
            dg[i] += dy[i] * x[i];
        }
    }
}

impl Graph {
    /// `x * g`, and `+ residual` where there is one; `g` has one element per channel.
    ///
    /// # Errors
    /// The number of channels or the residual's shape differs.
    pub fn layer_scale(&mut self, x: Tid, g: Tid, residual: Option<Tid>) -> Result<Tid> {
        let op = LayerScale {
            residual: residual.is_some(),
        };
        let mut operands = vec![x, g];
        operands.extend(residual);
        self.push1(op, &operands)
    }
}

/// The room of [`LayerScale`].
pub const ROOM: Room = Room {
    name: "layer_scale",
    about: "y = x * g per channel, plus a residual where fused",
    case: |p| {
        let (n, c, residual) = (p.get("n", 3)?, p.get("c", 8)?, p.flag("residual")?);
        let g = [p.get("factors", c)?];
        Ok(Case::new(LayerScale { residual })
            .x(&[n, c])
            .x(&g)
            .x_if(residual, &[n, c]))
    },
    cases: &[
        "n=1,c=1",
        "n=5,c=3,residual=1",
        "n=130,c=131,residual=1",
        "n=514,c=384",
        "n=514,c=384,residual=1",
    ],
    bench: &["n=2056,c=384,residual=1"],
    refused: &["c=8,factors=4"],
};
