// GEMM kernels for GPUs, and for shapes that the lane kernels do not take: 64 x 64 tiles of the result by 256
// invocations, 4 x 4 each, over slabs of 16 in workgroup memory (8.5 KB). Any shape, any group count.
// MODE 0 fprop: [pixels, K] = x * w; 1 dgrad: [input pixels of a class, C] = dy * w; 2 wgrad: [K, RSC] = dy * x.

//#const MODE 0
//#const T f32
//#const I i32
//#const U u32
//#include "math.wgsl"
//#include "gemm.wgsl"


@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> addend: array<f32>;
@group(0) @binding(6) var<storage, read_write> pre: array<f32>;

const SLAB = 16u;
const PITCH = 68u;
var<workgroup> ta: array<f32, 16 * 68>;
var<workgroup> tb: array<f32, 16 * 68>;

fn fetch_x(n: u32, oy: u32, ox: u32, r: u32, s: u32, channel: u32) -> f32 {
    let yy = i32(oy * p.sh + r) - i32(p.ph);
    let xx = i32(ox * p.sw + s) - i32(p.pw);
    if yy < 0 || xx < 0 || u32(yy) >= p.h || u32(xx) >= p.w { return 0.0; }
    return x[((n * p.h + u32(yy)) * p.w + u32(xx)) * p.ct + channel];
}

// Element of the left matrix: row m, position k of the sum.
fn left(group: u32, m: u32, k: u32) -> f32 {
    if MODE == 0 {
        let tap = k / p.c;
        let t = m / p.q;
        return fetch_x(t / p.p, t % p.p, m % p.q, tap / p.s, tap % p.s, group * p.c + k % p.c);
    }
    if MODE == 1 {
        let taps_s = (p.s - p.s0 + p.sw - 1u) / p.sw;
        let tap = k / p.k;
        let t = m / p.wc;
        let oy = i32(t % p.hc) + p.oy - i32(tap / taps_s);
        let ox = i32(m % p.wc) + p.ox - i32(tap % taps_s);
        if oy < 0 || ox < 0 || u32(oy) >= p.p || u32(ox) >= p.q { return 0.0; }
        return x[(((t / p.hc) * p.p + u32(oy)) * p.q + u32(ox)) * p.kt + group * p.k + k % p.k];
    }
    return w[k * p.kt + group * p.k + m];
}

// Element of the right matrix: position k of the sum, column n.
fn right(group: u32, k: u32, n: u32) -> f32 {
    if MODE == 0 {
        return w[(group * p.k + n) * (p.r * p.s * p.c) + k];
    }
    if MODE == 1 {
        let taps_s = (p.s - p.s0 + p.sw - 1u) / p.sw;
        let tap = k / p.k;
        let r = p.r0 + (tap / taps_s) * p.sh;
        let s = p.s0 + (tap % taps_s) * p.sw;
        return w[(((group * p.k + k % p.k) * p.r + r) * p.s + s) * p.c + n];
    }
    let tap = n / p.c;
    let t = k / p.q;
    return fetch_x(t / p.p, t % p.p, k % p.q, tap / p.s, tap % p.s, group * p.c + n % p.c);
}

@compute @workgroup_size(256)
fn tile(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    var m0 = row_tile(wg) * 64u;
    var group = wg.z / p.tiles;
    var n0 = (wg.z % p.tiles) * 64u;
    var rows = p.rows;
    var columns = p.k;
    var start = 0u;
    var stop = p.r * p.s * p.c;
    if MODE == 1 {
        columns = p.c;
        // A class that no tap reaches (stride over the kernel) has an empty sum.
        stop = 0u;
        if p.r0 < p.r && p.s0 < p.s {
            stop = ((p.r - p.r0 + p.sh - 1u) / p.sh) * ((p.s - p.s0 + p.sw - 1u) / p.sw) * p.k;
        }
    }
    if MODE == 2 {
        m0 = (wg.y % p.k_tiles) * 64u;
        group = wg.y / p.k_tiles;
        n0 = wg.x * 64u;
        rows = p.k;
        columns = p.r * p.s * p.c;
        start = wg.z * p.per_split;
        stop = min(start + p.per_split, p.pixels);
    }
    let tx = l % 16u;
    let ty = l / 16u;
    var acc: array<vec4<f32>, 4>;
    for (var i = 0u; i < 4u; i++) { acc[i] = vec4(0.0); }
    for (var k0 = start; k0 < stop; k0 += SLAB) {
        for (var i = 0u; i < 4u; i++) {
            let e = l + i * 256u;
            // Neighbouring invocations read neighbouring addresses: along the sum, or along rows and columns.
            var km = e % 16u;
            var mm = e / 16u;
            var kn = e % 16u;
            var nn = e / 16u;
            if MODE == 2 { km = e / 64u; mm = e % 64u; }
            if MODE != 0 { kn = e / 64u; nn = e % 64u; }
            var a = 0.0;
            if m0 + mm < rows && k0 + km < stop { a = left(group, m0 + mm, k0 + km); }
            var b = 0.0;
            if n0 + nn < columns && k0 + kn < stop { b = right(group, k0 + kn, n0 + nn); }
            ta[km * PITCH + mm] = a;
            tb[kn * PITCH + nn] = b;
        }
        workgroupBarrier();
        for (var k = 0u; k < SLAB; k++) {
            let at = k * PITCH;
            let b = vec4(tb[at + tx * 4u], tb[at + tx * 4u + 1u], tb[at + tx * 4u + 2u], tb[at + tx * 4u + 3u]);
            for (var i = 0u; i < 4u; i++) {
                acc[i] = fma(vec4(ta[at + ty * 4u + i]), b, acc[i]);
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i++) {
        let m = m0 + ty * 4u + i;
        if m >= rows { continue; }
        for (var j = 0u; j < 4u; j++) {
            let n = n0 + tx * 4u + j;
            if n >= columns { continue; }
            var v = acc[i][j];
            if MODE == 2 {
                y[((p.part0 + wg.z) * p.kt + group * p.k + m) * columns + n] = v;
                continue;
            }
            var at = m * p.kt + group * p.k + n;
            if MODE == 1 {
                let t = m / p.wc;
                let pixel = ((t / p.hc) * p.h + (t % p.hc) * p.sh + p.cy) * p.w + (m % p.wc) * p.sw + p.cx;
                at = pixel * p.ct + group * p.c + n;
            }
            if (p.flags & 1u) != 0u { v += bias[group * p.k + n]; }
            if (p.flags & 2u) != 0u { v += addend[at]; }
            if (p.flags & 4u) != 0u { pre[at] = v; }
            y[at] = act_value(p.act, v);
        }
    }
}
