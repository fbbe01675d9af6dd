// Softmax cross-entropy and its gradient, one row per invocation; sums over rows by one invocation, in order.

//#const T f32
//#const I i32
//#const U u32
//#include "math.wgsl"

struct Params {
    rows: u32, groups_x: u32, classes: u32,
    flags: u32,       // 1 soft targets, 2 class weights
    smoothing: f32, focal: f32,
    nan: u32,         // bits of a NaN: WGSL has no way to write one
    first: u32,       // first row of this launch
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> z: array<f32>;
@group(0) @binding(2) var<storage, read_write> labels: array<u32>;
@group(0) @binding(2) var<storage, read_write> soft: array<f32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;
@group(0) @binding(5) var<storage, read_write> dz: array<f32>;
@group(0) @binding(6) var<storage, read_write> losses: array<f32>;
@group(0) @binding(7) var<storage, read_write> denominator: array<f32>;

const IGNORED = 0xffffffffu;

fn weight(c: u32) -> f32 {
    if (p.flags & 2u) != 0u { return weights[c]; }
    return 1.0;
}

// denominator[0] = sum of the labels' weights (the number of rows for soft targets).
@compute @workgroup_size(1)
fn count_labels() {
    var sum = 0.0;
    for (var n = 0u; n < p.rows; n++) {
        let l = labels[n];
        if l == IGNORED { continue; }
        if l >= p.classes { sum = bitcast<f32>(p.nan); break; }
        sum += weight(l);
    }
    denominator[0] = sum;
}

@compute @workgroup_size(1)
fn count_rows() {
    denominator[0] = f32(p.rows);
}

@compute @workgroup_size(1)
fn total() {
    var sum = 0.0;
    for (var n = 0u; n < p.rows; n++) { sum += losses[n]; }
    loss[0] = sum / denominator[0];
}

// exp(x) - 1 for x <= 0.
fn expm1_neg(x: f32) -> f32 {
    let series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * (0.0013888889
        + x * (1.984127e-4 + x * 2.4801588e-5)))))));
    return select(exp_neg(x) - 1.0, series, x > -0.5);
}

// -f(p) and p f'(p) of f(p) = (1 - p)^focal log p, from log p.
fn focal_terms(log_p: f32) -> vec2<f32> {
    if p.focal == 0.0 { return vec2(-log_p, 1.0); }
    let rest = -expm1_neg(log_p);
    if rest < 1e-37 { return vec2(0.0, 0.0); }
    let factor = exp_t(p.focal * log_t(rest));
    return vec2(-factor * log_p, factor - p.focal * exp_neg(log_p) * factor / rest * log_p);
}

struct Row { lse: f32, top: f32, sum: f32 }

fn softmax_of(at: u32) -> Row {
    var top = z[at];
    for (var c = 1u; c < p.classes; c++) { top = max(top, z[at + c]); }
    var sum = 0.0;
    for (var c = 0u; c < p.classes; c++) { sum += exp_neg(z[at + c] - top); }
    return Row(top + log_t(sum), top, sum);
}

// q = weight * ((1 - smoothing) * target + smoothing / classes)
fn share(c: u32, target_value: f32) -> f32 {
    return weight(c) * ((1.0 - p.smoothing) * target_value + p.smoothing / f32(p.classes));
}

@compute @workgroup_size(8)
fn rows_labels(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let n = (wg.x + wg.y * p.groups_x) * 8u + l;
    if n >= p.rows { return; }
    let at = n * p.classes;
    let label = labels[n];
    if label >= p.classes {
        let v = select(bitcast<f32>(p.nan), 0.0, label == IGNORED);
        losses[p.first + n] = v;
        for (var c = 0u; c < p.classes; c++) { dz[at + c] = v; }
        return;
    }
    let inverse = 1.0 / denominator[0];
    let r = softmax_of(at);
    var sum = 0.0;
    var all = 0.0;
    for (var c = 0u; c < p.classes; c++) {
        let q = share(c, select(0.0, 1.0, c == label));
        if q != 0.0 {
            let t = focal_terms(z[at + c] - r.lse);
            sum += q * t.x;
            all += q * t.y;
        }
    }
    for (var c = 0u; c < p.classes; c++) {
        let q = share(c, select(0.0, 1.0, c == label));
        var a = 0.0;
        if q != 0.0 { a = q * focal_terms(z[at + c] - r.lse).y; }
        dz[at + c] = (exp_neg(z[at + c] - r.top) * (all / r.sum) - a) * inverse;
    }
    losses[p.first + n] = sum;
}

@compute @workgroup_size(8)
fn rows_soft(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let n = (wg.x + wg.y * p.groups_x) * 8u + l;
    if n >= p.rows { return; }
    let at = n * p.classes;
    let inverse = 1.0 / denominator[0];
    let r = softmax_of(at);
    var sum = 0.0;
    var all = 0.0;
    for (var c = 0u; c < p.classes; c++) {
        let q = share(c, soft[at + c]);
        if q != 0.0 {
            let t = focal_terms(z[at + c] - r.lse);
            sum += q * t.x;
            all += q * t.y;
        }
    }
    for (var c = 0u; c < p.classes; c++) {
        let q = share(c, soft[at + c]);
        var a = 0.0;
        if q != 0.0 { a = q * focal_terms(z[at + c] - r.lse).y; }
        dz[at + c] = (exp_neg(z[at + c] - r.top) * (all / r.sum) - a) * inverse;
    }
    losses[p.first + n] = sum;
}

// y = x * s[0] over n = rows items; z is x, weights is s.
@compute @workgroup_size(64)
fn scale_by(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i < p.rows { dz[i] = z[i] * weights[0]; }
}
