//! A small CNN of the field's CIFAR comparisons: batch norm on the input channels, three residual blocks of biased
//! convolutions, each with max pool and dropout behind, and a hidden layer before the classes. 1.35 M parameters.

use super::resnet::classifier;
use super::{Arch, Heads, Model, ModelOptions};
use crate::Result;
use crate::graph::{Graph, Init, Tid};
use crate::ops::conv2d::ConvLayer;
use crate::ops::linear::LinearLayer;

/// Sizes of the network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CnnWhiten {
    /// Widths of the blocks.
    pub widths: [usize; 3],
    /// Width of the hidden layer.
    pub hidden: usize,
}

pub(super) fn find(id: &str) -> Option<Model> {
    (id == "cnn_whiten").then(|| Model {
        id: id.into(),
        arch: Arch::CnnWhiten(CnnWhiten {
            widths: [32, 64, 128],
            hidden: 512,
        }),
        image: 32,
        classes: 10,
    })
}

impl CnnWhiten {
    /// Appends the network; taps `stem`, `layer1` .. `layer3`. Dropout is 0.25 unless given.
    ///
    /// # Errors
    /// The image is smaller than 8x8.
    pub fn build(
        &self,
        g: &mut Graph,
        x: Tid,
        classes: usize,
        options: &ModelOptions,
    ) -> Result<Heads> {
        let eps = options.norm_eps.unwrap_or(1e-5);
        let dropout = options.dropout.unwrap_or(0.25);
        let mut x = g.batch_norm(x, "bn0", eps)?;
        g.tap("stem", x);
        for (i, &width) in self.widths.iter().enumerate() {
            let name = format!("layer{}", i + 1);
            x = g.scoped(name.clone(), |g| {
                let y = residual(g, x, width, eps)?;
                let y = g.max_pool(y, 2, 2, 0)?;
                g.dropout(y, dropout)
            })?;
            g.tap(name, x);
        }
        let (n, flat) = (g.shape(x)[0], g.spec(x).len() / g.shape(x)[0]);
        let x = g.view(x, &[n, flat])?;
        let x = g.linear(x, "fc1", LinearLayer::new(flat, self.hidden))?;
        let features = g.relu(x)?;
        let logits = classifier(g, features, "fc2", classes)?;
        Ok(Heads::new(logits, features))
    }
}

fn residual(g: &mut Graph, x: Tid, width: usize, eps: f32) -> Result<Tid> {
    let y = g.conv2d(x, "conv1", biased(g, x, width, 3))?;
    let y = g.batch_norm(y, "bn1", eps)?;
    let y = g.relu(y)?;
    let y = g.conv2d(y, "conv2", biased(g, y, width, 3))?;
    let y = g.batch_norm(y, "bn2", eps)?;
    let shortcut = g.conv2d(x, "shortcut", biased(g, x, width, 1))?;
    let y = g.add(y, shortcut)?;
    g.relu(y)
}

fn biased(g: &Graph, x: Tid, width: usize, kernel: usize) -> ConvLayer {
    ConvLayer {
        bias: true,
        init: Init::UniformFanIn(g.spec(x).channels() * kernel * kernel),
        ..ConvLayer::new(width, kernel, 1)
    }
}
