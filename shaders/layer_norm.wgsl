// Layer norm over rows of C channels, forward and backward. T is four channels (one where C is odd), CT of them.
// GROUP 1: one row per invocation, without barriers (software adapters). GROUP 64: one row per workgroup.

//#const T vec4<f32>
//#const WIDTH 4
//#const GROUP 1

struct Params { rows: u32, groups_x: u32, ct: u32, parts: u32, c: f32, eps: f32, flags: u32, part0: u32 }
@group(0) @binding(0) var<uniform> p: Params;

// Two sums at once, over a row's invocations.
var<workgroup> shared_a: array<f32, GROUP>;
var<workgroup> shared_b: array<f32, GROUP>;

fn over_row(l: u32, a: f32, b: f32) -> vec2<f32> {
    if GROUP == 1 { return vec2(a, b); }
    workgroupBarrier();
    shared_a[l % GROUP] = a;
    shared_b[l % GROUP] = b;
    workgroupBarrier();
    for (var span = u32(GROUP) / 2u; span > 0u; span /= 2u) {
        if l < span {
            shared_a[l] += shared_a[l + span];
            shared_b[l] += shared_b[l + span];
        }
        workgroupBarrier();
    }
    return vec2(shared_a[0], shared_b[0]);
}

fn across(v: T) -> f32 {
    return dot(vec4<f32>(v), select(vec4(1.0, 0.0, 0.0, 0.0), vec4(1.0), WIDTH == 4));
}

// Row and first channel of an invocation, and the step between its channels.
fn row_of(l: u32, wg: vec3<u32>) -> u32 {
    let group = wg.x + wg.y * p.groups_x;
    return select(group, group * 64u + l, GROUP == 1);
}

@group(0) @binding(1) var<storage, read_write> fwd_x: array<T>;
@group(0) @binding(2) var<storage, read_write> fwd_gamma: array<T>;
@group(0) @binding(3) var<storage, read_write> fwd_beta: array<T>;
@group(0) @binding(4) var<storage, read_write> fwd_y: array<T>;
@group(0) @binding(5) var<storage, read_write> fwd_mean: array<f32>;
@group(0) @binding(6) var<storage, read_write> fwd_rstd: array<f32>;
@compute @workgroup_size(64)
fn forward(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let row = row_of(l, wg);
    // Out-of-range rows take part in barriers on the last row's data and store nothing.
    let at = min(row, p.rows - 1u) * p.ct;
    let first = select(l, 0u, GROUP == 1);
    var sum = T(0.0);
    for (var c = first; c < p.ct; c += GROUP) { sum += fwd_x[at + c]; }
    let mean = over_row(l, across(sum), 0.0).x / p.c;
    var m2 = T(0.0);
    for (var c = first; c < p.ct; c += GROUP) {
        let d = fwd_x[at + c] - T(mean);
        m2 += d * d;
    }
    let rstd = 1.0 / sqrt(over_row(l, across(m2), 0.0).x / p.c + p.eps);
    if row >= p.rows { return; }
    for (var c = first; c < p.ct; c += GROUP) {
        fwd_y[at + c] = (fwd_x[at + c] - T(mean)) * T(rstd) * fwd_gamma[c] + fwd_beta[c];
    }
    if first == 0u {
        fwd_mean[row] = mean;
        fwd_rstd[row] = rstd;
    }
}

@group(0) @binding(1) var<storage, read_write> bwd_dy: array<T>;
@group(0) @binding(2) var<storage, read_write> bwd_x: array<T>;
@group(0) @binding(3) var<storage, read_write> bwd_mean: array<f32>;
@group(0) @binding(4) var<storage, read_write> bwd_rstd: array<f32>;
@group(0) @binding(5) var<storage, read_write> bwd_gamma: array<T>;
@group(0) @binding(6) var<storage, read_write> bwd_old: array<T>;
@group(0) @binding(7) var<storage, read_write> bwd_dx: array<T>;
@compute @workgroup_size(64)
fn backward(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let row = row_of(l, wg);
    let safe = min(row, p.rows - 1u);
    let at = safe * p.ct;
    let first = select(l, 0u, GROUP == 1);
    let mean = T(bwd_mean[safe]);
    let rstd = T(bwd_rstd[safe]);
    var sum = T(0.0);
    var sum_h = T(0.0);
    for (var c = first; c < p.ct; c += GROUP) {
        let g = bwd_dy[at + c] * bwd_gamma[c];
        sum += g;
        sum_h += g * ((bwd_x[at + c] - mean) * rstd);
    }
    let m = over_row(l, across(sum), across(sum_h)) / p.c;
    if row >= p.rows { return; }
    for (var c = first; c < p.ct; c += GROUP) {
        let h = (bwd_x[at + c] - mean) * rstd;
        var v = rstd * (bwd_dy[at + c] * bwd_gamma[c] - T(m.x) - h * T(m.y));
        if p.flags == 1u { v += bwd_old[at + c]; }
        bwd_dx[at + c] = v;
    }
}

// Partial sums of dgamma and dbeta down the columns, interleaved as in batch_norm.wgsl.
@group(0) @binding(5) var<storage, read_write> part_gamma: array<T>;
@group(0) @binding(6) var<storage, read_write> part_beta: array<T>;
@compute @workgroup_size(64)
fn bwd_sums(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.ct * p.parts { return; }
    let c = i % p.ct;
    var sum = T(0.0);
    var sum_h = T(0.0);
    for (var row = i / p.ct; row < p.rows; row += p.parts) {
        let d = bwd_dy[row * p.ct + c];
        sum += d;
        sum_h += d * ((bwd_x[row * p.ct + c] - T(bwd_mean[row])) * T(bwd_rstd[row]));
    }
    part_gamma[p.part0 * p.ct + i] = sum_h;
    part_beta[p.part0 * p.ct + i] = sum;
}
