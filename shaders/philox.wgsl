// Philox4x32-10 (Salmon et al. 2011), with the 64-bit products from 16-bit halves: the same bits on every backend.

fn mul_hi(a: u32, b: u32) -> u32 {
    let al = a & 0xffffu;
    let ah = a >> 16u;
    let bl = b & 0xffffu;
    let bh = b >> 16u;
    let mid = ah * bl + ((al * bl) >> 16u);
    let low = al * bh + (mid & 0xffffu);
    return ah * bh + (mid >> 16u) + (low >> 16u);
}

fn philox(counter: vec4<u32>, seed: vec2<u32>) -> vec4<u32> {
    var c = counter;
    var k = seed;
    for (var i = 0u; i < 10u; i++) {
        let a = c.x * 0xD2511F53u;
        let b = c.z * 0xCD9E8D57u;
        let ah = mul_hi(c.x, 0xD2511F53u);
        let bh = mul_hi(c.z, 0xCD9E8D57u);
        c = vec4(bh ^ c.y ^ k.x, b, ah ^ c.w ^ k.y, a);
        k += vec2(0x9E3779B9u, 0xBB67AE85u);
    }
    return c;
}

// Uniform in [0, 1) with 24 bits.
fn unit(word: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(word >> vec4(8u)) * (1.0 / 16777216.0);
}
