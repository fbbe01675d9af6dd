//! A teacher whose predictions are learnt beside the labels (Hinton et al. 2015, "Distilling the Knowledge in a Neural
//! Network"; the hard kind: Touvron et al. 2021, DeiT).

use super::config::TrainConfig;
use super::program::Said;
use crate::backend::Backend;
use crate::data::Preprocess;
use crate::models::find;
use crate::models::session::{Session, SessionOptions};
use crate::weights::load::model_of;
use crate::weights::registry::locate;
use crate::weights::{Scheme, WeightFile};
use crate::{Error, Result};

/// A network that is only asked.
pub struct Teacher {
    session: Session,
    temperature: f32,
    hard: bool,
    /// From the student's normalisation to the teacher's, by channel: factor and shift. `None`: they are the same.
    renormalise: Option<[(f32, f32); 3]>,
}

impl Teacher {
    /// The teacher of `config`, for the student's batches of images prepared by `input`.
    ///
    /// # Errors
    /// Its file or model is not there, they do not fit, or it knows another number of classes.
    pub fn open(
        config: &TrainConfig,
        backend: &dyn Backend,
        input: &Preprocess,
        classes: usize,
    ) -> Result<Option<Teacher>> {
        let Some(path) = &config.teacher else {
            return Ok(None);
        };
        let (path, record) = locate(path)?;
        let file = WeightFile::open(path)?;
        let at = file.path().display();
        let named = file.metadata().get("tilewright.model");
        let model = match (config.teacher_model.as_str(), named, &record) {
            ("", Some(name), _) => find(name.trim_matches('"'))?,
            ("", None, Some(record)) => record.model()?,
            ("", None, None) => model_of(&file).ok_or_else(|| {
                Error::input(format!("which network is {at}? give --teacher-model"))
            })?,
            (name, ..) => find(name)?,
        };
        let side = input.size as usize;
        let options = SessionOptions::new(config.batch_size, (side, side));
        let session = Session::open(backend, &model, Some(&file), &options)
            .map_err(|e| e.context("the teacher"))?;
        if !session.classifies() || session.outputs() != classes {
            return Err(Error::input(format!(
                "the teacher {at} knows {} classes, the data set has {classes}",
                if session.classifies() {
                    session.outputs()
                } else {
                    0
                }
            )));
        }
        let json = |key: &str| -> Option<[f32; 3]> {
            serde_json::from_str(file.metadata().get(key)?).ok()
        };
        let own = match (json("tilewright.mean"), json("tilewright.std"), record) {
            (Some(mean), Some(std), _) => (mean, std),
            (_, _, Some(r)) => (r.mean, r.std),
            _ => {
                let naming = Scheme::of(&file).map(|s| s.naming);
                let p = model.preprocess(naming, side);
                (p.mean, p.std)
            }
        };
        let channel = |c: usize| {
            let factor = input.std[c] / own.1[c];
            (factor, (input.mean[c] - own.0[c]) / own.1[c])
        };
        Ok(Some(Teacher {
            session,
            temperature: config.distill_temperature,
            hard: config.distill_hard,
            renormalise: (own != (input.mean, input.std)).then(|| std::array::from_fn(channel)),
        }))
    }

    /// What it says of images `[N, H, W, 3]`, normalised for the student.
    ///
    /// # Errors
    /// The device is lost.
    pub fn ask(&mut self, images: &[f32]) -> Result<Said> {
        let logits = match &self.renormalise {
            None => self.session.run(images)?,
            Some(channels) => {
                let pixels = images.chunks_exact(3);
                let own: Vec<f32> = pixels
                    .flat_map(|p| {
                        std::array::from_fn::<f32, 3, _>(|c| p[c] * channels[c].0 + channels[c].1)
                    })
                    .collect();
                self.session.run(&own)?
            }
        };
        let rows = logits.chunks_exact(self.session.outputs());
        Ok(match self.hard {
            true => Said::Classes(rows.map(largest).collect()),
            false => Said::Shares(rows.flat_map(|r| softmax(r, self.temperature)).collect()),
        })
    }
}

fn largest(row: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).fold(0, better) as u32
}

fn softmax(row: &[f32], temperature: f32) -> Vec<f32> {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f32> = row
        .iter()
        .map(|v| ((v - top) / temperature).exp())
        .collect();
    let sum: f32 = e.iter().sum();
    e.into_iter().map(|v| v / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_temperature_softens() {
        // torch.softmax(torch.tensor([1., 2., 4.]) / 2, 0)
        let p = softmax(&[1.0, 2.0, 4.0], 2.0);
        for (p, want) in p.iter().zip([0.140244, 0.231224, 0.628532]) {
            assert!((p - want).abs() < 1e-6);
        }
        assert_eq!(largest(&[1.0, 3.0, 3.0]), 1);
    }
}
