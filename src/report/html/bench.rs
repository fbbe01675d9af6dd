//! Pages of measurements: tables and plots under headings.

use super::page::{Page, escape, facts, figure, table_html};
use crate::report::plot::Svg;
use crate::report::table::Table;
use std::fmt::Write;

/// One section of a [`BenchPage`].
#[derive(Clone, Debug)]
pub struct BenchSection {
    /// Its heading.
    pub heading: String,
    /// A plot with its caption.
    pub figure: Option<(Svg, String)>,
    /// A table.
    pub table: Option<Table>,
}

/// A page of measurements.
#[derive(Clone, Debug)]
pub struct BenchPage {
    /// Title.
    pub title: String,
    /// Name and value: device, commit.
    pub facts: Vec<(&'static str, String)>,
    /// Sections in order.
    pub sections: Vec<BenchSection>,
    /// The command that made it.
    pub command: String,
}

impl BenchPage {
    /// One self-contained page.
    pub fn to_html(&self) -> String {
        let mut lead = facts(&self.facts);
        if !self.command.is_empty() {
            let _ = writeln!(lead, "<p><code>{}</code></p>", escape(&self.command));
        }
        let mut page = Page::new(&self.title, lead);
        for s in &self.sections {
            page.section(&s.heading, "");
            if let Some((svg, caption)) = &s.figure {
                page.more(figure(svg, caption));
            }
            if let Some(table) = &s.table {
                page.more(table_html(table));
            }
        }
        page.finish()
    }
}
