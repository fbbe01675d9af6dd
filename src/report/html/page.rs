//! The frame of a page: contents, sections, tables, figures; everything escaped, and kept below 5 MB.

use super::super::plot::Svg;
use super::super::png_data_uri;
use super::super::table::{Align, Table};
use crate::Result;
use std::fmt::Write;

/// A page stays below 5 MB: what would not fit is left out, and the page says so.
pub(super) const LIMIT: usize = 4_900_000;

/// Text made safe for element content and quoted attributes.
pub fn escape(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters are not allowed in HTML.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A page under construction: sections with their place in the table of contents.
pub(super) struct Page {
    title: String,
    lead: String,
    sections: Vec<(String, String)>,
    size: usize,
}

impl Page {
    pub(super) fn new(title: &str, lead: String) -> Self {
        let size = include_str!("report.css").len() + lead.len() + 4096;
        Page {
            title: title.to_string(),
            lead,
            sections: Vec::new(),
            size,
        }
    }

    pub(super) fn section(&mut self, heading: &str, body: impl Into<String>) {
        self.sections.push((heading.to_string(), String::new()));
        self.more(body);
    }

    /// More of the last section.
    pub(super) fn more(&mut self, body: impl Into<String>) {
        let mut body = body.into();
        if self.size + body.len() > LIMIT {
            body = "<p class=\"soft\">Left out here, to keep this page below 5 MB.</p>\n".into();
        }
        self.size += body.len();
        if let Some((_, text)) = self.sections.last_mut() {
            text.push_str(&body);
        }
    }

    pub(super) fn finish(self) -> String {
        let title = escape(&self.title);
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>\n{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{}<nav aria-label=\"Contents\">\n",
            include_str!("report.css"),
            self.lead
        );
        for (i, (heading, _)) in self.sections.iter().enumerate() {
            let _ = writeln!(out, "<a href=\"#s{i}\">{}</a>", escape(heading));
        }
        out.push_str("</nav>\n");
        for (i, (heading, body)) in self.sections.iter().enumerate() {
            let _ = write!(
                out,
                "<section>\n<h2 id=\"s{i}\">{}</h2>\n{body}</section>\n",
                escape(heading)
            );
        }
        out.push_str("</body>\n</html>\n");
        out
    }
}

pub(super) fn table_html(table: &Table) -> String {
    let class = |a: &Align| {
        if *a == Align::Left {
            " class=\"l\""
        } else {
            ""
        }
    };
    let mut out = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for (heading, align) in table.columns() {
        let _ = write!(
            out,
            "<th{} scope=\"col\">{}</th>",
            class(align),
            escape(heading)
        );
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in table.rows() {
        out.push_str("<tr>");
        for (cell, (_, align)) in row.iter().zip(table.columns()) {
            let text = if *align == Align::Left {
                breakable(cell)
            } else {
                escape(cell)
            };
            let _ = write!(out, "<td{}>{text}</td>", class(align));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

/// Escaped text that may be broken after the separators of a model spec or path, which has no spaces.
pub(super) fn breakable(s: &str) -> String {
    s.split_inclusive([',', '_', '/'])
        .map(escape)
        .collect::<Vec<_>>()
        .join("<wbr>")
}

/// Name and value, one a row.
pub(super) fn facts(rows: &[(&str, String)]) -> String {
    let mut out = String::from("<div class=\"scroll\"><table>\n");
    for (name, value) in rows.iter().filter(|(_, v)| !v.is_empty()) {
        let _ = writeln!(
            out,
            "<tr><th class=\"l\" scope=\"row\">{}</th><td class=\"l\">{}</td></tr>",
            escape(name),
            escape(value)
        );
    }
    out.push_str("</table></div>\n");
    out
}

pub(super) fn figure(svg: &Svg, caption: &str) -> String {
    let caption = match caption {
        "" => String::new(),
        text => format!("<figcaption>{}</figcaption>\n", escape(text)),
    };
    format!("<figure>\n{}{caption}</figure>\n", svg.inline())
}

/// As [`figure`], of a picture in pixels.
pub(super) fn pixels(picture: &image::RgbImage, caption: &str) -> Result<String> {
    let (w, h) = picture.dimensions();
    let uri = png_data_uri(picture.as_raw(), w, h, image::ExtendedColorType::Rgb8)?;
    let caption = escape(caption);
    Ok(format!(
        "<figure>\n<img src=\"{uri}\" width=\"{w}\" height=\"{h}\" alt=\"{caption}\">\n\
         <figcaption>{caption}</figcaption>\n</figure>\n"
    ))
}

pub(super) fn code(text: &str) -> String {
    format!("<pre><code>{}</code></pre>\n", escape(text.trim_end()))
}

pub(super) fn notes(notes: &[String]) -> String {
    notes
        .iter()
        .map(|n| format!("<p>Note: {}</p>\n", escape(n)))
        .collect()
}
