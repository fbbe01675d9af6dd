//! Values over the classes: the confusion matrix and F1 bars.

use super::super::metrics::{EvalReport, SMALL};
use super::super::png_data_uri;
use super::*;

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
                let y = top + side + 8.0;
                text_upwards(root, &names[t], x, y, FONT - 1.0, HPos::Right)?;
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
        let y = top + side / 2.0;
        text_upwards(root, "true class", 12.0, y, FONT, HPos::Center)?;

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

#[cfg(test)]
mod tests {
    #[test]
    fn ticks_are_round_and_few() {
        let steps = [5, 20, 100, 101, 1000].map(super::nice_step);
        assert_eq!(steps, [1, 2, 10, 10, 100]);
    }
}
