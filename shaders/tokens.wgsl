// Between patches [N, P, C] and tokens [N, T, C], `first` = T - P learned tokens before the patches.

struct Params { n: u32, groups_x: u32, p: u32, t: u32, c: u32, first: u32, token: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> pos: array<f32>;
@group(0) @binding(4) var<storage, read_write> cls: array<f32>;

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

// y[n, t] = (class token or patch) + pos[t]
@compute @workgroup_size(64)
fn embed(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.c;
    let t = (i / p.c) % p.t;
    var v = pos[t * p.c + c];
    if t < p.first {
        v += cls[t * p.c + c];
    } else {
        v += x[((i / p.c / p.t) * p.p + t - p.first) * p.c + c];
    }
    y[i] = v;
}

// dpatches[n, j] = dy[n, j + first]; x is dy
@compute @workgroup_size(64)
fn patches(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let j = (i / p.c) % p.p;
    y[i] = x[((i / p.c / p.p) * p.t + j + p.first) * p.c + i % p.c];
}

@compute @workgroup_size(64)
fn pick(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    y[i] = x[((i / p.c) * p.t + p.token) * p.c + i % p.c];
}

// dx[n, t] = dy[n] for the picked token, else 0; x is dy
@compute @workgroup_size(64)
fn pick_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    var v = 0.0;
    if (i / p.c) % p.t == p.token { v = x[(i / p.c / p.t) * p.c + i % p.c]; }
    y[i] = v;
}

// y[n] = (x[n, 0], mean of x[n, first..]); a channel per invocation
@compute @workgroup_size(64)
fn cls_mean(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % (2u * p.c);
    let row = (i / p.c / 2u) * p.t;
    if c < p.c {
        y[i] = x[row * p.c + c];
        return;
    }
    var sum = 0.0;
    for (var t = p.first; t < p.t; t++) { sum += x[(row + t) * p.c + c - p.c]; }
    y[i] = sum / f32(p.t - p.first);
}

// dx[n, 0] = dy[n, ..c], dx[n, first..] = dy[n, c..] / patches, 0 between; x is dy
@compute @workgroup_size(64)
fn cls_mean_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let t = (i / p.c) % p.t;
    let row = (i / p.c / p.t) * 2u * p.c + i % p.c;
    var v = 0.0;
    if t == 0u { v = x[row]; }
    if t >= p.first { v += x[row + p.c] / f32(p.t - p.first); }
    y[i] = v;
}
