//! `analyze`.

use super::global::Global;
use super::output::{json, print};
use super::source::{ModelArgs, PreprocessArgs, Source, positive};
use super::tensors::check_writable;
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use tilewright::analyze::attention::{self, Distances, Grid, Layer};
use tilewright::analyze::cka::{self, Cka, gram};
use tilewright::analyze::receptive::{self, Field};
use tilewright::analyze::{for_batches, picture};
use tilewright::backend::Backend;
use tilewright::data::{self, Feed, Images, OpenOptions, PrepareOptions, Preprocess, decode_file};
use tilewright::models::session::{Session, SessionOptions};
use tilewright::models::{Arch, ModelOptions, Net};
use tilewright::philox::Philox;
use tilewright::report::plot::{Family, LayerSeries, heat_map, over_depth};
use tilewright::report::table::{Table, number};
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// What a network looks at, and what its layers hold.
#[derive(Args)]
pub struct Analyze {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    ReceptiveField(ReceptiveField),
    AttentionDistance(AttentionDistance),
    AttentionMap(AttentionMap),
    Cka(CkaArgs),
}

impl Analyze {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        match self.what {
            What::ReceptiveField(c) => c.run(g),
            What::AttentionDistance(c) => c.run(g),
            What::AttentionMap(c) => c.run(g),
            What::Cka(c) => c.run(g),
        }
    }
}

/// Which images, and how many.
#[derive(Args)]
struct Pictures {
    /// digits, synthetic[:CLASSESxSIZE], cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR] or folder:DIR
    #[arg(short, long, value_name = "DATA")]
    data: String,
    /// How many images, evenly from the test set
    #[arg(long, value_name = "N", default_value = "256", value_parser = positive)]
    limit: usize,
    /// Images in a batch
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive)]
    batch_size: usize,
    #[command(flatten)]
    preprocess: PreprocessArgs,
}

impl Pictures {
    fn open(&self, g: &Global, source: &Source) -> Result<Arc<Images>> {
        let sets = data::open(&self.data, OpenOptions { seed: g.seed })?;
        sets.notes.iter().for_each(|n| g.remark(n));
        let preprocess = source.preprocess(&self.preprocess, Some(&sets))?;
        let split = sets.test.spaced(self.limit);
        let images = Images::prepare(&split, preprocess, PrepareOptions::default())?;
        Ok(Arc::new(images))
    }
}

fn session<T>(
    backend: &dyn Backend,
    source: &Source,
    (batch, size): (usize, u32),
    taps: bool,
    change: impl FnOnce(&mut Net) -> Result<T>,
) -> Result<(Session, T)> {
    let side = size as usize;
    let options = SessionOptions {
        taps,
        model: ModelOptions {
            classes: source.classes(),
            ..ModelOptions::default()
        },
        seed: source.seed,
        ..SessionOptions::new(batch, (side, side))
    };
    Session::open_with(
        backend,
        &source.model,
        source.file.as_ref(),
        &options,
        change,
    )
}

/// Pixels that a place of each layer can see: from the graph, and with --effective from gradients.
///
/// The theoretical field counts every pixel that can have any influence. The effective field (Luo et al. 2016) is where
/// the gradient of a stage's centre place is above 4.55 % of its largest value, averaged over images.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright analyze receptive-field -m resnet50 -w random
  tilewright analyze receptive-field -w runs/digits --effective -d digits --pictures out")]
struct ReceptiveField {
    #[command(flatten)]
    source: ModelArgs,
    /// Every layer that widens the field, not only stages and blocks
    #[arg(long)]
    every: bool,
    /// Also the effective field, over images
    #[arg(long)]
    effective: bool,
    /// With --effective: the images [default: normal noise]
    #[arg(short, long, value_name = "DATA")]
    data: Option<String>,
    /// With --effective: how many images
    #[arg(long, value_name = "N", default_value = "16", value_parser = positive)]
    limit: usize,
    /// With --effective: write a map of each stage into this folder, PNG
    #[arg(long, value_name = "DIR", requires = "effective")]
    pictures: Option<PathBuf>,
    #[command(flatten)]
    preprocess: PreprocessArgs,
}

impl ReceptiveField {
    fn images(&self, g: &Global, preprocess: Preprocess, batch: usize) -> Result<Vec<f32>> {
        let one = 3 * (preprocess.size * preprocess.size) as usize;
        let Some(data) = &self.data else {
            let mut draw = Philox::new(g.seed, 0);
            let n = self.limit.next_multiple_of(batch) * one;
            return Ok((0..n).map(|_| draw.normal()).collect());
        };
        let sets = data::open(data, OpenOptions { seed: g.seed })?;
        let split = sets.test.spaced(self.limit);
        let images = Arc::new(Images::prepare(
            &split,
            preprocess,
            PrepareOptions::default(),
        )?);
        let mut loader = data::Loader::new(images, data::LoaderOptions::eval(batch))?;
        let mut all = vec![];
        while let Some(b) = loader.next_batch()? {
            all.extend_from_slice(&b.images);
            loader.recycle(b);
        }
        Ok(all)
    }

    fn run(self, g: &Global) -> Result<ExitCode> {
        let source = Source::open(g, &self.source)?;
        let preprocess = source.preprocess(&self.preprocess, None)?;
        let side = preprocess.size as usize;
        let options = ModelOptions {
            classes: source.classes(),
            ..ModelOptions::default()
        };
        let rows = receptive::table(&source.model, (side, side), &options, self.every)?;
        let mut effective = vec![];
        if self.effective {
            if let Some(dir) = &self.pictures {
                std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
            }
            let batch = self.limit.min(8);
            let images = self.images(g, preprocess, batch)?;
            let backend = g.open_backend()?;
            effective = receptive::effective(
                backend.as_ref(),
                &source.model,
                source.file.as_ref(),
                &options,
                ((side, side), batch, g.seed),
                &images,
            )?;
        }
        if let Some(dir) = &self.pictures {
            for e in &effective {
                // The square root lets the field's shoulders be seen beside its centre.
                let map: Vec<f32> = e.map.iter().map(|v| v.sqrt()).collect();
                let black = image::RgbImage::new(side as u32, side as u32);
                picture::save(
                    &dir.join(format!("{}.png", e.layer)),
                    &picture::overlay(&black, &map, e.image),
                )?;
            }
        }
        if g.json {
            json(
                &json!({"model": source.model.id, "image": side, "layers": rows, "effective": effective}),
            )?;
            return Ok(ExitCode::SUCCESS);
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
        print(&format!(
            "{} at {side} px\n\n{}",
            source.model.id,
            t.to_text()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The grid of patches of a ViT's input.
fn grid(source: &Source, size: u32) -> Result<Grid> {
    let Arch::Vit(net) = &source.model.arch else {
        return Err(Error::input(format!(
            "{} has no attention over all tokens: give a ViT, DeiT or DINOv2",
            source.model.id
        )));
    };
    let n = size as usize / net.patch;
    Ok(Grid {
        rows: n,
        columns: n,
        patch: net.patch as f64,
    })
}

/// How far each head looks: the mean distance in pixels between a patch and what it attends to, by block.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright analyze attention-distance -m dinov2_small -w dinov2-small.safetensors -d folder:photos --plot distance.svg")]
struct AttentionDistance {
    #[command(flatten)]
    source: ModelArgs,
    #[command(flatten)]
    pictures: Pictures,
    /// CNNs whose theoretical receptive fields are drawn beside
    #[arg(
        long,
        value_name = "MODEL",
        value_delimiter = ',',
        default_value = "resnet50"
    )]
    beside: Vec<String>,
    /// Draw it into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl AttentionDistance {
    fn run(self, g: &Global) -> Result<ExitCode> {
        if let Some(path) = &self.plot {
            check_writable(path)?;
        }
        let source = Source::open(g, &self.source)?;
        let images = self.pictures.open(g, &source)?;
        let size = images.preprocess().size;
        let grid = grid(&source, size)?;
        let backend = g.open_backend()?;
        let batch = self.pictures.batch_size.min(images.len());
        let (mut session, layers) = session(
            backend.as_ref(),
            &source,
            (batch, size),
            false,
            attention::expose,
        )?;
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
        if let Some(path) = &self.plot {
            self.draw(path, &source, size, &got)?;
            g.remark(&format!("plot: {}", path.display()));
        }
        if g.json {
            json(
                &json!({"model": source.model.id, "data": self.pictures.data, "images": count, "image": size,
                "patch": grid.patch, "layers": got}),
            )?;
            return Ok(ExitCode::SUCCESS);
        }
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
        print(&format!(
            "mean attention distance of {} at {size} px over {count} images of {}\n\n{}",
            source.model.id,
            self.pictures.data,
            t.to_text()
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    fn draw(
        &self,
        path: &Path,
        source: &Source,
        size: u32,
        got: &[attention::Distance],
    ) -> Result<()> {
        let side = size as usize;
        let name = format!("{}, each head", source.model.id);
        let mut series = vec![LayerSeries {
            name: &name,
            family: Family::Vit,
            layers: got.iter().map(|d| d.heads.clone()).collect(),
        }];
        let mut names = vec![];
        for id in &self.beside {
            let model = tilewright::models::find(id)?;
            let rows = receptive::table(&model, (side, side), &ModelOptions::default(), false)?;
            let half = |f: &Field| match f {
                // The mean distance of a point of the field from its centre would be 0.38 of its side; half the side, cut
                // at the image, is the farthest that it reaches along an axis.
                Field::Window([v, _]) => (v.size() as f64 / 2.0).min(f64::from(size)),
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
        let title = format!("Mean attention distance of {}", source.model.id);
        let svg = over_depth(&title, "distance (pixels)", &series)?;
        write_atomic(path, svg.standalone().as_bytes())
    }
}

/// What the class token attends to, over photographs: one PNG an image with the image, the mean over heads, the rollout
/// over blocks and each head, left to right and top to bottom.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright analyze attention-map -m dinov2_small -w dinov2-small.safetensors -o maps cat.jpg dog.jpg
  tilewright analyze attention-map -w runs/vit --block 0 -o maps cat.jpg")]
struct AttentionMap {
    #[command(flatten)]
    source: ModelArgs,
    /// Which block's heads, counted from 0 [default: the last]
    #[arg(long, value_name = "N")]
    block: Option<usize>,
    /// Folder for the pictures
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Image files
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    preprocess: PreprocessArgs,
}

impl AttentionMap {
    fn run(self, g: &Global) -> Result<ExitCode> {
        let source = Source::open(g, &self.source)?;
        let preprocess = source.preprocess(&self.preprocess, None)?;
        let grid = grid(&source, preprocess.size)?;
        let decoded = self.images.iter().map(|path| {
            let image = decode_file(path)?;
            preprocess
                .apply(&image)
                .map_err(|e| e.context(path.display()))
        });
        let decoded = decoded.collect::<Result<Vec<_>>>()?;
        let backend = g.open_backend()?;
        let (mut session, layers) = session(
            backend.as_ref(),
            &source,
            (1, preprocess.size),
            false,
            attention::expose,
        )?;
        let block = self.block.unwrap_or(layers.len() - 1);
        if block >= layers.len() {
            return Err(Error::input(format!(
                "--block {block}: {} has blocks 0 to {}",
                source.model.id,
                layers.len() - 1
            )));
        }
        std::fs::create_dir_all(&self.output).map_err(|e| Error::writing(&self.output, e))?;
        let mut written: Vec<PathBuf> = vec![];
        for (path, pixels) in self.images.iter().zip(decoded) {
            session.forward(&pixels)?;
            let probs = layers.iter().map(|l| session.read(l.probs));
            let probs = probs.collect::<Result<Vec<_>>>()?;
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let mut file = self.output.join(format!("{stem}.png"));
            for n in 2.. {
                if !written.contains(&file) {
                    break;
                }
                file = self.output.join(format!("{stem}-{n}.png"));
            }
            let shown = picture::unnormalise(&pixels, &preprocess);
            picture::save(
                &file,
                &overlays(&shown, &probs, &layers[block], block, grid),
            )?;
            written.push(file);
        }
        if g.json {
            json(
                &json!({"model": source.model.id, "block": block, "heads": layers[block].heads,
                "columns": ["image", "mean of heads", "rollout", "heads"], "files": written}),
            )?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut out = String::from("image, mean over heads, rollout, then each head:\n");
        for w in &written {
            out += &format!("  {}\n", w.display());
        }
        print(&out)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn overlays(
    shown: &image::RgbImage,
    probs: &[Vec<f32>],
    layer: &Layer,
    block: usize,
    grid: Grid,
) -> image::RgbImage {
    let patches = grid.rows * grid.columns;
    let heads = attention::of_class_token(&probs[block], layer.tokens, patches);
    let mut mean = vec![0.0; patches];
    for h in &heads {
        mean.iter_mut()
            .zip(h)
            .for_each(|(m, v)| *m += v / heads.len() as f32);
    }
    let all: Vec<&[f32]> = probs.iter().map(Vec::as_slice).collect();
    let rollout = attention::rollout(&all, layer.tokens, patches);
    let size = (grid.rows, grid.columns);
    let mut pictures = vec![shown.clone()];
    for map in [&mean, &rollout].into_iter().chain(&heads) {
        pictures.push(picture::overlay(shown, map, size));
    }
    picture::sheet(&pictures, 5)
}

/// Similarity of the representations of every two layers: linear centred kernel alignment, by minibatches with the
/// unbiased estimator, of a network with itself or with another one.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright analyze cka -m resnet18 -w resnet18.safetensors -d cifar10 --plot cka.svg
  tilewright analyze cka -w runs/cnn --with-weights runs/vit -d digits --limit 512 --batch-size 64 --plot cka.svg")]
struct CkaArgs {
    #[command(flatten)]
    source: ModelArgs,
    /// The second model [default: what --with-weights names, or the same as the first]
    #[arg(long, value_name = "MODEL")]
    with_model: Option<String>,
    /// The second model's weights
    #[arg(long, value_name = "FILE")]
    with_weights: Option<String>,
    #[command(flatten)]
    pictures: Pictures,
    /// Draw the matrix into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// By batch and by layer, `[batch, batch]`.
type Grams = Vec<Vec<Vec<f64>>>;

/// The names of a network's taps, and their Gram matrices.
fn grams(
    backend: &dyn Backend,
    source: &Source,
    images: Arc<Images>,
    batch: usize,
) -> Result<(Vec<String>, Grams)> {
    let size = images.preprocess().size;
    let (mut session, ()) = session(backend, source, (batch, size), true, |_| Ok(()))?;
    let taps = session.taps();
    let mut all = vec![];
    for_batches(&mut session, images, &source.model.id, batch, |s, _| {
        let one = |i: usize| Ok(gram(&s.tap(i)?, batch));
        all.push((0..taps.len()).map(one).collect::<Result<Vec<_>>>()?);
        Ok(())
    })?;
    Ok((taps.into_iter().map(|t| t.0).collect(), all))
}

impl CkaArgs {
    fn run(self, g: &Global) -> Result<ExitCode> {
        if let Some(path) = &self.plot {
            check_writable(path)?;
        }
        let batch = self.pictures.batch_size;
        if batch < cka::LEAST || self.pictures.limit < batch {
            return Err(Error::input(format!(
                "CKA wants batches of at least {} images and at least one whole batch: --batch-size {batch}, --limit {}",
                cka::LEAST,
                self.pictures.limit
            )));
        }
        let first = Source::open(g, &self.source)?;
        let images = self.pictures.open(g, &first)?;
        if images.len() < batch {
            return Err(Error::input(format!(
                "{} has {} images, fewer than --batch-size {batch}",
                self.pictures.data,
                images.len()
            )));
        }
        let backend = g.open_backend()?;
        let used = images.len() / batch * batch;
        // Gram matrices are small: both networks need not be in memory at once.
        let (rows, left) = grams(backend.as_ref(), &first, images, batch)?;
        let mut name = first.model.id.clone();
        let (columns, right) = match (&self.with_model, &self.with_weights) {
            (None, None) => (rows.clone(), left.clone()),
            (model, weights) => {
                let args = self.source.other(model.clone(), weights.clone());
                let second = Source::open(g, &args)?;
                name = second.model.id.clone();
                let images = self.pictures.open(g, &second)?;
                grams(backend.as_ref(), &second, images, batch)?
            }
        };
        let mut sums = Cka::new(rows.len(), columns.len());
        for (l, r) in left.iter().zip(&right) {
            sums.add(l, r, batch);
        }
        let matrix = sums.matrix();
        if let Some(path) = &self.plot {
            let title = format!("CKA of {} and {name}", first.model.id);
            let svg = heat_map(&title, (&rows, &columns), (&first.model.id, &name), &matrix)?;
            write_atomic(path, svg.standalone().as_bytes())?;
            g.remark(&format!("plot: {}", path.display()));
        }
        let lines: Vec<&[f64]> = matrix.chunks(columns.len()).collect();
        if g.json {
            json(
                &json!({"models": [first.model.id, name], "data": self.pictures.data, "images": used,
                "batch": batch, "rows": rows, "columns": columns, "cka": lines}),
            )?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut t = Table::new(std::iter::once(String::new()).chain(columns.clone())).left(&[0]);
        for (row, line) in rows.iter().zip(&lines) {
            t.row(std::iter::once(row.clone()).chain(line.iter().map(|v| number(*v, 2))));
        }
        print(&format!(
            "linear CKA, {} (rows) and {name} (columns), {used} images of {}, batches of {batch}\n\n{}",
            first.model.id,
            self.pictures.data,
            t.to_text()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
