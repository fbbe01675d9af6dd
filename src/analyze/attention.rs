//! Attention of a ViT, from its kernel's analysis mode: mean distance per head (Dosovitskiy et al. 2021, appendix D.7;
//! Raghu et al. 2021), maps of the class token, and rollout (Abnar & Zuidema 2020).

use super::receptive::{self, Field};
use super::{Analysis, Context, Findings, Subject, for_batches, picture};
use crate::graph::Tid;
use crate::models::{Arch, ModelOptions, Net};
use crate::ops::attention::Attention;
use crate::report::plot::{Family, LayerSeries, Svg, over_depth};
use crate::report::table::{Table, number};
use crate::{Error, Result};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;

/// The probabilities of one block.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The block's scope: `blocks.0.attn`.
    pub name: String,
    /// `[N, heads, T, T]`: query, key.
    pub probs: Tid,
    /// Heads.
    pub heads: usize,
    /// Tokens.
    pub tokens: usize,
}

/// Makes every attention of `net` keep its probabilities.
///
/// # Errors
/// [`Error::Input`] where it has none over all tokens: a CNN, or a transformer over windows.
pub fn expose(net: &mut Net) -> Result<Vec<Layer>> {
    let graph = &mut net.graph;
    let mut layers = vec![];
    for i in 0..graph.nodes.len() {
        let node = &graph.nodes[i];
        let Some(op) = node.op.as_any().downcast_ref::<Attention>().copied() else {
            continue;
        };
        let op = Attention { probs: true, ..op };
        let x = graph.spec(node.inputs[0]).clone();
        let y = crate::ops::Op::infer(&op, &[x]).map_err(Error::run)?;
        let name = node.scope.clone();
        let kind = graph.tensor(node.outputs[0]).kind;
        let probs = graph.add_tensor(format!("{name}.probs"), y[2].clone(), kind);
        graph.nodes[i].op = Arc::new(op);
        graph.nodes[i].outputs.push(probs);
        graph.keep(probs);
        layers.push(Layer {
            name,
            probs,
            heads: y[2].shape[1],
            tokens: y[2].shape[2],
        });
    }
    if layers.is_empty() {
        return Err(Error::input(
            "the model has no attention over all tokens: give a ViT, DeiT or DINOv2",
        ));
    }
    Ok(layers)
}

/// Rows and columns of patches, and the side of one in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Pixels.
    pub patch: f64,
}

impl Grid {
    fn patches(&self) -> usize {
        self.rows * self.columns
    }
}

/// Mean attention distance of one block.
#[derive(Clone, Debug, Serialize)]
pub struct Distance {
    /// The block's scope.
    pub layer: String,
    /// Pixels, for each head.
    pub heads: Vec<f64>,
}

/// Sums of distances over images.
pub struct Distances {
    grid: Grid,
    between: Vec<f64>,
    sums: Vec<Vec<f64>>,
    images: usize,
}

impl Distances {
    /// For blocks of that many heads.
    pub fn new(layers: &[Layer], grid: Grid) -> Distances {
        let place = |i: usize| [(i / grid.columns) as f64, (i % grid.columns) as f64];
        let p = grid.patches();
        let between = (0..p * p).map(|e| {
            let ([a, b], [c, d]) = (place(e / p), place(e % p));
            grid.patch * (a - c).hypot(b - d)
        });
        Distances {
            grid,
            between: between.collect(),
            sums: layers.iter().map(|l| vec![0.0; l.heads]).collect(),
            images: 0,
        }
    }

    /// Adds the first `valid` images of `probs` `[N, heads, T, T]` of block `layer`. Tokens before the patches are left
    /// out, and each patch's probabilities over patches made to sum to one. Call for every block, then [`Self::count`].
    pub fn add(&mut self, layer: usize, probs: &[f32], tokens: usize, valid: usize) {
        let p = self.grid.patches();
        let first = tokens - p;
        let heads = self.sums[layer].len();
        for (i, map) in probs
            .chunks_exact(tokens * tokens)
            .take(valid * heads)
            .enumerate()
        {
            let mut sum = 0.0;
            for q in 0..p {
                let row = &map[(first + q) * tokens + first..][..p];
                let all: f64 = row.iter().map(|&v| f64::from(v)).sum();
                let far = row.iter().zip(&self.between[q * p..]);
                sum += far.map(|(&v, d)| f64::from(v) * d).sum::<f64>() / all;
            }
            self.sums[layer][i % heads] += sum / p as f64;
        }
    }

    /// Counts images, once for all blocks.
    pub fn count(&mut self, images: usize) {
        self.images += images;
    }

    /// Means over the images.
    pub fn finish(self, layers: &[Layer]) -> Vec<Distance> {
        let n = self.images.max(1) as f64;
        let mean = |(sums, l): (Vec<f64>, &Layer)| Distance {
            layer: l.name.clone(),
            heads: sums.into_iter().map(|s| s / n).collect(),
        };
        self.sums.into_iter().zip(layers).map(mean).collect()
    }
}

/// What the first token (the class token) attends to among the patches of one image, per head: `probs` is `[heads, T,
/// T]`; `[heads][rows * columns]`. Without a class token, the mean over all queries.
pub fn of_class_token(probs: &[f32], tokens: usize, patches: usize) -> Vec<Vec<f32>> {
    let first = tokens - patches;
    let map = |m: &[f32]| {
        if first > 0 {
            return m[first..tokens].to_vec();
        }
        let mut mean = vec![0.0; tokens];
        for row in m.chunks_exact(tokens) {
            mean.iter_mut()
                .zip(row)
                .for_each(|(s, v)| *s += v / tokens as f32);
        }
        mean
    };
    probs.chunks_exact(tokens * tokens).map(map).collect()
}

/// Attention rollout of one image: the product over blocks of `(mean over heads + identity) / 2`, of which the class
/// token's row over the patches is returned (the mean row where there is no class token). `blocks` holds each block's
/// `[heads, T, T]`, first block first.
pub fn rollout(blocks: &[&[f32]], tokens: usize, patches: usize) -> Vec<f32> {
    let t = tokens;
    let first = t - patches;
    let from: Vec<usize> = if first > 0 { vec![0] } else { (0..t).collect() };
    // Rows of the product are needed for the wanted tokens only: start there and go down through the blocks.
    let mut row = vec![0.0f64; t];
    from.iter().for_each(|&i| row[i] = 1.0 / from.len() as f64);
    for probs in blocks.iter().rev() {
        let heads = probs.len() / (t * t);
        let mut next: Vec<f64> = row.iter().map(|v| 0.5 * v).collect();
        for map in probs.chunks_exact(t * t) {
            for (q, &weight) in row.iter().enumerate() {
                let scale = 0.5 * weight / heads as f64;
                let keys = &map[q * t..(q + 1) * t];
                next.iter_mut()
                    .zip(keys)
                    .for_each(|(s, &v)| *s += scale * f64::from(v));
            }
        }
        row = next;
    }
    row[first..].iter().map(|&v| v as f32).collect()
}

/// The grid of patches of a ViT's input.
fn grid(subject: &Subject) -> Result<Grid> {
    let Arch::Vit(net) = &subject.model.arch else {
        return Err(Error::input(format!(
            "{} has no attention over all tokens: give a ViT, DeiT or DINOv2",
            subject.name
        )));
    };
    let n = subject.preprocess.size as usize / net.patch;
    Ok(Grid {
        rows: n,
        columns: n,
        patch: net.patch as f64,
    })
}

/// How far each head looks: the mean distance in pixels between a patch and what it attends to, by block.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze attention-distance -m dinov2_small -w dinov2-small.safetensors -d folder:photos --plot distance.svg")]
pub(super) struct DistanceArgs {
    /// CNNs whose theoretical receptive fields are drawn beside
    #[arg(
        long,
        value_name = "MODEL",
        value_delimiter = ',',
        default_value = "resnet50"
    )]
    beside: Vec<String>,
}

impl Analysis for DistanceArgs {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let grid = grid(subject)?;
        let images = cx.images(subject)?;
        let batch = cx.batch.min(images.len());
        let (mut session, layers) = subject.session(cx.backend, (batch, None), false, expose)?;
        let mut distances = Distances::new(&layers, grid);
        let count = images.len();
        for_batches(&mut session, images, "attention", 1, |s, b| {
            for (i, l) in layers.iter().enumerate() {
                distances.add(i, &s.read(l.probs)?, l.tokens, b.valid);
            }
            distances.count(b.valid);
            Ok(())
        })?;
        let got = distances.finish(&layers);
        let mut t = Table::new([
            "block",
            "mean px",
            "nearest head",
            "farthest head",
            "all heads px",
        ])
        .left(&[0, 4]);
        for d in &got {
            let mean = d.heads.iter().sum::<f64>() / d.heads.len() as f64;
            let all: Vec<String> = d.heads.iter().map(|v| number(*v, 0)).collect();
            t.row([
                d.layer.clone(),
                number(mean, 1),
                number(d.heads.iter().copied().fold(f64::INFINITY, f64::min), 1),
                number(d.heads.iter().copied().fold(0.0, f64::max), 1),
                all.join(" "),
            ]);
        }
        let size = subject.preprocess.size;
        let data = json!({"model": subject.name, "data": cx.data(), "images": count, "image": size,
            "patch": grid.patch, "layers": got});
        let heading = format!(
            "mean attention distance of {} at {size} px over {count} images of {}",
            subject.name,
            cx.data()
        );
        let caption = "A dot a head, the line through each block's mean; beside it half the receptive field of CNNs' stages.";
        Ok(Findings::new(heading, data)
            .plot("attention-distance", caption, self.draw(subject, &got)?)
            .table("", t))
    }
}

impl DistanceArgs {
    fn draw(&self, subject: &Subject, got: &[Distance]) -> Result<Svg> {
        let side = subject.preprocess.size;
        let name = format!("{}, each head", subject.name);
        let mut series = vec![LayerSeries {
            name: &name,
            family: Family::Vit,
            layers: got.iter().map(|d| d.heads.clone()).collect(),
        }];
        let mut names = vec![];
        for id in self.beside.iter().filter(|id| !id.is_empty()) {
            let model = crate::models::find(id)?;
            let rows = receptive::table(&model, subject.image(), &ModelOptions::default(), false)?;
            let half = |f: &Field| match f {
                // The mean distance of a point of the field from its centre would be 0.38 of its side; half the side, cut
                // at the image, is the farthest that it reaches along an axis.
                Field::Window([v, _]) => (v.size() as f64 / 2.0).min(f64::from(side)),
                _ => f64::NAN,
            };
            let layers: Vec<Vec<f64>> = rows.iter().map(|r| vec![half(&r.field)]).collect();
            names.push((format!("{id}, half the receptive field"), layers));
        }
        for (name, layers) in &names {
            series.push(LayerSeries {
                name,
                family: Family::Cnn,
                layers: layers.clone(),
            });
        }
        let title = format!("Mean attention distance of {}", subject.name);
        over_depth(&title, "distance (pixels)", &series)
    }
}

/// What the class token attends to, over photographs: one PNG an image with the image, the mean over heads, the rollout
/// over blocks and each head.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze attention-map -m dinov2_small -w dinov2-small.safetensors -o maps cat.jpg dog.jpg
  tilewright analyze attention-map -w runs/vit --block 0 -o maps cat.jpg")]
pub(super) struct MapArgs {
    /// Which block's heads, counted from 0 [default: the last]
    #[arg(long, value_name = "N")]
    block: Option<usize>,
}

impl Analysis for MapArgs {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let grid = grid(subject)?;
        let photos = cx.photos()?;
        let (mut session, layers) = subject.session(cx.backend, (1, None), false, expose)?;
        let block = self.block.unwrap_or(layers.len() - 1);
        if block >= layers.len() {
            return Err(Error::input(format!(
                "--block {block}: {} has blocks 0 to {}",
                subject.name,
                layers.len() - 1
            )));
        }
        let heads = layers[block].heads;
        let data = json!({"model": subject.name, "block": block, "heads": heads,
            "columns": ["image", "mean of heads", "rollout", "heads"]});
        let mut found = Findings::new(
            format!(
                "{}: image, mean over the heads of block {block}, rollout over all blocks, then each of {heads} heads",
                subject.name
            ),
            data,
        );
        for photo in &photos {
            let pixels = subject.preprocess.apply(&photo.pixels);
            let pixels = pixels.map_err(|e| e.context(&photo.name))?;
            session.forward(&pixels)?;
            let probs = layers.iter().map(|l| session.read(l.probs));
            let probs = probs.collect::<Result<Vec<_>>>()?;
            let shown = picture::unnormalise(&pixels, &subject.preprocess);
            found = found.picture(
                &photo.name,
                format!("Attention of the class token in block {block}."),
                overlays(&shown, &probs, &layers[block], block, grid),
            );
        }
        Ok(found)
    }
}

fn overlays(
    shown: &image::RgbImage,
    probs: &[Vec<f32>],
    layer: &Layer,
    block: usize,
    grid: Grid,
) -> image::RgbImage {
    let patches = grid.patches();
    let heads = of_class_token(&probs[block], layer.tokens, patches);
    let mut mean = vec![0.0; patches];
    for h in &heads {
        mean.iter_mut()
            .zip(h)
            .for_each(|(m, v)| *m += v / heads.len() as f32);
    }
    let all: Vec<&[f32]> = probs.iter().map(Vec::as_slice).collect();
    let rollout = rollout(&all, layer.tokens, patches);
    let size = (grid.rows, grid.columns);
    let map =
        |map: &[f32], name: String| picture::Cell::new(picture::overlay(shown, map, size), [name]);
    let mut cells = vec![
        picture::Cell::new(shown.clone(), ["image".to_string()]),
        map(&mean, "mean of heads".into()),
        map(&rollout, "rollout".into()),
    ];
    cells.extend(
        heads
            .iter()
            .enumerate()
            .map(|(i, h)| map(h, format!("head {i}"))),
    );
    picture::captioned(&cells, 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(heads: usize, tokens: usize) -> Layer {
        Layer {
            name: "blocks.0.attn".into(),
            probs: Tid(0),
            heads,
            tokens,
        }
    }

    /// A head that looks at its own patch has distance 0, one that looks one patch to the right the patch's side; the class
    /// token counts for nothing.
    #[test]
    fn distance_of_known_heads() {
        let grid = Grid {
            rows: 1,
            columns: 3,
            patch: 16.0,
        };
        let (t, layers) = (4, [layer(3, 4)]);
        let mut probs = vec![0.0f32; 3 * t * t];
        for q in 0..t {
            probs[q * t] = 0.5; // half of every query goes to the class token
            probs[q * t + q] += 0.5;
            probs[t * t + q * t + (q % 3 + 1)] = 1.0; // 1 -> 2, 2 -> 3, 3 -> 1
            for k in 0..t {
                probs[2 * t * t + q * t + k] = 0.25;
            }
        }
        let mut d = Distances::new(&layers, grid);
        d.add(0, &probs, t, 1);
        d.count(1);
        let got = d.finish(&layers)[0].heads.clone();
        // Uniform over places 0, 1, 2: (0 + 1 + 2 + 1 + 0 + 1 + 2 + 1 + 0) / 9 patches.
        for (g, want) in got.iter().zip([0.0, 16.0 * 4.0 / 3.0, 16.0 * 8.0 / 9.0]) {
            assert!((g - want).abs() < 1e-5, "{g} for {want}");
        }
    }

    /// The product of matrices, written out.
    #[test]
    fn rollout_is_the_product() {
        let t = 3;
        let a = [0.2f32, 0.3, 0.5, 0.1, 0.8, 0.1, 0.6, 0.2, 0.2];
        let b = [0.5f32, 0.25, 0.25, 0.3, 0.3, 0.4, 0.0, 0.5, 0.5];
        let half = |m: &[f32]| -> Vec<f64> {
            let one =
                |(i, &v): (usize, &f32)| 0.5 * f64::from(v) + f64::from(u8::from(i % 4 == 0)) * 0.5;
            m.iter().enumerate().map(one).collect()
        };
        let (ha, hb) = (half(&a), half(&b));
        let want = |j: usize| (0..t).map(|k| hb[k] * ha[k * t + j]).sum::<f64>();
        let got = rollout(&[&a, &b], t, 2);
        assert!((f64::from(got[0]) - want(1)).abs() < 1e-6);
        assert!((f64::from(got[1]) - want(2)).abs() < 1e-6);
    }
}
