//! What the `grad` command does: the loss of labelled images and every gradient.

use super::forward::read_input;
use super::session::{load_net, options_for, write_parameters};
use super::{Model, ModelOptions, Net};
use crate::backend::{Backend, CompileOptions};
use crate::graph::fuse::{Purpose, fuse};
use crate::graph::{Mode, Phase, Spec};
use crate::weights::{SaveTensor, WeightFile};
use crate::{Error, Result};
use std::sync::Arc;

/// Choices of [`grad`].
#[derive(Clone, Debug, Default)]
pub struct GradOptions {
    /// The model's options; dropout and drop path are off whatever they say.
    pub model: ModelOptions,
    /// Batch norm uses its running statistics, and leaves them.
    pub eval: bool,
    /// Start with a new classifier.
    pub replace_head: bool,
    /// Seed of a new classifier.
    pub seed: u64,
}

/// What the `grad` command does: the loss (mean cross-entropy) of the images of `input` under its `labels` `[N]`
/// (int64), and its gradients. Returns `loss` `[1]`, `logits`, `grad.<entry>` for every parameter under the weight
/// file's own names and axis order, and the running statistics after the step.
///
/// # Errors
/// The input, the weights and the model do not fit each other, a label is out of range, or the device is lost.
pub fn grad(
    backend: &dyn Backend,
    model: &Model,
    weights: &WeightFile,
    input: &WeightFile,
    options: &GradOptions,
) -> Result<Vec<SaveTensor<'static>>> {
    let (n, image, data) = read_input(input)?;
    let chosen = options_for(&options.model, Some(weights), options.replace_head);
    let mode = Mode {
        batch_stats: !options.eval,
        random: false,
    };
    let net = model.net(n, image, mode, &chosen)?;
    let loaded = load_net(model, &net, weights, options.replace_head)?;
    let Net {
        mut graph,
        input: images,
        heads,
        ..
    } = net;
    let logits = heads.logits.ok_or_else(|| {
        Error::input(format!(
            "{} has no classifier here, so there is no loss; give --classes N --replace-head to start one",
            model.id
        ))
    })?;
    let classes = graph.spec(logits).channels();
    let labels = read_labels(input, n, classes)?;
    let target = graph.input("labels", Spec::u32([n]));
    let loss = graph.scoped("loss", |g| g.softmax_ce(logits, target, None, 0.0, 0.0))?;
    graph.keep(logits);
    graph.keep(loss);
    fuse(&mut graph, Purpose::Gradients)?;
    let found = graph.backward(loss, &[])?;
    let mut grads = vec![];
    for (i, p) in graph.params.iter().enumerate().filter(|(_, p)| !p.buffer) {
        let d = found
            .get(&p.tid)
            .copied()
            .ok_or_else(|| Error::run(format!("{}: no gradient reached {}", model.id, p.name)))?;
        grads.push((i, d));
    }
    for &(_, d) in &grads {
        graph.keep(d);
    }
    // The smallest rounding errors forward: batch norm over few images amplifies them until activations near zero fall
    // on the other side of ReLU's kink, which moves every gradient before it by some thousandths.
    let mut compile = CompileOptions::default();
    if backend.name() == "cpu" {
        compile
            .variants
            .insert("conv2d".into(), "float64_sums".into());
    }
    let mut exec = backend.compile(Arc::new(graph), &compile)?;
    write_parameters(exec.as_mut(), Some((&loaded, weights)), options.seed)?;
    exec.write(images, &data)?;
    exec.write_u32(target, &labels)?;
    exec.run(&[Phase::Prepare, Phase::Forward, Phase::Backward])?;

    let mut out = vec![
        SaveTensor::f32("loss", &[1], exec.read(loss)?),
        SaveTensor::f32("logits", &[n, classes], exec.read(logits)?),
    ];
    for (i, d) in grads {
        let values = exec.read(d)?;
        for mut t in loaded.names.tensors(exec.graph(), i, values) {
            t.name = format!("grad.{}", t.name).into();
            out.push(t);
        }
    }
    for i in 0..exec.graph().params.len() {
        let p = &exec.graph().params[i];
        if p.buffer {
            let tid = p.tid;
            let values = exec.read(tid)?;
            out.extend(loaded.names.tensors(exec.graph(), i, values));
        }
    }
    Ok(out)
}

fn read_labels(input: &WeightFile, n: usize, classes: usize) -> Result<Vec<u32>> {
    let at = input.path().display();
    let labels = input.read_i64("labels")?;
    if labels.len() != n {
        return Err(Error::input(format!(
            "{at}: {} labels for {n} images",
            labels.len()
        )));
    }
    let one = |(i, &l): (usize, &i64)| {
        u32::try_from(l)
            .ok()
            .filter(|&l| (l as usize) < classes)
            .ok_or_else(|| {
                Error::input(format!(
                    "{at}: label {l} of image {i} is not in 0..{classes}"
                ))
            })
    };
    labels.iter().enumerate().map(one).collect()
}
