//! A weight file under another library's names.

use super::load::{LoadOptions, classes_of, identify, load};
use super::naming::{Naming, Scheme, window_of};
use super::{FileNames, SaveTensor, WeightFile};
use crate::graph::Mode;
use crate::models::session::options_for;
use crate::models::{Arch, Model, ModelOptions, find, vit::Start};
use crate::{Error, Result};

/// A library that names weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    /// torchvision.
    Torchvision,
    /// timm.
    Timm,
    /// Hugging Face transformers, as the hub's files have it.
    Hf,
}

impl Library {
    /// What the library calls its names for `model`.
    ///
    /// # Errors
    /// [`Error::Input`]: it has no such network.
    pub fn naming(self, model: &Model) -> Result<Naming> {
        use Library::*;
        let named = match (&model.arch, self) {
            (Arch::ResNet(_), Torchvision | Timm) => Some(Naming::TorchvisionResnet),
            (Arch::ResNet(_), Hf) => Some(Naming::HfResnet),
            (Arch::Swin(_), Torchvision) => Some(Naming::TorchvisionSwin),
            (Arch::Swin(_), Timm) => Some(Naming::TimmSwin),
            (Arch::Swin(_), Hf) => Some(Naming::HfSwin),
            (Arch::Vit(v), Timm) if v.start == Start::Timm => Some(Naming::Timm),
            (Arch::Vit(v), Hf) if v.start == Start::Timm => Some(match v.layer_scale {
                Some(_) => Naming::HfDinov2,
                None => Naming::HfVit,
            }),
            (Arch::Vit(v), Torchvision) => {
                let plain = v.layer_scale.is_none() && !v.distilled && v.start == Start::Timm;
                plain.then_some(Naming::TorchvisionVit)
            }
            _ => None,
        };
        named.ok_or_else(|| {
            let library = match self {
                Torchvision => "torchvision",
                Timm => "timm",
                Hf => "Hugging Face",
            };
            Error::input(format!("{library} has no network like {}", model.id))
        })
    }
}

/// The network that `file` was made for, by its metadata or its names.
///
/// # Errors
/// [`Error::Input`]: neither tells.
pub fn model_of(file: &WeightFile) -> Result<Model> {
    if let Some(name) = file.metadata().get("tilewright.model") {
        return find(name.trim_matches('"'));
    }
    let looks = identify(file);
    let id = looks.as_deref().and_then(|l| l.split(' ').next());
    id.and_then(|id| find(id).or_else(|_| find(&format!("{id}_224"))).ok())
        .ok_or_else(|| {
            let looks = looks.map_or(String::new(), |l| format!(" (it looks like {l})"));
            Error::input(format!(
                "{}: which network is it for? give -m MODEL{looks}",
                file.path().display()
            ))
        })
}

/// `model` with the sizes that `file` is for: its window, and the image of its position table.
fn fitted(model: &Model, file: &WeightFile) -> Model {
    let mut model = model.clone();
    let Some(scheme) = Scheme::of(file) else {
        return model;
    };
    match &mut model.arch {
        Arch::Swin(net) => {
            let table = "layers.0.blocks.0.attn.relative_position_bias_table";
            let entry = scheme.entry(file, table);
            if let Some(side) = entry.and_then(|e| window_of(*e.shape.first()?)) {
                net.window = side;
            }
        }
        Arch::Vit(net) => {
            let table = scheme.entry(file, "pos_embed").map(|e| e.shape.as_slice());
            if let Some(&[1, tokens, _]) = table {
                let side = tokens.saturating_sub(net.prefix()).isqrt();
                if side * side + net.prefix() == tokens {
                    model.image = side * net.patch;
                }
            }
        }
        _ => {}
    }
    model
}

/// Every tensor of `file`, which holds `model`, under the names of `library`; then the entries that have no name there.
///
/// # Errors
/// The file does not hold the model, or the library has no such network.
pub fn convert(
    model: &Model,
    file: &WeightFile,
    library: Library,
) -> Result<(Vec<SaveTensor<'static>>, Vec<String>)> {
    let naming = library.naming(model)?;
    let model = fitted(model, file);
    let options = ModelOptions {
        classes: classes_of(file),
        ..ModelOptions::default()
    };
    let options = options_for(&options, Some(file), false);
    let net = model.net(1, (model.image, model.image), Mode::default(), &options)?;
    let load_options = LoadOptions {
        replace_head: false,
        grid: net.grid,
    };
    let loaded = load(&model, &net.graph, file, &load_options)?;
    let mut names = FileNames::plain(&net.graph, naming);
    let mut dropped = vec![];
    for (name, shape, data) in &loaded.names.extra {
        let leaf = name.rsplit('.').next().unwrap_or(name);
        let same = loaded.names.scheme.naming == naming;
        let own = names.extra.iter_mut().find(|e| e.0.ends_with(leaf));
        match own {
            Some(own) => own.2.clone_from(data),
            None if same => names
                .extra
                .push((name.clone(), shape.clone(), data.clone())),
            None => dropped.push(name.clone()),
        }
    }
    let values = (0..net.graph.params.len()).map(|i| {
        let value = loaded.value(&net.graph, file, i)?;
        value.ok_or_else(|| Error::run(format!("{} has no values", net.graph.params[i].name)))
    });
    let values = values.collect::<Result<Vec<_>>>()?;
    let counter = file
        .entries()
        .iter()
        .find(|e| e.name.ends_with("num_batches_tracked"));
    let steps = counter.map(|e| file.read_i64(&e.name)).transpose()?;
    let steps = steps.and_then(|v| v.first().copied()).unwrap_or(0);
    Ok((names.export(&net.graph, values, steps), dropped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::init::initial;
    use crate::weights::load::tests::small_swin;
    use crate::weights::{FloatFormat, SaveData, save};
    use std::collections::BTreeMap;

    type Bits = BTreeMap<String, (Vec<usize>, Vec<u32>)>;

    fn bits(tensors: &[SaveTensor]) -> Bits {
        let of = |t: &SaveTensor| match &t.data {
            SaveData::F32(d) => d.iter().map(|v| v.to_bits()).collect(),
            SaveData::I64(d) => d.iter().map(|&v| v as u32).collect(),
        };
        let all = tensors.iter();
        all.map(|t| (t.name.to_string(), (t.shape.clone(), of(t))))
            .collect()
    }

    #[test]
    fn there_and_back_again_is_the_same_bit_for_bit() {
        use Library::*;
        for (id, libraries) in [
            (
                "vit:patch=8,dim=24,depth=2,heads=3",
                &[Timm, Torchvision, Hf][..],
            ),
            ("deit", &[Timm, Hf]),
            (
                "vit:patch=7,dim=24,depth=2,heads=3,ls=1,img=28",
                &[Timm, Hf],
            ),
            ("swin", &[Timm, Torchvision, Hf]),
            ("resnet18", &[Torchvision, Hf]),
        ] {
            let model = match id {
                "swin" => small_swin(),
                "deit" => {
                    let mut model = find("vit:patch=8,dim=24,depth=2,heads=3").unwrap();
                    if let Arch::Vit(net) = &mut model.arch {
                        net.distilled = true;
                    }
                    model
                }
                id => find(id).unwrap(),
            };
            let options = ModelOptions {
                classes: Some(3),
                ..Default::default()
            };
            let net = model
                .net(1, (model.image, model.image), Mode::default(), &options)
                .unwrap();
            let first = FileNames::plain(&net.graph, libraries[0].naming(&model).unwrap());
            let first = first.export(&net.graph, initial(&net.graph, 3), 7);
            let dir = tempfile::tempdir().unwrap();
            let write = |name: &str, tensors: &[SaveTensor]| {
                let path = dir.path().join(name);
                save(&path, tensors, &BTreeMap::new(), FloatFormat::F32).unwrap();
                WeightFile::open(path).unwrap()
            };
            let mut file = write("0.safetensors", &first);
            for (i, to) in libraries[1..].iter().chain(&libraries[..1]).enumerate() {
                let (tensors, dropped) = convert(&model, &file, *to).unwrap();
                // Only pre-training reads the mask token, and only Hugging Face keeps it.
                assert!(
                    dropped.iter().all(|d| d.ends_with("mask_token")),
                    "{dropped:?}"
                );
                file = write(&format!("{}.safetensors", i + 1), &tensors);
                if to == &libraries[0] {
                    assert!(bits(&tensors) == bits(&first), "{id}");
                }
            }
        }
    }

    #[test]
    fn what_a_library_has_not_is_refused() {
        let refused = |id: &str, to: Library| to.naming(&find(id).unwrap()).unwrap_err();
        assert!(
            refused("dinov2_small", Library::Torchvision)
                .to_string()
                .contains("torchvision")
        );
        assert!(
            refused("cnn_whiten", Library::Hf)
                .to_string()
                .contains("cnn_whiten")
        );
        assert!(refused("vit_p4_e128_d6", Library::Timm).exit_code() == 2);
    }
}
