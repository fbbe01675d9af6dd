//! Between patches and tokens (Dosovitskiy et al. 2021): the class token (and DeiT's distillation token) is put before the patches and the position
//! table is added; later one token is picked for the head. [`interpolate`] fits a position table to another grid.

pub mod cls_mean;
pub mod interpolate;

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, op_common};
pub use interpolate::{Interpolation, interpolate_pos};

/// `y[n, t] = token[n, t] + pos[t]`, where the first `prefix` tokens are learned ones (class, distillation) and the others
/// are the patches.
///
/// Operands: patches `[N, P, C]`, where there is a prefix its tokens (`prefix` * C elements), pos (T * C elements,
/// `T = P + prefix`).
/// Result: `[N, T, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TokenEmbed {
    /// Learned tokens in front.
    pub prefix: usize,
}

impl Op for TokenEmbed {
    op_common!("token_embed");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let first = self.prefix;
        let pos = 1 + usize::from(first > 0);
        ensure!(
            x.len() == 1 + pos,
            "takes patches and positions, and the tokens in front between where it has some"
        );
        ensure!(
            x[0].shape.len() == 3,
            "wants patches [N, P, C], not {:?}",
            x[0].shape
        );
        let [n, p, c] = [x[0].shape[0], x[0].shape[1], x[0].shape[2]];
        ensure!(
            first == 0 || x[1].len() == first * c,
            "has {first} tokens in front of shape {:?} for {c} channels",
            x[1].shape
        );
        ensure!(
            x[pos].len() == (p + first) * c,
            "has a position table of shape {:?} for {} tokens of {c} channels",
            x[pos].shape,
            p + first
        );
        Ok(vec![Spec::f32([n, p + first, c])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let grads = b.emit(
            TokenEmbedBwd {
                prefix: self.prefix,
            },
            &[dy],
        )?;
        // Operands and results stand in the same order; parameters keep PyTorch's [1, T, C] and [1, 1, C].
        for (&x, &d) in node.inputs.iter().zip(&grads) {
            let shape = b.graph.shape(x).to_vec();
            let d = b.graph.view(d, &shape)?;
            b.give(x, d)?;
        }
        Ok(())
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let first = self.prefix;
        let [n, p, c] = [x[0].shape[0], x[0].shape[1], x[0].shape[2]];
        let t = p + first;
        for i in 0..n {
            for j in 0..t {
                for k in 0..c {
                    let token = if j < first {
                        x[1].data[j * c + k]
                    } else {
                        x[0].data[(i * p + j - first) * c + k]
                    };
                    y[0].data[(i * t + j) * c + k] = token + x[x.len() - 1].data[j * c + k];
                }
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (cls, c) = (self.prefix > 0, cx.x[0].shape[2]);
        let [from, to] = [cx.x[0].shape[1] * c, cx.y[0].shape[1] * c];
        Ok(Box::new(move |a| {
            let (patches, pos) = (a.x(0), a.x(1 + usize::from(cls)));
            let token = a.x_if(cls, 1).unwrap_or_default();
            par::rows(a.y(0), to, |first, y| {
                let patches = patches[first * from..].chunks_exact(from);
                for (y, patches) in y.chunks_exact_mut(to).zip(patches) {
                    let (y0, y1) = y.split_at_mut(token.len());
                    let (p0, p1) = pos.split_at(token.len());
                    add(token, p0, y0);
                    add(patches, p1, y1);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let first = self.prefix;
        let [n, p, c] = [cx.x[0].shape[0], cx.x[0].shape[1], cx.x[0].shape[2]];
        let t = p + first;
        let params = [p, t, c, first, 0].map(|v| v as u32);
        for cut in cx.cuts(n, &[p * c, t * c])? {
            let (x, y) = (cut.of(Arg::In(0), p * c), cut.of(Arg::Out(0), t * c));
            let args = [x, y, Arg::In(1 + usize::from(first > 0)), Arg::In(1)];
            let n = cut.rows * t * c;
            cx.items(("tokens.wgsl", "embed"), &[], n, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let first = self.prefix;
        let [n, p, c] = [cx.x[0].shape[0], cx.x[0].shape[1], cx.x[0].shape[2]];
        let pos = 1 + usize::from(first > 0);
        let operands = [Arg::In(0), Arg::in_if(first > 0, 1), Arg::In(pos)];
        move_tokens(cx, "embed", n, [p, p + first, c], &operands)
    }
}

fn add(a: &[f32], b: &[f32], y: &mut [f32]) {
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y = a + b;
    }
}

/// The gradients of [`TokenEmbed`]. Operand: dy `[N, T, C]`. Results: dpatches `[N, P, C]`, where there is a
/// prefix dprefix `[prefix * C]`, dpos `[T, C]`; the last two are sums over N, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TokenEmbedBwd {
    /// Learned tokens in front.
    pub prefix: usize,
}

impl Op for TokenEmbedBwd {
    op_common!("token_embed_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 1 && x[0].shape.len() == 3,
            "takes one operand [N, T, C]"
        );
        let [n, t, c] = [x[0].shape[0], x[0].shape[1], x[0].shape[2]];
        let first = self.prefix;
        ensure!(t > first, "has no patch behind its {first} tokens in front");
        let mut out = vec![Spec::f32([n, t - first, c])];
        if first > 0 {
            out.push(Spec::f32([first * c]));
        }
        out.push(Spec::f32([t, c]));
        Ok(out)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let first = self.prefix;
        let [n, t, c] = [x[0].shape[0], x[0].shape[1], x[0].shape[2]];
        let last = y.len() - 1;
        for i in 0..n {
            for j in 0..t {
                for k in 0..c {
                    let dy = x[0].data[(i * t + j) * c + k];
                    y[last].data[j * c + k] += dy;
                    if j < first {
                        y[1].data[j * c + k] += dy;
                    } else {
                        y[0].data[(i * (t - first) + j - first) * c + k] = dy;
                    }
                }
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (first, n, c) = (self.prefix, cx.x[0].shape[0], cx.x[0].shape[2]);
        let [from, to] = [cx.x[0].shape[1] * c, cx.y[0].shape[1] * c];
        cx.workspace(par::column_sums_scratch(n, from));
        Ok(Box::new(move |a| {
            let dy = a.x(0);
            let patches = par::SharedMut::new(a.y(0));
            let pos = a.y(1 + usize::from(first > 0));
            par::column_sums(n, from, a.work(), pos, |i, sums| {
                let row = &dy[i * from..(i + 1) * from];
                // SAFETY: one call per image.
                unsafe { patches.slice(i * to, to) }.copy_from_slice(&row[from - to..]);
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
            });
            if first > 0 {
                a.y(1).copy_from_slice(&pos[..first * c]);
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let first = self.prefix;
        let [n, t, c] = [cx.x[0].shape[0], cx.x[0].shape[1], cx.x[0].shape[2]];
        let p = t - first;
        let params = [p, t, c, first, 0].map(|v| v as u32);
        for cut in cx.cuts(n, &[p * c, t * c])? {
            let args = [cut.of(Arg::In(0), t * c), cut.of(Arg::Out(0), p * c)];
            let n = cut.rows * p * c;
            cx.items(("tokens.wgsl", "patches"), &[], n, &args, &params)?;
        }
        if first > 0 {
            cx.sum_parts(Arg::In(0), Arg::Out(1), n, t * c, first * c)?;
        }
        let pos = Arg::Out(1 + usize::from(first > 0));
        cx.sum_parts(Arg::In(0), pos, n, t * c, t * c)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let first = self.prefix;
        let [n, t, c] = [cx.x[0].shape[0], cx.x[0].shape[1], cx.x[0].shape[2]];
        move_tokens(cx, "patches", n, [t - first, t, c], &[Arg::In(0)])?;
        if first > 0 {
            cx.sum_parts(Arg::In(0), Arg::Out(1), n, t * c, first * c)?;
        }
        let pos = Arg::Out(1 + usize::from(first > 0));
        cx.sum_parts(Arg::In(0), pos, n, t * c, t * c)
    }
}

/// `y[n] = x[n, index]`: x `[N, T, C]` to `[N, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SelectToken {
    /// Which token.
    pub index: usize,
}

impl Op for SelectToken {
    op_common!("select_token");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 1 && x[0].shape.len() == 3,
            "takes one operand [N, T, C]"
        );
        let [n, t, c] = [x[0].shape[0], x[0].shape[1], x[0].shape[2]];
        ensure!(self.index < t, "asks for token {} of {t}", self.index);
        Ok(vec![Spec::f32([n, c])])
    }

    fn cost(&self, _x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: 0,
            bytes: 2 * traffic(&[], y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let op = SelectTokenBwd {
            index: self.index,
            tokens: b.graph.shape(node.inputs[0])[1],
        };
        let dx = b.emit1(op, &[dy])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let t = x[0].shape[1];
        for n in 0..y[0].rows() {
            y[0].row_mut(n)
                .copy_from_slice(x[0].row(n * t + self.index));
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (t, c, index) = (cx.x[0].shape[1], cx.x[0].shape[2], self.index);
        Ok(Box::new(move |a| {
            let x = a.x(0);
            par::rows(a.y(0), c, |first, y| {
                for (n, y) in y.chunks_exact_mut(c).enumerate() {
                    y.copy_from_slice(&x[((first + n) * t + index) * c..][..c]);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let [n, t, c] = [cx.x[0].shape[0], cx.x[0].shape[1], cx.x[0].shape[2]];
        pick(cx, "pick", n, [t * c, c], [t, c, self.index])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let [t, c] = [cx.x[0].shape[1], cx.x[0].shape[2]];
        pick_cuda(cx, "pick", [t, c, self.index])
    }
}

/// The gradient of [`SelectToken`]: dy `[N, C]` to dx `[N, tokens, C]`, zero but for one token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SelectTokenBwd {
    /// Which token.
    pub index: usize,
    /// Of how many.
    pub tokens: usize,
}

impl Op for SelectTokenBwd {
    op_common!("select_token_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 1 && x[0].shape.len() == 2,
            "takes one operand [N, C]"
        );
        Ok(vec![Spec::f32([x[0].shape[0], self.tokens, x[0].shape[1]])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: 0,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for n in 0..x[0].rows() {
            y[0].row_mut(n * self.tokens + self.index)
                .copy_from_slice(x[0].row(n));
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (c, index) = (cx.x[0].channels(), self.index);
        let width = self.tokens * c;
        Ok(Box::new(move |a| {
            let dy = a.x(0);
            par::rows(a.y(0), width, |first, dx| {
                dx.fill(0.0);
                for (n, dx) in dx.chunks_exact_mut(width).enumerate() {
                    dx[index * c..][..c].copy_from_slice(&dy[(first + n) * c..][..c]);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (n, c) = (cx.x[0].rows(), cx.x[0].channels());
        let sizes = [self.tokens, c, self.index];
        pick(cx, "pick_bwd", n, [c, self.tokens * c], sizes)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let c = cx.x[0].channels();
        pick_cuda(cx, "pick_bwd", [self.tokens, c, self.index])
    }
}

/// Forward or backward of [`SelectToken`]; `from` and `to` are the elements per image of operand and result.
fn pick(
    cx: &mut WgpuCx,
    entry: &'static str,
    images: usize,
    [from, to]: [usize; 2],
    [t, c, index]: [usize; 3],
) -> Result<()> {
    let params = [0, t, c, 0, index].map(|v| v as u32);
    for cut in cx.cuts(images, &[from, to])? {
        let args = [cut.of(Arg::In(0), from), cut.of(Arg::Out(0), to)];
        cx.items(("tokens.wgsl", entry), &[], cut.rows * to, &args, &params)?;
    }
    Ok(())
}

/// A launch of kernels/tokens.cu over result 0, for `n` images of `p` patches and `t` tokens of `c` channels.
fn move_tokens(
    cx: &mut CudaCx,
    entry: &'static str,
    n: usize,
    [p, t, c]: [usize; 3],
    operands: &[cuda::Arg],
) -> Result<()> {
    use cuda::Arg;
    let vec = cuda::vector(&[c]);
    let rows = if entry == "embed" { t } else { p };
    let mut args = [p, t, c / vec].map(Arg::n).to_vec();
    args.extend_from_slice(operands);
    args.push(Arg::Out(0));
    let consts = vec![("VEC", vec.to_string())];
    cx.items(("tokens.cu", entry), consts, n * rows * c / vec, 256, &args)
}

/// Forward or backward of [`SelectToken`].
fn pick_cuda(cx: &mut CudaCx, entry: &'static str, [t, c, index]: [usize; 3]) -> Result<()> {
    use cuda::Arg;
    let vec = cuda::vector(&[c]);
    let [t, items, index] = [t, c / vec, index].map(Arg::n);
    let args = [t, items, index, Arg::In(0), Arg::Out(0)];
    let consts = vec![("VEC", vec.to_string())];
    let n = cx.y[0].len() / vec;
    cx.items(("tokens.cu", entry), consts, n, 256, &args)
}

impl Graph {
    /// The learned tokens (where there are some) before the patches `[N, P, C]`, and the position table added: `[N, T, C]`.
    ///
    /// `prefix` has C elements a token and `pos` T * C, whatever their shapes.
    ///
    /// # Errors
    /// A number of elements does not fit.
    pub fn token_embed(&mut self, patches: Tid, prefix: Option<Tid>, pos: Tid) -> Result<Tid> {
        let c = self.spec(patches).channels().max(1);
        let op = TokenEmbed {
            prefix: prefix.map_or(0, |t| self.spec(t).len() / c),
        };
        let mut operands = vec![patches];
        operands.extend(prefix);
        operands.push(pos);
        self.push1(op, &operands)
    }

    /// Token `index` of each image: `[N, T, C]` to `[N, C]`.
    ///
    /// # Errors
    /// There is no such token.
    pub fn select_token(&mut self, x: Tid, index: usize) -> Result<Tid> {
        self.push1(SelectToken { index }, &[x])
    }
}

/// The room of [`TokenEmbed`].
pub const EMBED: Room = Room {
    name: "token_embed",
    about: "learned tokens before the patches, position table added",
    case: |p| {
        let (n, patches, c) = (p.get("n", 2)?, p.get("p", 4)?, p.get("c", 8)?);
        let prefix: usize = p.get("cls", 0)?;
        let table = p.get("table", patches + prefix)?;
        Ok(Case::new(TokenEmbed { prefix })
            .x(&[n, patches, c])
            .x_if(prefix > 0, &[prefix, 1, c])
            .x(&[1, table, c]))
    },
    cases: &[
        "n=1,p=1,c=1",
        "n=1,p=1,c=1,cls=1",
        "n=3,p=5,c=7,cls=1",
        "n=3,p=5,c=8,cls=2",
        "n=2,p=16,c=20",
        "n=128,p=64,c=16,cls=1",
        "n=3,p=196,c=192,cls=1",
    ],
    bench: &["n=128,p=64,c=128,cls=1"],
    refused: &["p=4,table=4,cls=1", "p=4,table=5"],
};

/// The room of [`SelectToken`].
pub const SELECT: Room = Room {
    name: "select_token",
    about: "one token of each image",
    case: |p| {
        let shape = [p.get("n", 2)?, p.get("t", 5)?, p.get("c", 8)?];
        Ok(Case::new(SelectToken {
            index: p.get("i", 0)?,
        })
        .x(&shape))
    },
    cases: &[
        "n=1,t=1,c=1",
        "n=3,t=5,c=7,i=4",
        "n=128,t=65,c=16",
        "n=5,t=197,c=192,i=1",
    ],
    bench: &["n=128,t=65,c=128"],
    refused: &["t=5,i=5"],
};
