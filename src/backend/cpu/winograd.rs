//! The transforms of Winograd's F(4x4, 3x3), as Lavin and Gray (2015) give them, over vectors of channels.
//!
//! A 4x4 block of outputs of a 3x3 convolution needs 36 products per channel pair in place of 144:
//! `Y = A^T [ (G g G^T) * (B^T d B) ] A` with the interpolation points 0, 1, -1, 2, -2 and infinity.
//! The weight gradient is the adjoint: `dg = G^T [ (A dY A^T) * (B^T d B) ] G`, summed over blocks before `G`.

use super::simd::Simd;

/// Products per block of outputs: a 6x6 grid of positions.
pub(crate) const POSITIONS: usize = 36;
/// Outputs of a block along each side.
pub(crate) const TILE: usize = 4;

/// `B^T d B` for `c` channels (whole vectors) of the 6x6 pixels `pixel`; position `e` goes to `out[e * step ..]`.
pub(crate) struct Input<'a> {
    pub pixel: &'a [*const f32; POSITIONS],
    pub c: usize,
    pub out: *mut f32,
    pub step: usize,
}

/// `G g G^T` for `len` floats (whole vectors) of the nine taps `w[tap * w_step ..]`.
pub(crate) struct Weights {
    pub w: *const f32,
    pub w_step: usize,
    pub len: usize,
    pub out: *mut f32,
    pub step: usize,
}

/// `A^T m A`, bias, addend and ReLU for `len` channels (whole vectors); `y` and `addend` (null: none) are at the
/// block's first pixel, of which `rows` x `cols` exist.
pub(crate) struct Output {
    pub m: *const f32,
    pub step: usize,
    pub len: usize,
    pub y: *mut f32,
    pub row_step: usize,
    pub pixel_step: usize,
    pub rows: usize,
    pub cols: usize,
    pub bias: *const f32,
    pub addend: *const f32,
    pub relu: bool,
}

#[inline(always)]
unsafe fn input_1d<S: Simd>(d: [S::V; 6]) -> [S::V; 6] {
    // SAFETY: register operations of an instruction set that the caller has.
    unsafe {
        let (two, four, five) = (S::splat(2.0), S::splat(4.0), S::splat(-5.0));
        let (m4, m2) = (S::splat(-4.0), S::splat(-2.0));
        let even = S::fma(m4, d[2], d[4]);
        let odd = S::fma(m4, d[1], d[3]);
        let (p, q) = (S::sub(d[4], d[2]), S::sub(d[3], d[1]));
        [
            S::fma(four, d[0], S::fma(five, d[2], d[4])),
            S::add(even, odd),
            S::sub(even, odd),
            S::fma(two, q, p),
            S::fma(m2, q, p),
            S::fma(four, d[1], S::fma(five, d[3], d[5])),
        ]
    }
}

/// # Safety
/// All pixels have `c` floats, and `out` holds 36 positions.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
pub(crate) unsafe fn input<S: Simd>(t: &Input) {
    for c in (0..t.c).step_by(S::LANES) {
        // SAFETY: the function's contract.
        unsafe {
            let mut rows = [[S::splat(0.0); 6]; 6];
            for j in 0..6 {
                let d = input_1d::<S>(std::array::from_fn(|i| S::load(t.pixel[i * 6 + j].add(c))));
                for i in 0..6 {
                    rows[i][j] = d[i];
                }
            }
            for (i, row) in rows.into_iter().enumerate() {
                for (j, v) in input_1d::<S>(row).into_iter().enumerate() {
                    S::store(t.out.add((i * 6 + j) * t.step + c), v);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn weights_1d<S: Simd>(g: [S::V; 3]) -> [S::V; 6] {
    // SAFETY: as `input_1d`.
    unsafe {
        let (quarter, sixth, m6) = (S::splat(0.25), S::splat(1.0 / 6.0), S::splat(-1.0 / 6.0));
        let m24 = S::splat(1.0 / 24.0);
        let (twelfth, m12) = (S::splat(1.0 / 12.0), S::splat(-1.0 / 12.0));
        let outer = S::mul(m6, S::add(g[0], g[2]));
        let slope = S::fma(sixth, g[2], S::mul(m24, g[0]));
        [
            S::mul(quarter, g[0]),
            S::fma(m6, g[1], outer),
            S::fma(sixth, g[1], outer),
            S::fma(twelfth, g[1], slope),
            S::fma(m12, g[1], slope),
            g[2],
        ]
    }
}

/// # Safety
/// All taps have `len` floats, and `out` holds 36 positions.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
pub(crate) unsafe fn weights<S: Simd>(t: &Weights) {
    for c in (0..t.len).step_by(S::LANES) {
        // SAFETY: the function's contract.
        unsafe {
            let mut rows = [[S::splat(0.0); 3]; 6];
            for j in 0..3 {
                let g = weights_1d::<S>(std::array::from_fn(|i| {
                    S::load(t.w.add((i * 3 + j) * t.w_step + c))
                }));
                for i in 0..6 {
                    rows[i][j] = g[i];
                }
            }
            for (i, row) in rows.into_iter().enumerate() {
                for (j, v) in weights_1d::<S>(row).into_iter().enumerate() {
                    S::store(t.out.add((i * 6 + j) * t.step + c), v);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn output_1d<S: Simd>(m: [S::V; 6]) -> [S::V; 4] {
    // SAFETY: as `input_1d`.
    unsafe {
        let (a, b) = (S::add(m[1], m[2]), S::sub(m[1], m[2]));
        let (c, d) = (S::add(m[3], m[4]), S::sub(m[3], m[4]));
        [
            S::add(S::add(m[0], a), c),
            S::fma(S::splat(2.0), d, b),
            S::fma(S::splat(4.0), c, a),
            S::add(S::fma(S::splat(8.0), d, b), m[5]),
        ]
    }
}

/// # Safety
/// `m` holds 36 positions of `len` floats; the `rows` x `cols` pixels of `y` and `addend`, and `bias`, have `len`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
pub(crate) unsafe fn output<S: Simd>(t: &Output) {
    for c in (0..t.len).step_by(S::LANES) {
        // SAFETY: the function's contract.
        unsafe {
            let mut rows = [[S::splat(0.0); 6]; 4];
            for j in 0..6 {
                let m = output_1d::<S>(std::array::from_fn(|i| {
                    S::load(t.m.add((i * 6 + j) * t.step + c))
                }));
                for i in 0..4 {
                    rows[i][j] = m[i];
                }
            }
            let bias = if t.bias.is_null() {
                S::splat(0.0)
            } else {
                S::load(t.bias.add(c))
            };
            for (i, row) in rows.into_iter().enumerate().take(t.rows) {
                for (j, v) in output_1d::<S>(row).into_iter().enumerate().take(t.cols) {
                    let at = i * t.row_step + j * t.pixel_step + c;
                    let mut v = S::add(v, bias);
                    if !t.addend.is_null() {
                        v = S::add(v, S::load(t.addend.add(at)));
                    }
                    if t.relu {
                        v = S::max(S::splat(0.0), v);
                    }
                    S::store(t.y.add(at), v);
                }
            }
        }
    }
}

/// The gradient of the products, `A dY A^T`, for `c` channels (whole vectors) of a block of 4x4 output gradients.
pub(crate) struct OutputGrad<'a> {
    pub pixel: &'a [*const f32; TILE * TILE],
    pub c: usize,
    pub out: *mut f32,
    pub step: usize,
}

/// The gradient of the taps, `G^T dU G`, for `len` floats (whole vectors); tap `t` goes to `dw[t * tap_step ..]`.
pub(crate) struct WeightsGrad {
    pub u: *const f32,
    pub step: usize,
    pub len: usize,
    pub dw: *mut f32,
    pub tap_step: usize,
    pub accumulate: bool,
}

#[inline(always)]
unsafe fn output_grad_1d<S: Simd>(d: [S::V; 4]) -> [S::V; 6] {
    // SAFETY: as `input_1d`.
    unsafe {
        let (even, odd) = (S::add(d[0], d[2]), S::add(d[1], d[3]));
        let even2 = S::fma(S::splat(4.0), d[2], d[0]);
        let odd2 = S::fma(S::splat(8.0), d[3], S::add(d[1], d[1]));
        [
            d[0],
            S::add(even, odd),
            S::sub(even, odd),
            S::add(even2, odd2),
            S::sub(even2, odd2),
            d[3],
        ]
    }
}

/// # Safety
/// All pixels have `c` floats, and `out` holds 36 positions.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
pub(crate) unsafe fn output_grad<S: Simd>(t: &OutputGrad) {
    for c in (0..t.c).step_by(S::LANES) {
        // SAFETY: the function's contract.
        unsafe {
            let mut rows = [[S::splat(0.0); 4]; 6];
            for j in 0..4 {
                let d = output_grad_1d::<S>(std::array::from_fn(|i| {
                    S::load(t.pixel[i * 4 + j].add(c))
                }));
                for i in 0..6 {
                    rows[i][j] = d[i];
                }
            }
            for (i, row) in rows.into_iter().enumerate() {
                for (j, v) in output_grad_1d::<S>(row).into_iter().enumerate() {
                    S::store(t.out.add((i * 6 + j) * t.step + c), v);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn weights_grad_1d<S: Simd>(u: [S::V; 6]) -> [S::V; 3] {
    // SAFETY: as `input_1d`.
    unsafe {
        let (a, b) = (S::add(u[1], u[2]), S::sub(u[2], u[1]));
        let (c, d) = (S::add(u[3], u[4]), S::sub(u[3], u[4]));
        let m6 = S::splat(-1.0 / 6.0);
        let sixth = S::splat(1.0 / 6.0);
        [
            S::fma(
                S::splat(0.25),
                u[0],
                S::fma(S::splat(1.0 / 24.0), c, S::mul(m6, a)),
            ),
            S::fma(S::splat(1.0 / 12.0), d, S::mul(sixth, b)),
            S::fma(sixth, S::sub(c, a), u[5]),
        ]
    }
}

/// # Safety
/// `u` holds 36 positions and `dw` nine taps of `len` floats.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
pub(crate) unsafe fn weights_grad<S: Simd>(t: &WeightsGrad) {
    for c in (0..t.len).step_by(S::LANES) {
        // SAFETY: the function's contract.
        unsafe {
            let mut rows = [[S::splat(0.0); 6]; 3];
            for j in 0..6 {
                let u = weights_grad_1d::<S>(std::array::from_fn(|i| {
                    S::load(t.u.add((i * 6 + j) * t.step + c))
                }));
                for i in 0..3 {
                    rows[i][j] = u[i];
                }
            }
            for (i, row) in rows.into_iter().enumerate() {
                for (j, v) in weights_grad_1d::<S>(row).into_iter().enumerate() {
                    let at = t.dw.add((i * 3 + j) * t.tap_step + c);
                    S::store(
                        at,
                        if t.accumulate {
                            S::add(S::load(at), v)
                        } else {
                            v
                        },
                    );
                }
            }
        }
    }
}
