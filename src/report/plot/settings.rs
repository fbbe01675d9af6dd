//! One value with its interval for each of several settings, and two values against each other.

use super::*;

/// One setting.
#[derive(Clone, Debug)]
pub struct Setting<'a> {
    /// Its name.
    pub name: &'a str,
    /// Colour.
    pub family: Family,
    /// The value.
    pub mean: f64,
    /// Half the width of its interval; NaN where there is none.
    pub half: f64,
}

/// 1, 2 or 5 times a power of ten, at least `v`.
pub(super) fn nice(v: f64) -> f64 {
    let power = 10f64.powf(v.log10().floor());
    let lead = v / power;
    let fits = |l: &f64| lead <= l + 1e-9;
    power * [1.0, 2.0, 5.0].into_iter().find(fits).unwrap_or(10.0)
}

/// A point with whiskers in a row for each setting, in the order given. Values lie within `bounds`: whiskers end there.
///
/// # Errors
/// [`Error::Input`] where no value is finite.
pub fn dots(title: &str, x_title: &str, bounds: (f64, f64), settings: &[Setting]) -> Result<Svg> {
    const ROW: f64 = 24.0;
    let half = |s: &Setting| if s.half.is_finite() { s.half } else { 0.0 };
    let ends = |s: &Setting| {
        let clamped = |v: f64| v.clamp(bounds.0, bounds.1);
        (clamped(s.mean - half(s)), clamped(s.mean + half(s)))
    };
    let finite = || settings.iter().filter(|s| s.mean.is_finite());
    let low = finite().map(|s| ends(s).0).fold(f64::INFINITY, f64::min);
    let high = finite()
        .map(|s| ends(s).1)
        .fold(f64::NEG_INFINITY, f64::max);
    if low > high {
        return Err(Error::input(format!("{title}: no values to draw")));
    }
    let step = nice(((high - low) / 6.0).max(high.abs() * 1e-3).max(1e-6));
    let (low, high) = (
        (low / step).floor() * step - step / 2.0,
        (high / step).ceil() * step + step / 2.0,
    );
    let names: Vec<String> = settings.iter().map(|s| shorten(s.name, 56)).collect();
    let longest = names
        .iter()
        .map(|n| text_width(n, FONT))
        .fold(0.0, f64::max);
    let (left, right) = ((longest + 16.0).min(420.0), f64::from(WIDTH) - 70.0);
    let (top, end) = (8.0, 8.0 + ROW * settings.len() as f64);
    let at = |v: f64| left + (v - low) / (high - low) * (right - left);
    draw(title, WIDTH, (end + 48.0) as u32, |root| {
        let grid = INK.mix(0.12).stroke_width(z(1.0) as u32);
        let decimals = (-step.log10().floor()).clamp(0.0, 4.0) as usize;
        // Minus zero would be printed as such.
        let mut tick = (low / step).ceil() * step + 0.0;
        while tick <= high + 1e-9 {
            let x = at(tick);
            root.draw(&PathElement::new(
                vec![(z(x), z(top)), (z(x), z(end))],
                grid,
            ))
            .map_err(failed)?;
            text(
                root,
                &format!("{tick:.decimals$}"),
                x,
                end + 10.0,
                FONT - 1.0,
                HPos::Center,
                VPos::Center,
            )?;
            tick += step;
        }
        for (i, (s, name)) in settings.iter().zip(&names).enumerate() {
            let y = top + (i as f64 + 0.5) * ROW;
            text(root, name, left - 8.0, y, FONT, HPos::Right, VPos::Center)?;
            if !s.mean.is_finite() {
                continue;
            }
            let colour = rgb(s.family.colour(0));
            let (from, to) = (at(ends(s).0), at(ends(s).1));
            let line = vec![(z(from), z(y)), (z(to), z(y))];
            root.draw(&PathElement::new(
                line,
                colour.mix(0.6).stroke_width(z(2.4) as u32),
            ))
            .map_err(failed)?;
            root.draw(&Circle::new((z(at(s.mean)), z(y)), z(4.5), colour.filled()))
                .map_err(failed)?;
            let shown = format!("{:.*}", decimals + 1, s.mean);
            text(
                root,
                &shown,
                to + 10.0,
                y,
                FONT - 1.0,
                HPos::Left,
                VPos::Center,
            )?;
        }
        text(
            root,
            x_title,
            (left + right) / 2.0,
            end + 32.0,
            FONT,
            HPos::Center,
            VPos::Center,
        )
    })
}

/// One point a setting: `x` (logarithmic) against `mean`, named beside.
///
/// # Errors
/// [`Error::Input`] where no point can be drawn.
pub fn against(
    title: &str,
    (x_title, y_title): (&str, &str),
    points: &[(Setting, f64)],
) -> Result<Svg> {
    const HEIGHT: f64 = 340.0;
    let good: Vec<&(Setting, f64)> = points
        .iter()
        .filter(|(s, x)| s.mean.is_finite() && *x > 0.0)
        .collect();
    let range = |values: &[f64]| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        (
            low,
            values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        )
    };
    let (x0, x1) = range(&good.iter().map(|p| p.1.log10()).collect::<Vec<_>>());
    let (y0, y1) = range(&good.iter().map(|p| p.0.mean).collect::<Vec<_>>());
    if good.is_empty() {
        return Err(Error::input(format!("{title}: no values to draw")));
    }
    let (x0, x1) = (x0 - 0.1, x1 + 0.25 * (x1 - x0).max(0.4));
    let step = nice(((y1 - y0) / 5.0).max(y1.abs() * 1e-3).max(1e-6));
    let (y0, y1) = (
        (y0 / step).floor() * step,
        (y1 / step).ceil() * step + step / 4.0,
    );
    let (left, right, top) = (64.0, f64::from(WIDTH) - 16.0, 10.0);
    let x_at = |x: f64| left + (x - x0) / (x1 - x0) * (right - left);
    let y_at = |y: f64| top + HEIGHT * (1.0 - (y - y0) / (y1 - y0));
    draw(title, WIDTH, (top + HEIGHT + 52.0) as u32, |root| {
        let decimals = (-step.log10().floor()).clamp(0.0, 4.0) as usize;
        value_grid(root, (left, right), (y0, y1, step), decimals, y_at)?;
        for power in x0.floor() as i32..=x1.ceil() as i32 {
            for lead in [1.0, 2.0, 5.0] {
                let v = lead * 10f64.powi(power);
                if (x0..=x1).contains(&v.log10()) {
                    let shown = super::super::table::si(v);
                    text(
                        root,
                        &shown,
                        x_at(v.log10()),
                        top + HEIGHT + 12.0,
                        FONT - 1.0,
                        HPos::Center,
                        VPos::Center,
                    )?;
                }
            }
        }
        let dots: Vec<(f64, f64)> = good
            .iter()
            .map(|(s, x)| (x_at(x.log10()), y_at(s.mean)))
            .collect();
        let names: Vec<String> = good.iter().map(|(s, _)| shorten(s.name, 40)).collect();
        let labels = beside(&dots, &names, ((left, right), (top, top + HEIGHT)));
        for (&(x, y), l) in dots.iter().zip(&labels) {
            if (l.y - y).abs() > LINE {
                let end = if l.from > x { l.from - 2.0 } else { l.to + 2.0 };
                let thin = INK.mix(0.35).stroke_width(z(1.0) as u32);
                let line = vec![(z(x), z(y)), (z(end), z(l.y))];
                root.draw(&PathElement::new(line, thin)).map_err(failed)?;
            }
        }
        for (((s, _), &(x, y)), (l, name)) in good.iter().zip(&dots).zip(labels.iter().zip(&names))
        {
            root.draw(&Circle::new(
                (z(x), z(y)),
                z(5.0),
                rgb(s.family.colour(0)).mix(0.85).filled(),
            ))
            .map_err(failed)?;
            text(root, name, l.from, l.y, LABEL, HPos::Left, VPos::Center)?;
        }
        text(
            root,
            x_title,
            (left + right) / 2.0,
            top + HEIGHT + 36.0,
            FONT,
            HPos::Center,
            VPos::Center,
        )?;
        text_upwards(root, y_title, 12.0, top + HEIGHT / 2.0, FONT, HPos::Center)
    })
}

/// Size of a point's name, and the height of its line.
const LABEL: f64 = FONT - 2.0;
const LINE: f64 = LABEL + 2.0;

/// Where a point's name stands: from `from` to `to`, around height `y`.
#[derive(Clone, Copy, Debug)]
struct Label {
    from: f64,
    to: f64,
    y: f64,
}

/// A place for each name near its dot, right of it or left, as few lines up or down as it takes for no two names to
/// overlap, nor a name and a dot.
fn beside(
    dots: &[(f64, f64)],
    names: &[String],
    ((left, right), (top, end)): ((f64, f64), (f64, f64)),
) -> Vec<Label> {
    const GAP: f64 = 9.0;
    let shifts = |n: usize| {
        let way = if n % 2 == 1 { -0.5 } else { 0.5 };
        way * LINE * n.div_ceil(2) as f64
    };
    let mut placed: Vec<Option<Label>> = vec![None; dots.len()];
    let mut order: Vec<usize> = (0..dots.len()).collect();
    order.sort_by(|&a, &b| dots[a].1.total_cmp(&dots[b].1));
    for i in order {
        let (x, y) = dots[i];
        let width = text_width(&names[i], LABEL);
        let at = |n: usize, side: usize| {
            let from = if side == 0 { x + GAP } else { x - GAP - width };
            Label {
                from,
                to: from + width,
                y: y + shifts(n),
            }
        };
        let free = |l: &Label| {
            let inside = l.from >= left
                && l.to <= right
                && l.y - LINE / 2.0 >= top
                && l.y + LINE / 2.0 <= end;
            let names = placed.iter().flatten();
            let mut rivals = names.filter(|o| l.from < o.to && o.from < l.to);
            let mut hit = dots.iter().filter(|d| {
                (d.1 - l.y).abs() < LINE / 2.0 + 3.0 && d.0 + 5.0 > l.from && d.0 - 5.0 < l.to
            });
            inside && rivals.all(|o| (o.y - l.y).abs() >= LINE) && hit.next().is_none()
        };
        let tried = (0..4 * dots.len() + 4).flat_map(|n| [at(n, 0), at(n, 1)]);
        placed[i] = Some(tried.into_iter().find(free).unwrap_or_else(|| at(0, 0)));
    }
    placed.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_near_points_do_not_overlap() {
        let dots: Vec<(f64, f64)> = (0..12)
            .map(|i| (300.0 + f64::from(i % 2), 150.0 + 2.0 * f64::from(i)))
            .collect();
        let names: Vec<String> = (0..12).map(|i| format!("ViT, setting {i}")).collect();
        let labels = beside(&dots, &names, ((64.0, 880.0), (10.0, 350.0)));
        assert_eq!(labels.len(), 12);
        for (i, a) in labels.iter().enumerate() {
            assert!(a.from >= 64.0 && a.to <= 880.0 && a.y >= 10.0 && a.y <= 350.0);
            for b in &labels[..i] {
                let apart = a.from >= b.to || b.from >= a.to || (a.y - b.y).abs() >= LINE;
                assert!(apart, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn every_setting_is_drawn() {
        let one = |name, mean, half| Setting {
            name,
            family: Family::Vit,
            mean,
            half,
        };
        let all = [
            one("a <1>", 80.0, 1.0),
            one("b", 81.5, f64::NAN),
            one("c", f64::NAN, 0.0),
        ];
        let svg = dots("t", "top-1 (%)", (0.0, 100.0), &all)
            .unwrap()
            .standalone();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a &lt;1&gt;"));
        assert!(dots("t", "", (0.0, 1.0), &all[2..]).is_err());
        let points: Vec<(Setting, f64)> = all.iter().map(|s| (s.clone(), 1e6)).collect();
        let svg = against("t", ("parameters", "top-1 (%)"), &points)
            .unwrap()
            .inline();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert_eq!([nice(0.3), nice(7.0), nice(2.0)], [0.5, 10.0, 2.0]);
    }
}
