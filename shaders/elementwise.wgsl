// Maps over tensors of one shape: sums, activations and their slopes. One T (f32 or vec4<f32>) per invocation.

//#include "math.wgsl"

struct Params { n: u32, groups_x: u32, f: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> a: array<T>;
@group(0) @binding(2) var<storage, read_write> b: array<T>;
@group(0) @binding(3) var<storage, read_write> y: array<T>;
@group(0) @binding(2) var<storage, read_write> y1: array<T>;

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

// y = f(a + b)
@compute @workgroup_size(64)
fn add(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n {
        let v = a[i] + b[i];
        y[i] = select(v, select(v, T(0.0), v < T(0.0)), p.f == 1u);
    }
}

// y = scale (a + b)
@compute @workgroup_size(64)
fn scaled_sum(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n {
        y[i] = (a[i] + b[i]) * p.scale;
    }
}

// y = f(a)
@compute @workgroup_size(64)
fn act(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n {
        y1[i] = act_value(p.f, a[i]);
    }
}

// y = a f'(b)
@compute @workgroup_size(64)
fn act_bwd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n {
        y[i] = a[i] * act_slope(p.f, b[i]);
    }
}
