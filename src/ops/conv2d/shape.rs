//! The sizes of a convolution.

use crate::error::{Error, Result};

/// How the CPU computes a convolution where there is a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// The faster one.
    #[default]
    Auto,
    /// Every product of the definition: the smallest rounding errors.
    ImplicitGemm,
    /// Winograd's wherever it is possible: fewer products, rounding errors some ten times larger.
    Winograd,
}

/// One of the three products of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The result.
    Fprop,
    /// The input's gradient.
    Dgrad,
    /// The weights' gradient.
    Wgrad,
}

/// Sizes of a convolution: input `[n, h, w, c]`, weights `[k, r, s, c / groups]`, output `[n, ho, wo, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    pub n: usize,
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub k: usize,
    pub r: usize,
    pub s: usize,
    /// Vertical, horizontal.
    pub stride: [usize; 2],
    /// Rows above and below, columns left and right.
    pub pad: [usize; 2],
    pub groups: usize,
    pub ho: usize,
    pub wo: usize,
    /// What the CPU kernels compute it by.
    pub algorithm: Algorithm,
}

impl ConvShape {
    /// The shape for an input `[n, h, w, c]` and weights `[k, r, s, c / groups]`.
    ///
    /// # Errors
    /// A size of zero, channels that the groups do not divide, or a kernel larger than the padded input.
    pub fn new(
        [n, h, w, c]: [usize; 4],
        [k, r, s]: [usize; 3],
        stride: [usize; 2],
        pad: [usize; 2],
        groups: usize,
    ) -> Result<Self> {
        if [n, h, w, c, k, r, s, stride[0], stride[1], groups].contains(&0) {
            return Err(Error::input(format!(
                "conv2d: a size is zero: input [{n}, {h}, {w}, {c}], kernel {k} x {r} x {s}, stride {stride:?}, groups {groups}"
            )));
        }
        if !c.is_multiple_of(groups) || !k.is_multiple_of(groups) {
            return Err(Error::input(format!(
                "conv2d: {groups} groups divide neither or only one of {c} input and {k} output channels"
            )));
        }
        let [ph, pw] = [h + 2 * pad[0], w + 2 * pad[1]];
        if r > ph || s > pw {
            return Err(Error::input(format!(
                "conv2d: a kernel of {r} x {s} is larger than the padded input, {ph} x {pw}"
            )));
        }
        let [ho, wo] = [(ph - r) / stride[0] + 1, (pw - s) / stride[1] + 1];
        Ok(ConvShape {
            n,
            h,
            w,
            c,
            k,
            r,
            s,
            stride,
            pad,
            groups,
            ho,
            wo,
            algorithm: Algorithm::Auto,
        })
    }

    /// Input channels of one group.
    pub fn cg(&self) -> usize {
        self.c / self.groups
    }

    /// Output channels of one group.
    pub fn kg(&self) -> usize {
        self.k / self.groups
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.n * self.h * self.w * self.c
    }

    /// Elements of the weights.
    pub fn weight_len(&self) -> usize {
        self.k * self.r * self.s * self.cg()
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.n * self.ho * self.wo * self.k
    }

    /// FLOPs of each of fprop, dgrad and wgrad (a multiply-add is 2; taps in the padding count).
    pub fn flops(&self) -> u64 {
        2 * (self.n * self.ho * self.wo) as u64 * self.weight_len() as u64
    }

    /// A 1x1 convolution that is a plain product of `[n h w, c]` and `[c, k]`.
    pub fn is_matrix_product(&self) -> bool {
        self.r == 1
            && self.s == 1
            && self.stride == [1, 1]
            && self.pad == [0, 0]
            && self.groups == 1
    }
}
