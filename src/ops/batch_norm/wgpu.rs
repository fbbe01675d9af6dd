//! Launches of shaders/batch_norm.wgsl.

use crate::Result;
use crate::backend::wgpu::{Arg, Launch, WgpuCx, column_parts, item_types};

const SHADER: &str = "batch_norm.wgsl";

/// Flag: ReLU.
pub(super) const RELU: u32 = 1;
/// Flag: a residual is added.
pub(super) const RESIDUAL: u32 = 2;
/// Flag: the residual's gradient is a result.
const DRESIDUAL: u32 = 4;
/// Flag: the second vector is a variance, not 1 / sqrt(variance + eps).
pub(super) const VARIANCE: u32 = 8;
/// Flag: there is a beta.
pub(super) const BETA: u32 = 16;

/// A tensor seen as rows of channels, in items of 4 floats where channels allow.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    rows: usize,
    channels: usize,
    items: usize,
    width: usize,
    /// Rows that the statistics are over; 0 where they are constants.
    count: usize,
    eps: f32,
}

impl Columns {
    pub(super) fn new(rows: usize, channels: usize, batch: bool, eps: f32) -> Self {
        let width = if channels.is_multiple_of(4) { 4 } else { 1 };
        Columns {
            rows,
            channels,
            items: channels / width,
            width,
            count: if batch { rows } else { 0 },
            eps,
        }
    }

    /// The shader's parameters after the number of items and groups.
    fn params(
        &self,
        rows: usize,
        parts: usize,
        part0: usize,
        flags: u32,
        momentum: f32,
    ) -> Vec<u32> {
        vec![
            self.items as u32,
            rows as u32,
            parts as u32,
            part0 as u32,
            flags,
            self.eps.to_bits(),
            (self.count as f32).to_bits(),
            momentum.to_bits(),
        ]
    }

    /// One invocation per item of a vector over channels.
    fn vectors(
        &self,
        cx: &mut WgpuCx,
        entry: &'static str,
        args: &[Arg],
        mut params: Vec<u32>,
    ) -> Result<()> {
        let groups = [self.items.div_ceil(8) as u32, 1, 1];
        params.splice(0..0, [self.items as u32, groups[0]]);
        cx.launch(Launch {
            shader: SHADER,
            entry,
            consts: types(self.width),
            args: args.to_vec(),
            params,
            groups,
        })
    }

    /// What [`normalize`](Self::normalize) and the backward pass read per channel, from mean, rstd (or variance),
    /// gamma and beta.
    pub(super) fn prepare(&self, cx: &mut WgpuCx, vectors: [Arg; 4], flags: u32) -> Result<Arg> {
        let coef = Arg::Work(cx.workspace(6 * self.channels));
        let [mean, rstd, gamma, beta] = vectors;
        let params = self.params(0, 0, 0, flags, 0.0);
        self.vectors(cx, "prepare", &[mean, rstd, gamma, beta, coef], params)?;
        Ok(coef)
    }

    /// Partial sums over all rows by `entry`, whose first bindings are cut by rows.
    fn partial(
        &self,
        cx: &mut WgpuCx,
        entry: &'static str,
        flags: u32,
        by_row: &[Arg],
        vectors: &[Arg],
    ) -> Result<()> {
        let mut part0 = 0;
        for cut in cx.cuts(self.rows, &[self.channels])? {
            let parts = column_parts(cut.rows, self.items);
            let rows = by_row.iter().map(|&a| cut.of(a, self.channels));
            let args: Vec<Arg> = rows.chain(vectors.iter().copied()).collect();
            let params = self.params(cut.rows, parts, part0, flags, 0.0);
            let n = parts * self.items;
            cx.items((SHADER, entry), &types(self.width), n, &args, &params)?;
            part0 += parts;
        }
        Ok(())
    }

    fn parts(&self, cx: &WgpuCx) -> Result<usize> {
        let cuts = cx.cuts(self.rows, &[self.channels])?;
        Ok(cuts.iter().map(|c| column_parts(c.rows, self.items)).sum())
    }

    /// Mean and 1 / sqrt(variance + eps) of each channel in two passes, and the running statistics.
    pub(super) fn statistics(
        &self,
        cx: &mut WgpuCx,
        x: Arg,
        results: [Arg; 4],
        momentum: f32,
    ) -> Result<()> {
        let [mean, rstd, running_mean, running_var] = results;
        let parts = self.parts(cx)?;
        let part = Arg::Work(cx.workspace(parts * self.channels));
        let params = self.params(0, parts, 0, 0, momentum);
        self.partial(cx, "sums", 0, &[x], &[mean, part])?;
        self.vectors(cx, "finish_mean", &[part, mean], params.clone())?;
        self.partial(cx, "sums", 1, &[x], &[mean, part])?;
        let args = [part, mean, rstd, running_mean, running_var];
        self.vectors(cx, "finish_var", &args, params)
    }

    /// `y = (x - mean) * rstd * gamma + beta (+ residual)`, then ReLU.
    pub(super) fn normalize(
        &self,
        cx: &mut WgpuCx,
        coef: Arg,
        residual: Option<Arg>,
        relu: bool,
    ) -> Result<()> {
        let flags = u32::from(relu) * RELU + u32::from(residual.is_some()) * RESIDUAL;
        for cut in cx.cuts(self.rows, &[self.channels])? {
            let of = |a: Arg| cut.of(a, self.channels);
            let y = of(Arg::Out(0));
            let args = [of(Arg::In(0)), coef, residual.map_or(y, of), y];
            let params = self.params(cut.rows, 0, 0, flags, 0.0);
            let n = cut.rows * self.items;
            cx.items((SHADER, "normalize"), &types(self.width), n, &args, &params)?;
        }
        Ok(())
    }

    /// All gradients; operands and results as [`BatchNormTrainBwd`](super::BatchNormTrainBwd) has them. `second` is
    /// [`VARIANCE`] where operand 3 is one.
    pub(super) fn backward(
        &self,
        cx: &mut WgpuCx,
        (relu, residual, dresidual): (bool, bool, bool),
        second: u32,
    ) -> Result<()> {
        let (dy, x) = (Arg::In(0), Arg::In(1));
        let by_sign = relu && !residual;
        let beta = if by_sign { Arg::In(5) } else { Arg::In(4) };
        let forward = if relu && residual { Arg::In(5) } else { dy };
        let flags = u32::from(relu) * RELU
            + u32::from(residual) * RESIDUAL
            + u32::from(dresidual) * DRESIDUAL;
        let vectors = [Arg::In(2), Arg::In(3), Arg::In(4), beta];
        let coef = self.prepare(cx, vectors, second + u32::from(by_sign) * BETA)?;
        let parts = self.parts(cx)?;
        let part = Arg::Work(cx.workspace(parts * self.channels));
        let part_x = Arg::Work(cx.workspace(parts * self.channels));
        self.partial(
            cx,
            "bwd_sums",
            flags,
            &[dy, x, forward],
            &[coef, part, part_x],
        )?;
        let args = [part, part_x, Arg::Out(1), Arg::Out(2), coef];
        let params = self.params(0, parts, 0, 0, 0.0);
        self.vectors(cx, "bwd_finish", &args, params)?;
        for cut in cx.cuts(self.rows, &[self.channels])? {
            let of = |a: Arg| cut.of(a, self.channels);
            let dres = if dresidual { Arg::Out(3) } else { Arg::Out(0) };
            let args = [of(dy), of(x), of(forward), coef, of(Arg::Out(0)), of(dres)];
            let params = self.params(cut.rows, 0, 0, flags, 0.0);
            let n = cut.rows * self.items;
            cx.items((SHADER, "bwd_apply"), &types(self.width), n, &args, &params)?;
        }
        Ok(())
    }
}

fn types(width: usize) -> Vec<(&'static str, String)> {
    item_types(width)
        .into_iter()
        .filter(|t| t.0 == "T")
        .collect()
}

/// `w *= gamma / sqrt(var + eps)` and the bias that goes with it.
pub(super) fn fold(cx: &mut WgpuCx, bias: bool, eps: f32) -> Result<()> {
    let n = cx.x[0].len();
    let per = n / cx.y[1].len();
    let at = 1 + usize::from(bias);
    let stats = (at..at + 4).map(Arg::In);
    let args: Vec<Arg> = [Arg::Out(0), Arg::In(1)]
        .into_iter()
        .chain(stats)
        .chain([Arg::Out(1)])
        .collect();
    let filters = Columns {
        items: per,
        ..Columns::new(n, per, false, eps)
    };
    let params = filters.params(0, 0, 0, u32::from(bias), 0.0);
    cx.items((SHADER, "fold"), &[], n, &args, &params)
}
