//! From the rows of tables to what is downloaded: one label a row, the classes that are kept, the split, the shards.

use super::table::{self, Fields, Labels};
use super::{BuildOptions, Cause, Lost};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

/// Which of several labels a row keeps. Ties go to the first in the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// The one with the highest score.
    Score,
    /// The one that most rows have.
    Frequent,
    /// The one that fewest rows have.
    Rarest,
    /// The first.
    First,
    /// None: only rows with a single label are kept.
    Single,
}

/// An image to get.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidate {
    /// Row of the tables, from 1.
    pub row: u64,
    pub url: String,
    /// Number of the table that it is from, for paths relative to it.
    pub table: u32,
    pub class: u32,
}

/// One split's share of a plan.
pub(super) struct Part {
    pub split: &'static str,
    pub candidates: Vec<Candidate>,
}

/// What is to be done.
pub(super) struct Plan {
    pub rows: u64,
    /// Rows that are left out, by cause.
    pub lost: BTreeMap<Cause, u64>,
    /// Those of them that are failures of the table, one by one.
    pub failures: Vec<Lost>,
    pub classes: Vec<String>,
    pub reduce: Reduce,
    /// Training, then test.
    pub parts: [Part; 2],
}

/// A row while the table is read.
struct Row {
    row: u64,
    url: String,
    table: u32,
    /// Place in the order, and place between the splits.
    hash: [u64; 2],
    labels: Vec<(u32, f32)>,
}

impl Plan {
    /// Reads the tables and decides.
    ///
    /// # Errors
    /// A table cannot be read, has no such fields, or no row of it is left.
    pub(super) fn make(options: &BuildOptions) -> Result<Plan> {
        let mut lost: BTreeMap<Cause, u64> = BTreeMap::new();
        let mut failures = vec![];
        let mut names: Vec<String> = vec![];
        let mut ids: HashMap<String, u32> = HashMap::new();
        let mut rows: Vec<Row> = vec![];
        let mut seen: HashSet<[u64; 2]> = HashSet::new();
        let (mut number, mut scored) = (0u64, false);
        for (t, path) in (0..).zip(&options.tables) {
            table::read(path, &options.fields, &mut |raw| {
                number += 1;
                let mut lose = |cause: Cause, url: String, detail: String| {
                    *lost.entry(cause).or_default() += 1;
                    failures.push(Lost {
                        row: number,
                        url,
                        cause,
                        detail,
                    });
                    Ok(())
                };
                let mut raw = match raw {
                    Ok(raw) => raw,
                    Err(e) => return lose(Cause::BadRow, String::new(), e),
                };
                let url = table::url(&mut raw);
                if url.is_empty() {
                    return lose(Cause::NoUrl, url, String::new());
                }
                let labels: Labels = match table::labels(&mut raw, options.separator) {
                    Ok(labels) => labels,
                    Err(e) => return lose(Cause::BadRow, url, e),
                };
                if labels.is_empty() {
                    return lose(Cause::NoLabel, url, String::new());
                }
                scored |= labels[0].1.is_some();
                let sum = Sha256::digest(&url);
                let word = |i: usize| u64::from_be_bytes(std::array::from_fn(|k| sum[8 * i + k]));
                let hash = [word(0), word(1)];
                if !seen.insert(hash) {
                    *lost.entry(Cause::Duplicate).or_default() += 1;
                    return Ok(());
                }
                let mut kept: Vec<(u32, f32)> = vec![];
                for (name, score) in labels {
                    let score = score.unwrap_or(1.0);
                    if options.min_score.is_some_and(|least| score < least) {
                        continue;
                    }
                    let id = *ids.entry(name).or_insert_with_key(|name| {
                        names.push(name.clone());
                        names.len() as u32 - 1
                    });
                    if kept.iter().all(|k| k.0 != id) {
                        kept.push((id, score as f32));
                    }
                }
                if kept.is_empty() {
                    *lost.entry(Cause::LowScore).or_default() += 1;
                    return Ok(());
                }
                rows.push(Row {
                    row: number,
                    url,
                    table: t,
                    hash,
                    labels: kept,
                });
                Ok(())
            })?;
        }
        drop((ids, seen));
        let reduce = options.reduce.unwrap_or(match scored {
            true => Reduce::Score,
            false => Reduce::Frequent,
        });
        if reduce == Reduce::Score && !scored {
            return Err(Error::input(
                "--reduce score: the tables have no scores; name their field with --score-field, or reduce by another rule",
            ));
        }
        let mut often = vec![0u64; names.len()];
        rows.iter()
            .flat_map(|r| &r.labels)
            .for_each(|l| often[l.0 as usize] += 1);
        let mut count = vec![0u64; names.len()];
        rows.retain_mut(|r| {
            let Some(label) = choose(&r.labels, reduce, &often) else {
                *lost.entry(Cause::SeveralLabels).or_default() += 1;
                return false;
            };
            r.labels = vec![label];
            count[label.0 as usize] += 1;
            true
        });
        let (classes, of) = keep_classes(&names, &count, options.top);
        // By hash: a shard is a sample of everything, and the same rows come in the same order.
        rows.sort_by_key(|r| (r.hash, r.row));
        let mut per_class = vec![0u64; classes.len()];
        let mut parts = ["train", "test"].map(|split| Part {
            split,
            candidates: vec![],
        });
        for r in rows {
            let Some(class) = of[r.labels[0].0 as usize] else {
                *lost.entry(Cause::ClassNotKept).or_default() += 1;
                continue;
            };
            let n = &mut per_class[class as usize];
            if options.per_class.is_some_and(|most| *n >= most as u64) {
                *lost.entry(Cause::OverCap).or_default() += 1;
                continue;
            }
            *n += 1;
            let test = (r.hash[1] as f64) < options.test_share * 2f64.powi(64);
            parts[usize::from(test)].candidates.push(Candidate {
                row: r.row,
                url: r.url,
                table: r.table,
                class,
            });
        }
        let plan = Plan {
            rows: number,
            lost,
            failures,
            classes,
            reduce,
            parts,
        };
        match plan.candidates() {
            0 => Err(plan.nothing_left(&options.tables, &options.fields)),
            _ => Ok(plan),
        }
    }

    pub(super) fn candidates(&self) -> u64 {
        self.parts.iter().map(|p| p.candidates.len() as u64).sum()
    }

    fn nothing_left(&self, tables: &[PathBuf], fields: &Fields) -> Error {
        let tables: Vec<String> = tables.iter().map(|t| t.display().to_string()).collect();
        let why: Vec<String> = self
            .lost
            .iter()
            .map(|(cause, n)| format!("{n} {}", cause.about()))
            .collect();
        let hint = match (self.lost.contains_key(&Cause::NoLabel), &fields.label) {
            (true, None) => "\nIs the label in another field? Name it with --label-field.",
            _ => "",
        };
        let why = match why.is_empty() {
            true => "the table has no rows".to_owned(),
            false => why.join(", "),
        };
        Error::input(format!(
            "{}: none of {} rows gives an image to get: {why}{hint}",
            tables.join(", "),
            self.rows
        ))
    }
}

fn choose(labels: &[(u32, f32)], reduce: Reduce, often: &[u64]) -> Option<(u32, f32)> {
    let mut best = *labels.first()?;
    let better = |a: (u32, f32), b: (u32, f32)| {
        let (many, fewer) = (often[a.0 as usize], often[b.0 as usize]);
        match reduce {
            Reduce::Score => a.1 > b.1,
            Reduce::Frequent => many > fewer,
            Reduce::Rarest => many < fewer,
            Reduce::First | Reduce::Single => false,
        }
    };
    if reduce == Reduce::Single && labels.len() > 1 {
        return None;
    }
    for &label in &labels[1..] {
        if better(label, best) {
            best = label;
        }
    }
    Some(best)
}

/// The `top` most frequent classes (of equally frequent ones, the first by name), in the order of their names or numbers,
/// and the class of each label.
fn keep_classes(
    names: &[String],
    count: &[u64],
    top: Option<usize>,
) -> (Vec<String>, Vec<Option<u32>>) {
    let numbers: Option<Vec<u64>> = names.iter().map(|n| n.parse().ok()).collect();
    let key = |i: usize| match &numbers {
        Some(n) => (n[i], ""),
        None => (0, names[i].as_str()),
    };
    let mut kept: Vec<usize> = (0..names.len()).filter(|&i| count[i] > 0).collect();
    kept.sort_by_key(|&i| (std::cmp::Reverse(count[i]), key(i)));
    kept.truncate(top.unwrap_or(usize::MAX));
    kept.sort_by_key(|&i| key(i));
    let mut of = vec![None; names.len()];
    for (class, &i) in (0..).zip(&kept) {
        of[i] = Some(class);
    }
    (kept.into_iter().map(|i| names[i].clone()).collect(), of)
}
