//! What a network is made of: a line per layer, parameters, multiply-adds.

use super::{Family, Model, ModelOptions};
use crate::Result;
use crate::graph::{Graph, Kind, Mode, Phase};
use serde::Serialize;

/// One layer: a node of the graph before fusion.
#[derive(Clone, Debug, Serialize)]
pub struct Layer {
    /// Its scope, as in the parameter names.
    pub scope: String,
    /// The op.
    pub op: &'static str,
    /// Result, this program's axis order (`[N, H, W, C]`, `[N, T, C]`).
    pub output: Vec<usize>,
    /// Elements of its parameters.
    pub params: usize,
    /// Multiply-adds of convolutions, linear layers and attention (0 for others, as torchvision's and timm's tables
    /// count).
    pub macs: u64,
    /// All floating-point operations, a multiply-add being 2.
    pub flops: u64,
}

/// A network at one input size.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// The id.
    pub model: String,
    /// Convolutional or transformer.
    pub family: Family,
    /// `[N, H, W, 3]`.
    pub input: Vec<usize>,
    /// `[N, classes]`, or `[N, dim]` of a backbone.
    pub output: Vec<usize>,
    /// Elements of all parameters.
    pub params: usize,
    /// Elements of running statistics.
    pub buffers: usize,
    /// Multiply-adds of one forward pass of the whole batch.
    pub macs: u64,
    /// Floating-point operations of the same.
    pub flops: u64,
    /// The layers, in order.
    pub layers: Vec<Layer>,
}

/// Whether a table of multiply-adds counts this op.
fn counted(op: &str) -> bool {
    ["conv2d", "linear", "attention", "window_attention"].contains(&op)
}

/// The layers of the forward nodes of `graph`.
fn layers(graph: &Graph) -> Vec<Layer> {
    let layer = |node: &crate::graph::Node| {
        let flops = graph.node_cost(node).flops;
        let op = node.op.name();
        let own = node.inputs.iter().filter(
            |&&t| matches!(graph.tensor(t).kind, Kind::Param(i) if !graph.params[i].buffer),
        );
        Layer {
            scope: node.scope.clone(),
            op,
            output: graph.shape(node.outputs[0]).to_vec(),
            params: own.map(|&t| graph.spec(t).len()).sum(),
            macs: if counted(op) { flops / 2 } else { 0 },
            flops,
        }
    };
    let forward = graph.nodes.iter().filter(|n| n.phase == Phase::Forward);
    forward.map(layer).collect()
}

/// What `model` is made of, for `batch` images of `image` (height, width) pixels.
///
/// # Errors
/// The image does not suit the network.
pub fn info(
    model: &Model,
    batch: usize,
    image: (usize, usize),
    options: &ModelOptions,
) -> Result<Info> {
    let net = model.net(batch, image, Mode::default(), options)?;
    let g = &net.graph;
    let layers = layers(g);
    let buffers = g.params.iter().filter(|p| p.buffer);
    Ok(Info {
        model: model.id.clone(),
        family: model.family(),
        input: g.shape(net.input).to_vec(),
        output: g.shape(net.heads.output()).to_vec(),
        params: g.param_count().0,
        buffers: buffers.map(|p| g.spec(p.tid).len()).sum(),
        macs: layers.iter().map(|l| l.macs).sum(),
        flops: layers.iter().map(|l| l.flops).sum(),
        layers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::find;

    /// (parameters, multiply-adds in units of 10^9) published in torchvision's weight tables, and timm's parameters.
    #[test]
    fn counts_are_the_published_ones() {
        for (id, params, gmacs) in [
            ("resnet18", 11_689_512, Some(1.814)),
            ("resnet34", 21_797_672, Some(3.664)),
            ("resnet50", 25_557_032, Some(4.089)),
            ("resnet101", 44_549_160, Some(7.801)),
            ("resnet152", 60_192_808, Some(11.514)),
            ("vit_b_16", 86_567_656, Some(17.564)),
            ("vit_b_32", 88_224_232, Some(4.409)),
            ("vit_l_16", 304_326_632, Some(61.555)),
            ("vit_l_32", 306_535_400, Some(15.378)),
            ("vit_h_14", 632_045_800, Some(167.295)),
            ("vit_tiny_patch16_224", 5_717_416, None),
            ("vit_small_patch16_224", 22_050_664, None),
            ("deit_small_patch16_224", 22_050_664, None),
            ("dinov2_small", 21_628_800, None),
            ("deit_tiny_distilled_patch16_224", 5_910_800, None),
            ("deit_base_distilled_patch16_224", 87_338_192, None),
            ("swin_t", 28_288_354, Some(4.491)),
            ("swin_s", 49_606_258, Some(8.741)),
            ("swin_b", 87_768_224, Some(15.431)),
            ("swin_base_patch4_window12_384", 87_903_584, None),
            ("cnn_r14", 175_258, None),
            ("vit_p4_e128_d6", 1_205_642, None),
            ("cnn_whiten", 1_352_688, None),
            ("resnet20", 269_722, None),
            ("resnet110", 1_727_962, None),
        ] {
            let m = find(id).unwrap();
            let i = info(&m, 1, (m.image, m.image), &ModelOptions::default()).unwrap();
            assert_eq!(i.params, params, "{id}");
            assert_eq!(
                i.layers.iter().map(|l| l.params).sum::<usize>(),
                params,
                "{id}: by layer"
            );
            if let Some(want) = gmacs {
                let got = i.macs as f64 / 1e9;
                assert!(
                    (got - want).abs() < 0.005 * want,
                    "{id}: {got} GMACs, {want} published"
                );
            }
        }
    }
}
