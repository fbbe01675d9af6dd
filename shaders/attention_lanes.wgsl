// Fused attention for adapters whose subgroup is 8 lanes of a CPU's SIMD unit; see gemm_lanes.wgsl for why loads are
// spread by broadcasts. A workgroup is one subgroup: QG octets of queries (or, for dK and dV, of keys) of one head, one
// per lane, against tiles of SUBS * KO octets of keys (queries). Scores of a tile pass through workgroup memory, each
// lane reading only what it wrote, so there are no barriers; products with them are made CB * 4 channels at a time,
// because a kernel that holds a whole head in registers takes a software adapter seconds to compile.

//#include "math.wgsl"

//#const D4 16
//#const QG 4
//#const KO 4
//#const KQ 8
//#const SUBS 3
//#const CB 8
//#const VL 4

struct Params { tokens: u32, heads: u32, images: u32, groups_x: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> dout: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> delta: array<f32>;
@group(0) @binding(6) var<storage, read_write> dqkv: array<vec4<f32>>;

var<workgroup> weights: array<vec4<f32>, SUBS * KQ * QG * 8>;
var<workgroup> slopes: array<vec4<f32>, SUBS * KQ * QG * 8>;
var<workgroup> shrinks: array<f32, SUBS * QG * 8>;

fn exp1(x: f32) -> f32 {
    return exp_neg(vec4(min(x, 0.0))).x;
}

fn highest(v: vec4<f32>) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

// out = softmax(scale Q K^T) V, online over tiles; lse = the logarithm of the softmax' denominator.
@compute @workgroup_size(8)
fn forward(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let h4 = p.heads * D4;
    let first = (wg.y / p.heads) * p.tokens * 3u * h4 + (wg.y % p.heads) * D4;
    let first_out = (wg.y / p.heads) * p.tokens * h4 + (wg.y % p.heads) * D4;
    let last = p.tokens - 1u;
//#for g QG
    let i${g} = wg.x * (QG * 8u) + ${g}u * 8u + l;
    let q${g} = first + min(i${g}, last) * 3u * h4;
    let o${g} = first_out + min(i${g}, last) * h4;
    var top${g} = -1e30;
    var sum${g} = 0.0;
//#end
    for (var tile = 0u; tile < p.tokens; tile += SUBS * KO * 8u) {
        let subs = min(u32(SUBS), (p.tokens - tile + KO * 8u - 1u) / (KO * 8u));
        for (var sub = 0u; sub < subs; sub++) {
            let key0 = tile + sub * (KO * 8u);
            var s: array<vec4<f32>, QG * KQ>;
            for (var i = 0u; i < QG * KQ; i++) { s[i] = vec4(0.0); }
//#for u KO
            let k${u} = first + min(key0 + ${u}u * 8u + l, last) * 3u * h4 + h4;
//#end
            for (var d = 0u; d < D4; d++) {
//#for g QG
                let a${g} = qkv[q${g} + d];
//#end
//#for u KO
                let b${u} = qkv[k${u} + d];
//#end
//#for u KO
//#for i 2
                {
                    let r0 = subgroupBroadcast(b${u}, ${i}u * 4u);
                    let r1 = subgroupBroadcast(b${u}, ${i}u * 4u + 1u);
                    let r2 = subgroupBroadcast(b${u}, ${i}u * 4u + 2u);
                    let r3 = subgroupBroadcast(b${u}, ${i}u * 4u + 3u);
                    let bx = vec4(r0.x, r1.x, r2.x, r3.x);
                    let by = vec4(r0.y, r1.y, r2.y, r3.y);
                    let bz = vec4(r0.z, r1.z, r2.z, r3.z);
                    let bw = vec4(r0.w, r1.w, r2.w, r3.w);
//#for g QG
                    s[${g}u * KQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                        fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, s[${g}u * KQ + ${u}u * 2u + ${i}u]))));
//#end
                }
//#end
//#end
            }
            // Online softmax, all within the lane.
//#for g QG
            {
                var high = vec4(top${g});
//#for j KQ
                s[${g}u * KQ + ${j}u] = select(vec4(-1e30), s[${g}u * KQ + ${j}u] * p.scale,
                    vec4(key0 + ${j}u * 4u) + vec4(0u, 1u, 2u, 3u) < vec4(p.tokens));
                high = max(high, s[${g}u * KQ + ${j}u]);
//#end
                let now = highest(high);
                let shrink = exp1(top${g} - now);
                shrinks[(sub * QG + ${g}u) * 8u + l] = shrink;
                top${g} = now;
                var total = vec4(0.0);
//#for j KQ
                {
                    let e = exp_neg(s[${g}u * KQ + ${j}u] - vec4(now));
                    total += e;
                    weights[((sub * KQ + ${j}u) * QG + ${g}u) * 8u + l] = e;
                }
//#end
                sum${g} = sum${g} * shrink + (total.x + total.y) + (total.z + total.w);
            }
//#end
        }
        let done = tile + SUBS * KO * 8u >= p.tokens;
//#for g QG
        let share${g} = select(1.0, 1.0 / sum${g}, done);
//#end
        for (var block = 0u; block < D4; block += CB) {
            var acc: array<vec4<f32>, QG * CB>;
            for (var c = 0u; c < QG * CB; c++) { acc[c] = vec4(0.0); }
            if tile > 0u {
//#for g QG
//#for c CB
                acc[${g}u * CB + ${c}u] = out[o${g} + block + ${c}u];
//#end
//#end
            }
            for (var sub = 0u; sub < subs; sub++) {
//#for g QG
                {
                    let shrink = shrinks[(sub * QG + ${g}u) * 8u + l];
//#for c CB
                    acc[${g}u * CB + ${c}u] *= shrink;
//#end
                }
//#end
                for (var j = 0u; j < KQ; j++) {
//#for g QG
                    let w${g} = weights[((sub * KQ + j) * QG + ${g}u) * 8u + l];
//#end
                    var v: array<vec4<f32>, VL>;
//#for u VL
                    v[${u}] = qkv[first + min(tile + (sub * KQ + j) * 4u + (${u}u * 8u + l) / CB, last) * 3u * h4 + 2u * h4 + block + (${u}u * 8u + l) % CB];
//#end
//#for c CB
                    {
//#for t 4
                        let x${t} = subgroupBroadcast(v[(${t}u * CB + ${c}u) / 8u], (${t}u * CB + ${c}u) % 8u);
//#end
//#for g QG
                        acc[${g}u * CB + ${c}u] = fma(vec4(w${g}.w), x3, fma(vec4(w${g}.z), x2,
                            fma(vec4(w${g}.y), x1, fma(vec4(w${g}.x), x0, acc[${g}u * CB + ${c}u]))));
//#end
                    }
//#end
                }
            }
//#for g QG
            if i${g} < p.tokens {
//#for c CB
                out[o${g} + block + ${c}u] = acc[${g}u * CB + ${c}u] * share${g};
//#end
            }
//#end
        }
    }
//#for g QG
    if i${g} < p.tokens {
        lse[wg.y * p.tokens + i${g}] = top${g} + log_t(vec4(sum${g})).x;
    }
//#end
}

// dQ: a lane's queries against tiles of keys.
@compute @workgroup_size(8)
fn backward_q(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let h4 = p.heads * D4;
    let first = (wg.y / p.heads) * p.tokens * 3u * h4 + (wg.y % p.heads) * D4;
    let first_out = (wg.y / p.heads) * p.tokens * h4 + (wg.y % p.heads) * D4;
    let last = p.tokens - 1u;
//#for g QG
    let i${g} = wg.x * (QG * 8u) + ${g}u * 8u + l;
    let q${g} = first + min(i${g}, last) * 3u * h4;
    let o${g} = first_out + min(i${g}, last) * h4;
    let lse${g} = lse[wg.y * p.tokens + min(i${g}, last)];
    let delta${g} = delta[wg.y * p.tokens + min(i${g}, last)];
//#end
    for (var tile = 0u; tile < p.tokens; tile += SUBS * KO * 8u) {
        let subs = min(u32(SUBS), (p.tokens - tile + KO * 8u - 1u) / (KO * 8u));
        for (var sub = 0u; sub < subs; sub++) {
            let key0 = tile + sub * (KO * 8u);
            var s: array<vec4<f32>, QG * KQ>;
            var e: array<vec4<f32>, QG * KQ>;
            for (var i = 0u; i < QG * KQ; i++) { s[i] = vec4(0.0); e[i] = vec4(0.0); }
//#for u KO
            let k${u} = first + min(key0 + ${u}u * 8u + l, last) * 3u * h4 + h4;
//#end
            for (var d = 0u; d < D4; d++) {
//#for g QG
                let a${g} = qkv[q${g} + d];
//#end
//#for u KO
                let b${u} = qkv[k${u} + d];
//#end
//#for u KO
//#for i 2
                {
                    let r0 = subgroupBroadcast(b${u}, ${i}u * 4u);
                    let r1 = subgroupBroadcast(b${u}, ${i}u * 4u + 1u);
                    let r2 = subgroupBroadcast(b${u}, ${i}u * 4u + 2u);
                    let r3 = subgroupBroadcast(b${u}, ${i}u * 4u + 3u);
                    let bx = vec4(r0.x, r1.x, r2.x, r3.x);
                    let by = vec4(r0.y, r1.y, r2.y, r3.y);
                    let bz = vec4(r0.z, r1.z, r2.z, r3.z);
                    let bw = vec4(r0.w, r1.w, r2.w, r3.w);
//#for g QG
                    s[${g}u * KQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                        fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, s[${g}u * KQ + ${u}u * 2u + ${i}u]))));
//#end
                }
//#end
//#end
            }
            for (var d = 0u; d < D4; d++) {
//#for g QG
                let a${g} = dout[o${g} + d];
//#end
//#for u KO
                let b${u} = qkv[k${u} + h4 + d];
//#end
//#for u KO
//#for i 2
                {
                    let r0 = subgroupBroadcast(b${u}, ${i}u * 4u);
                    let r1 = subgroupBroadcast(b${u}, ${i}u * 4u + 1u);
                    let r2 = subgroupBroadcast(b${u}, ${i}u * 4u + 2u);
                    let r3 = subgroupBroadcast(b${u}, ${i}u * 4u + 3u);
                    let bx = vec4(r0.x, r1.x, r2.x, r3.x);
                    let by = vec4(r0.y, r1.y, r2.y, r3.y);
                    let bz = vec4(r0.z, r1.z, r2.z, r3.z);
                    let bw = vec4(r0.w, r1.w, r2.w, r3.w);
//#for g QG
                    e[${g}u * KQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                        fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, e[${g}u * KQ + ${u}u * 2u + ${i}u]))));
//#end
                }
//#end
//#end
            }
//#for j KQ
            {
                let real = vec4(key0 + ${j}u * 4u) + vec4(0u, 1u, 2u, 3u) < vec4(p.tokens);
//#for g QG
                {
                    let w = exp_neg(min(s[${g}u * KQ + ${j}u] * p.scale - vec4(lse${g}), vec4(0.0)));
                    slopes[((sub * KQ + ${j}u) * QG + ${g}u) * 8u + l] =
                        select(vec4(0.0), w * (e[${g}u * KQ + ${j}u] - vec4(delta${g})) * p.scale, real);
                }
//#end
            }
//#end
        }
        for (var block = 0u; block < D4; block += CB) {
            var acc: array<vec4<f32>, QG * CB>;
            for (var c = 0u; c < QG * CB; c++) { acc[c] = vec4(0.0); }
            if tile > 0u {
//#for g QG
//#for c CB
                acc[${g}u * CB + ${c}u] = dqkv[q${g} + block + ${c}u];
//#end
//#end
            }
            for (var sub = 0u; sub < subs; sub++) {
                for (var j = 0u; j < KQ; j++) {
//#for g QG
                    let w${g} = slopes[((sub * KQ + j) * QG + ${g}u) * 8u + l];
//#end
                    var v: array<vec4<f32>, VL>;
//#for u VL
                    v[${u}] = qkv[first + min(tile + (sub * KQ + j) * 4u + (${u}u * 8u + l) / CB, last) * 3u * h4 + h4 + block + (${u}u * 8u + l) % CB];
//#end
//#for c CB
                    {
//#for t 4
                        let x${t} = subgroupBroadcast(v[(${t}u * CB + ${c}u) / 8u], (${t}u * CB + ${c}u) % 8u);
//#end
//#for g QG
                        acc[${g}u * CB + ${c}u] = fma(vec4(w${g}.w), x3, fma(vec4(w${g}.z), x2,
                            fma(vec4(w${g}.y), x1, fma(vec4(w${g}.x), x0, acc[${g}u * CB + ${c}u]))));
//#end
                    }
//#end
                }
            }
//#for g QG
            if i${g} < p.tokens {
//#for c CB
                dqkv[q${g} + block + ${c}u] = acc[${g}u * CB + ${c}u];
//#end
            }
//#end
        }
    }
}

// dK and dV: a lane's keys against tiles of queries.
@compute @workgroup_size(8)
fn backward_kv(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let h4 = p.heads * D4;
    let first = (wg.y / p.heads) * p.tokens * 3u * h4 + (wg.y % p.heads) * D4;
    let first_out = (wg.y / p.heads) * p.tokens * h4 + (wg.y % p.heads) * D4;
    let last = p.tokens - 1u;
//#for g QG
    let i${g} = wg.x * (QG * 8u) + ${g}u * 8u + l;
    let k${g} = first + min(i${g}, last) * 3u * h4 + h4;
//#end
    for (var tile = 0u; tile < p.tokens; tile += SUBS * KO * 8u) {
        let subs = min(u32(SUBS), (p.tokens - tile + KO * 8u - 1u) / (KO * 8u));
        for (var sub = 0u; sub < subs; sub++) {
            let key0 = tile + sub * (KO * 8u);
            var s: array<vec4<f32>, QG * KQ>;
            var e: array<vec4<f32>, QG * KQ>;
            for (var i = 0u; i < QG * KQ; i++) { s[i] = vec4(0.0); e[i] = vec4(0.0); }
//#for u KO
            let i_u${u} = min(key0 + ${u}u * 8u + l, last);
            let q${u} = first + i_u${u} * 3u * h4;
            let o${u} = first_out + i_u${u} * h4;
            let lse${u} = lse[wg.y * p.tokens + i_u${u}];
            let delta${u} = delta[wg.y * p.tokens + i_u${u}];
//#end
            for (var d = 0u; d < D4; d++) {
//#for g QG
                let a${g} = qkv[k${g} + d];
//#end
//#for u KO
                let b${u} = qkv[q${u} + d];
//#end
//#for u KO
//#for i 2
                {
                    let r0 = subgroupBroadcast(b${u}, ${i}u * 4u);
                    let r1 = subgroupBroadcast(b${u}, ${i}u * 4u + 1u);
                    let r2 = subgroupBroadcast(b${u}, ${i}u * 4u + 2u);
                    let r3 = subgroupBroadcast(b${u}, ${i}u * 4u + 3u);
                    let bx = vec4(r0.x, r1.x, r2.x, r3.x);
                    let by = vec4(r0.y, r1.y, r2.y, r3.y);
                    let bz = vec4(r0.z, r1.z, r2.z, r3.z);
                    let bw = vec4(r0.w, r1.w, r2.w, r3.w);
//#for g QG
                    s[${g}u * KQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                        fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, s[${g}u * KQ + ${u}u * 2u + ${i}u]))));
//#end
                }
//#end
//#end
            }
            for (var d = 0u; d < D4; d++) {
//#for g QG
                let a${g} = qkv[k${g} + h4 + d];
//#end
//#for u KO
                let b${u} = dout[o${u} + d];
//#end
//#for u KO
//#for i 2
                {
                    let r0 = subgroupBroadcast(b${u}, ${i}u * 4u);
                    let r1 = subgroupBroadcast(b${u}, ${i}u * 4u + 1u);
                    let r2 = subgroupBroadcast(b${u}, ${i}u * 4u + 2u);
                    let r3 = subgroupBroadcast(b${u}, ${i}u * 4u + 3u);
                    let bx = vec4(r0.x, r1.x, r2.x, r3.x);
                    let by = vec4(r0.y, r1.y, r2.y, r3.y);
                    let bz = vec4(r0.z, r1.z, r2.z, r3.z);
                    let bw = vec4(r0.w, r1.w, r2.w, r3.w);
//#for g QG
                    e[${g}u * KQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                        fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, e[${g}u * KQ + ${u}u * 2u + ${i}u]))));
//#end
                }
//#end
//#end
            }
//#for u KO
//#for i 2
            {
                let real = vec4(key0 + ${u}u * 8u + ${i}u * 4u) + vec4(0u, 1u, 2u, 3u) < vec4(p.tokens);
                let its_lse = vec4(subgroupBroadcast(lse${u}, ${i}u * 4u), subgroupBroadcast(lse${u}, ${i}u * 4u + 1u),
                    subgroupBroadcast(lse${u}, ${i}u * 4u + 2u), subgroupBroadcast(lse${u}, ${i}u * 4u + 3u));
                let its_delta = vec4(subgroupBroadcast(delta${u}, ${i}u * 4u), subgroupBroadcast(delta${u}, ${i}u * 4u + 1u),
                    subgroupBroadcast(delta${u}, ${i}u * 4u + 2u), subgroupBroadcast(delta${u}, ${i}u * 4u + 3u));
//#for g QG
                {
                    let j = ${u}u * 2u + ${i}u;
                    let at = ((sub * KQ + j) * QG + ${g}u) * 8u + l;
                    let w = select(vec4(0.0), exp_neg(min(s[${g}u * KQ + ${u}u * 2u + ${i}u] * p.scale - its_lse, vec4(0.0))), real);
                    weights[at] = w;
                    slopes[at] = w * (e[${g}u * KQ + ${u}u * 2u + ${i}u] - its_delta) * p.scale;
                }
//#end
            }
//#end
//#end
        }
        for (var block = 0u; block < D4; block += CB) {
            var acc: array<vec4<f32>, QG * CB>;
            for (var c = 0u; c < QG * CB; c++) { acc[c] = vec4(0.0); }
            if tile > 0u {
//#for g QG
//#for c CB
                acc[${g}u * CB + ${c}u] = dqkv[k${g} + block + ${c}u];
//#end
//#end
            }
            for (var sub = 0u; sub < subs; sub++) {
                for (var j = 0u; j < KQ; j++) {
//#for g QG
                    let w${g} = slopes[((sub * KQ + j) * QG + ${g}u) * 8u + l];
//#end
                    var v: array<vec4<f32>, VL>;
//#for u VL
                    v[${u}] = qkv[first + min(tile + (sub * KQ + j) * 4u + (${u}u * 8u + l) / CB, last) * 3u * h4 + block + (${u}u * 8u + l) % CB];
//#end
//#for c CB
                    {
//#for t 4
                        let x${t} = subgroupBroadcast(v[(${t}u * CB + ${c}u) / 8u], (${t}u * CB + ${c}u) % 8u);
//#end
//#for g QG
                        acc[${g}u * CB + ${c}u] = fma(vec4(w${g}.w), x3, fma(vec4(w${g}.z), x2,
                            fma(vec4(w${g}.y), x1, fma(vec4(w${g}.x), x0, acc[${g}u * CB + ${c}u]))));
//#end
                    }
//#end
                }
            }
//#for g QG
            if i${g} < p.tokens {
//#for c CB
                dqkv[k${g} + block + ${c}u] = acc[${g}u * CB + ${c}u];
//#end
            }
//#end
        }
        for (var block = 0u; block < D4; block += CB) {
            var acc: array<vec4<f32>, QG * CB>;
            for (var c = 0u; c < QG * CB; c++) { acc[c] = vec4(0.0); }
            if tile > 0u {
//#for g QG
//#for c CB
                acc[${g}u * CB + ${c}u] = dqkv[k${g} + h4 + block + ${c}u];
//#end
//#end
            }
            for (var sub = 0u; sub < subs; sub++) {
                for (var j = 0u; j < KQ; j++) {
//#for g QG
                    let w${g} = weights[((sub * KQ + j) * QG + ${g}u) * 8u + l];
//#end
                    var v: array<vec4<f32>, VL>;
//#for u VL
                    v[${u}] = dout[first_out + min(tile + (sub * KQ + j) * 4u + (${u}u * 8u + l) / CB, last) * h4 + block + (${u}u * 8u + l) % CB];
//#end
//#for c CB
                    {
//#for t 4
                        let x${t} = subgroupBroadcast(v[(${t}u * CB + ${c}u) / 8u], (${t}u * CB + ${c}u) % 8u);
//#end
//#for g QG
                        acc[${g}u * CB + ${c}u] = fma(vec4(w${g}.w), x3, fma(vec4(w${g}.z), x2,
                            fma(vec4(w${g}.y), x1, fma(vec4(w${g}.x), x0, acc[${g}u * CB + ${c}u]))));
//#end
                    }
//#end
                }
            }
//#for g QG
            if i${g} < p.tokens {
//#for c CB
                dqkv[k${g} + h4 + block + ${c}u] = acc[${g}u * CB + ${c}u];
//#end
            }
//#end
        }
    }
}
