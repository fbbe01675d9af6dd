//! Vision transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"), with the pre-norm blocks, names and
//! initialisation of timm; DeiT (Touvron et al. 2021) is the same network, DINOv2 (Oquab et al. 2023) adds LayerScale.

use super::{Arch, Heads, Model, ModelOptions};
use crate::graph::{Graph, Init, Layout, Tid};
use crate::ops::act::Act;
use crate::ops::conv2d::ConvLayer;
use crate::ops::linear::LinearLayer;
use crate::{Error, Result};

/// How a ViT's weights start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// timm: normal of deviation 0.02 in every linear layer, zero biases.
    Timm,
    /// torch.nn.TransformerEncoderLayer: Glorot in qkv, PyTorch's default elsewhere.
    Torch,
}

/// Sizes of a ViT.
#[derive(Clone, Debug, PartialEq)]
pub struct Vit {
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Width of a token.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the MLP's hidden layer.
    pub hidden: usize,
    /// LayerScale's initial value, where there is LayerScale.
    pub layer_scale: Option<f32>,
    /// Layer norm after the last block.
    pub final_norm: bool,
    /// Epsilon of the layer norms.
    pub eps: f32,
    /// A distillation token and a second classifier, whose mean with the first is the result (DeiT).
    pub distilled: bool,
    /// The classifier reads the class token beside the mean of the patches (DINOv2's linear classifiers).
    pub cls_mean: bool,
    /// Default dropout.
    pub dropout: f32,
    /// Initial weights.
    pub start: Start,
}

impl Vit {
    /// A ViT of timm's kind.
    pub fn new(patch: usize, dim: usize, depth: usize, heads: usize) -> Self {
        Vit {
            patch,
            dim,
            depth,
            heads,
            hidden: 4 * dim,
            layer_scale: None,
            final_norm: true,
            eps: 1e-6,
            distilled: false,
            cls_mean: false,
            dropout: 0.0,
            start: Start::Timm,
        }
    }
}

/// (name, dim, depth, heads) of the usual sizes.
pub const SIZES: [(&str, usize, usize, usize); 5] = [
    ("tiny", 192, 12, 3),
    ("small", 384, 12, 6),
    ("base", 768, 12, 12),
    ("large", 1024, 24, 16),
    ("huge", 1280, 32, 16),
];

fn sized(size: &str, patch: usize) -> Option<Vit> {
    let &(_, dim, depth, heads) = SIZES.iter().find(|s| s.0 == size)?;
    Some(Vit::new(patch, dim, depth, heads))
}

/// `vit_SIZE_patchP_IMAGE`, `deit_SIZE[_distilled]_patchP_IMAGE`, `dinov2_SIZE[_imagenet1k_1_layer]`,
/// `vit_pP_eDIM_dDEPTH[_hHEADS]`.
pub(super) fn find(id: &str) -> Option<Model> {
    let model = |net, image, classes| {
        Some(Model {
            id: id.into(),
            arch: Arch::Vit(net),
            image,
            classes,
        })
    };
    if let Some(size) = id.strip_prefix("dinov2_") {
        let linear = size.strip_suffix("_imagenet1k_1_layer");
        let size = linear.unwrap_or(size);
        let net = Vit {
            layer_scale: Some(1e-5),
            cls_mean: linear.is_some(),
            ..sized(size, 14).filter(|_| ["small", "base", "large"].contains(&size))?
        };
        return model(net, 224, if linear.is_some() { 1000 } else { 0 });
    }
    if let Some(sizes) = id.strip_prefix("vit_p").filter(|_| id.contains("_e")) {
        return model(small(sizes)?, 32, 10);
    }
    let rest = id
        .strip_prefix("vit_")
        .or_else(|| id.strip_prefix("deit_"))?;
    let (size, rest) = rest.split_once("_patch")?;
    let teacher = id
        .starts_with("deit_")
        .then(|| size.strip_suffix("_distilled"))
        .flatten();
    let size = teacher.unwrap_or(size);
    let (patch, image) = rest.split_once('_')?;
    let image = positive(image)?;
    let net = Vit {
        distilled: teacher.is_some(),
        ..sized(size, positive(patch)?)?
    };
    model(net, image, 1000)
}

fn positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&n| n > 0)
}

/// The small ViT over torch.nn.TransformerEncoder: `4_e128_d6`, 8 heads unless `_h4` follows.
fn small(sizes: &str) -> Option<Vit> {
    let mut parts = sizes.split('_');
    let patch = positive(parts.next()?)?;
    let dim = positive(parts.next()?.strip_prefix('e')?)?;
    let depth = positive(parts.next()?.strip_prefix('d')?)?;
    let heads = match parts.next() {
        None => 8,
        Some(h) => positive(h.strip_prefix('h')?)?,
    };
    if parts.next().is_some() || dim % heads != 0 {
        return None;
    }
    Some(Vit {
        final_norm: false,
        eps: 1e-5,
        start: Start::Torch,
        ..Vit::new(patch, dim, depth, heads)
    })
}

/// A ViT from `patch=4,dim=256,depth=8,heads=2,mlp=2`, with `classes`, `img`, `norm` (0 or 1), `dropout`, `eps` and
/// `ls` (LayerScale's initial value) as one likes.
pub(super) fn from_spec(id: &str, spec: &str) -> Result<Model> {
    const KEYS: &str = "patch, dim, depth, heads, mlp, classes, img, norm, dropout, eps, ls";
    let bad = |why: String| Error::input(format!("{id}: {why}"));
    let (mut net, mut mlp) = (Vit::new(16, 192, 12, 3), 4.0f64);
    let (mut image, mut classes) = (None, 10);
    for part in spec.split(',').filter(|p| !p.is_empty()) {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| bad(format!("{part:?} is not key=value; keys are {KEYS}")))?;
        let number: f64 = value
            .parse()
            .ok()
            .filter(|v: &f64| v.is_finite() && *v >= 0.0)
            .ok_or_else(|| bad(format!("{key}={value}: a number is wanted")))?;
        let count = || {
            if number.fract() == 0.0 && (1.0..1e6).contains(&number) {
                Ok(number as usize)
            } else {
                Err(bad(format!(
                    "{key}={value}: a whole number of at least 1 is wanted"
                )))
            }
        };
        match key {
            "patch" => net.patch = count()?,
            "dim" => net.dim = count()?,
            "depth" => net.depth = count()?,
            "heads" => net.heads = count()?,
            "mlp" => mlp = number,
            "classes" => classes = if number == 0.0 { 0 } else { count()? },
            "img" => image = Some(count()?),
            "norm" if number == 0.0 || number == 1.0 => net.final_norm = number == 1.0,
            "norm" => return Err(bad(format!("norm={value}: 0 or 1 is wanted"))),
            "dropout" if number < 1.0 => net.dropout = number as f32,
            "dropout" => return Err(bad(format!("dropout={value}: below 1 is wanted"))),
            "eps" => net.eps = number as f32,
            "ls" => net.layer_scale = (number > 0.0).then_some(number as f32),
            _ => return Err(bad(format!("no key is called {key}; keys are {KEYS}"))),
        }
    }
    net.hidden = (net.dim as f64 * mlp).round() as usize;
    if net.dim % net.heads != 0 || net.hidden == 0 {
        let (dim, heads) = (net.dim, net.heads);
        return Err(bad(format!(
            "a width of {dim} cannot be split into {heads} heads, or mlp={mlp} is too small"
        )));
    }
    Ok(Model {
        id: id.into(),
        image: image.unwrap_or(if net.patch >= 14 { 224 } else { 32 }),
        classes,
        arch: Arch::Vit(net),
    })
}

impl Vit {
    /// Appends the network; taps `stem` (tokens with their positions), `blocks.0` .., `norm`.
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
        let eps = options.norm_eps.unwrap_or(self.eps);
        let dropout = options.dropout.unwrap_or(self.dropout);
        let x = self.embed(g, x)?;
        let mut x = g.dropout(x, dropout)?;
        g.tap("stem", x);
        for i in 0..self.depth {
            let name = format!("blocks.{i}");
            // Stochastic depth grows linearly with depth (Huang et al. 2016).
            let drop_path = options.drop_path * i as f32 / (self.depth.max(2) - 1) as f32;
            x = g.scoped(name.clone(), |g| self.block(g, x, eps, dropout, drop_path))?;
            g.tap(name, x);
        }
        if self.final_norm {
            x = g.layer_norm(x, "norm", eps)?;
            g.tap("norm", x);
        }
        let features = g.scoped("cls", |g| g.select_token(x, 0))?;
        match classes {
            0 => Ok(Heads::new(None, features)),
            _ => self.classify(g, x, features, classes, options),
        }
    }

    /// Learned tokens before the patches.
    pub fn prefix(&self) -> usize {
        1 + usize::from(self.distilled)
    }

    /// The classifier over the tokens `x`, of which `cls` is the first.
    fn classify(
        &self,
        g: &mut Graph,
        x: Tid,
        cls: Tid,
        classes: usize,
        options: &ModelOptions,
    ) -> Result<Heads> {
        let layer = self.linear_layer(self.dim, classes);
        if self.cls_mean || options.cls_mean {
            let both = g.scoped("pool", |g| g.cls_mean(x, self.prefix()))?;
            return Ok(Heads::new(Some(g.linear(both, "head", layer)?), cls));
        }
        let logits = g.linear(cls, "head", layer)?;
        if !self.distilled {
            return Ok(Heads::new(Some(logits), cls));
        }
        let token = g.scoped("dist", |g| g.select_token(x, 1))?;
        let other = g.linear(token, "head_dist", layer)?;
        let mean = g.scoped("mean", |g| g.mean_of_two(logits, other))?;
        Ok(Heads {
            taught: Some([logits, other]),
            ..Heads::new(Some(mean), cls)
        })
    }

    /// `[N, H, W, 3]` to tokens `[N, prefix + patches, dim]`: one convolution whose stride is its kernel, the class
    /// token in front, positions added.
    fn embed(&self, g: &mut Graph, x: Tid) -> Result<Tid> {
        let (p, c) = (self.patch, self.dim);
        let &[n, h, w, channels] = g.shape(x) else {
            return Err(Error::input("patch_embed: wants images [N, H, W, C]"));
        };
        if h % p != 0 || w % p != 0 {
            return Err(Error::input(format!(
                "patch_embed: an image of {h}x{w} is not a whole number of patches of {p}x{p}; give sizes divisible by {p}"
            )));
        }
        let patches = (h / p) * (w / p);
        let prefix = self.prefix();
        let cls = g.param(
            if self.distilled {
                "prefix_tokens"
            } else {
                "cls_token"
            },
            &[prefix, 1, c],
            Layout::Plain,
            Init::Normal(1e-6),
            false,
        );
        let pos = [1, prefix + patches, c];
        let pos = g.param(
            "pos_embed",
            &pos,
            Layout::Plain,
            Init::TruncNormal(0.02),
            false,
        );
        let layer = ConvLayer {
            out: c,
            kernel: p,
            stride: p,
            pad: 0,
            groups: 1,
            bias: true,
            init: Init::UniformFanIn(channels * p * p),
        };
        let x = g.conv2d(x, "patch_embed.proj", layer)?;
        let x = g.view(x, &[n, patches, c])?;
        g.scoped("embed", |g| g.token_embed(x, Some(cls), pos))
    }

    /// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`.
    fn block(&self, g: &mut Graph, x: Tid, eps: f32, dropout: f32, drop_path: f32) -> Result<Tid> {
        let c = self.dim;
        let y = g.layer_norm(x, "norm1", eps)?;
        let y = g.scoped("attn", |g| {
            let qkv = g.linear(y, "qkv", self.qkv_layer())?;
            let y = g.attention(qkv, self.heads)?;
            g.linear(y, "proj", self.attn_out_layer())
        })?;
        let y = g.dropout(y, dropout)?;
        let x = self.branch(g, x, y, "ls1", drop_path)?;
        let y = g.layer_norm(x, "norm2", eps)?;
        let y = g.scoped("mlp", |g| {
            let y = g.linear(y, "fc1", self.linear_layer(c, self.hidden))?;
            let y = g.act(Act::Gelu, y)?;
            let y = g.dropout(y, dropout)?;
            g.linear(y, "fc2", self.linear_layer(self.hidden, c))
        })?;
        let y = g.dropout(y, dropout)?;
        self.branch(g, x, y, "ls2", drop_path)
    }

    /// `x + drop_path(ls(y))`.
    fn branch(&self, g: &mut Graph, x: Tid, y: Tid, name: &str, drop_path: f32) -> Result<Tid> {
        g.scoped(name, |g| {
            let mut y = y;
            if let Some(start) = self.layer_scale {
                let gamma = g.param(
                    "gamma",
                    &[self.dim],
                    Layout::Plain,
                    Init::Const(start),
                    false,
                );
                if drop_path == 0.0 || !g.mode.random {
                    return g.layer_scale(y, gamma, Some(x));
                }
                y = g.layer_scale(y, gamma, None)?;
            }
            let y = g.drop_path(y, drop_path)?;
            g.add(x, y)
        })
    }

    fn linear_layer(&self, inputs: usize, out: usize) -> LinearLayer {
        match self.start {
            Start::Timm => LinearLayer::with(out, Init::TruncNormal(0.02)),
            Start::Torch => LinearLayer::new(inputs, out),
        }
    }

    fn qkv_layer(&self) -> LinearLayer {
        match self.start {
            Start::Timm => self.linear_layer(self.dim, 3 * self.dim),
            Start::Torch => LinearLayer::with(3 * self.dim, Init::XavierUniform),
        }
    }

    fn attn_out_layer(&self) -> LinearLayer {
        LinearLayer {
            bias_init: Init::Zeros,
            ..self.linear_layer(self.dim, self.dim)
        }
    }
}
