//! The float64 definition: plain loops over every product of the sum.

use super::{Conv2d, Conv2dDgrad, Conv2dWgrad, Window};
use crate::ops::Host;
use crate::ops::act::Act;

/// Calls `f(x index, w index, y index)` for every multiply-add of a convolution.
fn each(
    x: &[usize],
    w: &[usize],
    y: &[usize],
    win: &Window,
    mut f: impl FnMut(usize, usize, usize),
) {
    let [k, r, s, cg] = [w[0], w[1], w[2], w[3]];
    let kg = k / win.groups;
    for n in 0..y[0] {
        for p in 0..y[1] {
            for q in 0..y[2] {
                for i in 0..r {
                    let h = (p * win.stride[0] + i) as isize - win.pad[0] as isize;
                    for j in 0..s {
                        let v = (q * win.stride[1] + j) as isize - win.pad[1] as isize;
                        if h < 0 || v < 0 || h >= x[1] as isize || v >= x[2] as isize {
                            continue;
                        }
                        let xi = ((n * x[1] + h as usize) * x[2] + v as usize) * x[3];
                        let yi = ((n * y[1] + p) * y[2] + q) * k;
                        for o in 0..k {
                            for c in 0..cg {
                                f(xi + o / kg * cg + c, ((o * r + i) * s + j) * cg + c, yi + o);
                            }
                        }
                    }
                }
            }
        }
    }
}

pub fn fprop(op: &Conv2d, x: &[&Host], y: &mut Host) {
    let shape = y.shape.clone();
    each(&x[0].shape, &x[1].shape, &shape, &op.window, |i, w, o| {
        y.data[o] += x[0].data[i] * x[1].data[w]
    });
    let k = y.channels();
    for (i, v) in y.data.iter_mut().enumerate() {
        if op.bias {
            *v += x[2].data[i % k];
        }
        if op.residual {
            *v += x[x.len() - 1].data[i];
        }
        if op.relu {
            *v = Act::Relu.value(*v);
        }
    }
}

pub fn dgrad(op: &Conv2dDgrad, x: &[&Host], dx: &mut Host) {
    let (dy, w, shape) = (x[0], x[1], dx.shape.clone());
    each(&shape, &w.shape, &dy.shape, &op.window, |i, wi, o| {
        dx.data[i] += dy.data[o] * w.data[wi]
    });
    if op.addend {
        dx.data
            .iter_mut()
            .zip(&x[2].data)
            .for_each(|(d, a)| *d += a);
    }
}

pub fn wgrad(op: &Conv2dWgrad, x: &[&Host], y: &mut [Host]) {
    let (x, dy) = (x[0], x[1]);
    let shape = y[0].shape.clone();
    each(&x.shape, &shape, &dy.shape, &op.window, |i, w, o| {
        y[0].data[w] += x.data[i] * dy.data[o]
    });
    if op.bias {
        let k = dy.channels();
        for (i, d) in dy.data.iter().enumerate() {
            y[1].data[i % k] += d;
        }
    }
}
