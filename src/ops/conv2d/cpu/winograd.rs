//! 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3): a quarter of the products, at the price of transforms.
//!
//! Blocks of 4x4 outputs ("tiles") are taken in groups. A group's inputs are transformed to `V[36][tile][C]`, multiplied
//! with the transformed weights `U[36][panel][C][nr]` to `M[36][panel][tile][nr]`, and transformed back with the
//! epilogue. The weight gradient transforms inputs and output gradients, sums their products over tiles in groups that
//! the shape fixes, and transforms the sums. With many tiles each task takes groups of its own, which fit in L2; with
//! few, all threads share one group and take the three steps together; where the weights are larger than the inputs,
//! each task takes output channels of its own. The same sums are made either way, so the bits do not depend on the
//! threads.
//!
//! The relative error (L2) is about 1e-6, some times that of direct summation.

use super::blocks::trim;
use crate::backend::cpu::kernel::{Kernels, MAX_MR, MAX_NR, Outer, Rows};
use crate::backend::cpu::parallel::{Shared, for_each, parallel_for, part};
use crate::backend::cpu::scratch::{with_floats, with_indices};
use crate::backend::cpu::winograd::{
    Input, Output, OutputGrad, POSITIONS, TILE, Weights, WeightsGrad,
};
use crate::backend::cpu::{Finish, RawEpilogue};
use crate::ops::act::Act;
use crate::ops::conv2d::shape::{Algorithm, ConvShape, Pass};
use std::ops::Range;

/// Floats of V and M that a task keeps in its L2 cache.
const GROUP_FLOATS: usize = 192 * 1024;
/// Floats of V and M that all threads share.
const SHARED_FLOATS: usize = 3 * 1024 * 1024;
/// Channel pairs up to which the weight gradient has partial sums, which fit in L2 beside a group.
const PARTIAL_PAIRS: usize = 64 * 64;
/// Partial sums of the weight gradient, at most.
const PARTIALS: usize = 8;

/// A 3x3 convolution of stride 1, from `[n, h, w, c]` to `[n, ho, wo, k]`.
pub(super) struct Winograd {
    kernels: &'static Kernels,
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    k: usize,
    algorithm: Algorithm,
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
            algorithm,
            ..
        } = *s;
        (whole && vectors && pad[0] <= 2 && pad[1] <= 2).then_some(Winograd {
            kernels,
            n,
            h,
            w,
            c,
            k,
            algorithm,
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

    /// For this pass of `s`, if it is asked for or faster than direct summation.
    pub fn chosen(kernels: &'static Kernels, s: &ConvShape, pass: Pass) -> Option<Self> {
        let job = match pass {
            Pass::Dgrad => Self::dgrad(kernels, s),
            Pass::Fprop | Pass::Wgrad => Self::fprop(kernels, s),
        };
        job.filter(|w| match w.algorithm {
            Algorithm::Auto => w.wins(pass),
            Algorithm::Winograd => true,
            Algorithm::ImplicitGemm => false,
        })
    }

    /// Compares vector operations, with the transforms' as measured: those of the weights cost what it takes to move
    /// their 36 positions, in the gradient of the weights to memory and back.
    fn wins(&self, pass: Pass) -> bool {
        let [c, k] = [self.c, self.k].map(|v| v / self.kernels.lanes);
        let direct = self.n * self.ho * self.wo * 9 * self.c * k;
        let inputs_and_outputs = self.tiles() * (250 * c + 200 * k);
        let products = self.tiles() * POSITIONS * self.c * k;
        let weights = self.c * k * if pass == Pass::Wgrad { 1650 } else { 500 };
        5 * (products + inputs_and_outputs) + 4 * weights < 4 * direct
    }

    /// Floating-point operations of the products over channels.
    pub fn products(&self) -> u64 {
        2 * (self.tiles() * POSITIONS * self.c * self.k) as u64
    }

    /// Floats between two tiles in V; not a power of two, so that tiles do not share the sets of a cache.
    fn v_step(&self) -> usize {
        self.c + 16
    }

    /// `y = epilogue(conv(x))` with the weights packed as for direct summation, `[panel][(r, s, c)][nr]`.
    pub fn run(&self, x: &[f32], packed: &[f32], ep: RawEpilogue, y: &mut [f32]) {
        debug_assert!(matches!(ep.act, None | Some(Act::Relu)));
        let y = Shared::new(y);
        with_floats(self.c, |zeros| {
            zeros.fill(0.0);
            let job = Job {
                w: self,
                x,
                u: &[],
                cols: 0..self.k,
                zeros,
                y,
                ep,
            };
            if self.weights_prevail() {
                self.run_by_panels(packed, &job);
            } else {
                with_floats(POSITIONS * self.c * self.k, |u| {
                    self.transform_weights(packed, 0..self.panels(), u);
                    self.run_by_tiles(&Job { u, ..job });
                });
            }
        });
    }

    /// Whether U is larger than V, and there are panels for every thread to have some.
    fn weights_prevail(&self) -> bool {
        let v = self.tiles() * self.v_step();
        v < self.c * self.k
            && POSITIONS * v <= SHARED_FLOATS
            && self.panels() >= 2 * rayon::current_num_threads()
    }

    /// The inputs of all tiles first; then each task takes a panel of output channels, whose transformed weights are
    /// used where they were made and never travel to memory.
    fn run_by_panels(&self, packed: &[f32], job: &Job) {
        let count = self.tiles();
        with_floats(count * POSITIONS * self.v_step(), |v| {
            let group = Group {
                job,
                tiles: 0..count,
                v: Shared::new(v),
                m: Shared::at(std::ptr::null_mut()),
            };
            let parts = count.min(8 * rayon::current_num_threads());
            parallel_for(parts, |i| group.input(part(count, parts, i)));
            parallel_for(self.panels(), |p| {
                let (j, nr) = self.panel(p);
                with_floats(POSITIONS * (self.c + count) * nr, |um| {
                    let (u, m) = um.split_at_mut(POSITIONS * self.c * nr);
                    self.transform_weights(packed, p..p + 1, u);
                    let group = Group {
                        job: &Job {
                            u,
                            cols: j..j + nr,
                            ..job.clone()
                        },
                        tiles: 0..count,
                        v: group.v,
                        m: Shared::new(m),
                    };
                    group.products(0..POSITIONS, p..p + 1);
                    group.output(0..count, p..p + 1);
                });
            });
        });
    }

    /// With many tiles each task takes groups of its own; with few, all threads share one group.
    fn run_by_tiles(&self, job: &Job) {
        let tiles = self.tiles();
        let floats = POSITIONS * (self.v_step() + self.k);
        let mr = self.kernels.mr();
        let threads = rayon::current_num_threads();
        let panels = self.panels();
        let own = (GROUP_FLOATS / floats / mr * mr).max(2 * mr);
        if threads == 1 || tiles >= 3 * threads * own {
            let groups = tiles.div_ceil(own);
            parallel_for(groups, |g| {
                let tiles = part(tiles, groups, g);
                with_floats(tiles.len() * floats, |vm| {
                    let (v, m) = vm.split_at_mut(tiles.len() * POSITIONS * self.v_step());
                    let group = Group {
                        job,
                        tiles: tiles.clone(),
                        v: Shared::new(v),
                        m: Shared::new(m),
                    };
                    group.input(0..tiles.len());
                    group.products(0..POSITIONS, 0..panels);
                    group.output(0..tiles.len(), 0..panels);
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
                    job,
                    tiles,
                    v: Shared::new(v),
                    m: Shared::new(m),
                };
                let parts = count.min(8 * threads);
                let panel_parts = (8 * threads).div_ceil(POSITIONS).min(panels);
                parallel_for(parts, |i| group.input(part(count, parts, i)));
                parallel_for(POSITIONS * panel_parts, |i| {
                    let e = i / panel_parts;
                    group.products(e..e + 1, part(panels, panel_parts, i % panel_parts));
                });
                parallel_for(parts, |i| group.output(part(count, parts, i), 0..panels));
            });
        }
    }

    fn panels(&self) -> usize {
        self.k.div_ceil(self.kernels.nr())
    }

    /// First column and width of panel `p`.
    fn panel(&self, p: usize) -> (usize, usize) {
        let j = p * self.kernels.nr();
        (j, self.kernels.panel(self.k, j))
    }

    /// `U[36][panel][C][nr]` of these panels from `[panel][(r, s, c)][nr]` of all.
    fn transform_weights(&self, packed: &[f32], panels: Range<usize>, u: &mut [f32]) {
        const CHANNELS: usize = 16;
        let step = u.len() / POSITIONS;
        let first = panels.start * self.kernels.nr();
        let u = Shared::new(u);
        let blocks = self.c.div_ceil(CHANNELS);
        for_each(panels.len() > 1, panels.len() * blocks, |i| {
            let (j, nr) = self.panel(panels.start + i / blocks);
            let c = i % blocks * CHANNELS;
            let args = Weights {
                w: packed[(9 * j) * self.c + c * nr..].as_ptr(),
                w_step: self.c * nr,
                len: CHANNELS.min(self.c - c) * nr,
                // SAFETY: inside U; this task alone writes these channels of this panel.
                out: unsafe { u.get().add((j - first) * self.c + c * nr) },
                step,
            };
            // SAFETY: nine taps of this panel, and 36 positions.
            unsafe { (self.kernels.winograd_weights)(&args) }
        });
    }

    /// `dw[K, 3, 3, C]` from `x` and `dy`, of the forward pass `self`.
    pub fn wgrad(&self, x: &[f32], dy: &[f32], dw: &mut [f32], accumulate: bool) {
        let [c, k, tiles] = [self.c, self.k, self.tiles()];
        let total = POSITIONS * c * k;
        // Partial sums and groups depend on the shape alone, so the sums do not depend on the number of threads.
        let partials = if c * k > PARTIAL_PAIRS {
            1
        } else {
            tiles.div_ceil(64).min(PARTIALS)
        };
        with_floats(partials * total, |u| {
            let shared = Shared::new(u);
            if partials == 1 {
                self.sum_products(x, dy, 0..tiles, true, shared.get());
            } else {
                parallel_for(partials, |p| {
                    // SAFETY: this task alone writes these sums.
                    let u = unsafe { shared.get().add(p * total) };
                    self.sum_products(x, dy, part(tiles, partials, p), false, u);
                });
                let (first, rest) = u.split_at_mut(total);
                let first = Shared::new(first);
                let pieces = total.div_ceil(8192);
                parallel_for(pieces, |i| {
                    let range = part(total, pieces, i);
                    // SAFETY: this task alone writes this range.
                    let sums = unsafe {
                        std::slice::from_raw_parts_mut(first.get().add(range.start), range.len())
                    };
                    for u in rest.chunks_exact(total) {
                        let u = &u[range.clone()];
                        sums.iter_mut().zip(u).for_each(|(s, v)| *s += v);
                    }
                });
            }
            let u = &u[..total];
            let dw = Shared::new(dw);
            parallel_for(k, |k_at| {
                let args = WeightsGrad {
                    u: u[k_at * c..].as_ptr(),
                    step: k * c,
                    len: c,
                    dw: dw.get().wrapping_add(k_at * 9 * c),
                    tap_step: c,
                    accumulate,
                };
                // SAFETY: this task alone writes this output channel's taps.
                unsafe { (self.kernels.winograd_weights_grad)(&args) }
            });
        });
    }

    /// `u[36][K][C]`: the products of transformed output gradients and inputs, summed over `tiles` in order.
    fn sum_products(
        &self,
        x: &[f32],
        dy: &[f32],
        tiles: Range<usize>,
        parallel: bool,
        u: *mut f32,
    ) {
        let kernels = self.kernels;
        let [c, k] = [self.c, self.k];
        let (v_step, d_step) = (self.v_step(), k + 16);
        let fit = if parallel {
            SHARED_FLOATS
        } else {
            GROUP_FLOATS
        } / (POSITIONS * (v_step + d_step));
        let groups = tiles.len().div_ceil(fit.max(32));
        let most = tiles.len().div_ceil(groups);
        let u = Shared::at(u);
        with_floats(POSITIONS * most * (v_step + d_step) + c.max(k), |scratch| {
            let (v, scratch) = scratch.split_at_mut(POSITIONS * most * v_step);
            let (d, zeros) = scratch.split_at_mut(POSITIONS * most * d_step);
            zeros.fill(0.0);
            let (v, d) = (Shared::new(v), Shared::new(d));
            with_indices(most, |b_row| {
                b_row
                    .iter_mut()
                    .enumerate()
                    .for_each(|(t, b)| *b = t * v_step);
                for g in 0..groups {
                    let group = part(tiles.len(), groups, g);
                    let count = group.len();
                    for_each(parallel, count, |t| {
                        let tile = tiles.start + group.start + t;
                        let pixel = self.pixels(x, zeros, tile);
                        let out = v.get().wrapping_add(t * v_step);
                        let args = Input {
                            pixel: &pixel,
                            c,
                            out,
                            step: count * v_step,
                        };
                        // SAFETY: every pixel has c floats; this tile's lines of V have 36 positions.
                        unsafe { (kernels.winograd_input)(&args) }
                        let pixel = self.output_pixels(dy, zeros, tile);
                        let out = d.get().wrapping_add(t * d_step);
                        let args = OutputGrad {
                            pixel: &pixel,
                            c: k,
                            out,
                            step: count * d_step,
                        };
                        // SAFETY: as above, for k floats and D.
                        unsafe { (kernels.winograd_output_grad)(&args) }
                    });
                    for_each(parallel, POSITIONS, |e| {
                        let d = d.get().wrapping_add(e * count * d_step);
                        let v = v.get().wrapping_add(e * count * v_step);
                        let u = u.get().wrapping_add(e * k * c);
                        // SAFETY: V and D hold this position of these tiles, and only this task writes it in U.
                        unsafe { self.position(d, v, &b_row[..count], u, g > 0) }
                    });
                }
            });
        });
    }

    /// `u[K, C] (+)= d^T v` for one position, over the tiles at `b_row`.
    ///
    /// # Safety
    /// `d` and `v` hold these tiles, and nobody else uses `u`.
    unsafe fn position(
        &self,
        d: *const f32,
        v: *const f32,
        b_row: &[usize],
        u: *mut f32,
        accumulate: bool,
    ) {
        let [c, k] = [self.c, self.k];
        let parts = k.div_ceil(self.kernels.mr());
        let mut tile = [0.0f32; MAX_MR * MAX_NR];
        let mut j = 0;
        while j < c {
            let nr = self.kernels.panel(c, j);
            for i in 0..parts {
                let ks = part(k, parts, i);
                let args = Outer {
                    a: d.wrapping_add(ks.start),
                    a_step: k + 16,
                    b: v.wrapping_add(j),
                    b_row,
                    out: tile.as_mut_ptr(),
                };
                let row: [usize; MAX_MR] = std::array::from_fn(|i| (ks.start + i) * c);
                let store = Finish {
                    tile: tile.as_ptr(),
                    nr,
                    row: &row[..ks.len()],
                    col: j,
                    cols: nr,
                    c: u,
                    accumulate,
                    ep: RawEpilogue::PLAIN,
                };
                // SAFETY: the function's contract; `c` is a whole number of vectors.
                unsafe {
                    self.kernels.outer(ks.len(), nr, &args);
                    self.kernels.finish(&store);
                }
            }
            j += nr;
        }
    }

    /// The 4x4 output pixels of a tile; `zeros` stands for those beyond the image.
    fn output_pixels(&self, dy: &[f32], zeros: &[f32], tile: usize) -> [*const f32; TILE * TILE] {
        let [image, oh, ow] = self.place(tile);
        std::array::from_fn(|e| {
            let (h, w) = (oh + e / TILE, ow + e % TILE);
            if h < self.ho && w < self.wo {
                dy[((image * self.ho + h) * self.wo + w) * self.k..].as_ptr()
            } else {
                zeros.as_ptr()
            }
        })
    }

    /// Image and first output row and column of a tile.
    fn place(&self, tile: usize) -> [usize; 3] {
        let [th, tw] = self.tiles_of_image();
        [tile / (th * tw), tile / tw % th * TILE, tile % tw * TILE]
    }

    /// The 6x6 input pixels under a tile; `zeros` stands for those in the padding.
    fn pixels(&self, x: &[f32], zeros: &[f32], tile: usize) -> [*const f32; POSITIONS] {
        let [image, oh, ow] = self.place(tile);
        std::array::from_fn(|e| {
            let h = (oh + e / 6)
                .checked_sub(self.pad[0])
                .filter(|&h| h < self.h);
            let w = (ow + e % 6)
                .checked_sub(self.pad[1])
                .filter(|&w| w < self.w);
            match (h, w) {
                (Some(h), Some(w)) => x[((image * self.h + h) * self.w + w) * self.c..].as_ptr(),
                _ => zeros.as_ptr(),
            }
        })
    }
}

#[derive(Clone)]
struct Job<'a> {
    w: &'a Winograd,
    x: &'a [f32],
    /// Transformed weights of the output channels `cols`.
    u: &'a [f32],
    cols: Range<usize>,
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
    /// Transforms the inputs of tiles `ts` of the group.
    fn input(&self, ts: Range<usize>) {
        let Job { w, x, zeros, .. } = self.job;
        for t in ts {
            let pixel = w.pixels(x, zeros, self.tiles.start + t);
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
        let Job { w, u, cols, .. } = self.job;
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
                        seg_b: &[(e * cols.len() + j - cols.start) * w.c],
                        len: w.c,
                        b: u.as_ptr(),
                        // SAFETY: inside M; the lines of these tiles in this panel.
                        out: unsafe { self.m(e, j, ts.start * nr) },
                    };
                    // SAFETY: V, U and M cover this position, these tiles and this panel.
                    unsafe { w.kernels.rows(nr, &args) }
                }
            }
        }
    }

    /// Where `M[36][panel][tile][nr]` has position `e` of the panel that begins at column `j`, and `at` floats on.
    ///
    /// # Safety
    /// M has them.
    unsafe fn m(&self, e: usize, j: usize, at: usize) -> *mut f32 {
        let cols = &self.job.cols;
        // SAFETY: the function's contract.
        unsafe {
            let line = e * cols.len() + j - cols.start;
            self.m.get().add(line * self.tiles.len() + at)
        }
    }

    /// Transforms tiles `ts` of the group back and stores them, for the panels `ps`.
    fn output(&self, ts: Range<usize>, ps: Range<usize>) {
        let Job { w, y, ep, cols, .. } = self.job;
        let count = self.tiles.len();
        for t in ts {
            let [image, oh, ow] = w.place(self.tiles.start + t);
            for p in ps.clone() {
                let (j, nr) = w.panel(p);
                let at = ((image * w.ho + oh) * w.wo + ow) * w.k + j;
                let plus =
                    |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
                let args = Output {
                    // SAFETY: the line of this tile in this panel.
                    m: unsafe { self.m(0, j, t * nr) },
                    step: count * cols.len(),
                    len: nr,
                    y: y.get().wrapping_add(at),
                    row_step: w.wo * w.k,
                    pixel_step: w.k,
                    rows: TILE.min(w.ho - oh),
                    cols: TILE.min(w.wo - ow),
                    bias: plus(ep.bias, j),
                    addend: plus(ep.addend, at),
                    relu: ep.act == Some(Act::Relu),
                };
                // SAFETY: M holds this tile; this task alone writes these pixels; sizes were checked on entry.
                unsafe { (w.kernels.winograd_output)(&args) }
            }
        }
    }
}
