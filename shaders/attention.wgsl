// Fused attention, forward and backward, for GPUs and any head size. One query (or key) per invocation, its vectors in
// registers; keys and values (queries and their gradients) pass by in tiles of TILE through workgroup memory. Softmax
// is online; the backward pass recomputes probabilities from lse. Nothing of size [tokens, tokens] but on request.

//#const T vec4<f32>
//#const I vec4<i32>
//#const U vec4<u32>
//#const WIDTH 4
//#const ITEMS 16
//#const TILE 16
//#include "math.wgsl"

struct Params { tokens: u32, heads: u32, images: u32, groups_x: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> qkv: array<T>;
@group(0) @binding(2) var<storage, read_write> out: array<T>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> dout: array<T>;
@group(0) @binding(5) var<storage, read_write> delta: array<f32>;
@group(0) @binding(6) var<storage, read_write> dqkv: array<T>;
@group(0) @binding(4) var<storage, read_write> probs: array<f32>;

var<workgroup> tile_a: array<T, TILE * ITEMS>;
var<workgroup> tile_b: array<T, TILE * ITEMS>;
var<workgroup> tile_lse: array<f32, TILE>;
var<workgroup> tile_delta: array<f32, TILE>;

fn across(v: T) -> f32 {
    return dot(vec4<f32>(v), select(vec4(1.0, 0.0, 0.0, 0.0), vec4(1.0), WIDTH == 4));
}

// First item of part (0 Q, 1 K, 2 V) of a token.
fn at_qkv(image: u32, head: u32, token: u32, part: u32) -> u32 {
    return ((image * p.tokens + token) * 3u + part) * p.heads * ITEMS + head * ITEMS;
}

fn at_out(image: u32, head: u32, token: u32) -> u32 {
    return ((image * p.tokens + token) * p.heads + head) * ITEMS;
}

fn exp1(x: f32) -> f32 {
    return vec4<f32>(exp_neg(T(min(x, 0.0)))).x;
}

fn log1(x: f32) -> f32 {
    return vec4<f32>(log_t(T(x))).x;
}

@compute @workgroup_size(64)
fn forward(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let image = wg.y / p.heads;
    let head = wg.y % p.heads;
    let i = wg.x * 64u + l;
    let token = min(i, p.tokens - 1u);
    var q: array<T, ITEMS>;
    var o: array<T, ITEMS>;
    let from_q = at_qkv(image, head, token, 0u);
    for (var d = 0u; d < ITEMS; d++) { q[d] = qkv[from_q + d] * p.scale; o[d] = T(0.0); }
    var top = -1e30;
    var sum = 0.0;
    for (var j0 = 0u; j0 < p.tokens; j0 += TILE) {
        workgroupBarrier();
        for (var e = l; e < TILE * ITEMS; e += 64u) {
            let j = min(j0 + e / ITEMS, p.tokens - 1u);
            tile_a[e] = qkv[at_qkv(image, head, j, 1u) + e % ITEMS];
            tile_b[e] = qkv[at_qkv(image, head, j, 2u) + e % ITEMS];
        }
        workgroupBarrier();
        for (var j = 0u; j < min(u32(TILE), p.tokens - j0); j++) {
            var s = T(0.0);
            for (var d = 0u; d < ITEMS; d++) { s += q[d] * tile_a[j * ITEMS + d]; }
            let score = across(s);
            if score > top {
                let shrink = exp1(top - score);
                sum *= shrink;
                for (var d = 0u; d < ITEMS; d++) { o[d] *= shrink; }
                top = score;
            }
            let e = exp1(score - top);
            sum += e;
            for (var d = 0u; d < ITEMS; d++) { o[d] += e * tile_b[j * ITEMS + d]; }
        }
    }
    if i >= p.tokens { return; }
    let to = at_out(image, head, i);
    for (var d = 0u; d < ITEMS; d++) { out[to + d] = o[d] / sum; }
    lse[wg.y * p.tokens + i] = top + log1(sum);
}

// probs[n, h, i, j], one per invocation; z is the image's head, y the query.
@compute @workgroup_size(64)
fn probabilities(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let j = wg.x * 64u + l;
    if j >= p.tokens { return; }
    let from_q = at_qkv(wg.z / p.heads, wg.z % p.heads, wg.y, 0u);
    let from_k = at_qkv(wg.z / p.heads, wg.z % p.heads, j, 1u);
    var s = T(0.0);
    for (var d = 0u; d < ITEMS; d++) { s += qkv[from_q + d] * qkv[from_k + d]; }
    let row = wg.z * p.tokens + wg.y;
    probs[row * p.tokens + j] = exp1(across(s) * p.scale - lse[row]);
}

// delta[n, h, t] = sum of dout * out
@compute @workgroup_size(64)
fn deltas(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.images * p.heads * p.tokens { return; }
    let to = at_out(i / p.tokens / p.heads, (i / p.tokens) % p.heads, i % p.tokens);
    var s = T(0.0);
    for (var d = 0u; d < ITEMS; d++) { s += dout[to + d] * out[to + d]; }
    delta[i] = across(s);
}

// dQ: one query per invocation.
@compute @workgroup_size(64)
fn backward_q(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let image = wg.y / p.heads;
    let head = wg.y % p.heads;
    let i = wg.x * 64u + l;
    let token = min(i, p.tokens - 1u);
    var q: array<T, ITEMS>;
    var g: array<T, ITEMS>;
    var dq: array<T, ITEMS>;
    let from_q = at_qkv(image, head, token, 0u);
    let from_o = at_out(image, head, token);
    for (var d = 0u; d < ITEMS; d++) { q[d] = qkv[from_q + d] * p.scale; g[d] = dout[from_o + d]; dq[d] = T(0.0); }
    let row = wg.y * p.tokens + token;
    let my_lse = lse[row];
    let my_delta = delta[row];
    for (var j0 = 0u; j0 < p.tokens; j0 += TILE) {
        workgroupBarrier();
        for (var e = l; e < TILE * ITEMS; e += 64u) {
            let j = min(j0 + e / ITEMS, p.tokens - 1u);
            tile_a[e] = qkv[at_qkv(image, head, j, 1u) + e % ITEMS];
            tile_b[e] = qkv[at_qkv(image, head, j, 2u) + e % ITEMS];
        }
        workgroupBarrier();
        for (var j = 0u; j < min(u32(TILE), p.tokens - j0); j++) {
            var s = T(0.0);
            var ds = T(0.0);
            for (var d = 0u; d < ITEMS; d++) {
                s += q[d] * tile_a[j * ITEMS + d];
                ds += g[d] * tile_b[j * ITEMS + d];
            }
            let w = exp1(across(s) - my_lse) * (across(ds) - my_delta) * p.scale;
            for (var d = 0u; d < ITEMS; d++) { dq[d] += w * tile_a[j * ITEMS + d]; }
        }
    }
    if i >= p.tokens { return; }
    for (var d = 0u; d < ITEMS; d++) { dqkv[from_q + d] = dq[d]; }
}

// dK and dV: one key per invocation.
@compute @workgroup_size(64)
fn backward_kv(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let image = wg.y / p.heads;
    let head = wg.y % p.heads;
    let i = wg.x * 64u + l;
    let token = min(i, p.tokens - 1u);
    var k: array<T, ITEMS>;
    var v: array<T, ITEMS>;
    var dk: array<T, ITEMS>;
    var dv: array<T, ITEMS>;
    let from_k = at_qkv(image, head, token, 1u);
    let from_v = at_qkv(image, head, token, 2u);
    for (var d = 0u; d < ITEMS; d++) {
        k[d] = qkv[from_k + d] * p.scale;
        v[d] = qkv[from_v + d];
        dk[d] = T(0.0);
        dv[d] = T(0.0);
    }
    for (var j0 = 0u; j0 < p.tokens; j0 += TILE) {
        workgroupBarrier();
        for (var e = l; e < TILE * ITEMS; e += 64u) {
            let j = min(j0 + e / ITEMS, p.tokens - 1u);
            tile_a[e] = qkv[at_qkv(image, head, j, 0u) + e % ITEMS];
            tile_b[e] = dout[at_out(image, head, j) + e % ITEMS];
        }
        if l < TILE {
            let row = wg.y * p.tokens + min(j0 + l, p.tokens - 1u);
            tile_lse[l] = lse[row];
            tile_delta[l] = delta[row];
        }
        workgroupBarrier();
        for (var j = 0u; j < min(u32(TILE), p.tokens - j0); j++) {
            var s = T(0.0);
            var ds = T(0.0);
            for (var d = 0u; d < ITEMS; d++) {
                s += k[d] * tile_a[j * ITEMS + d];
                ds += v[d] * tile_b[j * ITEMS + d];
            }
            let e = exp1(across(s) - tile_lse[j]);
            let w = e * (across(ds) - tile_delta[j]) * p.scale;
            for (var d = 0u; d < ITEMS; d++) {
                dk[d] += w * tile_a[j * ITEMS + d];
                dv[d] += e * tile_b[j * ITEMS + d];
            }
        }
    }
    if i >= p.tokens { return; }
    for (var d = 0u; d < ITEMS; d++) {
        dqkv[from_k + d] = dk[d];
        dqkv[from_v + d] = dv[d];
    }
}
