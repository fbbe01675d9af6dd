//! The picture of `lab`'s screen. Colours are the terminal's own, on its own background, and never say what words do not.

use super::app::App;
use super::probe::{Figure, Outcome};
use super::versions::{Version, Versions, change, verdict};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Clear, Paragraph};
use tilewright::bench::record::Verdict;
use tilewright::report::table::{number, si};

const PLAIN: Style = Style::new();
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().add_modifier(Modifier::DIM);
const GOOD: Style = Style::new().fg(Color::Green);
const BAD: Style = Style::new().fg(Color::Red);

/// Keys, in the order in which a narrow terminal drops them from the end; `? help` stays.
const KEYS: [(&str, &str); 6] = [
    ("q", "quit"),
    ("r", "run again"),
    ("b", "base"),
    ("c", "next case"),
    ("↑↓", "scroll"),
    ("PgUp PgDn", "versions"),
];

const HELP: [&str; 14] = [
    "Save a kernel: it is compiled, checked, measured.",
    "",
    "q  Esc     quit",
    "Ctrl-C     quit, with status 130",
    "r          run the same kernels again",
    "b          compare with the present version, not",
    "           the one before; again: undo",
    "c  C       next case of this op, the one before",
    "↑ ↓        scroll the verdict",
    "PgUp PgDn  scroll the versions",
    "",
    "within noise: the 95 % intervals overlap.",
    "roofline: share of the device's limit, if `bench`",
    "has measured that before.",
];

/// Draws everything; scroll positions beyond the end come back to it.
pub fn draw(f: &mut Frame, app: &mut App) {
    let area = f.area();
    let versions = app.seen.get(&app.params);
    let newest = versions.and_then(|v| v.all.last());
    let width = usize::from(area.width);
    let verdict = newest.map_or_else(|| vec![Line::styled("not yet", FAINT)], |v| told(v, width));
    let right = newest.is_some_and(|v| v.figures().is_some());
    let (title, figures) = versions.map_or_else(Default::default, |v| kernels(v, width));
    let history = versions.map_or_else(Vec::new, |v| history(v, width));

    let head = area.height.min(2);
    let foot = u16::from(area.height > 3);
    let rest = area.height - head - foot;
    // A section is a rule and its lines. What is wrong is more important than what was right before.
    let most = if right { rest / 2 } else { rest * 2 / 3 };
    let lines = |n: usize| u16::try_from(n + 1).unwrap_or(u16::MAX);
    let first = lines(verdict.len()).min(most.max(2)).min(rest);
    let second = match figures.is_empty() {
        true => 0,
        false => lines(figures.len()).min(rest - first),
    };
    let third = rest - first - second;
    let [a, b, c, d, e] = Layout::vertical([
        Constraint::Length(head),
        Constraint::Length(first),
        Constraint::Length(second),
        Constraint::Length(third),
        Constraint::Length(foot),
    ])
    .areas(area);

    f.render_widget(Paragraph::new(header(app)), a);
    let title_of = newest.map_or_else(|| " verdict ".into(), |v| title_of(app, v));
    app.line = section(f, b, &title_of, &[], &verdict, app.line, "↑↓");
    let (heading, rows) = figures.split_at(figures.len().min(1));
    section(f, c, &title, heading, rows, 0, "");
    if !history.is_empty() {
        let (heading, rows) = history.split_at(1);
        let title = " versions, newest first ";
        app.older = section(f, d, title, heading, rows, app.older, "PgUp PgDn");
    }
    f.render_widget(Paragraph::new(footer(width)), e);
    if app.help {
        help(f, area);
    }
}

/// A rule with a title, lines that stay and lines that scroll; the first line that is shown.
fn section(
    f: &mut Frame,
    area: Rect,
    title: &str,
    heading: &[Line<'static>],
    lines: &[Line<'static>],
    first: usize,
    keys: &str,
) -> usize {
    if area.height < 2 {
        return 0;
    }
    let room = usize::from(area.height - 1).saturating_sub(heading.len());
    let first = first.min(lines.len().saturating_sub(room));
    let last = lines.len().min(first + room);
    let mut rule = Block::new().borders(Borders::TOP).border_style(FAINT);
    let mut width = usize::from(area.width);
    if last - first < lines.len() && !keys.is_empty() {
        let more = format!(" {}-{last} of {}, {keys} ", first + 1, lines.len());
        width = width.saturating_sub(more.chars().count());
        rule = rule.title(Line::styled(more, FAINT).right_aligned());
    }
    let title: String = title.chars().take(width).collect();
    rule = rule.title(Line::styled(title, BOLD));
    let shown = [heading, &lines[first..last]].concat();
    f.render_widget(Paragraph::new(shown).block(rule), area);
    first
}

fn header(app: &App) -> Vec<Line<'static>> {
    let newest = app.seen.values().filter_map(|v| v.all.last());
    let device = newest.map(|v| v.device.clone()).find(|d| !d.is_empty());
    let device = device.map_or(String::new(), |d| format!(": {d}"));
    let first = Line::from(vec![
        Span::styled(format!("{}({})", app.op, app.params), BOLD),
        Span::raw(format!(" on {}{device}", app.backend)),
    ]);
    let (state, more) = match &app.busy {
        None => ("watching", app.dir.clone()),
        Some(busy) => {
            let seconds = number(busy.since.elapsed().as_secs_f64(), 1);
            let more = match after_save(&busy.what) {
                true => format!("{}, {seconds} s after the save", busy.what),
                false => format!("{}, {seconds} s", busy.what),
            };
            (busy.stage.text(), more)
        }
    };
    let badge = Style::new().add_modifier(Modifier::REVERSED);
    let second = Line::from(vec![
        Span::styled(format!(" {state} "), badge),
        Span::raw(format!(" {more}")),
    ]);
    vec![first, second]
}

/// Whether a version came of a save.
fn after_save(what: &str) -> bool {
    !matches!(what, "as it is" | "again")
}

fn title_of(app: &App, v: &Version) -> String {
    let n = app.versions().map_or(0, |v| v.all.len());
    let seconds = number(v.seconds, 2);
    match after_save(&v.what) {
        true => format!(" v{n}: {}, {seconds} s after the save ", v.what),
        false => format!(" v{n}: {}, in {seconds} s ", v.what),
    }
}

/// A version's verdict in a word, and how it looks.
fn word(outcome: &Outcome) -> (&'static str, Style) {
    let bold = |s: Style| s.add_modifier(Modifier::BOLD);
    match outcome {
        Outcome::Right { .. } => ("RIGHT", bold(GOOD)),
        Outcome::Wrong(_) => ("WRONG", bold(BAD)),
        Outcome::Broken(_) => ("DOES NOT RUN", bold(Style::new().fg(Color::Magenta))),
    }
}

/// The verdict in full, wrapped.
fn told(v: &Version, width: usize) -> Vec<Line<'static>> {
    let (word, style) = word(&v.outcome);
    let text = match &v.outcome {
        Outcome::Right { worst, .. } => {
            format!(
                "{word}, worst error {} of what is allowed",
                number(*worst, 3)
            )
        }
        Outcome::Wrong(why) | Outcome::Broken(why) => format!("{word}\n{why}"),
    };
    // A tab's width is the terminal's affair; a picture has none.
    let text = text.replace('\t', "    ");
    let wrapped = textwrap::wrap(&text, width.max(8));
    let lines = wrapped.into_iter().enumerate().map(|(i, line)| {
        match line.strip_prefix(word).filter(|_| i == 0) {
            Some(rest) => Line::from(vec![Span::styled(word, style), Span::raw(rest.to_string())]),
            None => Line::raw(line.into_owned()),
        }
    });
    lines.collect()
}

/// A column of a table: heading first.
struct Column {
    cells: Vec<Span<'static>>,
    left: bool,
    /// Columns of high rank go first where the terminal is narrow.
    rank: u8,
}

impl Column {
    fn new(heading: &str, rank: u8, cells: impl IntoIterator<Item = (String, Style)>) -> Column {
        let heading = Span::styled(heading.to_string(), FAINT);
        let cells = cells.into_iter().map(|(s, style)| Span::styled(s, style));
        Column {
            cells: std::iter::once(heading).chain(cells).collect(),
            left: false,
            rank,
        }
    }

    fn left(mut self) -> Column {
        self.left = true;
        self
    }

    fn width(&self) -> usize {
        self.cells.iter().map(Span::width).max().unwrap_or(0)
    }
}

/// The columns that fit, beside each other; the first line is the headings. And the width that is left.
fn grid(mut columns: Vec<Column>, width: usize) -> (Vec<Line<'static>>, usize) {
    const GAP: usize = 2;
    let wide = |c: &[Column]| c.iter().map(|c| c.width() + GAP).sum::<usize>() - GAP;
    while columns.len() > 1 && wide(&columns) > width {
        let most = columns.iter().map(|c| c.rank).max();
        let last = columns.iter().rposition(|c| Some(c.rank) == most);
        columns.remove(last.unwrap_or(0));
    }
    let rows = columns.first().map_or(0, |c| c.cells.len());
    let line = |row: usize| {
        let mut line = Line::default();
        for (i, c) in columns.iter().enumerate() {
            let cell = c.cells[row].clone();
            let pad = " ".repeat(c.width() - cell.width());
            if i > 0 {
                line.push_span(" ".repeat(GAP));
            }
            match c.left {
                true => line.extend([cell, pad.into()]),
                false => line.extend([pad.into(), cell]),
            }
        }
        line
    };
    let left = width.saturating_sub(wide(&columns) + GAP);
    ((0..rows).map(line).collect(), left)
}

/// A change in per cent and in a word.
fn changed(now: &Figure, then: Option<&Figure>) -> (String, Style) {
    let Some(then) = then else {
        return ("-".into(), FAINT);
    };
    let counted = now.time.is_none();
    let (text, style) = match verdict(then, now) {
        Verdict::Faster if counted => ("fewer", GOOD),
        Verdict::Slower if counted => ("more", BAD),
        Verdict::Faster => ("faster", GOOD),
        Verdict::Slower => ("slower", BAD),
        _ if counted => ("the same", PLAIN),
        _ => ("within noise", PLAIN),
    };
    (
        format!("{} {text}", change(now.value, Some(then.value))),
        style,
    )
}

/// Milliseconds with four digits or so; counts in full.
fn value(v: f64, counts: bool) -> String {
    match v {
        _ if counts => number(v, 0),
        ..10.0 => number(v, 4),
        ..1000.0 => number(v, 2),
        _ => number(v, 0),
    }
}

/// The newest right version op by op: title and table.
fn kernels(versions: &Versions, width: usize) -> (String, Vec<Line<'static>>) {
    let Some((i, figures)) = versions
        .newest_right()
        .and_then(|i| Some((i, versions.all[i].figures()?)))
    else {
        return Default::default();
    };
    let then = versions.reference(i);
    let before = then.and_then(|t| versions.all[t].figures());
    let counts = figures.values().any(|f| f.counted.is_some());
    let each = |cell: &dyn Fn(&str, &Figure) -> (String, Style)| {
        let cells = figures.iter().map(|(op, f)| cell(op, f));
        cells.collect::<Vec<_>>()
    };
    let plain = |cell: &dyn Fn(&Figure) -> String| each(&|_, f| (cell(f), PLAIN));
    let unit = if counts { "instructions" } else { "ms" };
    let mut columns = vec![
        Column::new("op", 0, each(&|op, _| (op.into(), PLAIN))).left(),
        Column::new(unit, 0, each(&|_, f| (value(f.value, counts), BOLD))),
    ];
    if counts {
        let counter = |count: fn(&tilewright::profile::Counted) -> String| {
            plain(&|f| f.counted.as_ref().map_or("-".into(), count))
        };
        columns.extend([
            Column::new(
                "bank conflicts",
                3,
                counter(|c| c.bank_conflicts.to_string()),
            ),
            Column::new(
                "sectors/load",
                4,
                counter(|c| number(c.sectors_per_load, 1)),
            ),
            Column::new(
                "global bytes",
                5,
                counter(|c| format!("{}B", si(c.global_bytes as f64))),
            ),
            Column::new("barriers", 6, counter(|c| c.barriers.to_string())),
        ]);
    } else {
        let spread = |f: &Figure| f.time.map_or(f64::NAN, |t| 100.0 * t.spread());
        let rate = |n: u64, f: &Figure| match n {
            0 => "-".into(),
            n => number(n as f64 / f.value / 1e6, 2),
        };
        columns.push(Column::new("± %", 4, plain(&|f| number(spread(f), 1))));
        columns.push(Column::new("GFLOP/s", 5, plain(&|f| rate(f.flops, f))));
        columns.push(Column::new("GB/s", 6, plain(&|f| rate(f.bytes, f))));
        if figures.values().any(|f| f.roofline.is_some()) {
            let share = |f: &Figure| f.roofline.map_or("-".into(), percent);
            columns.push(Column::new("roofline", 3, plain(&share)));
        }
    }
    let compared = then.map_or("to the one before".into(), |t| format!("to v{}", t + 1));
    columns.push(Column::new(
        &compared,
        1,
        each(&|op, f| changed(f, before.and_then(|b| b.get(op)))),
    ));
    columns.push(Column::new(
        "to the best",
        2,
        each(&|op, f| changed(f, versions.best_before(i, op))),
    ));
    let newest = match i + 1 == versions.all.len() {
        true => "",
        false => ", the newest that is right",
    };
    let beside = match (then, versions.base) {
        (Some(t), None) => format!(" beside v{}", t + 1),
        (Some(t), Some(_)) => format!(" beside the base, v{}", t + 1),
        (None, Some(_)) => ", the base".into(),
        (None, None) => String::new(),
    };
    let title = format!(" kernels of v{}{newest}{beside} ", i + 1);
    (title, grid(columns, width).0)
}

fn percent(share: f64) -> String {
    format!("{} %", number(100.0 * share, 0))
}

/// Every version, newest first, with a bar of its total.
fn history(versions: &Versions, width: usize) -> Vec<Line<'static>> {
    let all: Vec<(usize, &Version)> = versions.all.iter().enumerate().rev().collect();
    let counts = |v: &Version| {
        v.figures()
            .is_some_and(|f| f.values().any(|f| f.counted.is_some()))
    };
    let counts = all.iter().any(|(_, v)| counts(v));
    let best = versions.best();
    let each = |cell: &dyn Fn(usize, &Version) -> (String, Style)| {
        all.iter().map(|&(i, v)| cell(i, v)).collect::<Vec<_>>()
    };
    let total = |i: usize| versions.all[i].total();
    let mark = |i: usize| match (versions.base == Some(i), best == Some(i)) {
        (true, true) => "base, best",
        (true, false) => "base",
        (false, true) => "best",
        _ => "",
    };
    let shown = |v: Option<f64>| v.map_or("-".into(), |v| value(v, counts));
    let to_reference = |i: usize| match (total(i), versions.reference(i)) {
        (Some(now), Some(then)) => change(now, total(then)),
        _ => "-".into(),
    };
    let title = match versions.base {
        Some(b) => format!("to v{}", b + 1),
        None => "change".into(),
    };
    let columns = vec![
        Column::new("", 0, each(&|i, _| (format!("v{}", i + 1), PLAIN))),
        Column::new("saved", 4, each(&|_, v| (short(&v.what), PLAIN))).left(),
        Column::new("verdict", 0, {
            each(&|_, v| {
                let (word, style) = word(&v.outcome);
                (word.into(), style)
            })
        })
        .left(),
        Column::new(
            if counts { "instructions" } else { "ms" },
            1,
            each(&|i, _| (shown(total(i)), PLAIN)),
        ),
        Column::new(&title, 2, each(&|i, _| (to_reference(i), PLAIN))),
        Column::new("", 3, each(&|i, _| (mark(i).into(), BOLD))).left(),
    ];
    let (mut lines, left) = grid(columns, width);
    const LEAST: usize = 6;
    const MOST: usize = 40;
    if left >= LEAST {
        let most = all.iter().filter_map(|(_, v)| v.total());
        let most = most.fold(0.0, f64::max);
        for (line, (_, v)) in lines.iter_mut().skip(1).zip(&all) {
            let share = v.total().map_or(0.0, |t| t / most);
            line.push_span(format!("  {}", bar(share, left.min(MOST))));
        }
    }
    lines
}

/// The first of many saved files.
fn short(what: &str) -> String {
    const MOST: usize = 28;
    let names: Vec<&str> = what.split(", ").collect();
    let mut text = names[0].to_string();
    if text.chars().count() > MOST {
        text = text.chars().take(MOST - 1).chain(['…']).collect();
    }
    match names.len() {
        1 => text,
        n => format!("{text} and {} more", n - 1),
    }
}

/// A bar in eighths of a character.
fn bar(share: f64, width: usize) -> String {
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * 8.0 * width as f64).round() as usize;
    format!("{}{}", "█".repeat(eighths / 8), PARTS[eighths % 8])
}

fn footer(width: usize) -> Line<'static> {
    let spans = |(key, what): (&'static str, &'static str)| {
        [
            Span::styled(key, BOLD),
            Span::raw(format!(" {what}")),
            Span::raw("   "),
        ]
    };
    let wide = |spans: &[Span]| spans.iter().map(Span::width).sum::<usize>();
    let help = spans(("?", "help"));
    let mut line = vec![];
    for key in KEYS {
        let more = spans(key);
        if wide(&line) + wide(&more) + wide(&help[..2]) > width {
            break;
        }
        line.extend(more);
    }
    line.extend(help);
    Line::from(line)
}

/// The keys explained, over the rest.
fn help(f: &mut Frame, area: Rect) {
    let widest = HELP.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    let width = (widest as u16 + 4).min(area.width);
    let height = (HELP.len() as u16 + 2).min(area.height);
    let place = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    let lines: Vec<Line> = HELP.iter().map(|l| Line::raw(format!(" {l}"))).collect();
    let block = Block::bordered().title(Line::styled(" any key goes back ", BOLD));
    f.render_widget(Clear, place);
    f.render_widget(Paragraph::new(lines).block(block), place);
}

#[cfg(test)]
mod tests {
    use super::super::app::tests::app;
    use super::super::probe::{Figures, Stage};
    use super::super::versions::tests::{right, version};
    use super::super::watch::Event;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use std::time::Instant;

    fn screen(app: &mut App, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|f| draw(f, app)).unwrap();
        let buffer = terminal.backend().buffer();
        let rows = buffer.content.chunks(usize::from(width).max(1));
        let row = |r: &[ratatui::buffer::Cell]| {
            let text: String = r.iter().map(|c| c.symbol()).collect();
            text.trim_end().to_string() + "\n"
        };
        rows.map(row).collect()
    }

    fn says(text: &str, all: &[&str]) {
        for what in all {
            assert!(text.contains(what), "no {what:?} in\n{text}");
        }
    }

    fn ops(a: f64, b: f64) -> Version {
        right(
            "layer_norm.wgsl",
            &[("layer_norm", a), ("layer_norm_bwd", b)],
        )
    }

    /// Right, wrong, broken.
    fn three() -> App {
        let mut app = app();
        app.take(Event::Done(right("as it is", &[("layer_norm", 0.5)])));
        let wrong = Outcome::Wrong("y0[1, 2, 3] is 2, the reference says 1: off by 1".into());
        app.take(Event::Done(version("layer_norm.wgsl", wrong)));
        let fault = "shaders/layer_norm.wgsl:41: no definition in scope for identifier: `nothing`";
        let broken = Outcome::Broken(format!("{fault}\n  | let a = nothing;"));
        app.take(Event::Done(version("layer_norm.wgsl", broken)));
        app
    }

    #[test]
    fn a_right_version_stands_beside_the_one_before() {
        let mut app = app();
        says(
            &screen(&mut app, 100, 30),
            &["not yet", "watching", "? help"],
        );
        app.take(Event::Done(right(
            "as it is",
            &[("layer_norm", 0.5), ("layer_norm_bwd", 1.0)],
        )));
        app.take(Event::Done(ops(0.4, 1.01)));
        let text = screen(&mut app, 100, 30);
        says(
            &text,
            &[
                "layer_norm(n=2,t=3,c=5) on wgpu: llvmpipe",
                " watching  shaders",
                "v2: layer_norm.wgsl, 0.31 s after the save",
                "RIGHT, worst error 0.125 of what is allowed",
                "kernels of v2 beside v1",
                "0.4000",
                "-20.0 % faster",
                "+1.0 % within noise",
                "2.50",
                "25 %",
                "v1  as it is",
                "-6.0 %",
                "best",
                "████",
            ],
        );
        app.seen.get_mut("n=2,t=3,c=5").unwrap().base = Some(0);
        says(&screen(&mut app, 100, 30), &["beside the base, v1", "base"]);
    }

    #[test]
    fn what_is_wrong_or_broken_is_told_with_its_place() {
        let mut app = three();
        let text = screen(&mut app, 100, 30);
        says(
            &text,
            &[
                "DOES NOT RUN",
                "shaders/layer_norm.wgsl:41: no definition",
                "| let a = nothing;",
                "kernels of v1, the newest that is right",
                "WRONG",
            ],
        );
        app.seen.get_mut("n=2,t=3,c=5").unwrap().all.pop();
        says(
            &screen(&mut app, 100, 30),
            &["v2: layer_norm.wgsl", "y0[1, 2, 3] is 2"],
        );
    }

    #[test]
    fn a_look_under_way_has_its_stage_and_its_clock() {
        let mut app = three();
        app.take(Event::Begun {
            what: "layer_norm.wgsl".into(),
            since: Instant::now(),
        });
        app.take(Event::Stage(Stage::Measuring));
        says(
            &screen(&mut app, 80, 24),
            &[" measuring  layer_norm.wgsl, 0.0 s after the save"],
        );
    }

    #[test]
    fn a_small_terminal_shows_the_verdict_and_scrolls() {
        let mut app = three();
        let text = screen(&mut app, 40, 10);
        says(
            &text,
            &["DOES NOT RUN", "layer_norm.wgsl:41", "q quit", "? help"],
        );
        assert!(text.contains("1-3 of 5, ↑↓"), "{text}");
        app.line = 99;
        says(&screen(&mut app, 40, 10), &["| let a = nothing;"]);
        assert_eq!(app.line, 2);
        for app in [&mut three(), &mut super::super::app::tests::app()] {
            for help in [false, true] {
                app.help = help;
                for width in 0..50 {
                    for height in 0..14 {
                        screen(app, width, height);
                    }
                }
            }
        }
    }

    #[test]
    fn counters_stand_in_place_of_rates() {
        let mut app = app();
        let counted = tilewright::profile::Counted {
            bank_conflicts: 7,
            sectors_per_load: 4.5,
            ..Default::default()
        };
        let figure = Figure {
            value: 4076.0,
            counted: Some(counted),
            ..Figure::default()
        };
        let figures = Figures::from([("layer_norm".to_string(), figure)]);
        let outcome = Outcome::Right {
            worst: 0.1,
            figures,
        };
        app.take(Event::Done(version("as it is", outcome.clone())));
        app.take(Event::Done(version("again", outcome)));
        says(
            &screen(&mut app, 120, 35),
            &[
                "instructions",
                "4076",
                "bank conflicts",
                "4.5",
                "+0.0 % the same",
            ],
        );
    }

    #[test]
    fn bars_and_names_keep_their_widths() {
        assert_eq!(bar(0.5, 4), "██");
        assert_eq!(bar(0.28, 4), "█▏");
        assert_eq!(short("a.wgsl, b.wgsl, c.wgsl"), "a.wgsl and 2 more");
        assert_eq!(short(&"x".repeat(60)).chars().count(), 28);
    }
}
