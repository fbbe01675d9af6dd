//! Softmax cross-entropy with its gradient in the same pass: labels or soft targets, class weights, label smoothing
//! (Szegedy et al. 2016) as `torch.nn.functional.cross_entropy` defines them together, and the focal factor of Lin et
//! al. 2017.

use super::act::exp_f32;
use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::par::SharedMut;
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx, CudaLaunch};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{DType, Graph, Spec, Tid};
use crate::{Result, ensure, multiversion, op_common};

/// The label of a row that does not count.
pub const IGNORED: u32 = u32::MAX;

/// `loss = sum_n sum_c q[n, c] (1 - p[n, c])^focal (-log p[n, c]) / denominator`, with `p` the softmax of a row and
/// `q[n, c] = w[c] ((1 - smoothing) t[n, c] + smoothing / C)`, `t` one-hot for labels.
///
/// The denominator is, as in PyTorch, the sum of `w[label]` over the counted rows for labels and N for soft targets. A
/// row labelled [`IGNORED`] counts nowhere; another label of C or more makes the loss NaN; so does a batch without a
/// counted row, whose gradient is zero.
///
/// Operands: logits `[N, C]`; labels uint32 `[N]` or soft targets float32 `[N, C]`; class weights `[C]` where
/// `weighted`. Results: loss `[1]` and its gradient dlogits `[N, C]`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SoftmaxCe {
    /// Share of the target that is spread over all classes.
    pub smoothing: f32,
    /// Exponent of the focal factor; 0 for none.
    pub focal: f32,
    /// There are class weights.
    pub weighted: bool,
}

/// A row's target.
#[derive(Clone, Copy)]
enum Target<'a> {
    Label(usize),
    Soft(&'a [f32]),
}

multiversion! {
    /// Turns `e` (holding logits) into `exp(logit - max)`; returns the maximum and the sum of the exponentials.
    fn exponentials(e: &mut [f32]) -> (f32, f32) {
        const LANES: usize = 16;
        let mut most = [f32::NEG_INFINITY; LANES];
        for block in e.chunks(LANES) {
            for (m, &v) in most.iter_mut().zip(block) {
                *m = if v <= *m { *m } else { v };
            }
        }
        let top = most.iter().fold(f32::NEG_INFINITY, |m, &v| if v <= m { m } else { v });
        for v in e.iter_mut() {
            *v = exp_f32(*v - top);
        }
        let mut sums = [0f32; LANES];
        for block in e.chunks(LANES) {
            for (s, &v) in sums.iter_mut().zip(block) {
                *s += v;
            }
        }
        (top, sums.iter().sum())
    }
}

multiversion! {
    fn scale(x: &mut [f32], by: f32) {
        for v in x.iter_mut() {
            *v *= by;
        }
    }
}

/// How much of each class a row's target has.
#[derive(Clone, Copy)]
struct Shares<'a> {
    /// Soft targets, or empty for a label.
    soft: &'a [f32],
    /// Class weights, or empty.
    weights: &'a [f32],
    /// Factor on the soft targets: 1 - smoothing.
    keep: f32,
    /// What every class has: smoothing / C.
    spread: f32,
}

impl Shares<'_> {
    /// `q[c]`, but for the label's own share.
    #[inline(always)]
    fn of<const SOFT: bool, const WEIGHTED: bool>(&self, c: usize) -> f32 {
        let t = if SOFT { self.keep * self.soft[c] } else { 0.0 };
        let w = if WEIGHTED { self.weights[c] } else { 1.0 };
        w * (t + self.spread)
    }
}

multiversion! {
    /// `sum q (lse - z)` and `sum q` of one row.
    fn shared_loss<const SOFT: bool, const WEIGHTED: bool>(s: Shares, z: &[f32], lse: f32) -> (f64, f64) {
        const LANES: usize = 16;
        let (mut loss, mut total) = ([0f32; LANES], [0f32; LANES]);
        for (i, block) in z.chunks(LANES).enumerate() {
            for (l, &z) in block.iter().enumerate() {
                let q = s.of::<SOFT, WEIGHTED>(i * LANES + l);
                // A class that cannot be, with a logit of minus infinity, costs nothing where nothing is asked of it.
                loss[l] += if q == 0.0 { 0.0 } else { q * (lse - z) };
                total[l] += q;
            }
        }
        let sum = |v: [f32; LANES]| v.iter().map(|&v| f64::from(v)).sum();
        (sum(loss), sum(total))
    }
}

multiversion! {
    /// `d = factor e - inverse q`, with the exponentials `e` in `d`.
    fn shared_gradient<const SOFT: bool, const WEIGHTED: bool>(s: Shares, factor: f32, inverse: f32, d: &mut [f32]) {
        for (c, d) in d.iter_mut().enumerate() {
            *d = *d * factor - s.of::<SOFT, WEIGHTED>(c) * inverse;
        }
    }
}

impl SoftmaxCe {
    /// A row without the focal factor; `d` holds the exponentials.
    fn plain_row<const SOFT: bool, const WEIGHTED: bool>(
        z: &[f32],
        s: Shares,
        label: Option<usize>,
        (lse, sum, inverse): (f64, f32, f32),
        d: &mut [f32],
    ) -> f64 {
        let (mut loss, mut total) = shared_loss::<SOFT, WEIGHTED>(s, z, lse as f32);
        let own = label.map_or(0.0, |l| s.keep * if WEIGHTED { s.weights[l] } else { 1.0 });
        if let Some(l) = label.filter(|_| own != 0.0) {
            loss += f64::from(own) * (lse - f64::from(z[l]));
            total += f64::from(own);
        }
        let factor = (total / f64::from(sum)) as f32 * inverse;
        shared_gradient::<SOFT, WEIGHTED>(s, factor, inverse, d);
        if let Some(l) = label {
            d[l] -= own * inverse;
        }
        loss
    }

    /// `-sum q f(p)` of one row, and its gradient times `inverse` in `d`.
    fn row(
        &self,
        z: &[f32],
        t: Target,
        weights: Option<&[f32]>,
        inverse: f32,
        d: &mut [f32],
    ) -> f64 {
        let classes = z.len();
        d.copy_from_slice(z);
        let (top, sum) = exponentials(d);
        let lse = f64::from(top) + f64::from(sum).ln();
        let weight = |c: usize| weights.map_or(1.0, |w| w[c]);
        let spread = self.smoothing / classes as f32;
        if let (Target::Label(label), true) = (t, self.smoothing == 0.0 && self.focal == 0.0) {
            let w = weight(label);
            scale(d, w * inverse / sum);
            d[label] -= w * inverse;
            return f64::from(w) * (lse - f64::from(z[label]));
        }
        if self.focal == 0.0 {
            let (soft, label) = match t {
                Target::Label(l) => (&[][..], Some(l)),
                Target::Soft(t) => (t, None),
            };
            let s = Shares {
                soft,
                weights: weights.unwrap_or(&[]),
                keep: 1.0 - self.smoothing,
                spread,
            };
            let k = (lse, sum, inverse);
            return match (label, weights) {
                (Some(_), None) => Self::plain_row::<false, false>(z, s, label, k, d),
                (Some(_), Some(_)) => Self::plain_row::<false, true>(z, s, label, k, d),
                (None, None) => Self::plain_row::<true, false>(z, s, label, k, d),
                (None, Some(_)) => Self::plain_row::<true, true>(z, s, label, k, d),
            };
        }
        // a[c] = q p f'(p): dloss/dz[j] = p[j] sum(a) - a[j].
        let (mut loss, mut total) = (0f64, 0f64);
        let q = |c: usize| {
            let t = match t {
                Target::Label(label) => f32::from(u8::from(c == label)),
                Target::Soft(t) => t[c],
            };
            f64::from(weight(c) * ((1.0 - self.smoothing) * t + spread))
        };
        let terms = |c: usize| {
            let q = q(c);
            if q == 0.0 {
                return (0.0, 0.0);
            }
            let (l, a) = focal_terms(f64::from(z[c]) - lse, f64::from(self.focal));
            (q * l, q * a)
        };
        for c in 0..classes {
            let (l, a) = terms(c);
            loss += l;
            total += a;
        }
        scale(d, (total / f64::from(sum)) as f32 * inverse);
        for (c, d) in d.iter_mut().enumerate() {
            *d -= terms(c).1 as f32 * inverse;
        }
        loss
    }
}

/// `-f(p)` and `p f'(p)` for `f(p) = (1 - p)^focal log p`, from `log p`.
fn focal_terms(log_p: f64, focal: f64) -> (f64, f64) {
    if focal == 0.0 {
        return (-log_p, 1.0);
    }
    let rest = -log_p.exp_m1();
    if rest == 0.0 {
        return (0.0, 0.0);
    }
    let factor = rest.powf(focal);
    (
        -factor * log_p,
        factor - focal * log_p.exp() * factor / rest * log_p,
    )
}

impl Op for SoftmaxCe {
    op_common!("softmax_ce");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let n = 2 + usize::from(self.weighted);
        ensure!(x.len() == n, "takes {n} operands");
        let &[rows, classes] = &x[0].shape[..] else {
            return Err(format!("takes logits [N, C], got {:?}", x[0].shape));
        };
        ensure!(rows * classes > 0, "has no logits: {:?}", x[0].shape);
        let want = match x[1].dtype {
            DType::U32 => vec![rows],
            DType::F32 => vec![rows, classes],
        };
        ensure!(
            x[1].shape == want,
            "has logits {:?} and targets {:?}",
            x[0].shape,
            x[1].shape
        );
        ensure!(
            !self.weighted || x[2].shape == [classes],
            "has {classes} classes and class weights of shape {:?}",
            x.last().map(|w| &w.shape)
        );
        ensure!(
            (0.0..=1.0).contains(&self.smoothing),
            "has label smoothing {}; it must be from 0 to 1",
            self.smoothing
        );
        ensure!(
            (0.0..=f32::MAX).contains(&self.focal),
            "has focal exponent {}; it must be at least 0",
            self.focal
        );
        Ok(vec![Spec::f32([1]), x[0].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: 8 * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let d = if b.is_unit(node.outputs[0]) {
            node.outputs[1]
        } else {
            let dloss = b.need(node.outputs[0])?;
            b.emit1(ScaleBy, &[node.outputs[1], dloss])?
        };
        b.give(node.inputs[0], d)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (rows, classes) = (x[0].rows(), x[0].channels());
        let labels = x[1].shape.len() == 1;
        let w = |c: usize| if self.weighted { x[2].data[c] } else { 1.0 };
        let ignored = |n: usize| labels && x[1].data[n] == f64::from(IGNORED);
        let denominator: f64 = (0..rows)
            .filter(|&n| !ignored(n))
            .map(|n| match labels {
                true if x[1].data[n] as usize >= classes => f64::NAN,
                true => w(x[1].data[n] as usize),
                false => 1.0,
            })
            .sum();
        let mut loss = 0.0;
        for n in (0..rows).filter(|&n| !ignored(n)) {
            let z = x[0].row(n);
            let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + z.iter().map(|v| (v - top).exp()).sum::<f64>().ln();
            let s = f64::from(self.smoothing);
            let q: Vec<f64> = (0..classes)
                .map(|c| {
                    let t = match labels {
                        true => f64::from(u8::from(x[1].data[n] as usize == c)),
                        false => x[1].row(n)[c],
                    };
                    w(c) * ((1.0 - s) * t + s / classes as f64)
                })
                .collect();
            let mut total = 0.0;
            for c in (0..classes).filter(|&c| q[c] != 0.0) {
                let (l, a) = focal_terms(z[c] - lse, f64::from(self.focal));
                loss += q[c] * l;
                total += q[c] * a;
            }
            for c in 0..classes {
                let a = focal_terms(z[c] - lse, f64::from(self.focal)).1;
                y[1].row_mut(n)[c] = ((z[c] - lse).exp() * total - q[c] * a) / denominator;
            }
        }
        y[0].data[0] = loss / denominator;
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let (rows, classes) = (cx.x[0].rows(), cx.x[0].channels());
        let labels = cx.x[1].dtype == DType::U32;
        cx.workspace(2 * rows);
        Ok(Box::new(move |a| {
            let weights = a.x_if(op.weighted, 2);
            let denominator = if labels {
                let of = |&l: &u32| match (l, weights) {
                    (IGNORED, _) => 0.0,
                    (l, _) if l as usize >= classes => f64::NAN,
                    (l, Some(w)) => f64::from(w[l as usize]),
                    (_, None) => 1.0,
                };
                a.xu(1).iter().map(of).sum()
            } else {
                rows as f64
            };
            let inverse = (1.0 / denominator) as f32;
            // Losses of the rows in float64, summed in order.
            let losses = SharedMut::new(a.work());
            par::rows(a.y(1), classes, |first, d| {
                for (n, d) in d.chunks_mut(classes).enumerate() {
                    let n = first + n;
                    let z = &a.x(0)[n * classes..][..classes];
                    let target = match labels {
                        true => Target::Label(a.xu(1)[n] as usize),
                        false => Target::Soft(&a.x(1)[n * classes..][..classes]),
                    };
                    let loss = match target {
                        Target::Label(l) if l == IGNORED as usize => {
                            d.fill(0.0);
                            0.0
                        }
                        Target::Label(l) if l >= classes => {
                            d.fill(f32::NAN);
                            f64::NAN
                        }
                        t => op.row(z, t, weights, inverse, d),
                    };
                    // SAFETY: each row has its own place.
                    let place = unsafe { losses.slice(2 * n, 2) };
                    let bits = loss.to_bits();
                    place[0] = f32::from_bits(bits as u32);
                    place[1] = f32::from_bits((bits >> 32) as u32);
                }
            });
            let sum: f64 = a
                .work()
                .chunks_exact(2)
                .take(rows)
                .map(|v| {
                    let high = u64::from(v[1].to_bits()) << 32;
                    f64::from_bits(high | u64::from(v[0].to_bits()))
                })
                .sum();
            a.y(0)[0] = (sum / denominator) as f32;
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (rows, classes) = (cx.x[0].rows(), cx.x[0].channels());
        let soft = cx.x[1].dtype == DType::F32;
        let losses = Arg::Work(cx.workspace(rows));
        let denominator = Arg::Work(cx.workspace(1));
        let weights = Arg::In(if self.weighted { 2 } else { 0 });
        let flags = u32::from(soft) + 2 * u32::from(self.weighted);
        let one = |cx: &mut WgpuCx, entry, z, targets, dz, rows: usize, first, per_group| {
            let groups = fold(rows.div_ceil(per_group), 1);
            cx.launch(Launch {
                shader: "loss.wgsl",
                entry,
                consts: vec![],
                args: vec![z, targets, weights, Arg::Out(0), dz, losses, denominator],
                params: vec![
                    rows as u32,
                    groups[0],
                    classes as u32,
                    flags,
                    self.smoothing.to_bits(),
                    self.focal.to_bits(),
                    f32::NAN.to_bits(),
                    first,
                ],
                groups,
            })
        };
        let (z, targets, dz) = (Arg::In(0), Arg::In(1), Arg::Out(1));
        let (count, row) = if soft {
            ("count_rows", "rows_soft")
        } else {
            ("count_labels", "rows_labels")
        };
        one(cx, count, z, targets, dz, rows, 0, rows)?;
        let width = if soft { classes } else { 1 };
        for cut in cx.cuts(rows, &[classes, width])? {
            let (z, dz) = (cut.of(z, classes), cut.of(dz, classes));
            let (targets, first) = (cut.of(targets, width), cut.first as u32);
            one(cx, row, z, targets, dz, cut.rows, first, 8)?;
        }
        one(cx, "total", z, targets, dz, rows, 0, rows)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (rows, classes) = (cx.x[0].rows(), cx.x[0].channels());
        let soft = cx.x[1].dtype == DType::F32;
        let k = cuda::Rows::new(classes, 32);
        let mut consts = k.consts();
        let flags = [
            ("SOFT", soft),
            ("WEIGHTED", self.weighted),
            ("FOCAL", self.focal != 0.0),
        ];
        let set = flags.iter().filter(|f| f.1);
        consts.extend(set.map(|f| (f.0, "1".to_string())));
        let losses = Arg::Work(cx.workspace(rows));
        let denominator = match soft {
            true => Arg::Null,
            false => Arg::Work(cx.workspace(1)),
        };
        let (targets, weights) = (Arg::In(1), Arg::in_if(self.weighted, 2));
        let n = Arg::n(rows);
        let mut launch = |entry, args, blocks: usize| {
            cx.launch(CudaLaunch {
                source: "loss.cu",
                entry,
                consts: consts.clone(),
                args,
                grid: [blocks as u32, 1, 1],
                block: [256, 1, 1],
                smem: 0,
            })
        };
        if !soft {
            let args = vec![n, Arg::n(classes), targets, weights, denominator];
            launch("count_labels", args, 1)?;
        }
        let args = vec![
            n,
            Arg::n(k.items),
            Arg::In(0),
            targets,
            weights,
            denominator,
            Arg::F32(1.0 - self.smoothing),
            Arg::F32(self.smoothing / classes as f32),
            Arg::F32(self.focal),
            losses,
            Arg::Out(1),
        ];
        launch("softmax_ce", args, rows.div_ceil(k.per_block()))?;
        launch("total", vec![n, losses, denominator, Arg::Out(0)], 1)
    }
}

/// `y = x * s[0]`. Operands: x of any shape, s `[1]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScaleBy;

impl Op for ScaleBy {
    op_common!("scale_by");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        ensure!(x[1].len() == 1, "scales by one value, got {:?}", x[1].shape);
        Ok(vec![x[0].clone()])
    }

    /// Of x; the factor is taken for a constant.
    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let dx = b.emit1(ScaleBy, &[dy, node.inputs[1]])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (y, v) in y[0].data.iter_mut().zip(&x[0].data) {
            *y = v * x[1].data[0];
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        Ok(Box::new(|a| {
            let s = a.x(1)[0];
            par::map(a.x(0), a.y(0), |v| v * s);
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        for cut in cx.cuts(cx.x[0].len(), &[1])? {
            let (x, y) = (cut.of(Arg::In(0), 1), cut.of(Arg::Out(0), 1));
            let args = [x, x, Arg::In(1), x, y, x, x];
            cx.items(("loss.wgsl", "scale_by"), &[], cut.rows, &args, &[])?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let args = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        cx.map(("loss.cu", "scale_by"), vec![], cx.y[0].len(), &args)
    }
}

impl Graph {
    /// The mean softmax cross-entropy `[1]` of logits `[N, C]` against labels (uint32 `[N]`) or soft targets (`[N, C]`).
    ///
    /// # Errors
    /// The shapes do not fit, or `smoothing` or `focal` is out of range.
    pub fn softmax_ce(
        &mut self,
        logits: Tid,
        target: Tid,
        weights: Option<Tid>,
        smoothing: f32,
        focal: f32,
    ) -> Result<Tid> {
        let op = SoftmaxCe {
            smoothing,
            focal,
            weighted: weights.is_some(),
        };
        let mut operands = vec![logits, target];
        operands.extend(weights);
        self.push1(op, &operands)
    }
}

/// The room of [`SoftmaxCe`].
pub const ROOM: Room = Room {
    name: "softmax_ce",
    about: "softmax cross-entropy and its gradient: labels or soft targets, class weights, smoothing, focal",
    case: |p| {
        let (n, c) = (p.get("n", 4)?, p.get("c", 10)?);
        let weighted = p.flag("weighted")?;
        let case = Case::new(SoftmaxCe {
            smoothing: p.get("smoothing", 0.0)?,
            focal: p.get("focal", 0.0)?,
            weighted,
        });
        let logits = Spec::f32([n, c]);
        let case = case.operand(logits.clone(), Fill::Normal(p.get("scale", 2.0)?), true);
        let case = match (p.flag("soft")?, p.flag("ignored")?) {
            (true, _) => case.fixed(logits, Fill::Uniform(0.0, 2.0 / c as f32)),
            (false, false) => case.fixed(Spec::u32([n]), Fill::Labels(c as u32)),
            (false, true) => {
                let label = |i| if i % 3 == 1 { IGNORED } else { (i % c) as u32 };
                case.fixed(Spec::u32([n]), Fill::U32((0..n).map(label).collect()))
            }
        };
        Ok(if weighted {
            case.fixed(Spec::f32([c]), Fill::Uniform(0.5, 2.0))
        } else {
            case
        })
    },
    cases: &[
        "n=1,c=2",
        "n=3,c=5,smoothing=0.1",
        "n=7,c=17,weighted=1,smoothing=0.2,ignored=1",
        "n=5,c=3,soft=1,weighted=1,smoothing=0.1",
        "n=5,c=10,focal=2,weighted=1",
        "n=4,c=7,focal=0.5,soft=1",
        "n=6,c=9,scale=20",
        "n=128,c=10",
        "n=128,c=100,smoothing=0.1",
        "n=33,c=1000,soft=1",
        "n=9,c=37,soft=1,weighted=1",
    ],
    bench: &["n=128,c=10", "n=128,c=1000,smoothing=0.1"],
    refused: &["n=0", "smoothing=1.5", "focal=-1"],
};

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 12] = [
        1.0, 2.0, 0.5, -1.0, 0.0, -0.5, 3.0, 0.25, 2.5, -1.5, 0.75, 1.25,
    ];
    const WEIGHTS: [f32; 4] = [0.5, 2.0, 1.0, 1.5];
    const SOFT: [f32; 12] = [
        0.7, 0.3, 0.0, 0.0, 0.0, 0.1, 0.9, 0.0, 0.25, 0.25, 0.25, 0.25,
    ];

    /// Loss and gradient by the reference, which the kernels are held to.
    fn reference(target: &Host, smoothing: f32, weighted: bool) -> (f64, Vec<f64>) {
        let op = SoftmaxCe {
            smoothing,
            focal: 0.0,
            weighted,
        };
        let (z, w) = (
            Host::from_f32(&[3, 4], &LOGITS),
            Host::from_f32(&[4], &WEIGHTS),
        );
        let mut y = [Host::zeros(&[1]), Host::zeros(&[3, 4])];
        op.reference(&[&z, target, &w], &mut y);
        let [loss, d] = y;
        (loss.data[0], d.data)
    }

    #[test]
    fn numbers_of_pytorch() {
        // torch.nn.functional.cross_entropy 2.15 in float64: loss and the gradient of the first logit.
        let labels = |l: [u32; 3]| Host {
            shape: vec![3],
            data: l.iter().map(|&v| f64::from(v)).collect(),
        };
        let (hard, ignored) = (labels([1, 2, 3]), labels([1, IGNORED, 3]));
        let soft = Host::from_f32(&[3, 4], &SOFT);
        for (target, smoothing, weighted, loss, d) in [
            (&hard, 0.0, false, 0.7569093, 0.0747359),
            (&hard, 0.1, false, 0.8964927, 0.0664026),
            (&hard, 0.0, true, 0.7969902, 0.0996479),
            (&hard, 0.1, true, 0.9164781, 0.0931333),
            (&ignored, 0.1, true, 1.0487745, 0.1197429),
            (&soft, 0.0, false, 1.2735760, -0.1585974),
            (&soft, 0.0, true, 1.6878124, -0.0456675),
            (&soft, 0.1, true, 1.8178115, -0.0359254),
        ] {
            let (l, g) = reference(target, smoothing, weighted);
            assert!((l - loss).abs() < 1e-6, "loss {l} for {loss}");
            assert!((g[0] - d).abs() < 1e-6, "gradient {} for {d}", g[0]);
        }
    }
}
