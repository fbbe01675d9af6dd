//! Swin transformer (Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"): stages
//! of blocks that attend within windows, every other one with the windows shifted by half a window, and patch merging
//! between the stages. Names are timm's.

use super::{Arch, Heads, Model, ModelOptions};
use crate::graph::{Graph, Init, Layout, Tid};
use crate::ops::act::Act;
use crate::ops::conv2d::ConvLayer;
use crate::ops::linear::LinearLayer;
use crate::ops::window_attention::WindowAttention;
use crate::{Error, Result};

/// Side of a patch in pixels.
const PATCH: usize = 4;

/// Width of the MLP's hidden layer, in widths of a token.
const MLP: usize = 4;

/// Epsilon of the layer norms, in every library.
const EPS: f32 = 1e-5;

/// Sizes of a Swin transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swin {
    /// Width of a token in the first stage; it doubles from stage to stage.
    pub dim: usize,
    /// Blocks of each stage.
    pub depths: [usize; 4],
    /// Attention heads in each stage.
    pub heads: [usize; 4],
    /// Rows and columns of a window.
    pub window: usize,
}

/// (name, sizes with windows of 7) of the paper's variants, section 3.3.
pub const SIZES: [(&str, Swin); 4] = [
    ("tiny", sized(96, [2, 2, 6, 2], 3)),
    ("small", sized(96, [2, 2, 18, 2], 3)),
    ("base", sized(128, [2, 2, 18, 2], 4)),
    ("large", sized(192, [2, 2, 18, 2], 6)),
];

const fn sized(dim: usize, depths: [usize; 4], heads: usize) -> Swin {
    Swin {
        dim,
        depths,
        heads: [heads, 2 * heads, 4 * heads, 8 * heads],
        window: 7,
    }
}

/// `swin_SIZE_patch4_windowW_IMAGE`, and torchvision's `swin_t`, `swin_s`, `swin_b`.
pub(super) fn find(id: &str) -> Option<Model> {
    let (size, rest) = id.strip_prefix("swin_")?.split_once("_patch4_window")?;
    let (window, image) = rest.split_once('_')?;
    let net = SIZES.iter().find(|s| s.0 == size)?.1;
    let positive = |text: &str| text.parse().ok().filter(|&n: &usize| n > 0);
    Some(Model {
        id: id.into(),
        arch: Arch::Swin(Swin {
            window: positive(window)?,
            ..net
        }),
        image: positive(image)?,
        classes: 1000,
    })
}

impl Swin {
    /// Appends the network; taps `stem` (the embedded patches), `stages.0` .. (each before the merging that follows it)
    /// and `norm`, maps `[N, H, W, C]`.
    ///
    /// # Errors
    /// The image is not a whole number of patches.
    pub fn build(
        &self,
        g: &mut Graph,
        x: Tid,
        classes: usize,
        options: &ModelOptions,
    ) -> Result<Heads> {
        let eps = options.norm_eps.unwrap_or(EPS);
        let dropout = options.dropout.unwrap_or(0.0);
        let x = self.embed(g, x, eps)?;
        let mut x = g.dropout(x, dropout)?;
        g.tap("stem", x);
        let last = (self.depths.iter().sum::<usize>() - 1).max(1) as f32;
        let mut done = 0;
        for (s, depth) in self.depths.into_iter().enumerate() {
            x = g.scoped(format!("layers.{s}"), |g| {
                let mut x = x;
                if s > 0 {
                    x = g.scoped("downsample", |g| merge(g, x, eps))?;
                }
                for b in 0..depth {
                    // Stochastic depth grows linearly with depth (Huang et al. 2016).
                    let drop_path = options.drop_path * (done + b) as f32 / last;
                    let rates = [dropout, drop_path];
                    x = g.scoped(format!("blocks.{b}"), |g| {
                        self.block(g, x, s, b % 2 == 1, eps, rates)
                    })?;
                }
                Ok(x)
            })?;
            done += depth;
            g.tap(format!("stages.{s}"), x);
        }
        let x = g.layer_norm(x, "norm", eps)?;
        g.tap("norm", x);
        let features = g.scoped("pool", |g| g.global_avg_pool(x))?;
        let logits = match classes {
            0 => None,
            _ => Some(g.linear(features, "head.fc", linear(classes))?),
        };
        Ok(Heads::new(logits, features))
    }

    /// `[N, H, W, 3]` to patches `[N, H / 4, W / 4, dim]`, normalised.
    fn embed(&self, g: &mut Graph, x: Tid, eps: f32) -> Result<Tid> {
        let &[_, h, w, channels] = g.shape(x) else {
            return Err(Error::input("patch_embed: wants images [N, H, W, C]"));
        };
        if h % PATCH != 0 || w % PATCH != 0 {
            return Err(Error::input(format!(
                "patch_embed: an image of {h}x{w} is not a whole number of patches of {PATCH}x{PATCH}; give sizes divisible by {PATCH}"
            )));
        }
        let layer = ConvLayer {
            out: self.dim,
            kernel: PATCH,
            stride: PATCH,
            pad: 0,
            groups: 1,
            bias: true,
            init: Init::UniformFanIn(channels * PATCH * PATCH),
        };
        let x = g.conv2d(x, "patch_embed.proj", layer)?;
        g.layer_norm(x, "patch_embed.norm", eps)
    }

    /// `x + attn(norm1(x))`, then `x + mlp(norm2(x))` (equation 3 of the paper); `rates` are dropout and drop path.
    fn block(
        &self,
        g: &mut Graph,
        x: Tid,
        stage: usize,
        shifted: bool,
        eps: f32,
        [dropout, drop_path]: [f32; 2],
    ) -> Result<Tid> {
        let c = g.spec(x).channels();
        let y = g.layer_norm(x, "norm1", eps)?;
        let y = g.scoped("attn", |g| self.attention(g, y, self.heads[stage], shifted))?;
        let y = g.dropout(y, dropout)?;
        let y = g.drop_path(y, drop_path)?;
        let x = g.add(x, y)?;
        let y = g.layer_norm(x, "norm2", eps)?;
        let y = g.scoped("mlp", |g| {
            let y = g.linear(y, "fc1", linear(MLP * c))?;
            let y = g.act(Act::Gelu, y)?;
            let y = g.dropout(y, dropout)?;
            g.linear(y, "fc2", linear(c))
        })?;
        let y = g.dropout(y, dropout)?;
        let y = g.drop_path(y, drop_path)?;
        g.add(x, y)
    }

    /// Attention within windows of a map `[N, H, W, C]`, which is padded to whole windows (before its Q, K and V, as in
    /// torchvision and Hugging Face). Along an axis of one window nothing is shifted.
    fn attention(&self, g: &mut Graph, x: Tid, heads: usize, shifted: bool) -> Result<Tid> {
        let &[_, h, w, c] = g.shape(x) else {
            return Err(Error::input("wants a map [N, H, W, C]"));
        };
        let whole = [h, w].map(|n| n.next_multiple_of(self.window));
        let shift = whole.map(|n| match shifted && n > self.window {
            true => self.window / 2,
            false => 0,
        });
        let x = g.pad2d(x, whole[0], whole[1])?;
        let qkv = g.linear(x, "qkv", linear(3 * c))?;
        let table = g.param(
            "relative_position_bias_table",
            &[(2 * self.window - 1).pow(2), heads],
            Layout::Plain,
            Init::TruncNormal(0.02),
            false,
        );
        let op = WindowAttention {
            heads,
            side: self.window,
            shift,
        };
        let y = g.window_attention(op, qkv, table)?;
        let y = g.pad2d(y, h, w)?;
        g.linear(y, "proj", linear(c))
    }
}

/// Patch merging: 2x2 patches side by side `[N, H / 2, W / 2, 4 C]`, normalised and reduced to `2 C`.
fn merge(g: &mut Graph, x: Tid, eps: f32) -> Result<Tid> {
    let c = g.spec(x).channels();
    let x = g.patch_merge(x)?;
    let x = g.layer_norm(x, "norm", eps)?;
    let layer = LinearLayer {
        bias: false,
        ..linear(2 * c)
    };
    g.linear(x, "reduction", layer)
}

/// As the paper's code initialises all of them.
fn linear(out: usize) -> LinearLayer {
    LinearLayer::with(out, Init::TruncNormal(0.02))
}
