//! Small multiples: the same axes for each panel, several panels in one plot.

use super::*;

/// The place of a panel's axes in the plot, and the values at their ends.
struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn x_at(&self, v: f64) -> f64 {
        self.left + (v - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left)
    }

    fn y_at(&self, v: f64) -> f64 {
        self.bottom - (v - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - self.top)
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.x_at(x), self.y_at(y))
    }

    fn bar(&self, root: &Area, x: (f64, f64), y: (f64, f64), style: ShapeStyle) -> Result<()> {
        let corners = [
            (z(self.x_at(x.0)), z(self.y_at(y.0))),
            (z(self.x_at(x.1)), z(self.y_at(y.1))),
        ];
        root.draw(&Rectangle::new(corners, style)).map_err(failed)
    }
}

/// Confidence and accuracy of one network.
#[derive(Clone, Debug)]
pub struct Reliability<'a> {
    /// Above its panel.
    pub name: &'a str,
    /// Its colour.
    pub family: Family,
    /// Expected calibration error, 0 to 1.
    pub ece: f64,
    /// Of each bin of equal width: answers, mean confidence, share of right ones (0 to 1).
    pub bins: Vec<(usize, f64, f64)>,
}

/// A reliability diagram for each network: bars of accuracy over confidence with the gap to the diagonal outlined, and
/// below how many answers have that confidence.
///
/// # Errors
/// [`Error::Input`] where there is no network.
pub fn reliability(all: &[Reliability]) -> Result<Svg> {
    const HEIGHT: f64 = 250.0;
    const COUNTS: f64 = 60.0;
    if all.is_empty() {
        return Err(Error::input("no network to draw a reliability diagram of"));
    }
    let columns = all.len().min(3);
    let rows = all.len().div_ceil(3);
    let wide = if columns == 1 {
        430.0
    } else {
        f64::from(WIDTH) / columns as f64
    };
    let tall = 26.0 + HEIGHT + 14.0 + COUNTS + 50.0;
    let title = "Reliability: accuracy of answers by their confidence";
    let size = ((wide * columns as f64) as u32, (tall * rows as f64) as u32);
    draw(title, size.0, size.1, |root| {
        for (i, one) in all.iter().enumerate() {
            let (x0, y0) = ((i % 3) as f64 * wide, (i / 3) as f64 * tall);
            let n = one.bins.len().max(1) as f64;
            let colour = rgb(one.family.colour(0));
            let frame = Frame {
                left: x0 + 52.0,
                right: x0 + wide - 16.0,
                top: y0 + 26.0,
                bottom: y0 + 26.0 + HEIGHT,
                x: (0.0, 1.0),
                y: (0.0, 1.0),
            };
            let heading = format!("{}: ECE {:.1} %", shorten(one.name, 34), 100.0 * one.ece);
            text(
                root,
                &heading,
                frame.left,
                y0 + 12.0,
                FONT,
                HPos::Left,
                VPos::Center,
            )?;
            let ends = (frame.left, frame.right);
            value_grid(root, ends, (0.0, 1.0, 0.25), 2, |v| frame.y_at(v))?;
            for (b, &(images, confidence, accuracy)) in one.bins.iter().enumerate() {
                if images == 0 {
                    continue;
                }
                let x = (b as f64 / n + 0.06 / n, (b + 1) as f64 / n - 0.06 / n);
                frame.bar(root, x, (0.0, accuracy), colour.mix(0.85).filled())?;
                let gap = INK.mix(0.22).filled();
                frame.bar(root, x, (accuracy, confidence), gap)?;
            }
            let diagonal = INK.mix(0.6).stroke_width(z(1.4) as u32);
            stroke(
                root,
                frame.at((0.0, 0.0)),
                frame.at((1.0, 1.0)),
                diagonal,
                true,
            )?;
            let all_images: usize = one.bins.iter().map(|b| b.0).sum();
            let most = one.bins.iter().map(|b| b.0).max().unwrap_or(1).max(1) as f64;
            let counts = Frame {
                top: frame.bottom + 14.0,
                bottom: frame.bottom + 14.0 + COUNTS,
                y: (0.0, most),
                ..frame
            };
            for (b, &(images, ..)) in one.bins.iter().enumerate() {
                let x = (b as f64 / n + 0.06 / n, (b + 1) as f64 / n - 0.06 / n);
                counts.bar(root, x, (0.0, images as f64), INK.mix(0.35).filled())?;
            }
            let share = format!("{:.0} %", 100.0 * most / all_images.max(1) as f64);
            let (right, middle) = (HPos::Right, VPos::Center);
            text(
                root,
                &share,
                frame.left - 8.0,
                counts.top + 4.0,
                FONT - 1.0,
                right,
                middle,
            )?;
            text(
                root,
                "0",
                frame.left - 8.0,
                counts.bottom,
                FONT - 1.0,
                right,
                middle,
            )?;
            for v in [0.0, 0.25, 0.5, 0.75, 1.0] {
                let (x, y) = (frame.x_at(v), counts.bottom + 12.0);
                text(
                    root,
                    &format!("{v}"),
                    x,
                    y,
                    FONT - 1.0,
                    HPos::Center,
                    middle,
                )?;
            }
            let centre = (frame.left + frame.right) / 2.0;
            let y = counts.bottom + 32.0;
            text(root, "confidence", centre, y, FONT, HPos::Center, middle)?;
            let (y, centre) = ((frame.top + frame.bottom) / 2.0, HPos::Center);
            text_upwards(root, "accuracy", x0 + 10.0, y, FONT, centre)?;
        }
        Ok(())
    })
}

/// One panel of [`multiples`].
#[derive(Clone, Debug)]
pub struct Multiple {
    /// Above it.
    pub heading: String,
    /// Below it.
    pub x_title: String,
    /// Labels along the x axis, at even distances.
    pub ticks: Vec<String>,
    /// For each series the value at each tick; NaN: none.
    pub lines: Vec<Vec<f64>>,
}

/// A panel for each of several things that are varied, a line for each of `series` (name and family) in each of them; all
/// panels share the y axis from 0 to `high`.
///
/// # Errors
/// [`Error::Input`] where there is no panel.
pub fn multiples(
    title: &str,
    (y_title, high): (&str, f64),
    series: &[(&str, Family)],
    panels: &[Multiple],
) -> Result<Svg> {
    const HEIGHT: f64 = 170.0;
    if panels.is_empty() {
        return Err(Error::input(format!("{title}: no values to draw")));
    }
    let styles = styles(&series.iter().map(|s| s.1).collect::<Vec<_>>());
    let legend = run_legend(series.iter().map(|s| s.0), &styles, false);
    let above = legend.height();
    let columns = panels.len().min(3);
    let wide = f64::from(WIDTH) / columns as f64;
    let tall = 26.0 + HEIGHT + 56.0;
    let height = above + tall * panels.len().div_ceil(columns) as f64;
    draw(title, WIDTH, height as u32, |root| {
        legend.draw(root)?;
        for (i, panel) in panels.iter().enumerate() {
            let x0 = (i % columns) as f64 * wide;
            let y0 = above + (i / columns) as f64 * tall;
            let frame = Frame {
                left: x0 + 52.0,
                right: x0 + wide - 14.0,
                top: y0 + 26.0,
                bottom: y0 + 26.0 + HEIGHT,
                x: (-0.3, panel.ticks.len() as f64 - 0.7),
                y: (0.0, high),
            };
            let middle = VPos::Center;
            text(
                root,
                &panel.heading,
                frame.left,
                y0 + 12.0,
                FONT + 1.0,
                HPos::Left,
                middle,
            )?;
            let step = super::settings::nice(high / 5.0);
            let ends = (frame.left, frame.right);
            value_grid(root, ends, (0.0, high, step), 0, |v| frame.y_at(v))?;
            for (t, label) in panel.ticks.iter().enumerate() {
                let (x, y) = (frame.x_at(t as f64), frame.bottom + 12.0);
                text(root, label, x, y, FONT - 1.0, HPos::Center, middle)?;
            }
            for (line, &(colour, dashed)) in panel.lines.iter().zip(&styles) {
                let style = colour.stroke_width(z(2.2) as u32);
                let points: Vec<(f64, f64)> = line
                    .iter()
                    .enumerate()
                    .map(|(t, &v)| frame.at((t as f64, v)))
                    .collect();
                for pair in points
                    .windows(2)
                    .filter(|p| p.iter().all(|q| q.1.is_finite()))
                {
                    stroke(root, pair[0], pair[1], style, dashed)?;
                }
                for &(x, y) in points.iter().filter(|p| p.1.is_finite()) {
                    root.draw(&Circle::new((z(x), z(y)), z(3.0), colour.filled()))
                        .map_err(failed)?;
                }
            }
            let centre = (frame.left + frame.right) / 2.0;
            let y = frame.bottom + 31.0;
            text(
                root,
                &panel.x_title,
                centre,
                y,
                FONT - 1.0,
                HPos::Center,
                middle,
            )?;
            if i % columns == 0 {
                let y = (frame.top + frame.bottom) / 2.0;
                text_upwards(root, y_title, x0 + 10.0, y, FONT, HPos::Center)?;
            }
        }
        Ok(())
    })
}

/// Points of several classes in a plane.
#[derive(Clone, Debug)]
pub struct Scatter<'a> {
    /// Above it.
    pub heading: &'a str,
    /// Where each point is.
    pub points: &'a [[f64; 2]],
    /// The class of each, a place in the names.
    pub classes: &'a [usize],
}

/// Classes that get a colour and a mark of their own.
const MARKED: usize = 20;
/// Okabe and Ito's colours without black and yellow, with a brown and a grey violet that differ in lightness.
const TONES: [&str; 8] = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A4F1D", "#5D5391",
];

/// The mark of class `k` at `x`, `y`: colours repeat with another shape, so that neighbours in colour differ in shape.
fn mark(root: &Area, k: usize, (x, y): (f64, f64), size: f64) -> Result<()> {
    let colour = rgb(TONES[k % TONES.len()]).mix(0.75);
    let (x, y, s) = (z(x), z(y), z(size));
    let done = match (k % TONES.len() + k / TONES.len()) % 3 {
        0 => root.draw(&Circle::new((x, y), s, colour.filled())),
        1 => root.draw(&Rectangle::new(
            [
                (x - s * 9 / 10, y - s * 9 / 10),
                (x + s * 9 / 10, y + s * 9 / 10),
            ],
            colour.filled(),
        )),
        _ => root.draw(&Polygon::new(
            vec![
                (x, y - s * 13 / 10),
                (x + s * 12 / 10, y + s),
                (x - s * 12 / 10, y + s),
            ],
            colour.filled(),
        )),
    };
    done.map_err(failed)
}

/// Maps of the same points side by side, coloured by class, with a legend of up to 20 classes (those with the most
/// points; the others' points are grey).
///
/// # Errors
/// [`Error::Input`] where there is no point.
pub fn scatter(title: &str, names: &[String], maps: &[Scatter]) -> Result<Svg> {
    const SIDE: f64 = 440.0;
    let Some(first) = maps.first().filter(|m| !m.points.is_empty()) else {
        return Err(Error::input(format!("{title}: no points to draw")));
    };
    let mut counts = vec![0usize; names.len()];
    first.classes.iter().for_each(|&c| counts[c] += 1);
    let mut order: Vec<usize> = (0..names.len()).filter(|&c| counts[c] > 0).collect();
    order.sort_by_key(|&c| (std::cmp::Reverse(counts[c]), c));
    let others = order.len() > MARKED;
    order.truncate(MARKED);
    order.sort_unstable();
    let rank: Vec<Option<usize>> = (0..names.len())
        .map(|c| order.iter().position(|&o| o == c))
        .collect();
    // The legend: as many columns as fit.
    let longest = order
        .iter()
        .map(|&c| text_width(&shorten(&names[c], 22), FONT))
        .fold(40.0, f64::max);
    let per_row = ((f64::from(WIDTH) / (longest + 40.0)) as usize).max(1);
    let entries = order.len() + usize::from(others);
    let above = 22.0 * entries.div_ceil(per_row) as f64 + 10.0;
    let columns = maps.len().min(2);
    let wide = if columns == 1 {
        SIDE + 30.0
    } else {
        f64::from(WIDTH) / 2.0
    };
    let tall = SIDE + 30.0;
    let height = above + tall * maps.len().div_ceil(columns) as f64;
    let grey = INK.mix(0.25).filled();
    draw(title, WIDTH, height as u32, |root| {
        for i in 0..entries {
            let place = (
                8.0 + (i % per_row) as f64 * (longest + 40.0),
                12.0 + 22.0 * (i / per_row) as f64,
            );
            let at = (place.0 + 8.0, place.1);
            let name = match order.get(i) {
                Some(&c) => {
                    mark(root, i, at, 4.6)?;
                    shorten(&names[c], 22)
                }
                None => {
                    root.draw(&Circle::new((z(at.0), z(at.1)), z(4.0), grey))
                        .map_err(failed)?;
                    "others".into()
                }
            };
            text(
                root,
                &name,
                at.0 + 12.0,
                at.1,
                FONT,
                HPos::Left,
                VPos::Center,
            )?;
        }
        for (i, map) in maps.iter().enumerate() {
            let (x0, y0) = (
                (i % columns) as f64 * wide,
                above + (i / columns) as f64 * tall,
            );
            text(
                root,
                map.heading,
                x0 + 8.0,
                y0 + 12.0,
                FONT + 1.0,
                HPos::Left,
                VPos::Center,
            )?;
            let range = |axis: usize| {
                let all = || map.points.iter().map(|p| p[axis]).filter(|v| v.is_finite());
                let (low, high) = (
                    all().fold(f64::INFINITY, f64::min),
                    all().fold(f64::NEG_INFINITY, f64::max),
                );
                let pad = 0.04 * (high - low).max(1e-9);
                (low - pad, high + pad)
            };
            let frame = Frame {
                left: x0 + 8.0,
                right: x0 + wide - 12.0,
                top: y0 + 26.0,
                bottom: y0 + 26.0 + SIDE - 12.0,
                x: range(0),
                y: range(1),
            };
            let border = INK.mix(0.3).stroke_width(z(1.0) as u32);
            frame.bar(root, frame.x, frame.y, border)?;
            let size = if map.points.len() > 800 { 2.4 } else { 3.4 };
            // The grey ones below the others.
            for grey_turn in [true, false] {
                for (p, &c) in map.points.iter().zip(map.classes) {
                    let at = frame.at((p[0], p[1]));
                    match rank[c] {
                        Some(k) if !grey_turn => mark(root, k, at, size)?,
                        None if grey_turn => root
                            .draw(&Circle::new((z(at.0), z(at.1)), z(size), grey))
                            .map_err(failed)?,
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_drawn() {
        let bins = vec![(0, 0.0, 0.0), (5, 0.6, 0.4), (10, 0.95, 1.0)];
        let one = |name, family| Reliability {
            name,
            family,
            ece: 0.1,
            bins: bins.clone(),
        };
        let svg = reliability(&[one("a", Family::Cnn), one("b <", Family::Vit)]).unwrap();
        let text = svg.standalone();
        assert!(text.contains("b &lt;: ECE 10.0 %") && text.contains("#0072B2"));
        assert!(reliability(&[]).is_err());

        let panel = Multiple {
            heading: "blur".into(),
            x_title: "sigma".into(),
            ticks: vec!["none".into(), "1".into()],
            lines: vec![vec![90.0, 50.0], vec![80.0, f64::NAN]],
        };
        let series = [("cnn", Family::Cnn), ("vit", Family::Vit)];
        let svg = multiples("t", ("top-1 (%)", 100.0), &series, &vec![panel; 7]).unwrap();
        assert_eq!(svg.inline().matches("<circle").count(), 7 * 3);
        assert!(multiples("t", ("", 1.0), &series, &[]).is_err());
    }

    #[test]
    fn points_have_the_marks_of_their_class() {
        let names: Vec<String> = (0..30).map(|c| format!("class{c}")).collect();
        let classes: Vec<usize> = (0..30).collect();
        let points: Vec<[f64; 2]> = (0..30).map(|i| [f64::from(i), 1.0]).collect();
        let map = Scatter {
            heading: "PCA",
            points: &points,
            classes: &classes,
        };
        let text = scatter("t", &names, &[map.clone(), map]).unwrap().inline();
        assert!(text.contains("class19") && !text.contains("class20") && text.contains("others"));
        let none = Scatter {
            heading: "",
            points: &[],
            classes: &[],
        };
        assert!(scatter("t", &names, &[none]).is_err());
    }
}
