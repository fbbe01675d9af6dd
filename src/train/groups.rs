//! Which parameters are trained, and at which rate.

use super::config::TrainConfig;
use crate::graph::Graph;
use crate::graph::recompute::{group_of, is_block};
use crate::models::head::is_head;
use crate::ops::batch_norm::{BatchNormEval, BatchNormTrain};
use crate::{Error, Result};
use std::sync::Arc;

/// Freezes and scales the parameters of `graph` as `config` says, before it is fused. A frozen batch norm normalises by
/// its running statistics and leaves them as they are.
///
/// # Errors
/// A layer to unfreeze from, or a name of a factor, fits no parameter.
pub fn apply(config: &TrainConfig, graph: &mut Graph) -> Result<()> {
    let first = match config.unfreeze_from.as_str() {
        "" => 0,
        name => first_of(graph, name)?,
    };
    for (i, p) in graph.params.iter_mut().enumerate() {
        p.trainable &= i >= first && (!config.freeze_backbone || is_head(&p.name));
    }
    freeze_norms(graph);
    let decays = layer_decays(graph, config.layer_decay);
    for (p, decay) in graph.params.iter_mut().zip(decays) {
        let own = config
            .lr_scale
            .iter()
            .filter(|(name, _)| begins(&p.name, name))
            .max_by_key(|(name, _)| name.len())
            .map_or(1.0, |(_, &v)| v);
        p.lr_scale = (decay * own) as f32;
    }
    for name in config.lr_scale.keys() {
        first_of(graph, name)?;
    }
    Ok(())
}

/// Whether `name` is `layer` or lies in it.
fn begins(name: &str, layer: &str) -> bool {
    name.strip_prefix(layer)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || layer.ends_with('.'))
}

fn first_of(graph: &Graph, layer: &str) -> Result<usize> {
    let at = graph.params.iter().position(|p| begins(&p.name, layer));
    at.ok_or_else(|| {
        let mut layers: Vec<&str> = graph.params.iter().map(|p| group_of(&p.name)).collect();
        layers.dedup();
        Error::input(format!(
            "no parameter's name begins with {layer}; there are {}",
            layers.join(", ")
        ))
    })
}

/// BEiT's layer-wise decay, as timm groups it: `decay^(groups - group)` where group 0 is all before the first block, each
/// block is one, and what comes after the last block is the last.
fn layer_decays(graph: &Graph, decay: f64) -> Vec<f64> {
    let mut group = 0;
    let mut before = "";
    let mut groups = vec![];
    for p in &graph.params {
        let own = group_of(&p.name);
        if own != before && is_block(own) {
            // A Swin's merging between stages goes with the block that follows it.
            let merging = !before.is_empty() && begins(own, before);
            group += usize::from(!merging);
        } else if own != before && is_block(before) {
            group += 1;
        }
        before = own;
        groups.push(group);
    }
    groups
        .into_iter()
        .map(|g| decay.powi((group - g) as i32))
        .collect()
}

/// Batch norms whose scale is frozen use their running statistics.
fn freeze_norms(graph: &mut Graph) {
    let frozen: Vec<_> = graph
        .params
        .iter()
        .filter(|p| !p.trainable && !p.buffer)
        .map(|p| p.tid)
        .collect();
    for node in &mut graph.nodes {
        let Some(&BatchNormTrain { eps, .. }) = node.op_as::<BatchNormTrain>() else {
            continue;
        };
        if frozen.contains(&node.inputs[1]) {
            node.op = Arc::new(BatchNormEval {
                eps,
                relu: false,
                residual: false,
            });
            node.outputs.truncate(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Mode;
    use crate::models::{ModelOptions, find};

    fn graph(model: &str, size: usize) -> Graph {
        let mode = Mode {
            batch_stats: true,
            random: true,
        };
        let net = find(model).unwrap();
        net.net(2, (size, size), mode, &ModelOptions::default())
            .unwrap()
            .graph
    }

    fn scale(g: &Graph, name: &str) -> f64 {
        let p = g.params.iter().find(|p| p.name == name);
        f64::from(p.unwrap_or_else(|| panic!("no {name}")).lr_scale)
    }

    /// The exponents of BEiT's `get_num_layer_for_vit`, and those that timm's `param_groups_layer_decay` gives (which puts
    /// the final norm with the last block).
    #[test]
    fn decays_are_beits_and_timms() {
        let config = TrainConfig {
            layer_decay: 0.5,
            ..Default::default()
        };
        for (model, size, want) in [
            (
                "vit_tiny_patch16_224",
                224,
                &[
                    ("cls_token", 13),
                    ("pos_embed", 13),
                    ("patch_embed.proj.weight", 13),
                    ("blocks.0.norm1.weight", 12),
                    ("blocks.11.mlp.fc2.bias", 1),
                    ("norm.weight", 0),
                    ("head.weight", 0),
                ][..],
            ),
            (
                "resnet50",
                64,
                &[
                    ("conv1.weight", 17),
                    ("layer1.0.downsample.0.weight", 16),
                    ("layer1.2.bn3.weight", 14),
                    ("layer4.2.conv1.weight", 1),
                    ("fc.bias", 0),
                ],
            ),
            (
                "swin_t",
                224,
                &[
                    ("patch_embed.norm.weight", 13),
                    ("layers.0.blocks.0.attn.qkv.weight", 12),
                    ("layers.3.blocks.1.mlp.fc2.bias", 1),
                    ("head.fc.weight", 0),
                ],
            ),
        ] {
            let mut g = graph(model, size);
            apply(&config, &mut g).unwrap();
            for &(name, power) in want {
                assert_eq!(scale(&g, name), 0.5f64.powi(power), "{model}: {name}");
            }
        }
    }

    #[test]
    fn factors_go_by_the_longest_name() {
        let mut g = graph("vit_p4_e128_d6", 32);
        let lr_scale = [("head", 10.0), ("blocks", 0.5), ("blocks.1", 0.25)];
        let config = TrainConfig {
            lr_scale: lr_scale.map(|(k, v)| (k.to_string(), v)).into(),
            ..Default::default()
        };
        apply(&config, &mut g).unwrap();
        for (name, v) in [
            ("head.weight", 10.0),
            ("blocks.0.norm1.bias", 0.5),
            ("blocks.1.norm1.bias", 0.25),
            ("cls_token", 1.0),
        ] {
            assert_eq!(scale(&g, name), v, "{name}");
        }
        let config = TrainConfig {
            lr_scale: [("heads".to_string(), 1.0)].into(),
            ..Default::default()
        };
        let e = apply(&config, &mut g).unwrap_err().to_string();
        assert!(e.contains("heads") && e.contains("blocks.5"), "{e}");
    }

    #[test]
    fn frozen_batch_norms_use_their_running_statistics() {
        let count = |g: &Graph, name: &str| g.nodes.iter().filter(|n| n.op.name() == name).count();
        let trained = |g: &Graph| -> Vec<String> {
            let p = g.params.iter().filter(|p| p.trainable);
            p.map(|p| p.name.clone()).collect()
        };
        let mut g = graph("resnet20", 32);
        let config = TrainConfig {
            freeze_backbone: true,
            ..Default::default()
        };
        apply(&config, &mut g).unwrap();
        assert_eq!(trained(&g), ["linear.weight", "linear.bias"]);
        assert_eq!(
            (count(&g, "batch_norm"), count(&g, "batch_norm_eval")),
            (0, 19)
        );
        let mut g = graph("resnet20", 32);
        let config = TrainConfig {
            unfreeze_from: "layer3".into(),
            ..Default::default()
        };
        apply(&config, &mut g).unwrap();
        assert_eq!(trained(&g)[0], "layer3.0.conv1.weight");
        assert_eq!(
            (count(&g, "batch_norm"), count(&g, "batch_norm_eval")),
            (6, 13)
        );
        let config = TrainConfig {
            unfreeze_from: "layer9".into(),
            ..Default::default()
        };
        assert!(apply(&config, &mut graph("resnet20", 32)).is_err());
    }
}
