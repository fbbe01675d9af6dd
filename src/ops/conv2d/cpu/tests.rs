use super::*;
use crate::backend::cpu::kernel::available;
use std::sync::Mutex;

fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..len)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Calls `f(x index, w index, y index)` for every multiply-add of the definition.
fn each_product(s: &ConvShape, mut f: impl FnMut(usize, usize, usize)) {
    let (cg, kg) = (s.cg(), s.kg());
    for n in 0..s.n {
        for oh in 0..s.ho {
            for ow in 0..s.wo {
                for k in 0..s.k {
                    for r in 0..s.r {
                        for t in 0..s.s {
                            let h = (oh * s.stride[0] + r) as isize - s.pad[0] as isize;
                            let w = (ow * s.stride[1] + t) as isize - s.pad[1] as isize;
                            if h < 0 || w < 0 || h >= s.h as isize || w >= s.w as isize {
                                continue;
                            }
                            for c in 0..cg {
                                let x = ((n * s.h + h as usize) * s.w + w as usize) * s.c
                                    + k / kg * cg
                                    + c;
                                f(
                                    x,
                                    ((k * s.r + r) * s.s + t) * cg + c,
                                    ((n * s.ho + oh) * s.wo + ow) * s.k + k,
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Relative L2 error; sums of a few thousand float32 products in order stay below the bound. NaN fails.
fn compare(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let error: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| (*g as f64 - w).powi(2))
        .sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    assert!(
        error.sqrt() <= 3e-6 * norm.sqrt() + 1e-6,
        "{what}: error {:e} of norm {:e}",
        error.sqrt(),
        norm.sqrt()
    );
}

fn check(kernels: &'static Kernels, s: &ConvShape) {
    let what = |op: &str| format!("{op} {} {s:?}", kernels.name);
    let (x, w, dy) = (
        random(s.input_len(), 1),
        random(s.weight_len(), 2),
        random(s.output_len(), 3),
    );
    let (bias, residual, addend) = (
        random(s.k, 4),
        random(s.output_len(), 5),
        random(s.input_len(), 6),
    );
    let before = random(s.weight_len(), 7);
    let to64 = |s: &[f32]| s.iter().map(|&v| v as f64).collect::<Vec<_>>();
    let mut want_y: Vec<f64> = (0..s.output_len())
        .map(|i| residual[i] as f64 + bias[i % s.k] as f64)
        .collect();
    let (mut want_dx, mut want_dw) = (to64(&addend), to64(&before));
    each_product(s, |i, j, o| {
        want_y[o] += x[i] as f64 * w[j] as f64;
        want_dx[i] += dy[o] as f64 * w[j] as f64;
        want_dw[j] += dy[o] as f64 * x[i] as f64;
    });
    let relu: Vec<f64> = want_y.iter().map(|v| v.max(0.0)).collect();

    let mut y = vec![f32::NAN; s.output_len()];
    with_floats(fprop_packed_len(kernels, s), |packed| {
        packed.fill(f32::NAN);
        pack_fprop(kernels, s, &w, packed, |_| ());
        fprop_with(
            kernels,
            s,
            &x,
            packed,
            epilogue(Some(&bias), Some(&residual), true),
            &mut y,
        );
    });
    compare(&what("fprop"), &y, &relu);
    let mut dx = vec![f32::NAN; s.input_len()];
    dgrad_with(kernels, s, &dy, &w, Some(&addend), &mut dx);
    compare(&what("dgrad"), &dx, &want_dx);
    let mut dw = before.clone();
    wgrad_with(kernels, s, &x, &dy, &mut dw, true);
    compare(&what("wgrad"), &dw, &want_dw);

    if kernels.name == available()[0].name {
        y.fill(f32::NAN);
        fprop(s, &x, &w, Some(&bias), Some(&residual), false, &mut y);
        compare(&what("fprop()"), &y, &want_y);
        y.fill(f32::NAN);
        let spent = Mutex::new(vec![0; w.len()]);
        let filter = PackedFilter::new(s, &w, |done| {
            spent.lock().unwrap()[done].iter_mut().for_each(|n| *n += 1);
        });
        let spent = spent.into_inner().unwrap();
        assert!(
            spent.iter().all(|&n| n == 1),
            "{s:?}: each weight is let go once"
        );
        fprop_packed(s, &x, &filter, Some(&bias), Some(&residual), false, &mut y);
        compare(&what("fprop_packed()"), &y, &want_y);
        dx.fill(f32::NAN);
        dgrad(s, &dy, &w, None, &mut dx);
        want_dx
            .iter_mut()
            .zip(&addend)
            .for_each(|(d, &a)| *d -= a as f64);
        compare(&what("dgrad()"), &dx, &want_dx);
        dw.fill(f32::NAN);
        wgrad(s, &x, &dy, &mut dw, false);
        want_dw
            .iter_mut()
            .zip(&before)
            .for_each(|(d, &b)| *d -= b as f64);
        compare(&what("wgrad()"), &dw, &want_dw);
        let mut db = vec![f32::NAN; s.k];
        bias_grad(s, &dy, &mut db, false);
        let want: Vec<f64> = (0..s.k)
            .map(|k| dy.iter().skip(k).step_by(s.k).map(|&v| v as f64).sum())
            .collect();
        compare(&what("bias_grad"), &db, &want);
    }
}

fn shape(
    input: [usize; 4],
    kernel: [usize; 3],
    stride: usize,
    pad: usize,
    groups: usize,
) -> ConvShape {
    ConvShape::new(input, kernel, [stride; 2], [pad; 2], groups).unwrap()
}

#[test]
fn odd_shapes() {
    let mut shapes = Vec::new();
    for (i, size) in [1, 2, 3, 5, 7].into_iter().enumerate() {
        for (j, c) in [1, 3, 5, 17].into_iter().enumerate() {
            for (l, k) in [1, 7, 33].into_iter().enumerate() {
                let stride = 1 + (i + j + l) % 3;
                let pad = [0, size / 2, 1][(i + l) % 3].max(if size > 6 { 1 } else { 0 });
                shapes.push(shape(
                    [1 + (j + l) % 3, 7 - l, 6 + j, c],
                    [k, size, size],
                    stride,
                    pad,
                    1,
                ));
            }
        }
    }
    // One pixel, stride > kernel, more padding than kernel, unequal sides.
    shapes.push(shape([2, 1, 1, 4], [6, 1, 1], 1, 0, 1));
    shapes.push(shape([3, 1, 1, 20], [40, 3, 3], 2, 1, 1));
    shapes.push(shape([1, 8, 8, 16], [16, 1, 1], 2, 0, 1));
    shapes.push(shape([2, 9, 10, 3], [8, 2, 2], 4, 0, 1));
    shapes.push(shape([1, 4, 5, 3], [5, 2, 2], 3, 3, 1));
    shapes.push(ConvShape::new([2, 9, 6, 5], [7, 3, 2], [2, 1], [0, 1], 1).unwrap());
    shapes.push(ConvShape::new([1, 5, 12, 2], [3, 1, 7], [1, 3], [0, 3], 1).unwrap());
    // Taps that meet padding only.
    shapes.push(shape([5, 1, 2, 6], [9, 3, 5], 2, 2, 1));
    shapes.push(shape([2, 1, 1, 3], [4, 1, 1], 8, 3, 1));
    // Groups and depthwise.
    shapes.push(shape([2, 6, 5, 6], [9, 3, 3], 1, 1, 3));
    shapes.push(shape([1, 7, 7, 34], [68, 3, 3], 2, 1, 2));
    shapes.push(shape([2, 6, 6, 5], [5, 3, 3], 2, 1, 5));
    shapes.push(shape([1, 6, 6, 4], [8, 5, 5], 1, 2, 4));
    // Many small images in a block, and images cut into rows.
    shapes.push(shape([70, 4, 4, 16], [16, 3, 3], 1, 1, 1));
    shapes.push(shape([1, 40, 60, 33], [16, 3, 3], 1, 1, 1));
    shapes.push(shape([2, 61, 43, 40], [10, 5, 5], 2, 2, 1));
    for kernels in available() {
        for s in &shapes {
            check(kernels, s);
        }
    }
}

#[test]
fn large_weights_are_shared_out() {
    for kernels in available() {
        check(kernels, &shape([2, 5, 5, 96], [96, 3, 3], 1, 1, 1));
        check(kernels, &shape([3, 5, 4, 96], [80, 3, 3], 2, 1, 1));
        check(kernels, &shape([9, 1, 1, 88], [90, 3, 3], 1, 1, 1));
        check(kernels, &shape([3, 20, 21, 20], [70, 7, 7], 1, 3, 1));
    }
}

/// Relative L2 error.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let error: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| (*g as f64 - w).powi(2))
        .sum();
    (error / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
}

#[test]
fn winograd_on_any_size() {
    for kernels in available() {
        for (input, k, pad) in [
            ([1, 2, 2, 16], 16, 1),
            ([2, 7, 5, 16], 48, 1),
            ([1, 9, 13, 80], 16, 0),
            ([3, 4, 6, 32], 32, 2),
            ([1, 14, 14, 256], 64, 1),
            ([9, 23, 24, 16], 32, 1),
            ([2, 10, 9, 96], 272, 1),
        ] {
            let s = shape(input, [k, 3, 3], 1, pad, 1);
            let (x, w, dy) = (
                random(s.input_len(), 1),
                random(s.weight_len(), 2),
                random(s.output_len(), 3),
            );
            let (bias, residual) = (random(s.k, 4), random(s.output_len(), 5));
            let mut want_y: Vec<f64> = (0..s.output_len())
                .map(|i| residual[i] as f64 + bias[i % s.k] as f64)
                .collect();
            let mut want_dx = vec![0.0; s.input_len()];
            let mut want_dw = vec![0.0; s.weight_len()];
            each_product(&s, |i, j, o| {
                want_y[o] += x[i] as f64 * w[j] as f64;
                want_dx[i] += dy[o] as f64 * w[j] as f64;
                want_dw[j] += dy[o] as f64 * x[i] as f64;
            });
            want_y.iter_mut().for_each(|v| *v = v.max(0.0));
            let mut packed = vec![f32::NAN; fprop_packed_len(kernels, &s)];
            pack_fprop(kernels, &s, &w, &mut packed, |_| ());
            let (mut y, mut dx) = (
                vec![f32::NAN; s.output_len()],
                vec![f32::NAN; s.input_len()],
            );
            let ep = RawEpilogue::new(epilogue(Some(&bias), Some(&residual), true));
            Winograd::fprop(kernels, &s)
                .unwrap()
                .run(&x, &packed, ep, &mut y);
            pack_dgrad(kernels, &s, &w, &mut packed);
            Winograd::dgrad(kernels, &s)
                .unwrap()
                .run(&dy, &packed, RawEpilogue::PLAIN, &mut dx);
            let mut dw = vec![f32::NAN; s.weight_len()];
            let job = Winograd::fprop(kernels, &s).unwrap();
            job.wgrad(&x, &dy, &mut dw, false);
            let once = error(&dw, &want_dw);
            job.wgrad(&x, &dy, &mut dw, true);
            want_dw.iter_mut().for_each(|v| *v *= 2.0);
            for (what, e) in [
                ("fprop", error(&y, &want_y)),
                ("dgrad", error(&dx, &want_dx)),
                ("wgrad", once),
                ("wgrad twice", error(&dw, &want_dw)),
            ] {
                println!("{what} {} {s:?}: {e:e}", kernels.name);
                assert!(e < 5e-6, "{what} {} {s:?}: {e:e}", kernels.name);
            }
        }
    }
}

#[test]
fn same_bits_on_any_number_of_threads() {
    for s in [
        shape([8, 14, 14, 48], [40, 3, 3], 1, 1, 1),
        shape([8, 14, 14, 128], [96, 3, 3], 2, 1, 1),
        shape([8, 14, 14, 32], [32, 3, 3], 1, 1, 1),
        shape([40, 24, 24, 16], [32, 3, 3], 1, 1, 1),
        shape([1, 14, 14, 256], [240, 3, 3], 1, 1, 1),
    ] {
        let (x, w, dy) = (
            random(s.input_len(), 1),
            random(s.weight_len(), 2),
            random(s.output_len(), 3),
        );
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let [mut y, mut dx, mut dw] =
                [s.output_len(), s.input_len(), s.weight_len()].map(|n| vec![f32::NAN; n]);
            pool.install(|| {
                fprop(&s, &x, &w, None, None, true, &mut y);
                dgrad(&s, &dy, &w, None, &mut dx);
                wgrad(&s, &x, &dy, &mut dw, false);
            });
            [y, dx, dw]
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(5));
    }
}

#[test]
fn the_shape_chooses_the_algorithm() {
    for (s, want) in [
        (shape([8, 56, 56, 64], [64, 3, 3], 1, 1, 1), "winograd_4x4"),
        (shape([8, 56, 56, 64], [64, 3, 3], 2, 1, 1), "implicit_gemm"),
        (shape([8, 56, 56, 3], [64, 3, 3], 1, 1, 1), "implicit_gemm"),
        (shape([8, 56, 56, 64], [64, 1, 1], 1, 0, 1), "product"),
        (
            shape([1, 14, 14, 256], [256, 3, 3], 1, 1, 1),
            "winograd_4x4",
        ),
        (shape([1, 7, 7, 512], [512, 3, 3], 1, 1, 1), "implicit_gemm"),
        (shape([4, 7, 7, 512], [512, 3, 3], 1, 1, 1), "winograd_4x4"),
    ] {
        assert_eq!(variant(&s, Pass::Fprop), want, "{s:?}");
        assert_eq!(variant(&s, Pass::Dgrad), want, "{s:?}");
    }
}

#[test]
fn impossible_shapes_are_refused() {
    for (input, kernel, stride, groups) in [
        ([1, 2, 2, 3], [4, 3, 3], 1, 1),
        ([1, 4, 4, 3], [4, 3, 3], 0, 1),
        ([1, 4, 4, 3], [4, 3, 3], 1, 2),
        ([0, 4, 4, 3], [4, 3, 3], 1, 1),
    ] {
        assert!(
            ConvShape::new(input, kernel, [stride; 2], [0; 2], groups).is_err(),
            "{input:?} {kernel:?}"
        );
    }
}
