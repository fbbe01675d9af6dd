//! A page of any sections.

use super::*;
use crate::report::plot::Svg;

/// A part of a section.
#[derive(Clone, Debug)]
pub enum Block {
    /// A paragraph of plain text.
    Text(String),
    /// A table.
    Table(Table),
    /// A picture and what it shows.
    Figure(Svg, String),
    /// Pictures side by side, as many as fit, each with what it shows.
    SideBySide(Vec<(Svg, String)>),
    /// A picture in pixels and what it shows.
    Picture(image::RgbImage, String),
    /// A heading within the section.
    Heading(String),
    /// Code, or a file's text.
    Code(String),
    /// A heading with code that is folded away.
    Folded(String, String),
}

/// A self-contained page.
#[derive(Clone, Debug, Default)]
pub struct Document {
    /// Heading.
    pub title: String,
    /// What it is about, a paragraph.
    pub lead: String,
    /// What came out, a sentence or two before everything else; may be empty.
    pub answer: String,
    /// Headings and what stands below them.
    pub sections: Vec<(String, Vec<Block>)>,
}

impl Document {
    /// The page as HTML.
    ///
    /// # Errors
    /// A picture cannot be encoded.
    pub fn to_html(&self) -> Result<String> {
        let mut lead = format!("<p>{}</p>\n", escape(&self.lead));
        if !self.answer.is_empty() {
            lead += &format!("<p class=\"short\">{}</p>\n", escape(&self.answer));
        }
        let mut page = Page::new(&self.title, lead);
        for (heading, blocks) in &self.sections {
            page.section(heading, String::new());
            for block in blocks {
                page.more(match block {
                    Block::Text(text) => format!("<p class=\"soft\">{}</p>\n", escape(text)),
                    Block::Table(table) => table_html(table),
                    Block::Figure(svg, caption) => figure(svg, caption),
                    Block::SideBySide(all) => {
                        let each: String = all.iter().map(|(svg, c)| figure(svg, c)).collect();
                        format!("<div class=\"row\">\n{each}</div>\n")
                    }
                    Block::Picture(picture, caption) => pixels(picture, caption)?,
                    Block::Heading(text) => format!("<h3>{}</h3>\n", escape(text)),
                    Block::Code(text) => code(text),
                    Block::Folded(name, text) => format!(
                        "<details><summary>{}</summary>\n{}</details>\n",
                        escape(name),
                        code(text)
                    ),
                });
            }
        }
        Ok(page.finish())
    }
}
