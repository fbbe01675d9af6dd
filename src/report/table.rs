//! Aligned plain-text tables for the terminal and Markdown tables for files.

use std::fmt::Write;

/// Which side a column's text keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text: names, ids.
    Left,
    /// Numbers.
    Right,
}

/// A table of text cells; every row has as many cells as there are columns.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column headings, all of them right-aligned as for numbers.
    pub fn new<S: Into<String>>(headings: impl IntoIterator<Item = S>) -> Self {
        Table {
            columns: headings
                .into_iter()
                .map(|h| (h.into(), Align::Right))
                .collect(),
            rows: Vec::new(),
        }
    }

    /// The same table with these columns left-aligned, as for text.
    pub fn left(mut self, columns: &[usize]) -> Self {
        for &i in columns {
            self.columns[i].1 = Align::Left;
        }
        self
    }

    /// Adds a row. Missing cells are empty, cells beyond the last column are dropped.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let mut row: Vec<String> = cells.into_iter().map(Into::into).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// The headings with their alignment.
    pub fn columns(&self) -> &[(String, Align)] {
        &self.columns
    }

    /// The rows, each as long as [`Table::columns`].
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// Plain text: two spaces between columns, headings on the first line, each line ended by a line feed.
    pub fn to_text(&self) -> String {
        let widths = self.widths(|s| s.chars().count());
        let mut out = String::new();
        let headings: Vec<&str> = self.columns.iter().map(|(h, _)| h.as_str()).collect();
        self.text_line(&mut out, &headings, &widths);
        for row in &self.rows {
            self.text_line(&mut out, row, &widths);
        }
        out
    }

    /// A GitHub-flavoured Markdown table; pipes and line breaks in cells are escaped.
    pub fn to_markdown(&self) -> String {
        let escape = |s: &str| s.replace('|', "\\|").replace(['\n', '\r'], " ");
        let widths = self.widths(|s| escape(s).chars().count());
        let mut out = String::new();
        let mut line = |cells: Vec<String>| {
            out.push('|');
            for ((cell, (_, align)), &w) in cells.iter().zip(&self.columns).zip(&widths) {
                let _ = match align {
                    Align::Left => write!(out, " {} |", pad(cell, w.max(3), Align::Left)),
                    Align::Right => write!(out, " {} |", pad(cell, w.max(3), Align::Right)),
                };
            }
            out.push('\n');
        };
        line(self.columns.iter().map(|(h, _)| escape(h)).collect());
        line(
            self.columns
                .iter()
                .zip(&widths)
                .map(|((_, align), &w)| match align {
                    Align::Left => "-".repeat(w.max(3)),
                    Align::Right => format!("{}:", "-".repeat(w.max(3) - 1)),
                })
                .collect(),
        );
        for row in &self.rows {
            line(row.iter().map(|c| escape(c)).collect());
        }
        out
    }

    fn widths(&self, len: impl Fn(&str) -> usize) -> Vec<usize> {
        (0..self.columns.len())
            .map(|i| {
                let cells = self.rows.iter().map(|r| len(&r[i])).max().unwrap_or(0);
                cells.max(len(&self.columns[i].0))
            })
            .collect()
    }

    fn text_line<S: AsRef<str>>(&self, out: &mut String, cells: &[S], widths: &[usize]) {
        let start = out.len();
        for (i, ((cell, (_, align)), &w)) in cells.iter().zip(&self.columns).zip(widths).enumerate()
        {
            if i > 0 {
                out.push_str("  ");
            }
            out.push_str(&pad(cell.as_ref(), w, *align));
        }
        out.truncate(start + out[start..].trim_end().len());
        out.push('\n');
    }
}

fn pad(s: &str, width: usize, align: Align) -> String {
    match align {
        Align::Left => format!("{s:<width$}"),
        Align::Right => format!("{s:>width$}"),
    }
}

/// `12 345 678` as `12.3 M`: three significant digits and a unit prefix (k, M, G, T), for parameters and FLOPs.
pub fn si(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    let (mut v, mut unit) = (value, "");
    for u in ["k", "M", "G", "T", "P"] {
        // 999.5 would print as "1000".
        if v.abs() < 999.5 {
            break;
        }
        v /= 1000.0;
        unit = u;
    }
    let decimals = match v.abs() {
        a if unit.is_empty() && a.fract() == 0.0 => 0,
        a if a >= 99.95 => 0,
        a if a >= 9.995 => 1,
        _ => 2,
    };
    if unit.is_empty() {
        format!("{v:.decimals$}")
    } else {
        format!("{v:.decimals$} {unit}")
    }
}

/// A number with `decimals` decimals, or `-` where it is NaN or infinite.
pub fn number(value: f64, decimals: usize) -> String {
    if value.is_finite() {
        format!("{value:.decimals$}")
    } else {
        "-".into()
    }
}

/// Seconds as `0.4 s`, `42 s`, `3 min 07 s` or `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut t = Table::new(["name", "n", "top-1 %"]).left(&[0]);
        t.row(["café", "12", "9.50"]);
        t.row(["a|b", "3", "100.00"]);
        t.row(["short"]);
        t
    }

    #[test]
    fn text_is_aligned_by_characters() {
        assert_eq!(
            sample().to_text(),
            "name    n  top-1 %\ncafé   12     9.50\na|b     3   100.00\nshort\n"
        );
    }

    #[test]
    fn markdown_escapes_pipes() {
        let md = sample().to_markdown();
        let lines: Vec<_> = md.lines().collect();
        assert_eq!(lines[1], "| ----- | --: | ------: |");
        assert_eq!(lines[3], "| a\\|b  |   3 |  100.00 |");
        assert!(
            lines
                .iter()
                .all(|l| l.chars().count() == lines[0].chars().count())
        );
    }

    #[test]
    fn units() {
        let got: Vec<_> = [7.0, 999.4, 999.6, 12_345.0, 11_689_512.0, 3.6e9, f64::NAN]
            .iter()
            .map(|&v| si(v))
            .collect();
        assert_eq!(
            got,
            ["7", "999", "1.00 k", "12.3 k", "11.7 M", "3.60 G", "-"]
        );
        let got: Vec<_> = [0.04, 9.96, 59.7, 187.2, 7500.0]
            .iter()
            .map(|&v| duration(v))
            .collect();
        assert_eq!(
            got,
            ["0.0 s", "10 s", "1 min 00 s", "3 min 07 s", "2 h 05 min"]
        );
    }
}
