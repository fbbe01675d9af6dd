//! What an analysis found: tables, plots, pictures, numbers.

use super::picture;
use crate::Result;
use crate::report::html::Block;
use crate::report::plot::Svg;
use crate::report::table::Table;
use crate::report::write_atomic;
use crate::{Error, report};
use image::RgbImage;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A plot or a picture.
#[derive(Clone, Debug)]
pub enum Art {
    /// Lines and text.
    Plot(Svg),
    /// Pixels.
    Picture(RgbImage),
}

/// A plot or a picture with its name and what it shows.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Its file's name, without extension.
    pub name: String,
    /// What it shows.
    pub caption: String,
    /// The figure.
    pub art: Art,
}

/// What an analysis found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// What was looked at, on one line.
    pub heading: String,
    /// Tables, each with a heading that may be empty.
    pub tables: Vec<(String, Table)>,
    /// Plots and pictures, in order.
    pub figures: Vec<Figure>,
    /// How to read them.
    pub notes: Vec<String>,
    /// Everything, for `--json`.
    pub data: Value,
    /// More files: name and text.
    pub files: Vec<(String, String)>,
}

impl Findings {
    /// With a heading and the numbers.
    pub fn new(heading: impl Into<String>, data: Value) -> Findings {
        Findings {
            heading: heading.into(),
            data,
            ..Findings::default()
        }
    }

    /// Adds a table.
    pub fn table(mut self, heading: impl Into<String>, table: Table) -> Findings {
        self.tables.push((heading.into(), table));
        self
    }

    /// Adds a plot.
    pub fn plot(
        mut self,
        name: impl Into<String>,
        caption: impl Into<String>,
        svg: Svg,
    ) -> Findings {
        self.figures.push(Figure {
            name: name.into(),
            caption: caption.into(),
            art: Art::Plot(svg),
        });
        self
    }

    /// Adds a picture.
    pub fn picture(
        mut self,
        name: impl Into<String>,
        caption: impl Into<String>,
        picture: RgbImage,
    ) -> Findings {
        self.figures.push(Figure {
            name: name.into(),
            caption: caption.into(),
            art: Art::Picture(picture),
        });
        self
    }

    /// Adds a remark.
    pub fn note(mut self, note: impl Into<String>) -> Findings {
        self.notes.push(note.into());
        self
    }

    /// Adds rows as a CSV file.
    ///
    /// # Errors
    /// A row cannot be written.
    pub fn csv<T: serde::Serialize>(
        mut self,
        name: &str,
        rows: impl IntoIterator<Item = T>,
    ) -> Result<Findings> {
        let mut out = csv::Writer::from_writer(vec![]);
        for row in rows {
            out.serialize(row).map_err(|e| Error::run(e.to_string()))?;
        }
        let bytes = out.into_inner().map_err(|e| Error::run(e.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|e| Error::run(e.to_string()))?;
        self.files.push((format!("{name}.csv"), text));
        Ok(self)
    }

    /// The findings of several models, one after the other.
    pub fn joined(each: Vec<(&str, Findings)>) -> Findings {
        let mut all = Findings::default();
        let mut data = vec![];
        for (name, found) in each {
            let plain = plain(name);
            all.tables
                .extend(found.tables.into_iter().enumerate().map(|(i, (h, t))| {
                    let above = match (i, h.is_empty()) {
                        (0, true) => found.heading.clone(),
                        (0, false) => format!("{}: {h}", found.heading),
                        _ => h,
                    };
                    (above, t)
                }));
            all.figures
                .extend(found.figures.into_iter().map(|f| Figure {
                    name: format!("{plain}-{}", f.name),
                    caption: format!("{name}: {}", f.caption),
                    ..f
                }));
            for note in found.notes {
                if !all.notes.contains(&note) {
                    all.notes.push(note);
                }
            }
            let files = found.files.into_iter();
            all.files
                .extend(files.map(|(n, text)| (format!("{plain}-{n}"), text)));
            data.push(found.data);
        }
        all.data = json!({ "models": data });
        all
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        let mut parts = vec![];
        if !self.heading.is_empty() {
            parts.push(format!("{}\n", self.heading));
        }
        for (heading, table) in &self.tables {
            parts.push(match heading.is_empty() {
                true => table.to_text(),
                false => format!("{heading}\n{}", table.to_text()),
            });
        }
        parts.extend(self.notes.iter().map(|n| format!("{n}\n")));
        parts.join("\n")
    }

    /// For a page.
    pub fn blocks(&self) -> Vec<Block> {
        let mut blocks = vec![];
        if !self.heading.is_empty() {
            blocks.push(Block::Text(format!("{}.", capital(&self.heading))));
        }
        let figure = |f: &Figure| match &f.art {
            Art::Plot(svg) => Block::Figure(svg.clone(), f.caption.clone()),
            Art::Picture(p) => Block::Picture(p.clone(), f.caption.clone()),
        };
        blocks.extend(self.figures.iter().map(figure));
        for (heading, table) in &self.tables {
            if !heading.is_empty() {
                blocks.push(Block::Text(format!("{}.", capital(heading))));
            }
            blocks.push(Block::Table(table.clone()));
        }
        blocks.extend(self.notes.iter().cloned().map(Block::Text));
        blocks
    }

    /// Writes figures, CSV files and `NAME.json` into `dir`, which is made; returns what was written.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, dir: &Path, name: &str) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
        let mut written: Vec<PathBuf> = vec![];
        let mut free = |stem: &str, extension: &str| {
            let mut path = dir.join(format!("{stem}.{extension}"));
            for n in 2.. {
                if !written.contains(&path) {
                    break;
                }
                path = dir.join(format!("{stem}-{n}.{extension}"));
            }
            written.push(path.clone());
            path
        };
        for f in &self.figures {
            match &f.art {
                Art::Plot(svg) => {
                    write_atomic(&free(&f.name, "svg"), svg.standalone().as_bytes())?;
                }
                Art::Picture(p) => picture::save(&free(&f.name, "png"), p)?,
            }
        }
        for (file, text) in &self.files {
            let (stem, extension) = file.rsplit_once('.').unwrap_or((file, "txt"));
            write_atomic(&free(stem, extension), text.as_bytes())?;
        }
        let text =
            serde_json::to_string_pretty(&self.data).map_err(|e| Error::run(e.to_string()))?;
        report::write_atomic(&free(name, "json"), text.as_bytes())?;
        Ok(written)
    }
}

/// With its first letter in upper case.
pub(crate) fn capital(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|c| c.to_uppercase().to_string());
    first.unwrap_or_default() + letters.as_str()
}

/// A name as part of a file's name.
pub(super) fn plain(name: &str) -> String {
    let fits = |c: char| {
        if c.is_ascii_alphanumeric() || "._-=".contains(c) {
            c
        } else {
            '_'
        }
    };
    name.chars().map(fits).collect()
}
