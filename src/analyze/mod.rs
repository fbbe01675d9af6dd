//! What a network looks at, what its layers hold, and where it errs.
//!
//! An analysis is one room: a file with its flags (which are also its keys in an experiment file), what it does and its
//! tests, and one line in [`rooms`]. It reads a [`Context`] and gives [`Findings`]; the command line and the experiments do
//! the rest.

pub mod attention;
pub mod calibration;
pub mod cka;
mod classify;
pub mod confusion;
mod context;
mod corrupt;
pub mod embedding;
pub mod errors;
pub mod feature_map;
pub mod filters;
mod findings;
pub mod grad_cam;
mod layer;
pub mod occlusion;
mod pca;
pub mod picture;
pub mod receptive;
pub mod robustness;
mod room;

pub use context::{Context, Photo, Pictures, Subject};
pub(crate) use findings::capital;
pub use findings::{Art, Figure, Findings};
pub use room::{Analysis, Input, Room, find};

use crate::Result;
use crate::data::{Batch, Feed, Images, Loader, LoaderOptions};
use crate::models::session::Session;
use crate::report::progress::Progress;
use room::room;
use std::sync::Arc;

/// Every analysis, by the name of its subcommand.
pub fn rooms() -> Vec<Room> {
    vec![
        room::<receptive::Args>("receptive-field", Input::MaybeData).limited(16),
        room::<attention::DistanceArgs>("attention-distance", Input::Data).limited(256),
        room::<attention::MapArgs>("attention-map", Input::Images).limited(4),
        room::<cka::Args>("cka", Input::Data)
            .limited(256)
            .together(),
        room::<calibration::Args>("calibration", Input::Data).together(),
        room::<errors::Args>("errors", Input::Data).pictures(),
        room::<confusion::Args>("confusion", Input::Data).pictures(),
        room::<robustness::Args>("robustness", Input::Data)
            .limited(512)
            .together(),
        room::<grad_cam::Args>("grad-cam", Input::Images).limited(4),
        room::<occlusion::Args>("occlusion", Input::Images).limited(4),
        room::<feature_map::Args>("feature-map", Input::Images).limited(4),
        room::<filters::Args>("filters", Input::Nothing).pictures(),
        room::<embedding::Args>("embedding", Input::Data).limited(1000),
    ]
}

/// Runs `images` through `session` batch by batch; `each` sees what the run left there, with the number of images that
/// are no repetition. A last batch of fewer than `least` images is left out.
///
/// # Errors
/// An image cannot be read, the device is lost, or `each` fails.
pub fn for_batches(
    session: &mut Session,
    images: Arc<Images>,
    label: &str,
    least: usize,
    mut each: impl FnMut(&mut Session, &Batch) -> Result<()>,
) -> Result<()> {
    let mut loader = Loader::new(images, LoaderOptions::eval(session.batch()))?;
    let mut progress = Progress::new(label, loader.steps_per_epoch() as u64);
    while let Some(batch) = loader.next_batch()? {
        if batch.valid >= least {
            session.forward(&batch.images)?;
            each(session, &batch)?;
        }
        progress.step(batch.valid as u64, f64::NAN, f64::NAN);
        loader.recycle(batch);
    }
    progress.finish("");
    Ok(())
}
