//! What the `forward` command does: tensors in, logits or features and taps out.

use super::Model;
use super::session::{Session, SessionOptions};
use crate::backend::Backend;
use crate::graph::Layout;
use crate::weights::load::{from_torch, to_torch};
use crate::weights::{Naming, SaveTensor, WeightFile};
use crate::{Error, Result};

/// A map `[N, H, W, C]` in the library's order, others as they are: (shape, elements). PyTorch's is `[N, C, H, W]`, but
/// Swin's maps are `[N, H, W, C]` in torchvision and timm, and `[N, H * W, C]` in Hugging Face.
fn torch_order(naming: Naming, shape: &[usize], data: Vec<f32>) -> (Vec<usize>, Vec<f32>) {
    match *shape {
        [n, h, w, c] if naming == Naming::HfSwin => (vec![n, h * w, c], data),
        [n, h, w, c] if naming.is_swin() => (vec![n, h, w, c], data),
        [n, h, w, c] => (vec![n, c, h, w], to_torch(data, shape, Layout::Ohwi)),
        _ => (shape.to_vec(), data),
    }
}

/// The entry `input` `[N, 3, H, W]` of a tensor file, as (N, (H, W), `[N, H, W, 3]`).
pub(super) fn read_input(file: &WeightFile) -> Result<(usize, (usize, usize), Vec<f32>)> {
    let e = file.entry("input")?;
    let &[n, 3, h, w] = e.shape.as_slice() else {
        return Err(Error::input(format!(
            "{}: input is {:?}; images [N, 3, H, W] are wanted",
            file.path().display(),
            e.shape
        )));
    };
    if n * h * w == 0 {
        return Err(Error::input(format!(
            "{}: input is {:?}: there is no image in it",
            file.path().display(),
            e.shape
        )));
    }
    let data = file.read_f32("input")?;
    // Images stand to PyTorch's as weights do: channels last here, before height and width there.
    Ok((n, (h, w), from_torch(data, &[n, h, w, 3], Layout::Ohwi)))
}

/// What the `forward` command does: the images of `input` (entry `input` `[N, 3, H, W]`, normalised) through the model,
/// at most `batch` at a time. Returns `logits` `[N, classes]` or, from a backbone, `features` `[N, dim]`; and with
/// `taps` one tensor per stage or block, in PyTorch's axis order.
///
/// # Errors
/// The input, the weights and the model do not fit each other, or the device is lost.
pub fn forward(
    backend: &dyn Backend,
    model: &Model,
    weights: &WeightFile,
    input: &WeightFile,
    options: &SessionOptions,
) -> Result<Vec<SaveTensor<'static>>> {
    let (n, image, data) = read_input(input)?;
    let batch = options.batch.clamp(1, n);
    let options = SessionOptions {
        batch,
        image,
        ..options.clone()
    };
    let mut session = Session::open(backend, model, Some(weights), &options)?;
    let taps = if options.taps { session.taps() } else { vec![] };
    let mut output = vec![];
    let mut tapped = vec![vec![]; taps.len()];
    let each = data.len() / n;
    for chunk in data.chunks(batch * each) {
        let got = chunk.len() / each;
        // The last batch is filled up; what comes of the filling is dropped.
        let mut images = chunk.to_vec();
        images.resize(batch * each, 0.0);
        let y = session.run(&images)?;
        output.extend_from_slice(&y[..got * y.len() / batch]);
        for (i, all) in tapped.iter_mut().enumerate() {
            let t = session.tap(i)?;
            all.extend_from_slice(&t[..got * t.len() / batch]);
        }
    }
    let name = if session.classifies() {
        "logits"
    } else {
        "features"
    };
    let mut out = vec![SaveTensor::f32(name, &[n, session.outputs()], output)];
    for ((name, mut shape), data) in taps.into_iter().zip(tapped) {
        shape[0] = n;
        let naming = session.names().scheme.naming;
        let (shape, data) = torch_order(naming, &shape, data);
        out.push(SaveTensor::f32(name, &shape, data));
    }
    Ok(out)
}
