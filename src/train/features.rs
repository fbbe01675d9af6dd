//! Features of a frozen network, computed once: what its classifier reads for each image, in evaluation mode. They are
//! kept in the user's cache directory under a key of everything that decides them, so that the next probe starts at once.

use crate::backend::{Backend, CompileOptions};
use crate::data::{Feed, Images, Loader, LoaderOptions, Rows, Split, data_dir};
use crate::graph::fuse::{Purpose, fuse};
use crate::graph::{Mode, Phase};
use crate::models::session::{load_net, write_parameters};
use crate::models::thin::Thinned;
use crate::models::{Model, ModelOptions, head};
use crate::report::progress::{Progress, say};
use crate::weights::{FloatFormat, SaveTensor, WeightFile, save};
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Images in a run of the network.
const BATCH: usize = 16;
/// What was computed is written at least this often, so that a computation that was stopped goes on.
const SAVE_EVERY: Duration = Duration::from_secs(30);

/// A frozen network.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    /// Where it runs.
    pub backend: &'a dyn Backend,
    /// The network.
    pub model: &'a Model,
    /// Its options, those of the classifier too.
    pub options: &'a ModelOptions,
    /// Its weights; `None`: drawn from the seed.
    pub weights: Option<&'a WeightFile>,
    /// The network that the weights are of, where `model` has fewer blocks.
    pub thinned: Option<&'a Thinned>,
    /// Of weights that are drawn.
    pub seed: u64,
}

impl Frozen<'_> {
    /// What the classifier reads for every image of `images`: from the cache, picked from that of the whole split, of which
    /// `images` may be a part (a subset, a long tail), or computed.
    ///
    /// # Errors
    /// The images cannot be read, the weights do not fit, the device is lost, or ([`Error::Run`]) `stop` is set.
    pub fn features(&self, images: &Arc<Images>, what: &str, stop: &AtomicBool) -> Result<Rows> {
        let dir = data_dir().join("features");
        let file = |split: &Split| -> Result<PathBuf> {
            Ok(dir.join(format!("{}.safetensors", self.key(images, split)?)))
        };
        let (split, labels) = (images.split(), images.split().all_labels());
        let path = file(split)?;
        let kept = |path: &Path| {
            say(&format!(
                "features of the {what} images: kept from before in {}",
                path.display()
            ));
        };
        if let Some(rows) = read(&path, labels) {
            kept(&path);
            return Ok(rows);
        }
        if split.len() < labels.len() {
            let whole = file(&split.whole())?;
            if let Some(rows) = read(&whole, labels).and_then(|r| r.pick(split.indices())) {
                kept(&whole);
                return Ok(rows);
            }
        }
        std::fs::create_dir_all(&dir).map_err(|e| Error::writing(&dir, e))?;
        self.compute(images, what, &path, stop)
    }

    /// A name for everything that decides the features of `split`, prepared as `images` are.
    fn key(&self, images: &Images, split: &Split) -> Result<String> {
        let mut hash = Sha256::new();
        let size = images.preprocess();
        let text = format!(
            "{} {:?} {:?} {:?} {} {:?} {size:?}",
            env!("CARGO_PKG_VERSION"),
            self.model.arch,
            self.thinned.map(|t| &t.blocks),
            self.options,
            self.backend.name(),
            self.backend.precision(),
        );
        hash.update(text);
        match self.weights {
            Some(file) => hash.update(file.contents()),
            None => hash.update(self.seed.to_le_bytes()),
        }
        split.identify(&mut hash)?;
        Ok(format!("{:x}", hash.finalize()))
    }

    fn compute(
        &self,
        images: &Arc<Images>,
        what: &str,
        path: &Path,
        stop: &AtomicBool,
    ) -> Result<Rows> {
        let side = images.preprocess().size as usize;
        let mut net = self
            .model
            .net(BATCH, (side, side), Mode::default(), self.options)?;
        let load = |f| match self.thinned {
            Some(t) => t.load(&net, (side, side), self.options, f, true),
            None => load_net(self.model, &net, f, true),
        };
        let loaded = self.weights.map(load).transpose()?;
        let Some(from) = head::input_of(&net.graph) else {
            return Err(Error::run(format!(
                "{} has no single classifier to compute features for",
                self.model.id
            )));
        };
        net.graph.keep(from);
        fuse(&mut net.graph, Purpose::Inference)?;
        let width = net.graph.spec(from).channels();
        let options = CompileOptions {
            constant_params: true,
            ..CompileOptions::default()
        };
        let mut exec = self.backend.compile(Arc::new(net.graph), &options)?;
        let weights = loaded.as_ref().zip(self.weights);
        write_parameters(exec.as_mut(), weights, self.seed)?;
        exec.run(&[Phase::Prepare])?;

        let part = part_of(path);
        let all = images.split().all_labels();
        let (mut rows, done) = read_part(&part, all, width).unwrap_or_default();
        rows.width = width;
        let mut loader = Loader::new(images.clone(), LoaderOptions::eval(BATCH))?;
        let steps = loader.steps_per_epoch();
        loader.skip_to(0, done)?;
        let label = format!("features of the {what} images");
        let mut progress = Progress::new(&label, (steps - done) as u64);
        let mut saved = Instant::now();
        for step in done..steps {
            let Some(batch) = loader.next_batch()? else {
                return Err(Error::run(
                    "the images ended before their number was reached",
                ));
            };
            exec.write(net.input, &batch.images)?;
            exec.run(&[Phase::Forward])?;
            let values = exec.read(from)?;
            rows.values.extend(&values[..batch.valid * width]);
            rows.labels.extend(&batch.labels[..batch.valid]);
            rows.indices.extend(&batch.indices[..batch.valid]);
            progress.step(batch.valid as u64, f64::NAN, f64::NAN);
            loader.recycle(batch);
            let stopped = stop.load(Ordering::Relaxed);
            if stopped || saved.elapsed() > SAVE_EVERY {
                write(&part, &rows, step + 1)?;
                saved = Instant::now();
            }
            if stopped {
                progress.finish("");
                return Err(Error::run(
                    "interrupted; what was computed is kept, the same command goes on with it",
                ));
            }
        }
        progress.finish("");
        if let Some(bad) = rows.values.iter().position(|v| !v.is_finite()) {
            let index = rows.indices[bad / width];
            return Err(Error::run(format!(
                "the features of image {index} are not finite: the network or its weights overflow"
            )));
        }
        write(path, &rows, steps)?;
        // The finished file says it all.
        let _ = std::fs::remove_file(part);
        Ok(rows)
    }
}

fn part_of(path: &Path) -> PathBuf {
    path.with_extension("part.safetensors")
}

fn write(path: &Path, rows: &Rows, done: usize) -> Result<()> {
    let indices: Vec<i64> = rows.indices.iter().map(|&i| i64::from(i)).collect();
    let n = indices.len();
    let tensors = [
        SaveTensor::f32("features", &[n, rows.width], &rows.values[..]),
        SaveTensor::i64("indices", &[n], indices),
    ];
    let metadata = BTreeMap::from([("batches".to_string(), done.to_string())]);
    save(path, &tensors, &metadata, FloatFormat::F32)
}

/// A file of [`write`]; `None` where there is none, or it is not whole. `labels` are those of all images of the split.
fn read(path: &Path, labels: &[u32]) -> Option<Rows> {
    let file = WeightFile::open(path).ok()?;
    let &[n, width] = file.get("features")?.shape.as_slice() else {
        return None;
    };
    let indices: Option<Vec<u32>> = file
        .read_i64("indices")
        .ok()?
        .into_iter()
        .map(|i| {
            u32::try_from(i)
                .ok()
                .filter(|&i| (i as usize) < labels.len())
        })
        .collect();
    let indices = indices.filter(|i| i.len() == n)?;
    Some(Rows {
        values: file.read_f32("features").ok()?,
        width,
        labels: indices.iter().map(|&i| labels[i as usize]).collect(),
        indices,
    })
}

/// What was computed before, and of how many batches.
fn read_part(path: &Path, labels: &[u32], width: usize) -> Option<(Rows, usize)> {
    let rows = read(path, labels).filter(|r| r.width == width)?;
    let file = WeightFile::open(path).ok()?;
    let done = file.metadata().get("batches")?.parse().ok()?;
    Some((rows, done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.safetensors");
        let rows = Rows {
            values: vec![1.0, 2.0, 3.0, 4.0],
            width: 2,
            labels: vec![7, 5],
            indices: vec![2, 0],
        };
        write(&path, &rows, 3).unwrap();
        let labels = [5, 6, 7];
        assert_eq!(read(&path, &labels), Some(rows.clone()));
        assert_eq!(read_part(&path, &labels, 2), Some((rows, 3)));
        // An image that is not in the split, another width, half a file.
        assert_eq!(read(&path, &labels[..2]), None);
        assert_eq!(read_part(&path, &labels, 3), None);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(read(&path, &labels), None);
    }
}
