// LayerScale: y = x * g (+ residual) and its gradients. T is four channels (one where C is odd), CT of them.

//#const T vec4<f32>

struct Params { n: u32, groups_x: u32, ct: u32, residual: u32, rows: u32, parts: u32, part0: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<T>;
@group(0) @binding(2) var<storage, read_write> g: array<T>;
@group(0) @binding(3) var<storage, read_write> old: array<T>;
@group(0) @binding(4) var<storage, read_write> y: array<T>;

@compute @workgroup_size(64)
fn scale(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.n { return; }
    var v = x[i] * g[i % p.ct];
    if p.residual == 1u { v += old[i]; }
    y[i] = v;
}

// Partial sums of dy * x down the columns, interleaved as in batch_norm.wgsl; x is dy, g is x.
@compute @workgroup_size(64)
fn bwd_sums(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.ct * p.parts { return; }
    let c = i % p.ct;
    var sum = T(0.0);
    for (var row = i / p.ct; row < p.rows; row += p.parts) { sum += x[row * p.ct + c] * g[row * p.ct + c]; }
    y[p.part0 * p.ct + i] = sum;
}
