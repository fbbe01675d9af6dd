//! Plots of measurements: a roofline, a ladder of variants, results over time.

use super::*;

/// A kernel under the roofline.
#[derive(Clone, Debug)]
pub struct RooflinePoint {
    /// Name in the legend.
    pub name: String,
    /// Operations per compulsory byte.
    pub intensity: f64,
    /// Operations a second.
    pub flops: f64,
}

/// A device's roofs.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// Operations a second.
    pub flops: f64,
    /// Bytes a second of main memory.
    pub memory: f64,
    /// Bytes a second of the fastest cache.
    pub cache: f64,
}

/// One bar of a ladder.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Group (a case); bars of one group stand together.
    pub group: String,
    /// Variant.
    pub name: String,
    /// Length.
    pub value: f64,
    /// Written beside the bar.
    pub label: String,
}

/// A case over several records.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// By record: low, median and high in seconds.
    pub points: Vec<Option<[f64; 3]>>,
}

const COLOURS: [&str; 8] = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#5B6FD6",
];

fn colour(i: usize) -> RGBColor {
    rgb(COLOURS[i % COLOURS.len()])
}

/// A logarithmic axis: powers of ten from `low` to `high` over pixels.
struct LogAxis {
    from: i32,
    to: i32,
    start: f64,
    end: f64,
}

impl LogAxis {
    fn new(low: f64, high: f64, start: f64, end: f64) -> LogAxis {
        let from = low.max(1e-30).log10().floor() as i32;
        let to = (high.max(1e-30).log10().ceil() as i32).max(from + 1);
        LogAxis {
            from,
            to,
            start,
            end,
        }
    }

    fn at(&self, v: f64) -> f64 {
        let share = (v.max(1e-30).log10() - f64::from(self.from)) / f64::from(self.to - self.from);
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }

    /// Powers of ten, few enough to be read.
    fn ticks(&self) -> Vec<f64> {
        let every = (self.to - self.from).div_euclid(8).max(1);
        (self.from..=self.to)
            .step_by(every as usize)
            .map(|p| 10f64.powi(p))
            .collect()
    }
}

fn line(
    area: &Area,
    points: &[(f64, f64)],
    colour: RGBColor,
    alpha: f64,
    width: f64,
) -> Result<()> {
    let path: Vec<(i32, i32)> = points.iter().map(|p| (z(p.0), z(p.1))).collect();
    let style = colour.mix(alpha).stroke_width(z(width) as u32);
    area.draw(&PathElement::new(path, style)).map_err(failed)
}

fn dot(area: &Area, x: f64, y: f64, colour: RGBColor) -> Result<()> {
    area.draw(&Circle::new((z(x), z(y)), z(4.5), colour.filled()))
        .map_err(failed)
}

fn boxes(names: impl Iterator<Item = String>) -> Legend {
    let entry = |(i, n): (usize, String)| (shorten(&n, 96), colour(i), Mark::Box);
    Legend {
        entries: names.enumerate().map(entry).collect(),
    }
}

fn power(v: f64, unit: &str) -> String {
    format!("{} {unit}", crate::report::table::si(v)).replace("  ", " ")
}

/// Kernels under the device's roofline: operations a second over operations per byte, both logarithmic.
///
/// # Errors
/// [`Error::Input`] where there is no point.
pub fn roofline(points: &[RooflinePoint], roof: Roof) -> Result<Svg> {
    if points.is_empty() {
        return Err(Error::input("no kernels to draw under a roofline"));
    }
    let legend = boxes(points.iter().map(|p| p.name.clone()));
    let (top, left) = (legend.height() + 10.0, 96.0);
    let (bottom, right) = (top + 340.0, f64::from(WIDTH) - 24.0);
    let intensities = || points.iter().map(|p| p.intensity.max(1e-3));
    let ridge = roof.flops / roof.memory;
    let x = LogAxis::new(
        intensities().fold(ridge / 4.0, f64::min),
        intensities().fold(ridge * 4.0, f64::max),
        left,
        right,
    );
    let lowest = points
        .iter()
        .map(|p| p.flops)
        .fold(roof.flops / 10.0, f64::min);
    let y = LogAxis::new(lowest, roof.flops * 1.01, bottom, top);
    draw(
        "Kernels under the roofline",
        WIDTH,
        (bottom + 60.0) as u32,
        |root| {
            legend.draw(root)?;
            for v in x.ticks() {
                let at = x.at(v);
                line(root, &[(at, top), (at, bottom)], INK, 0.15, 1.0)?;
                text(
                    root,
                    &format!("{v}"),
                    at,
                    bottom + 14.0,
                    FONT - 1.0,
                    HPos::Center,
                    VPos::Center,
                )?;
            }
            for v in y.ticks() {
                let at = y.at(v);
                line(root, &[(left, at), (right, at)], INK, 0.15, 1.0)?;
                let label = power(v, "FLOP/s");
                text(
                    root,
                    &label,
                    left - 8.0,
                    at,
                    FONT - 1.0,
                    HPos::Right,
                    VPos::Center,
                )?;
            }
            let caption = "operations per byte";
            text(
                root,
                caption,
                (left + right) / 2.0,
                bottom + 38.0,
                FONT,
                HPos::Center,
                VPos::Center,
            )?;
            for (rate, name, alpha) in [(roof.memory, "memory", 0.9), (roof.cache, "cache", 0.45)] {
                let (low, high) = (10f64.powi(x.from), 10f64.powi(x.to));
                let ridge = (roof.flops / rate).clamp(low, high);
                let start = low.max(10f64.powi(y.from) / rate).min(ridge);
                let roofs = [
                    (x.at(start), y.at(start * rate)),
                    (x.at(ridge), y.at(ridge * rate)),
                    (right, y.at(roof.flops)),
                ];
                line(root, &roofs, INK, alpha, 2.0)?;
                let label = format!("{name} {}", power(rate, "B/s"));
                let middle = (start * ridge).sqrt();
                let (px, py) = (x.at(middle) - 8.0, y.at(middle * rate) - 8.0);
                text(
                    root,
                    &label,
                    px.max(left + 60.0),
                    py,
                    FONT - 1.0,
                    HPos::Right,
                    VPos::Center,
                )?;
            }
            let label = format!("peak {}", power(roof.flops, "FLOP/s"));
            text(
                root,
                &label,
                right,
                y.at(roof.flops) - 9.0,
                FONT - 1.0,
                HPos::Right,
                VPos::Center,
            )?;
            for (i, p) in points.iter().enumerate() {
                dot(root, x.at(p.intensity), y.at(p.flops), colour(i))?;
            }
            Ok(())
        },
    )
}

/// Bars in groups, the longest as wide as the plot: the ladder of a case's variants.
///
/// # Errors
/// [`Error::Input`] where there is no bar.
pub fn ladder(title: &str, bars: &[Bar]) -> Result<Svg> {
    let longest = bars.iter().map(|b| b.value).fold(0.0, f64::max);
    if longest <= 0.0 {
        return Err(Error::input("no bars to draw"));
    }
    let names = bars.iter().map(|b| text_width(&b.name, FONT - 1.0));
    let left = 20.0 + names.fold(60.0, f64::max);
    let right = f64::from(WIDTH) - 200.0;
    let groups = |i: usize| i == 0 || bars[i].group != bars[i - 1].group;
    let headings = (0..bars.len()).filter(|&i| groups(i)).count() as f64;
    let height = 20.0 * bars.len() as f64 + 34.0 * headings + 12.0;
    draw(title, WIDTH, height as u32, |root| {
        let mut y = 4.0;
        let mut nth = 0;
        for (i, b) in bars.iter().enumerate() {
            if groups(i) {
                y += 20.0;
                let name = shorten(&b.group, 120);
                text(root, &name, 8.0, y, FONT, HPos::Left, VPos::Center)?;
                y += 14.0;
                nth = 0;
            }
            text(
                root,
                &b.name,
                left - 8.0,
                y + 7.0,
                FONT - 1.0,
                HPos::Right,
                VPos::Center,
            )?;
            let end = left + b.value / longest * (right - left);
            let corners = [(z(left), z(y)), (z(end), z(y + 14.0))];
            root.draw(&Rectangle::new(corners, colour(nth).filled()))
                .map_err(failed)?;
            text(
                root,
                &b.label,
                end + 8.0,
                y + 7.0,
                FONT - 1.0,
                HPos::Left,
                VPos::Center,
            )?;
            y += 20.0;
            nth += 1;
        }
        Ok(())
    })
}

/// Times over records, each with its interval, the time axis logarithmic.
///
/// # Errors
/// [`Error::Input`] where there is no time.
pub fn history(records: &[String], series: &[Series]) -> Result<Svg> {
    let all = || series.iter().flat_map(|s| s.points.iter().flatten());
    if all().next().is_none() {
        return Err(Error::input("no times to draw"));
    }
    let legend = boxes(series.iter().map(|s| s.name.clone()));
    let (top, left) = (legend.height() + 10.0, 80.0);
    let (bottom, right) = (top + 300.0, f64::from(WIDTH) - 40.0);
    let y = LogAxis::new(
        all().map(|p| p[0]).fold(f64::INFINITY, f64::min),
        all().map(|p| p[2]).fold(0.0, f64::max),
        bottom,
        top,
    );
    let step = (right - left) / records.len().max(1) as f64;
    let x = |i: usize| left + step * (i as f64 + 0.5);
    draw("Results over time", WIDTH, (bottom + 40.0) as u32, |root| {
        legend.draw(root)?;
        for v in y.ticks() {
            line(root, &[(left, y.at(v)), (right, y.at(v))], INK, 0.15, 1.0)?;
            let label = format!("{} ms", 1e3 * v);
            text(
                root,
                &label,
                left - 8.0,
                y.at(v),
                FONT - 1.0,
                HPos::Right,
                VPos::Center,
            )?;
        }
        for (i, name) in records.iter().enumerate() {
            let name = shorten(name, (step / 7.0).max(6.0) as usize);
            text(
                root,
                &name,
                x(i),
                bottom + 16.0,
                FONT - 1.0,
                HPos::Center,
                VPos::Center,
            )?;
        }
        for (k, s) in series.iter().enumerate() {
            let there: Vec<(f64, [f64; 3])> = s
                .points
                .iter()
                .enumerate()
                .filter_map(|(i, p)| Some((x(i), (*p)?)))
                .collect();
            let path: Vec<(f64, f64)> = there.iter().map(|(x, p)| (*x, y.at(p[1]))).collect();
            line(root, &path, colour(k), 0.7, 2.0)?;
            for (x, [low, median, high]) in there {
                line(
                    root,
                    &[(x, y.at(low)), (x, y.at(high))],
                    colour(k),
                    1.0,
                    1.5,
                )?;
                dot(root, x, y.at(median), colour(k))?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_drawn() {
        let point = |name: &str, intensity, flops| RooflinePoint {
            name: name.into(),
            intensity,
            flops,
        };
        let roof = Roof {
            flops: 1e11,
            memory: 1e10,
            cache: 5e10,
        };
        let points = [
            point("a <b>", 0.1, 1e9),
            point("c", 300.0, 9e10),
            point("d", 0.0, 0.0),
        ];
        let svg = roofline(&points, roof).unwrap().inline();
        assert!(svg.matches("<circle").count() == 3 && !svg.contains("<b>"));
        assert!(roofline(&[], roof).is_err());
        let bar = |group: &str, name: &str, value| Bar {
            group: group.into(),
            name: name.into(),
            value,
            label: format!("{value}"),
        };
        let bars = [
            bar("x", "naive", 1.0),
            bar("x", "tile", 3.0),
            bar("y", "naive", 2.0),
        ];
        assert_eq!(
            ladder("t", &bars)
                .unwrap()
                .inline()
                .matches("<rect")
                .count(),
            3
        );
        assert!(ladder("t", &[]).is_err());
        let series = Series {
            name: "x".into(),
            points: vec![Some([0.9, 1.0, 1.1]), None, Some([0.4, 0.5, 0.6])],
        };
        let names = ["a", "b", "c"].map(String::from);
        assert!(history(&names, &[series]).is_ok());
        assert!(history(&names, &[]).is_err());
    }
}
