// Ordered sums: of partial results, and down the columns of a matrix in two stages. Same bits every time.

struct Params { n: u32, groups_x: u32, parts: u32, stride: u32, inner: u32, inner_padded: u32, rows: u32, per_part: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// y[i] = sum over parts of x[part, i], where x's rows of `inner` elements stand `inner_padded` apart.
@compute @workgroup_size(64)
fn sum_parts(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.n { return; }
    let at = (i / p.inner) * p.inner_padded + i % p.inner;
    var sum = 0.0;
    for (var part = 0u; part < p.parts; part++) { sum += x[part * p.stride + at]; }
    y[i] = sum;
}

// y[parts + part, c] = sum over the part's rows of x[row, c]; n is the number of columns.
@compute @workgroup_size(64)
fn column_sums(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let c = wg.x * 64u + l;
    if c >= p.n { return; }
    var sum = 0.0;
    let start = wg.y * p.per_part;
    for (var row = start; row < min(start + p.per_part, p.rows); row++) { sum += x[row * p.n + c]; }
    y[(p.parts + wg.y) * p.n + c] = sum;
}

// y[row, 0 .. inner_padded] = x[row, 0 .. inner], cut off or with zeros behind; n is the number of elements of y.
@compute @workgroup_size(64)
fn repitch(@builtin(local_invocation_index) l: u32, @builtin(workgroup_id) wg: vec3<u32>) {
    let i = (wg.x + wg.y * p.groups_x) * 64u + l;
    if i >= p.n { return; }
    let c = i % p.inner_padded;
    var v = 0.0;
    if c < p.inner { v = x[(i / p.inner_padded) * p.inner + c]; }
    y[i] = v;
}
