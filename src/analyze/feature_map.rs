//! What layers make of a photograph: their strongest channels as maps.

use super::picture::{self, Cell, captioned};
use super::{Analysis, Context, Findings, layer};
use crate::report::table::Table;
use crate::{Error, Result};
use clap::builder::RangedU64ValueParser;
use serde_json::json;

/// The channels of layers that answer a photograph most strongly, as maps: a row a layer.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze feature-map -m resnet50 -w resnet50.safetensors -o maps cat.jpg
  tilewright analyze feature-map -w runs/vit --layer stem,blocks.3 --channels 12 -o maps cat.jpg")]
pub(super) struct Args {
    /// Layers, as `info` names stages and blocks [default: up to five from the first to the last]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    layer: Vec<String>,
    /// Channels of each layer
    #[arg(long, value_name = "N", default_value = "7", value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    channels: usize,
}

/// Layers shown where none is named.
const FEW: usize = 5;

/// Channels of `values` `[places, channels]` by their mean magnitude, strongest first, at most `most`; and those means.
fn strongest(values: &[f32], channels: usize, most: usize) -> Vec<(usize, f64)> {
    let places = values.len() / channels;
    let mut means = vec![0.0f64; channels];
    for row in values.chunks_exact(channels) {
        let sums = means.iter_mut().zip(row);
        sums.for_each(|(m, &v)| *m += f64::from(v.abs()) / places as f64);
    }
    let mut order: Vec<(usize, f64)> = means.into_iter().enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    order.truncate(most);
    order
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let photos = cx.photos()?;
        let (mut session, grid) =
            subject.session(cx.backend, (1, None), true, |net| Ok(net.grid))?;
        let taps = session.taps();
        let wanted: Vec<usize> = match self.layer.is_empty() {
            false => {
                let each = self.layer.iter().map(|l| layer::named(&taps, l));
                each.collect::<Result<_>>()?
            }
            true => {
                // Stages and blocks; within a stage of a CNN its end stands for it.
                let inside = |n: &str| n.starts_with("layer") && n.contains('.');
                let all: Vec<usize> = (0..taps.len()).filter(|&i| !inside(&taps[i].0)).collect();
                let n = all.len().min(FEW);
                let at = |i: usize| all[i * (all.len() - 1) / (n - 1).max(1)];
                (0..n).map(at).collect()
            }
        };
        let mut found = Findings::default();
        let mut t = Table::new(["image", "layer", "map", "strongest channels"]).left(&[0, 1, 3]);
        let mut rows = vec![];
        for photo in &photos {
            let pixels = subject.preprocess.apply(&photo.pixels);
            let pixels = pixels.map_err(|e| e.context(&photo.name))?;
            session.forward(&pixels)?;
            let shown = picture::unnormalise(&pixels, &subject.preprocess);
            let mut cells = vec![];
            for &i in &wanted {
                let (name, shape) = &taps[i];
                let (h, w, prefix) = layer::places(shape, grid).ok_or_else(|| {
                    Error::input(format!("{name} of {} has no places to show", subject.name))
                })?;
                let values = session.tap(i)?;
                let channels = values.len() / (h * w + prefix);
                let values = &values[prefix * channels..];
                let best = strongest(values, channels, self.channels);
                cells.push(Cell::new(
                    shown.clone(),
                    [name.clone(), format!("{h} x {w}")],
                ));
                for &(c, mean) in &best {
                    let map: Vec<f32> = values.iter().skip(c).step_by(channels).copied().collect();
                    let lines = [format!("channel {c}"), format!("mean |x| {mean:.2}")];
                    cells.push(Cell::new(picture::map(&map, (h, w)), lines));
                }
                // A layer with fewer channels ends its row early.
                let white = image::RgbImage::from_pixel(1, 1, image::Rgb([255; 3]));
                let full = cells.len().next_multiple_of(self.channels + 1);
                cells.resize_with(full, || Cell::new(white.clone(), []));
                let names: Vec<String> = best.iter().map(|b| b.0.to_string()).collect();
                t.row([
                    photo.name.clone(),
                    name.clone(),
                    format!("{h} x {w}"),
                    names.join(" "),
                ]);
                rows.push(json!({"image": photo.name, "layer": name, "rows": h, "columns": w,
                    "channels": best.iter().map(|b| json!({"channel": b.0, "mean": b.1})).collect::<Vec<_>>()}));
            }
            found = found.picture(
                &photo.name,
                "A layer a row: the channels of the largest mean magnitude, each scaled from its smallest value (violet) to \
                 its largest (yellow).",
                captioned(&cells, self.channels + 1),
            );
        }
        found.heading = format!("strongest channels of {}", subject.name);
        found.data = json!({"model": subject.name, "maps": rows});
        Ok(found.table("", t))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_ranked_by_magnitude() {
        // Three channels over two places: means 1, 3 and 2.
        let got = strongest(&[1.0, -2.0, 2.0, -1.0, 4.0, 2.0], 3, 2);
        assert_eq!(got, [(1, 3.0), (2, 2.0)]);
    }
}
