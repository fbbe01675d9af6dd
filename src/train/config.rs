//! The configuration of a training run: a TOML file, flags over it, and everything resolved in the run directory.

use crate::data::Augment;
use crate::graph::train::Optimizer;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Half a cosine down to `min_lr` (Loshchilov & Hutter 2017), step by step.
    Cosine,
    /// Times `gamma` every `step_epochs` epochs.
    Step,
    /// Up from `lr / 25` by half a cosine over the warm-up (30 % of the run where there is none), then down to
    /// `lr / 250000` by another (Smith & Topin 2018; `torch.optim.lr_scheduler.OneCycleLR`).
    Onecycle,
}

/// Update rule by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Adam with decoupled weight decay.
    Adamw,
    /// Adam with L2 penalty.
    Adam,
    /// Momentum SGD.
    Sgd,
}

/// Everything that decides a run. `config.toml` in a run directory is this, resolved.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Model id or spec string; empty: the one that `init` is of, else `cnn_r14`.
    pub model: String,
    /// Data set.
    pub data: String,
    /// `cpu` or `wgpu`.
    pub backend: String,
    /// What products are computed in on cuda: `f32`, `tf32`, `bf16`. Weights and sums stay float32 (mixed precision).
    pub precision: String,
    /// Of initialisation, order, augmentation and dropout.
    pub seed: u64,
    /// Passes over the training images.
    pub epochs: u64,
    /// Images of one forward and backward pass.
    pub batch_size: usize,
    /// Batches whose gradients are averaged for one update.
    pub accumulate: usize,
    /// Side of the input in pixels; 0: the model's own for ImageNet-sized models, else the data's.
    pub image_size: usize,
    /// Update rule.
    pub optimizer: OptimizerName,
    /// Peak learning rate.
    pub lr: f64,
    /// Lowest learning rate of the cosine.
    pub min_lr: f64,
    /// For matrices and filters; norms, biases and tokens have none.
    pub weight_decay: f64,
    /// Of SGD.
    pub momentum: f64,
    /// Of SGD.
    pub nesterov: bool,
    /// Of Adam.
    pub beta1: f64,
    /// Of Adam.
    pub beta2: f64,
    /// Of Adam.
    pub eps: f64,
    /// After the warm-up.
    pub schedule: Schedule,
    /// Epochs over which the rate rises linearly from near 0.
    pub warmup_epochs: f64,
    /// Of the step schedule.
    pub step_epochs: u64,
    /// Of the step schedule.
    pub gamma: f64,
    /// Szegedy et al. 2016; 0: none.
    pub label_smoothing: f32,
    /// Exponent of the focal loss (Lin et al. 2017); 0: none.
    pub focal: f32,
    /// Weigh classes by the inverse of their frequency, mean 1.
    pub class_weights: bool,
    /// Global gradient norm is clipped to this; 0: not at all.
    pub clip: f64,
    /// The rate of each block is this times that of the block after it (Clark et al. 2020; 0.75 in BEiT); 1: all alike.
    pub layer_decay: f64,
    /// Factors on the rate of parameters by the beginning of their names: `{ "head" = 10.0 }`; the longest that fits.
    pub lr_scale: BTreeMap<String, f64>,
    /// Decay of the moving average of the weights that is evaluated and saved in place of them; 0: none. In the first
    /// updates it is less: (1 + t) / (10 + t).
    pub ema: f64,
    /// Epochs without a better top-1 after which the run ends; 0: it never ends early.
    pub patience: u64,
    /// Dropout in the model.
    pub dropout: f32,
    /// Stochastic depth of the last block (Huang et al. 2016), rising linearly from 0.
    pub drop_path: f32,
    /// Geometry and colours of training samples.
    pub augment: Augment,
    /// Parameter of mixup's beta distribution (Zhang et al. 2018); 0: none.
    pub mixup: f32,
    /// Parameter of CutMix's beta distribution (Yun et al. 2019); 0: none. With mixup, each batch takes one of them.
    pub cutmix: f32,
    /// Each image comes this often in an epoch, under other augmentation each time (repeated augmentation).
    pub repeats: u32,
    /// Draw classes equally often, with replacement.
    pub balanced: bool,
    /// Evaluate the mean of the logits of each image and its mirror image.
    pub test_flip: bool,
    /// Training images used: `100` or `10%` of each class; empty: all.
    pub subset: String,
    /// At most this many training images (0: all).
    pub limit_train: usize,
    /// At most this many test images (0: all).
    pub limit_test: usize,
    /// Exponential long tail of the classes, smallest over largest; 0: none.
    pub long_tail: f64,
    /// Half of the classes keep this share; 0: none.
    pub step_imbalance: f64,
    /// Share of the training images that is held out and takes the test set's place; 0: none.
    pub val_share: f64,
    /// Weights to start from.
    pub init: Option<PathBuf>,
    /// Start the classifier afresh where `init` has another class count.
    pub replace_head: bool,
    /// Train the classifier alone.
    pub freeze_backbone: bool,
    /// Train from this layer on (`blocks.8`, `layer4`), and nothing before it; empty: everything.
    pub unfreeze_from: String,
    /// Cut off so many of a ResNet's last stages.
    pub drop_stages: usize,
    /// Cut off so many of a ViT's last blocks.
    pub drop_blocks: usize,
    /// Keep these blocks of a ViT (`0-3,8-11`); empty: all.
    pub keep_blocks: String,
    /// Weights of a teacher, whose predictions are learnt beside the labels (Hinton et al. 2015).
    pub teacher: Option<PathBuf>,
    /// The teacher's model; empty: what its weights tell.
    pub teacher_model: String,
    /// Share of the teacher in the loss.
    pub distill_alpha: f32,
    /// Temperature of both softmaxes; the teacher's part of the loss is multiplied by its square.
    pub distill_temperature: f32,
    /// The teacher's most probable class as a label, in place of its probabilities (Touvron et al. 2021).
    pub distill_hard: bool,
    /// Compute the inside of each block again in the backward pass, in place of keeping it (Chen et al. 2016).
    pub recompute: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            model: String::new(),
            data: "digits".into(),
            backend: "cpu".into(),
            precision: "f32".into(),
            seed: 0,
            epochs: 10,
            batch_size: 128,
            accumulate: 1,
            image_size: 0,
            optimizer: OptimizerName::Adamw,
            lr: 1e-3,
            min_lr: 0.0,
            weight_decay: 0.05,
            momentum: 0.9,
            nesterov: true,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            schedule: Schedule::Cosine,
            warmup_epochs: 0.0,
            step_epochs: 30,
            gamma: 0.1,
            label_smoothing: 0.0,
            focal: 0.0,
            class_weights: false,
            clip: 0.0,
            layer_decay: 1.0,
            lr_scale: BTreeMap::new(),
            ema: 0.0,
            patience: 0,
            dropout: 0.0,
            drop_path: 0.0,
            augment: Augment::default(),
            mixup: 0.0,
            cutmix: 0.0,
            repeats: 1,
            balanced: false,
            test_flip: false,
            subset: String::new(),
            limit_train: 0,
            limit_test: 0,
            long_tail: 0.0,
            step_imbalance: 0.0,
            val_share: 0.0,
            init: None,
            replace_head: false,
            freeze_backbone: false,
            unfreeze_from: String::new(),
            drop_stages: 0,
            drop_blocks: 0,
            keep_blocks: String::new(),
            teacher: None,
            teacher_model: String::new(),
            distill_alpha: 0.5,
            distill_temperature: 1.0,
            distill_hard: false,
            recompute: false,
        }
    }
}

impl TrainConfig {
    /// Parses TOML. An unknown key is an error that names the nearest known one.
    ///
    /// # Errors
    /// Malformed TOML, an unknown key, a value of the wrong type.
    pub fn parse(text: &str) -> Result<Self> {
        let table: toml::Table = text
            .parse()
            .map_err(|e: toml::de::Error| Error::input(e.message().to_string()))?;
        let known = toml::Table::try_from(Self {
            init: Some(PathBuf::new()),
            teacher: Some(PathBuf::new()),
            ..Self::default()
        })
        .map_err(|e| Error::run(e.to_string()))?;
        unknown_key(&table, &known, "")?;
        table
            .try_into()
            .map_err(|e: toml::de::Error| Error::input(e.message().to_string()))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or the file cannot be read; the message names it.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
        Self::parse(&text).map_err(|e| e.context(path.display()))
    }

    /// As TOML.
    ///
    /// # Errors
    /// None in practice.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::run(format!("configuration as TOML: {e}")))
    }

    /// Refuses what cannot run.
    ///
    /// # Errors
    /// The first setting that is out of range, with what is allowed.
    pub fn check(&self) -> Result<()> {
        let positive = |name: &str, v: usize| match v {
            0 => Err(Error::input(format!("{name} is 0; give at least 1"))),
            _ => Ok(()),
        };
        positive("epochs", self.epochs as usize)?;
        positive("batch size", self.batch_size)?;
        positive("accumulate", self.accumulate)?;
        let range = |name: &str, v: f64, low: f64, high: f64| {
            if v >= low && v <= high {
                return Ok(());
            }
            Err(Error::input(format!(
                "{name} is {v}; give a number from {low} to {high}"
            )))
        };
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return Err(Error::input(format!(
                "learning rate is {}; give a number above 0",
                self.lr
            )));
        }
        range("lowest learning rate", self.min_lr, 0.0, self.lr)?;
        range("weight decay", self.weight_decay, 0.0, 1e3)?;
        range("momentum", self.momentum, 0.0, 0.9999)?;
        range("beta1", self.beta1, 0.0, 0.9999)?;
        range("beta2", self.beta2, 0.0, 0.999_999)?;
        range("eps", self.eps, 1e-30, 1.0)?;
        range(
            "warm-up epochs",
            self.warmup_epochs,
            0.0,
            self.epochs as f64,
        )?;
        range("gamma", self.gamma, 0.0, 1.0)?;
        range(
            "label smoothing",
            f64::from(self.label_smoothing),
            0.0,
            0.999,
        )?;
        range("focal exponent", f64::from(self.focal), 0.0, 10.0)?;
        range("gradient clipping", self.clip, 0.0, 1e9)?;
        range("dropout", f64::from(self.dropout), 0.0, 0.99)?;
        range("drop path", f64::from(self.drop_path), 0.0, 0.99)?;
        range("long tail", self.long_tail, 0.0, 1.0)?;
        range("step imbalance", self.step_imbalance, 0.0, 1.0)?;
        range("validation share", self.val_share, 0.0, 0.9)?;
        range("layer decay", self.layer_decay, 1e-3, 1.0)?;
        for (name, &v) in &self.lr_scale {
            range(&format!("factor on the rate of {name}"), v, 0.0, 1e6)?;
        }
        range("moving average", self.ema, 0.0, 0.999_999)?;
        range("mixup", f64::from(self.mixup), 0.0, 100.0)?;
        range("cutmix", f64::from(self.cutmix), 0.0, 100.0)?;
        range("repeats", f64::from(self.repeats), 1.0, 16.0)?;
        range(
            "distillation's share",
            f64::from(self.distill_alpha),
            0.0,
            1.0,
        )?;
        let t = f64::from(self.distill_temperature);
        range("distillation's temperature", t, 1e-3, 1e3)?;
        if self.freeze_backbone && !self.unfreeze_from.is_empty() {
            return Err(Error::input(
                "freeze-backbone trains the classifier alone, unfreeze-from more; give one of them",
            ));
        }
        if self.schedule == Schedule::Step {
            positive("step epochs", self.step_epochs as usize)?;
        }
        if self.optimizer == OptimizerName::Sgd && self.nesterov && self.momentum == 0.0 {
            return Err(Error::input("Nesterov's rule needs a momentum above 0"));
        }
        self.augment.check()
    }

    /// The update rule with its constants.
    pub fn optimizer(&self) -> Optimizer {
        let &TrainConfig {
            beta1,
            beta2,
            eps,
            momentum,
            nesterov,
            ..
        } = self;
        match self.optimizer {
            OptimizerName::Adamw => Optimizer::AdamW { beta1, beta2, eps },
            OptimizerName::Adam => Optimizer::Adam { beta1, beta2, eps },
            OptimizerName::Sgd => Optimizer::Sgd { momentum, nesterov },
        }
    }

    /// Whether a frozen network is given the same images in every epoch, so that it need run only once.
    pub fn frozen_and_same(&self) -> bool {
        let same = self.augment.is_none() && !self.mixes() && self.teacher.is_none();
        self.freeze_backbone && same && !self.test_flip && !self.recompute
    }

    /// Whether samples are mixed, so that their targets are shares of classes.
    pub fn mixes(&self) -> bool {
        self.mixup > 0.0 || self.cutmix > 0.0
    }

    /// The learning rate of update `step` (from 0) with `per_epoch` updates an epoch.
    pub fn lr_at(&self, step: u64, per_epoch: u64) -> f64 {
        let per_epoch = per_epoch.max(1);
        let (warm, total) = (
            self.warmup_epochs * per_epoch as f64,
            (self.epochs * per_epoch) as f64,
        );
        let at = step as f64;
        if self.schedule == Schedule::Onecycle {
            let rise = if warm > 0.0 { warm } else { 0.3 * total };
            let (top, end) = (rise - 1.0, (total - 1.0).max(1.0));
            let (low, least) = (self.lr / 25.0, self.lr / 250_000.0);
            // From `a` to `b` along half a cosine.
            let along = |a: f64, b: f64, share: f64| {
                let share = share.clamp(0.0, 1.0);
                b + 0.5 * (a - b) * (1.0 + (std::f64::consts::PI * share).cos())
            };
            return match at <= top {
                true => along(low, self.lr, at / top),
                false => along(self.lr, least, (at - top) / (end - top)),
            };
        }
        if at < warm {
            return self.lr * (at + 1.0) / (warm + 1.0);
        }
        match self.schedule {
            Schedule::Constant | Schedule::Onecycle => self.lr,
            Schedule::Cosine => {
                let done = ((at - warm) / (total - warm).max(1.0)).min(1.0);
                self.min_lr
                    + 0.5 * (self.lr - self.min_lr) * (1.0 + (std::f64::consts::PI * done).cos())
            }
            Schedule::Step => {
                self.lr
                    * self
                        .gamma
                        .powi((step / per_epoch / self.step_epochs.max(1)) as i32)
            }
        }
    }
}

fn unknown_key(table: &toml::Table, known: &toml::Table, prefix: &str) -> Result<()> {
    for (k, v) in table {
        match (known.get(k), v) {
            // Names of parameters, which only the network knows.
            (Some(_), toml::Value::Table(_)) if k == "lr_scale" => {}
            (Some(toml::Value::Table(inner)), toml::Value::Table(given)) => {
                unknown_key(given, inner, &format!("{prefix}{k}."))?;
            }
            (Some(_), _) => {}
            (None, _) => {
                let nearest = known
                    .keys()
                    .min_by_key(|c| distance(c, k))
                    .map_or("", String::as_str);
                return Err(Error::input(format!(
                    "unknown key `{prefix}{k}`; the nearest known one is `{prefix}{nearest}`"
                )));
            }
        }
    }
    Ok(())
}

/// Edits from `a` to `b` (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let cost = before + usize::from(ca != cb);
            before = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(before + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_names_the_nearest_key() {
        let c = TrainConfig {
            init: Some("w.safetensors".into()),
            lr: 0.02,
            ..Default::default()
        };
        assert_eq!(TrainConfig::parse(&c.to_toml().unwrap()).unwrap(), c);
        let e = TrainConfig::parse("epocs = 3").unwrap_err().to_string();
        assert!(e.contains("`epocs`") && e.contains("`epochs`"), "{e}");
        let e = TrainConfig::parse("[augment]\nhflipp = true")
            .unwrap_err()
            .to_string();
        assert!(e.contains("`augment.hflip`"), "{e}");
        assert!(TrainConfig::parse("epochs = \"many\"").is_err());
    }

    #[test]
    fn rates_follow_the_schedule() {
        let c = TrainConfig {
            epochs: 10,
            warmup_epochs: 1.0,
            lr: 1.0,
            ..Default::default()
        };
        assert!(
            c.lr_at(0, 100) < 0.02
                && (c.lr_at(100, 100) - 1.0).abs() < 1e-9
                && c.lr_at(999, 100) < 1e-4
        );
        let c = TrainConfig {
            schedule: Schedule::Step,
            step_epochs: 3,
            gamma: 0.1,
            lr: 1.0,
            ..Default::default()
        };
        assert!(
            (c.lr_at(299, 100) - 1.0).abs() < 1e-12 && (c.lr_at(600, 100) - 0.01).abs() < 1e-12
        );
    }

    /// `OneCycleLR(max_lr=0.02, total_steps=40, pct_start=0.3)` of PyTorch 2.15.
    #[test]
    fn one_cycle_is_pytorchs() {
        let c = TrainConfig {
            schedule: Schedule::Onecycle,
            epochs: 4,
            lr: 0.02,
            ..Default::default()
        };
        for (step, lr) in [
            (0, 8.000000000e-04),
            (5, 9.033777553e-03),
            (11, 2.000000000e-02),
            (12, 1.993712235e-02),
            (25, 1.000004000e-02),
            (38, 6.295764956e-05),
            (39, 8.000000000e-08),
        ] {
            let got = c.lr_at(step, 10);
            assert!((got / lr - 1.0).abs() < 1e-6, "step {step}: {got}, {lr}");
        }
    }

    #[test]
    fn what_cannot_run_is_refused() {
        for c in [
            TrainConfig {
                batch_size: 0,
                ..Default::default()
            },
            TrainConfig {
                lr: 0.0,
                ..Default::default()
            },
            TrainConfig {
                lr: f64::NAN,
                ..Default::default()
            },
            TrainConfig {
                weight_decay: f64::NAN,
                ..Default::default()
            },
        ] {
            assert!(c.check().is_err(), "{c:?}");
        }
    }
}
