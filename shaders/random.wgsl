// Dropout per element and drop path per sample; rng = (seed low, seed high, step, 0).

//#include "philox.wgsl"

struct Params { n: u32, groups_x: u32, id: u32, p: f32, scale: f32, first: u32, width: u32, residual: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> rng: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> old: array<f32>;
@group(0) @binding(1) var<storage, read_write> x4: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y4: array<vec4<f32>>;

fn draw(block: u32) -> vec4<f32> {
    return unit(philox(vec4(block, 0u, p.id, rng[2]), vec2(rng[0], rng[1])));
}

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

// Four elements a block; n counts blocks, first is the first block of this launch.
@compute @workgroup_size(64)
fn dropout4(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    y4[i] = select(vec4(0.0), x4[i] * p.scale, draw(p.first + i) >= vec4(p.p));
}

// Tensors whose length is not a multiple of four; n counts elements.
@compute @workgroup_size(64)
fn dropout1(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let u = draw(p.first + i / 4u);
    y[i] = select(0.0, x[i] * p.scale, u[i % 4u] >= p.p);
}

// first is the first sample of this launch.
@compute @workgroup_size(64)
fn drop_path(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let sample = p.first + i / p.width;
    let u = draw(sample / 4u);
    var v = select(0.0, x[i] * p.scale, u[sample % 4u] >= p.p);
    if p.residual == 1u { v += old[i]; }
    y[i] = v;
}
