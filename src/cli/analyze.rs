//! `analyze`: one subcommand for each room of [`tilewright::analyze::rooms`]; what is common to all of them (models,
//! images, where results go) is here.

use super::global::Global;
use super::output::{json, print};
use super::source::{ModelArgs, PreprocessArgs, Source, positive};
use super::tensors::check_writable;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::analyze::{self, Analysis, Art, Context, Findings, Input, Pictures, Room, Subject};
use tilewright::data::{self, OpenOptions, Sets};
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// What a network looks at, what its layers hold, and where it errs.
pub struct Analyze {
    room: Room,
    analysis: Box<dyn Analysis>,
    common: Common,
}

/// Flags of every analysis.
#[derive(Args)]
struct Common {
    #[command(flatten)]
    source: ModelArgs,
    /// Weights of a model beside the first; may be given several times
    #[arg(long, alias = "with-weights", value_name = "FILE")]
    with: Vec<String>,
    /// Its model [default: what --with names, or the same as the first]
    #[arg(long, value_name = "MODEL")]
    with_model: Vec<String>,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    preprocess: PreprocessArgs,
    /// Folder for figures, CSV and JSON
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Write the first plot into this file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Which images, and how many.
#[derive(Args)]
struct ImageArgs {
    /// Image files
    #[arg(value_name = "IMAGE", conflicts_with = "data")]
    files: Vec<PathBuf>,
    /// digits, synthetic[:CLASSESxSIZE], cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR] or folder:DIR
    #[arg(short, long, value_name = "DATA")]
    data: Option<String>,
    /// How many images, evenly from the test set
    #[arg(long, value_name = "N", value_parser = positive)]
    limit: Option<usize>,
    /// Images in a batch
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive)]
    batch_size: usize,
}

/// The flags of `room`: those of its own below what its input needs.
fn flags(room: &Room) -> Command {
    let mut c = room.flags(Common::augment_args(Command::new(room.name)));
    let hide = |c: Command, names: &[&'static str]| {
        let each = |c: Command, n: &&'static str| c.mut_arg(*n, |a| a.hide(true));
        names.iter().fold(c, each)
    };
    c = match room.input {
        Input::Nothing => hide(c, &["files", "data", "limit", "batch_size"]),
        Input::MaybeData => hide(c, &["files", "batch_size"]),
        Input::Data => hide(c, &["files"]).mut_arg("data", |a| a.required(true)),
        Input::Images => hide(c, &["batch_size"]),
    };
    if room.pictures {
        c = c.mut_arg("output", |a| a.required(true));
    }
    if let Some(n) = room.limit {
        let help = format!("How many images, evenly from the test set [default: {n}]");
        c = c.mut_arg("limit", |a| a.help(help));
    }
    c
}

impl clap::Subcommand for Analyze {
    fn augment_subcommands(command: Command) -> Command {
        let rooms = analyze::rooms();
        command
            .subcommand_required(true)
            .arg_required_else_help(true)
            .subcommands(rooms.iter().map(flags))
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        analyze::find(name).is_ok()
    }
}

impl FromArgMatches for Analyze {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let missing = || clap::Error::new(clap::error::ErrorKind::MissingSubcommand);
        let (name, matches) = matches.subcommand().ok_or_else(missing)?;
        let room = analyze::find(name).map_err(|_| missing())?;
        Ok(Analyze {
            analysis: room.from_matches(matches)?,
            common: Common::from_arg_matches(matches)?,
            room,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Analyze {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let Analyze {
            room,
            analysis,
            common,
        } = self;
        if let Some(path) = &common.plot {
            check_writable(path)?;
        }
        let (input, batch) = (room.input, common.images.batch_size);
        if input != Input::Images && !common.images.files.is_empty() {
            return Err(Error::input(format!(
                "{} takes a data set (-d), no image files",
                room.name
            )));
        }
        let limit = common.images.limit.or(room.limit);
        let sets = common.open_data(g)?;
        if input == Input::Images && sets.is_none() && common.images.files.is_empty() {
            return Err(Error::input("give image files, or a data set: -d DATA"));
        }
        let subjects = common.subjects(g, sets.as_ref())?;
        let pictures = match sets {
            Some(sets) => Pictures::Data {
                spec: sets.spec.to_string(),
                split: limit.map_or_else(|| sets.test.clone(), |n| sets.test.spaced(n)),
            },
            None if common.images.files.is_empty() => Pictures::Nothing,
            None => Pictures::Files(common.images.files.clone()),
        };
        let backend = g.open_backend()?;
        let cx = Context {
            backend: backend.as_ref(),
            subjects: &subjects,
            pictures: &pictures,
            batch,
            seed: g.seed,
        };
        let mut found = room.run(analysis.as_ref(), &cx)?;
        if let Some(path) = &common.plot {
            write_plot(&found, room.name, path)?;
            g.remark(&format!("plot: {}", path.display()));
        }
        let written = match &common.output {
            Some(dir) => found.write(dir, room.name)?,
            None => vec![],
        };
        if g.json {
            if let Some(map) = found.data.as_object_mut()
                && !written.is_empty()
            {
                map.insert("files".into(), json!(written));
            }
            json(&found.data)?;
            return Ok(ExitCode::SUCCESS);
        }
        print(&found.to_text())?;
        written
            .iter()
            .for_each(|w| g.remark(&format!("wrote {}", w.display())));
        Ok(ExitCode::SUCCESS)
    }
}

fn write_plot(found: &Findings, name: &str, path: &Path) -> Result<()> {
    let plots = found.figures.iter().filter_map(|f| match &f.art {
        Art::Plot(svg) => Some(svg),
        Art::Picture(_) => None,
    });
    let first = plots.take(1).next().ok_or_else(|| {
        Error::input(format!(
            "{name} draws no SVG here: give a folder for its pictures with -o"
        ))
    })?;
    write_atomic(path, first.standalone().as_bytes())
}

impl Common {
    fn open_data(&self, g: &Global) -> Result<Option<Sets>> {
        let Some(spec) = &self.images.data else {
            return Ok(None);
        };
        let sets = data::open(spec, OpenOptions { seed: g.seed })?;
        sets.notes.iter().for_each(|n| g.remark(n));
        Ok(Some(sets))
    }

    /// The first model and those beside it, each under a name of its own.
    fn subjects(&self, g: &Global, sets: Option<&Sets>) -> Result<Vec<Subject>> {
        let mut all: Vec<Subject> = vec![];
        let others = self.with.len().max(self.with_model.len());
        for i in 0..=others {
            let source = match i {
                0 => Source::open(g, &self.source)?,
                _ => {
                    let nth = |of: &[String]| of.get(i - 1).cloned();
                    let args = self.source.other(nth(&self.with_model), nth(&self.with));
                    Source::open(g, &args)?
                }
            };
            let preprocess = source.preprocess(&self.preprocess, sets)?;
            let mut name = source.model.id.clone();
            let alike = all.iter().filter(|s| s.model.id == name).count();
            if alike > 0 {
                name = format!("{name} ({})", alike + 1);
            }
            let mut subject = source.subject(name, preprocess);
            // Weights of other libraries do not name their classes: the data set does, where there are as many.
            if let Some(sets) = sets {
                let names = sets.classes();
                let as_many = subject.classes.is_none_or(|n| n == names.len());
                let unnamed = subject.class_names.is_none() && as_many;
                if unnamed {
                    subject.class_names = Some(names.to_vec());
                }
            }
            all.push(subject);
        }
        Ok(all)
    }
}
