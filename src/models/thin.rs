//! Networks without some of their blocks: a ResNet's last stages, a ViT's blocks. What is left is a network of its own,
//! called `resnet50:stages=3` or `vit_small_patch16_224:depth=8`, with the weights of the blocks that stayed.

use super::{Arch, Model, ModelOptions, Net};
use crate::graph::Mode;
use crate::models::session::load_net;
use crate::weights::load::{LoadOptions, Loaded, load};
use crate::weights::{FileNames, WeightFile};
use crate::{Error, Result};
use std::collections::HashMap;

/// A network with fewer blocks than the one that it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Thinned {
    /// The whole network.
    pub from: Model,
    /// What is left.
    pub model: Model,
    /// By block of what is left: which of the whole network's it is (ViTs).
    pub blocks: Vec<usize>,
}

impl Thinned {
    /// Cuts off the last `n` stages of a ResNet.
    ///
    /// # Errors
    /// [`Error::Input`]: another kind of network, or no stage would be left.
    pub fn drop_stages(model: &Model, n: usize) -> Result<Thinned> {
        let stages = stages_of(&model.arch).ok_or_else(|| {
            Error::input(format!(
                "{} has no stages that can be cut off (ResNets have); of a ViT, --drop-blocks cuts blocks off",
                model.id
            ))
        })?;
        if n >= stages {
            return Err(Error::input(format!(
                "--drop-stages {n}: {} has {stages} stages; at least one must stay",
                model.id
            )));
        }
        Ok(Thinned {
            from: model.clone(),
            model: with_stages(model, stages - n)?,
            blocks: vec![],
        })
    }

    /// Cuts off the last `n` blocks of a ViT.
    ///
    /// # Errors
    /// [`Error::Input`]: another kind of network, or no block would be left.
    pub fn drop_blocks(model: &Model, n: usize) -> Result<Thinned> {
        let depth = depth_of(model, "--drop-blocks")?;
        if n >= depth {
            return Err(Error::input(format!(
                "--drop-blocks {n}: {} has {depth} blocks; at least one must stay",
                model.id
            )));
        }
        Self::keep(model, (0..depth - n).collect())
    }

    /// Keeps the blocks of a ViT that `list` names: `0-3,8-11`.
    ///
    /// # Errors
    /// [`Error::Input`]: another kind of network, no list of that form, a block that there is not, or one named twice.
    pub fn keep_blocks(model: &Model, list: &str) -> Result<Thinned> {
        let depth = depth_of(model, "--keep-blocks")?;
        let bad = |why: &str| {
            Error::input(format!(
                "--keep-blocks {list}: {why}; {} has blocks 0-{}, give a list such as 0-3,8-11",
                model.id,
                depth - 1
            ))
        };
        let mut kept: Vec<usize> = vec![];
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |t: &str| t.trim().parse::<usize>().map_err(|_| bad("not a list"));
            let (first, last) = (number(first)?, number(last)?);
            if first > last || last >= depth {
                return Err(bad("there is no such range"));
            }
            if kept.last().is_some_and(|&k| k >= first) {
                return Err(bad("blocks must be named once and in order"));
            }
            kept.extend(first..=last);
        }
        Self::keep(model, kept)
    }

    fn keep(model: &Model, blocks: Vec<usize>) -> Result<Thinned> {
        Ok(Thinned {
            from: model.clone(),
            model: with_depth(model, blocks.len())?,
            blocks,
        })
    }

    /// Name in the whole network of the parameter `name` of what is left.
    fn whole_name(&self, name: &str) -> String {
        let block = name
            .strip_prefix("blocks.")
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(i, rest)| Some((i.parse::<usize>().ok()?, rest)));
        match block {
            Some((i, rest)) => format!("blocks.{}.{rest}", self.blocks[i]),
            None => name.to_string(),
        }
    }

    /// Finds the weights of `net`, a built [`model`](Self::model), in a file of the whole network or of what is left.
    /// A classifier that reads another number of features than the file's starts afresh.
    ///
    /// # Errors
    /// As [`load()`]: the file fits neither.
    pub fn load(
        &self,
        net: &Net,
        image: (usize, usize),
        options: &ModelOptions,
        file: &WeightFile,
        replace_head: bool,
    ) -> Result<Loaded> {
        let whole = self.from.net(1, image, Mode::default(), options)?;
        let narrower = whole.graph.spec(whole.heads.features).channels()
            != net.graph.spec(net.heads.features).channels();
        let replace_head = replace_head || narrower;
        let choices = LoadOptions {
            replace_head,
            grid: whole.grid,
        };
        let loaded = match load(&self.from, &whole.graph, file, &choices) {
            Ok(loaded) => loaded,
            // It may be a file of what is left.
            Err(e) => {
                return load_net(&self.model, net, file, replace_head).map_err(|_| e);
            }
        };
        let at: HashMap<&str, usize> = whole
            .graph
            .params
            .iter()
            .enumerate()
            .map(|(i, p)| (p.name.as_str(), i))
            .collect();
        let place = |p: &crate::graph::Param| {
            at.get(self.whole_name(&p.name).as_str())
                .copied()
                .ok_or_else(|| Error::run(format!("{} is not in {}", p.name, self.from.id)))
        };
        let places = net
            .graph
            .params
            .iter()
            .map(place)
            .collect::<Result<Vec<_>>>()?;
        let names = FileNames {
            scheme: loaded.names.scheme.clone(),
            entries: net
                .graph
                .params
                .iter()
                .zip(&places)
                .map(|(p, &i)| {
                    // Under the same one of the library's names, with the block's new number.
                    let ways = loaded.names.scheme.candidates(&whole.graph.params[i].name);
                    let way = ways.iter().position(|w| *w == loaded.names.entries[i]);
                    loaded.names.scheme.candidates(&p.name)[way.unwrap_or(0)].clone()
                })
                .collect(),
            extra: loaded.names.extra.clone(),
            indices: loaded.names.indices,
        };
        Ok(loaded.remapped(&places, names))
    }
}

fn stages_of(arch: &Arch) -> Option<usize> {
    match arch {
        Arch::ResNet(r) => Some(r.depths.iter().filter(|&&d| d > 0).count()),
        Arch::CifarResNet(r) => Some(r.stages),
        _ => None,
    }
}

fn depth_of(model: &Model, flag: &str) -> Result<usize> {
    match &model.arch {
        Arch::Vit(v) => Ok(v.depth),
        Arch::Swin(_) => Err(Error::input(format!(
            "{flag}: the blocks of {} come in pairs within stages and cannot be dropped one by one; {flag} is for ViTs",
            model.id
        ))),
        _ => Err(Error::input(format!(
            "{flag} is for ViTs; of {}, --drop-stages cuts stages off",
            model.id
        ))),
    }
}

fn with_stages(model: &Model, stages: usize) -> Result<Model> {
    let most = stages_of(&model.arch).unwrap_or(0);
    if stages == 0 || stages > most {
        return Err(Error::input(format!(
            "{}: stages={stages}; give 1 to {most}",
            model.id
        )));
    }
    let arch = match model.arch.clone() {
        Arch::ResNet(mut r) => {
            r.depths[stages..].fill(0);
            Arch::ResNet(r)
        }
        Arch::CifarResNet(r) => Arch::CifarResNet(super::cifar_resnet::CifarResNet { stages, ..r }),
        other => other,
    };
    Ok(named(model, arch, "stages", stages))
}

fn with_depth(model: &Model, depth: usize) -> Result<Model> {
    let Arch::Vit(vit) = &model.arch else {
        return Err(Error::input(format!("{} has no depth to set", model.id)));
    };
    if depth == 0 {
        return Err(Error::input(format!(
            "{}: depth=0; give at least 1",
            model.id
        )));
    }
    let mut vit = vit.clone();
    vit.depth = depth;
    Ok(named(model, Arch::Vit(vit), "depth", depth))
}

/// `resnet50:stages=3`; a spec string gets the key as its last, which is the one that counts.
fn named(model: &Model, arch: Arch, key: &str, value: usize) -> Model {
    let joint = if model.id.starts_with("vit:") {
        ","
    } else {
        ":"
    };
    let plain = match model.id.split_once(':') {
        Some((id, _)) if joint == ":" => id,
        _ => &model.id,
    };
    Model {
        id: format!("{plain}{joint}{key}={value}"),
        arch,
        ..model.clone()
    }
}

/// `model` as `settings` (`stages=3`, `depth=8`) says.
pub(super) fn with(model: Model, settings: &str) -> Result<Model> {
    let (key, value) = settings.split_once('=').unwrap_or((settings, ""));
    let number = value.parse().ok();
    match (key, number) {
        ("stages", Some(n)) if stages_of(&model.arch).is_some() => with_stages(&model, n),
        ("depth", Some(n)) => with_depth(&model, n),
        _ => Err(Error::input(format!(
            "{}:{settings}: give stages=N of a ResNet or depth=N of a ViT",
            model.id
        ))),
    }
}
