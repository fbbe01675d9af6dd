//! Global average pooling: the mean over every axis between the first and the last.

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, multiversion, op_common};

/// `y[n, c] = mean of x[n, .., c]`. Operand: x `[N, .., C]`. Result: y `[N, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GlobalAvgPool;

multiversion! {
    fn mean_rows(x: &[f32], y: &mut [f32]) {
        let c = y.len();
        y.fill(0.0);
        for row in x.chunks_exact(c) {
            for (y, &v) in y.iter_mut().zip(row) {
                *y += v;
            }
        }
        let n = (x.len() / c) as f32;
        for y in y.iter_mut() {
            *y /= n;
        }
    }
}

impl Op for GlobalAvgPool {
    op_common!("global_avg_pool");

    fn reach(&self, _x: &[Spec]) -> super::Reach {
        super::Reach::All
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        ensure!(
            x[0].shape.len() >= 3 && !x[0].is_empty(),
            "takes [N, .., C] with something to average, got {:?}",
            x[0].shape
        );
        Ok(vec![Spec::f32([x[0].shape[0], x[0].channels()])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let shape = b.graph.shape(node.inputs[0]);
        let middle = shape[1..shape.len() - 1].to_vec();
        let dx = b.emit1(GlobalAvgPoolBwd { middle }, &[dy])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (rows, per) = (x[0].rows(), x[0].rows() / y[0].rows());
        for r in 0..rows {
            for (y, v) in y[0].row_mut(r / per).iter_mut().zip(x[0].row(r)) {
                *y += v / per as f64;
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (n, c) = (cx.y[0].rows(), cx.y[0].channels());
        let image = cx.x[0].len() / n;
        Ok(Box::new(move |a| {
            let (x, y) = (a.x(0), par::SharedMut::new(a.y(0)));
            par::for_each(n, |i| {
                // SAFETY: each image has its own row.
                let y = unsafe { y.slice(i * c, c) };
                mean_rows(&x[i * image..(i + 1) * image], y);
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (n, c, len) = (cx.y[0].rows(), cx.y[0].channels(), cx.x[0].len());
        average(cx, "average", n, c, len)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (n, c) = (cx.y[0].rows(), cx.y[0].channels());
        let pixels = cx.x[0].len() / n / c;
        let k = cuda::Columns::new(cx, pixels, c);
        let scale = Arg::F32(1.0 / pixels as f32);
        let args = vec![
            Arg::n(pixels),
            Arg::n(k.items),
            scale,
            Arg::In(0),
            Arg::Out(0),
        ];
        let grid = [n as u32, k.vector_grid()[0], 1];
        k.launch(cx, ("pool.cu", "average"), &k.consts(), grid, args)
    }
}

/// `dx[n, .., c] = dy[n, c] / pixels`. Operand: dy `[N, C]`. Result: dx `[N, middle.., C]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GlobalAvgPoolBwd {
    /// The axes that were averaged.
    pub middle: Vec<usize>,
}

impl Op for GlobalAvgPoolBwd {
    op_common!("global_avg_pool_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        ensure!(x[0].shape.len() == 2, "takes [N, C], got {:?}", x[0].shape);
        let mut shape = vec![x[0].shape[0]];
        shape.extend(&self.middle);
        shape.push(x[0].shape[1]);
        Ok(vec![Spec::f32(shape)])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let per = y[0].rows() / x[0].rows();
        for r in 0..y[0].rows() {
            for (d, v) in y[0].row_mut(r).iter_mut().zip(x[0].row(r / per)) {
                *d = v / per as f64;
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let c = cx.x[0].channels();
        let per = cx.y[0].rows() / cx.x[0].rows();
        let scale = 1.0 / per as f32;
        Ok(Box::new(move |a| {
            let dy = a.x(0);
            par::rows(a.y(0), c, |first, dx| {
                for (r, dx) in dx.chunks_mut(c).enumerate() {
                    for (d, &v) in dx.iter_mut().zip(&dy[(first + r) / per * c..]) {
                        *d = v * scale;
                    }
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (n, c, len) = (cx.x[0].rows(), cx.x[0].channels(), cx.y[0].len());
        average(cx, "average_bwd", n, c, len)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (n, c, len) = (cx.x[0].rows(), cx.x[0].channels(), cx.y[0].len());
        let (vec, pixels) = (cuda::vector(&[c]), len / n / c);
        let scale = Arg::F32(1.0 / pixels as f32);
        let args = [
            Arg::n(pixels),
            Arg::n(c / vec),
            scale,
            Arg::In(0),
            Arg::Out(0),
        ];
        let consts = vec![("VEC", vec.to_string())];
        cx.items(("pool.cu", "average_bwd"), consts, len / vec, 256, &args)
    }
}

/// Forward or backward between `[images, c]` and the `len` elements of all pixels.
fn average(
    cx: &mut WgpuCx,
    entry: &'static str,
    images: usize,
    c: usize,
    len: usize,
) -> Result<()> {
    let wide = len / images;
    let pixels = wide / c;
    let (from, to) = if entry == "average" {
        (wide, c)
    } else {
        (c, wide)
    };
    let scale = 1.0 / pixels as f32;
    let mut params = [0; 10];
    params[0] = pixels as u32;
    params[2] = c as u32;
    params[9] = scale.to_bits();
    for cut in cx.cuts(images, &[from, to])? {
        let args = [cut.of(Arg::In(0), from), cut.of(Arg::Out(0), to)];
        cx.items(("pool.wgsl", entry), &[], cut.rows * to, &args, &params)?;
    }
    Ok(())
}

impl Graph {
    /// The mean over the middle axes: `[N, .., C]` to `[N, C]`.
    ///
    /// # Errors
    /// `x` has fewer than three axes.
    pub fn global_avg_pool(&mut self, x: Tid) -> Result<Tid> {
        self.push1(GlobalAvgPool, &[x])
    }
}

/// The room of [`GlobalAvgPool`].
pub const ROOM: Room = Room {
    name: "global_avg_pool",
    about: "mean over the axes between the first and the last",
    case: |p| {
        Ok(Case::new(GlobalAvgPool).x(&[
            p.get("n", 2)?,
            p.get("h", 7)?,
            p.get("w", 7)?,
            p.get("c", 8)?,
        ]))
    },
    cases: &[
        "n=1,h=1,w=1,c=1",
        "n=3,h=5,w=1,c=3",
        "n=1,h=7,w=9,c=17",
        "n=4,h=7,w=7,c=512",
        "n=8,h=8,w=8,c=64",
    ],
    bench: &["n=16,h=7,w=7,c=2048"],
    refused: &["h=0"],
};
