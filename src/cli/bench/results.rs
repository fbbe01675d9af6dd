//! What `bench` does with results: records, comparisons, pages, the history.

use super::super::global::Global;
use super::super::occupancy;
use super::super::output::{json, note, print};
use super::Bench;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use tilewright::backend::Backend;
use tilewright::bench::Ceilings;
use tilewright::bench::kernel::{KernelOptions, count_variants};
use tilewright::bench::record::{FOLDER, Origin, Record, Row, compare, path_of};
use tilewright::ops::Room;
use tilewright::report::html::{BenchPage, BenchSection};
use tilewright::report::plot::bench::{self as plot, Bar, Roof, RooflinePoint, Series};
use tilewright::report::table::{Table, number};
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// What was done with results beside showing them.
#[derive(Default)]
pub struct After {
    /// The comparison for people.
    pub text: String,
    /// The comparison for programs.
    pub compared: Vec<Value>,
}

fn facts(origin: &Origin) -> Vec<(&'static str, String)> {
    vec![
        ("Device", format!("{}: {}", origin.backend, origin.device)),
        ("Tuned variants", origin.tuned.clone()),
        ("System", origin.system.clone()),
        ("Version", format!("{} {}", origin.version, origin.commit)),
        ("Measured", origin.when.clone()),
    ]
}

fn command() -> String {
    let args: Vec<String> = std::env::args().skip(1).collect();
    format!("tilewright {}", args.join(" "))
}

impl Bench {
    /// Compares, saves and draws, as the flags say.
    pub(super) fn keep(
        &self,
        backend: &dyn Backend,
        ceilings: &Ceilings,
        rows: Vec<Row>,
    ) -> Result<After> {
        let now = Record {
            origin: Origin::of(backend),
            ceilings: ceilings.clone(),
            rows,
        };
        let mut after = After::default();
        if let Some(name) = &self.compare {
            let path = path_of(name);
            let before = Record::load(&path)?;
            let device = |o: &Origin| format!("{} {}", o.backend, o.device);
            if device(&before.origin) != device(&now.origin) {
                return Err(Error::input(format!(
                    "{}: recorded on {}, this is {}; times of two devices are not compared",
                    path.display(),
                    device(&before.origin),
                    device(&now.origin)
                )));
            }
            after = compared(&before, &now.rows);
        }
        if let Some(name) = &self.save {
            let path = path_of(name);
            now.save(&path)?;
            note(&format!("results recorded in {}", path.display()));
        }
        if let Some(path) = &self.html {
            write_atomic(path, page(&now)?.to_html().as_bytes())?;
            note(&format!("page written to {}", path.display()));
        }
        Ok(after)
    }
}

fn compared(before: &Record, now: &[Row]) -> After {
    let mut after = After::default();
    let headings = [
        "case",
        "variant",
        "ms before",
        "ms now",
        "change %",
        "verdict",
    ];
    let mut t = Table::new(headings).left(&[0, 1, 5]);
    for (row, old, verdict) in compare(before, now) {
        let change = old.map(|o| 100.0 * (row.time.median / o.time.median - 1.0));
        t.row([
            row.case.clone(),
            row.variant.clone(),
            old.map_or("-".into(), |o| number(o.time.ms(), 3)),
            number(row.time.ms(), 3),
            change.map_or("-".into(), |c| format!("{c:+.1}")),
            verdict.text().into(),
        ]);
        after.compared.push(json!({
            "case": row.case, "variant": row.variant, "before": old.map(|o| o.time), "now": row.time,
            "verdict": verdict,
        }));
    }
    after.text = format!(
        "\ncompared with commit {} of {}\n{}",
        before.origin.commit,
        before.origin.when,
        t.to_text()
    );
    after
}

fn table(rows: &[Row]) -> Table {
    let headings = [
        "case",
        "variant",
        "ms",
        "± %",
        "GFLOP/s",
        "GB/s",
        "FLOP/byte",
        "% of roofline",
    ];
    let mut t = Table::new(headings).left(&[0, 1]);
    for r in rows {
        let rate = |v: u64| number(v as f64 / r.time.median / 1e9, 1);
        t.row([
            r.case.clone(),
            r.variant.clone(),
            number(r.time.ms(), 3),
            number(100.0 * r.time.spread(), 1),
            rate(r.flops),
            rate(r.bytes),
            number(r.flops as f64 / r.bytes.max(1) as f64, 1),
            number(100.0 * r.roofline, 1),
        ]);
    }
    t
}

/// The roofline plot of the rules' choices, the ladder of all variants, the table.
fn page(record: &Record) -> Result<BenchPage> {
    let c = &record.ceilings;
    let points: Vec<RooflinePoint> = record
        .rows
        .iter()
        .filter(|r| r.variant == "auto")
        .map(|r| RooflinePoint {
            name: r.case.clone(),
            intensity: r.executed as f64 / r.bytes.max(1) as f64,
            flops: r.executed as f64 / r.time.median,
        })
        .collect();
    let roof = Roof {
        flops: c.flops,
        memory: c.memory(),
        cache: c.bandwidth(0),
    };
    let caption = "Operations that each kernel does, a second, over operations per compulsory byte, under the device's \
                   measured limits.";
    let mut sections = vec![BenchSection {
        heading: "Roofline".into(),
        figure: Some((plot::roofline(&points, roof)?, caption.into())),
        table: None,
    }];
    let mut bars: Vec<Bar> = vec![];
    for case in record
        .rows
        .iter()
        .map(|r| &r.case)
        .collect::<std::collections::BTreeSet<_>>()
    {
        let mut of_case: Vec<&Row> = record.rows.iter().filter(|r| r.case == *case).collect();
        if of_case.len() < 2 {
            continue;
        }
        of_case.sort_by(|a, b| b.time.median.total_cmp(&a.time.median));
        bars.extend(of_case.into_iter().map(|r| {
            let rate = r.flops as f64 / r.time.median / 1e9;
            Bar {
                group: case.clone(),
                name: r.variant.clone(),
                value: rate,
                label: format!("{rate:.1} GFLOP/s, {} ms", number(r.time.ms(), 3)),
            }
        }));
    }
    if !bars.is_empty() {
        let caption = "Operations (as defined) a second of every variant, slowest first.";
        sections.push(BenchSection {
            heading: "Ladder of variants".into(),
            figure: Some((plot::ladder("Ladder of variants", &bars)?, caption.into())),
            table: None,
        });
    }
    sections.push(BenchSection {
        heading: "Results".into(),
        figure: None,
        table: Some(table(&record.rows)),
    });
    Ok(BenchPage {
        title: "Measurements".into(),
        facts: facts(&record.origin),
        sections,
        command: command(),
    })
}

/// `bench history`: what stands in benches/results, oldest first, by device.
pub fn history(g: &Global, html: Option<&Path>) -> Result<ExitCode> {
    let all = Record::all(Path::new(FOLDER))?;
    if all.is_empty() {
        return Err(Error::input(format!(
            "{FOLDER} has no recorded results; `tilewright bench ... --save NAME` makes one"
        )));
    }
    if g.json {
        let all: Vec<Value> = all
            .iter()
            .map(|(n, r)| json!({"name": n, "record": r}))
            .collect();
        json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut devices: BTreeMap<String, Vec<&(String, Record)>> = BTreeMap::new();
    for r in &all {
        let o = &r.1.origin;
        devices
            .entry(format!("{}: {}", o.backend, o.device))
            .or_default()
            .push(r);
    }
    let mut out = String::new();
    let mut sections = vec![];
    for (device, records) in devices {
        let mut cases: Vec<(&str, &str)> = vec![];
        for row in records.iter().flat_map(|r| &r.1.rows) {
            if !cases.contains(&(&row.case, &row.variant)) {
                cases.push((&row.case, &row.variant));
            }
        }
        let names: Vec<String> = records.iter().map(|r| r.0.clone()).collect();
        let head = ["case", "variant"].into_iter().map(String::from);
        let each = names.iter().map(|n| format!("{n} ms"));
        let mut t = Table::new(head.chain(each)).left(&[0, 1]);
        let mut series = vec![];
        for (case, variant) in cases {
            let find = |r: &Record| {
                let row = r
                    .rows
                    .iter()
                    .find(|r| r.case == case && r.variant == variant);
                row.map(|r| [r.time.low, r.time.median, r.time.high])
            };
            let points: Vec<Option<[f64; 3]>> = records.iter().map(|r| find(&r.1)).collect();
            let cell = |p: &Option<[f64; 3]>| p.map_or("-".into(), |p| number(1e3 * p[1], 3));
            let cells = points.iter().map(cell);
            t.row(
                [case.to_string(), variant.to_string()]
                    .into_iter()
                    .chain(cells),
            );
            series.push(Series {
                name: format!("{case} {variant}"),
                points,
            });
        }
        out += &format!("{device}\n{}\n", t.to_text());
        let drawn = plot::history(&names, &series[..series.len().min(16)])?;
        let caption = "Median of each record with its 95 % interval, oldest first; at most 16 cases are drawn.";
        sections.push(BenchSection {
            heading: device,
            figure: Some((drawn, caption.into())),
            table: Some(t),
        });
    }
    if let Some(path) = html {
        let page = BenchPage {
            title: "History of measurements".into(),
            facts: vec![("Records", all.len().to_string())],
            sections,
            command: command(),
        };
        write_atomic(path, page.to_html().as_bytes())?;
        note(&format!("page written to {}", path.display()));
    }
    print(&out)?;
    Ok(ExitCode::SUCCESS)
}

/// Kernels in the simulator: what they did, in place of how long it took.
pub fn counts(
    g: &Global,
    backend: &dyn Backend,
    room: &Room,
    cases: &[&str],
    options: &KernelOptions,
) -> Result<ExitCode> {
    let mut rows = vec![];
    for case in cases {
        rows.extend(count_variants(backend, room, case, options)?);
    }
    if g.json {
        json(&json!({"origin": Origin::of(backend), "counted": rows}))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut headings = vec![
        "case",
        "op",
        "variant",
        "instructions",
        "FLOP each",
        "mma",
        "global MB",
        "of compulsory",
        "loads %",
        "stores %",
        "conflicts",
        "barriers",
        "error",
    ];
    if options.machine.is_some() {
        headings.extend(occupancy::HEADINGS);
    }
    let mut t = Table::new(headings).left(&[0, 1, 2]);
    for r in &rows {
        let c = &r.counted;
        let mut row = vec![
            r.case.clone(),
            r.op.clone(),
            r.variant.clone(),
            c.instructions.to_string(),
            number(r.flops as f64 / c.instructions.max(1) as f64, 1),
            c.mma.to_string(),
            number(c.global_bytes as f64 / 1e6, 3),
            number(c.global_bytes as f64 / r.bytes.max(1) as f64, 2),
            number(100.0 * c.load_efficiency, 0),
            number(100.0 * c.store_efficiency, 0),
            c.bank_conflicts.to_string(),
            c.barriers.to_string(),
            number(r.error, 3),
        ];
        if options.machine.is_some() {
            row.extend(occupancy::cells(r.footprint.as_ref()));
        }
        t.row(row);
    }
    print(&t.to_text())?;
    Ok(ExitCode::SUCCESS)
}
