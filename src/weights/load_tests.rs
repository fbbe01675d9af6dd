//! Loading and saving against files made here, with small networks.

use super::*;
use crate::graph::Mode;
use crate::models::{ModelOptions, find, init::initial};
use crate::weights::SaveData;

type Net = crate::models::Net;

/// A Swin transformer that is quick to fill.
pub(in crate::weights) fn small_swin() -> Model {
    let net = swin::Swin {
        dim: 8,
        depths: [1, 1, 2, 1],
        heads: [1, 1, 2, 2],
        window: 2,
    };
    Model {
        id: "swin".into(),
        arch: Arch::Swin(net),
        image: 64,
        classes: 1000,
    }
}

fn net(model: &str, classes: usize) -> (Model, Net) {
    let model = match model {
        "swin" => small_swin(),
        id => find(id).unwrap(),
    };
    let options = ModelOptions {
        classes: Some(classes),
        ..Default::default()
    };
    let image = (model.image, model.image);
    let net = model.net(1, image, Mode::default(), &options).unwrap();
    (model, net)
}

/// The file that `tensors` make, after `change`.
fn file(
    mut tensors: Vec<SaveTensor<'static>>,
    change: impl Fn(&mut Vec<SaveTensor<'static>>),
) -> WeightFile {
    change(&mut tensors);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    save(&path, &tensors, &BTreeMap::new(), FloatFormat::F32).unwrap();
    WeightFile::from_bytes("w.safetensors", std::fs::read(path).unwrap()).unwrap()
}

fn exported(net: &Net, naming: Naming) -> Vec<SaveTensor<'static>> {
    FileNames::plain(&net.graph, naming).export(&net.graph, initial(&net.graph, 1), 3)
}

fn fails(model: &Model, net: &Net, file: &WeightFile) -> String {
    let e = load(model, &net.graph, file, &LoadOptions::default()).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    e.to_string()
}

#[test]
fn every_naming_gives_back_what_was_saved() {
    const VIT: &str = "vit:patch=4,dim=24,depth=2,heads=3,mlp=2";
    const SWIN: &str = "swin";
    for (id, naming) in [
        ("resnet18", Naming::TorchvisionResnet),
        ("resnet18", Naming::HfResnet),
        ("resnet20", Naming::TorchvisionResnet),
        ("cnn_r14", Naming::TorchvisionResnet),
        ("cnn_whiten", Naming::Own),
        (VIT, Naming::Timm),
        (VIT, Naming::TorchvisionVit),
        (VIT, Naming::HfVit),
        (VIT, Naming::Torch),
        ("vit:patch=4,dim=24,depth=2,heads=3,ls=1", Naming::HfDinov2),
        ("deit_tiny_distilled_patch16_32", Naming::Timm),
        ("deit_tiny_distilled_patch16_32", Naming::HfVit),
        (SWIN, Naming::TimmSwin),
        (SWIN, Naming::TorchvisionSwin),
        (SWIN, Naming::HfSwin),
        (SWIN, Naming::MicrosoftSwin),
    ] {
        let (model, net) = net(id, 5);
        let values = initial(&net.graph, 1);
        for prefix in ["", "module.", "model.backbone."] {
            let file = file(exported(&net, naming), |all| {
                for t in all {
                    t.name = format!("{prefix}{}", t.name).into();
                }
            });
            let got = load(&model, &net.graph, &file, &LoadOptions::default()).unwrap();
            assert_eq!(got.names.scheme.naming, naming, "{id}");
            for (i, v) in values.iter().enumerate() {
                let read = got.value(&net.graph, &file, i).unwrap();
                assert_eq!(read.as_ref(), Some(v), "{id} {naming:?}");
            }
            assert_eq!(classes_of(&file), Some(5));
        }
    }
}

/// The state dict of PyTorch's own networks, as the lists of the goldens have it: names, shapes and nothing else.
#[test]
fn what_is_saved_has_pytorchs_names_and_shapes() {
    let Some(shared) = crate::data::shared_dir() else {
        println!("skipped: no ../shared");
        return;
    };
    for (list, id, classes, naming) in [
        ("resnet50", "resnet50", 1000, Naming::TorchvisionResnet),
        ("cnn_r14", "cnn_r14", 10, Naming::TorchvisionResnet),
        (
            "timm_vit_tiny_patch16_224",
            "vit_tiny_patch16_224",
            1000,
            Naming::Timm,
        ),
        ("vit_b_16", "vit_b_16", 1000, Naming::TorchvisionVit),
        ("hf_vit_base_patch16_224", "vit_b_16", 1000, Naming::HfVit),
        ("hf_dinov2_small", "dinov2_small", 0, Naming::HfDinov2),
        ("vit_p4_e128_d6", "vit_p4_e128_d6", 10, Naming::Torch),
    ] {
        let (_, net) = net(id, classes);
        let zeros = net.graph.params.iter();
        let zeros = zeros
            .map(|p| vec![0.0; net.graph.spec(p.tid).len()])
            .collect();
        let saved = FileNames::plain(&net.graph, naming).export(&net.graph, zeros, 0);
        let mut got: Vec<String> = saved
            .iter()
            .map(|t| {
                let shape: Vec<String> = t.shape.iter().map(usize::to_string).collect();
                let shape = if shape.is_empty() {
                    "scalar".into()
                } else {
                    shape.join("x")
                };
                let dtype = match t.data {
                    SaveData::F32(_) => "float32",
                    SaveData::I64(_) => "int64",
                };
                format!("{}\t{shape}\t{dtype}", t.name)
            })
            .collect();
        let path = shared.join(format!("golden/names/{list}.txt"));
        let text = std::fs::read_to_string(path).unwrap();
        let mut want: Vec<String> = text.lines().map(String::from).collect();
        got.sort();
        want.sort();
        assert_eq!(got, want, "{list}");
    }
}

#[test]
fn everything_that_does_not_fit_is_in_one_message() {
    let (model, net) = net("resnet20", 10);
    let file = file(exported(&net, Naming::TorchvisionResnet), |all| {
        all.retain(|t| t.name != "layer2.1.bn1.bias");
        all.push(SaveTensor::f32("layer9.what", &[1], vec![0.0]));
        let t = all
            .iter_mut()
            .find(|t| t.name == "layer1.2.bn2.weight")
            .unwrap();
        *t = SaveTensor::f32(t.name.to_string(), &[2], vec![0.0; 2]);
    });
    let message = fails(&model, &net, &file);
    assert_eq!(
        message,
        "w.safetensors (torchvision names; it looks like resnet20 of torchvision (stages of [3, 3, 3] blocks, 10 classes)) \
         does not fit resnet20\nmissing: layer2.1.bn1.bias | unexpected: layer9.what | misshapen: layer1.2.bn2.weight is [2], [16] is wanted"
    );
}

#[test]
fn another_number_of_classes_wants_a_decision() {
    let (model, net10) = net("cnn_r14", 10);
    let (_, net3) = net("cnn_r14", 3);
    let file = file(exported(&net10, Naming::TorchvisionResnet), |_| ());
    let message = fails(&model, &net3, &file);
    assert!(
        message.contains("has 10 classes, 3 are asked for"),
        "{message}"
    );
    assert!(message.contains("--replace-head"), "{message}");
    let options = LoadOptions {
        replace_head: true,
        ..Default::default()
    };
    let loaded = load(&model, &net3.graph, &file, &options).unwrap();
    let kept: Vec<&str> = net3
        .graph
        .params
        .iter()
        .enumerate()
        .filter(|(i, _)| !loaded.has(*i))
        .map(|(_, p)| p.name.as_str())
        .collect();
    assert_eq!(kept, ["fc.weight", "fc.bias"]);
}

#[test]
fn a_backbone_has_no_classifier_to_give() {
    let (_, bare) = net("vit_p4_e128_d6", 0);
    let (model, net) = net("vit_p4_e128_d6", 10);
    let file = file(exported(&bare, Naming::Torch), |_| ());
    assert_eq!(classes_of(&file), Some(0));
    let message = fails(&model, &net, &file);
    assert!(
        message.contains("has no classifier (head.weight, head.bias missing)"),
        "{message}"
    );
}

#[test]
fn a_file_of_another_network_is_named() {
    let (vit, vit_net) = net("vit_tiny_patch16_224", 1000);
    let (_, net18) = net("resnet18", 1000);
    let (resnet50, net50) = net("resnet50", 1000);
    let file = file(exported(&net18, Naming::TorchvisionResnet), |_| ());
    assert_eq!(
        fails(&vit, &vit_net, &file),
        "w.safetensors does not hold vit_tiny_patch16_224: it looks like resnet18 of torchvision (stages of [2, 2, 2, 2] blocks, 1000 classes)"
    );
    let message = fails(&resnet50, &net50, &file);
    assert!(
        message.contains("looks like resnet18") && message.contains("and "),
        "{message}"
    );
    assert!(message.len() < 2500, "{}", message.len());
}

#[test]
fn a_position_table_of_another_grid_is_fitted() {
    let (model, small) = net("vit:patch=4,dim=24,depth=1,heads=3", 2);
    let large = model
        .net(
            1,
            (48, 40),
            Mode::default(),
            &ModelOptions {
                classes: Some(2),
                ..Default::default()
            },
        )
        .unwrap();
    let file = file(exported(&small, Naming::Timm), |_| ());
    let options = LoadOptions {
        grid: large.grid,
        ..Default::default()
    };
    let loaded = load(&model, &large.graph, &file, &options).unwrap();
    let i = large
        .graph
        .params
        .iter()
        .position(|p| p.name == "pos_embed")
        .unwrap();
    let table = loaded.value(&large.graph, &file, i).unwrap().unwrap();
    assert_eq!(table.len(), (12 * 10 + 1) * 24);
    assert_eq!(table[..24], file.read_f32("pos_embed").unwrap()[..24]);
}
