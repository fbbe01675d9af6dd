//! Plots as SVG: learning curves, learning rate, confusion matrix, per-class F1.
//!
//! The background is transparent and text and axes are `currentColor`, so that a plot reads on a light and on a dark
//! page. The two families have a pair of colours that colour-blind readers can tell apart (Okabe and Ito, 2008) and a
//! line style of their own: CNNs blue and solid, transformers vermillion and dashed.

pub mod bench;
mod classes;
mod curves;
mod layers;
mod panels;
mod settings;

pub use classes::{class_f1, confusion};
pub use curves::{learning_curves, learning_rate};
pub use layers::{LayerSeries, heat_map, over_depth};
pub use panels::{Multiple, Reliability, Scatter, multiples, reliability, scatter};
pub use settings::{Setting, against, dots};

use super::html::escape;
use super::runlog::EpochRow;
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::{Deserialize, Serialize};

/// The kind of network: gives a run its colour and line style.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// Convolutional networks: blue, solid.
    Cnn,
    /// Transformers over patches: vermillion, dashed.
    Vit,
    /// Anything else: green, solid.
    Other,
}

impl Family {
    /// The family that a model id or spec names (`resnet18`, `vit:patch=4`, `swin_tiny_...`).
    pub fn of(model: &str) -> Self {
        let m = model.to_ascii_lowercase();
        let has = |words: &[&str]| words.iter().any(|w| m.contains(w));
        if has(&["vit", "swin", "deit", "dino"]) {
            Family::Vit
        } else if has(&["resnet", "cnn", "conv"]) {
            Family::Cnn
        } else {
            Family::Other
        }
    }

    /// The colour of the `n`-th run of this family, as `#RRGGBB`; the first is the family's own.
    pub fn colour(self, n: usize) -> &'static str {
        let tones = match self {
            Family::Cnn => ["#0072B2", "#56B4E9", "#5B6FD6", "#7A8FA6"],
            Family::Vit => ["#D55E00", "#E69F00", "#B5476B", "#8C5A2B"],
            Family::Other => ["#009E73", "#CC79A7", "#8C8C8C", "#A68A1D"],
        };
        tones[n % tones.len()]
    }
}

/// A plot: an SVG document.
#[derive(Clone, Debug, PartialEq)]
pub struct Svg {
    body: String,
    width: u32,
    height: u32,
    title: String,
}

impl Svg {
    /// As an element for an HTML page: it scales to its column and takes the page's text colour.
    pub fn inline(&self) -> String {
        self.element("")
    }

    /// As a file of its own, in a grey that reads on white and black, better where the viewer tells its theme.
    pub fn standalone(&self) -> String {
        self.element(
            "<style>svg{color:#737373}@media(prefers-color-scheme:light){svg{color:#333}}\
             @media(prefers-color-scheme:dark){svg{color:#ccc}}</style>\n",
        )
    }

    fn element(&self, style: &str) -> String {
        let Svg {
            body,
            width,
            height,
            title,
        } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {} {}\" \
             role=\"img\"><title>{}</title>\n{style}{body}</svg>\n",
            width * ZOOM,
            height * ZOOM,
            escape(title)
        )
    }
}

/// One run in a plot of several.
#[derive(Clone, Copy, Debug)]
pub struct RunCurve<'a> {
    /// Name in the legend.
    pub name: &'a str,
    /// Colour and line style.
    pub family: Family,
    /// The epochs, as in `metrics.csv`.
    pub epochs: &'a [EpochRow],
}

/// plotters places everything on whole pixels: draw larger, so that curves are smooth.
const ZOOM: u32 = 4;
/// Stands for the text colour while plotters draws, and becomes `currentColor`.
const INK: RGBColor = RGBColor(1, 2, 3);
const FONT: f64 = 13.0;
/// Width of a plot, in CSS pixels.
const WIDTH: u32 = 920;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Pixels of the page to pixels of the drawing.
fn z(v: f64) -> i32 {
    (v * f64::from(ZOOM)).round() as i32
}

fn text_style(size: f64, h: HPos, v: VPos) -> TextStyle<'static> {
    // The SVG backend divides the size by 1.24.
    ("sans-serif", size * 1.24 * f64::from(ZOOM))
        .into_font()
        .color(&INK)
        .pos(Pos::new(h, v))
}

fn text(area: &Area, s: &str, x: f64, y: f64, size: f64, h: HPos, v: VPos) -> Result<()> {
    area.draw(&Text::new(
        s.to_string(),
        (z(x), z(y)),
        text_style(size, h, v),
    ))
    .map_err(failed)
}

/// Text that reads upwards, centred on `x`; `h` says which part of it is at `y`.
fn text_upwards(area: &Area, s: &str, x: f64, y: f64, size: f64, h: HPos) -> Result<()> {
    let style = text_style(size, h, VPos::Center).transform(FontTransform::Rotate270);
    area.draw(&Text::new(s.to_string(), (z(x), z(y)), style))
        .map_err(failed)
}

/// A faint line across and a number at its left for each multiple of `step` from `low` to `high`; `y_at` places a value.
fn value_grid(
    area: &Area,
    (left, right): (f64, f64),
    (low, high, step): (f64, f64, f64),
    decimals: usize,
    y_at: impl Fn(f64) -> f64,
) -> Result<()> {
    let line = INK.mix(0.12).stroke_width(z(1.0) as u32);
    let mut tick = low;
    while tick <= high {
        let y = y_at(tick);
        let ends = vec![(z(left), z(y)), (z(right), z(y))];
        area.draw(&PathElement::new(ends, line)).map_err(failed)?;
        let shown = format!("{tick:.decimals$}");
        let (h, v) = (HPos::Right, VPos::Center);
        text(area, &shown, left - 8.0, y, FONT - 1.0, h, v)?;
        tick += step;
    }
    Ok(())
}

/// A straight line, dashed by hand where asked for: the library's dashes are as long as its pixels.
fn stroke(
    area: &Area,
    (ax, ay): (f64, f64),
    (bx, by): (f64, f64),
    style: ShapeStyle,
    dashed: bool,
) -> Result<()> {
    let (parts, full) = match dashed {
        true => (((bx - ax).hypot(by - ay) / 11.0).ceil(), 0.7),
        false => (1.0, 1.0),
    };
    let at = |share: f64| (z(ax + (bx - ax) * share), z(ay + (by - ay) * share));
    for p in 0..parts as usize {
        let (from, to) = (p as f64 / parts, (p as f64 + full) / parts);
        area.draw(&PathElement::new(vec![at(from), at(to)], style))
            .map_err(failed)?;
    }
    Ok(())
}

/// Width of `s` in a sans-serif font; only estimated, because the reader's font is not known here.
fn text_width(s: &str, size: f64) -> f64 {
    s.chars().count() as f64 * size * 0.56
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::run(format!("cannot draw a plot: {e}"))
}

fn rgb(hex: &str) -> RGBColor {
    let v = u32::from_str_radix(&hex[1..], 16).unwrap_or(0);
    RGBColor((v >> 16) as u8, (v >> 8) as u8, v as u8)
}

fn draw(title: &str, width: u32, height: u32, f: impl FnOnce(&Area) -> Result<()>) -> Result<Svg> {
    let mut buffer = String::new();
    {
        let root =
            SVGBackend::with_string(&mut buffer, (width * ZOOM, height * ZOOM)).into_drawing_area();
        f(&root)?;
        root.present().map_err(failed)?;
    }
    let body = buffer.split_once(">\n").map_or("", |(_, rest)| rest);
    let body = body
        .trim_end()
        .trim_end_matches("</svg>")
        .replace("#010203", "currentColor");
    Ok(Svg {
        body,
        width,
        height,
        title: title.to_string(),
    })
}

/// Colour and dashes of each run: runs of one family get its tones in turn.
fn styles(families: &[Family]) -> Vec<(RGBColor, bool)> {
    let nth = |i: usize| families[..i].iter().filter(|f| **f == families[i]).count();
    families
        .iter()
        .enumerate()
        .map(|(i, f)| (rgb(f.colour(nth(i))), *f == Family::Vit))
        .collect()
}

enum Mark {
    Line {
        dashed: bool,
        width: f64,
        alpha: f64,
    },
    Box,
}

struct Legend {
    entries: Vec<(String, RGBColor, Mark)>,
}

impl Legend {
    const SWATCH: f64 = 30.0;
    const ROW: f64 = 22.0;

    /// x, y of each entry, wrapped at the plot's width.
    fn places(&self) -> Vec<(f64, f64)> {
        let (mut x, mut y) = (8.0, 4.0 + Self::ROW / 2.0);
        let place = |(name, ..): &(String, RGBColor, Mark)| {
            let w = Self::SWATCH + 8.0 + text_width(name, FONT) + 22.0;
            if x > 8.0 && x + w > f64::from(WIDTH) {
                (x, y) = (8.0, y + Self::ROW);
            }
            let at = (x, y);
            x += w;
            at
        };
        self.entries.iter().map(place).collect()
    }

    fn height(&self) -> f64 {
        self.places()
            .last()
            .map_or(0.0, |p| p.1 + Self::ROW / 2.0 + 6.0)
    }

    fn draw(&self, area: &Area) -> Result<()> {
        for ((name, colour, mark), (x, y)) in self.entries.iter().zip(self.places()) {
            match mark {
                Mark::Box => {
                    let corners = [(z(x + 8.0), z(y - 6.0)), (z(x + 20.0), z(y + 6.0))];
                    area.draw(&Rectangle::new(corners, colour.filled()))
                        .map_err(failed)?;
                }
                Mark::Line {
                    dashed,
                    width,
                    alpha,
                } => {
                    let style = colour.mix(*alpha).stroke_width(z(*width) as u32);
                    let parts: &[(f64, f64)] = if *dashed {
                        &[(0.0, 8.0), (11.0, 19.0), (22.0, 30.0)]
                    } else {
                        &[(0.0, 30.0)]
                    };
                    for (a, b) in parts {
                        area.draw(&PathElement::new(
                            vec![(z(x + a), z(y)), (z(x + b), z(y))],
                            style,
                        ))
                        .map_err(failed)?;
                    }
                }
            }
            text(
                area,
                name,
                x + Self::SWATCH + 8.0,
                y,
                FONT,
                HPos::Left,
                VPos::Center,
            )?;
        }
        Ok(())
    }
}

/// Width in pixels and opacity of training and of validation lines.
const THIN: (f64, f64) = (1.5, 0.8);
const THICK: (f64, f64) = (2.6, 1.0);

fn run_legend<'a>(
    names: impl Iterator<Item = &'a str>,
    styles: &[(RGBColor, bool)],
    boxes: bool,
) -> Legend {
    let mark = |dashed| {
        if boxes {
            Mark::Box
        } else {
            Mark::Line {
                dashed,
                width: THICK.0,
                alpha: THICK.1,
            }
        }
    };
    Legend {
        entries: names
            .zip(styles)
            .map(|(n, &(c, dashed))| (shorten(n, 48), c, mark(dashed)))
            .collect(),
    }
}

/// At most `max` characters; a longer text loses its middle, because ids differ at both ends.
pub(crate) fn shorten(s: &str, max: usize) -> String {
    let chars: Vec<char> = s.chars().collect();
    if chars.len() <= max {
        return s.to_string();
    }
    let head = max / 2;
    let tail = max - 1 - head;
    chars[..head]
        .iter()
        .chain(['…'].iter())
        .chain(&chars[chars.len() - tail..])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::metrics::{EvalReport, Evaluation, Subject};
    use super::*;

    fn epochs(n: u64, loss: impl Fn(u64) -> f64) -> Vec<EpochRow> {
        let row = |epoch| EpochRow {
            epoch,
            train_loss: loss(epoch),
            train_top1: 50.0,
            val_loss: loss(epoch),
            val_top1: 60.0,
            val_top5: 90.0,
            lr: 1e-3,
            images_per_second: 10.0,
            seconds: 1.0,
        };
        (1..=n).map(row).collect()
    }

    fn curve(epochs: &[EpochRow], family: Family) -> RunCurve<'_> {
        RunCurve {
            name: "a <b> & c",
            family,
            epochs,
        }
    }

    fn eval(k: usize) -> EvalReport {
        let mut e = Evaluation::new(k);
        for c in 0..k as u32 {
            let row: Vec<f32> = (0..k)
                .map(|i| if i == (c as usize + 1) % 3 { 2.0 } else { 0.0 })
                .collect();
            e.add(&row, &[c]).unwrap();
        }
        e.finish(Subject::default(), &[], 1.0).unwrap()
    }

    #[test]
    fn families_have_their_colours_and_dashes() {
        assert_eq!(Family::of("resnet20"), Family::Cnn);
        assert_eq!(Family::of("vit:patch=4,dim=256"), Family::Vit);
        assert_eq!(Family::of("swin_tiny_patch4_window7_224"), Family::Vit);
        let rows = epochs(10, |e| 1.0 / e as f64);
        let cnn = learning_curves(&[curve(&rows, Family::Cnn)])
            .unwrap()
            .inline();
        let vit = learning_curves(&[curve(&rows, Family::Vit)])
            .unwrap()
            .inline();
        assert!(cnn.contains("#0072B2") && !cnn.contains("#D55E00"));
        assert!(vit.contains("#D55E00") && !vit.contains("#0072B2"));
        // A dashed line is many short ones.
        assert!(vit.matches("<polyline").count() > cnn.matches("<polyline").count() + 10);
    }

    #[test]
    fn ink_follows_the_page_and_names_are_escaped() {
        let rows = epochs(3, |e| e as f64);
        let runs = [curve(&rows, Family::Cnn), curve(&rows, Family::Vit)];
        let e = eval(5);
        for svg in [
            learning_curves(&runs).unwrap(),
            learning_rate(&runs).unwrap(),
            confusion(&e).unwrap(),
            class_f1(&[("<x>", Family::Cnn, &e), ("y", Family::Vit, &e)]).unwrap(),
        ] {
            let text = svg.standalone();
            assert!(
                text.contains("currentColor") && !text.contains("#010203"),
                "{text}"
            );
            assert!(
                text.contains("prefers-color-scheme:dark") && !svg.inline().contains("<style>")
            );
            assert!(!text.contains("<b>") && !text.contains("<x>"));
            assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
            assert_eq!(
                text.matches("<text").count(),
                text.matches("</text>").count()
            );
        }
    }

    #[test]
    fn odd_histories_are_drawn() {
        for rows in [
            epochs(1, |_| 0.0),
            epochs(4, |_| f64::NAN),
            epochs(5, |e| if e == 3 { f64::INFINITY } else { 1.0 }),
            epochs(5, |e| if e == 3 { 3e38 } else { 1.0 }),
            epochs(1000, |e| 1.0 / e as f64),
            vec![EpochRow {
                epoch: 0,
                lr: 0.0,
                ..epochs(1, |_| 1.0)[0].clone()
            }],
        ] {
            learning_curves(&[curve(&rows, Family::Other)]).unwrap();
            learning_rate(&[curve(&rows, Family::Other)]).unwrap();
        }
        assert!(learning_curves(&[curve(&[], Family::Cnn)]).is_err());
        assert!(learning_rate(&[]).is_err());
        assert!(class_f1(&[]).is_err());
        assert!(class_f1(&[("a", Family::Cnn, &eval(3)), ("b", Family::Cnn, &eval(4))]).is_err());
    }

    #[test]
    fn many_classes_become_one_image() {
        let small = confusion(&eval(20)).unwrap().inline();
        let large = confusion(&eval(400)).unwrap().inline();
        assert!(!small.contains("<image") && large.contains("<image"));
        assert!(large.len() < 60_000, "{} bytes", large.len());
        let bars = class_f1(&[("a", Family::Cnn, &eval(400))])
            .unwrap()
            .inline();
        assert!(bars.contains("the 20 worst of 400 classes"));
    }

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(shorten("abcdefghij", 10), "abcdefghij");
        assert_eq!(shorten("abcdefghijk", 7), "abc…ijk");
    }
}
