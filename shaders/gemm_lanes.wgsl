// GEMM kernels for adapters whose subgroup is 8 lanes of a CPU's SIMD unit. A load from memory is a loop over the
// lanes there and costs as much as some twenty multiply-adds, whatever its address; a broadcast from a lane is one
// shuffle. So each load fetches a vec4 per lane, all different, and its 32 values are spread by broadcasts over a tile
// held in registers: 8 loads for 512 multiply-adds. No barriers: one subgroup is one workgroup.
// Loads and stores are also what takes long to compile there, 2 ms each; so the results are stored by a loop that the
// compiler cannot unroll, over registers that move up by one each time, which an index could not do without a stack.
// (1536x384x768: scalar loads 6.6 GFLOP/s, vec4 loads 13, with broadcasts 46, of a peak of 159.)

//#include "math.wgsl"
//#include "gemm.wgsl"
//#include "lanes.wgsl"

//#const RG 4
//#const CQ 8
//#const CO 4
// Whether the activation is one that takes long to compile.
//#const SMOOTH 0

@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> w: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> bias: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> addend: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> pre: array<vec4<f32>>;

// y[row, :] of RG * 8 output pixels (one per lane and octet) by CQ * 4 channels.
@compute @workgroup_size(8)
fn fprop(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let first_row = row_tile(wg) * (RG * 8u);
    if first_row >= p.rows { return; }
    let group = wg.z / p.tiles;
    let col0 = (wg.z % p.tiles) * (CQ * 4u);
    let c4 = p.c / 4u;
    let ct4 = p.ct / 4u;
    let kt4 = p.kt / 4u;
    var acc = array<vec4<f32>, RG * CQ>();
//#for g RG
    let row${g} = min(first_row + ${g}u * 8u + l, p.rows - 1u);
    let t${g} = row${g} / p.q;
    let iy${g} = i32((t${g} % p.p) * p.sh) - i32(p.ph);
    let ix${g} = i32((row${g} % p.q) * p.sw) - i32(p.pw);
    let at${g} = (t${g} / p.p) * p.h * p.w;
//#end
    let filter4 = p.r * p.s * c4;
//#for u CO
    var w${u} = (group * p.k + min(col0 + ${u}u * 8u + l, p.k - 1u)) * filter4;
//#end
    for (var r = 0u; r < p.r; r++) {
        for (var s = 0u; s < p.s; s++) {
//#for g RG
            let yy${g} = u32(iy${g} + i32(r));
            let xx${g} = u32(ix${g} + i32(s));
            let in${g} = yy${g} < p.h && xx${g} < p.w;
            var x${g} = select(0u, (at${g} + yy${g} * p.w + xx${g}) * ct4 + group * c4, in${g});
//#end
            for (var c = 0u; c < c4; c++) {
//#for g RG
                let a${g} = select(vec4(0.0), x[x${g}], in${g});
                x${g}++;
//#end
//#for u CO
                let b${u} = w[w${u}];
                w${u}++;
//#end
//#for u CO
//#for i 2
                {
//#call columns b${u} ${i}u * 4u
//#for g RG
                    acc[${g}u * CQ + ${u}u * 2u + ${i}u] = fma(vec4(a${g}.x), bx, fma(vec4(a${g}.y), by,
                        fma(vec4(a${g}.z), bz, fma(vec4(a${g}.w), bw, acc[${g}u * CQ + ${u}u * 2u + ${i}u]))));
//#end
                }
//#end
//#end
            }
        }
    }
    for (var g = 0u; g < p.eights; g++) {
        let row = first_row + g * 8u + l;
        for (var j = 0u; j < p.quads; j++) {
            let col = col0 + j * 4u;
            if row < p.rows && col < p.k {
                let channel = (group * p.k + col) / 4u;
                let at = row * kt4 + channel;
                var v = acc[0];
                if (p.flags & 1u) != 0u { v += bias[channel]; }
                if (p.flags & 2u) != 0u { v += addend[at]; }
                if (p.flags & 4u) != 0u { pre[at] = v; }
                if SMOOTH == 1 { v = act_value(p.act, v); }
                else if p.act == 1u { v = select(v, vec4(0.0), v < vec4(0.0)); }
                y[at] = v;
            }
//#for j CQ
            acc[${j}u] = acc[min(${j}u + 1u, CQ - 1u)];
//#end
        }
//#for g RG
//#for j CQ
        acc[${g}u * CQ + ${j}u] = acc[min((${g}u + 1u) * CQ + ${j}u, RG * CQ - 1u)];
//#end
//#end
    }
}

// dx of RG * 8 input pixels of one stride class by CQ * 4 channels. x is dy, y is dx.
@compute @workgroup_size(8)
fn dgrad(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let first_row = row_tile(wg) * (RG * 8u);
    if first_row >= p.rows { return; }
    let group = wg.z / p.tiles;
    let quad0 = (wg.z % p.tiles) * CQ;
    let c4 = p.c / 4u;
    let ct4 = p.ct / 4u;
    let k4 = p.k / 4u;
    let kt4 = p.kt / 4u;
    var acc = array<vec4<f32>, RG * CQ>();
//#for g RG
    let row${g} = min(first_row + ${g}u * 8u + l, p.rows - 1u);
    let t${g} = row${g} / p.wc;
    let yc${g} = t${g} % p.hc;
    let xc${g} = row${g} % p.wc;
    let n${g} = t${g} / p.hc;
//#end
    // Load u brings weights of output channel t (of four) and quad j of this tile's input channels, by lane.
    let stride = p.r * p.s * c4;
//#for u CO
    let w${u} = (group * p.k + (${u}u * 8u + l) / CQ) * stride + min(quad0 + (${u}u * 8u + l) % CQ, c4 - 1u);
//#end
    var jr = 0;
    for (var r = p.r0; r < p.r; r += p.sh) {
        var js = 0;
        for (var s = p.s0; s < p.s; s += p.sw) {
//#for g RG
            let yy${g} = u32(i32(yc${g}) + p.oy - jr);
            let xx${g} = u32(i32(xc${g}) + p.ox - js);
            let in${g} = yy${g} < p.p && xx${g} < p.q;
            let x${g} = select(0u, ((n${g} * p.p + yy${g}) * p.q + xx${g}) * kt4 + group * k4, in${g});
//#end
            let tap = (r * p.s + s) * c4;
            for (var k = 0u; k < k4; k++) {
//#for g RG
                let a${g} = select(vec4(0.0), x[x${g} + k], in${g});
//#end
                var b: array<vec4<f32>, CO>;
//#for u CO
                b[${u}] = w[w${u} + tap + k * 4u * stride];
//#end
//#for j CQ
                {
//#for t 4
                    let v${t} = subgroupBroadcast(b[(${t}u * CQ + ${j}u) / 8u], (${t}u * CQ + ${j}u) % 8u);
//#end
//#for g RG
                    acc[${g}u * CQ + ${j}u] = fma(vec4(a${g}.w), v3, fma(vec4(a${g}.z), v2,
                        fma(vec4(a${g}.y), v1, fma(vec4(a${g}.x), v0, acc[${g}u * CQ + ${j}u]))));
//#end
                }
//#end
            }
            js++;
        }
        jr++;
    }
    for (var g = 0u; g < p.eights; g++) {
        let row = first_row + g * 8u + l;
        let t = row / p.wc;
        let line = (t / p.hc) * p.h + (t % p.hc) * p.sh + p.cy;
        let pixel = line * p.w + (row % p.wc) * p.sw + p.cx;
        for (var j = 0u; j < p.quads; j++) {
            if row < p.rows && quad0 + j < c4 {
                let at = pixel * ct4 + group * c4 + quad0 + j;
                var v = acc[0];
                if (p.flags & 2u) != 0u { v += addend[at]; }
                y[at] = v;
            }
//#for j CQ
            acc[${j}u] = acc[min(${j}u + 1u, CQ - 1u)];
//#end
        }
//#for g RG
//#for j CQ
        acc[${g}u * CQ + ${j}u] = acc[min((${g}u + 1u) * CQ + ${j}u, RG * CQ - 1u)];
//#end
//#end
    }
}

// Where column `quad` begins in panels of `width` that lie `stride` apart.
fn in_panels(quad: u32, width: u32, stride: u32) -> u32 {
    return quad / width * stride + quad % width;
}

// w = x [pixels, width] by panels, [width / panel, pixels, panel], with zeros behind the last column. (p.c is the width,
// p.k the panel, p.n the vec4s of w.) A tile of wgrad reads a panel across many pixels: 128 bytes each, from as many
// pages and, where the width is a power of two, from few sets of a CPU's first cache, unless they are brought together.
@compute @workgroup_size(64)
fn panels(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = row_tile(wg) * 64u + l;
    if i >= p.n { return; }
    let line = i / p.k;
    let column = line / p.pixels * p.k + i % p.k;
    w[i] = select(vec4(0.0), x[line % p.pixels * p.c + min(column, p.c - 1u)], column < p.c);
}

// dw of CQ * 4 output channels by RG / 4 * 32 (tap, channel) columns, over one split of the output lines (n, p).
// x is x, w is dy, y the partial results [split, K, R, S, C].
//#const NC 1
@compute @workgroup_size(8)
fn wgrad(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let c4 = p.c / 4u;
    let k4 = p.k / 4u;
    let group = wg.y / p.k_tiles;
    let quad0 = (wg.y % p.k_tiles) * CQ;
    let columns = p.r * p.s * c4;
    var acc = array<vec4<f32>, CQ * 4 * NC>();
//#for m NC
    let col${m} = (wg.x * NC + ${m}u) * 8u + l;
    let tap${m} = col${m} / c4;
    let dy${m} = i32(tap${m} / p.s) - i32(p.ph);
    let dx${m} = i32(tap${m} % p.s) - i32(p.pw);
    let ch${m} = in_panels(group * c4 + col${m} % c4, 8u, p.x_panel);
    let real${m} = col${m} < columns;
//#end
    let lines = p.n * p.p;
    let line0 = wg.z * p.per_split;
    for (var line = line0; line < min(line0 + p.per_split, lines); line++) {
        let n = line / p.p;
        let oy = line % p.p;
//#for m NC
        let yy${m} = u32(i32(oy * p.sh) + dy${m});
        let x${m} = (n * p.h + yy${m}) * p.w;
        let in${m} = real${m} && yy${m} < p.h;
//#end
        // Indices are counted up, as in attention_lanes.wgsl; what lies outside is read (as zero, or as anything there
        // is) and not used.
        let row0 = line * p.q;
//#for u CO
        var at${u} = (row0 + (${u}u * 8u + l) / CQ) * p.dy_pixel
            + in_panels(group * k4 + min(quad0 + (${u}u * 8u + l) % CQ, k4 - 1u), CQ, p.dy_panel);
//#end
//#for t 4
//#for m NC
        var xx${t}_${m} = u32(i32(${t}u * p.sw) + dx${m});
        var at_x${t}_${m} = (x${m} + xx${t}_${m}) * p.x_pixel + ch${m};
//#end
//#end
        for (var q0 = 0u; q0 < p.q; q0 += 4u) {
            let pixel0 = row0 + q0;
            var d: array<vec4<f32>, CO>;
//#for u CO
            {
                let t = (${u}u * 8u + l) / CQ;
                d[${u}] = select(vec4(0.0), w[at${u}], q0 + t < p.q && pixel0 + t < p.pixels);
                at${u} += 4u * p.dy_pixel;
            }
//#end
//#for t 4
//#for m NC
            let ok${t}_${m} = in${m} && xx${t}_${m} < p.w && q0 + ${t}u < p.q && pixel0 + ${t}u < p.pixels;
            let v${t}_${m} = select(vec4(0.0), x[at_x${t}_${m}], ok${t}_${m});
            xx${t}_${m} += 4u * p.sw;
            at_x${t}_${m} += 4u * p.sw * p.x_pixel;
//#end
//#end
            // Four pixels to a sum, so that it is fetched from the stack once for four multiply-adds.
//#for j CQ
            {
//#for t 4
                let k${t} = subgroupBroadcast(d[(${t}u * CQ + ${j}u) / 8u], (${t}u * CQ + ${j}u) % 8u);
//#end
//#for e 4
//#for m NC
                acc[(${j}u * 4u + ${e}u) * NC + ${m}u] = fma(vec4(k3[${e}]), v3_${m}, fma(vec4(k2[${e}]), v2_${m},
                    fma(vec4(k1[${e}]), v1_${m}, fma(vec4(k0[${e}]), v0_${m}, acc[(${j}u * 4u + ${e}u) * NC + ${m}u]))));
//#end
//#end
            }
//#end
        }
    }
    let part = (p.part0 + wg.z) * p.kt * columns;
    for (var j = 0u; j < p.quads * 4u; j++) {
        let k = quad0 * 4u + j;
        if k < p.k {
//#for m NC
            if real${m} { y[part + (group * p.k + k) * columns + col${m}] = acc[${m}u]; }
//#end
        }
//#for j CQ
//#for e 4
//#for m NC
        acc[(${j}u * 4u + ${e}u) * NC + ${m}u] = acc[min((${j}u * 4u + ${e}u + 1u) * NC + ${m}u, CQ * 4u * NC - 1u)];
//#end
//#end
//#end
    }
}
