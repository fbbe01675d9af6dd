//! How the libraries name the entries of a weight file, and which of them named a given file.
//!
//! A [`Scheme`] maps a parameter's name in this program (torchvision's for ResNets, timm's for ViTs) to the entries of
//! a file. A scheme is recognised by one telling entry; whatever stands before it is a wrapper's prefix (`module.` of
//! DataParallel, `model.`, `backbone.`).

mod swin;

use super::WeightFile;
use crate::models::Family;
pub(crate) use swin::{relative_position_index, window_of};

/// Whose names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Naming {
    /// torchvision's ResNets (timm's are the same) and the CIFAR ResNets named after them: this program's own.
    TorchvisionResnet,
    /// torchvision's `VisionTransformer`.
    TorchvisionVit,
    /// timm's `VisionTransformer` and DINOv2's own release: this program's own for ViTs.
    Timm,
    /// Hugging Face `ResNetForImageClassification`.
    HfResnet,
    /// Hugging Face `ViTModel`, `ViTForImageClassification`, and DeiT's.
    HfVit,
    /// Hugging Face `Dinov2Model`.
    HfDinov2,
    /// torchvision's `SwinTransformer`.
    TorchvisionSwin,
    /// timm's `SwinTransformer`: this program's own for Swin.
    TimmSwin,
    /// The release of Swin's authors, and timm before 0.9.
    MicrosoftSwin,
    /// Hugging Face `SwinModel` and `SwinForImageClassification`.
    HfSwin,
    /// A small ViT over `torch.nn.TransformerEncoder`.
    Torch,
    /// This program's own, for networks that no library has.
    Own,
}

impl Naming {
    /// The library, for people.
    pub fn library(self) -> &'static str {
        match self {
            Naming::TorchvisionResnet | Naming::TorchvisionVit | Naming::TorchvisionSwin => {
                "torchvision"
            }
            Naming::Timm | Naming::TimmSwin => "timm",
            Naming::MicrosoftSwin => "Microsoft",
            Naming::HfResnet | Naming::HfVit | Naming::HfDinov2 | Naming::HfSwin => "Hugging Face",
            Naming::Torch => "torch.nn",
            Naming::Own => "tilewright",
        }
    }

    /// The family of networks that are named so.
    pub fn family(self) -> Family {
        match self {
            Naming::TorchvisionResnet | Naming::HfResnet | Naming::Own => Family::Cnn,
            _ => Family::Vit,
        }
    }

    /// Whether it is one of Swin's.
    pub fn is_swin(self) -> bool {
        use Naming::*;
        matches!(self, TorchvisionSwin | TimmSwin | MicrosoftSwin | HfSwin)
    }

    /// Whether the library keeps `relative_position_index` beside each relative position table.
    pub(super) fn keeps_index(self) -> bool {
        self.is_swin() && self != Naming::TimmSwin
    }

    /// Epsilon of the norms where this library's differs from the model's own: 1e-12 in Hugging Face's ViT, 1e-5 in
    /// torch.nn.
    pub fn norm_eps(self) -> Option<f32> {
        match self {
            Naming::HfVit => Some(1e-12),
            Naming::Torch => Some(1e-5),
            _ => None,
        }
    }

    /// The entry that tells this naming, without its prefix.
    fn anchor(self) -> &'static str {
        match self {
            Naming::TorchvisionResnet => "layer1.0.conv1.weight",
            Naming::TorchvisionVit => "conv_proj.weight",
            Naming::Timm => "patch_embed.proj.weight",
            Naming::HfResnet => "embedder.embedder.convolution.weight",
            Naming::HfVit | Naming::HfDinov2 => "embeddings.patch_embeddings.projection.weight",
            Naming::TorchvisionSwin => "features.1.0.attn.qkv.weight",
            Naming::TimmSwin => "layers.0.blocks.0.attn.qkv.weight",
            Naming::MicrosoftSwin => "layers.0.downsample.reduction.weight",
            Naming::HfSwin => "embeddings.norm.weight",
            Naming::Torch => "patch_embed.weight",
            Naming::Own => "bn0.weight",
        }
    }

    /// What the library puts before the body's names when a classifier stands beside it.
    fn body_prefix(self) -> &'static str {
        match self {
            Naming::HfResnet => "resnet.",
            Naming::HfVit => "vit.",
            Naming::HfDinov2 => "dinov2.",
            Naming::HfSwin => "swin.",
            _ => "",
        }
    }
}

/// A naming with the prefixes of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scheme {
    /// Whose names.
    pub naming: Naming,
    /// Before the names of the body.
    body: String,
    /// Before the names of the classifier.
    head: String,
}

impl Scheme {
    /// The library's plain names, with or without a classifier.
    pub fn plain(naming: Naming, with_head: bool) -> Self {
        let body = if with_head { naming.body_prefix() } else { "" };
        Scheme {
            naming,
            body: body.into(),
            head: String::new(),
        }
    }

    /// The naming of `file`, recognised by its entries.
    pub fn of(file: &WeightFile) -> Option<Scheme> {
        use Naming::*;
        // What is told by a longer entry comes first: `bn0.weight` could be anybody's.
        let order = [
            HfSwin,
            MicrosoftSwin,
            TimmSwin,
            TorchvisionSwin,
            HfVit,
            HfResnet,
            TorchvisionVit,
            Timm,
            Torch,
            Own,
            TorchvisionResnet,
        ];
        let names = || file.entries().iter().map(|e| e.name.as_str());
        let (naming, body) = order.into_iter().find_map(|naming| {
            let prefix = names().find_map(|n| {
                let before = n.strip_suffix(naming.anchor())?;
                (before.is_empty() || before.ends_with('.')).then_some(before)
            })?;
            Some((naming, prefix.to_string()))
        })?;
        let has = |end: &str| names().any(|n| n.ends_with(end));
        let naming = match naming {
            HfVit if has("layer_scale1.lambda1") => HfDinov2,
            HfSwin | MicrosoftSwin | TimmSwin if !has("relative_position_bias_table") => {
                return None;
            }
            other => other,
        };
        // The classifier stands beside the body, or beside what wraps it.
        let mut head = body.clone();
        let leaf = classifier_names(naming);
        while !leaf.iter().any(|l| file.has(&format!("{head}{l}.weight"))) {
            match head.trim_end_matches('.').rfind('.') {
                Some(dot) => head.truncate(dot + 1),
                None if !head.is_empty() => head.clear(),
                None => break,
            }
        }
        Some(Scheme { naming, body, head })
    }

    /// The ways in which the file may hold the parameter `name`: each a list of entries that are concatenated along the
    /// first axis (the query, key and value of Hugging Face); the library's usual way first.
    pub fn candidates(&self, name: &str) -> Vec<Vec<String>> {
        let (path, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        if path == TEACHER {
            return vec![vec![format!("{}{}.{leaf}", self.head, self.teacher())]];
        }
        if is_classifier(path) {
            let beside = |l: &&str| vec![format!("{}{l}.{leaf}", self.head)];
            let mut all: Vec<Vec<String>> =
                classifier_names(self.naming).iter().map(beside).collect();
            // A network whose own name is among them keeps it (`linear` of the CIFAR ResNets).
            all.sort_by_key(|c| c[0] != format!("{}{name}", self.head));
            return all;
        }
        let body = match self.naming {
            Naming::Timm if name == PREFIX => vec![vec!["cls_token".into(), "dist_token".into()]],
            Naming::HfVit if name == PREFIX => vec![vec![
                "embeddings.cls_token".into(),
                "embeddings.distillation_token".into(),
            ]],
            Naming::TorchvisionResnet | Naming::Timm | Naming::Own => vec![vec![name.into()]],
            Naming::HfResnet => vec![vec![hf_resnet(path, leaf)]],
            naming if naming.is_swin() => swin::candidates(naming, path, leaf),
            _ => self.vit(path, leaf),
        };
        body.into_iter()
            .map(|pieces| {
                let full = |piece: String| format!("{}{piece}", self.body);
                pieces.into_iter().map(full).collect()
            })
            .collect()
    }

    fn vit(&self, path: &str, leaf: &str) -> Vec<Vec<String>> {
        let one = |names: &[&str]| -> Vec<Vec<String>> {
            names.iter().map(|n| vec![format!("{n}{leaf}")]).collect()
        };
        let whole = |name: &str| vec![vec![name.to_string()]];
        let Some((block, part)) = path.strip_prefix("blocks.").and_then(|p| p.split_once('.'))
        else {
            return match (self.naming, path, leaf) {
                (Naming::TorchvisionVit, "", "cls_token") => whole("class_token"),
                (Naming::TorchvisionVit, "", _) => whole("encoder.pos_embedding"),
                (Naming::TorchvisionVit, "norm", _) => one(&["encoder.ln."]),
                (Naming::TorchvisionVit, _, _) => one(&["conv_proj."]),
                (Naming::Torch, "", _) => whole(leaf),
                (Naming::Torch, "norm", _) => one(&["norm.", "encoder.norm."]),
                (Naming::Torch, _, _) => one(&["patch_embed."]),
                (_, "", "cls_token") => whole("embeddings.cls_token"),
                (_, "", _) => whole("embeddings.position_embeddings"),
                (_, "norm", _) => one(&["layernorm."]),
                (_, _, _) => one(&["embeddings.patch_embeddings.projection."]),
            };
        };
        match self.naming {
            Naming::TorchvisionVit => {
                let at = |p: &str| format!("encoder.layers.encoder_layer_{block}.{p}");
                match part {
                    "norm1" => one(&[&at("ln_1.")]),
                    "norm2" => one(&[&at("ln_2.")]),
                    "attn.qkv" => one(&[&at("self_attention.in_proj_")]),
                    "attn.proj" => one(&[&at("self_attention.out_proj.")]),
                    "mlp.fc1" => one(&[&at("mlp.0."), &at("mlp.linear_1.")]),
                    "mlp.fc2" => one(&[&at("mlp.3."), &at("mlp.linear_2.")]),
                    other => one(&[&at(&format!("{other}."))]),
                }
            }
            Naming::Torch => {
                let at = |p: &str| format!("encoder.layers.{block}.{p}");
                match part {
                    "attn.qkv" => one(&[&at("self_attn.in_proj_")]),
                    "attn.proj" => one(&[&at("self_attn.out_proj.")]),
                    "mlp.fc1" => one(&[&at("linear1.")]),
                    "mlp.fc2" => one(&[&at("linear2.")]),
                    other => one(&[&at(&format!("{other}."))]),
                }
            }
            _ => hf_block(self.naming, block, part, leaf),
        }
    }

    /// Whether the entry `name` may be left unread: counters, masks for pre-training, poolers; and classifiers, where
    /// `headless` says that none is wanted.
    pub fn may_skip(&self, name: &str, headless: bool) -> bool {
        let leaf = name.rsplit('.').next().unwrap_or(name);
        let inner = name.strip_prefix(&self.body).unwrap_or(name);
        matches!(leaf, "num_batches_tracked" | "position_ids" | "mask_token")
            || (self.naming == Naming::MicrosoftSwin && leaf == "attn_mask")
            || inner.starts_with("pooler.")
            || (headless && self.is_classifier_entry(name))
    }

    /// Whether the entry `name` belongs to the classifier.
    pub fn is_classifier_entry(&self, name: &str) -> bool {
        name.strip_prefix(&self.head)
            .and_then(|n| n.rsplit_once('.'))
            .is_some_and(|(path, _)| {
                classifier_names(self.naming).contains(&path) || path == self.teacher()
            })
    }

    /// The classifier's weight in `file`.
    pub fn classifier<'f>(&self, file: &'f WeightFile) -> Option<&'f super::Entry> {
        classifier_names(self.naming)
            .iter()
            .find_map(|l| file.get(&format!("{}{l}.weight", self.head)))
    }

    /// The library's name of DeiT's second classifier.
    fn teacher(&self) -> &'static str {
        match self.naming {
            Naming::HfVit => "distillation_classifier",
            _ => TEACHER,
        }
    }

    /// Whether `file` holds a DeiT with a distillation token.
    pub fn distilled(&self, file: &WeightFile) -> bool {
        let token = self.candidates(PREFIX).swap_remove(0).pop();
        token.is_some_and(|t| file.has(&t))
    }

    /// Whether the classifier in `file` reads twice the width of a token: DINOv2's.
    pub fn reads_cls_mean(&self, file: &WeightFile) -> bool {
        let width =
            |e: Option<&super::Entry>, axis: usize| e.and_then(|e| e.shape.get(axis).copied());
        let reads = width(self.classifier(file), 1);
        let dim = width(self.entry(file, "patch_embed.proj.weight"), 0);
        self.naming == Naming::HfDinov2 && reads.is_some() && reads == dim.map(|d| 2 * d)
    }

    /// The plain names of a DeiT with a distillation token, where they differ from a ViT's.
    pub(super) fn of_distilled(&mut self) {
        if self.naming == Naming::HfVit && self.body == "vit." {
            self.body = "deit.".into();
        }
    }

    /// The entry `name` of the body in `file`, by this program's name.
    pub fn entry<'f>(&self, file: &'f WeightFile, name: &str) -> Option<&'f super::Entry> {
        self.candidates(name).iter().find_map(|c| file.get(&c[0]))
    }

    /// Numbers `i` for which an entry with `before i after` is in `file` (`blocks.` 0 `.`): how many from 0 on.
    pub fn count(&self, file: &WeightFile, name: impl Fn(usize) -> String) -> usize {
        (0..)
            .take_while(|&i| self.entry(file, &name(i)).is_some())
            .count()
    }
}

/// This program's name of DeiT's class and distillation tokens, which are two entries in every library.
const PREFIX: &str = "prefix_tokens";

/// This program's name of DeiT's second classifier.
const TEACHER: &str = "head_dist";

/// Whether `path` (without the leaf) is a classifier in this program's names.
pub fn is_classifier(path: &str) -> bool {
    matches!(path, "fc" | "linear" | "head" | "head.fc" | "fc2" | TEACHER)
}

fn classifier_names(naming: Naming) -> &'static [&'static str] {
    match naming {
        Naming::TorchvisionResnet => &["fc", "linear"],
        Naming::TorchvisionVit => &["heads.head"],
        Naming::Timm | Naming::Torch => &["head"],
        Naming::HfResnet => &["classifier.1"],
        Naming::TorchvisionSwin | Naming::MicrosoftSwin => &["head"],
        Naming::TimmSwin => &["head.fc"],
        Naming::HfVit => &["classifier", "cls_classifier"],
        Naming::HfDinov2 | Naming::HfSwin => &["classifier"],
        Naming::Own => &["fc2"],
    }
}

fn hf_resnet(path: &str, leaf: &str) -> String {
    let layer = |part: &str| {
        let kind = if part.starts_with("conv") || part == "downsample.0" {
            "convolution"
        } else {
            "normalization"
        };
        let place = match part.as_bytes().last() {
            _ if part.starts_with("downsample") => "shortcut".into(),
            Some(digit) => format!("layer.{}", i32::from(digit - b'0') - 1),
            None => String::new(),
        };
        format!("{place}.{kind}.{leaf}")
    };
    let inner = path
        .strip_prefix("layer")
        .and_then(|p| p.split_once('.'))
        .and_then(|(stage, p)| Some((stage.parse::<usize>().ok()?, p.split_once('.')?)));
    match inner {
        Some((stage, (block, part))) => {
            let stage = stage.saturating_sub(1);
            format!("encoder.stages.{stage}.layers.{block}.{}", layer(part))
        }
        None if path == "conv1" => format!("embedder.embedder.convolution.{leaf}"),
        None => format!("embedder.embedder.normalization.{leaf}"),
    }
}

/// Names inside a block of Hugging Face's ViT and DINOv2: as the hub's files have them (transformers 4), then as
/// transformers 5 has them.
fn hf_block(naming: Naming, block: &str, part: &str, leaf: &str) -> Vec<Vec<String>> {
    let old = format!("encoder.layer.{block}");
    let roots = [old.clone(), format!("layers.{block}")];
    let single = |before: &str, now: &str| {
        let mut all = vec![vec![format!("{old}.{before}.{leaf}")]];
        all.extend(roots.iter().map(|r| vec![format!("{r}.{now}.{leaf}")]));
        all
    };
    let dino = naming == Naming::HfDinov2;
    match part {
        "attn.qkv" => {
            let three = |root: &str, names: [&str; 3]| {
                names
                    .map(|n| format!("{root}.attention.{n}.{leaf}"))
                    .to_vec()
            };
            let before = ["attention.query", "attention.key", "attention.value"];
            let now = ["q_proj", "k_proj", "v_proj"];
            let mut all = vec![three(&old, before)];
            all.extend(roots.iter().map(|r| three(r, now)));
            all
        }
        "attn.proj" => single("attention.output.dense", "attention.o_proj"),
        "norm1" if dino => single("norm1", "norm1"),
        "norm2" if dino => single("norm2", "norm2"),
        "norm1" => single("layernorm_before", "layernorm_before"),
        "norm2" => single("layernorm_after", "layernorm_after"),
        "ls1" | "ls2" => {
            let name = format!("layer_scale{}.lambda1", &part[2..]);
            roots.iter().map(|r| vec![format!("{r}.{name}")]).collect()
        }
        "mlp.fc1" if !dino => single("intermediate.dense", "mlp.fc1"),
        "mlp.fc2" if !dino => single("output.dense", "mlp.fc2"),
        other => single(other, other),
    }
}
