//! The host's side of a step: what a batch, an augmentation map, a plan and a simulated launch cost. Kernels and whole
//! steps are `tilewright bench`'s affair.
//!
//! `cargo bench --bench host -- plan` runs the cases with `plan` in their names.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;
use tilewright::backend::cuda::sim_present;
use tilewright::backend::{CompileOptions, open};
use tilewright::data::{
    Augment, Feed, Images, Loader, LoaderOptions, OpenOptions, open as open_data,
};
use tilewright::graph::fuse::{Purpose, fuse};
use tilewright::graph::plan::{Limits, Memory};
use tilewright::graph::{Graph, Mode, Phase, Spec};
use tilewright::models::{ModelOptions, find};
use tilewright::ops::check::case_graph;
use tilewright::ops::room;

fn augmentation() -> Augment {
    Augment {
        hflip: true,
        crop_pad: 4,
        rotate_degrees: 10.0,
        translate: 0.1,
        ..Augment::default()
    }
}

fn loader(c: &mut Criterion) {
    const BATCH: usize = 128;
    let sets = open_data("synthetic:10x32", OpenOptions::default()).unwrap();
    let images = Images::prepare(&sets.train, sets.preprocess(32), Default::default()).unwrap();
    let mut loader = Loader::new(
        Arc::new(images),
        LoaderOptions {
            augment: Some(augmentation()),
            ..LoaderOptions::train(BATCH, 1)
        },
    )
    .unwrap();
    let mut group = c.benchmark_group("loader");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("batch of 128 x 32 px", |b| {
        b.iter(|| {
            // `None` ends an epoch; the call after it begins the next.
            let batch = loop {
                if let Some(batch) = loader.next_batch().unwrap() {
                    break batch;
                }
            };
            loader.recycle(black_box(batch));
        });
    });
    group.finish();
    c.bench_function("augmentation: 128 affine maps", |b| {
        let a = augmentation();
        b.iter(|| {
            for i in 0..128 {
                black_box(a.draw(32, 1, 2, i).map);
            }
        });
    });
}

/// Builds, fuses and differentiates a training graph.
fn training_graph(model: &str) -> Graph {
    let model = find(model).unwrap();
    let mode = Mode {
        batch_stats: true,
        random: true,
    };
    let options = ModelOptions::default();
    let mut net = model
        .net(8, (model.image, model.image), mode, &options)
        .unwrap();
    let labels = net.graph.input("labels", Spec::u32([8]));
    let logits = net.heads.logits.unwrap();
    let loss = net
        .graph
        .softmax_ce(logits, labels, None, 0.1, 0.0)
        .unwrap();
    fuse(&mut net.graph, Purpose::Gradients).unwrap();
    net.graph.backward(loss, &[]).unwrap();
    net.graph
}

fn planning(c: &mut Criterion) {
    let limits = Limits {
        align: 16,
        max_arena: usize::MAX,
    };
    for model in ["resnet50", "vit_base_patch16_224"] {
        let mut group = c.benchmark_group(format!("plan {model}"));
        group.sample_size(20);
        group.bench_function("graph, fusion, gradients", |b| {
            b.iter(|| black_box(training_graph(model)).nodes.len());
        });
        let graph = training_graph(model);
        let work = vec![0; graph.nodes.len()];
        group.bench_function("memory", |b| {
            b.iter(|| Memory::plan(black_box(&graph), &work, limits).bytes());
        });
        group.finish();
    }
}

fn simulator(c: &mut Criterion) {
    if !sim_present() {
        println!("no NVRTC: the simulator is not timed");
        return;
    }
    let sim = open("cuda:sim").unwrap();
    let case = room("linear").unwrap().build("m=64,i=64,o=64").unwrap();
    let cg = case_graph(&case, 1).unwrap();
    let mut exec = sim
        .compile(cg.graph.clone(), &CompileOptions::default())
        .unwrap();
    cg.write(exec.as_mut()).unwrap();
    let counted = exec.run_traced(&[Phase::Forward]).unwrap();
    let lanes = counted.iter().filter_map(|s| s.count.as_ref());
    let lanes = lanes.map(|c| c.counters.lane_instructions).sum();
    let mut group = c.benchmark_group("simulator");
    group
        .sample_size(20)
        .throughput(Throughput::Elements(lanes));
    group.bench_function("linear 64 x 64 x 64, lane instructions", |b| {
        b.iter(|| exec.run(&[Phase::Forward]).unwrap());
    });
    group.finish();
}

criterion_group!(benches, loader, planning, simulator);
criterion_main!(benches);
