//! Whole networks on the CUDA backend: the real kernels in the simulator against the CPU backend.

use std::sync::Arc;
use tilewright::backend::cuda::{Nvrtc, Precision};
use tilewright::backend::{Backend, CompileOptions, open};
use tilewright::graph::fuse::{Purpose, fuse};
use tilewright::graph::train::{Optimizer, UpdateSpec, add_update};
use tilewright::graph::{Mode, Phase, Spec};
use tilewright::models::resnet::{Block, ResNet};
use tilewright::models::session::write_parameters;
use tilewright::models::{Arch, Model, ModelOptions, find};
use tilewright::philox::Philox;

/// Three steps on `backend`: the loss of each, and every parameter and running statistic after the last.
fn three_steps(
    backend: &dyn Backend,
    model: &Model,
    side: usize,
    optimizer: Optimizer,
    precision: Option<Precision>,
) -> (Vec<f32>, Vec<(String, Vec<f32>)>) {
    let batch = 4;
    let options = ModelOptions {
        classes: Some(5),
        ..Default::default()
    };
    let mode = Mode {
        batch_stats: true,
        random: true,
    };
    let mut net = model.net(batch, (side, side), mode, &options).unwrap();
    let g = &mut net.graph;
    let labels = g.input("labels", Spec::u32([batch]));
    let logits = net.heads.logits.unwrap();
    let loss = g.softmax_ce(logits, labels, None, 0.1, 0.0).unwrap();
    g.keep(loss);
    fuse(g, Purpose::Gradients).unwrap();
    let grads = g.backward(loss, &[]).unwrap();
    let spec = UpdateSpec {
        optimizer,
        weight_decay: 0.05,
        clip: Some(1.0),
        accumulate: 1,
    };
    let update = add_update(g, &grads, spec).unwrap();
    let rng = g.rng;
    let compile = CompileOptions {
        precision,
        ..Default::default()
    };
    let mut exec = backend.compile(Arc::new(net.graph), &compile).unwrap();
    write_parameters(exec.as_mut(), None, 7).unwrap();
    let mut losses = vec![];
    for step in 1..=3u32 {
        let mut draw = Philox::new(99, step);
        let pixels: Vec<f32> = (0..batch * side * side * 3)
            .map(|_| draw.normal())
            .collect();
        let classes: Vec<u32> = (0..batch).map(|_| draw.below(5)).collect();
        exec.write(net.input, &pixels).unwrap();
        exec.write_u32(labels, &classes).unwrap();
        exec.write(update.hyper, &update.hyper_values(u64::from(step), 1e-2))
            .unwrap();
        if let Some(rng) = rng {
            exec.write_u32(rng, &[5, 0, step, 0]).unwrap();
        }
        exec.run(&[Phase::Forward, Phase::Backward, Phase::Optimizer])
            .unwrap();
        losses.push(exec.read(loss).unwrap()[0]);
    }
    let params: Vec<_> = exec.graph().params.clone();
    let params = params
        .iter()
        .map(|p| (p.name.clone(), exec.read(p.tid).unwrap()))
        .collect();
    (losses, params)
}

const SGD: Optimizer = Optimizer::Sgd {
    momentum: 0.9,
    nesterov: true,
};
const ADAMW: Optimizer = Optimizer::AdamW {
    beta1: 0.9,
    beta2: 0.999,
    // Larger than usual: with 1e-8 the first steps are the gradients' signs, and gradients of nearly zero decide.
    eps: 1e-3,
};

fn models() -> Vec<(Model, usize, Optimizer)> {
    let resnet = Model {
        id: "a two-stage resnet".into(),
        arch: Arch::ResNet(ResNet {
            block: Block::Bottleneck,
            depths: [1, 1, 0, 0],
        }),
        image: 32,
        classes: 5,
    };
    let vit = find("vit:patch=4,dim=64,depth=2,heads=2,mlp=2,dropout=0.1").unwrap();
    vec![
        (find("cnn_r14").unwrap(), 16, SGD),
        (vit, 16, ADAMW),
        (resnet, 32, SGD),
    ]
}

fn simulator() -> Option<Box<dyn Backend>> {
    if let Err(e) = Nvrtc::get() {
        assert!(std::env::var("CI").is_err(), "{e}");
        println!("skipped: {e}");
        return None;
    }
    Some(open("cuda:sim").unwrap())
}

/// Relative to the tensor's norm.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let norm: f64 = a.iter().map(|&v| square(f64::from(v))).sum();
    let off = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| square(f64::from(a) - f64::from(b)));
    off.sum::<f64>().sqrt() / norm.sqrt().max(1e-3)
}

#[test]
fn three_steps_end_with_the_weights_of_the_cpu() {
    let Some(sim) = simulator() else { return };
    let cpu = open("cpu").unwrap();
    for (model, side, optimizer) in models() {
        let (want_loss, want) = three_steps(cpu.as_ref(), &model, side, optimizer, None);
        let (loss, got) = three_steps(sim.as_ref(), &model, side, optimizer, None);
        for (step, (a, b)) in want_loss.iter().zip(&loss).enumerate() {
            assert!(
                ((a - b) / a).abs() < 1e-4,
                "{}: loss {b} for {a} in step {step}",
                model.id
            );
        }
        for ((name, want), (_, got)) in want.iter().zip(&got) {
            let d = distance(want, got);
            assert!(d < 1e-4, "{}: {name} is {d} off", model.id);
        }
    }
}

#[test]
fn losses_in_bf16_stay_within_one_percent() {
    let Some(sim) = simulator() else { return };
    for (model, side, optimizer) in models() {
        let (want, _) = three_steps(sim.as_ref(), &model, side, optimizer, None);
        let bf16 = Some(Precision::Bf16);
        let (got, _) = three_steps(sim.as_ref(), &model, side, optimizer, bf16);
        for (a, b) in want.iter().zip(&got) {
            assert!(
                ((a - b) / a).abs() < 0.01,
                "{}: {got:?} for {want:?}",
                model.id
            );
        }
    }
}
