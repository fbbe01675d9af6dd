// Attention within shifted windows of [N, H, W, 3 * heads * dim], forward and backward. As attention.wgsl: one query
// (or key) of one window's head per invocation, its vectors in registers; keys and values (queries and their gradients)
// pass by in tiles of TILE through workgroup memory, beside the head's column of the relative position table. Windows
// are addresses only; what wraps round is masked by -100.

//#const T vec4<f32>
//#const I vec4<i32>
//#const U vec4<u32>
//#const WIDTH 4
//#const ITEMS 8
//#const TILE 16
//#const SIDE 7
//#include "math.wgsl"

const TOKENS = SIDE * SIDE;
const ENTRIES = (2 * SIDE - 1) * (2 * SIDE - 1);

struct Params {
    windows: u32, groups_x: u32, heads: u32, h: u32, w: u32,
    shift_y: u32, shift_x: u32, parts: u32, part: u32, scale: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> qkv: array<T>;
@group(0) @binding(2) var<storage, read_write> table: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<T>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
@group(0) @binding(5) var<storage, read_write> dout: array<T>;
@group(0) @binding(6) var<storage, read_write> delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dqkv: array<T>;
@group(0) @binding(7) var<storage, read_write> pairs: array<f32>;
@group(0) @binding(1) var<storage, read_write> summed: array<f32>;
@group(0) @binding(2) var<storage, read_write> dtable: array<f32>;

var<workgroup> tile_a: array<T, TILE * ITEMS>;
var<workgroup> tile_b: array<T, TILE * ITEMS>;
var<workgroup> tile_lse: array<f32, TILE>;
var<workgroup> tile_delta: array<f32, TILE>;
var<workgroup> bias: array<f32, ENTRIES>;

fn across(v: T) -> f32 {
    return dot(vec4<f32>(v), select(vec4(1.0, 0.0, 0.0, 0.0), vec4(1.0), WIDTH == 4));
}

fn exp1(x: f32) -> f32 {
    return vec4<f32>(exp_neg(T(min(x, 0.0)))).x;
}

fn log1(x: f32) -> f32 {
    return vec4<f32>(log_t(T(x))).x;
}

// The pixel of token t of a window, both counted over all images.
fn pixel(window: u32, t: u32) -> u32 {
    let cols = p.w / SIDE;
    let per = (p.h / SIDE) * cols;
    let y = (((window % per) / cols) * SIDE + t / SIDE + p.shift_y) % p.h;
    let x = ((window % cols) * SIDE + t % SIDE + p.shift_x) % p.w;
    return ((window / per) * p.h + y) * p.w + x;
}

// First item of part (0 Q, 1 K, 2 V) of a token.
fn at_qkv(window: u32, head: u32, t: u32, part: u32) -> u32 {
    return ((pixel(window, t) * 3u + part) * p.heads + head) * ITEMS;
}

fn at_out(window: u32, head: u32, t: u32) -> u32 {
    return (pixel(window, t) * p.heads + head) * ITEMS;
}

// The side of the seam that a token is on: bit 0 rows, bit 1 columns, where the window wraps round.
fn region(window: u32, t: u32) -> u32 {
    let cols = p.w / SIDE;
    let rows = p.h / SIDE;
    let last_row = (window / cols) % rows == rows - 1u;
    let last_col = window % cols == cols - 1u;
    let low = last_row && p.shift_y > 0u && t / SIDE >= SIDE - p.shift_y;
    let right = last_col && p.shift_x > 0u && t % SIDE >= SIDE - p.shift_x;
    return select(0u, 1u, low) + select(0u, 2u, right);
}

fn entry(i: u32, j: u32) -> u32 {
    return (i / SIDE + SIDE - 1u - j / SIDE) * (2u * SIDE - 1u) + i % SIDE + SIDE - 1u - j % SIDE;
}

// What is added to the score of query i and key j; `apart` says that they are on different sides of the seam.
fn addend(i: u32, j: u32, apart: bool) -> f32 {
    return bias[entry(i, j)] + select(0.0, -100.0, apart);
}

// Block of 64 queries (or keys), head and window of a workgroup.
struct Place { first: u32, head: u32, window: u32 }
fn place(wg: vec3<u32>) -> Place {
    let blocks = (TOKENS + 63u) / 64u;
    let g = wg.x + wg.y * p.groups_x;
    return Place((g % blocks) * 64u, (g / blocks) % p.heads, g / blocks / p.heads);
}

@compute @workgroup_size(64)
fn forward(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let at = place(wg);
    if at.window >= p.windows { return; }
    let i = at.first + l;
    let token = min(i, TOKENS - 1u);
    let mine = region(at.window, token);
    for (var e = l; e < ENTRIES; e += 64u) { bias[e] = table[e * p.heads + at.head]; }
    var q: array<T, ITEMS>;
    var o: array<T, ITEMS>;
    let from_q = at_qkv(at.window, at.head, token, 0u);
    for (var d = 0u; d < ITEMS; d++) { q[d] = qkv[from_q + d] * p.scale; o[d] = T(0.0); }
    var top = -1e30;
    var sum = 0.0;
    for (var j0 = 0u; j0 < TOKENS; j0 += TILE) {
        workgroupBarrier();
        for (var e = l; e < TILE * ITEMS; e += 64u) {
            let first = at_qkv(at.window, at.head, min(j0 + e / ITEMS, TOKENS - 1u), 1u) + e % ITEMS;
            tile_a[e] = qkv[first];
            tile_b[e] = qkv[first + p.heads * ITEMS];
        }
        workgroupBarrier();
        for (var j = 0u; j < min(u32(TILE), TOKENS - j0); j++) {
            var s = T(0.0);
            for (var d = 0u; d < ITEMS; d++) { s += q[d] * tile_a[j * ITEMS + d]; }
            let score = across(s) + addend(token, j0 + j, region(at.window, j0 + j) != mine);
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
    if i >= TOKENS { return; }
    let to = at_out(at.window, at.head, i);
    for (var d = 0u; d < ITEMS; d++) { out[to + d] = o[d] / sum; }
    lse[(at.window * p.heads + at.head) * TOKENS + i] = top + log1(sum);
}

// delta[window, head, t] = sum of dout * out
@compute @workgroup_size(64)
fn deltas(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.windows * p.heads * TOKENS { return; }
    let to = at_out(i / TOKENS / p.heads, (i / TOKENS) % p.heads, i % TOKENS);
    var s = T(0.0);
    for (var d = 0u; d < ITEMS; d++) { s += dout[to + d] * out[to + d]; }
    delta[i] = across(s);
}

// dQ: one query per invocation.
@compute @workgroup_size(64)
fn backward_q(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let at = place(wg);
    if at.window >= p.windows { return; }
    let i = at.first + l;
    let token = min(i, TOKENS - 1u);
    let mine = region(at.window, token);
    for (var e = l; e < ENTRIES; e += 64u) { bias[e] = table[e * p.heads + at.head]; }
    var q: array<T, ITEMS>;
    var g: array<T, ITEMS>;
    var dq: array<T, ITEMS>;
    let from_q = at_qkv(at.window, at.head, token, 0u);
    let from_o = at_out(at.window, at.head, token);
    for (var d = 0u; d < ITEMS; d++) { q[d] = qkv[from_q + d] * p.scale; g[d] = dout[from_o + d]; dq[d] = T(0.0); }
    let row = (at.window * p.heads + at.head) * TOKENS + token;
    let my_lse = lse[row];
    let my_delta = delta[row];
    for (var j0 = 0u; j0 < TOKENS; j0 += TILE) {
        workgroupBarrier();
        for (var e = l; e < TILE * ITEMS; e += 64u) {
            let first = at_qkv(at.window, at.head, min(j0 + e / ITEMS, TOKENS - 1u), 1u) + e % ITEMS;
            tile_a[e] = qkv[first];
            tile_b[e] = qkv[first + p.heads * ITEMS];
        }
        workgroupBarrier();
        for (var j = 0u; j < min(u32(TILE), TOKENS - j0); j++) {
            var s = T(0.0);
            var ds = T(0.0);
            for (var d = 0u; d < ITEMS; d++) {
                s += q[d] * tile_a[j * ITEMS + d];
                ds += g[d] * tile_b[j * ITEMS + d];
            }
            let score = across(s) + addend(token, j0 + j, region(at.window, j0 + j) != mine);
            let weight = exp1(score - my_lse) * (across(ds) - my_delta) * p.scale;
            for (var d = 0u; d < ITEMS; d++) { dq[d] += weight * tile_a[j * ITEMS + d]; }
        }
    }
    if i >= TOKENS { return; }
    for (var d = 0u; d < ITEMS; d++) { dqkv[from_q + d] = dq[d]; }
}

// dK and dV: one key per invocation.
@compute @workgroup_size(64)
fn backward_kv(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let at = place(wg);
    if at.window >= p.windows { return; }
    let i = at.first + l;
    let token = min(i, TOKENS - 1u);
    let mine = region(at.window, token);
    for (var e = l; e < ENTRIES; e += 64u) { bias[e] = table[e * p.heads + at.head]; }
    var k: array<T, ITEMS>;
    var v: array<T, ITEMS>;
    var dk: array<T, ITEMS>;
    var dv: array<T, ITEMS>;
    let from_k = at_qkv(at.window, at.head, token, 1u);
    let from_v = from_k + p.heads * ITEMS;
    for (var d = 0u; d < ITEMS; d++) {
        k[d] = qkv[from_k + d] * p.scale;
        v[d] = qkv[from_v + d];
        dk[d] = T(0.0);
        dv[d] = T(0.0);
    }
    for (var j0 = 0u; j0 < TOKENS; j0 += TILE) {
        workgroupBarrier();
        for (var e = l; e < TILE * ITEMS; e += 64u) {
            let j = min(j0 + e / ITEMS, TOKENS - 1u);
            tile_a[e] = qkv[at_qkv(at.window, at.head, j, 0u) + e % ITEMS];
            tile_b[e] = dout[at_out(at.window, at.head, j) + e % ITEMS];
        }
        for (var e = l; e < TILE; e += 64u) {
            let row = (at.window * p.heads + at.head) * TOKENS + min(j0 + e, TOKENS - 1u);
            tile_lse[e] = lse[row];
            tile_delta[e] = delta[row];
        }
        workgroupBarrier();
        for (var j = 0u; j < min(u32(TILE), TOKENS - j0); j++) {
            var s = T(0.0);
            var ds = T(0.0);
            for (var d = 0u; d < ITEMS; d++) {
                s += k[d] * tile_a[j * ITEMS + d];
                ds += v[d] * tile_b[j * ITEMS + d];
            }
            let score = across(s) + addend(j0 + j, token, region(at.window, j0 + j) != mine);
            let e = exp1(score - tile_lse[j]);
            let weight = e * (across(ds) - tile_delta[j]) * p.scale;
            for (var d = 0u; d < ITEMS; d++) {
                dk[d] += weight * tile_a[j * ITEMS + d];
                dv[d] += e * tile_b[j * ITEMS + d];
            }
        }
    }
    if i >= TOKENS { return; }
    for (var d = 0u; d < ITEMS; d++) {
        dqkv[from_k + d] = dk[d];
        dqkv[from_v + d] = dv[d];
    }
}

// pairs[part + z, head, i, j] = sum of P * (dP - delta) over the windows z, z + parts, ..: one pair per invocation; y is
// the head.
@compute @workgroup_size(64)
fn bias_pairs(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let e = wg.x * 64u + l;
    if e >= TOKENS * TOKENS { return; }
    let head = wg.y;
    let i = e / TOKENS;
    let j = e % TOKENS;
    let b = table[entry(i, j) * p.heads + head];
    var sum = 0.0;
    for (var window = wg.z; window < p.windows; window += p.parts) {
        let from_q = at_qkv(window, head, i, 0u);
        let from_o = at_out(window, head, i);
        let from_k = at_qkv(window, head, j, 1u);
        let from_v = from_k + p.heads * ITEMS;
        var s = T(0.0);
        var ds = T(0.0);
        for (var d = 0u; d < ITEMS; d++) {
            s += qkv[from_q + d] * qkv[from_k + d];
            ds += dout[from_o + d] * qkv[from_v + d];
        }
        let row = (window * p.heads + head) * TOKENS + i;
        let mask = select(0.0, -100.0, region(window, i) != region(window, j));
        sum += exp1(across(s) * p.scale + b + mask - lse[row]) * (across(ds) - delta[row]);
    }
    pairs[((p.part + wg.z) * p.heads + head) * TOKENS * TOKENS + e] = sum;
}

// dtable[entry, head]: the pairs of `parts` parts that read it; one entry of one head per invocation.
@compute @workgroup_size(64)
fn bias_table(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let e = (wg.x + wg.y * p.groups_x) * 64u + l;
    if e >= ENTRIES * p.heads { return; }
    let head = e % p.heads;
    // Rows and columns from key to query, plus SIDE - 1.
    let dy = (e / p.heads) / (2u * SIDE - 1u);
    let dx = (e / p.heads) % (2u * SIDE - 1u);
    var sum = 0.0;
    for (var part = 0u; part < p.parts; part++) {
        let first = (part * p.heads + head) * TOKENS * TOKENS;
        for (var iy = max(dy, SIDE - 1u) - (SIDE - 1u); iy < min(dy + 1u, u32(SIDE)); iy++) {
            for (var ix = max(dx, SIDE - 1u) - (SIDE - 1u); ix < min(dx + 1u, u32(SIDE)); ix++) {
                let i = iy * SIDE + ix;
                let j = (iy + SIDE - 1u - dy) * SIDE + ix + SIDE - 1u - dx;
                sum += summed[first + i * TOKENS + j];
            }
        }
    }
    dtable[e] = sum;
}
