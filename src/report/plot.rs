//! Plots as SVG: learning curves, learning rate, confusion matrix, per-class F1.
//!
//! The background is transparent and text and axes are `currentColor`, so that a plot reads on a light and on a dark
//! page. The two families have a pair of colours that colour-blind readers can tell apart (Okabe and Ito, 2008) and a
//! line style of their own: CNNs blue and solid, transformers vermillion and dashed.

use super::html::escape;
use super::metrics::{EvalReport, SMALL};
use super::png_data_uri;
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
            Family::Cnn => ["#0072B2", "#56B4E9", "#5B6FD6"],
            Family::Vit => ["#D55E00", "#E69F00", "#B5476B"],
            Family::Other => ["#009E73", "#CC79A7", "#8C8C8C"],
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

/// One line of a panel: points (epoch, value); a point that is not finite leaves a gap.
struct Line {
    points: Vec<(f64, f64)>,
    colour: RGBColor,
    dashed: bool,
    width: f64,
    alpha: f64,
}

struct Panel<'a> {
    heading: &'a str,
    y_title: &'a str,
    lines: Vec<Line>,
    range: (f64, f64),
    decimals: usize,
}

/// Loss and top-1 accuracy over the epochs, training (thin) and validation (thick), for one or several runs.
///
/// # Errors
/// [`Error::Input`] where no run has an epoch.
pub fn learning_curves(runs: &[RunCurve]) -> Result<Svg> {
    let last = last_epoch(runs)?;
    let styles = styles(&runs.iter().map(|r| r.family).collect::<Vec<_>>());
    let lines = |train: fn(&EpochRow) -> f64, val: fn(&EpochRow) -> f64| {
        let mut lines = Vec::new();
        for (run, &(colour, dashed)) in runs.iter().zip(&styles) {
            let points = |get: fn(&EpochRow) -> f64| {
                run.epochs
                    .iter()
                    .map(|r| (r.epoch as f64, get(r)))
                    .collect()
            };
            lines.push(Line {
                points: points(train),
                colour,
                dashed,
                width: THIN.0,
                alpha: THIN.1,
            });
            lines.push(Line {
                points: points(val),
                colour,
                dashed,
                width: THICK.0,
                alpha: THICK.1,
            });
        }
        lines
    };
    let loss = lines(|r| r.train_loss, |r| r.val_loss);
    let top1 = lines(|r| r.train_top1, |r| r.val_top1);
    let (_, high) = extent(&loss).unwrap_or((0.0, 1.0));
    let loss_range = (0.0, if high > 0.0 { high * 1.05 } else { 1.0 });
    let (low, high) = extent(&top1).unwrap_or((0.0, 100.0));
    let low = ((low / 10.0).floor() * 10.0).clamp(0.0, 90.0);
    let top1_range = (low, ((high / 10.0).ceil() * 10.0).clamp(low + 10.0, 100.0));

    let legend = if let [_] = runs {
        let (colour, dashed) = styles[0];
        Legend {
            entries: vec![
                (
                    "validation".into(),
                    colour,
                    Mark::Line {
                        dashed,
                        width: THICK.0,
                        alpha: THICK.1,
                    },
                ),
                (
                    "training".into(),
                    colour,
                    Mark::Line {
                        dashed,
                        width: THIN.0,
                        alpha: THIN.1,
                    },
                ),
            ],
        }
    } else {
        let mut legend = run_legend(runs.iter().map(|r| r.name), &styles, false);
        legend.entries.push((
            "training (thin)".into(),
            INK,
            Mark::Line {
                dashed: false,
                width: THIN.0,
                alpha: THIN.1,
            },
        ));
        legend.entries.push((
            "validation (thick)".into(),
            INK,
            Mark::Line {
                dashed: false,
                width: THICK.0,
                alpha: THICK.1,
            },
        ));
        legend
    };
    let panels = [
        Panel {
            heading: "Loss",
            y_title: "cross-entropy (nats)",
            lines: loss,
            range: loss_range,
            decimals: if loss_range.1 < 0.5 { 2 } else { 1 },
        },
        Panel {
            heading: "Accuracy",
            y_title: "top-1 (%)",
            lines: top1,
            range: top1_range,
            decimals: 0,
        },
    ];
    panels_plot(
        "Learning curves: loss and top-1 accuracy over the epochs",
        &legend,
        &panels,
        last,
    )
}

/// Learning rate over the epochs, as each epoch's last step had it.
///
/// # Errors
/// [`Error::Input`] where no run has an epoch.
pub fn learning_rate(runs: &[RunCurve]) -> Result<Svg> {
    let last = last_epoch(runs)?;
    let styles = styles(&runs.iter().map(|r| r.family).collect::<Vec<_>>());
    let lines: Vec<Line> = runs
        .iter()
        .zip(&styles)
        .map(|(run, &(colour, dashed))| Line {
            points: run.epochs.iter().map(|r| (r.epoch as f64, r.lr)).collect(),
            colour,
            dashed,
            width: THICK.0,
            alpha: THICK.1,
        })
        .collect();
    let high = extent(&lines)
        .map(|e| e.1)
        .filter(|h| *h > 0.0)
        .unwrap_or(1.0);
    // A power of ten in the axis title keeps the tick labels short: 1.5 instead of 0.0015.
    let power = high.log10().floor();
    let unit = 10f64.powf(power);
    let lines = lines
        .into_iter()
        .map(|l| Line {
            points: l.points.iter().map(|&(x, y)| (x, y / unit)).collect(),
            ..l
        })
        .collect();
    let title = if power == 0.0 {
        "learning rate".into()
    } else {
        format!("learning rate (1e{power:.0})")
    };
    let legend = if runs.len() == 1 {
        Legend {
            entries: Vec::new(),
        }
    } else {
        run_legend(runs.iter().map(|r| r.name), &styles, false)
    };
    let range = (0.0, high / unit * 1.05);
    let panel = Panel {
        heading: "Learning rate",
        y_title: &title,
        lines,
        range,
        decimals: 1,
    };
    panels_plot("Learning rate over the epochs", &legend, &[panel], last)
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

fn last_epoch(runs: &[RunCurve]) -> Result<u64> {
    let last = runs.iter().flat_map(|r| r.epochs).map(|r| r.epoch).max();
    last.map(|e| e.max(1))
        .ok_or_else(|| Error::input("no epochs to draw: the runs have no rows in metrics.csv"))
}

/// Smallest and largest finite value.
fn extent(lines: &[Line]) -> Option<(f64, f64)> {
    let values = lines
        .iter()
        .flat_map(|l| &l.points)
        .map(|p| p.1)
        .filter(|v| v.is_finite());
    values.fold(None, |e, v| {
        Some(e.map_or((v, v), |(a, b): (f64, f64)| (a.min(v), b.max(v))))
    })
}

fn panels_plot(title: &str, legend: &Legend, panels: &[Panel], last: u64) -> Result<Svg> {
    let top = legend.height();
    let height = top + if panels.len() > 1 { 330.0 } else { 240.0 };
    draw(title, WIDTH, height.ceil() as u32, |root| {
        legend.draw(root)?;
        let (_, below) = root.split_vertically(z(top));
        for (panel, area) in panels.iter().zip(below.split_evenly((1, panels.len()))) {
            draw_panel(&area, panel, last)?;
        }
        Ok(())
    })
}

fn draw_panel(area: &Area, panel: &Panel, last: u64) -> Result<()> {
    text(
        area,
        panel.heading,
        66.0,
        12.0,
        FONT + 1.0,
        HPos::Left,
        VPos::Center,
    )?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(z(26.0))
        .margin_right(z(16.0))
        .margin_left(z(8.0))
        .x_label_area_size(z(44.0))
        .y_label_area_size(z(58.0))
        .build_cartesian_2d(0.0..last as f64, panel.range.0..panel.range.1)
        .map_err(failed)?;
    // Only whole epochs get a label: with few epochs, fewer labels than plotters would place.
    let decimals = panel.decimals;
    chart
        .configure_mesh()
        .x_labels((last as usize + 1).min(11))
        .y_labels(7)
        .x_label_formatter(&|x| {
            if x.fract().abs() < 1e-6 {
                format!("{x:.0}")
            } else {
                String::new()
            }
        })
        .y_label_formatter(&|y| {
            if y.abs() < 1e5 {
                format!("{y:.decimals$}")
            } else {
                format!("{y:.0e}")
            }
        })
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.15).stroke_width(z(1.0) as u32))
        .axis_style(INK.mix(0.6).stroke_width(z(1.0) as u32))
        .label_style(text_style(FONT - 1.0, HPos::Center, VPos::Center))
        .axis_desc_style(text_style(FONT, HPos::Center, VPos::Center))
        .set_all_tick_mark_size(z(4.0))
        .x_desc("epoch")
        .y_desc(panel.y_title)
        .draw()
        .map_err(failed)?;
    for line in &panel.lines {
        let style = line
            .colour
            .mix(line.alpha)
            .stroke_width(z(line.width) as u32);
        for part in line.points.split(|p| !p.1.is_finite()) {
            let points = part.iter().copied();
            match part {
                [] => {}
                [one] => {
                    let dot = Circle::new(
                        *one,
                        z(line.width * 1.4),
                        line.colour.mix(line.alpha).filled(),
                    );
                    chart.plotting_area().draw(&dot).map_err(failed)?;
                }
                _ if line.dashed => {
                    chart
                        .draw_series(DashedLineSeries::new(points, z(8.0), z(4.0), style))
                        .map_err(failed)?;
                }
                _ => {
                    chart
                        .draw_series(LineSeries::new(points, style))
                        .map_err(failed)?;
                }
            }
        }
    }
    Ok(())
}

/// Colour of shares and scores that belong to no family.
const NEUTRAL: RGBColor = RGBColor(0x7D, 0x66, 0xC2);

/// Opacity of a share: small shares, which are the mistakes one looks for, stay visible.
fn shade(share: f64) -> f64 {
    share.sqrt()
}

/// The confusion matrix, each row divided by the images of its class; with up to 20 classes each cell shows its
/// percentage, with more the cells are pixels of one image.
///
/// # Errors
/// [`Error::Input`] where there are no classes.
pub fn confusion(report: &EvalReport) -> Result<Svg> {
    let k = report.per_class.len();
    if k == 0 {
        return Err(Error::input("no classes to draw a confusion matrix of"));
    }
    let share = |t: usize, p: usize| {
        report.confusion[t][p] as f64 / report.per_class[t].support.max(1) as f64
    };
    let small = k <= SMALL;
    let names: Vec<String> = report
        .per_class
        .iter()
        .map(|c| shorten(&c.name, 18))
        .collect();
    let longest = names
        .iter()
        .map(|n| text_width(n, FONT - 1.0))
        .fold(0.0, f64::max);
    let cell = if small {
        (520.0 / k as f64).clamp(30.0, 56.0)
    } else {
        560.0 / k as f64
    };
    let side = cell * k as f64;
    let left = 34.0 + if small { longest } else { 34.0 };
    // Names that do not fit side by side stand upright.
    let upright = small && longest > cell - 6.0;
    let bottom = 34.0 + if upright { longest } else { 18.0 };
    let (top, bar) = (10.0, 86.0);
    let title = format!("Confusion matrix of {} on {}", report.model, report.data);
    let (width, height) = ((left + side + bar) as u32, (top + side + bottom) as u32);
    let mut svg = draw(&title, width, height, |root| {
        let rect = |x: f64, y: f64, w: f64, h: f64, style: ShapeStyle| {
            root.draw(&Rectangle::new([(z(x), z(y)), (z(x + w), z(y + h))], style))
                .map_err(failed)
        };
        for t in (0..k).filter(|_| small) {
            let y = top + t as f64 * cell;
            text(
                root,
                &names[t],
                left - 8.0,
                y + cell / 2.0,
                FONT - 1.0,
                HPos::Right,
                VPos::Center,
            )?;
            let x = left + (t as f64 + 0.5) * cell;
            if upright {
                let style = text_style(FONT - 1.0, HPos::Right, VPos::Center)
                    .transform(FontTransform::Rotate270);
                let at = (z(x), z(top + side + 8.0));
                root.draw(&Text::new(names[t].clone(), at, style))
                    .map_err(failed)?;
            } else {
                text(
                    root,
                    &names[t],
                    x,
                    top + side + 13.0,
                    FONT - 1.0,
                    HPos::Center,
                    VPos::Center,
                )?;
            }
            for p in 0..k {
                let (s, x) = (share(t, p), left + p as f64 * cell);
                if s > 0.0 {
                    rect(x, y, cell, cell, NEUTRAL.mix(shade(s)).filled())?;
                    let style = text_style(FONT - 1.0, HPos::Center, VPos::Center);
                    let style = if shade(s) > 0.8 {
                        style.color(&WHITE)
                    } else {
                        style
                    };
                    let label = if s < 0.005 {
                        "<1".to_string()
                    } else {
                        format!("{:.0}", 100.0 * s)
                    };
                    let at = (z(x + cell / 2.0), z(y + cell / 2.0));
                    root.draw(&Text::new(label, at, style)).map_err(failed)?;
                }
            }
        }
        if small {
            for i in 1..k {
                let d = i as f64 * cell;
                let line =
                    |a, b| PathElement::new(vec![a, b], INK.mix(0.12).stroke_width(z(1.0) as u32));
                root.draw(&line((z(left + d), z(top)), (z(left + d), z(top + side))))
                    .map_err(failed)?;
                root.draw(&line((z(left), z(top + d)), (z(left + side), z(top + d))))
                    .map_err(failed)?;
            }
        } else {
            let step = nice_step(k);
            for c in (0..k).step_by(step) {
                let d = (c as f64 + 0.5) * cell;
                text(
                    root,
                    &c.to_string(),
                    left - 8.0,
                    top + d,
                    FONT - 1.0,
                    HPos::Right,
                    VPos::Center,
                )?;
                text(
                    root,
                    &c.to_string(),
                    left + d,
                    top + side + 13.0,
                    FONT - 1.0,
                    HPos::Center,
                    VPos::Center,
                )?;
            }
        }
        rect(
            left,
            top,
            side,
            side,
            INK.mix(0.6).stroke_width(z(1.0) as u32),
        )?;
        let (middle, low) = (left + side / 2.0, top + side + bottom - 10.0);
        text(
            root,
            "predicted class",
            middle,
            low,
            FONT,
            HPos::Center,
            VPos::Center,
        )?;
        let style =
            text_style(FONT, HPos::Center, VPos::Center).transform(FontTransform::Rotate270);
        root.draw(&Text::new(
            "true class",
            (z(12.0), z(top + side / 2.0)),
            style,
        ))
        .map_err(failed)?;

        // The colour scale, in steps of 10 %.
        let x = left + side + 22.0;
        for step in 0..=10 {
            let (share, y) = (1.0 - f64::from(step) / 10.0, top + 18.0 * f64::from(step));
            rect(x, y, 16.0, 16.0, NEUTRAL.mix(shade(share)).filled())?;
            rect(x, y, 16.0, 16.0, INK.mix(0.3).stroke_width(z(0.5) as u32))?;
            let label = format!("{:.0}{}", 100.0 * share, if step == 0 { " %" } else { "" });
            text(
                root,
                &label,
                x + 24.0,
                y + 8.0,
                FONT - 2.0,
                HPos::Left,
                VPos::Center,
            )?;
        }
        Ok(())
    })?;
    if !small {
        let pixels: Vec<u8> = (0..k * k)
            .flat_map(|i| {
                let RGBColor(r, g, b) = NEUTRAL;
                [r, g, b, (255.0 * shade(share(i / k, i % k))).round() as u8]
            })
            .collect();
        let uri = png_data_uri(&pixels, k as u32, k as u32, image::ExtendedColorType::Rgba8)?;
        // Pixel by pixel where a cell is some pixels wide; averaged where several cells share one, lest they vanish.
        let rendering = if cell >= 2.0 { "pixelated" } else { "auto" };
        svg.body.push_str(&format!(
            "<image x=\"{}\" y=\"{}\" width=\"{s}\" height=\"{s}\" style=\"image-rendering:{rendering}\" href=\"{uri}\"/>\n",
            z(left),
            z(top),
            s = z(side)
        ));
    }
    Ok(svg)
}

/// 1, 2 or 5 times a power of ten that leaves at most eleven ticks over `n`.
fn nice_step(n: usize) -> usize {
    let steps = (0..).flat_map(|p| [1, 2, 5].map(|m| m * 10usize.pow(p)));
    steps
        .into_iter()
        .find(|s| n.div_ceil(*s) <= 11)
        .unwrap_or(n)
}

/// Most classes for which [`class_f1`] shows every one.
const BARS: usize = 40;

/// F1 of every class as bars, the runs side by side; with more than 40 classes, of the 20 worst that have images (by
/// the mean over the runs). The runs must share their classes.
///
/// # Errors
/// [`Error::Input`] where there is no run or no class, or the numbers of classes differ.
pub fn class_f1(runs: &[(&str, Family, &EvalReport)]) -> Result<Svg> {
    let Some((_, _, first)) = runs.first() else {
        return Err(Error::input("no runs to draw per-class bars of"));
    };
    let k = first.per_class.len();
    if k == 0 || runs.iter().any(|(_, _, r)| r.per_class.len() != k) {
        return Err(Error::input(
            "per-class bars need runs over the same classes",
        ));
    }
    let mean = |c: usize| runs.iter().map(|r| r.2.per_class[c].f1).sum::<f64>() / runs.len() as f64;
    let mut classes: Vec<usize> = (0..k).collect();
    if k > BARS {
        classes.retain(|&c| runs.iter().any(|r| r.2.per_class[c].support > 0));
        classes.sort_by(|&a, &b| mean(a).total_cmp(&mean(b)).then(a.cmp(&b)));
        classes.truncate(20);
    }
    let styles = styles(&runs.iter().map(|r| r.1).collect::<Vec<_>>());
    let legend = if runs.len() == 1 {
        Legend {
            entries: Vec::new(),
        }
    } else {
        run_legend(runs.iter().map(|r| r.0), &styles, true)
    };
    let names: Vec<String> = classes
        .iter()
        .map(|&c| shorten(&first.per_class[c].name, 30))
        .collect();
    let left = 34.0
        + names
            .iter()
            .map(|n| text_width(n, FONT - 1.0))
            .fold(20.0, f64::max);
    let bar = match runs.len() {
        1 => 14.0,
        2..4 => 12.0,
        _ => 10.0,
    };
    let group = bar * runs.len() as f64 + 8.0;
    let heading = if k > BARS { 22.0 } else { 0.0 };
    let top = legend.height() + heading + 6.0;
    let bottom = top + group * classes.len() as f64;
    let right = f64::from(WIDTH) - 50.0;
    let title = if k > BARS {
        "F1 of the 20 worst classes"
    } else {
        "F1 of each class"
    };
    draw(title, WIDTH, (bottom + 46.0) as u32, |root| {
        legend.draw(root)?;
        if k > BARS {
            let y = legend.height() + heading / 2.0;
            text(
                root,
                &format!("the 20 worst of {k} classes"),
                left,
                y,
                FONT,
                HPos::Left,
                VPos::Center,
            )?;
        }
        let x = |f1: f64| left + f1 * (right - left);
        for tick in 0..=5 {
            let v = f64::from(tick) / 5.0;
            let line = vec![(z(x(v)), z(top)), (z(x(v)), z(bottom))];
            let alpha = if tick == 0 { 0.6 } else { 0.15 };
            root.draw(&PathElement::new(
                line,
                INK.mix(alpha).stroke_width(z(1.0) as u32),
            ))
            .map_err(failed)?;
            text(
                root,
                &format!("{v:.1}"),
                x(v),
                bottom + 12.0,
                FONT - 1.0,
                HPos::Center,
                VPos::Center,
            )?;
        }
        text(
            root,
            "F1 (0 to 1)",
            x(0.5),
            bottom + 32.0,
            FONT,
            HPos::Center,
            VPos::Center,
        )?;
        for (i, (&c, name)) in classes.iter().zip(&names).enumerate() {
            let y = top + group * i as f64 + 4.0;
            text(
                root,
                name,
                left - 8.0,
                y + group / 2.0 - 4.0,
                FONT - 1.0,
                HPos::Right,
                VPos::Center,
            )?;
            for (j, ((_, _, r), (colour, _))) in runs.iter().zip(&styles).enumerate() {
                let (f1, y) = (r.per_class[c].f1, y + bar * j as f64);
                let corners = [(z(left), z(y)), (z(x(f1)), z(y + bar - 1.0))];
                root.draw(&Rectangle::new(corners, colour.filled()))
                    .map_err(failed)?;
                let label = format!("{f1:.2}");
                text(
                    root,
                    &label,
                    x(f1) + 5.0,
                    y + bar / 2.0,
                    (bar - 1.0).min(11.0),
                    HPos::Left,
                    VPos::Center,
                )?;
            }
        }
        Ok(())
    })
}

/// At most `max` characters; a longer text loses its middle, because ids differ at both ends.
fn shorten(s: &str, max: usize) -> String {
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
    use super::super::metrics::{Evaluation, Subject};
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
        assert_eq!([5, 20, 100, 101, 1000].map(nice_step), [1, 2, 10, 10, 100]);
    }
}
