//! A model with weights on a backend.

use super::init::initial_of;
use super::{Heads, Model, ModelOptions, Net};
use crate::Result;
use crate::backend::{Backend, CompileOptions, Exec};
use crate::graph::fuse::{Purpose, fuse};
use crate::graph::{Graph, Mode, Phase, Tid};
use crate::weights::load::classes_of;
use crate::weights::{FileNames, LoadOptions, Loaded, Scheme, WeightFile, load};
use std::sync::Arc;

/// How a session is made.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Images in a run.
    pub batch: usize,
    /// Height and width.
    pub image: (usize, usize),
    /// The model's options. Classes not given are the file's, where there is one.
    pub model: ModelOptions,
    /// Keep the taps, to be read after each run.
    pub taps: bool,
    /// Leave the classifier as initialised, whatever the file has.
    pub replace_head: bool,
    /// Seed of what is initialised.
    pub seed: u64,
    /// The weights stay as they are (see [`CompileOptions::constant_params`]): faster, and without a second copy.
    pub constant_params: bool,
}

impl SessionOptions {
    /// For `batch` images of `image` (height, width) pixels.
    pub fn new(batch: usize, image: (usize, usize)) -> Self {
        SessionOptions {
            batch,
            image,
            model: ModelOptions::default(),
            taps: false,
            replace_head: false,
            seed: 0,
            constant_params: true,
        }
    }
}

/// `options` completed by what the file says: its number of classes where none is asked for, and its library's epsilon.
pub fn options_for(
    options: &ModelOptions,
    file: Option<&WeightFile>,
    replace_head: bool,
) -> ModelOptions {
    let mut o = options.clone();
    let Some(file) = file else { return o };
    if o.classes.is_none() && !replace_head {
        o.classes = classes_of(file);
    }
    if let Some(scheme) = Scheme::of(file) {
        o.norm_eps = o.norm_eps.or(scheme.naming.norm_eps());
        o.cls_mean |= !replace_head && scheme.reads_cls_mean(file);
    }
    o
}

/// Writes every parameter of the compiled `exec`: from the file where it has it, else initialised from `seed`.
///
/// # Errors
/// The file cannot be read as float32, or the device is lost.
pub fn write_parameters(
    exec: &mut dyn Exec,
    weights: Option<(&Loaded, &WeightFile)>,
    seed: u64,
) -> Result<()> {
    for i in 0..exec.graph().params.len() {
        let graph = exec.graph();
        let from_file = match weights {
            Some((loaded, file)) => loaded.value(graph, file, i)?,
            None => None,
        };
        let value = from_file.unwrap_or_else(|| initial_of(graph, i, seed));
        let tid = graph.params[i].tid;
        exec.write(tid, &value)?;
    }
    Ok(())
}

/// Gives the system what reading the weights left free on the heap, as much as the largest layer or more: glibc would
/// keep it beside the network.
fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches nothing but what is free already.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Finds the weights of a built net in `file`.
///
/// # Errors
/// As [`load()`].
pub fn load_net(model: &Model, net: &Net, file: &WeightFile, replace_head: bool) -> Result<Loaded> {
    let options = LoadOptions {
        replace_head,
        grid: net.grid,
    };
    load(model, &net.graph, file, &options)
}

/// A model ready for inference, compiled once for one batch size.
pub struct Session {
    exec: Box<dyn Exec>,
    input: Tid,
    heads: Heads,
    names: FileNames,
}

impl Session {
    /// Builds `model`, compiles it for inference on `backend` and gives it the weights of `file` (initialised from the
    /// seed where there is none).
    ///
    /// # Errors
    /// The image does not suit the model, the file does not fit it, or the backend cannot run it.
    pub fn open(
        backend: &dyn Backend,
        model: &Model,
        file: Option<&WeightFile>,
        options: &SessionOptions,
    ) -> Result<Session> {
        let (session, ()) = Self::open_with(backend, model, file, options, |_| Ok(()))?;
        Ok(session)
    }

    /// [`open`](Self::open) with a change to the network before it is fused and compiled, such as more results to keep;
    /// also gives what the change returns.
    ///
    /// # Errors
    /// As [`open`](Self::open), or the change fails.
    pub fn open_with<T>(
        backend: &dyn Backend,
        model: &Model,
        file: Option<&WeightFile>,
        options: &SessionOptions,
        change: impl FnOnce(&mut Net) -> Result<T>,
    ) -> Result<(Session, T)> {
        let chosen = options_for(&options.model, file, options.replace_head);
        let mut net = model.net(options.batch, options.image, Mode::default(), &chosen)?;
        let loaded = file
            .map(|f| load_net(model, &net, f, options.replace_head))
            .transpose()?;
        let names = match &loaded {
            Some(l) => l.names.clone(),
            None => FileNames::plain(&net.graph, model.naming()),
        };
        net.graph.keep(net.heads.output());
        net.graph.keep(net.heads.features);
        if options.taps {
            for i in 0..net.graph.taps.len() {
                net.graph.keep(net.graph.taps[i].tid);
            }
        }
        let changed = change(&mut net)?;
        fuse(&mut net.graph, Purpose::Inference)?;
        let compile = CompileOptions {
            constant_params: options.constant_params,
            ..CompileOptions::default()
        };
        let mut exec = backend.compile(Arc::new(net.graph), &compile)?;
        write_parameters(exec.as_mut(), loaded.as_ref().zip(file), options.seed)?;
        trim_heap();
        exec.run(&[Phase::Prepare])?;
        let session = Session {
            exec,
            input: net.input,
            heads: net.heads,
            names,
        };
        Ok((session, changed))
    }

    /// The compiled graph.
    pub fn graph(&self) -> &Graph {
        self.exec.graph()
    }

    /// The compiled network, for timing and profiling.
    pub fn exec(&mut self) -> &mut dyn Exec {
        self.exec.as_mut()
    }

    /// The compiled network with its input and output, for callers that run it themselves.
    pub fn into_parts(self) -> (Box<dyn Exec>, Tid, Tid) {
        let output = self.heads.output();
        (self.exec, self.input, output)
    }

    /// How the weights' file names the parameters.
    pub fn names(&self) -> &FileNames {
        &self.names
    }

    /// Images in a run.
    pub fn batch(&self) -> usize {
        self.graph().shape(self.input)[0]
    }

    /// Classes, or the width of the features of a backbone.
    pub fn outputs(&self) -> usize {
        self.graph().spec(self.heads.output()).channels()
    }

    /// Whether the output is logits (not features).
    pub fn classifies(&self) -> bool {
        self.heads.logits.is_some()
    }

    /// The logits, or the features where there is no classifier.
    pub fn output(&self) -> Tid {
        self.heads.output()
    }

    /// Runs a batch `[N, H, W, 3]` of normalised pixels; `[N, outputs]`.
    ///
    /// # Errors
    /// The number of elements differs from the batch's, or the device is lost.
    pub fn run(&mut self, images: &[f32]) -> Result<Vec<f32>> {
        self.forward(images)?;
        self.exec.read(self.heads.output())
    }

    /// [`run`](Self::run) without reading the output.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn forward(&mut self, images: &[f32]) -> Result<()> {
        self.exec.write(self.input, images)?;
        self.exec.run(&[Phase::Forward])
    }

    /// A tensor that was kept, as the last run left it.
    ///
    /// # Errors
    /// It was not kept, or the device is lost.
    pub fn read(&mut self, tid: Tid) -> Result<Vec<f32>> {
        self.exec.read(tid)
    }

    /// What the classifier read in the last run, `[N, dim]`.
    ///
    /// # Errors
    /// The device is lost.
    pub fn features(&mut self) -> Result<Vec<f32>> {
        self.exec.read(self.heads.features)
    }

    /// Names and shapes (this program's axis order) of the taps; kept where the options say so.
    pub fn taps(&self) -> Vec<(String, Vec<usize>)> {
        let g = self.graph();
        let tap = |t: &crate::graph::Tap| (t.name.clone(), g.shape(t.tid).to_vec());
        g.taps.iter().map(tap).collect()
    }

    /// Tap `i` of the last run.
    ///
    /// # Errors
    /// The taps were not kept, or the device is lost.
    pub fn tap(&mut self, i: usize) -> Result<Vec<f32>> {
        let tid = self.exec.graph().taps[i].tid;
        self.exec.read(tid)
    }
}
