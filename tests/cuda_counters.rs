//! How efficient the default CUDA kernels are at the layer shapes of ResNet-50 and ViT-B/16, as the simulator counts it:
//! shared memory without bank conflicts, whole sectors, and no more global memory traffic than the tiling needs.
//!
//! The same numbers for one layer, as a command:
//! `tilewright check 'conv2d(n=1,h=14,c=256,k=256,r=3,pad=1)' --backend cuda:sim --counters --precision bf16`

use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright::backend::cuda::{
    Arg, Cuda, CudaCx, CudaLaunch, CudaOptions, Nvrtc, Precision, Simulated, Traits,
};
use tilewright::backend::{Backend, CompileOptions};
use tilewright::graph::{DType, Phase};
use tilewright::ops::check::case_graph;
use tilewright::ops::room;

/// What is asked of a layer's kernels.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes moved over those that the tiling needs, at most.
    traffic: f64,
    /// Sectors that full requests would take over those taken, at least, of loads and of stores.
    sectors: [f64; 2],
}

const LIMITS: Limits = Limits {
    traffic: 1.15,
    sectors: [0.95; 2],
};
/// The numbers among a launch's parameters; pointers are `None`.
fn numbers(l: &CudaLaunch) -> Vec<Option<i64>> {
    let number = |a: &Arg| match *a {
        Arg::U32(v) => Some(i64::from(v)),
        Arg::I32(v) => Some(i64::from(v)),
        Arg::U64(v) => Some(v as i64),
        _ => None,
    };
    l.args.iter().map(number).collect()
}

/// A constant of a launch.
fn constant(l: &CudaLaunch, name: &str) -> Option<String> {
    let found = l.consts.iter().find(|c| c.0 == name);
    found.map(|c| c.1.clone())
}

fn size(l: &CudaLaunch, name: &str) -> u64 {
    constant(l, name).unwrap().parse().unwrap()
}

/// Bytes that a block-tiled product has to move: each tile of C reads its rows of A and its columns of B once, and
/// writes itself once a part. What a window finds outside its tensor is not read.
fn product(l: &CudaLaunch) -> u64 {
    // a, b and the epilogue's four, then the fields of Product.
    let n = numbers(l);
    let at = |i: usize| n[i].unwrap() as u64;
    let (rows, columns, depth) = (at(6), at(7), at(8));
    let (real_rows, real_columns, tiles_n) = (at(9), at(10), at(13));
    let (groups, parts) = (u64::from(l.grid[1]), u64::from(l.grid[2]));
    let tiles_m = u64::from(l.grid[0]) / tiles_n;
    let element = match constant(l, "ELEMENT").as_deref() {
        Some("bf16") => 2,
        _ => 4,
    };
    let mode = size(l, "MODE");
    let (mut a, mut b) = (rows * depth, columns * depth);
    let mut out = real_rows * real_columns;
    if l.source == "conv2d.cu" {
        let w = |i: usize| n[21 + i].unwrap();
        let (grid, step, origin) = ([w(0), w(3)], [w(6), w(7)], [w(8), w(9)]);
        let (sign, extent, channels, taps_w) = (w(10), [w(11), w(12)], w(14), w(17));
        let pixels = if mode == 2 { depth } else { rows } as i64;
        let positions = if mode == 2 { columns } else { depth } as i64;
        // A class of a strided gradient's pixels may meet no tap at all.
        let taps = [positions / (channels * taps_w).max(1), taps_w];
        let met = |i: usize| -> i64 {
            let all = (0..grid[i]).flat_map(|g| (0..taps[i]).map(move |t| (g, t)));
            all.filter(|(g, t)| (0..extent[i]).contains(&(g * step[i] + origin[i] + sign * t)))
                .count() as i64
        };
        if mode == 2 {
            // Real columns are those of one tap.
            out *= (taps[0] * taps[1]) as u64;
        }
        let images = pixels / (grid[0] * grid[1]);
        let window = (images * met(0) * met(1) * channels) as u64;
        *(if mode == 2 { &mut b } else { &mut a }) = window;
    }
    groups * (element * (tiles_n * a + tiles_m * b) + 4 * parts * out)
}

/// Bytes that attention has to move: a block reads its rows once and all the columns of its head, and writes its rows.
fn attention(l: &CudaLaunch) -> u64 {
    let n: Vec<u64> = numbers(l).iter().flatten().map(|&v| v as u64).collect();
    let (tokens, rows, dim) = (n[0], n[2], size(l, "D"));
    let blocks = tokens.div_ceil(size(l, "BLOCK"));
    // Vectors of a row and of a passing column, numbers of a row and of a passing column.
    let (own, passing, own_1, passing_1) = match l.entry {
        "attention_forward" => (2, 2, 1, 0),
        "attention_deltas" => (2, 0, 1, 0),
        "attention_dq" => (3, 2, 2, 0),
        "attention_dkv" => (4, 2, 0, 2),
        other => panic!("{other}"),
    };
    4 * rows * (own * dim + own_1 + blocks * (passing * dim + passing_1))
}

/// Bytes that a launch has to move.
fn needed(l: &CudaLaunch) -> u64 {
    let n: Vec<u64> = numbers(l).iter().flatten().map(|&v| v as u64).collect();
    match l.entry {
        "linear_simt" | "linear_mma" | "conv_simt" | "conv_mma" => product(l),
        // n[0] items of four bf16, n[2] of them a row, from rows of n[1] floats.
        "cast_bf16" => n[0] * 8 + n[0] / n[2] * n[1] * 4,
        "reduce_parts" => (n[1] + 1) * n[2] * 4,
        "column_sums" => (n[0] + u64::from(l.grid[1])) * n[1] * 4,
        _ => attention(l),
    }
}

struct Row {
    kernel: String,
    traffic: f64,
    loads: f64,
    stores: f64,
    conflicts: u64,
}

/// Runs a case of a room once, forward and backward, and returns what each of its ops' kernels did.
fn count(op: &str, params: &str, precision: Precision) -> Vec<Row> {
    let cuda = Cuda::new(Arc::new(Simulated::default()), CudaOptions::default()).unwrap();
    let cg = case_graph(&room(op).unwrap().build(params).unwrap(), 1).unwrap();
    let traits = Traits::assumed(80);
    let mut need: BTreeMap<String, u64> = BTreeMap::new();
    for node in &cg.graph.nodes {
        let (x, y) = cg.graph.node_specs(node);
        let mut cx = CudaCx::new(&traits, precision, &x, &y, None);
        node.op.cuda(&mut cx).unwrap();
        for l in &cx.launches {
            let kernel = format!("{} {}/{}", node.op.name(), l.source, l.entry);
            *need.entry(kernel).or_default() += needed(l);
        }
    }
    let options = CompileOptions {
        precision: Some(precision),
        ..Default::default()
    };
    let mut exec = cuda.compile(cg.graph.clone(), &options).unwrap();
    for (t, data, dtype) in &cg.inputs {
        if exec.memory().place(*t).is_some() {
            assert_eq!(*dtype, DType::F32);
            exec.write(*t, data).unwrap();
        }
    }
    exec.run(&[Phase::Forward, Phase::Backward]).unwrap();
    let counts = cuda.take_counts();
    assert_eq!(counts.len(), need.len());
    let rows = counts.into_iter().map(|(kernel, count)| {
        let c = &count.counters;
        Row {
            traffic: c.global_bytes() as f64 / need[&kernel] as f64,
            loads: c.global_load.efficiency(),
            stores: c.global_store.efficiency(),
            conflicts: c.bank_conflicts(),
            kernel,
        }
    });
    rows.collect()
}

/// Counts every case in every precision, prints what was found and fails where it is too much.
fn efficient(limits: Limits, cases: &[(&str, &str)]) {
    if let Err(e) = Nvrtc::get() {
        assert!(std::env::var("CI").is_err(), "{e}");
        println!("skipped: {e}");
        return;
    }
    let mut bad = vec![];
    for (op, params) in cases {
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            for r in count(op, params, precision) {
                let text = format!(
                    "{op}({params}) {precision} {}: {:.3} of the bytes, loads {:.3}, stores {:.3}, {} conflicts",
                    r.kernel, r.traffic, r.loads, r.stores, r.conflicts
                );
                println!("{text}");
                let good = r.traffic <= limits.traffic
                    && r.loads >= limits.sectors[0]
                    && r.stores >= limits.sectors[1]
                    && r.conflicts == 0;
                if !good {
                    bad.push(text);
                }
            }
        }
    }
    assert!(
        bad.is_empty(),
        "{} too much:\n{}",
        bad.len(),
        bad.join("\n")
    );
}

#[test]
fn linear_layers_of_vit_b_16() {
    efficient(
        LIMITS,
        &[
            ("linear", "m=197,i=768,o=2304,bias=1"),
            ("linear", "m=197,i=768,o=768"),
        ],
    );
}

#[test]
fn convolutions_of_resnet_50() {
    efficient(
        LIMITS,
        &[
            ("conv2d", "n=1,h=56,c=64,k=256,r=1"),
            ("conv2d", "n=1,h=14,c=256,k=256,r=3,pad=1"),
            ("conv2d", "n=1,h=28,c=256,k=256,r=3,pad=1,stride=2"),
            ("conv2d", "n=1,h=28,c=512,k=1024,r=1,stride=2"),
            ("conv2d", "n=1,h=7,c=512,k=512,r=3,pad=1"),
        ],
    );
}

#[test]
fn attention_of_vit_b_16() {
    efficient(LIMITS, &[("attention", "n=1,t=197,h=3,d=64")]);
}
