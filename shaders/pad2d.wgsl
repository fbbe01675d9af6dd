// Zeros at the bottom and at the right of [N, H, W, C], or what lies there cut off: one result element per invocation.

struct Params { n: u32, groups_x: u32, h: u32, w: u32, oh: u32, ow: u32, c: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn pad(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let e = (wg.x + wg.y * p.groups_x) * 64u + l;
    if e >= p.n { return; }
    let c = e % p.c;
    let j = (e / p.c) % p.ow;
    let i = (e / p.c / p.ow) % p.oh;
    let n = e / p.c / p.ow / p.oh;
    var v = 0.0;
    if i < p.h && j < p.w { v = x[((n * p.h + i) * p.w + j) * p.c + c]; }
    y[e] = v;
}
