// Max pooling, global average pooling and the option A shortcut over [N, H, W, C], forward and backward: one result
// element per invocation, a gather in both directions.

struct Params {
    n: u32, groups_x: u32, h: u32, w: u32,
    c: u32, oh: u32, ow: u32, kernel: u32,
    stride: u32, pad: u32, c_out: u32, scale: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> arg: array<u32>;

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

// By bits: WGSL lets a compiler assume that there is no NaN.
fn is_nan(v: f32) -> bool {
    return (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u;
}

// The first of equal maxima wins and the last NaN, as in PyTorch.
@compute @workgroup_size(64)
fn max_pool(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.c;
    let q = (i / p.c) % p.ow;
    let o = (i / p.c / p.ow) % p.oh;
    let image = (i / p.c / p.ow / p.oh) * p.h * p.w;
    var best = 0.0;
    var at = 0xffffffffu;
    for (var r = 0u; r < p.kernel; r++) {
        let yy = o * p.stride + r - p.pad; // wraps below zero, and then is not below h
        if yy >= p.h { continue; }
        for (var s = 0u; s < p.kernel; s++) {
            let xx = q * p.stride + s - p.pad;
            if xx >= p.w { continue; }
            let pixel = yy * p.w + xx;
            let v = x[(image + pixel) * p.c + c];
            if at == 0xffffffffu || is_nan(v) || (v > best && !is_nan(best)) {
                best = v;
                at = pixel;
            }
        }
    }
    y[i] = best;
    arg[i] = at;
}

// x is dy, y is dx: the sum of dy over the windows whose argmax is this pixel.
@compute @workgroup_size(64)
fn max_pool_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.c;
    let col = (i / p.c) % p.w;
    let row = (i / p.c / p.w) % p.h;
    let image = (i / p.c / p.w / p.h) * p.oh * p.ow;
    let pixel = row * p.w + col;
    let o1 = min((row + p.pad) / p.stride + 1u, p.oh);
    let q1 = min((col + p.pad) / p.stride + 1u, p.ow);
    let o0 = (max(row + p.pad + p.stride, p.kernel) - p.kernel) / p.stride;
    let q0 = (max(col + p.pad + p.stride, p.kernel) - p.kernel) / p.stride;
    var sum = 0.0;
    for (var o = o0; o < o1; o++) {
        for (var q = q0; q < q1; q++) {
            let at = (image + o * p.ow + q) * p.c + c;
            if arg[at] == pixel { sum += x[at]; }
        }
    }
    y[i] = sum;
}

// y[n, c] = scale * sum over the h pixels of x[n, :, c].
@compute @workgroup_size(64)
fn average(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let at = (i / p.c) * p.h * p.c + i % p.c;
    var sum = 0.0;
    for (var j = 0u; j < p.h; j++) { sum += x[at + j * p.c]; }
    y[i] = sum * p.scale;
}

// dx[n, :, c] = scale * dy[n, c]; x is dy, y is dx.
@compute @workgroup_size(64)
fn average_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    y[i] = p.scale * x[(i / p.c / p.h) * p.c + i % p.c];
}

// Every stride-th pixel, zero channels around: c channels in, c_out out.
@compute @workgroup_size(64)
fn subsample(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.c_out - (p.c_out - p.c) / 2u; // wraps below the first channel
    let q = (i / p.c_out) % p.ow;
    let o = (i / p.c_out / p.ow) % p.oh;
    let n = i / p.c_out / p.ow / p.oh;
    var v = 0.0;
    if c < p.c { v = x[((n * p.h + o * p.stride) * p.w + q * p.stride) * p.c + c]; }
    y[i] = v;
}

@compute @workgroup_size(64)
fn subsample_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.c + (p.c_out - p.c) / 2u;
    let col = (i / p.c) % p.w;
    let row = (i / p.c / p.w) % p.h;
    let n = i / p.c / p.w / p.h;
    var v = 0.0;
    if row % p.stride == 0u && col % p.stride == 0u {
        v = x[((n * p.oh + row / p.stride) * p.ow + col / p.stride) * p.c_out + c];
    }
    y[i] = v;
}
