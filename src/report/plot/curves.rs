//! Values over the epochs: learning curves and the learning rate.

use super::*;

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
