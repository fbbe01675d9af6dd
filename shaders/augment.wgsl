// Affine resampling of images [N, H, W, C]: one output element per invocation.

struct Params { n: u32, groups_x: u32, h: u32, w: u32, c: u32, bilinear: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> matrix: array<f32>;
@group(0) @binding(3) var<storage, read_write> outside: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

fn pixel(image: u32, u: f32, v: f32, c: u32) -> f32 {
    if u >= 0.0 && v >= 0.0 && u < f32(p.w) && v < f32(p.h) {
        return x[((image * p.h + u32(v)) * p.w + u32(u)) * p.c + c];
    }
    return outside[c];
}

@compute @workgroup_size(64)
fn affine(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.n { return; }
    let c = i % p.c;
    let col = f32((i / p.c) % p.w);
    let row = f32((i / p.c / p.w) % p.h);
    let image = i / p.c / p.w / p.h;
    let m = image * 6u;
    let u = matrix[m] * col + matrix[m + 1u] * row + matrix[m + 2u];
    let v = matrix[m + 3u] * col + matrix[m + 4u] * row + matrix[m + 5u];
    if p.bilinear == 0u {
        y[i] = pixel(image, round(u), round(v), c);
        return;
    }
    let u0 = floor(u);
    let v0 = floor(v);
    let du = u - u0;
    let dv = v - v0;
    y[i] = (1.0 - du) * (1.0 - dv) * pixel(image, u0, v0, c) + du * (1.0 - dv) * pixel(image, u0 + 1.0, v0, c)
        + (1.0 - du) * dv * pixel(image, u0, v0 + 1.0, c) + du * dv * pixel(image, u0 + 1.0, v0 + 1.0, c);
}
