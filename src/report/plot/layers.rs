//! Values over layers: points per layer with their mean, and heat maps of layers against layers.

use super::settings::nice;
use super::*;
use plotters::style::colors::colormaps::ViridisRGB;

/// One network in a plot over its layers.
#[derive(Clone, Debug)]
pub struct LayerSeries<'a> {
    /// Name in the legend.
    pub name: &'a str,
    /// Colour and line style.
    pub family: Family,
    /// The values of each layer, first layer first: one for each head, or a single one.
    pub layers: Vec<Vec<f64>>,
}

/// A point for each value, a line through each layer's mean; layers are placed by their share of the depth, so that networks
/// of different depths share an axis.
///
/// # Errors
/// [`Error::Input`] where there is no finite value.
pub fn over_depth(title: &str, y_title: &str, series: &[LayerSeries]) -> Result<Svg> {
    let values = || {
        series
            .iter()
            .flat_map(|s| s.layers.iter().flatten().copied())
    };
    let high = values().filter(|v| v.is_finite()).fold(0.0, f64::max) * 1.05;
    if high <= 0.0 {
        return Err(Error::input(format!("{title}: no values to draw")));
    }
    let styles = styles(&series.iter().map(|s| s.family).collect::<Vec<_>>());
    let legend = run_legend(series.iter().map(|s| s.name), &styles, false);
    let (top, bottom) = (legend.height() + 8.0, 46.0);
    let height = top + 320.0 + bottom;
    draw(title, WIDTH, height as u32, |root| {
        legend.draw(root)?;
        let (left, right) = (64.0, f64::from(WIDTH) - 16.0);
        let x_at = |i: usize, n: usize| {
            let share = if n > 1 {
                i as f64 / (n - 1) as f64
            } else {
                0.5
            };
            left + 14.0 + share * (right - left - 28.0)
        };
        let y_at = |v: f64| top + 320.0 * (1.0 - v / high);
        let step = nice(high / 5.0);
        let decimals = if step < 0.1 {
            2
        } else {
            usize::from(step < 1.0)
        };
        value_grid(root, (left, right), (0.0, high, step), decimals, y_at)?;
        for (s, &(colour, dashed)) in series.iter().zip(&styles) {
            let n = s.layers.len();
            let mut means = vec![];
            for (i, layer) in s.layers.iter().enumerate() {
                for &v in layer.iter().filter(|v| v.is_finite() && layer.len() > 1) {
                    root.draw(&Circle::new(
                        (z(x_at(i, n)), z(y_at(v))),
                        z(3.2),
                        colour.mix(0.55).filled(),
                    ))
                    .map_err(failed)?;
                }
                means.push((
                    x_at(i, n),
                    y_at(layer.iter().sum::<f64>() / layer.len() as f64),
                ));
            }
            let style = colour.stroke_width(z(2.2) as u32);
            for pair in means
                .windows(2)
                .filter(|p| p.iter().all(|q| q.1.is_finite()))
            {
                stroke(root, pair[0], pair[1], style, dashed)?;
            }
        }
        let end = top + 320.0;
        text(
            root,
            "first layer",
            left + 14.0,
            end + 12.0,
            FONT - 1.0,
            HPos::Left,
            VPos::Center,
        )?;
        text(
            root,
            "last layer",
            right - 14.0,
            end + 12.0,
            FONT - 1.0,
            HPos::Right,
            VPos::Center,
        )?;
        text(
            root,
            "depth",
            (left + right) / 2.0,
            end + 32.0,
            FONT,
            HPos::Center,
            VPos::Center,
        )?;
        text_upwards(root, y_title, 12.0, top + 160.0, FONT, HPos::Center)
    })
}

/// A matrix of values between 0 and 1 in viridis, first row at the bottom, with the names of the rows and columns; NaN
/// stays empty.
///
/// # Errors
/// [`Error::Run`] where the matrix does not fit the names.
pub fn heat_map(
    title: &str,
    (rows, columns): (&[String], &[String]),
    (y_title, x_title): (&str, &str),
    values: &[f64],
) -> Result<Svg> {
    let (r, c) = (rows.len(), columns.len());
    if r * c != values.len() || values.is_empty() {
        return Err(Error::run(format!(
            "{title}: {} values for {r} x {c}",
            values.len()
        )));
    }
    let cell = (560.0 / r.max(c) as f64).clamp(6.0, 52.0);
    let small =
        |names: &[String]| -> Vec<String> { names.iter().map(|n| shorten(n, 18)).collect() };
    let (rows, columns) = (small(rows), small(columns));
    let size = (cell - 3.0).clamp(7.0, FONT - 1.0);
    let longest = |names: &[String]| {
        names
            .iter()
            .map(|n| text_width(n, size))
            .fold(0.0, f64::max)
    };
    let (left, top) = (40.0 + longest(&rows), 10.0);
    let (w, h) = (cell * c as f64, cell * r as f64);
    let bottom = 44.0 + longest(&columns);
    let bar = 84.0;
    draw(
        title,
        (left + w + bar) as u32,
        (top + h + bottom) as u32,
        |root| {
            let rect = |x: f64, y: f64, w: f64, h: f64, v: f64| {
                let colour = ViridisRGB::get_color(v.clamp(0.0, 1.0));
                let corners = [(z(x), z(y)), (z(x + w), z(y + h))];
                root.draw(&Rectangle::new(corners, colour.filled()))
                    .map_err(failed)
            };
            for i in 0..r {
                let y = top + h - (i + 1) as f64 * cell;
                text(
                    root,
                    &rows[i],
                    left - 6.0,
                    y + cell / 2.0,
                    size,
                    HPos::Right,
                    VPos::Center,
                )?;
                for j in 0..c {
                    let v = values[i * c + j];
                    if v.is_finite() {
                        let x = left + j as f64 * cell;
                        rect(x, y, cell, cell, v)?;
                        if cell >= 30.0 {
                            let style = text_style(FONT - 2.0, HPos::Center, VPos::Center);
                            let style = if v < 0.6 {
                                style.color(&WHITE)
                            } else {
                                style.color(&BLACK)
                            };
                            let at = (z(x + cell / 2.0), z(y + cell / 2.0));
                            root.draw(&Text::new(format!("{v:.2}"), at, style))
                                .map_err(failed)?;
                        }
                    }
                }
            }
            for (j, name) in columns.iter().enumerate() {
                let x = left + (j as f64 + 0.5) * cell;
                text_upwards(root, name, x, top + h + 6.0, size, HPos::Right)?;
            }
            text(
                root,
                &shorten(x_title, 60),
                left + w / 2.0,
                top + h + bottom - 14.0,
                FONT,
                HPos::Center,
                VPos::Center,
            )?;
            let title = shorten(y_title, 60);
            text_upwards(root, &title, 12.0, top + h / 2.0, FONT, HPos::Center)?;
            let x = left + w + 18.0;
            for i in 0..64 {
                let share = f64::from(i) / 64.0;
                rect(
                    x,
                    top + h * (1.0 - share) - h / 64.0,
                    14.0,
                    h / 64.0 + 0.5,
                    share,
                )?;
            }
            for v in [0.0, 0.5, 1.0] {
                text(
                    root,
                    &format!("{v:.1}"),
                    x + 20.0,
                    top + h * (1.0 - v),
                    FONT - 1.0,
                    HPos::Left,
                    VPos::Center,
                )?;
            }
            Ok(())
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_matrices_are_drawn() {
        let series = [
            LayerSeries {
                name: "vit",
                family: Family::Vit,
                layers: vec![vec![10.0, 80.0], vec![60.0, 90.0]],
            },
            LayerSeries {
                name: "cnn",
                family: Family::Cnn,
                layers: vec![vec![11.0], vec![f64::NAN], vec![435.0]],
            },
        ];
        let svg = over_depth("distance", "pixels", &series)
            .unwrap()
            .standalone();
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(over_depth("none", "", &[]).is_err());
        let names = |n: usize| (0..n).map(|i| format!("layer{i}")).collect::<Vec<_>>();
        let svg = heat_map(
            "cka",
            (&names(2), &names(3)),
            ("a", "b"),
            &[1.0, 0.5, 0.0, 0.2, f64::NAN, 1.0],
        );
        assert!(svg.unwrap().inline().contains("layer2"));
        assert!(heat_map("cka", (&names(2), &names(3)), ("a", "b"), &[1.0]).is_err());
    }
}
