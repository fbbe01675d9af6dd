//! What a network looks at and what its layers hold: receptive fields, attention, similarity of representations.

pub mod attention;
pub mod cka;
pub mod picture;
pub mod receptive;

use crate::Result;
use crate::data::{Batch, Feed, Images, Loader, LoaderOptions};
use crate::models::session::Session;
use crate::report::progress::Progress;
use std::sync::Arc;

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
