//! The CPU kernels of linear layers and convolutions, on rayon's threads (`RAYON_NUM_THREADS`).
//!
//! `cargo bench --bench cpu_kernels -- conv` runs the cases with `conv` in their names. Criterion prints elements per
//! second where an element is a FLOP (a multiply-add is 2).

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tilewright::backend::cpu::Epilogue;
use tilewright::backend::cpu::gemm::{Mat, PackedB, gemm, gemm_packed};
use tilewright::ops::act::Act;
use tilewright::ops::conv2d::ConvShape;
use tilewright::ops::conv2d::cpu::{PackedFilter, dgrad, fprop, fprop_packed, wgrad};

/// Values in -1..1, the same on every run.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

fn linear(c: &mut Criterion) {
    for (m, n, k) in [
        (1576, 3072, 768),
        (1576, 768, 3072),
        (8320, 512, 128),
        (1024, 1024, 1024),
    ] {
        let mut group = c.benchmark_group(format!("linear {m}x{k} to {n}"));
        group
            .sample_size(10)
            .throughput(Throughput::Elements(2 * (m * n * k) as u64));
        let (x, w, dy, bias) = (values(m * k), values(n * k), values(m * n), values(n));
        let (mut y, mut dx, mut dw) = (vec![0.0; m * n], vec![0.0; m * k], vec![0.0; n * k]);
        let mut preact = vec![0.0; m * n];
        group.bench_function("forward", |b| {
            b.iter(|| {
                let ep = Epilogue {
                    bias: Some(&bias),
                    ..Default::default()
                };
                gemm(
                    m,
                    n,
                    k,
                    Mat::new(&x, k),
                    Mat::transposed(&w, k),
                    &mut y,
                    n,
                    false,
                    ep,
                );
            })
        });
        group.bench_function("forward with GELU", |b| {
            b.iter(|| {
                let ep = Epilogue {
                    bias: Some(&bias),
                    act: Some(Act::Gelu),
                    preact: Some(&mut preact),
                    addend: None,
                };
                gemm(
                    m,
                    n,
                    k,
                    Mat::new(&x, k),
                    Mat::transposed(&w, k),
                    &mut y,
                    n,
                    false,
                    ep,
                );
            })
        });
        group.bench_function("dgrad", |b| {
            b.iter(|| {
                gemm(
                    m,
                    k,
                    n,
                    Mat::new(&dy, n),
                    Mat::new(&w, k),
                    &mut dx,
                    k,
                    false,
                    Epilogue::default(),
                )
            })
        });
        group.bench_function("wgrad", |b| {
            b.iter(|| {
                gemm(
                    n,
                    k,
                    m,
                    Mat::transposed(&dy, n),
                    Mat::new(&x, k),
                    &mut dw,
                    k,
                    false,
                    Epilogue::default(),
                )
            })
        });
    }
}

/// The products of ViT-B/16 on one image, with packed weights.
fn vit_b16(c: &mut Criterion) {
    let m = 197;
    for (n, k) in [(2304, 768), (768, 768), (3072, 768), (768, 3072)] {
        let mut group = c.benchmark_group(format!("vit_b_16 {m}x{k} to {n}"));
        group
            .sample_size(10)
            .throughput(Throughput::Elements(2 * (m * n * k) as u64));
        let (x, w) = (values(m * k), values(n * k));
        let packed = PackedB::new(k, n, Mat::transposed(&w, k));
        let mut y = vec![0.0; m * n];
        group.bench_function("packed", |b| {
            b.iter(|| {
                gemm_packed(
                    m,
                    Mat::new(&x, k),
                    &packed,
                    &mut y,
                    n,
                    false,
                    Epilogue::default(),
                )
            })
        });
    }
}

fn conv(c: &mut Criterion) {
    for (name, input, kernel, stride, pad) in [
        ("3x3 64 to 64, 8x56x56", [8, 56, 56, 64], [64, 3, 3], 1, 1),
        (
            "resnet18 stem, 16x224x224",
            [16, 224, 224, 3],
            [64, 7, 7],
            2,
            3,
        ),
        (
            "resnet18 layer1, 16x56x56",
            [16, 56, 56, 64],
            [64, 3, 3],
            1,
            1,
        ),
        (
            "resnet18 layer2 stride 2, 16x56x56",
            [16, 56, 56, 64],
            [128, 3, 3],
            2,
            1,
        ),
        (
            "resnet18 layer2, 16x28x28",
            [16, 28, 28, 128],
            [128, 3, 3],
            1,
            1,
        ),
        (
            "resnet18 layer3, 16x14x14",
            [16, 14, 14, 256],
            [256, 3, 3],
            1,
            1,
        ),
        (
            "resnet18 layer4, 16x7x7",
            [16, 7, 7, 512],
            [512, 3, 3],
            1,
            1,
        ),
        (
            "resnet50 1x1 64 to 256, 16x56x56",
            [16, 56, 56, 64],
            [256, 1, 1],
            1,
            0,
        ),
        (
            "cnn_r14 stage 1, 128x32x32",
            [128, 32, 32, 16],
            [16, 3, 3],
            1,
            1,
        ),
        (
            "cnn_r14 stage 2, 128x16x16",
            [128, 16, 16, 32],
            [32, 3, 3],
            1,
            1,
        ),
        (
            "cnn_r14 stage 3, 128x8x8",
            [128, 8, 8, 64],
            [64, 3, 3],
            1,
            1,
        ),
    ] {
        let s = ConvShape::new(input, kernel, [stride; 2], [pad; 2], 1).expect("a possible shape");
        let mut group = c.benchmark_group(format!("conv {name}"));
        group
            .sample_size(10)
            .throughput(Throughput::Elements(s.flops()));
        let (x, w, dy) = (
            values(s.input_len()),
            values(s.weight_len()),
            values(s.output_len()),
        );
        let (mut y, mut dx, mut dw) = (
            vec![0.0; s.output_len()],
            vec![0.0; s.input_len()],
            vec![0.0; s.weight_len()],
        );
        let packed = PackedFilter::new(&s, &w);
        group.bench_function("fprop", |b| {
            b.iter(|| fprop(&s, &x, &w, None, None, false, &mut y))
        });
        group.bench_function("fprop packed", |b| {
            b.iter(|| fprop_packed(&s, &x, &packed, None, None, true, &mut y))
        });
        group.bench_function("dgrad", |b| b.iter(|| dgrad(&s, &dy, &w, None, &mut dx)));
        group.bench_function("wgrad", |b| b.iter(|| wgrad(&s, &x, &dy, &mut dw, false)));
    }
}

criterion_group!(benches, linear, vit_b16, conv);
criterion_main!(benches);
