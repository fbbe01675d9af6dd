//! Experiment files: what is compared, expanded into runs.

use super::analyses::Wanted;
use crate::train::TrainConfig;
use crate::{Error, Result};
use include_dir::{Dir, include_dir};
use serde::Deserialize;
use std::path::Path;
use toml::{Table, Value};

static PRESETS: Dir = include_dir!("$CARGO_MANIFEST_DIR/experiments");

/// An experiment file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Heading of the page.
    pub title: String,
    /// What is asked, in a sentence or two.
    pub question: String,
    /// Settings of every run, keys of a training configuration.
    #[serde(default)]
    pub base: Table,
    /// What is compared: settings over the base's, with `name` in tables and plots (default: the model).
    #[serde(default)]
    pub runs: Vec<Table>,
    /// Key of a training configuration and its values: every run is made with each, and with every pair of two keys'.
    #[serde(default)]
    pub matrix: Table,
    /// Every run is made with each.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// Analyses of the trained models (see [`Wanted`]).
    #[serde(default)]
    analyses: Vec<Table>,
    /// What is otherwise in the small setting.
    #[serde(default)]
    small: Small,
    /// It is the small setting.
    #[serde(skip)]
    is_small: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Small {
    #[serde(default)]
    base: Table,
    /// In place of the runs, where given.
    runs: Option<Vec<Table>>,
    /// In place of the matrix, where given.
    matrix: Option<Table>,
    seeds: Option<Vec<u64>>,
    /// In place of the analyses, where given.
    analyses: Option<Vec<Table>>,
}

fn one_seed() -> Vec<u64> {
    vec![0]
}

/// One run of an experiment.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The setting's name, the seed left out.
    pub group: String,
    /// Everything about the run.
    pub config: TrainConfig,
}

impl Planned {
    /// Its folder: the group and the seed.
    pub fn name(&self) -> String {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "._-=".contains(c) {
                c
            } else {
                '_'
            }
        };
        let group: String = self.group.chars().map(plain).collect();
        format!("{group}-seed{}", self.config.seed)
    }
}

/// Names of the built-in experiments, with their titles.
pub fn presets() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = PRESETS
        .files()
        .filter_map(|f| {
            let name = f.path().file_stem()?.to_str()?.to_string();
            let text = f.contents_utf8()?;
            Some((name, Experiment::parse(text).ok()?.title))
        })
        .collect();
    all.sort();
    all
}

impl Experiment {
    /// Reads an experiment from its file's text.
    ///
    /// # Errors
    /// It is not TOML, a key is unknown or has the wrong type.
    pub fn parse(text: &str) -> Result<Experiment> {
        toml::from_str(text).map_err(|e| Error::input(e.to_string().trim_end().to_string()))
    }

    /// The experiment in the file `name`, or the built-in one of that name.
    ///
    /// # Errors
    /// There is neither, or it is not an experiment.
    pub fn open(name: &str) -> Result<Experiment> {
        let path = Path::new(name);
        if path.is_file() {
            let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
            return Experiment::parse(&text).map_err(|e| e.context(name));
        }
        let built_in = PRESETS.get_file(format!("{name}.toml"));
        let Some(text) = built_in.and_then(|f| f.contents_utf8()) else {
            let names: Vec<String> = presets().into_iter().map(|p| p.0).collect();
            return Err(Error::input(format!(
                "{name} is neither a file nor a built-in experiment; there are {}",
                names.join(", ")
            )));
        };
        Experiment::parse(text).map_err(|e| e.context(name))
    }

    /// The small setting, as the file has it.
    pub fn made_small(mut self) -> Experiment {
        let small = std::mem::take(&mut self.small);
        self.base.extend(small.base);
        self.runs = small.runs.unwrap_or(self.runs);
        self.matrix = small.matrix.unwrap_or(self.matrix);
        self.seeds = small.seeds.unwrap_or(self.seeds);
        self.analyses = small.analyses.unwrap_or(self.analyses);
        self.title += " (small setting)";
        self.is_small = true;
        self
    }

    /// What is asked, and that it is the small setting where it is.
    pub fn lead(&self) -> String {
        let said = |key| self.base.get(key).map(|v| v.to_string().replace('"', ""));
        match (self.is_small, said("data"), said("epochs")) {
            (true, Some(data), Some(epochs)) => format!(
                "{} Here only for a first look, with small networks on {data} for {epochs} epochs.",
                self.question
            ),
            _ => self.question.clone(),
        }
    }

    /// The analyses that follow the runs.
    ///
    /// # Errors
    /// An entry is none.
    pub fn analyses(&self) -> Result<Vec<Wanted>> {
        self.analyses.iter().map(Wanted::read).collect()
    }

    /// A setting over everything the file says, `key=value` with a TOML value (or plain text). `seed` may be a list: every
    /// run is made with each.
    ///
    /// # Errors
    /// There is no `=`, or a seed is not a number.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let (key, value) = assignment.split_once('=').ok_or_else(|| {
            Error::input(format!(
                "--set {assignment}: give a key and a value, as epochs=5"
            ))
        })?;
        let (key, value) = (key.trim().to_string(), value.trim());
        let parsed = toml::from_str::<Table>(&format!("v = {value}"));
        let parsed = parsed.ok().and_then(|mut t| t.remove("v"));
        let value = parsed.unwrap_or_else(|| Value::String(value.into()));
        self.matrix.remove(&key);
        for run in &mut self.runs {
            run.remove(&key);
        }
        if key == "seed" || key == "seeds" {
            let listed = match value {
                Value::Array(all) => all,
                one => vec![one],
            };
            let number = |v: &Value| u64::try_from(v.as_integer()?).ok();
            let seeds: Option<Vec<u64>> = listed.iter().map(number).collect();
            self.seeds = seeds.filter(|s| !s.is_empty()).ok_or_else(|| {
                Error::input(format!(
                    "--set {assignment}: give a number, or several as seed=[0,1,2]"
                ))
            })?;
        } else {
            self.base.insert(key, value);
        }
        Ok(())
    }

    /// Every run, in the order in which they are made: all settings with the first seed come first.
    ///
    /// # Errors
    /// A key is unknown, a value does not fit, the matrix is not one, or two runs are the same.
    pub fn planned(&self) -> Result<Vec<Planned>> {
        let mut settings: Vec<(String, Table)> = vec![];
        let runs = match self.runs.as_slice() {
            [] => vec![Table::new()],
            many => many.to_vec(),
        };
        for mut run in runs {
            let name = match run.remove("name") {
                Some(Value::String(name)) => Some(name),
                None => None,
                Some(v) => return Err(Error::input(format!("name = {v}: a text is wanted"))),
            };
            let mut all = self.base.clone();
            all.extend(run);
            let model = all
                .get("model")
                .and_then(Value::as_str)
                .unwrap_or("cnn_r14");
            settings.push((name.unwrap_or_else(|| model.to_string()), all));
        }
        for (key, values) in &self.matrix {
            let Value::Array(values) = values else {
                return Err(Error::input(format!(
                    "matrix.{key}: a list of values is wanted"
                )));
            };
            settings = settings
                .iter()
                .flat_map(|(name, table)| {
                    values.iter().map(move |v| {
                        let mut table = table.clone();
                        table.insert(key.clone(), v.clone());
                        let shown = v.as_str().map_or_else(|| v.to_string(), str::to_string);
                        (format!("{name} {key}={shown}"), table)
                    })
                })
                .collect();
        }
        let mut planned: Vec<Planned> = vec![];
        for &seed in &self.seeds {
            for (group, table) in &settings {
                let mut table = table.clone();
                table.insert("seed".into(), Value::Integer(seed as i64));
                let text = toml::to_string(&table).map_err(|e| Error::input(e.to_string()))?;
                let config = TrainConfig::parse(&text).map_err(|e| e.context(group))?;
                let one = Planned {
                    group: group.clone(),
                    config,
                };
                if planned.iter().any(|p| p.name() == one.name()) {
                    return Err(Error::input(format!(
                        "two runs are called {}: give them names",
                        one.name()
                    )));
                }
                planned.push(one);
            }
        }
        self.analyses()?;
        if planned.is_empty() {
            return Err(Error::input(format!(
                "{}: there is no run in it",
                self.title
            )));
        }
        Ok(planned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
title = "T"
question = "Q"
seeds = [3, 4]
[base]
data = "digits"
epochs = 5
[[runs]]
model = "cnn_r14"
[[runs]]
name = "vit"
model = "vit:patch=2,dim=32,depth=2,heads=2,mlp=2"
lr = 1e-3
[matrix]
long_tail = [0.0, 0.1]
[small]
seeds = [0]
base = { epochs = 1 }
"#;

    #[test]
    fn a_matrix_is_every_combination() {
        let e = Experiment::parse(TEXT).unwrap();
        let all = e.planned().unwrap();
        assert_eq!(all.len(), 2 * 2 * 2);
        assert_eq!(all[3].name(), "vit_long_tail=0.1-seed3");
        assert_eq!((all[3].config.long_tail, all[3].config.epochs), (0.1, 5));
        let mut small = e.made_small();
        assert_eq!(small.planned().unwrap().len(), 4);
        small.set("long_tail=0.5").unwrap();
        small.set("data=cifar10:some/where").unwrap();
        let all = small.planned().unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].config.long_tail, all[0].config.epochs), (0.5, 1));
        assert_eq!(all[1].config.data, "cifar10:some/where");
        small.set("seed=[7, 9]").unwrap();
        let all = small.planned().unwrap();
        assert_eq!((all.len(), all[3].config.seed), (4, 9));
        small.set("seed=8").unwrap();
        assert_eq!(small.planned().unwrap()[1].config.seed, 8);
        for wrong in ["seed=two", "seed=[]", "seed=[1, -1]", "seed=0.5", "seed"] {
            assert!(small.set(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let says = |text: &str, word: &str| {
            let e = Experiment::parse(text)
                .and_then(|e| e.planned())
                .unwrap_err();
            assert!(e.to_string().contains(word), "{e}");
        };
        says("title = 'T'\nquestion = 'Q'\nbases = {}", "bases");
        says(
            "title = 'T'\nquestion = 'Q'\nbase = { epoch = 3 }",
            "epochs",
        );
        says(
            "title = 'T'\nquestion = 'Q'\nmatrix = { epochs = 3 }",
            "matrix.epochs",
        );
        says(
            "title = 'T'\nquestion = 'Q'\nruns = [{ lr = 1.0 }, { lr = 2.0 }]",
            "names",
        );
        let analysis =
            |entry: &str| format!("title = 'T'\nquestion = 'Q'\nanalyses = [{{ {entry} }}]");
        says(&analysis("kind = 'ckaa'"), "nearest is cka");
        says(&analysis("kind = 'cka', wihtin = true"), "--wihtin");
        says(&analysis("limit = 3"), "kind");
        assert!(
            Experiment::open("no-such")
                .unwrap_err()
                .to_string()
                .contains("three-datasets")
        );
    }

    #[test]
    fn every_preset_is_one_in_both_settings() {
        assert!(presets().len() >= 5);
        assert_eq!(presets().len(), PRESETS.files().count());
        for (name, _) in presets() {
            let e = Experiment::open(&name).unwrap();
            for p in e
                .planned()
                .unwrap()
                .iter()
                .chain(&e.made_small().planned().unwrap())
            {
                p.config
                    .check()
                    .unwrap_or_else(|e| panic!("{name}: {}: {e}", p.name()));
            }
        }
    }
}
