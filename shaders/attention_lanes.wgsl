// Fused attention for adapters whose subgroup is 8 lanes of a CPU's SIMD unit; see gemm_lanes.wgsl for why loads are
// spread by broadcasts. A workgroup is one subgroup: QG octets of queries (or, for dK and dV, of keys) of one head, one
// per lane, against tiles of SUBS * KO octets of keys (queries). Scores of a tile pass through workgroup memory, each
// lane reading only what it wrote, so there are no barriers; products with them are made CB * 4 channels at a time.
//
// An index that is counted up, and not computed at the load, keeps its computation out of the compiler's loop over the
// lanes. And what needs no speed is a loop that the compiler cannot unroll, over registers that move up or are selected:
// each load or store costs it 2 ms.

//#include "math.wgsl"
//#include "lanes.wgsl"

//#const D4 16
//#const QG 4
//#const KO 4
//#const KQ 8
//#const SUBS 3
//#const CB 8
//#const VL 4

struct Params { tokens: u32, heads: u32, images: u32, groups_x: u32, scale: f32, octets: u32, quads: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> dout: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> delta: array<f32>;
@group(0) @binding(6) var<storage, read_write> dqkv: array<vec4<f32>>;

var<workgroup> weights: array<vec4<f32>, SUBS * KQ * QG * 8>;
var<workgroup> slopes: array<vec4<f32>, SUBS * KQ * QG * 8>;
// What each sub-tile but the first shrinks those before it by.
var<workgroup> shrinks: array<f32, max(SUBS - 1, 1) * QG * 8>;

// sum[g, j] += a[x_g, :] . b[rows of quad j, :], where lane l has row x_g of a and row y_u of b.
//#macro dots sum a x b y
            {
//#for g QG
                var at${g} = ${x}${g};
//#end
//#for u KO
                var bt${u} = ${y}${u};
//#end
                for (var d = 0u; d < D4; d++) {
//#for g QG
                    let a${g} = ${a}[at${g}];
                    at${g}++;
//#end
//#for u KO
                    let b${u} = ${b}[bt${u}];
                    bt${u}++;
//#end
//#for u KO
//#for i 2
                    {
//#call columns b${u} ${i}u * 4u
//#for g QG
                        ${sum}[${g}u * KQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                            fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, ${sum}[${g}u * KQ + ${u}u * 2u + ${i}u]))));
//#end
                    }
//#end
//#end
                }
            }
//#endmacro

// Where the rows of a tile stand for `products`: rows of b from b0 on, columns from `block` on, factors from lane l on.
// Beyond the last token, where factors are zero, its row is taken again.
//#macro rows stride b0
            var at = l;
            let step = 4u * ${stride};
//#for u VL
            let column${u} = ${b0} + block + (${u}u * 8u + l) % CB;
            let end${u} = column${u} + last * ${stride};
            var row${u} = column${u} + min(tile + (${u}u * 8u + l) / CB, last) * ${stride};
//#end
//#endmacro

// acc[g, c] += sum over the next KQ quads of rows of factors[row, g] * b[row, block + c].
//#macro products acc factors b
                for (var j = 0u; j < KQ; j++) {
//#for g QG
                    let w${g} = ${factors}[at + ${g}u * 8u];
//#end
                    at += QG * 8u;
                    var v: array<vec4<f32>, VL>;
//#for u VL
                    v[${u}] = ${b}[row${u}];
                    row${u} = min(row${u} + step, end${u});
//#end
//#for c CB
                    {
//#for t 4
                        let x${t} = subgroupBroadcast(v[(${t}u * CB + ${c}u) / 8u], (${t}u * CB + ${c}u) % 8u);
//#end
//#for g QG
                        ${acc}[${g}u * CB + ${c}u] = fma(vec4(w${g}.w), x3, fma(vec4(w${g}.z), x2,
                            fma(vec4(w${g}.y), x1, fma(vec4(w${g}.x), x0, ${acc}[${g}u * CB + ${c}u]))));
//#end
                    }
//#end
                }
//#endmacro

// Registers [QG, n] move up by a row.
//#macro next_row registers n
//#for g QG
//#for j ${n}
                ${registers}[${g}u * ${n} + ${j}u] = ${registers}[min((${g}u + 1u) * ${n} + ${j}u, QG * ${n} - 1u)];
//#end
//#end
//#endmacro

// Register j of row g of registers [QG, KQ], as a variable. g is no constant: all rows are looked at.
//#macro of_row name registers j
                    var ${name} = ${registers}[${j}];
//#for h QG
                    ${name} = select(${name}, ${registers}[${h}u * KQ + ${j}], g == ${h}u);
//#end
//#endmacro

// The first n registers move up by one.
//#macro next registers n
//#for j ${n}
                    ${registers}[${j}u] = ${registers}[min(${j}u + 1u, ${n} - 1u)];
//#end
//#endmacro

// out = softmax(scale Q K^T) V, online over tiles; lse = the logarithm of the softmax' denominator.
@compute @workgroup_size(8)
fn forward(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    // One part of qkv, and from a token to the next.
    let part = p.heads * D4;
    let qkv_row = 3u * part;
    let head = (wg.y % p.heads) * D4;
    let first = (wg.y / p.heads) * p.tokens * qkv_row + head;
    let last = p.tokens - 1u;
    let own = wg.x * (QG * 8u) + l;
//#for g QG
    let q${g} = first + min(own + ${g}u * 8u, last) * qkv_row;
//#end
    var top: array<f32, QG>;
    var sum = array<f32, QG>();
//#for g QG
    top[${g}] = -1e30;
//#end
    for (var tile = 0u; tile < p.tokens; tile += SUBS * KO * 8u) {
        let subs = min(u32(SUBS), (p.tokens - tile + KO * 8u - 1u) / (KO * 8u));
        // What this tile shrinks the sums over the tiles before by.
        var shrunk: array<f32, QG>;
//#for g QG
        shrunk[${g}] = 1.0;
//#end
        for (var sub = 0u; sub < subs; sub++) {
            let key0 = tile + sub * (KO * 8u);
            var s = array<vec4<f32>, QG * KQ>();
//#for u KO
            let k${u} = first + part + min(key0 + ${u}u * 8u + l, last) * qkv_row;
//#end
//#call dots s qkv q qkv k
            // Online softmax, all within the lane, an octet after the other.
            for (var g = 0u; g < p.octets; g++) {
                var high = vec4(top[0]);
//#for j KQ
//#call of_row s${j} s ${j}
                s${j} = select(vec4(-1e30), s${j} * p.scale,
                    vec4(key0 + ${j}u * 4u) + vec4(0u, 1u, 2u, 3u) < vec4(p.tokens));
                high = max(high, s${j});
//#end
                let now = max(max(high.x, high.y), max(high.z, high.w));
                let shrink = exp_neg(vec4(min(top[0] - now, 0.0))).x;
                if sub > 0u { shrinks[((sub - 1u) * QG + g) * 8u + l] = shrink; }
                var total = vec4(0.0);
//#for j KQ
                {
                    let e = exp_neg(s${j} - vec4(now));
                    total += e;
                    weights[((sub * KQ + ${j}u) * QG + g) * 8u + l] = e;
                }
//#end
                let now_sum = sum[0] * shrink + (total.x + total.y) + (total.z + total.w);
                let now_shrunk = shrunk[0] * shrink;
                // Round to where they began.
//#call next top QG
//#call next sum QG
//#call next shrunk QG
                top[QG - 1] = now;
                sum[QG - 1] = now_sum;
                shrunk[QG - 1] = now_shrunk;
            }
        }
        let done = tile + SUBS * KO * 8u >= p.tokens;
        for (var block = 0u; block < D4; block += CB) {
            var acc = array<vec4<f32>, QG * CB>();
//#call rows qkv_row first + 2u * part
            for (var sub = 0u; sub < subs; sub++) {
                if sub > 0u {
//#for g QG
                    let shrink${g} = shrinks[((sub - 1u) * QG + ${g}u) * 8u + l];
//#for c CB
                    acc[${g}u * CB + ${c}u] *= shrink${g};
//#end
//#end
                }
//#call products acc weights qkv
            }
            var before = shrunk;
            var share: array<f32, QG>;
//#for g QG
            share[${g}] = select(1.0, 1.0 / sum[${g}], done);
//#end
            for (var g = 0u; g < p.octets; g++) {
                let i = own + g * 8u;
                let o = (((wg.y / p.heads) * p.tokens + i) * p.heads + wg.y % p.heads) * D4 + block;
                for (var c = 0u; c < p.quads; c++) {
                    if i < p.tokens {
                        var v = acc[0];
                        if tile > 0u { v += out[o + c] * before[0]; }
                        out[o + c] = v * share[0];
                    }
//#call next acc CB
                }
//#call next_row acc CB
//#call next before QG
//#call next share QG
            }
        }
    }
    for (var g = 0u; g < p.octets; g++) {
        if own + g * 8u < p.tokens {
            lse[wg.y * p.tokens + own + g * 8u] = top[0] + log_t(vec4(sum[0])).x;
        }
//#call next top QG
//#call next sum QG
    }
}

// Adds registers [QG, CB] to, or at the first tile puts them into, one part of dqkv.
//#macro store_gradient acc which
            for (var g = 0u; g < p.octets; g++) {
                let i = own + g * 8u;
                let row = ((wg.y / p.heads) * p.tokens + i) * 3u + ${which};
                let o = (row * p.heads + wg.y % p.heads) * D4 + block;
                for (var c = 0u; c < p.quads; c++) {
                    if i < p.tokens {
                        var v = ${acc}[0];
                        if tile > 0u { v += dqkv[o + c]; }
                        dqkv[o + c] = v;
                    }
//#call next ${acc} CB
                }
//#call next_row ${acc} CB
            }
//#endmacro

// dQ: a lane's queries against tiles of keys.
@compute @workgroup_size(8)
fn backward_q(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    // One part of qkv, and from a token to the next.
    let part = p.heads * D4;
    let qkv_row = 3u * part;
    let head = (wg.y % p.heads) * D4;
    let first = (wg.y / p.heads) * p.tokens * qkv_row + head;
    let first_out = (wg.y / p.heads) * p.tokens * part + head;
    let last = p.tokens - 1u;
    let own = wg.x * (QG * 8u) + l;
//#for g QG
    let q${g} = first + min(own + ${g}u * 8u, last) * qkv_row;
    let o${g} = first_out + min(own + ${g}u * 8u, last) * part;
//#end
    for (var tile = 0u; tile < p.tokens; tile += SUBS * KO * 8u) {
        let subs = min(u32(SUBS), (p.tokens - tile + KO * 8u - 1u) / (KO * 8u));
        for (var sub = 0u; sub < subs; sub++) {
            let key0 = tile + sub * (KO * 8u);
            var s = array<vec4<f32>, QG * KQ>();
            var e = array<vec4<f32>, QG * KQ>();
//#for u KO
            let k${u} = first + part + min(key0 + ${u}u * 8u + l, last) * qkv_row;
            let v${u} = k${u} + part;
//#end
//#call dots s qkv q qkv k
//#call dots e dout o qkv v
            for (var g = 0u; g < p.octets; g++) {
                let i = wg.y * p.tokens + min(own + g * 8u, last);
                let its_lse = vec4(lse[i]);
                let its_delta = vec4(delta[i]);
//#for j KQ
                {
                    let real = vec4(key0 + ${j}u * 4u) + vec4(0u, 1u, 2u, 3u) < vec4(p.tokens);
//#call of_row s_row s ${j}
//#call of_row e_row e ${j}
                    let w = exp_neg(min(s_row * p.scale - its_lse, vec4(0.0)));
                    slopes[((sub * KQ + ${j}u) * QG + g) * 8u + l] =
                        select(vec4(0.0), w * (e_row - its_delta) * p.scale, real);
                }
//#end
            }
        }
        for (var block = 0u; block < D4; block += CB) {
            var acc = array<vec4<f32>, QG * CB>();
//#call rows qkv_row first + part
            for (var sub = 0u; sub < subs; sub++) {
//#call products acc slopes qkv
            }
//#call store_gradient acc 0u
        }
    }
}

// dK and dV: a lane's keys against tiles of queries.
@compute @workgroup_size(8)
fn backward_kv(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let part = p.heads * D4;
    let qkv_row = 3u * part;
    let head = (wg.y % p.heads) * D4;
    let first = (wg.y / p.heads) * p.tokens * qkv_row + head;
    let first_out = (wg.y / p.heads) * p.tokens * part + head;
    let last = p.tokens - 1u;
    let own = wg.x * (QG * 8u) + l;
//#for g QG
    let k${g} = first + part + min(own + ${g}u * 8u, last) * qkv_row;
    let v${g} = k${g} + part;
//#end
    for (var tile = 0u; tile < p.tokens; tile += SUBS * KO * 8u) {
        let subs = min(u32(SUBS), (p.tokens - tile + KO * 8u - 1u) / (KO * 8u));
        for (var sub = 0u; sub < subs; sub++) {
            let query0 = tile + sub * (KO * 8u);
            var s = array<vec4<f32>, QG * KQ>();
            var e = array<vec4<f32>, QG * KQ>();
//#for u KO
            let i${u} = min(query0 + ${u}u * 8u + l, last);
            let q${u} = first + i${u} * qkv_row;
            let o${u} = first_out + i${u} * part;
            let lse${u} = lse[wg.y * p.tokens + i${u}];
            let delta${u} = delta[wg.y * p.tokens + i${u}];
//#end
//#call dots s qkv k qkv q
//#call dots e qkv v dout o
            for (var g = 0u; g < p.octets; g++) {
//#for u KO
//#for i 2
                {
                    let real = vec4(query0 + ${u}u * 8u + ${i}u * 4u) + vec4(0u, 1u, 2u, 3u) < vec4(p.tokens);
                    let its_lse = vec4(subgroupBroadcast(lse${u}, ${i}u * 4u), subgroupBroadcast(lse${u}, ${i}u * 4u + 1u),
                        subgroupBroadcast(lse${u}, ${i}u * 4u + 2u), subgroupBroadcast(lse${u}, ${i}u * 4u + 3u));
                    let its_delta = vec4(subgroupBroadcast(delta${u}, ${i}u * 4u), subgroupBroadcast(delta${u}, ${i}u * 4u + 1u),
                        subgroupBroadcast(delta${u}, ${i}u * 4u + 2u), subgroupBroadcast(delta${u}, ${i}u * 4u + 3u));
                    let at = ((sub * KQ + ${u}u * 2u + ${i}u) * QG + g) * 8u + l;
//#call of_row s_row s ${u}u * 2u + ${i}u
//#call of_row e_row e ${u}u * 2u + ${i}u
                    let w = select(vec4(0.0), exp_neg(min(s_row * p.scale - its_lse, vec4(0.0))), real);
                    weights[at] = w;
                    slopes[at] = w * (e_row - its_delta) * p.scale;
                }
//#end
//#end
            }
        }
        for (var block = 0u; block < D4; block += CB) {
            var acc = array<vec4<f32>, QG * CB>();
//#call rows qkv_row first
            for (var sub = 0u; sub < subs; sub++) {
//#call products acc slopes qkv
            }
//#call store_gradient acc 1u
        }
        for (var block = 0u; block < D4; block += CB) {
            var acc = array<vec4<f32>, QG * CB>();
//#call rows part first_out
            for (var sub = 0u; sub < subs; sub++) {
//#call products acc weights dout
            }
//#call store_gradient acc 2u
        }
    }
}
