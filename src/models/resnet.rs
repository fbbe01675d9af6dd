//! ResNet (He et al. 2015, "Deep Residual Learning for Image Recognition"), as torchvision builds it: the bottleneck's
//! stride is on its 3x3 convolution ("V1.5", Goyal et al. 2017).

use super::{Arch, Heads, Model, ModelOptions};
use crate::Result;
use crate::graph::{Graph, Tid};
use crate::ops::conv2d::ConvLayer;
use crate::ops::linear::LinearLayer;

/// Residual branch of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Block {
    /// 3x3, 3x3.
    Basic,
    /// 1x1 down, 3x3, 1x1 up to four times the width.
    Bottleneck,
}

/// Sizes of a ResNet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResNet {
    /// Residual branch.
    pub block: Block,
    /// Blocks in each of the four stages (of width 64, 128, 256, 512); the last may be left out (0).
    pub depths: [usize; 4],
}

pub(super) fn find(id: &str) -> Option<Model> {
    let (block, depths) = match id {
        "resnet18" => (Block::Basic, [2, 2, 2, 2]),
        "resnet34" => (Block::Basic, [3, 4, 6, 3]),
        "resnet50" => (Block::Bottleneck, [3, 4, 6, 3]),
        "resnet101" => (Block::Bottleneck, [3, 4, 23, 3]),
        "resnet152" => (Block::Bottleneck, [3, 8, 36, 3]),
        _ => return None,
    };
    Some(Model {
        id: id.into(),
        arch: Arch::ResNet(ResNet { block, depths }),
        image: 224,
        classes: 1000,
    })
}

impl ResNet {
    /// Appends the network; taps `stem`, `layer1` .. `layer4`.
    ///
    /// # Errors
    /// The image is too small.
    pub fn build(
        &self,
        g: &mut Graph,
        x: Tid,
        classes: usize,
        options: &ModelOptions,
    ) -> Result<Heads> {
        let eps = options.norm_eps.unwrap_or(1e-5);
        let x = g.conv2d(x, "conv1", ConvLayer::new(64, 7, 2))?;
        let x = g.batch_norm(x, "bn1", eps)?;
        let x = g.relu(x)?;
        let mut x = g.scoped("maxpool", |g| g.max_pool(x, 3, 2, 1))?;
        g.tap("stem", x);
        for (stage, &depth) in self.depths.iter().enumerate().filter(|d| *d.1 > 0) {
            let name = format!("layer{}", stage + 1);
            for i in 0..depth {
                let stride = if i == 0 && stage > 0 { 2 } else { 1 };
                x = g.scoped(format!("{name}.{i}"), |g| {
                    self.residual(g, x, 64 << stage, stride, eps)
                })?;
                if i + 1 < depth {
                    g.tap(format!("{name}.{i}"), x);
                }
            }
            g.tap(name, x);
        }
        let features = g.scoped("avgpool", |g| g.global_avg_pool(x))?;
        let logits = classifier(g, features, "fc", classes)?;
        Ok(Heads::new(logits, features))
    }

    /// `relu(F(x) + shortcut(x))`, with a 1x1 projection where the shape changes (option B).
    fn residual(
        &self,
        g: &mut Graph,
        x: Tid,
        width: usize,
        stride: usize,
        eps: f32,
    ) -> Result<Tid> {
        let (out, layers) = match self.block {
            Block::Basic => (
                width,
                vec![
                    ConvLayer::new(width, 3, stride),
                    ConvLayer::new(width, 3, 1),
                ],
            ),
            Block::Bottleneck => (
                4 * width,
                vec![
                    ConvLayer::new(width, 1, 1),
                    ConvLayer::new(width, 3, stride),
                    ConvLayer::new(4 * width, 1, 1),
                ],
            ),
        };
        let last = layers.len();
        let mut y = x;
        for (i, layer) in layers.into_iter().enumerate() {
            y = g.conv2d(y, &format!("conv{}", i + 1), layer)?;
            y = g.batch_norm(y, &format!("bn{}", i + 1), eps)?;
            if i + 1 < last {
                y = g.relu(y)?;
            }
        }
        let shortcut = if stride == 1 && g.spec(x).channels() == out {
            x
        } else {
            let s = g.conv2d(x, "downsample.0", ConvLayer::new(out, 1, stride))?;
            g.batch_norm(s, "downsample.1", eps)?
        };
        let y = g.add(y, shortcut)?;
        g.relu(y)
    }
}

/// A linear classifier with PyTorch's default initialisation, unless there are no classes.
pub(super) fn classifier(
    g: &mut Graph,
    features: Tid,
    name: &str,
    classes: usize,
) -> Result<Option<Tid>> {
    if classes == 0 {
        return Ok(None);
    }
    let layer = LinearLayer::new(g.spec(features).channels(), classes);
    g.linear(features, name, layer).map(Some)
}
