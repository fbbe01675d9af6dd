//! Receptive fields: the theoretical one from the graph, the effective one from gradients (Luo, Li, Urtasun & Zemel
//! 2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks").

use super::{Analysis, Context, Findings, Pictures, picture};
use crate::backend::{Backend, CompileOptions};
use crate::data::{Feed, Loader, LoaderOptions};
use crate::graph::fuse::{Purpose, fuse};
use crate::graph::{Graph, Mode, Phase, Spec, Tid};
use crate::models::session::{load_net, options_for, write_parameters};
use crate::models::{Model, ModelOptions};
use crate::ops::Reach;
use crate::philox::Philox;
use crate::report::table::{Table, number};
use crate::weights::WeightFile;
use crate::{Error, Result};
use serde::Serialize;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;

/// Along one axis: place `i` of a tensor depends on pixels `low + i * step ..= high + i * step` of the image, some of
/// which may lie outside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Axis {
    /// First pixel of place 0.
    pub low: i64,
    /// Last pixel of place 0.
    pub high: i64,
    /// Pixels between neighbouring places.
    pub step: i64,
}

impl Axis {
    const PIXEL: Axis = Axis {
        low: 0,
        high: 0,
        step: 1,
    };

    /// Pixels that one place depends on.
    pub fn size(&self) -> i64 {
        self.high - self.low + 1
    }

    fn slide(self, size: usize, stride: usize, pad: usize) -> Axis {
        let (size, stride, pad) = (size as i64, stride as i64, pad as i64);
        Axis {
            low: self.low - pad * self.step,
            high: self.high + (size - 1 - pad) * self.step,
            step: self.step * stride,
        }
    }

    fn join(self, other: Axis) -> Axis {
        Axis {
            low: self.low.min(other.low),
            high: self.high.max(other.high),
            step: self.step.max(other.step),
        }
    }
}

/// What the places of a tensor depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// A window of pixels that slides: height and width.
    Window([Axis; 2]),
    /// Windows of attention: which pixels depends on the place, and no more than the image.
    Blocks,
    /// The whole image.
    Image,
}

impl Field {
    fn through(self, reach: Reach) -> Field {
        match (self, reach) {
            (Field::Image, _) | (_, Reach::All) => Field::Image,
            (f, Reach::Same) => f,
            (Field::Blocks, _) | (_, Reach::Blocks) => Field::Blocks,
            (Field::Window(axes), Reach::Window { size, stride, pad }) => {
                Field::Window([0, 1].map(|i| axes[i].slide(size[i], stride[i], pad[i])))
            }
        }
    }

    fn join(self, other: Field) -> Field {
        match (self, other) {
            (Field::Window(a), Field::Window(b)) => {
                Field::Window([a[0].join(b[0]), a[1].join(b[1])])
            }
            (Field::Image, _) | (_, Field::Image) => Field::Image,
            _ => Field::Blocks,
        }
    }
}

/// The theoretical receptive field of every tensor that depends on `input`, by walking the forward nodes. A place of a
/// sum sees what either operand sees, so the largest path counts.
pub fn fields(graph: &Graph, input: Tid) -> HashMap<Tid, Field> {
    let mut known = HashMap::from([(input, Field::Window([Axis::PIXEL; 2]))]);
    for node in graph.nodes.iter().filter(|n| n.phase == Phase::Forward) {
        let (x, _) = graph.node_specs(node);
        let mut field: Option<Field> = None;
        for (i, &t) in node.inputs.iter().enumerate() {
            let Some(&seen) = known.get(&graph.root(t).0) else {
                continue;
            };
            let reach = if i == 0 {
                node.op.reach(&x)
            } else {
                Reach::Same
            };
            let seen = seen.through(reach);
            field = Some(field.map_or(seen, |f| f.join(seen)));
        }
        if let Some(f) = field {
            for &t in &node.outputs {
                known.insert(graph.root(t).0, f);
            }
        }
    }
    known
}

/// One row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct LayerField {
    /// The tap's name, or the layer's where every layer is listed.
    pub layer: String,
    /// The tensor's shape.
    pub shape: Vec<usize>,
    /// What one place sees.
    pub field: Field,
}

/// The receptive fields of the model's taps, or with `every` of each layer that widens the field.
///
/// # Errors
/// The image does not suit the model.
pub fn table(
    model: &Model,
    image: (usize, usize),
    options: &ModelOptions,
    every: bool,
) -> Result<Vec<LayerField>> {
    let net = model.net(1, image, Mode::default(), options)?;
    let (g, fields) = (&net.graph, fields(&net.graph, net.input));
    let row = |layer: &str, t: Tid| {
        Some(LayerField {
            layer: layer.into(),
            shape: g.shape(t).to_vec(),
            field: *fields.get(&g.root(t).0)?,
        })
    };
    if !every {
        return Ok(g.taps.iter().filter_map(|t| row(&t.name, t.tid)).collect());
    }
    let widens = |n: &&crate::graph::Node| {
        n.phase == Phase::Forward && n.op.reach(&g.node_specs(n).0) != Reach::Same
    };
    Ok(g.nodes
        .iter()
        .filter(widens)
        .filter_map(|n| row(&n.scope, n.outputs[0]))
        .collect())
}

/// The effective receptive field of the centre place of one tap.
#[derive(Clone, Debug, Serialize)]
pub struct Effective {
    /// The tap.
    pub layer: String,
    /// Mean over images of the absolute gradient, summed over the image's channels, `[H, W]`, divided by the largest.
    #[serde(skip)]
    pub map: Vec<f32>,
    /// Height and width of the map.
    pub image: (usize, usize),
    /// Side of a square of as many pixels as are above 1 - 95.45 % of the largest value (the paper's measure).
    pub side: f64,
    /// Share of all pixels that hold 90 % of the sum.
    pub share_90: f64,
}

/// Gradients of the centre place of every tap (all its channels alike) with respect to the image, averaged over
/// `images` `[n * H * W * 3]`, in batches of `batch`.
///
/// # Errors
/// The image does not suit the model, the file does not fit it, or the device is lost.
pub fn effective(
    backend: &dyn Backend,
    model: &Model,
    file: Option<&WeightFile>,
    options: &ModelOptions,
    (image, batch, seed): ((usize, usize), usize, u64),
    images: &[f32],
) -> Result<Vec<Effective>> {
    let one = image.0 * image.1 * 3;
    if images.is_empty() || !images.len().is_multiple_of(one * batch) {
        return Err(Error::run(format!(
            "{} values are not batches of {batch} images",
            images.len()
        )));
    }
    let chosen = options_for(options, file, false);
    let mut out = vec![];
    let taps = model
        .net(batch, image, Mode::default(), &chosen)?
        .graph
        .taps;
    for (i, tap) in taps.iter().enumerate() {
        // The class token has no place: the last norm of a ViT is seen from its centre patch like the blocks.
        let mut net = model.net(batch, image, Mode::default(), &chosen)?;
        let loaded = file.map(|f| load_net(model, &net, f, false)).transpose()?;
        for p in &mut net.graph.params {
            p.trainable = false;
        }
        let (input, at) = (net.input, net.graph.taps[i].tid);
        let shape = net.graph.shape(at).to_vec();
        let pull = net.graph.input("pull", Spec::f32(shape.clone()));
        fuse(&mut net.graph, Purpose::Gradients)?;
        let at = net.graph.taps[i].tid;
        let grads = net.graph.backward_from(&[(at, pull)], &[input])?;
        let dx = *grads
            .get(&input)
            .ok_or_else(|| Error::run(format!("no gradient of {} reached the image", tap.name)))?;
        net.graph.keep(dx);
        let mut exec = backend.compile(Arc::new(net.graph), &CompileOptions::default())?;
        write_parameters(exec.as_mut(), loaded.as_ref().zip(file), seed)?;
        exec.run(&[Phase::Prepare])?;
        let mut ones = vec![0.0f32; shape.iter().product()];
        for n in 0..batch {
            let (first, c) = centre(&shape, net.grid, n);
            ones[first..first + c].fill(1.0);
        }
        exec.write(pull, &ones)?;
        let mut sums = vec![0.0f64; one / 3];
        for chunk in images.chunks(one * batch) {
            exec.write(input, chunk)?;
            exec.run(&[Phase::Forward, Phase::Backward])?;
            let d = exec.read(dx)?;
            for (j, pixel) in d.chunks_exact(3).enumerate() {
                sums[j % (one / 3)] += pixel.iter().map(|v| f64::from(v.abs())).sum::<f64>();
            }
        }
        out.push(measure(&tap.name, image, &sums));
    }
    Ok(out)
}

/// Offset and number of elements of the centre place of image `n` in a tensor `[N, H, W, C]` or `[N, T, C]`.
fn centre(shape: &[usize], grid: Option<(usize, usize)>, n: usize) -> (usize, usize) {
    let each: usize = shape[1..].iter().product();
    let c = shape[shape.len() - 1];
    let place = match (shape, grid) {
        (&[_, h, w, _], _) => h / 2 * w + w / 2,
        // Class and distillation tokens stand before the patches.
        (&[_, t, _], Some((h, w))) => t - h * w + h / 2 * w + w / 2,
        _ => 0,
    };
    (n * each + place * c, c)
}

fn measure(layer: &str, image: (usize, usize), sums: &[f64]) -> Effective {
    let top = sums.iter().copied().fold(0.0, f64::max);
    let map: Vec<f32> = sums.iter().map(|v| (v / top) as f32).collect();
    let above = sums.iter().filter(|&&v| v > top * (1.0 - 0.9545)).count();
    let mut sorted = sums.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let total: f64 = sorted.iter().sum();
    let mut sum = 0.0;
    let holding = sorted.iter().take_while(|&&v| {
        let before = sum;
        sum += v;
        before < 0.9 * total
    });
    Effective {
        layer: layer.into(),
        map,
        image,
        side: (above as f64).sqrt(),
        share_90: holding.count() as f64 / sums.len() as f64,
    }
}

/// Pixels that a place of each layer can see: from the graph, and with --effective from gradients.
///
/// The theoretical field counts every pixel that can have any influence. The effective field (Luo et al. 2016) is where
/// the gradient of a stage's centre place is above 4.55 % of its largest value, averaged over images.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze receptive-field -m resnet50 -w random
  tilewright analyze receptive-field -w runs/digits --effective -d digits -o fields")]
pub(super) struct Args {
    /// Every layer that widens the field, not only stages and blocks
    #[arg(long)]
    every: bool,
    /// Also the effective field, over images (without -d: over normal noise), with a picture of each stage's
    #[arg(long)]
    effective: bool,
}

/// Images of the effective field in one run.
const BATCH: usize = 8;
/// Images of noise, where there are no others.
const NOISE: usize = 16;

/// Whole batches of images, or of noise.
fn images(cx: &Context) -> Result<(usize, Vec<f32>)> {
    let subject = cx.subject();
    let (h, w) = subject.image();
    if matches!(cx.pictures, Pictures::Nothing) {
        let mut draw = Philox::new(cx.seed, 0);
        let n = NOISE * h * w * 3;
        return Ok((BATCH, (0..n).map(|_| draw.normal()).collect()));
    }
    let images = cx.images(subject)?;
    let batch = images.len().min(BATCH);
    let mut loader = Loader::new(images, LoaderOptions::eval(batch))?;
    let mut all = vec![];
    while let Some(b) = loader.next_batch()? {
        all.extend_from_slice(&b.images);
        loader.recycle(b);
    }
    Ok((batch, all))
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let options = subject.options(None);
        let (side, image) = (subject.preprocess.size, subject.image());
        let rows = table(&subject.model, image, &options, self.every)?;
        let mut effective = vec![];
        if self.effective {
            let (batch, images) = images(cx)?;
            let (model, file) = (&subject.model, subject.file.as_ref());
            let how = (image, batch, subject.seed);
            effective = self::effective(cx.backend, model, file, &options, how, &images)?;
        }
        let mut t = Table::new([
            "layer",
            "output",
            "field px",
            "step px",
            "first centre",
            "effective px",
            "90 % in",
        ])
        .left(&[0, 1]);
        for row in &rows {
            let e = effective.iter().find(|e| e.layer == row.layer);
            let (size, step, centre) = match row.field {
                Field::Window([v, h]) => (
                    if v == h {
                        v.size().to_string()
                    } else {
                        format!("{} x {}", v.size(), h.size())
                    },
                    v.step.to_string(),
                    number((v.low + v.high) as f64 / 2.0, 1),
                ),
                Field::Blocks => ("by window".into(), "-".into(), "-".into()),
                Field::Image => ("image".into(), "-".into(), "-".into()),
            };
            let shape: Vec<String> = row.shape[1..].iter().map(usize::to_string).collect();
            t.row([
                row.layer.clone(),
                shape.join(" x "),
                size,
                step,
                centre,
                e.map_or("-".into(), |e| number(e.side, 1)),
                e.map_or("-".into(), |e| format!("{:.1} %", 100.0 * e.share_90)),
            ]);
        }
        let data =
            json!({"model": subject.name, "image": side, "layers": rows, "effective": effective});
        let mut found = Findings::new(format!("{} at {side} px", subject.name), data).table("", t);
        if !effective.is_empty() {
            let black = image::RgbImage::new(side, side);
            let cells = effective.iter().map(|e| {
                // The square root lets the field's shoulders be seen beside its centre.
                let map: Vec<f32> = e.map.iter().map(|v| v.sqrt()).collect();
                let shown = picture::overlay(&black, &map, e.image);
                picture::Cell::new(shown, [e.layer.clone(), format!("{:.0} px", e.side)])
            });
            found = found.picture(
                "effective-fields",
                "Effective receptive field of each stage's centre: the square root of its mean absolute gradient.",
                picture::captioned(&cells.collect::<Vec<_>>(), 6),
            );
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::models::find;

    fn window(model: &str, layer: &str) -> [Axis; 2] {
        let model = find(model).unwrap();
        let size = (model.image, model.image);
        let rows = table(&model, size, &ModelOptions::default(), false).unwrap();
        match rows.iter().find(|r| r.layer == layer).unwrap().field {
            Field::Window(axes) => axes,
            other => panic!("{layer}: {other:?}"),
        }
    }

    /// Araujo, Norris & Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks" (Distill): ResNet-50 with
    /// strides in the first 1x1 convolutions has 483; torchvision's has its strides in the 3x3 ones.
    #[test]
    fn known_sizes() {
        let last = window("resnet18", "layer4")[0];
        assert_eq!((last.size(), last.step), (435, 32));
        assert_eq!(window("resnet34", "layer4")[0].size(), 899);
        assert_eq!(window("resnet50", "layer4")[1].size(), 427);
        assert_eq!(window("resnet18", "stem")[0].size(), 11);
        assert_eq!(window("resnet20", "layer3")[0].step, 4);
        // The patch of a ViT before its first block, the whole image after.
        let vit = find("vit_p4_e128_d6").unwrap();
        let rows = table(&vit, (32, 32), &ModelOptions::default(), false).unwrap();
        assert_eq!(window("vit_p4_e128_d6", "stem")[0].size(), 4);
        assert_eq!(rows[1].field, Field::Image);
    }

    /// No gradient lies outside the theoretical field, and the centre holds most of it.
    #[test]
    fn the_effective_field_lies_within_the_theoretical_one() {
        let model = find("resnet20").unwrap();
        let side = 64;
        let images: Vec<f32> = (0..2 * side * side * 3)
            .map(|i| ((i * 7919 % 1013) as f32 / 506.0) - 1.0)
            .collect();
        let got = effective(
            &Cpu,
            &model,
            None,
            &ModelOptions::default(),
            ((side, side), 2, 1),
            &images,
        )
        .unwrap();
        let rows = table(&model, (side, side), &ModelOptions::default(), false).unwrap();
        for (e, row) in got.iter().zip(&rows) {
            let Field::Window([v, h]) = row.field else {
                panic!("a CNN has windows")
            };
            let (ci, cj) = ((row.shape[1] / 2) as i64, (row.shape[2] / 2) as i64);
            for (p, &value) in e.map.iter().enumerate() {
                let (i, j) = ((p / side) as i64, (p % side) as i64);
                let inside = |a: Axis, c: i64, x: i64| {
                    (a.low + c * a.step..=a.high + c * a.step).contains(&x)
                };
                // Winograd's tiles reach a little further, with rounding errors.
                assert!(
                    value < 1e-6 || (inside(v, ci, i) && inside(h, cj, j)),
                    "{}: {value} at {i}, {j}",
                    e.layer
                );
            }
            assert!(e.side > 0.0 && e.side <= v.size() as f64);
        }
        assert!(got[0].side < got.last().unwrap().side);
    }
}
