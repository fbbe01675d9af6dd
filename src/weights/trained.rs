//! What the trainer writes into its weight files beside the weights.

use super::WeightFile;
use crate::{Error, Result};

/// What is needed to use weights without their run directory; each is `None` where the file does not tell.
#[derive(Clone, Debug, Default)]
pub struct Trained {
    /// Id or spec string of the model.
    pub model: Option<String>,
    /// Side of the images in pixels.
    pub size: Option<u32>,
    /// Subtracted from red, green, blue in `[0, 1]`.
    pub mean: Option<[f32; 3]>,
    /// Divides what is left.
    pub std: Option<[f32; 3]>,
    /// Names of the classes.
    pub classes: Option<Vec<String>>,
}

impl Trained {
    /// From the metadata of `file`.
    ///
    /// # Errors
    /// [`Error::Input`] naming a value that is there and is not one.
    pub fn read(file: &WeightFile) -> Result<Trained> {
        fn get<T: serde::de::DeserializeOwned>(file: &WeightFile, key: &str) -> Result<Option<T>> {
            let key = format!("tilewright.{key}");
            let Some(text) = file.metadata().get(&key) else {
                return Ok(None);
            };
            serde_json::from_str(text).map(Some).map_err(|e| {
                Error::input(format!(
                    "{}: metadata {key} is {text:?}: {e}",
                    file.path().display()
                ))
            })
        }
        // The model's name may stand there as it is, without JSON's quotation marks.
        let model = file.metadata().get("tilewright.model");
        Ok(Trained {
            model: model.map(|m| serde_json::from_str(m).unwrap_or_else(|_| m.clone())),
            size: get(file, "size")?,
            mean: get(file, "mean")?,
            std: get(file, "std")?,
            classes: get(file, "classes")?,
        })
    }
}
