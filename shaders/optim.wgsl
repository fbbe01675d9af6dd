// Updates of the optimizers in place, the gradient norm, accumulation. T is four elements (one where a length is odd).
// hyper = (learning rate, 1 - beta1^t, 1 - beta2^t, factor on gradients, ..); clip = (norm, factor).

//#const T vec4<f32>

struct Params {
    n: u32, groups_x: u32,
    flags: u32,      // 1 clip, 2 decoupled weight decay (AdamW) or Nesterov (SGD)
    lr_scale: f32, decay: f32,
    one_minus_beta1: f32, beta2: f32, one_minus_beta2: f32, eps: f32,
    momentum: f32,
    part0: u32, parts: u32,
    max_norm: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> param: array<T>;
@group(0) @binding(2) var<storage, read_write> grad: array<T>;
@group(0) @binding(3) var<storage, read_write> hyper: array<f32>;
@group(0) @binding(4) var<storage, read_write> clip: array<f32>;
@group(0) @binding(5) var<storage, read_write> m: array<T>;
@group(0) @binding(6) var<storage, read_write> v: array<T>;

fn index(l: u32, wg: vec3<u32>) -> u32 {
    return (wg.x + wg.y * p.groups_x) * 64u + l;
}

fn gradient_factor() -> f32 {
    var f = hyper[3];
    if (p.flags & 1u) != 0u { f *= clip[1]; }
    return f;
}

@compute @workgroup_size(64)
fn adamw(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let lr = hyper[0] * p.lr_scale;
    var g = grad[i] * gradient_factor();
    var w = param[i];
    if (p.flags & 2u) != 0u { w *= 1.0 - lr * p.decay; } else { g += p.decay * w; }
    let mm = m[i] + p.one_minus_beta1 * (g - m[i]);
    let vv = p.beta2 * v[i] + p.one_minus_beta2 * g * g;
    m[i] = mm;
    v[i] = vv;
    param[i] = w - (lr / hyper[1]) * (mm / (sqrt(vv) * (1.0 / sqrt(hyper[2])) + T(p.eps)));
}

@compute @workgroup_size(64)
fn sgd(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let w = param[i];
    param[i] = w - (hyper[0] * p.lr_scale) * (grad[i] * gradient_factor() + p.decay * w);
}

@compute @workgroup_size(64)
fn sgd_momentum(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i >= p.n { return; }
    let w = param[i];
    let g = grad[i] * gradient_factor() + p.decay * w;
    let b = p.momentum * m[i] + g;
    m[i] = b;
    var step = b;
    if (p.flags & 2u) != 0u { step = g + p.momentum * b; }
    param[i] = w - (hyper[0] * p.lr_scale) * step;
}

@compute @workgroup_size(64)
fn accumulate(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = index(l, wg);
    if i < p.n { param[i] += grad[i]; }
}

// Partial sums of squares of a slab (n elements) in `parts` interleaved parts, at part0.
@group(0) @binding(1) var<storage, read_write> slab: array<f32>;
@group(0) @binding(2) var<storage, read_write> part: array<f32>;
@compute @workgroup_size(64)
fn squares(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let k = index(l, wg);
    if k >= p.parts { return; }
    var sum = 0.0;
    for (var i = k; i < p.n; i += p.parts) { sum += slab[i] * slab[i]; }
    part[p.part0 + k] = sum;
}

@group(0) @binding(1) var<storage, read_write> norm: array<f32>;
@compute @workgroup_size(1)
fn finish_norm() {
    // Sums of 64 first: serial addition of thousands of parts would lose digits.
    var sum = 0.0;
    for (var k = 0u; k < p.parts; k += 64u) {
        var some = 0.0;
        for (var j = k; j < min(k + 64u, p.parts); j++) { some += part[j]; }
        sum += some;
    }
    var length = sqrt(sum);
    if (p.flags & 1u) != 0u { length *= abs(hyper[3]); }
    let scale = p.max_norm / (length + 1e-6);
    norm[0] = length;
    norm[1] = select(scale, 1.0, scale > 1.0);
}
