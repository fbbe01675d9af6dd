//! Occlusion sensitivity (Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks", section 4.2).

use super::classify::{best, softmax};
use super::picture::{self, Cell, captioned};
use super::{Analysis, Context, Findings};
use crate::report::progress::Progress;
use crate::report::table::{Table, number};
use crate::{Error, Result};
use clap::builder::RangedU64ValueParser;
use serde_json::json;

/// What a class cannot do without, over photographs: how far its probability drops where a grey square covers the image.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze occlusion -m resnet50 -w resnet50.safetensors -o occlusion cat.jpg
  tilewright analyze occlusion -w runs/vit --class cat --patch 8 --stride 2 -o occlusion photo.jpg")]
pub(super) struct Args {
    /// The class, by name or number [default: the predicted one]
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// Side of the square in pixels of the input [default: a fifth of its side]
    #[arg(long, value_name = "PX", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    patch: Option<usize>,
    /// Pixels between its places [default: half its side]
    #[arg(long, value_name = "PX", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    stride: Option<usize>,
}

/// Upper or left ends of a window of `patch` pixels that slides over `side` by `stride`; the last one ends at the edge.
fn starts(side: usize, patch: usize, stride: usize) -> Vec<usize> {
    let last = side - patch;
    let mut all: Vec<usize> = (0..last).step_by(stride).collect();
    all.push(last);
    all
}

/// For each pixel the mean of `drops` over the windows that cover it, `[side * side]`; `drops[i * n + j]` belongs to the
/// window at row `starts[i]`, column `starts[j]`.
fn spread(side: usize, patch: usize, starts: &[usize], drops: &[f32]) -> Vec<f32> {
    let (mut sums, mut counts) = (vec![0.0f32; side * side], vec![0u32; side * side]);
    for (i, &top) in starts.iter().enumerate() {
        for (j, &left) in starts.iter().enumerate() {
            for y in top..top + patch {
                for x in left..left + patch {
                    sums[y * side + x] += drops[i * starts.len() + j];
                    counts[y * side + x] += 1;
                }
            }
        }
    }
    let mean = |(s, &n): (f32, &u32)| if n > 0 { s / n as f32 } else { 0.0 };
    sums.into_iter().zip(&counts).map(mean).collect()
}

/// `pixels` `[side, side, 3]` with a square of zeros, which is the mean colour once normalised.
fn covered(pixels: &[f32], side: usize, patch: usize, (top, left): (usize, usize)) -> Vec<f32> {
    let mut out = pixels.to_vec();
    for y in top..top + patch {
        out[(y * side + left) * 3..][..patch * 3].fill(0.0);
    }
    out
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let side = subject.preprocess.size as usize;
        let patch = self.patch.unwrap_or((side / 5).max(1));
        let stride = self.stride.unwrap_or((patch / 2).max(1));
        if patch > side {
            return Err(Error::input(format!(
                "--patch {patch}: the input has {side} pixels"
            )));
        }
        let photos = cx.photos()?;
        let starts = starts(side, patch, stride);
        let n = starts.len();
        let batch = cx.batch.min(n * n);
        let (mut session, ()) = subject.session(cx.backend, (batch, None), false, |_| Ok(()))?;
        if !session.classifies() {
            return Err(subject.no_classifier());
        }
        let classes = session.outputs();
        let chosen = self
            .class
            .as_ref()
            .map(|c| subject.class(c, classes))
            .transpose()?;
        let mut t = Table::new([
            "image",
            "class",
            "probability %",
            "largest drop %",
            "at (row, column)",
        ])
        .left(&[0, 1]);
        let (mut found, mut rows) = (Findings::default(), vec![]);
        let steps = (n * n).div_ceil(batch);
        let mut progress = Progress::new("occlusion", (photos.len() * steps) as u64);
        for photo in &photos {
            let pixels = subject.preprocess.apply(&photo.pixels);
            let pixels = pixels.map_err(|e| e.context(&photo.name))?;
            let mut run = |images: Vec<f32>, valid: usize| -> Result<Vec<Vec<f64>>> {
                let mut all = images;
                all.resize(batch * pixels.len(), 0.0);
                let logits = session.run(&all)?;
                Ok(logits.chunks(classes).take(valid).map(softmax).collect())
            };
            let whole = run(pixels.clone(), 1)?.swap_remove(0);
            let class = chosen.unwrap_or(best(&whole).0);
            let windows: Vec<usize> = (0..n * n).collect();
            let mut drops = vec![];
            for chunk in windows.chunks(batch) {
                let at = |&w: &usize| covered(&pixels, side, patch, (starts[w / n], starts[w % n]));
                let p = run(chunk.iter().flat_map(at).collect(), chunk.len())?;
                drops.extend(p.iter().map(|p| (whole[class] - p[class]) as f32));
                progress.step(chunk.len() as u64, f64::NAN, f64::NAN);
            }
            let map = spread(side, patch, &starts, &drops);
            let top = best(&drops.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
            let name = subject.class_name(class);
            let (percent, most) = (number(100.0 * whole[class], 1), number(100.0 * top.1, 1));
            t.row([
                photo.name.clone(),
                name.clone(),
                percent.clone(),
                most.clone(),
                format!("{}, {}", starts[top.0 / n], starts[top.0 % n]),
            ]);
            rows.push(json!({"image": photo.name, "class": class, "name": name, "probability": whole[class],
                "starts": starts, "drops": drops.chunks(n).collect::<Vec<_>>()}));
            let shown = picture::unnormalise(&pixels, &subject.preprocess);
            let worst = covered(&pixels, side, patch, (starts[top.0 / n], starts[top.0 % n]));
            let worst = picture::unnormalise(&worst, &subject.preprocess);
            let cells = [
                Cell::new(shown.clone(), [name.clone(), format!("{percent} %")]),
                Cell::new(
                    picture::overlay(&shown, &map, (side, side)),
                    ["mean drop".to_string(), String::new()],
                ),
                Cell::new(
                    worst,
                    ["largest drop:".to_string(), format!("by {most} points")],
                ),
            ];
            found = found.picture(
                &photo.name,
                format!("How far the probability of {name} drops where a square of {patch} pixels covers the image."),
                captioned(&cells, 3),
            );
        }
        progress.finish("");
        found.heading = format!(
            "occlusion sensitivity of {} at {side} px, squares of {patch} px every {stride} px",
            subject.name
        );
        found.data = json!({"model": subject.name, "image": side, "patch": patch, "stride": stride, "maps": rows});
        Ok(found.table("", t))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_reach_the_edge() {
        assert_eq!(starts(10, 4, 3), [0, 3, 6]);
        assert_eq!(starts(10, 4, 4), [0, 4, 6]);
        assert_eq!(starts(4, 4, 2), [0]);
    }

    /// A network that looks at one pixel alone: the probability drops in the windows that cover it, and the map is hottest
    /// there.
    #[test]
    fn the_pixel_that_counts_is_found() {
        let (side, patch, pixel) = (9, 3, (4, 4));
        let image = vec![1.0f32; side * side * 3];
        let starts = starts(side, patch, 1);
        let n = starts.len();
        let score = |image: &[f32]| image[(pixel.0 * side + pixel.1) * 3];
        let drops: Vec<f32> = (0..n * n)
            .map(|w| {
                let at = (starts[w / n], starts[w % n]);
                1.0 - score(&covered(&image, side, patch, at))
            })
            .collect();
        assert_eq!(drops.iter().sum::<f32>(), 9.0);
        let map = spread(side, patch, &starts, &drops);
        let (hottest, _) = best(&map.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
        assert_eq!((hottest / side, hottest % side), pixel);
        assert!((map[hottest] - 1.0).abs() < 1e-6 && map[0] == 0.0);
    }
}
