//! Model builders: a network as a paper describes it, written as a static-shape graph.
//!
//! A model is found by its id ([`find`]), built with [`Model::build`] on an input `[N, H, W, 3]`, and run through a
//! [`session::Session`]. Parameter names are torchvision's for ResNets and timm's for ViTs; how weight files of other
//! libraries name them is [`crate::weights::naming`]'s affair.

pub mod cifar_resnet;
pub mod cnn_whiten;
pub mod forward;
pub mod grad;
pub mod head;
pub mod info;
pub mod init;
pub mod resnet;
pub mod session;
pub mod swin;
pub mod thin;
pub mod vit;

use crate::data::{IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocess, ResizeMode};
use crate::graph::{Graph, Mode, Spec, Tid};
use crate::weights::Naming;
use crate::{Error, Result};
use cifar_resnet::CifarResNet;
use cnn_whiten::CnnWhiten;
use resnet::ResNet;
use swin::Swin;
use vit::Vit;

/// Convolutional or transformer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Convolutional network.
    Cnn,
    /// Vision transformer.
    Vit,
}

/// What a builder gives.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// `[N, classes]`, where the model has a classifier.
    pub logits: Option<Tid>,
    /// `[N, dim]`: what the classifier reads (pooled channels, or the class token).
    pub features: Tid,
    /// The logits of two classifiers whose mean `logits` is (distilled DeiT): the one that learns from the labels, and
    /// the one that learns from a teacher.
    pub taught: Option<[Tid; 2]>,
}

impl Heads {
    /// With one classifier, or none.
    pub fn new(logits: Option<Tid>, features: Tid) -> Self {
        Heads {
            logits,
            features,
            taught: None,
        }
    }

    /// The logits, or the features where there is no classifier.
    pub fn output(&self) -> Tid {
        self.logits.unwrap_or(self.features)
    }
}

/// What can be chosen about a model when it is built.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// Size of the classifier; 0: none, the features are the output. Default: the model's own.
    pub classes: Option<usize>,
    /// Probability of dropout, where the model has such layers. Default: the model's own.
    pub dropout: Option<f32>,
    /// Drop path of the last block (linear from 0 at the first), in ViTs.
    pub drop_path: f32,
    /// The classifier reads the class token beside the mean of the patches, in ViTs.
    pub cls_mean: bool,
    /// Epsilon of the norms, in place of the model's own (libraries differ; see [`crate::weights::naming`]).
    pub norm_eps: Option<f32>,
}

/// The sizes of an architecture.
#[derive(Clone, Debug, PartialEq)]
pub enum Arch {
    /// Residual network for photographs.
    ResNet(ResNet),
    /// Residual network for CIFAR.
    CifarResNet(CifarResNet),
    /// Small CNN that normalises its input.
    CnnWhiten(CnnWhiten),
    /// Vision transformer.
    Vit(Vit),
    /// Vision transformer with shifted windows.
    Swin(Swin),
}

/// A network that can be built, with its defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// The id (not the alias) or spec string.
    pub id: String,
    /// Its sizes.
    pub arch: Arch,
    /// Side of the images that it is made for.
    pub image: usize,
    /// Classes of its classifier; 0: a backbone.
    pub classes: usize,
}

/// A graph with a model in it.
#[derive(Clone, Debug)]
pub struct Net {
    /// The graph.
    pub graph: Graph,
    /// Images `[N, H, W, 3]`, normalised.
    pub input: Tid,
    /// Results.
    pub heads: Heads,
    /// Rows and columns of patches, in a ViT.
    pub grid: Option<(usize, usize)>,
}

impl Model {
    /// Convolutional or transformer.
    pub fn family(&self) -> Family {
        match self.arch {
            Arch::Vit(_) | Arch::Swin(_) => Family::Vit,
            _ => Family::Cnn,
        }
    }

    /// From an image to the input that the usual weights under `naming` were trained on (default: the model's own
    /// naming), at `size` pixels.
    pub fn preprocess(&self, naming: Option<Naming>, size: usize) -> Preprocess {
        let plain = Preprocess {
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
            ..Preprocess::new(size as u32)
        };
        if let Arch::Swin(net) = &self.arch {
            return swin_preprocess(net, naming, plain);
        }
        let Arch::Vit(net) = &self.arch else {
            let crop_ratio = match self.arch {
                Arch::ResNet(_) if size > 64 => 0.875,
                _ => 1.0,
            };
            return Preprocess {
                crop_ratio,
                ..plain
            };
        };
        let bicubic = Preprocess {
            interpolation: Interpolation::Bicubic,
            ..plain
        };
        let half = [0.5; 3];
        match naming.unwrap_or(self.naming()) {
            // torchvision's V1 weights.
            Naming::TorchvisionVit => Preprocess {
                crop_ratio: 0.875,
                ..plain
            },
            // ViTImageProcessor resizes both sides and cuts nothing off.
            Naming::HfVit if !self.id.starts_with("deit") => Preprocess {
                mean: half,
                std: half,
                resize_mode: ResizeMode::Squash,
                ..plain
            },
            _ if net.layer_scale.is_some() => Preprocess {
                crop_ratio: 0.875,
                ..bicubic
            },
            _ if self.id.starts_with("deit") => Preprocess {
                crop_ratio: 0.9,
                ..bicubic
            },
            // timm's AugReg weights (Steiner et al. 2021).
            Naming::Timm if self.id.starts_with("vit_") && size > 64 => Preprocess {
                crop_ratio: 0.9,
                mean: half,
                std: half,
                ..bicubic
            },
            _ => plain,
        }
    }

    /// Appends the network to `g`, reading `x` `[N, H, W, 3]`.
    ///
    /// # Errors
    /// The image does not suit the network: the message names the layer and the shapes.
    pub fn build(&self, g: &mut Graph, x: Tid, options: &ModelOptions) -> Result<Heads> {
        let &[n, h, w, 3] = g.shape(x) else {
            return Err(Error::input(format!(
                "{} takes images of 3 channels, [N, H, W, 3], not {:?}",
                self.id,
                g.shape(x)
            )));
        };
        if n * h * w == 0 {
            return Err(Error::input(format!(
                "{}: a batch of {n} images of {h}x{w} pixels; each must be at least 1",
                self.id
            )));
        }
        let refuse = |what: &str, p: f32| {
            if p == 0.0 {
                return Ok(());
            }
            Err(Error::input(format!("{} has no {what} layers", self.id)))
        };
        let classes = options.classes.unwrap_or(self.classes);
        if self.family() != Family::Vit {
            refuse("drop path", options.drop_path)?;
        }
        match &self.arch {
            Arch::ResNet(net) => {
                refuse("dropout", options.dropout.unwrap_or(0.0))?;
                net.build(g, x, classes, options)
            }
            Arch::CifarResNet(net) => {
                refuse("dropout", options.dropout.unwrap_or(0.0))?;
                net.build(g, x, classes, options)
            }
            Arch::CnnWhiten(net) => net.build(g, x, classes, options),
            Arch::Vit(net) => net.build(g, x, classes, options),
            Arch::Swin(net) => net.build(g, x, classes, options),
        }
        .map_err(|e| e.context(&self.id))
    }

    /// Rows and columns of patches of an image of `(h, w)` pixels, in a ViT.
    pub fn grid(&self, h: usize, w: usize) -> Option<(usize, usize)> {
        match &self.arch {
            Arch::Vit(v) => Some((h / v.patch, w / v.patch)),
            _ => None,
        }
    }

    /// A graph of its own for `batch` images of `(height, width)` pixels.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn net(
        &self,
        batch: usize,
        (h, w): (usize, usize),
        mode: Mode,
        options: &ModelOptions,
    ) -> Result<Net> {
        let mut graph = Graph::new();
        graph.mode = mode;
        let input = graph.input("input", Spec::f32([batch, h, w, 3]));
        let heads = self.build(&mut graph, input, options)?;
        let grid = self.grid(h, w);
        Ok(Net {
            graph,
            input,
            heads,
            grid,
        })
    }
}

/// What the usual weights of a Swin transformer were trained on.
fn swin_preprocess(net: &Swin, naming: Option<Naming>, plain: Preprocess) -> Preprocess {
    let bicubic = Preprocess {
        interpolation: Interpolation::Bicubic,
        ..plain
    };
    match naming {
        // torchvision's weights: resized to 232 (tiny), 246 (small), 238 (base), each for 224.
        Some(Naming::TorchvisionSwin) => {
            let side = match (net.dim, net.depths[2]) {
                (96, 6) => 232.0,
                (96, _) => 246.0,
                _ => 238.0,
            };
            Preprocess {
                crop_ratio: 224.0 / side,
                ..bicubic
            }
        }
        // ViTImageProcessor resizes both sides and cuts nothing off.
        Some(Naming::HfSwin) => Preprocess {
            resize_mode: ResizeMode::Squash,
            ..bicubic
        },
        _ => Preprocess {
            crop_ratio: if plain.size > 224 { 1.0 } else { 0.9 },
            ..bicubic
        },
    }
}

/// The ids that `models` lists, by family. [`find`] knows more: any patch and image size, and spec strings.
pub const IDS: &[&str] = &[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "cnn_r14",
    "cnn_whiten",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch16_224",
    "vit_base_patch32_224",
    "vit_large_patch16_224",
    "vit_large_patch32_224",
    "vit_huge_patch14_224",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
    "dinov2_small",
    "dinov2_base",
    "dinov2_large",
    "dinov2_small_imagenet1k_1_layer",
    "dinov2_base_imagenet1k_1_layer",
    "dinov2_large_imagenet1k_1_layer",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224",
    "swin_large_patch4_window12_384",
    "vit_p4_e128_d6",
    "vit_p4_e128_d6_h4",
];

/// Other names of models: (alias, id).
pub const ALIASES: &[(&str, &str)] = &[
    ("vit_b_16", "vit_base_patch16_224"),
    ("vit_b_32", "vit_base_patch32_224"),
    ("vit_l_16", "vit_large_patch16_224"),
    ("vit_l_32", "vit_large_patch32_224"),
    ("vit_h_14", "vit_huge_patch14_224"),
    ("vit_small_patch14_dinov2", "dinov2_small"),
    ("vit_base_patch14_dinov2", "dinov2_base"),
    ("vit_large_patch14_dinov2", "dinov2_large"),
    ("swin_t", "swin_tiny_patch4_window7_224"),
    ("swin_s", "swin_small_patch4_window7_224"),
    ("swin_b", "swin_base_patch4_window7_224"),
    ("resnet_18", "resnet18"),
    ("resnet_34", "resnet34"),
    ("resnet_50", "resnet50"),
    ("resnet_101", "resnet101"),
    ("resnet_152", "resnet152"),
];

/// Every model of [`IDS`].
pub fn list() -> Vec<Model> {
    IDS.iter()
        .map(|id| find(id).expect("every listed id is known"))
        .collect()
}

/// The model called `name`: an id, an alias, a Hugging Face or timm name (`facebook/dinov2-small`,
/// `vit_small_patch14_dinov2.lvd142m`), a spec string (`vit:patch=4,dim=256,depth=8,heads=2,mlp=2`), or
/// one with fewer blocks (`resnet50:stages=3`, `vit_small_patch16_224:depth=8`).
///
/// # Errors
/// [`Error::Input`]: no model is called so (the nearest name is given), or a spec string has a wrong key or value.
pub fn find(name: &str) -> Result<Model> {
    if let Some(spec) = name.strip_prefix("vit:") {
        return vit::from_spec(name, spec);
    }
    if let Some((whole, settings)) = name.split_once(':') {
        return thin::with(find(whole)?, settings);
    }
    let plain = name.rsplit('/').next().unwrap_or(name);
    let plain = plain
        .split('.')
        .next()
        .unwrap_or(plain)
        .to_ascii_lowercase()
        .replace('-', "_");
    let id = ALIASES
        .iter()
        .find(|(alias, _)| *alias == plain)
        .map_or(plain.as_str(), |(_, id)| id);
    resnet::find(id)
        .or_else(|| cifar_resnet::find(id))
        .or_else(|| cnn_whiten::find(id))
        .or_else(|| vit::find(id))
        .or_else(|| swin::find(id))
        .ok_or_else(|| unknown(name, &plain))
}

fn unknown(name: &str, plain: &str) -> Error {
    let known = IDS
        .iter()
        .copied()
        .chain(ALIASES.iter().map(|(alias, _)| *alias));
    let nearest = known.min_by_key(|id| edits(id, plain)).unwrap_or_default();
    Error::input(format!(
        "no model is called {name:?}; the nearest is {nearest} (`models` lists all; a ViT of any size: \
         vit:patch=4,dim=256,depth=8,heads=2,mlp=2)"
    ))
}

/// Levenshtein distance.
pub(crate) fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let change = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = change.min(corner + 1).min(row[j] + 1);
        }
    }
    row[row.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_libraries_are_found() {
        for (name, id) in [
            ("vit_b_16", "vit_base_patch16_224"),
            ("google/vit-base-patch16-224", "vit_base_patch16_224"),
            ("facebook/dinov2-small", "dinov2_small"),
            ("vit_small_patch14_dinov2.lvd142m", "dinov2_small"),
            ("microsoft/resnet-50", "resnet50"),
        ] {
            assert_eq!(find(name).unwrap().id, id);
        }
        let e = find("resnet81").unwrap_err().to_string();
        assert!(e.contains("the nearest is resnet18"), "{e}");
    }

    #[test]
    fn every_listed_model_is_found_under_its_own_id() {
        for (model, id) in list().iter().zip(IDS) {
            assert_eq!(&model.id, id);
        }
        for (_, id) in ALIASES {
            assert!(IDS.contains(id), "{id}");
        }
    }

    #[test]
    fn images_that_do_not_suit_are_refused_with_the_layer() {
        let bad = |name: &str, size| {
            let net =
                find(name)
                    .unwrap()
                    .net(1, (size, size), Mode::default(), &ModelOptions::default());
            net.unwrap_err().to_string()
        };
        assert!(bad("vit_base_patch16_224", 100).contains("patch_embed"));
        assert!(bad("resnet18", 0).contains("0x0"));
    }
}
