//! What the first layer looks for: its filters as pictures.

use super::pca::pca;
use super::picture::{Cell, captioned};
use super::{Analysis, Context, Findings, Subject};
use crate::graph::{Layout, Mode};
use crate::models::init::initial_of;
use crate::models::session::{load_net, options_for};
use crate::{Error, Result};
use clap::builder::RangedU64ValueParser;
use image::RgbImage;
use serde_json::json;

/// Filters of more elements than this, and more than [`MANY`] of them, are shown by their principal components.
const WIDE: usize = 11 * 11;
const MANY: usize = 128;

/// The filters of the first convolution as colours; of a wide patch embedding its first principal components, as in
/// Dosovitskiy et al. 2021, figure 7.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze filters -m resnet50 -w resnet50.safetensors -o filters
  tilewright analyze filters -m dinov2_small -w dinov2-small-f16.safetensors --components 28 -o filters")]
pub(super) struct Args {
    /// How many principal components [default: 28 where filters are wide or many, else the filters themselves]
    #[arg(long, value_name = "N", conflicts_with = "all", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    components: Option<usize>,
    /// The filters themselves, however many and wide
    #[arg(long)]
    all: bool,
}

/// Name, `[K, R, S]` and values `[K, R, S, 3]` of the first layer's weights.
fn first_layer(subject: &Subject) -> Result<(String, [usize; 3], Vec<f32>)> {
    let file = subject.file.as_ref();
    let options = options_for(&subject.options(None), file, false);
    let image = subject.image();
    let net = subject.model.net(1, image, Mode::default(), &options)?;
    let g = &net.graph;
    let first = g
        .params
        .iter()
        .enumerate()
        .find_map(|(i, p)| match g.shape(p.tid) {
            &[k, r, s, 3] if p.layout == Layout::Ohwi => Some((i, [k, r, s])),
            _ => None,
        });
    let (i, shape) = first
        .ok_or_else(|| Error::input(format!("{} has no convolution over colours", subject.name)))?;
    let value = match file {
        Some(file) => load_net(&subject.model, &net, file, false)?.value(g, file, i)?,
        None => None,
    };
    let value = value.unwrap_or_else(|| initial_of(g, i, subject.seed));
    Ok((g.params[i].name.clone(), shape, value))
}

/// `filter` `[R, S, 3]` with 0 as mid grey, scaled by its largest magnitude.
fn coloured(filter: &[f32], (rows, columns): (usize, usize)) -> RgbImage {
    let top = filter.iter().map(|v| v.abs()).fold(1e-30, f32::max);
    let byte = |v: f32| (127.5 + 127.5 * v / top).round() as u8;
    RgbImage::from_fn(columns as u32, rows as u32, |x, y| {
        let at = (y as usize * columns + x as usize) * 3;
        image::Rgb([byte(filter[at]), byte(filter[at + 1]), byte(filter[at + 2])])
    })
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let (name, [k, r, s], values) = first_layer(subject)?;
        let one = r * s * 3;
        let wide = r * s > WIDE || k > MANY;
        let components = self.components.or((wide && !self.all).then_some(28));
        let mut data = json!({"model": subject.name, "parameter": name, "filters": k, "rows": r, "columns": s});
        let (cells, what): (Vec<Cell>, String) = match components {
            Some(n) => {
                let found = pca(&values, k, n);
                data["explained"] = json!(found.explained);
                let cell = |(c, share): (&[f32], &f64)| {
                    Cell::new(coloured(c, (r, s)), [format!("{:.1} %", 100.0 * share)])
                };
                let each = found.components.chunks(one).zip(&found.explained);
                let held: f64 = found.explained.iter().sum();
                let what = format!(
                    "the first {} principal components of {k} filters, {:.1} % of their variance",
                    found.explained.len(),
                    100.0 * held
                );
                (each.map(cell).collect(), what)
            }
            None => {
                let cell =
                    |(i, f): (usize, &[f32])| Cell::new(coloured(f, (r, s)), [i.to_string()]);
                let each = values.chunks(one).enumerate();
                (each.map(cell).collect(), format!("{k} filters"))
            }
        };
        let columns = if components.is_some() { 7 } else { 8 };
        let heading = format!("{}, {name} ({r} x {s}): {what}", subject.name);
        let caption = "Each scaled by its own largest weight; grey is zero.";
        Ok(Findings::new(heading, data).picture("filters", caption, captioned(&cells, columns)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_grey_and_the_largest_weight_full() {
        let shown = coloured(&[0.0, 2.0, -2.0, 1.0, 0.0, 0.0], (1, 2));
        assert_eq!(shown.get_pixel(0, 0).0, [128, 255, 0]);
        assert_eq!(shown.get_pixel(1, 0).0, [191, 128, 128]);
    }
}
