// Elementary functions that are equally exact on every adapter: drivers' own exp, tanh and log differ in the fifth digit.
// T is f32 or vec4<f32>, I and U the integers of the same width.

//#const T vec4<f32>
//#const I vec4<i32>
//#const U vec4<u32>

// 2^n by the exponent bits times a polynomial on [-ln2/2, ln2/2]: relative error below 2e-7, 0 below -87.3.
fn exp_t(v: T) -> T {
    let x = clamp(v, T(-87.3), T(88.7));
    let n = round(x * T(1.44269504));
    let r = (x - n * T(0.693359375)) + n * T(2.12194440e-4);
    let p = T(1.0) + r * (T(1.0) + r * (T(0.5) + r * (T(0.16666666) + r * (T(0.04166664)
        + r * (T(8.333367e-3) + r * T(1.38938e-3))))));
    // In two halves, so that n = 128 does not overflow the exponent.
    let h = I(n) / I(2);
    let g = I(n) - h;
    return p * bitcast<T>(U(h + I(127)) << U(23u)) * bitcast<T>(U(g + I(127)) << U(23u));
}

// exp for arguments that are not positive (softmax): one multiplication less.
fn exp_neg(v: T) -> T {
    let x = max(v, T(-87.0));
    let n = round(x * T(1.44269504));
    let r = (x - n * T(0.693359375)) + n * T(2.12194440e-4);
    let p = T(1.0) + r * (T(1.0) + r * (T(0.5) + r * (T(0.16666666) + r * (T(0.04166664)
        + r * (T(8.333367e-3) + r * T(1.38938e-3))))));
    return select(p * bitcast<T>(U(I(n) + I(127)) << U(23u)), T(0.0), v < T(-87.0));
}

// Natural logarithm of a positive normal number: exponent plus 2 atanh((m-1)/(m+1)), m in [0.7, 1.42).
fn log_t(v: T) -> T {
    let bits = bitcast<U>(v);
    let e = I((bits - U(0x3f3504f3u)) >> U(23u));
    let wrapped = select(e, e - I(512), e > I(255));
    let m = bitcast<T>(bits - (U(wrapped) << U(23u)));
    let s = (m - T(1.0)) / (m + T(1.0));
    let z = s * s;
    let p = T(2.0) * s * (T(1.0) + z * (T(0.33333333) + z * (T(0.2) + z * (T(0.14285715) + z * T(0.11111111)))));
    return p + T(wrapped) * T(0.693147181);
}

fn tanh_t(x: T) -> T {
    let e = exp_neg(T(-2.0) * abs(x));
    let t = (T(1.0) - e) / (T(1.0) + e);
    return select(t, -t, x < T(0.0));
}

// Odd series within |x| < 1, Chebyshev fit of erfc beyond: within 3e-7 of erf.
fn erf_t(x: T) -> T {
    let a = abs(x);
    let s = x * x;
    let small = x * (T(1.1283792) + s * (T(-0.37612640) + s * (T(0.11283792) + s * (T(-0.02686617) + s * (T(0.005223978)
        + s * (T(-8.548327e-4) + s * (T(1.2055333e-4) + s * (T(-1.492565e-5) + s * T(1.6462114e-6)))))))));
    let t = T(1.0) / (T(1.0) + T(0.5) * a);
    let p = T(-1.2655122) + t * (T(1.0000237) + t * (T(0.37409196) + t * (T(0.09678418) + t * (T(-0.18628806)
        + t * (T(0.27886807) + t * (T(-1.1352039) + t * (T(1.4885159) + t * (T(-0.82215223) + t * T(0.17087277)))))))));
    let l = T(1.0) - t * exp_t(p - s);
    return select(select(l, -l, x < T(0.0)), small, a < T(1.0));
}

// Activations by number: 0 none, 1 ReLU, 2 GELU by erf, 3 GELU by tanh.
fn act_value(f: u32, x: T) -> T {
    switch f {
        case 1u: { return select(x, T(0.0), x < T(0.0)); }
        case 2u: { return T(0.5) * x * (T(1.0) + erf_t(x * T(0.70710678))); }
        case 3u: { return T(0.5) * x * (T(1.0) + tanh_t(T(0.79788456) * (x + T(0.044715) * x * x * x))); }
        default: { return x; }
    }
}

fn act_slope(f: u32, x: T) -> T {
    switch f {
        case 1u: { return select(T(0.0), T(1.0), x > T(0.0)); }
        case 2u: {
            let phi = exp_t(T(-0.5) * x * x) * T(0.39894228);
            return T(0.5) * (T(1.0) + erf_t(x * T(0.70710678))) + x * phi;
        }
        case 3u: {
            let t = tanh_t(T(0.79788456) * (x + T(0.044715) * x * x * x));
            let inner = T(0.79788456) * (T(1.0) + T(3.0 * 0.044715) * x * x);
            return T(0.5) * (T(1.0) + t) + T(0.5) * x * (T(1.0) - t * t) * inner;
        }
        default: { return T(1.0); }
    }
}
