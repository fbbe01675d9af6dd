//! The CIFAR ResNets of He et al. 2015, section 4.2: three stages of width 16, 32, 64 on 32x32 images, no max pool.

use super::resnet::classifier;
use super::{Arch, Heads, Model, ModelOptions};
use crate::Result;
use crate::graph::{Graph, Init, Tid};
use crate::ops::conv2d::ConvLayer;

/// How the shortcut gets its shape where a stage begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shortcut {
    /// Option A: every second pixel, zero channels on both sides; no parameters.
    Subsample,
    /// Option B: 1x1 convolution and batch norm.
    Project,
}

/// Sizes of a CIFAR ResNet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CifarResNet {
    /// Blocks in each of the three stages; the depth is `6 blocks + 2`.
    pub blocks: usize,
    /// Stages, 3 in the paper; the last may be left out.
    pub stages: usize,
    /// Shortcut where the shape changes.
    pub shortcut: Shortcut,
}

pub(super) fn find(id: &str) -> Option<Model> {
    let net = match id {
        "cnn_r14" => CifarResNet {
            blocks: 2,
            stages: 3,
            shortcut: Shortcut::Project,
        },
        _ => {
            let depth = [20, 32, 44, 56, 110]
                .into_iter()
                .find(|d| id == format!("resnet{d}"))?;
            CifarResNet {
                blocks: (depth - 2) / 6,
                stages: 3,
                shortcut: Shortcut::Subsample,
            }
        }
    };
    Some(Model {
        id: id.into(),
        arch: Arch::CifarResNet(net),
        image: 32,
        classes: 10,
    })
}

impl CifarResNet {
    /// Appends the network; taps `stem`, `layer1` .. `layer3`. Names are Idelbayev's (option A) and those of the
    /// usual rewrite (option B).
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
        let x = self.conv_bn(g, x, ["conv1", "bn1"], (16, 3, 1), eps)?;
        let mut x = g.relu(x)?;
        g.tap("stem", x);
        for stage in 0..self.stages {
            let name = format!("layer{}", stage + 1);
            for i in 0..self.blocks {
                let stride = if i == 0 && stage > 0 { 2 } else { 1 };
                x = g.scoped(format!("{name}.{i}"), |g| {
                    self.residual(g, x, 16 << stage, stride, eps)
                })?;
                if i + 1 < self.blocks {
                    g.tap(format!("{name}.{i}"), x);
                }
            }
            g.tap(name, x);
        }
        let features = g.scoped("avgpool", |g| g.global_avg_pool(x))?;
        let head = match self.shortcut {
            Shortcut::Subsample => "linear",
            Shortcut::Project => "fc",
        };
        let logits = classifier(g, features, head, classes)?;
        Ok(Heads::new(logits, features))
    }

    fn residual(
        &self,
        g: &mut Graph,
        x: Tid,
        width: usize,
        stride: usize,
        eps: f32,
    ) -> Result<Tid> {
        let y = self.conv_bn(g, x, ["conv1", "bn1"], (width, 3, stride), eps)?;
        let y = g.relu(y)?;
        let y = self.conv_bn(g, y, ["conv2", "bn2"], (width, 3, 1), eps)?;
        let shortcut = if stride == 1 && g.spec(x).channels() == width {
            x
        } else {
            match self.shortcut {
                Shortcut::Subsample => g.scoped("shortcut", |g| g.subsample(x, stride, width))?,
                Shortcut::Project => {
                    let names = ["shortcut.0", "shortcut.1"];
                    self.conv_bn(g, x, names, (width, 1, stride), eps)?
                }
            }
        };
        let y = g.add(y, shortcut)?;
        g.relu(y)
    }

    /// A convolution of (width, kernel, stride) and its batch norm. Option A starts as in Idelbayev's code (He et al.'s
    /// normal by fan-in), option B as PyTorch's layers do.
    fn conv_bn(
        &self,
        g: &mut Graph,
        x: Tid,
        [conv, bn]: [&str; 2],
        (out, kernel, stride): (usize, usize, usize),
        eps: f32,
    ) -> Result<Tid> {
        let fan_in = g.spec(x).channels() * kernel * kernel;
        let init = match self.shortcut {
            Shortcut::Subsample => Init::Normal((2.0 / fan_in as f32).sqrt()),
            Shortcut::Project => Init::UniformFanIn(fan_in),
        };
        let layer = ConvLayer {
            init,
            ..ConvLayer::new(out, kernel, stride)
        };
        let y = g.conv2d(x, conv, layer)?;
        g.batch_norm(y, bn, eps)
    }
}
