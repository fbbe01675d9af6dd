// What the device can do at most: multiply-adds in registers, and passes over memory.

struct Params { n: u32, groups_x: u32, rounds: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(1) var<storage, read_write> x4: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y4: array<vec4<f32>>;

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

// y[i] = the sum of 8 chains of 16 * rounds multiply-adds that start at x[i] + 0 .. x[i] + 7
@compute @workgroup_size(64)
fn fma_chains(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let f = 0.999;
    let c = 1e-3;
    var a = x[i];
    var b = x[i] + 1.0;
    var d = x[i] + 2.0;
    var e = x[i] + 3.0;
    var g = x[i] + 4.0;
    var h = x[i] + 5.0;
    var j = x[i] + 6.0;
    var k = x[i] + 7.0;
    for (var r = 0u; r < p.rounds * 2u; r += 1u) {
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
        a = a * f + c; b = b * f + c; d = d * f + c; e = e * f + c; g = g * f + c; h = h * f + c; j = j * f + c; k = k * f + c;
    }
    y[i] = a + b + d + e + g + h + j + k;
}

// y = x, four floats an invocation
@compute @workgroup_size(64)
fn copy(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n { y4[i] = x4[i]; }
}

// x *= 0.999 in place, four floats an invocation
@compute @workgroup_size(64)
fn update(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n { x4[i] *= 0.999; }
}

// y[i] = the sum of x[i], x[i + n], .. x[i + 63 n]
@compute @workgroup_size(64)
fn sum_runs(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    var s = 0.0;
    for (var k = 0u; k < 64u; k += 1u) { s += x[i + k * p.n]; }
    y[i] = s;
}
