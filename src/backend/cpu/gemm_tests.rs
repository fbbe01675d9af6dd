use super::*;
use crate::backend::cpu::kernel::available;
use crate::ops::act::Act;

/// Values in -1..1 from a small generator, the same on every run.
fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..len)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    let rows = x.len() / cols.max(1);
    (0..x.len())
        .map(|i| x[(i % rows) * cols + i / rows])
        .collect()
}

#[derive(Clone, Copy)]
struct Case {
    size: [usize; 3],
    transposed: [bool; 2],
    packed: bool,
    accumulate: bool,
    epilogue: bool,
    act: Option<Act>,
}

fn check(kernels: &'static Kernels, case: Case) {
    let Case {
        size: [m, n, k],
        transposed: [ta, tb],
        ..
    } = case;
    let what = format!(
        "{} {m}x{n}x{k} ta={ta} tb={tb} packed={}",
        kernels.name, case.packed
    );
    let (a, b) = (random(m * k, 1), random(k * n, 2));
    let (at, bt) = (transpose(&a, k), transpose(&b, n));
    let am = if ta {
        Mat::transposed(&at, m)
    } else {
        Mat::new(&a, k)
    };
    let bm = if tb {
        Mat::transposed(&bt, k)
    } else {
        Mat::new(&b, n)
    };
    let ldc = n + 3;
    let (bias, addend) = (random(n, 3), random(m * ldc, 4));
    let before = random(m * ldc, 5);
    let mut c = if case.accumulate {
        before.clone()
    } else {
        vec![f32::NAN; m * ldc]
    };
    let mut pre = vec![f32::NAN; m * ldc];
    let ep = if case.epilogue {
        Epilogue {
            bias: Some(&bias),
            addend: Some(&addend),
            act: case.act,
            preact: Some(&mut pre),
        }
    } else {
        Epilogue {
            act: case.act,
            ..Default::default()
        }
    };
    let packed;
    let operand = if case.packed {
        packed = PackedB::with(kernels, k, n, bm, |_| ());
        Operand::Packed(&packed)
    } else {
        Operand::Plain(bm)
    };
    gemm_with(
        kernels,
        m,
        n,
        k,
        am,
        operand,
        &mut c,
        ldc,
        case.accumulate,
        ep,
    );
    for i in 0..m {
        for j in 0..n {
            let at = i * ldc + j;
            let mut want: f64 = (0..k)
                .map(|x| a[i * k + x] as f64 * b[x * n + j] as f64)
                .sum();
            let mut scale: f64 = 1.0
                + (0..k)
                    .map(|x| (a[i * k + x] * b[x * n + j]).abs() as f64)
                    .sum::<f64>();
            if case.accumulate {
                want += before[at] as f64;
            }
            if case.epilogue {
                want += bias[j] as f64 + addend[at] as f64;
                scale += 2.0;
                assert!(
                    (pre[at] as f64 - want).abs() < 1e-6 * scale,
                    "{what}: preact [{i}, {j}] {} {want}",
                    pre[at]
                );
            }
            let want = case.act.map_or(want, |f| f.value(want));
            assert!(
                (c[at] as f64 - want).abs() < 1e-6 * scale,
                "{what}: [{i}, {j}] {} not {want}",
                c[at]
            );
        }
        for j in n..ldc {
            let at = i * ldc + j;
            assert!(
                c[at].is_nan() || c[at] == before[at],
                "{what}: wrote beyond row {i}"
            );
        }
    }
}

#[test]
fn odd_shapes_in_every_layout() {
    let sizes = [1, 2, 3, 15, 16, 17, 63, 65, 197];
    for kernels in available() {
        let mut i = 0;
        for m in sizes {
            for n in sizes {
                for k in sizes {
                    // Every shape with one of the settings; all pairs come up.
                    i += 1;
                    let plain = Case {
                        size: [m, n, k],
                        transposed: [i % 2 == 0, i / 2 % 2 == 0],
                        packed: i % 3 == 0,
                        accumulate: i % 5 == 0,
                        epilogue: i % 7 < 3,
                        act: [None, Some(Act::Relu), Some(Act::Gelu), Some(Act::GeluTanh)][i % 4],
                    };
                    check(kernels, plain);
                }
            }
        }
    }
}

#[test]
fn long_k_is_cut_into_blocks() {
    for kernels in available() {
        for (transposed, packed) in [
            ([false, false], true),
            ([true, false], false),
            ([false, true], true),
        ] {
            let act = Some(Act::Relu);
            let size = [13, 37, 2 * MAX_KC + 5];
            check(
                kernels,
                Case {
                    size,
                    transposed,
                    packed,
                    accumulate: true,
                    epilogue: true,
                    act,
                },
            );
        }
        // A row stride of 2 KiB, which is copied.
        let act = None;
        let case = Case {
            size: [40, 70, 512],
            transposed: [false, true],
            packed: false,
            accumulate: false,
            epilogue: false,
            act,
        };
        check(kernels, case);
        check(
            kernels,
            Case {
                size: [5, 9, 0],
                ..case
            },
        );
    }
}

#[test]
fn strides_in_both_directions() {
    // A [5, 7] and B [7, 6] as every second element of larger matrices.
    let (a, b) = (random(400, 1), random(400, 2));
    let am = Mat {
        data: &a,
        row_stride: 30,
        col_stride: 2,
    };
    let bm = Mat {
        data: &b,
        row_stride: 40,
        col_stride: 3,
    };
    for kernels in available() {
        let mut c = vec![f32::NAN; 30];
        gemm_with(
            kernels,
            5,
            6,
            7,
            am,
            Operand::Plain(bm),
            &mut c,
            6,
            false,
            Epilogue::default(),
        );
        for i in 0..5 {
            for j in 0..6 {
                let want: f64 = (0..7)
                    .map(|k| a[i * 30 + k * 2] as f64 * b[k * 40 + j * 3] as f64)
                    .sum();
                assert!(
                    (c[i * 6 + j] as f64 - want).abs() < 1e-5,
                    "{} [{i}, {j}]",
                    kernels.name
                );
            }
        }
    }
}

#[test]
fn same_bits_on_any_number_of_threads() {
    let (m, n, k) = (197, 130, 1500);
    let (a, b) = (random(m * k, 1), random(n * k, 2));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let mut c = vec![f32::NAN; m * n];
        let mut sums = vec![f32::NAN; k];
        pool.install(|| {
            gemm(
                m,
                n,
                k,
                Mat::new(&a, k),
                Mat::transposed(&b, k),
                &mut c,
                n,
                false,
                Epilogue::default(),
            );
            column_sums(m, k, &a, &mut sums, false);
        });
        (c, sums)
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
    for (j, s) in one.1.iter().enumerate() {
        let want: f64 = (0..m).map(|i| a[i * k + j] as f64).sum();
        assert!((*s as f64 - want).abs() < 1e-4, "column {j}");
    }
}
