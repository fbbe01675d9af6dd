// The channels of 2x2 neighbouring pixels side by side, and back: one result element per invocation. h, w, c are those
// of the map that is merged.

struct Params { n: u32, groups_x: u32, h: u32, w: u32, c: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// y[n, i, j, q * c + k] = x[n, 2 i + q % 2, 2 j + q / 2, k], 0 outside
@compute @workgroup_size(64)
fn merge(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let e = (wg.x + wg.y * p.groups_x) * 64u + l;
    if e >= p.n { return; }
    let oh = (p.h + 1u) / 2u;
    let ow = (p.w + 1u) / 2u;
    let k = e % p.c;
    let q = (e / p.c) % 4u;
    let pixel = e / p.c / 4u;
    let j = 2u * (pixel % ow) + q / 2u;
    let i = 2u * ((pixel / ow) % oh) + q % 2u;
    let n = pixel / ow / oh;
    var v = 0.0;
    if i < p.h && j < p.w { v = x[((n * p.h + i) * p.w + j) * p.c + k]; }
    y[e] = v;
}

@compute @workgroup_size(64)
fn merge_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let e = (wg.x + wg.y * p.groups_x) * 64u + l;
    if e >= p.n { return; }
    let j = (e / p.c) % p.w;
    let i = (e / p.c / p.w) % p.h;
    let n = e / p.c / p.w / p.h;
    let at = (n * ((p.h + 1u) / 2u) + i / 2u) * ((p.w + 1u) / 2u) + j / 2u;
    y[e] = x[(4u * at + 2u * (j % 2u) + i % 2u) * p.c + e % p.c];
}
