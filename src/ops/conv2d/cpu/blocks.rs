//! Cutting a batch into blocks of pixels, and the padded copy of the input that a block needs.

use crate::ops::conv2d::ConvShape;
use std::ops::Range;

/// Floats of padded input that a block should stay below, to fit in L2.
const BLOCK_FLOATS: usize = 64 * 1024;
/// Pixels that a block should have, to make use of each packed weight.
const BLOCK_PIXELS: usize = 96;
/// How the pixels of a batch are cut into blocks: rows of one image, or whole images.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    images: usize,
    rows: usize,
    images_per: usize,
    rows_per: usize,
}

impl Blocks {
    /// For `rows` rows of `cols` pixels per image, where a row of pixels brings `row_floats` of scratch.
    pub fn new(images: usize, rows: usize, cols: usize, row_floats: usize) -> Self {
        let fit = (BLOCK_FLOATS / row_floats.max(1)).max(1);
        if fit >= rows {
            let wanted = BLOCK_PIXELS.div_ceil((rows * cols).max(1));
            let images_per = wanted.min(fit / rows.max(1)).clamp(1, images.max(1));
            return Blocks {
                images,
                rows,
                images_per,
                rows_per: rows,
            };
        }
        let wanted = BLOCK_PIXELS.div_ceil(cols);
        let parts = rows.div_ceil(fit.max(wanted).min(rows));
        Blocks {
            images,
            rows,
            images_per: 1,
            rows_per: rows.div_ceil(parts),
        }
    }

    fn row_parts(&self) -> usize {
        self.rows.div_ceil(self.rows_per)
    }

    pub fn count(&self) -> usize {
        self.images.div_ceil(self.images_per) * self.row_parts()
    }

    /// Images and rows of block `i`.
    pub fn get(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let (group, rows) = (i / self.row_parts(), i % self.row_parts());
        let images = group * self.images_per..((group + 1) * self.images_per).min(self.images);
        let rows = rows * self.rows_per..((rows + 1) * self.rows_per).min(self.rows);
        (images, rows)
    }
}

/// A window of `[images, height, width, c]` copied with zeros around it: rows `h0 ..` and columns `w0 ..`, which may
/// lie outside the image.
pub(super) struct Window {
    pub h0: isize,
    pub w0: isize,
    pub height: usize,
    pub width: usize,
}

impl Window {
    pub fn len(&self, images: usize, c: usize) -> usize {
        images * self.height * self.width * c
    }

    /// Copies the window of `images` from `x[_, h, w, c]` to `out`.
    pub fn copy(&self, x: &[f32], [h, w, c]: [usize; 3], images: Range<usize>, out: &mut [f32]) {
        let left = (-self.w0).clamp(0, self.width as isize) as usize;
        let from = self.w0.max(0) as usize;
        let cols = (self.width - left).min(w.saturating_sub(from));
        let line = self.width * c;
        for (i, out) in out[..self.len(images.len(), c)]
            .chunks_exact_mut(line.max(1))
            .enumerate()
        {
            let (image, row) = (
                images.start + i / self.height,
                self.h0 + (i % self.height) as isize,
            );
            if row < 0 || row >= h as isize {
                out.fill(0.0);
                continue;
            }
            out[..left * c].fill(0.0);
            let source = ((image * h + row as usize) * w + from) * c;
            if cols > 0 {
                out[left * c..(left + cols) * c].copy_from_slice(&x[source..source + cols * c]);
            }
            out[(left + cols) * c..].fill(0.0);
        }
    }
}

/// Where the weights of a convolution lie: tap `(r, s)` of output channel `k` begins at [`Filter::tap`].
pub(super) struct Filter {
    at: usize,
    /// Floats from one output channel to the next.
    pub k_step: usize,
    r_step: usize,
    s_step: usize,
}

impl Filter {
    pub fn tap(&self, k: usize, r: usize, s: usize) -> usize {
        self.at + k * self.k_step + r * self.r_step + s * self.s_step
    }
}

/// The convolution without the taps that only ever meet padding (a 3x3 kernel on one pixel has one that does not),
/// and where its weights lie in the whole filter.
pub(super) fn trim(shape: &ConvShape) -> (ConvShape, Filter) {
    let taps = |size: usize, stride: usize, pad: usize, input: usize, output: usize| {
        let first = pad.saturating_sub((output - 1) * stride);
        let end = size.min(input + pad);
        if first < end { first..end } else { 0..size }
    };
    let r = taps(shape.r, shape.stride[0], shape.pad[0], shape.h, shape.ho);
    let s = taps(shape.s, shape.stride[1], shape.pad[1], shape.w, shape.wo);
    let s_step = shape.cg();
    let r_step = shape.s * s_step;
    let filter = Filter {
        at: r.start * r_step + s.start * s_step,
        k_step: shape.r * r_step,
        r_step,
        s_step,
    };
    let pad = [shape.pad[0] - r.start, shape.pad[1] - s.start];
    (
        ConvShape {
            r: r.len(),
            s: s.len(),
            pad,
            ..*shape
        },
        filter,
    )
}
