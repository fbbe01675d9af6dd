// Implicit GEMM: convolution (and linear, the 1x1 convolution over rows) without an im2col matrix in memory.
// x [N, H, W, CT], w [K, R, S, C], y [N, P, Q, KT]; C and K are the channels of one group, CT and KT those of all.

struct Params {
    n: u32, h: u32, w: u32, c: u32,
    p: u32, q: u32, k: u32, r: u32,
    s: u32, sh: u32, sw: u32, ph: u32,
    pw: u32, ct: u32, kt: u32,
    rows: u32,      // GEMM rows of this launch: output pixels (fprop), input pixels of this class (dgrad)
    groups_x: u32,  // workgroups in x; row tiles are folded over x and y
    tiles: u32,     // column tiles; z is group * tiles + tile
    flags: u32,     // 1 bias, 2 residual or addend, 4 also store the value before the activation
    act: u32,       // 0 none, 1 ReLU, 2 GELU by erf, 3 GELU by tanh
    cy: u32, cx: u32, hc: u32, wc: u32, // dgrad: rows y with y % sh == cy; how many there are
    r0: u32, s0: u32, oy: i32, ox: i32, // dgrad: first tap of the class, and oy = yc + p.oy - j for its j-th tap
    pixels: u32,    // wgrad: output pixels there are
    per_split: u32, // wgrad: lines (tile kernel: pixels) per split
    k_tiles: u32,   // wgrad: tiles of K
    part0: u32,     // wgrad: index of this launch's first partial result
    eights: u32, quads: u32, // lanes: the register tile, RG and CQ, where a loop is not to be unrolled
    // lanes, wgrad: how far apart panels and pixels of x and dy are, in vec4s
    x_panel: u32, x_pixel: u32,
    dy_panel: u32, dy_pixel: u32,
}
@group(0) @binding(0) var<uniform> p: Params;

fn row_tile(wg: vec3<u32>) -> u32 {
    return wg.x + wg.y * p.groups_x;
}
