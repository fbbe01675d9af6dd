//! 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3): a quarter of the products, at the price of transforms.
//!
//! Blocks of 4x4 outputs ("tiles") are taken in groups. A group's inputs are transformed to `V[36][tile][C]`, multiplied
//! with the transformed weights `U[36][panel][C][nr]` to `M[36][panel][tile][nr]`, and transformed back with the
//! epilogue. With many tiles each task takes groups of its own, which fit in L2; with few, all threads share one group
//! and take the three steps together. The same sums are made either way, so the bits do not depend on the threads.
//!
//! The relative error (L2) is about 1e-6, some times that of direct summation.

use super::blocks::trim;
use crate::backend::cpu::kernel::{Kernels, MAX_MR, Rows};
use crate::backend::cpu::parallel::{Shared, parallel_for, part};
use crate::backend::cpu::scratch::with_floats;
use crate::backend::cpu::winograd::{Input, Output, POSITIONS, TILE, Weights};
use crate::backend::cpu::{Activation, RawEpilogue};
use crate::ops::conv2d::ConvShape;
use std::ops::Range;

/// Floats of V and M that a task keeps in its L2 cache.
const GROUP_FLOATS: usize = 192 * 1024;
/// Floats of V and M that all threads share.
const SHARED_FLOATS: usize = 3 * 1024 * 1024;

/// A 3x3 convolution of stride 1, from `[n, h, w, c]` to `[n, ho, wo, k]`.
pub(super) struct Winograd {
    kernels: &'static Kernels,
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    k: usize,
    ho: usize,
    wo: usize,
    pad: [usize; 2],
}

impl Winograd {
    /// The forward pass of `s`, if it is of this kind.
    pub fn fprop(kernels: &'static Kernels, s: &ConvShape) -> Option<Self> {
        let whole = s.r == 3 && s.s == 3 && s.stride == [1, 1] && s.groups == 1 && trim(s).0 == *s;
        let vectors = s.c.is_multiple_of(kernels.lanes) && s.k.is_multiple_of(kernels.lanes);
        let ConvShape {
            n,
            h,
            w,
            c,
            k,
            ho,
            wo,
            pad,
            ..
        } = *s;
        (whole && vectors && pad[0] <= 2 && pad[1] <= 2).then_some(Winograd {
            kernels,
            n,
            h,
            w,
            c,
            k,
            ho,
            wo,
            pad,
        })
    }

    /// The input gradient of `s`: a convolution from `dy` to `dx`.
    pub fn dgrad(kernels: &'static Kernels, s: &ConvShape) -> Option<Self> {
        let f = Self::fprop(kernels, s)?;
        let pad = f.pad.map(|p| 2 - p);
        Some(Winograd {
            h: f.ho,
            w: f.wo,
            c: f.k,
            k: f.c,
            ho: f.h,
            wo: f.w,
            pad,
            ..f
        })
    }

    fn tiles_of_image(&self) -> [usize; 2] {
        [self.ho.div_ceil(TILE), self.wo.div_ceil(TILE)]
    }

    fn tiles(&self) -> usize {
        self.n * self.tiles_of_image().iter().product::<usize>()
    }

    /// Whether it is faster than direct summation: compares vector operations, with the transforms' as measured.
    pub fn wins(&self) -> bool {
        let [c, k] = [self.c, self.k].map(|v| v / self.kernels.lanes);
        let direct = self.n * self.ho * self.wo * 9 * self.c * k;
        let transforms = self.tiles() * (250 * c + 200 * k) + 200 * self.c * k;
        let products = self.tiles() * POSITIONS * self.c * k;
        5 * (products + transforms) < 4 * direct
    }

    /// Floats between two tiles in V; not a power of two, so that tiles do not share the sets of a cache.
    fn v_step(&self) -> usize {
        self.c + 16
    }

    /// `y = epilogue(conv(x))` with the weights packed as for direct summation, `[panel][(r, s, c)][nr]`.
    pub fn run(&self, x: &[f32], packed: &[f32], ep: RawEpilogue, y: &mut [f32]) {
        debug_assert!(matches!(ep.activation, Activation::None | Activation::Relu));
        let tiles = self.tiles();
        let floats = POSITIONS * (self.v_step() + self.k);
        let mr = self.kernels.mr();
        let threads = rayon::current_num_threads();
        let y = Shared::new(y);
        with_floats(POSITIONS * self.c * self.k + self.c, |u| {
            let (u, zeros) = u.split_at_mut(POSITIONS * self.c * self.k);
            zeros.fill(0.0);
            self.transform_weights(packed, u);
            let job = Job {
                w: self,
                x,
                u,
                zeros,
                y,
                ep,
            };
            let own = (GROUP_FLOATS / floats / mr * mr).max(2 * mr);
            if threads == 1 || tiles >= 3 * threads * own {
                let groups = tiles.div_ceil(own);
                parallel_for(groups, |g| {
                    let tiles = part(tiles, groups, g);
                    with_floats(tiles.len() * floats, |vm| {
                        let (v, m) = vm.split_at_mut(tiles.len() * POSITIONS * self.v_step());
                        let group = Group {
                            job: &job,
                            tiles: tiles.clone(),
                            v: Shared::new(v),
                            m: Shared::new(m),
                        };
                        group.input(0..tiles.len());
                        group.products(0..POSITIONS, 0..self.panels());
                        group.output(0..tiles.len());
                    });
                });
                return;
            }
            let groups = (tiles * floats).div_ceil(SHARED_FLOATS);
            for g in 0..groups {
                let tiles = part(tiles, groups, g);
                let count = tiles.len();
                with_floats(count * floats, |vm| {
                    let (v, m) = vm.split_at_mut(count * POSITIONS * self.v_step());
                    let group = Group {
                        job: &job,
                        tiles,
                        v: Shared::new(v),
                        m: Shared::new(m),
                    };
                    let parts = count.min(8 * threads);
                    let panel_parts = (8 * threads).div_ceil(POSITIONS).min(self.panels());
                    parallel_for(parts, |i| group.input(part(count, parts, i)));
                    parallel_for(POSITIONS * panel_parts, |i| {
                        let e = i / panel_parts;
                        group.products(e..e + 1, part(self.panels(), panel_parts, i % panel_parts));
                    });
                    parallel_for(parts, |i| group.output(part(count, parts, i)));
                });
            }
        });
    }

    fn panels(&self) -> usize {
        self.k.div_ceil(self.kernels.nr())
    }

    /// First column and width of panel `p`.
    fn panel(&self, p: usize) -> (usize, usize) {
        let j = p * self.kernels.nr();
        (j, self.kernels.panel(self.k, j))
    }

    /// `U[36][panel][C][nr]` from `[panel][(r, s, c)][nr]`.
    fn transform_weights(&self, packed: &[f32], u: &mut [f32]) {
        const CHANNELS: usize = 16;
        let u = Shared::new(u);
        let blocks = self.c.div_ceil(CHANNELS);
        parallel_for(self.panels() * blocks, |i| {
            let (j, nr) = self.panel(i / blocks);
            let c = i % blocks * CHANNELS;
            let args = Weights {
                w: packed[(9 * j) * self.c + c * nr..].as_ptr(),
                w_step: self.c * nr,
                len: CHANNELS.min(self.c - c) * nr,
                // SAFETY: inside U; this task alone writes these channels of this panel.
                out: unsafe { u.get().add(j * self.c + c * nr) },
                step: self.c * self.k,
            };
            // SAFETY: nine taps of this panel, and 36 positions.
            unsafe { (self.kernels.winograd_weights)(&args) }
        });
    }
}

struct Job<'a> {
    w: &'a Winograd,
    x: &'a [f32],
    u: &'a [f32],
    /// `c` zeros: a pixel in the padding.
    zeros: &'a [f32],
    y: Shared,
    ep: RawEpilogue,
}

/// Some tiles and their V and M. The steps take parts of the work, each of which writes memory of its own.
struct Group<'a> {
    job: &'a Job<'a>,
    tiles: Range<usize>,
    v: Shared,
    m: Shared,
}

impl Group<'_> {
    /// Image and first output row and column of a tile.
    fn place(&self, tile: usize) -> [usize; 3] {
        let [th, tw] = self.job.w.tiles_of_image();
        [tile / (th * tw), tile / tw % th * TILE, tile % tw * TILE]
    }

    /// Transforms the inputs of tiles `ts` of the group.
    fn input(&self, ts: Range<usize>) {
        let Job { w, x, zeros, .. } = *self.job;
        for t in ts {
            let [image, oh, ow] = self.place(self.tiles.start + t);
            let pixel = std::array::from_fn(|e| {
                let h = (oh + e / 6).checked_sub(w.pad[0]).filter(|&h| h < w.h);
                let v = (ow + e % 6).checked_sub(w.pad[1]).filter(|&v| v < w.w);
                match (h, v) {
                    (Some(h), Some(v)) => x[((image * w.h + h) * w.w + v) * w.c..].as_ptr(),
                    _ => zeros.as_ptr(),
                }
            });
            let args = Input {
                pixel: &pixel,
                c: w.c,
                // SAFETY: inside V; the line of this tile.
                out: unsafe { self.v.get().add(t * w.v_step()) },
                step: self.tiles.len() * w.v_step(),
            };
            // SAFETY: every pixel has c floats, V has 36 positions.
            unsafe { (w.kernels.winograd_input)(&args) }
        }
    }

    /// Multiplies at positions `es` for the panels `ps`.
    fn products(&self, es: Range<usize>, ps: Range<usize>) {
        let Job { w, u, .. } = *self.job;
        let count = self.tiles.len();
        let parts = count.div_ceil(w.kernels.mr());
        for e in es {
            for p in ps.clone() {
                let (j, nr) = w.panel(p);
                for i in 0..parts {
                    let ts = part(count, parts, i);
                    let row: [usize; MAX_MR] = std::array::from_fn(|r| (ts.start + r) * w.v_step());
                    let args = Rows {
                        a: self.v.get(),
                        row: &row[..ts.len()],
                        seg_a: &[e * count * w.v_step()],
                        seg_b: &[e * w.c * w.k + j * w.c],
                        len: w.c,
                        b: u.as_ptr(),
                        // SAFETY: inside M; the lines of these tiles in this panel.
                        out: unsafe { self.m.get().add((e * w.k + j) * count + ts.start * nr) },
                    };
                    // SAFETY: V, U and M cover this position, these tiles and this panel.
                    unsafe { w.kernels.rows(nr, &args) }
                }
            }
        }
    }

    /// Transforms tiles `ts` of the group back and stores them.
    fn output(&self, ts: Range<usize>) {
        let Job { w, y, ep, .. } = *self.job;
        let count = self.tiles.len();
        for t in ts {
            let [image, oh, ow] = self.place(self.tiles.start + t);
            for p in 0..w.panels() {
                let (j, nr) = w.panel(p);
                let at = ((image * w.ho + oh) * w.wo + ow) * w.k + j;
                let plus =
                    |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
                let args = Output {
                    m: self.m.get().wrapping_add(j * count + t * nr),
                    step: count * w.k,
                    len: nr,
                    y: y.get().wrapping_add(at),
                    row_step: w.wo * w.k,
                    pixel_step: w.k,
                    rows: TILE.min(w.ho - oh),
                    cols: TILE.min(w.wo - ow),
                    bias: plus(ep.bias, j),
                    addend: plus(ep.addend, at),
                    relu: ep.activation == Activation::Relu,
                };
                // SAFETY: M holds this tile; this task alone writes these pixels; sizes were checked on entry.
                unsafe { (w.kernels.winograd_output)(&args) }
            }
        }
    }
}
