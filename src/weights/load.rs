//! From a weight file to a model's parameters and back: names, layouts, position tables, and one message for
//! everything that does not fit.

use super::naming::{Naming, Scheme, is_classifier, relative_position_index, window_of};
use super::{FloatFormat, SaveTensor, WeightFile, save};
use crate::graph::{Graph, Layout};
use crate::models::{Arch, Family, Model, resnet::Block, swin};
use crate::ops::tokens::{Interpolation, interpolate_pos};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Choices when weights are loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Leave the classifier as it was initialised, whatever the file has.
    pub replace_head: bool,
    /// Rows and columns of patches of the network, so that a position table of another grid can be fitted to it.
    pub grid: Option<(usize, usize)>,
}

/// Where a parameter's values come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// It stays as initialised (a replaced classifier).
    Initial,
    /// Its entries of the file.
    Entries,
    /// The file's position table of a square grid of this side, fitted to the network's grid.
    Positions(usize, (usize, usize), Interpolation),
    /// The file's relative position table of another window, of this side, fitted to the network's.
    Relative(usize),
}

/// What a file has for a network; it fits. The values themselves are read one by one, so that no second copy of all
/// weights is ever held.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How a file of this network names the parameters.
    pub names: FileNames,
    /// Where this file has them, where that is elsewhere (a network with fewer blocks than the file's).
    entries: Option<Vec<Vec<String>>>,
    /// By place in [`Graph::params`].
    sources: Vec<Source>,
}

impl Loaded {
    /// The same file for a network whose parameter `i` is number `places[i]` of this one's, and has `names`.
    pub(crate) fn remapped(&self, places: &[usize], names: FileNames) -> Loaded {
        let entries = places.iter().map(|&i| self.entries_of(i).to_vec());
        Loaded {
            names,
            entries: Some(entries.collect()),
            sources: places.iter().map(|&i| self.sources[i]).collect(),
        }
    }

    fn entries_of(&self, i: usize) -> &[String] {
        &self.entries.as_ref().unwrap_or(&self.names.entries)[i]
    }

    /// Whether parameter `i` is in the file (a replaced classifier is not).
    pub fn has(&self, i: usize) -> bool {
        self.sources[i] != Source::Initial
    }

    /// The values of parameter `i` of `graph`, in this program's layout; `None`: it stays as initialised.
    ///
    /// # Errors
    /// An entry cannot be read as float32.
    pub fn value(&self, graph: &Graph, file: &WeightFile, i: usize) -> Result<Option<Vec<f32>>> {
        let p = &graph.params[i];
        let shape = graph.shape(p.tid);
        match self.sources[i] {
            Source::Initial => Ok(None),
            Source::Entries => {
                let mut data = vec![];
                for piece in self.entries_of(i) {
                    let piece = file.read_f32(piece)?;
                    if data.is_empty() {
                        data = piece;
                    } else {
                        data.extend(piece);
                    }
                }
                Ok(Some(from_torch(data, shape, p.layout)))
            }
            Source::Positions(side, grid, mode) => {
                let table = file.read_f32(&self.entries_of(i)[0])?;
                let prefix = shape[1] - grid.0 * grid.1;
                interpolate_pos(&table, (side, side), grid, shape[2], prefix, mode).map(Some)
            }
            Source::Relative(side) => {
                let table = file.read_f32(&self.entries_of(i)[0])?;
                let across = |side: usize| (2 * side - 1, 2 * side - 1);
                let to = across(window_of(shape[0]).unwrap_or(1));
                // As the paper's code and timm's `resize_rel_pos_bias_table_simple`.
                let mode = Interpolation::Bicubic;
                interpolate_pos(&table, across(side), to, shape[1], 0, mode).map(Some)
            }
        }
    }
}

/// The names under which a model's parameters stand in a file.
#[derive(Clone, Debug)]
pub struct FileNames {
    /// The naming.
    pub scheme: Scheme,
    /// By place in [`Graph::params`]: the entries that make it up, along the first axis.
    pub entries: Vec<Vec<String>>,
    /// Floating-point entries that the network does not use, kept for saving (a mask token, a pooler).
    pub extra: Vec<(String, Vec<usize>, Vec<f32>)>,
    /// A `relative_position_index` stands beside each relative position table of a Swin.
    pub indices: bool,
}

/// `shape` in PyTorch's axis order.
pub fn torch_shape(shape: &[usize], layout: Layout) -> Vec<usize> {
    match (layout, shape) {
        (Layout::Ohwi, &[k, r, s, c]) => vec![k, c, r, s],
        _ => shape.to_vec(),
    }
}

/// Elements of `[A, B, C]` as `[A, C, B]`, in place: large weights are not held twice.
fn swap_last(data: &mut [f32], b: usize, c: usize) {
    if b <= 1 || c <= 1 {
        return;
    }
    let mut plane = vec![0.0; b * c];
    for to in data.chunks_exact_mut(b * c) {
        plane.copy_from_slice(to);
        for (j, line) in to.chunks_exact_mut(b).enumerate() {
            for (i, v) in line.iter_mut().enumerate() {
                *v = plane[i * c + j];
            }
        }
    }
}

/// From this program's layout (`shape`) to PyTorch's.
pub fn to_torch(mut data: Vec<f32>, shape: &[usize], layout: Layout) -> Vec<f32> {
    if let (Layout::Ohwi, &[_, r, s, c]) = (layout, shape) {
        swap_last(&mut data, r * s, c);
    }
    data
}

/// From PyTorch's layout to this program's (`shape`).
pub fn from_torch(mut data: Vec<f32>, shape: &[usize], layout: Layout) -> Vec<f32> {
    if let (Layout::Ohwi, &[_, r, s, c]) = (layout, shape) {
        swap_last(&mut data, c, r * s);
    }
    data
}

/// Finds the parameters of `graph` (a built `model`) in `file`; [`Loaded::value`] reads them.
///
/// # Errors
/// [`Error::Input`] with everything that does not fit in one message: another kind of network, entries missing,
/// unexpected or misshapen, a classifier of another size.
pub fn load(
    model: &Model,
    graph: &Graph,
    file: &WeightFile,
    options: &LoadOptions,
) -> Result<Loaded> {
    let at = file.path().display();
    let found = identify(file);
    let scheme = Scheme::of(file)
        .filter(|s| s.naming.family() == model.family())
        .filter(|s| s.naming.is_swin() == matches!(model.arch, Arch::Swin(_)))
        .ok_or_else(|| {
            let what = match &found {
                Some(f) => format!("it looks like {f}"),
                None => format!(
                    "its {} entries are named like no network known here (the first is {:?})",
                    file.entries().len(),
                    file.entries().first().map_or("", |e| &e.name)
                ),
            };
            Error::input(format!("{at} does not hold {}: {what}", model.id))
        })?;
    let mut misfits = Misfits::default();
    let mut used: HashSet<String> = HashSet::new();
    let mut sources = vec![];
    let mut entries = vec![];
    let mut has_head = false;
    for p in &graph.params {
        let shape = graph.shape(p.tid);
        let path = p.name.rsplit_once('.').map_or("", |(path, _)| path);
        let head = is_classifier(path);
        has_head |= head;
        let candidates = scheme.candidates(&p.name);
        let present = candidates
            .iter()
            .find(|pieces| pieces.iter().all(|n| file.has(n)));
        let pieces = present.unwrap_or(&candidates[0]).clone();
        used.extend(pieces.iter().cloned());
        let mut source = Source::Initial;
        if head && options.replace_head {
            // Stays as initialised.
        } else if present.is_none() {
            if head && scheme.classifier(file).is_none() {
                misfits.headless = true;
            }
            misfits
                .missing
                .extend(pieces.iter().filter(|n| !file.has(n)).cloned());
        } else {
            let fitted = fit_positions(file, &scheme, &p.name, shape, options.grid)
                .or_else(|| fit_relative(file, &pieces[0], shape));
            source = match fitted {
                Some(fitted) => fitted,
                None => {
                    let wanted = torch_shape(shape, p.layout);
                    misfits.check_shapes(file, &wanted, &pieces, head);
                    Source::Entries
                }
            };
        }
        sources.push(source);
        entries.push(pieces);
    }
    let headless = !has_head || options.replace_head;
    let mut extra = vec![];
    let mut indices = false;
    for e in file.entries().iter().filter(|e| !used.contains(&e.name)) {
        if e.name.ends_with(".relative_position_index") && scheme.naming.is_swin() {
            indices = true;
            check_index(file, e, &mut misfits)?;
        } else if !scheme.may_skip(&e.name, headless) {
            misfits.unexpected.push(e.name.clone());
        } else if e.is_float() && !scheme.is_classifier_entry(&e.name) {
            extra.push((e.name.clone(), e.shape.clone(), file.read_f32(&e.name)?));
        }
    }
    misfits.report(model, file, &scheme, found.as_deref(), graph.params.len())?;
    Ok(Loaded {
        sources,
        entries: None,
        names: FileNames {
            scheme,
            entries,
            extra,
            indices,
        },
    })
}

/// The relative position table's source, where the file's is of another window.
fn fit_relative(file: &WeightFile, entry: &str, shape: &[usize]) -> Option<Source> {
    let name = entry.ends_with(".relative_position_bias_table");
    let &[entries, heads] = file.get(entry)?.shape.as_slice() else {
        return None;
    };
    if !name || heads != shape[1] || entries == shape[0] {
        return None;
    }
    window_of(entries).map(Source::Relative)
}

/// Holds a file's `relative_position_index` against the one of the window of the table beside it.
fn check_index(file: &WeightFile, e: &super::Entry, misfits: &mut Misfits) -> Result<()> {
    let table = e.name.replace("position_index", "position_bias_table");
    let side = file
        .get(&table)
        .and_then(|t| window_of(*t.shape.first()?))
        .filter(|side| e.numel() == side.pow(4) && e.is_integer());
    match side {
        Some(side) if file.read_i64(&e.name)? == relative_position_index(side) => {}
        _ => misfits.misshapen.push(format!(
            "{} does not hold the relative positions of the window that {table} is for",
            e.name
        )),
    }
    Ok(())
}

/// The position table's source, where the file's is of another grid and can be fitted to the network's.
fn fit_positions(
    file: &WeightFile,
    scheme: &Scheme,
    name: &str,
    shape: &[usize],
    grid: Option<(usize, usize)>,
) -> Option<Source> {
    let (entry, grid) = (scheme.entry(file, "pos_embed")?, grid?);
    let &[1, tokens, dim] = entry.shape.as_slice() else {
        return None;
    };
    if name != "pos_embed" || shape[2] != dim {
        return None;
    }
    let prefix = shape[1].saturating_sub(grid.0 * grid.1);
    let side = tokens.saturating_sub(prefix).isqrt();
    if side == 0 || side * side + prefix != tokens {
        return None;
    }
    let mode = match scheme.naming {
        Naming::Timm => Interpolation::BicubicAntialias,
        _ => Interpolation::Bicubic,
    };
    ((side, side) != grid).then_some(Source::Positions(side, grid, mode))
}

#[derive(Default)]
struct Misfits {
    missing: Vec<String>,
    unexpected: Vec<String>,
    misshapen: Vec<String>,
    /// (the file's, the network's).
    classes: Option<(usize, usize)>,
    /// The network has a classifier and the file has none.
    headless: bool,
}

impl Misfits {
    fn check_shapes(&mut self, file: &WeightFile, wanted: &[usize], pieces: &[String], head: bool) {
        let mut each = wanted.to_vec();
        each[0] /= pieces.len();
        for e in pieces.iter().filter_map(|p| file.get(p)) {
            if !e.is_float() {
                let kind = format!("{} is of type {}, a float is wanted", e.name, e.dtype);
                self.misshapen.push(kind);
            } else if e.shape != each {
                let sizes = format!("{} is {:?}, {each:?} is wanted", e.name, e.shape);
                self.misshapen.push(sizes);
                if head && e.shape.get(1..) == Some(&each[1..]) {
                    self.classes = Some((e.shape[0], each[0]));
                }
            }
        }
    }

    fn report(
        mut self,
        model: &Model,
        file: &WeightFile,
        scheme: &Scheme,
        found: Option<&str>,
        params: usize,
    ) -> Result<()> {
        let count = self.missing.len() + self.unexpected.len() + self.misshapen.len();
        if count == 0 {
            return Ok(());
        }
        let at = file.path().display();
        if let Some((theirs, ours)) = self.classes.filter(|_| self.misshapen.len() == count) {
            return Err(Error::input(format!(
                "{at} has {theirs} classes, {ours} are asked for ({}); give --classes {theirs}, or --replace-head to \
                 start with a new classifier",
                self.misshapen.join("; ")
            )));
        }
        if self.headless && self.missing.len() == count && count <= 2 {
            return Err(Error::input(format!(
                "{at} has no classifier ({} missing); give --classes 0 for its features, or --replace-head to start \
                 with a new classifier",
                self.missing.join(", ")
            )));
        }
        // Of a wholly different network the first few names say as much as all.
        let most = if count > params / 4 { 12 } else { usize::MAX };
        let mut parts = vec![];
        for (what, names, joint) in [
            ("missing", &mut self.missing, ", "),
            ("unexpected", &mut self.unexpected, ", "),
            ("misshapen", &mut self.misshapen, "; "),
        ] {
            if names.is_empty() {
                continue;
            }
            let more = names.len().saturating_sub(most);
            names.truncate(most);
            let and = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            parts.push(format!("{what}: {}{and}", names.join(joint)));
        }
        let looks = found.map_or(String::new(), |f| format!("; it looks like {f}"));
        Err(Error::input(format!(
            "{at} ({} names{looks}) does not fit {}\n{}",
            scheme.naming.library(),
            model.id,
            parts.join(" | ")
        )))
    }
}

impl FileNames {
    /// The plain names of `naming` for the parameters of `graph`.
    pub fn plain(graph: &Graph, naming: Naming) -> Self {
        let is_head = |name: &str| name.rsplit_once('.').is_some_and(|(p, _)| is_classifier(p));
        let with_head = graph.params.iter().any(|p| is_head(&p.name));
        let mut scheme = Scheme::plain(naming, with_head);
        let distilled = graph.params.iter().any(|p| p.name == "prefix_tokens");
        if distilled {
            scheme.of_distilled();
        }
        let entries = graph
            .params
            .iter()
            .map(|p| {
                let mut ways = scheme.candidates(&p.name);
                // Hugging Face calls DeiT's first classifier otherwise than a ViT's only one.
                let own = |way: &Vec<String>| distilled && way[0].starts_with("cls_classifier.");
                let at = ways.iter().position(own).unwrap_or(0);
                ways.swap_remove(at)
            })
            .collect();
        let mut extra = vec![];
        if naming == Naming::HfDinov2
            && let Some(p) = graph.params.iter().find(|p| p.name == "cls_token")
        {
            // The backbone of the library has a mask token, which only pre-training reads.
            let dim = graph.spec(p.tid).channels();
            let name = scheme.candidates("cls_token")[0][0].replace("cls_token", "mask_token");
            extra.push((name, vec![1, dim], vec![0.0; dim]));
        }
        FileNames {
            scheme,
            entries,
            extra,
            indices: naming.keeps_index(),
        }
    }

    /// Parameter (or gradient) `i` as the file's entries: names, PyTorch's shapes and element order.
    pub fn tensors(&self, graph: &Graph, i: usize, values: Vec<f32>) -> Vec<SaveTensor<'static>> {
        let p = &graph.params[i];
        let shape = graph.shape(p.tid);
        let mut wanted = torch_shape(shape, p.layout);
        let data = to_torch(values, shape, p.layout);
        let pieces = &self.entries[i];
        wanted[0] /= pieces.len();
        let each = data.len() / pieces.len();
        pieces
            .iter()
            .zip(data.chunks(each.max(1)))
            .map(|(name, d)| SaveTensor::f32(name.clone(), &wanted, d.to_vec()))
            .collect()
    }

    /// A whole state dict: `values` by place in [`Graph::params`], the counters of batch norm (after `steps` steps) and
    /// the extra entries, so that PyTorch's `load_state_dict(strict=True)` takes it.
    pub fn export(
        &self,
        graph: &Graph,
        values: Vec<Vec<f32>>,
        steps: i64,
    ) -> Vec<SaveTensor<'static>> {
        let mut out = vec![];
        for (i, v) in values.into_iter().enumerate() {
            out.extend(self.tensors(graph, i, v));
            out.extend(self.index(graph, i));
            if let Some(norm) = self.entries[i][0].strip_suffix("running_var") {
                out.push(SaveTensor::i64(
                    format!("{norm}num_batches_tracked"),
                    &[],
                    vec![steps],
                ));
            }
        }
        for (name, shape, data) in &self.extra {
            out.push(SaveTensor::f32(name.clone(), shape, data.clone()));
        }
        out
    }

    /// The `relative_position_index` beside the relative position table `i`, where the file has such.
    fn index(&self, graph: &Graph, i: usize) -> Option<SaveTensor<'static>> {
        let before = self.entries[i][0].strip_suffix("bias_table");
        let side = window_of(graph.shape(graph.params[i].tid)[0]);
        let (before, side) = before.filter(|_| self.indices).zip(side)?;
        let tokens = side * side;
        let shape = match self.scheme.naming {
            Naming::TorchvisionSwin => vec![tokens * tokens],
            _ => vec![tokens, tokens],
        };
        let index = relative_position_index(side);
        Some(SaveTensor::i64(format!("{before}index"), &shape, index))
    }

    /// Writes [`export`](Self::export) to `path`, whole or not at all.
    ///
    /// # Errors
    /// As [`save()`].
    pub fn save(
        &self,
        path: &Path,
        graph: &Graph,
        values: Vec<Vec<f32>>,
        steps: i64,
        metadata: &BTreeMap<String, String>,
        floats: FloatFormat,
    ) -> Result<()> {
        save(path, &self.export(graph, values, steps), metadata, floats)
    }
}

impl Model {
    /// The naming that a file of this model gets when none is asked for.
    pub fn naming(&self) -> Naming {
        match &self.arch {
            Arch::ResNet(_) | Arch::CifarResNet(_) => Naming::TorchvisionResnet,
            Arch::CnnWhiten(_) => Naming::Own,
            Arch::Vit(v) if v.start == crate::models::vit::Start::Torch => Naming::Torch,
            Arch::Vit(_) => Naming::Timm,
            Arch::Swin(_) => Naming::TimmSwin,
        }
    }
}

/// Classes of the classifier in `file`; 0 where a known network has none; `None` where the naming is unknown.
pub fn classes_of(file: &WeightFile) -> Option<usize> {
    let scheme = Scheme::of(file)?;
    Some(match scheme.classifier(file) {
        Some(e) => *e.shape.first()?,
        None => 0,
    })
}

/// The id of the network that a file seems to hold, where it is one of the known ones.
pub fn model_of(file: &WeightFile) -> Option<Model> {
    let looks = identify(file)?;
    let name = looks.split(' ').next()?;
    let scheme = Scheme::of(file)?;
    let size = match scheme.naming {
        n if n.is_swin() => match name.strip_suffix("window12") {
            Some(_) => "_384".to_string(),
            None => "_224".to_string(),
        },
        Naming::HfDinov2 | Naming::Torch => String::new(),
        _ if scheme.naming.family() == Family::Vit => {
            let tokens = scheme.entry(file, "pos_embed")?.shape.get(1)?;
            let patch: usize = name.rsplit("patch").next()?.parse().ok()?;
            format!("_{}", tokens.isqrt() * patch)
        }
        _ => String::new(),
    };
    let classes = classes_of(file).filter(|&c| c > 0);
    let found = crate::models::find(&format!("{name}{size}")).ok()?;
    let linear = format!("{}_imagenet1k_1_layer", found.id);
    match (scheme.reads_cls_mean(file), classes) {
        (true, Some(_)) => crate::models::find(&linear).ok(),
        _ => Some(found),
    }
}

/// What network a file seems to hold, for people: `vit_base_patch16 of timm (12 blocks of width 768, 1000 classes)`.
pub fn identify(file: &WeightFile) -> Option<String> {
    let scheme = Scheme::of(file)?;
    let library = scheme.naming.library();
    let classes = match scheme.classifier(file) {
        Some(e) => format!("{} classes", e.shape.first()?),
        None => "no classifier".into(),
    };
    if scheme.naming.is_swin() {
        return identify_swin(file, &scheme, &classes);
    }
    if scheme.naming.family() == Family::Vit {
        let &[dim, _, patch, _] = scheme
            .entry(file, "patch_embed.proj.weight")?
            .shape
            .as_slice()
        else {
            return Some(format!("a ViT of {library}"));
        };
        let depth = scheme.count(file, |i| format!("blocks.{i}.attn.qkv.weight"));
        let known = crate::models::vit::SIZES
            .iter()
            .find(|s| (s.1, s.2) == (dim, depth));
        let name = match known {
            Some((size, ..)) if scheme.naming == Naming::HfDinov2 => format!("dinov2_{size}"),
            Some((size, ..)) if scheme.distilled(file) => {
                format!("deit_{size}_distilled_patch{patch}")
            }
            Some((size, ..)) => format!("vit_{size}_patch{patch}"),
            None => format!("a ViT of patch {patch}"),
        };
        return Some(format!(
            "{name} of {library} ({depth} blocks of width {dim}, {classes})"
        ));
    }
    if scheme.naming == Naming::Own {
        return Some(format!("cnn_whiten ({classes})"));
    }
    let stages = (1..=4).map(|s| scheme.count(file, |i| format!("layer{s}.{i}.conv1.weight")));
    let stages: Vec<usize> = stages.filter(|&n| n > 0).collect();
    let third = scheme.entry(file, "layer1.0.conv3.weight").is_some();
    let block = if third {
        Block::Bottleneck
    } else {
        Block::Basic
    };
    let fits = |m: &Model| match &m.arch {
        Arch::ResNet(r) => r.block == block && r.depths[..] == stages[..],
        Arch::CifarResNet(r) => {
            let projects = scheme.entry(file, "layer2.0.shortcut.0.weight").is_some();
            let b = r.shortcut == crate::models::cifar_resnet::Shortcut::Project;
            stages == [r.blocks; 3] && projects == b
        }
        _ => false,
    };
    let name = match crate::models::list().into_iter().find(fits) {
        Some(m) => m.id,
        None => "a ResNet".into(),
    };
    Some(format!(
        "{name} of {library} (stages of {stages:?} blocks, {classes})"
    ))
}

/// [`identify`] for a Swin transformer.
fn identify_swin(file: &WeightFile, scheme: &Scheme, classes: &str) -> Option<String> {
    let block = |s: usize, b: usize| format!("layers.{s}.blocks.{b}");
    let stage = |s| scheme.count(file, |b| format!("{}.norm1.weight", block(s, b)));
    let depths: [usize; 4] = std::array::from_fn(stage);
    let dim = *scheme
        .entry(file, "patch_embed.proj.weight")?
        .shape
        .first()?;
    let table = format!("{}.attn.relative_position_bias_table", block(0, 0));
    let window = window_of(*scheme.entry(file, &table)?.shape.first()?)?;
    let known = swin::SIZES
        .iter()
        .find(|s| (s.1.dim, s.1.depths) == (dim, depths));
    let name = match known {
        Some((size, _)) => format!("swin_{size}_patch4_window{window}"),
        None => format!("a Swin transformer with windows of {window}"),
    };
    let library = scheme.naming.library();
    Some(format!(
        "{name} of {library} (stages of {depths:?} blocks, {classes})"
    ))
}

#[cfg(test)]
#[path = "load_tests.rs"]
pub(super) mod tests;
