// Batch norm over the rows of x [rows, C], forward and backward. T is four channels (one where C is odd), CT of them.
// Sums down the columns run in `parts` interleaved partial sums per column, so that neighbouring invocations read
// neighbouring addresses; the parts are then added in order.

//#const T vec4<f32>

struct Params {
    n: u32, groups_x: u32, ct: u32, rows: u32,
    parts: u32,     // of this launch (partial sums) or of all (finish)
    part0: u32,     // first part of this launch
    flags: u32,     // 1 ReLU, 2 residual, 4 gradient of the residual, 8 operand 2 is a variance, 16 there is a beta
    eps: f32,
    count: f32,     // rows of all launches; 0 where the statistics are constants
    momentum: f32,
}
@group(0) @binding(0) var<uniform> p: Params;

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

// part[k, c] = sum of x, or of (x - mean)^2 where flags is 1.
@group(0) @binding(1) var<storage, read_write> sums_x: array<T>;
@group(0) @binding(2) var<storage, read_write> sums_mean: array<T>;
@group(0) @binding(3) var<storage, read_write> sums_part: array<T>;
@compute @workgroup_size(64)
fn sums(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.ct * p.parts { return; }
    let c = i % p.ct;
    var sum = T(0.0);
    if p.flags == 0u {
        for (var row = i / p.ct; row < p.rows; row += p.parts) { sum += sums_x[row * p.ct + c]; }
    } else {
        let mean = sums_mean[c];
        for (var row = i / p.ct; row < p.rows; row += p.parts) {
            let d = sums_x[row * p.ct + c] - mean;
            sum += d * d;
        }
    }
    sums_part[p.part0 * p.ct + i] = sum;
}

@group(0) @binding(1) var<storage, read_write> fin_part: array<T>;
@group(0) @binding(2) var<storage, read_write> fin_mean: array<T>;
@group(0) @binding(3) var<storage, read_write> fin_rstd: array<T>;
@group(0) @binding(4) var<storage, read_write> fin_running_mean: array<T>;
@group(0) @binding(5) var<storage, read_write> fin_running_var: array<T>;

fn total(c: u32) -> T {
    var sum = T(0.0);
    for (var k = 0u; k < p.parts; k++) { sum += fin_part[k * p.ct + c]; }
    return sum;
}

@compute @workgroup_size(8)
fn finish_mean(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.ct { return; }
    fin_mean[id.x] = total(id.x) / T(p.count);
}

// rstd, and the running statistics as PyTorch keeps them.
@compute @workgroup_size(8)
fn finish_var(@builtin(global_invocation_id) id: vec3<u32>) {
    let c = id.x;
    if c >= p.ct { return; }
    let m2 = total(c);
    fin_rstd[c] = T(1.0) / sqrt(m2 / T(p.count) + T(p.eps));
    let old_mean = fin_running_mean[c];
    let old_var = fin_running_var[c];
    fin_running_mean[c] = old_mean + T(p.momentum) * (fin_mean[c] - old_mean);
    fin_running_var[c] = old_var + T(p.momentum) * (m2 / T(p.count - 1.0) - old_var);
}

// coef = [rstd * gamma, mean, beta, rstd], each [C].
@group(0) @binding(1) var<storage, read_write> pre_mean: array<T>;
@group(0) @binding(2) var<storage, read_write> pre_rstd: array<T>;
@group(0) @binding(3) var<storage, read_write> pre_gamma: array<T>;
@group(0) @binding(4) var<storage, read_write> pre_beta: array<T>;
@group(0) @binding(5) var<storage, read_write> pre_coef: array<T>;
@compute @workgroup_size(8)
fn prepare(@builtin(global_invocation_id) id: vec3<u32>) {
    let c = id.x;
    if c >= p.ct { return; }
    var rstd = pre_rstd[c];
    if (p.flags & 8u) != 0u { rstd = T(1.0) / sqrt(rstd + T(p.eps)); }
    var beta = T(0.0);
    if (p.flags & 16u) != 0u { beta = pre_beta[c]; }
    pre_coef[c] = rstd * pre_gamma[c];
    pre_coef[p.ct + c] = pre_mean[c];
    pre_coef[2u * p.ct + c] = beta;
    pre_coef[3u * p.ct + c] = rstd;
}

@group(0) @binding(1) var<storage, read_write> norm_x: array<T>;
@group(0) @binding(2) var<storage, read_write> norm_coef: array<T>;
@group(0) @binding(3) var<storage, read_write> norm_residual: array<T>;
@group(0) @binding(4) var<storage, read_write> norm_y: array<T>;
@compute @workgroup_size(64)
fn normalize(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.ct;
    var v = (norm_x[i] - norm_coef[p.ct + c]) * norm_coef[c] + norm_coef[2u * p.ct + c];
    if (p.flags & 2u) != 0u { v += norm_residual[i]; }
    if (p.flags & 1u) != 0u { v = select(v, T(0.0), v < T(0.0)); }
    norm_y[i] = v;
}

@group(0) @binding(1) var<storage, read_write> bwd_dy: array<T>;
@group(0) @binding(2) var<storage, read_write> bwd_x: array<T>;
@group(0) @binding(3) var<storage, read_write> bwd_y: array<T>;
@group(0) @binding(4) var<storage, read_write> bwd_coef: array<T>;
@group(0) @binding(5) var<storage, read_write> bwd_part: array<T>;
@group(0) @binding(6) var<storage, read_write> bwd_part_x: array<T>;
@group(0) @binding(5) var<storage, read_write> bwd_dx: array<T>;
@group(0) @binding(6) var<storage, read_write> bwd_dresidual: array<T>;

// dy behind the ReLU: by the forward result where a residual was added, else by the sign computed again.
fn masked(i: u32, c: u32, centred: T) -> T {
    let d = bwd_dy[i];
    if (p.flags & 1u) == 0u { return d; }
    if (p.flags & 2u) != 0u { return select(T(0.0), d, bwd_y[i] > T(0.0)); }
    return select(T(0.0), d, centred * bwd_coef[c] + bwd_coef[2u * p.ct + c] > T(0.0));
}

// part[k, c] = sum of d; part_x[k, c] = sum of d * xhat.
@compute @workgroup_size(64)
fn bwd_sums(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.ct * p.parts { return; }
    let c = i % p.ct;
    let mean = bwd_coef[p.ct + c];
    var sum = T(0.0);
    var sum_x = T(0.0);
    for (var row = i / p.ct; row < p.rows; row += p.parts) {
        let centred = bwd_x[row * p.ct + c] - mean;
        let d = masked(row * p.ct + c, c, centred);
        sum += d;
        sum_x += d * centred;
    }
    bwd_part[p.part0 * p.ct + i] = sum;
    bwd_part_x[p.part0 * p.ct + i] = sum_x * bwd_coef[3u * p.ct + c];
}

// dgamma, dbeta, and what dx needs of them behind coef: [dgamma * rstd / count, dbeta / count].
@group(0) @binding(2) var<storage, read_write> fin_part_x: array<T>;
@group(0) @binding(3) var<storage, read_write> fin_dgamma: array<T>;
@group(0) @binding(4) var<storage, read_write> fin_dbeta: array<T>;
@group(0) @binding(5) var<storage, read_write> fin_coef: array<T>;
@compute @workgroup_size(8)
fn bwd_finish(@builtin(global_invocation_id) id: vec3<u32>) {
    let c = id.x;
    if c >= p.ct { return; }
    var dgamma = T(0.0);
    for (var k = 0u; k < p.parts; k++) { dgamma += fin_part_x[k * p.ct + c]; }
    let dbeta = total(c);
    fin_dgamma[c] = dgamma;
    fin_dbeta[c] = dbeta;
    var share = 0.0;
    if p.count > 0.0 { share = 1.0 / p.count; }
    fin_coef[4u * p.ct + c] = dgamma * fin_coef[3u * p.ct + c] * T(share);
    fin_coef[5u * p.ct + c] = dbeta * T(share);
}

@compute @workgroup_size(64)
fn bwd_apply(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let c = i % p.ct;
    let centred = bwd_x[i] - bwd_coef[p.ct + c];
    let d = masked(i, c, centred);
    if (p.flags & 4u) != 0u { bwd_dresidual[i] = d; }
    bwd_dx[i] = (d - bwd_coef[5u * p.ct + c] - centred * bwd_coef[4u * p.ct + c]) * bwd_coef[c];
}

// w[k, ..] *= s[k] and b' = (bias - mean) s + beta, s = gamma / sqrt(var + eps); scalars only. ct is the
// elements of a filter, stats = gamma, beta, mean, var.
@group(0) @binding(1) var<storage, read_write> fold_w: array<f32>;
@group(0) @binding(2) var<storage, read_write> fold_bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> fold_gamma: array<f32>;
@group(0) @binding(4) var<storage, read_write> fold_beta: array<f32>;
@group(0) @binding(5) var<storage, read_write> fold_mean: array<f32>;
@group(0) @binding(6) var<storage, read_write> fold_var: array<f32>;
@group(0) @binding(7) var<storage, read_write> fold_b2: array<f32>;
@compute @workgroup_size(64)
fn fold(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let k = i / p.ct;
    let s = fold_gamma[k] / sqrt(fold_var[k] + p.eps);
    fold_w[i] *= s;
    if i % p.ct == 0u {
        var bias = -fold_mean[k];
        if (p.flags & 1u) != 0u { bias += fold_bias[k]; }
        fold_b2[k] = bias * s + fold_beta[k];
    }
}
