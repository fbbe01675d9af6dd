//! Launches of kernels/batch_norm.cu.

use crate::Result;
use crate::backend::cuda::{Arg, Columns, Consts, CudaCx, vector};

const SOURCE: &str = "batch_norm.cu";

/// What rides along.
#[derive(Clone, Copy, Default)]
pub(super) struct Fused {
    pub relu: bool,
    pub residual: bool,
    /// Backward: the residual's gradient is a result.
    pub dresidual: bool,
    /// The statistics are constants: a variance stands in place of 1 / sqrt(variance + eps).
    pub variance: Option<f32>,
}

impl Fused {
    fn consts(&self, columns: &Columns) -> Consts {
        let mut consts = columns.consts();
        let flags = [
            ("RELU", self.relu),
            ("RESIDUAL", self.residual),
            ("DRESIDUAL", self.dresidual),
            ("VARIANCE", self.variance.is_some()),
        ];
        let set = flags.iter().filter(|f| f.1);
        consts.extend(set.map(|f| (f.0, "1".to_string())));
        consts
    }

    fn eps(&self) -> Arg {
        Arg::F32(self.variance.unwrap_or(0.0))
    }
}

/// Mean and 1 / sqrt(variance + eps) into results 1 and 2, the running statistics in results 3 and 4.
pub(super) fn statistics(cx: &mut CudaCx, eps: f32, momentum: f32) -> Result<()> {
    let k = Columns::new(cx, cx.x[0].rows(), cx.x[0].channels());
    let part_mean = Arg::Work(cx.workspace(k.parts * k.channels));
    let part_m2 = Arg::Work(cx.workspace(k.parts * k.channels));
    let [rows, items, per_part] = [k.rows, k.items, k.per_part].map(Arg::n);
    let args = vec![rows, items, per_part, Arg::In(0), part_mean, part_m2];
    let consts = k.consts();
    k.launch(cx, (SOURCE, "stats"), &consts, k.sum_grid(), args)?;
    let sizes = [rows, items, per_part, Arg::n(k.parts), part_mean, part_m2];
    let settings = [Arg::F32(eps), Arg::F32(momentum)];
    let results = (1..5).map(Arg::Out);
    let args = sizes.into_iter().chain(settings).chain(results).collect();
    k.launch(cx, (SOURCE, "finish_stats"), &consts, k.vector_grid(), args)
}

/// Result 0 from operand 0, with the mean and what [`Fused`] says of the second vector.
pub(super) fn normalize(cx: &mut CudaCx, [mean, second]: [Arg; 2], fused: Fused) -> Result<()> {
    let k = Columns::new(cx, cx.x[0].rows(), cx.x[0].channels());
    let (gamma, beta) = (Arg::In(1), Arg::In(2));
    let residual = Arg::in_if(fused.residual, 5);
    let args = vec![
        Arg::n(k.rows),
        Arg::n(k.items),
        Arg::In(0),
        mean,
        second,
        gamma,
        beta,
        fused.eps(),
        residual,
        Arg::Out(0),
    ];
    let consts = fused.consts(&k);
    k.launch(cx, (SOURCE, "normalize"), &consts, k.map_grid(), args)
}

/// All gradients; operands and results as [`BatchNormTrainBwd`](super::BatchNormTrainBwd) has them.
pub(super) fn backward(cx: &mut CudaCx, fused: Fused) -> Result<()> {
    let k = Columns::new(cx, cx.x[1].rows(), cx.x[1].channels());
    let part = Arg::Work(cx.workspace(k.parts * k.channels));
    let part_x = Arg::Work(cx.workspace(k.parts * k.channels));
    let mask = Arg::in_if(fused.relu, 5);
    let [rows, items] = [k.rows, k.items].map(Arg::n);
    let operands = [
        Arg::In(0),
        Arg::In(1),
        Arg::In(2),
        Arg::In(3),
        Arg::In(4),
        fused.eps(),
        mask,
    ];
    let consts = fused.consts(&k);
    let mut args = vec![rows, items, Arg::n(k.per_part)];
    args.extend(operands);
    args.extend([part, part_x]);
    k.launch(cx, (SOURCE, "bwd_sums"), &consts, k.sum_grid(), args)?;
    let (dgamma, dbeta) = (Arg::Out(1), Arg::Out(2));
    let args = vec![items, Arg::n(k.parts), part, part_x, dgamma, dbeta];
    k.launch(cx, (SOURCE, "bwd_finish"), &consts, k.vector_grid(), args)?;
    let share = match fused.variance {
        None => 1.0 / k.rows as f32,
        Some(_) => 0.0,
    };
    let dresidual = if fused.dresidual {
        Arg::Out(3)
    } else {
        Arg::Null
    };
    let mut args = vec![rows, items];
    args.extend(operands);
    args.extend([dgamma, dbeta, Arg::F32(share), Arg::Out(0), dresidual]);
    k.launch(cx, (SOURCE, "bwd_apply"), &consts, k.map_grid(), args)
}

/// `w' = w * gamma / sqrt(var + eps)` and the bias that goes with it.
pub(super) fn fold(cx: &mut CudaCx, bias: bool, eps: f32) -> Result<()> {
    let n = cx.x[0].len();
    let per = n / cx.y[1].len();
    let vec = vector(&[per]);
    let at = 1 + usize::from(bias);
    let mut args = vec![Arg::n(per / vec), Arg::Out(0), Arg::in_if(bias, 1)];
    args.extend((at..at + 4).map(Arg::In));
    args.extend([Arg::F32(eps), Arg::Out(1)]);
    let consts = vec![("VEC", vec.to_string())];
    cx.items((SOURCE, "fold"), consts, n / vec, 256, &args)
}
