//! Flags that say which step of a model is measured; `bench` and `profile` share them.

use super::global::Global;
use clap::Args;
use tilewright::bench::model::{Direction, StepOptions};
use tilewright::train::config::OptimizerName;

/// Which step.
#[derive(Args)]
pub struct StepFlags {
    /// Side of the images in pixels [default: the model's own]
    #[arg(long, visible_alias = "image-size", value_name = "PX", value_parser = super::source::positive)]
    pub image: Option<usize>,
    /// Size of the classifier [default: the model's own]
    #[arg(long, value_name = "N", value_parser = super::source::positive)]
    pub classes: Option<usize>,
    /// Dropout, in models that have it [default: the model's own]
    #[arg(long, value_name = "P")]
    pub dropout: Option<f32>,
    /// Update rule of the training step
    #[arg(long, value_enum, default_value = "adamw")]
    pub optimizer: OptimizerName,
    /// Training steps only
    #[arg(long, conflicts_with = "infer")]
    pub train: bool,
    /// Inference steps only
    #[arg(long)]
    pub infer: bool,
}

impl StepFlags {
    /// The options of a step of `batch` images.
    pub fn options(&self, g: &Global, batch: usize) -> StepOptions {
        StepOptions {
            batch,
            image: self.image,
            classes: self.classes,
            dropout: self.dropout,
            optimizer: self.optimizer,
            seed: g.seed,
        }
    }

    /// Training, inference, or both.
    pub fn directions(&self) -> &'static [Direction] {
        match (self.train, self.infer) {
            (true, _) => &[Direction::Train],
            (_, true) => &[Direction::Infer],
            _ => &[Direction::Train, Direction::Infer],
        }
    }
}
