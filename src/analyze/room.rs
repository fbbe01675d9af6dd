//! What an analysis is made of, and how flags and experiment files reach it.

use super::{Context, Findings, rooms};
use crate::models::edits;
use crate::{Error, Result};
use clap::{ArgMatches, Command, FromArgMatches};
use toml::{Table, Value};

/// An analysis with its flags read.
pub trait Analysis {
    /// Does it.
    ///
    /// # Errors
    /// The models or the images do not suit it, or a run of a network fails.
    fn run(&self, cx: &Context) -> Result<Findings>;
}

/// Which images an analysis reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Input {
    /// None: it reads the weights.
    Nothing,
    /// A data set, or none.
    MaybeData,
    /// A data set, with its labels.
    Data,
    /// Image files, or images of a data set.
    Images,
}

type Parse = fn(&ArgMatches) -> Result<Box<dyn Analysis>, clap::Error>;

/// One analysis, before its flags are read.
pub struct Room {
    /// Name of the subcommand, and `kind` in an experiment file.
    pub name: &'static str,
    /// Which images it reads.
    pub input: Input,
    /// How many, where nothing else is asked for; `None`: all.
    pub limit: Option<usize>,
    /// Whether several models are looked at together, not one after the other.
    pub together: bool,
    /// Whether pictures are what it is for, so that a folder for them must be given.
    pub pictures: bool,
    flags: fn(Command) -> Command,
    parse: Parse,
}

/// The room of the analysis whose flags are `A`.
pub(super) fn room<A>(name: &'static str, input: Input) -> Room
where
    A: clap::Args + Analysis + 'static,
{
    fn parse<A: FromArgMatches + Analysis + 'static>(
        m: &ArgMatches,
    ) -> Result<Box<dyn Analysis>, clap::Error> {
        Ok(Box::new(A::from_arg_matches(m)?))
    }
    Room {
        name,
        input,
        limit: None,
        together: false,
        pictures: input == Input::Images,
        flags: A::augment_args,
        parse: parse::<A>,
    }
}

impl Room {
    pub(super) fn limited(self, limit: usize) -> Room {
        Room {
            limit: Some(limit),
            ..self
        }
    }

    pub(super) fn together(self) -> Room {
        Room {
            together: true,
            ..self
        }
    }

    pub(super) fn pictures(self) -> Room {
        Room {
            pictures: true,
            ..self
        }
    }

    /// Adds the analysis's flags and its help to `command`.
    pub fn flags(&self, command: Command) -> Command {
        (self.flags)(command)
    }

    /// The analysis as parsed flags have it.
    ///
    /// # Errors
    /// A value does not fit.
    pub fn from_matches(&self, matches: &ArgMatches) -> Result<Box<dyn Analysis>, clap::Error> {
        (self.parse)(matches)
    }

    /// The analysis as the keys of `table` have it: each key is a flag without its dashes.
    ///
    /// # Errors
    /// [`Error::Input`]: a key is no flag of this analysis, or its value does not fit.
    pub fn from_table(&self, table: &Table) -> Result<Box<dyn Analysis>> {
        let mut words = vec![];
        for (key, value) in table {
            let flag = format!("--{}", key.replace('_', "-"));
            let plain = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
            match value {
                Value::Boolean(true) => words.push(flag),
                Value::Boolean(false) => {}
                Value::Array(all) => {
                    let all: Vec<String> = all.iter().map(plain).collect();
                    words.push(format!("{flag}={}", all.join(",")));
                }
                one => words.push(format!("{flag}={}", plain(one))),
            }
        }
        let command = self.flags(Command::new(self.name).no_binary_name(true));
        let parsed = command.try_get_matches_from(words);
        parsed.and_then(|m| (self.parse)(&m)).map_err(|e| {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default();
            Error::input(format!(
                "analysis {}: {}",
                self.name,
                first.trim_start_matches("error: ")
            ))
        })
    }

    /// Does `analysis` over the models of `cx`: over all of them together, or over one after the other.
    ///
    /// # Errors
    /// As [`Analysis::run`].
    pub fn run(&self, analysis: &dyn Analysis, cx: &Context) -> Result<Findings> {
        if self.together || cx.subjects.len() == 1 {
            return analysis.run(cx);
        }
        let each = cx.subjects.iter().map(|subject| {
            let one = Context {
                subjects: std::slice::from_ref(subject),
                ..*cx
            };
            let found = analysis.run(&one).map_err(|e| e.context(&subject.name))?;
            Ok((subject.name.as_str(), found))
        });
        Ok(Findings::joined(each.collect::<Result<Vec<_>>>()?))
    }
}

/// The analysis called `name`.
///
/// # Errors
/// [`Error::Input`] naming the nearest one and all others.
pub fn find(name: &str) -> Result<Room> {
    let mut all = rooms();
    if let Some(i) = all.iter().position(|r| r.name == name) {
        return Ok(all.swap_remove(i));
    }
    let names: Vec<&str> = all.iter().map(|r| r.name).collect();
    Err(unknown("analysis", name, &names))
}

/// The message about a `name` that is none of `known`.
pub(super) fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    let nearest = known.iter().min_by_key(|k| edits(k, name));
    Error::input(format!(
        "no {what} is called {name:?}; the nearest is {}; there are {}",
        nearest.unwrap_or(&"none"),
        known.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_file_are_flags() {
        let read = |name: &str, text: &str| find(name)?.from_table(&toml::from_str(text).unwrap());
        assert!(read("calibration", "bins = 10").is_ok());
        assert!(read("cka", "within = true").is_ok());
        let says = |r: Result<Box<dyn Analysis>>| match r {
            Err(e) => e.to_string(),
            Ok(_) => panic!("accepted"),
        };
        assert!(says(read("calibration", "binz = 10")).contains("--binz"));
        assert!(says(read("calibration", "bins = 0")).contains('0'));
        let e = says(read("calibrations", ""));
        assert!(
            e.contains("nearest is calibration") && e.contains("cka"),
            "{e}"
        );
    }
}
