//! Tuned variants: which kernel is fastest for an op's shapes on a device, as `tune` measured it, in a file that people
//! read and ship. Nothing is tuned behind the user's back.

use super::{Backend, CompileOptions, Exec, cuda};
use crate::bench::model::signature;
use crate::graph::{Graph, Node, Spec};
use crate::report::write_atomic;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// One measured choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// `conv2d_dgrad [8, 56, 56, 64] ...`: op, shapes of operands and results.
    pub case: String,
    /// The fastest variant.
    pub variant: String,
    /// Its median in milliseconds.
    pub ms: f64,
    /// That of the op's own rule.
    pub rule_ms: f64,
}

/// Choices of one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// `cpu`, `wgpu`, `cuda`, `cuda:sim`.
    pub backend: String,
    /// The device, as the backend tells it; in another file for another device.
    pub device: String,
    /// What products are computed in.
    pub precision: String,
    /// The choices, by case.
    #[serde(default)]
    pub choice: Vec<Choice>,
}

/// A file of choices, for any number of devices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TunedFile {
    /// By device.
    #[serde(default)]
    pub table: Vec<Table>,
}

impl TunedFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Input`] where it is not there or malformed.
    pub fn load(path: &Path) -> Result<TunedFile> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
        toml::from_str(&text).map_err(|e| {
            Error::input(format!(
                "{}: not a file of tuned variants ({}); `tilewright tune OP --output FILE` makes one",
                path.display(),
                e.message()
            ))
        })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = toml::to_string_pretty(self).map_err(|e| Error::run(e.to_string()))?;
        let head =
            "# Kernel variants measured by `tilewright tune`; `--tuned FILE` applies them.\n\n";
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
        }
        write_atomic(path, (head.to_string() + &text).as_bytes())
    }

    /// The table of a backend's device, made where it is not there.
    pub fn table_of(&mut self, backend: &dyn Backend) -> &mut Table {
        let key = key(backend);
        let same = |t: &Table| (&t.backend, &t.device, &t.precision) == (&key.0, &key.1, &key.2);
        let at = self.table.iter().position(same).unwrap_or_else(|| {
            self.table.push(Table {
                backend: key.0.clone(),
                device: key.1.clone(),
                precision: key.2.clone(),
                choice: vec![],
            });
            self.table.len() - 1
        });
        &mut self.table[at]
    }
}

fn key(backend: &dyn Backend) -> (String, String, String) {
    (
        backend.name().into(),
        backend.device(),
        backend.precision().to_string(),
    )
}

impl Table {
    /// Puts a choice in, in place of the one for its case.
    pub fn set(&mut self, choice: Choice) {
        self.choice.retain(|c| c.case != choice.case);
        self.choice.push(choice);
        self.choice.sort_by(|a, b| a.case.cmp(&b.case));
    }
}

/// The choices in force on a device.
#[derive(Clone, Debug)]
pub struct Tuned {
    table: Table,
}

/// The name under which a node's choice stands.
pub fn case_of(op: &str, x: &[Spec], y: &[Spec]) -> String {
    signature(op, x, y)
}

impl Tuned {
    /// The choice for a node, where there is one.
    pub fn variant(&self, op: &str, x: &[Spec], y: &[Spec]) -> Option<&str> {
        if self.table.choice.is_empty() {
            return None;
        }
        let case = case_of(op, x, y);
        let found = self.table.choice.iter().find(|c| c.case == case);
        found.map(|c| c.variant.as_str())
    }
}

/// A backend that compiles with tuned variants.
struct WithTuned {
    inner: Box<dyn Backend>,
    tuned: Arc<Tuned>,
    file: String,
}

/// `backend` with the choices that the file at `path` has for its device; without any, the backend as it was.
///
/// # Errors
/// As [`TunedFile::load`].
pub fn apply(backend: Box<dyn Backend>, path: &Path) -> Result<Box<dyn Backend>> {
    let mut file = TunedFile::load(path)?;
    let table = file.table_of(backend.as_ref()).clone();
    if table.choice.is_empty() {
        return Ok(backend);
    }
    Ok(Box::new(WithTuned {
        inner: backend,
        tuned: Arc::new(Tuned { table }),
        file: path.display().to_string(),
    }))
}

impl WithTuned {
    fn with(&self, options: &CompileOptions) -> CompileOptions {
        CompileOptions {
            tuned: Some(self.tuned.clone()),
            ..options.clone()
        }
    }
}

impl Backend for WithTuned {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn device(&self) -> String {
        self.inner.device()
    }

    fn precision(&self) -> cuda::Precision {
        self.inner.precision()
    }

    fn launches(
        &self,
        graph: &Graph,
        node: &Node,
        variant: Option<&str>,
    ) -> Result<Option<String>> {
        self.inner.launches(graph, node, variant)
    }

    fn take_counts(&self) -> Vec<(String, cuda::Count)> {
        self.inner.take_counts()
    }

    fn driver(&self) -> Option<&dyn cuda::Driver> {
        self.inner.driver()
    }

    fn tuned(&self) -> String {
        self.file.clone()
    }

    fn footprints(
        &self,
        graph: &Graph,
        options: &CompileOptions,
        machine: cuda::Machine,
    ) -> Result<Vec<(usize, cuda::Footprint)>> {
        self.inner.footprints(graph, &self.with(options), machine)
    }

    fn compile(&self, graph: Arc<Graph>, options: &CompileOptions) -> Result<Box<dyn Exec>> {
        self.inner.compile(graph, &self.with(options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_kept_by_device_and_applied_by_shape() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/tuned.toml");
        let cpu = || super::super::open("cpu").unwrap();
        let x = [Spec::f32([2, 3]), Spec::f32([4, 3])];
        let y = [Spec::f32([2, 4])];
        let mut file = TunedFile::default();
        let choice = |variant: &str| Choice {
            case: case_of("linear", &x, &y),
            variant: variant.into(),
            ms: 1.0,
            rule_ms: 2.0,
        };
        let table = file.table_of(cpu().as_ref());
        table.set(choice("a"));
        table.set(choice("b"));
        file.save(&path).unwrap();
        let read = TunedFile::load(&path).unwrap();
        assert_eq!(read, file);
        assert_eq!((read.table.len(), read.table[0].choice.len()), (1, 1));
        let backend = apply(cpu(), &path).unwrap();
        assert!(backend.tuned().ends_with("tuned.toml"));
        let tuned = Tuned {
            table: read.table[0].clone(),
        };
        assert_eq!(tuned.variant("linear", &x, &y), Some("b"));
        assert_eq!(tuned.variant("linear", &x, &x), None);
        let mut g = Graph::new();
        let linear = crate::ops::linear::Linear::PLAIN;
        let [x, w] = [[2, 3], [4, 3]].map(|s| g.input("x", Spec::f32(s)));
        g.push(linear, &[x, w]).unwrap();
        let refused = backend.compile(Arc::new(g), &CompileOptions::default());
        let text = refused.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(text.contains("tune again"), "{text}");
        std::fs::write(&path, "nothing = [").unwrap();
        assert!(apply(cpu(), &path).is_err());
    }
}
