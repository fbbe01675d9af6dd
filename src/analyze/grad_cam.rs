//! Grad-CAM (Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization").

use super::classify::{best, softmax};
use super::picture::{self, Cell, captioned};
use super::{Analysis, Context, Findings, Subject, layer};
use crate::backend::{Backend, CompileOptions, Exec};
use crate::graph::fuse::{Purpose, fuse};
use crate::graph::{Mode, Phase, Spec, Tid};
use crate::models::session::{load_net, options_for, write_parameters};
use crate::report::table::{Table, number};
use crate::{Error, Result};
use serde_json::json;
use std::sync::Arc;

/// What speaks for a class, over photographs: each channel of a layer weighted by the mean gradient of the class's logit
/// with respect to it, summed, negative parts cut off.
///
/// For a ViT the patches' tokens are the places; its last block's output will not do, because the classifier reads
/// nothing of it but the class token.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze grad-cam -m resnet50 -w resnet50.safetensors -o cam cat.jpg dog.jpg
  tilewright analyze grad-cam -w runs/vit --class cat,dog --layer blocks.2 -o cam photo.jpg")]
pub(super) struct Args {
    /// The layer, as `info` names stages and blocks [default: a CNN's last, the input of a ViT's last block]
    #[arg(long, value_name = "NAME")]
    layer: Option<String>,
    /// Classes, by name or number [default: the predicted one]
    #[arg(long, value_name = "CLASS", value_delimiter = ',')]
    class: Vec<String>,
}

/// A network with the gradient of its logits with respect to one layer.
struct Camera {
    exec: Box<dyn Exec>,
    input: Tid,
    logits: Tid,
    pull: Tid,
    /// The layer and its gradient.
    at: [Tid; 2],
    /// Rows, columns, tokens before the patches.
    places: (usize, usize, usize),
    classes: usize,
    layer: String,
}

impl Camera {
    fn open(backend: &dyn Backend, subject: &Subject, name: Option<&str>) -> Result<Camera> {
        let file = subject.file.as_ref();
        let options = options_for(&subject.options(None), file, false);
        let mut net = subject
            .model
            .net(1, subject.image(), Mode::default(), &options)?;
        let loaded = file
            .map(|f| load_net(&subject.model, &net, f, false))
            .transpose()?;
        let logits = net.heads.logits.ok_or_else(|| subject.no_classifier())?;
        let taps: Vec<(String, Vec<usize>)> = net
            .graph
            .taps
            .iter()
            .map(|t| (t.name.clone(), net.graph.shape(t.tid).to_vec()))
            .collect();
        let i = match name {
            Some(name) => layer::named(&taps, name)?,
            None => layer::last_with_places(&subject.model, &taps),
        };
        let (layer, shape) = taps[i].clone();
        let places = layer::places(&shape, net.grid)
            .ok_or_else(|| Error::input(format!("{layer} of {} has no places", subject.name)))?;
        for p in &mut net.graph.params {
            p.trainable = false;
        }
        net.graph.keep(logits);
        let at = net.graph.taps[i].tid;
        net.graph.keep(at);
        let pull = Spec::f32(net.graph.shape(logits).to_vec());
        let classes = pull.channels();
        let pull = net.graph.input("pull", pull);
        fuse(&mut net.graph, Purpose::Gradients)?;
        let at = net.graph.taps[i].tid;
        let grads = net.graph.backward_from(&[(logits, pull)], &[at])?;
        let grad = grads.get(&at).or(grads.get(&net.graph.root(at).0));
        let grad = *grad.ok_or_else(|| {
            Error::input(format!(
                "the logits of {} do not depend on {layer}",
                subject.name
            ))
        })?;
        net.graph.keep(grad);
        let mut exec = backend.compile(Arc::new(net.graph), &CompileOptions::default())?;
        write_parameters(exec.as_mut(), loaded.as_ref().zip(file), subject.seed)?;
        exec.run(&[Phase::Prepare])?;
        Ok(Camera {
            exec,
            input: net.input,
            logits,
            pull,
            at: [at, grad],
            places,
            classes,
            layer,
        })
    }

    /// The logits of one normalised image.
    fn look(&mut self, pixels: &[f32]) -> Result<Vec<f32>> {
        self.exec.write(self.input, pixels)?;
        self.exec.run(&[Phase::Forward])?;
        self.exec.read(self.logits)
    }

    /// The layer and its gradient of `class`'s logit, `[places, channels]` each.
    fn of_class(&mut self, pixels: &[f32], class: usize) -> Result<[Vec<f32>; 2]> {
        let mut one = vec![0.0; self.classes];
        one[class] = 1.0;
        self.exec.write(self.pull, &one)?;
        self.exec.write(self.input, pixels)?;
        self.exec.run(&[Phase::Forward, Phase::Backward])?;
        let (h, w, prefix) = self.places;
        let mut both = [vec![], vec![]];
        for (out, t) in both.iter_mut().zip(self.at) {
            let all = self.exec.read(t)?;
            let channels = all.len() / (h * w + prefix);
            *out = all[prefix * channels..].to_vec();
        }
        Ok(both)
    }
}

/// The map `[places]` of `values` and `gradients` `[places, channels]`.
pub fn cam(values: &[f32], gradients: &[f32], places: usize) -> Vec<f32> {
    let channels = values.len() / places.max(1);
    let mut weights = vec![0.0f64; channels];
    for row in gradients.chunks_exact(channels) {
        let sums = weights.iter_mut().zip(row);
        sums.for_each(|(w, &g)| *w += f64::from(g) / places as f64);
    }
    let place = |row: &[f32]| {
        let sum: f64 = row
            .iter()
            .zip(&weights)
            .map(|(&v, w)| f64::from(v) * w)
            .sum();
        sum.max(0.0) as f32
    };
    values.chunks_exact(channels).map(place).collect()
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let photos = cx.photos()?;
        let mut camera = Camera::open(cx.backend, subject, self.layer.as_deref())?;
        let wanted = self.class.iter().map(|c| subject.class(c, camera.classes));
        let wanted = wanted.collect::<Result<Vec<_>>>()?;
        let (h, w, _) = camera.places;
        let mut t =
            Table::new(["image", "class", "probability %", "peak (row, column)"]).left(&[0, 1]);
        let (mut found, mut rows) = (Findings::default(), vec![]);
        for photo in &photos {
            let pixels = subject.preprocess.apply(&photo.pixels);
            let pixels = pixels.map_err(|e| e.context(&photo.name))?;
            let p = softmax(&camera.look(&pixels)?);
            let classes = match wanted.is_empty() {
                true => vec![best(&p).0],
                false => wanted.clone(),
            };
            let shown = picture::unnormalise(&pixels, &subject.preprocess);
            let truth = photo
                .label
                .map(|l| format!("is {}", subject.class_name(l as usize)));
            let first = [truth.unwrap_or_else(|| "image".into()), String::new()];
            let mut cells = vec![Cell::new(shown.clone(), first)];
            for &class in &classes {
                let [values, gradients] = camera.of_class(&pixels, class)?;
                if gradients.iter().all(|&g| g == 0.0) {
                    return Err(Error::input(format!(
                        "no gradient reaches the places of {}: the classifier reads other tokens of it; give an earlier \
                         --layer",
                        camera.layer
                    )));
                }
                let map = cam(&values, &gradients, h * w);
                let peak = best(&map.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
                let name = subject.class_name(class);
                let percent = number(100.0 * p[class], 1);
                let place = match peak.1 > 0.0 {
                    true => format!("{}, {}", peak.0 / w, peak.0 % w),
                    false => "nothing speaks for it".into(),
                };
                t.row([photo.name.clone(), name.clone(), percent.clone(), place]);
                rows.push(json!({"image": photo.name, "class": class, "name": name, "probability": p[class],
                    "map": map.chunks(w).collect::<Vec<_>>()}));
                cells.push(Cell::new(
                    picture::overlay(&shown, &map, (h, w)),
                    [name, format!("{percent} %")],
                ));
            }
            found = found.picture(
                &photo.name,
                format!("What speaks for each class in {}.", camera.layer),
                captioned(&cells, 6),
            );
        }
        found.heading = format!(
            "Grad-CAM of {} at {} ({h} x {w})",
            subject.name, camera.layer
        );
        found.data = json!({"model": subject.name, "layer": camera.layer, "rows": h, "columns": w, "maps": rows});
        Ok(found.table("", t))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::data::Preprocess;
    use crate::models::find;
    use crate::models::session::{Session, SessionOptions};

    #[test]
    fn a_map_by_hand() {
        // Two places, two channels; mean gradients 1 and -2.
        let (values, gradients) = ([3.0, 1.0, 1.0, 4.0], [2.0, -1.0, 0.0, -3.0]);
        assert_eq!(cam(&values, &gradients, 2), [1.0, 0.0]);
    }

    fn subject(model: &str, size: u32) -> Subject {
        Subject {
            name: model.into(),
            model: find(model).unwrap(),
            file: None,
            classes: None,
            class_names: None,
            preprocess: Preprocess::new(size),
            seed: 5,
        }
    }

    fn pixels(side: usize) -> Vec<f32> {
        let value = |i: usize| (i * 7919 % 1013) as f32 / 506.0 - 1.0;
        (0..side * side * 3).map(value).collect()
    }

    /// Before global average pooling and one linear layer, Grad-CAM is CAM (Zhou et al. 2016) over the number of places: the
    /// channels weighted by the class's row of the classifier.
    #[test]
    fn it_is_cam_before_a_pooled_linear_classifier() {
        let subject = subject("resnet20", 32);
        let mut camera = Camera::open(&Cpu::new(), &subject, None).unwrap();
        let x = pixels(32);
        let [values, gradients] = camera.of_class(&x, 3).unwrap();
        let got = cam(&values, &gradients, 64);
        let net = subject
            .model
            .net(1, (32, 32), Mode::default(), &Default::default())
            .unwrap();
        let i = net
            .graph
            .params
            .iter()
            .position(|p| crate::models::head::is_head(&p.name));
        let weight = crate::models::init::initial_of(&net.graph, i.unwrap(), subject.seed);
        let row = &weight[3 * 64..4 * 64];
        for (got, place) in got.iter().zip(values.chunks_exact(64)) {
            let want: f32 = place.iter().zip(row).map(|(v, w)| v * w).sum::<f32>() / 64.0;
            assert!((got - want.max(0.0)).abs() < 1e-5, "{got} for {want}");
        }
        assert!(got.iter().any(|&v| v > 0.0));
    }

    /// The gradient of a ViT's tokens against finite differences of the logit, along the direction of the image.
    #[test]
    fn tokens_have_gradients_before_the_last_block_only() {
        let model = "vit:patch=4,dim=16,depth=2,heads=2,mlp=1,img=8";
        let subject = subject(model, 8);
        let x = pixels(8);
        let mut camera = Camera::open(&Cpu::new(), &subject, None).unwrap();
        assert_eq!(
            (camera.layer.as_str(), camera.places),
            ("blocks.0", (2, 2, 1))
        );
        let [values, gradients] = camera.of_class(&x, 1).unwrap();
        assert_eq!(values.len(), 4 * 16);
        assert!(gradients.iter().any(|&g| g != 0.0));
        let mut last = Camera::open(&Cpu::new(), &subject, Some("blocks.1")).unwrap();
        assert!(last.of_class(&x, 1).unwrap()[1].iter().all(|&g| g == 0.0));
        // Values are those of a session's tap.
        let options = SessionOptions {
            taps: true,
            seed: 5,
            ..SessionOptions::new(1, (8, 8))
        };
        let mut session = Session::open(&Cpu::new(), &subject.model, None, &options).unwrap();
        session.forward(&x).unwrap();
        let tap = session.tap(1).unwrap();
        for (a, b) in values.iter().zip(&tap[16..]) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
