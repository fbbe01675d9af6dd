//! Tables of URLs and labels: CSV, JSON lines, Parquet; any of the first two also gzipped.

use crate::{Error, Result};
use flate2::read::MultiGzDecoder;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;

/// Names of the columns. What is not given is recognised by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fields {
    /// URL or path of the image.
    pub url: Option<String>,
    /// Label, or several.
    pub label: Option<String>,
    /// Score of each label.
    pub score: Option<String>,
}

/// Names under which the columns are looked for, in lower case, best first.
const URL: &[&str] = &[
    "url",
    "image_url",
    "img_url",
    "imageurl",
    "image_link",
    "link",
    "uri",
    "image",
    "path",
    "image_path",
    "file",
    "filepath",
    "file_path",
    "filename",
    "file_name",
];
const LABEL: &[&str] = &[
    "label",
    "labels",
    "class",
    "classes",
    "category",
    "categories",
    "cls",
    "target",
    "label_id",
    "label_ids",
    "class_id",
    "class_ids",
    "class_name",
    "tag",
    "tags",
];
const SCORE: &[&str] = &[
    "score",
    "scores",
    "label_probs",
    "label_prob",
    "label_scores",
    "prob",
    "probs",
    "probability",
    "probabilities",
    "confidence",
    "confidences",
    "weight",
    "weights",
];
/// Rows of JSON lines whose keys are looked at: a key may be absent from some rows.
const LOOK: usize = 100;

/// The three columns of a row.
#[derive(Debug, Default)]
pub(super) struct Raw {
    pub url: Value,
    pub label: Value,
    pub score: Value,
}

/// The columns of one table.
struct Columns {
    url: String,
    label: String,
    score: Option<String>,
}

impl Columns {
    fn find(path: &Path, names: &[String], given: &Fields) -> Result<Columns> {
        let found = || match names.is_empty() {
            true => "none at all".to_owned(),
            false => names.join(", "),
        };
        let one = |flag: &str, given: &Option<String>, known: &[&str]| match given {
            Some(name) if !names.contains(name) => Err(Error::input(format!(
                "{}: there is no field `{name}` ({flag}); its fields are {}",
                path.display(),
                found()
            ))),
            Some(name) => Ok(Some(name.clone())),
            None => {
                let called = |k: &&str| names.iter().find(|n| n.to_ascii_lowercase() == **k);
                Ok(known.iter().find_map(called).cloned())
            }
        };
        let must = |what: &str, flag: &str, name: Option<String>| {
            name.ok_or_else(|| {
                Error::input(format!(
                    "{}: no field is called like {what}; its fields are {}\nName it with {flag}.",
                    path.display(),
                    found()
                ))
            })
        };
        let url = one("--url-field", &given.url, URL)?;
        let label = one("--label-field", &given.label, LABEL)?;
        Ok(Columns {
            url: must("a URL or path", "--url-field", url)?,
            label: must("a label", "--label-field", label)?,
            score: one("--score-field", &given.score, SCORE)?,
        })
    }
}

/// Calls `each` with every row, or with what is wrong with it.
///
/// # Errors
/// [`Error::Input`]: no such file, no table, or the fields are not in it; and what `each` gives.
pub(super) fn read(
    path: &Path,
    fields: &Fields,
    each: &mut dyn FnMut(Result<Raw, String>) -> Result<()>,
) -> Result<()> {
    let fail = |e| Error::reading(path, e);
    if path.is_dir() {
        return Err(Error::input(format!(
            "{} is a folder, not a table",
            path.display()
        )));
    }
    let mut file = File::open(path).map_err(fail)?;
    let mut head = vec![];
    file.by_ref()
        .take(1 << 16)
        .read_to_end(&mut head)
        .map_err(fail)?;
    file.rewind().map_err(fail)?;
    if head.starts_with(b"PAR1") {
        return parquet(path, file, fields, each);
    }
    let mut name = path.to_string_lossy().to_ascii_lowercase();
    let mut text: Box<dyn Read> = Box::new(file);
    if head.starts_with(&[0x1f, 0x8b]) {
        text = Box::new(MultiGzDecoder::new(text));
        name.truncate(name.trim_end_matches(".gz").len());
    }
    let mut text = BufReader::with_capacity(1 << 16, text);
    let start = text.fill_buf().map_err(fail)?;
    let first = start.iter().find(|b| !b.is_ascii_whitespace());
    let json = [".jsonl", ".ndjson", ".json"]
        .iter()
        .any(|e| name.ends_with(e));
    match (json || first == Some(&b'{'), first) {
        (_, None) => Err(Error::input(format!("{} is empty", path.display()))),
        (true, Some(b'[')) => Err(Error::input(format!(
            "{} is one JSON array; JSON lines (an object a line) are read: `jq -c '.[]'` makes them",
            path.display()
        ))),
        (true, _) => json_lines(path, text, fields, each),
        (false, _) => {
            let line = start.split(|b| *b == b'\n').next().unwrap_or_default();
            let count = |d: u8| line.iter().filter(|b| **b == d).count();
            let delimiter = match name.ends_with(".tsv") {
                true => b'\t',
                // Of several the first: a comma where there is none.
                false => [b';', b'\t', b',']
                    .into_iter()
                    .max_by_key(|d| count(*d))
                    .unwrap_or(b','),
            };
            csv_rows(path, text, delimiter, fields, each)
        }
    }
}

fn csv_rows(
    path: &Path,
    text: impl Read,
    delimiter: u8,
    fields: &Fields,
    each: &mut dyn FnMut(Result<Raw, String>) -> Result<()>,
) -> Result<()> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .flexible(true)
        .from_reader(text);
    let heads = reader
        .byte_headers()
        .map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
    let names: Vec<String> = heads
        .iter()
        .map(|h| {
            String::from_utf8_lossy(h)
                .trim_start_matches('\u{feff}')
                .trim()
                .to_owned()
        })
        .collect();
    let columns = Columns::find(path, &names, fields)?;
    let place = |name: &String| names.iter().position(|n| n == name);
    let url = place(&columns.url);
    let label = place(&columns.label);
    let score = columns.score.as_ref().and_then(place);
    let mut record = csv::ByteRecord::new();
    loop {
        let more = reader.read_byte_record(&mut record);
        let cell = |at: Option<usize>| match at.and_then(|i| record.get(i)) {
            Some(text) => Value::String(String::from_utf8_lossy(text).into_owned()),
            None => Value::Null,
        };
        match more {
            Ok(false) => return Ok(()),
            Ok(true) => each(Ok(Raw {
                url: cell(url),
                label: cell(label),
                score: cell(score),
            }))?,
            Err(e) if e.is_io_error() => {
                return Err(Error::input(format!("{}: {e}", path.display())));
            }
            Err(e) => each(Err(e.to_string()))?,
        }
    }
}

fn json_lines(
    path: &Path,
    text: impl BufRead,
    fields: &Fields,
    each: &mut dyn FnMut(Result<Raw, String>) -> Result<()>,
) -> Result<()> {
    let parse = |line: Vec<u8>| -> Result<serde_json::Map<String, Value>, String> {
        serde_json::from_slice(&line).map_err(|e| e.to_string())
    };
    let mut lines = text.split(b'\n').filter(|l| {
        let blank = |l: &Vec<u8>| l.iter().all(u8::is_ascii_whitespace);
        !l.as_ref().is_ok_and(blank)
    });
    let mut next = || match lines.next() {
        None => Ok(None),
        Some(Ok(line)) => Ok(Some(parse(line))),
        Some(Err(e)) => Err(Error::reading(path, e)),
    };
    let mut early = vec![];
    let mut names: Vec<String> = vec![];
    while early.len() < LOOK
        && let Some(row) = next()?
    {
        for key in row.iter().flat_map(|r| r.keys()) {
            if !names.contains(key) {
                names.push(key.clone());
            }
        }
        early.push(row);
    }
    if names.is_empty()
        && let Some(Err(e)) = early.first()
    {
        return Err(Error::input(format!(
            "{}: not JSON lines (an object a line): {e}",
            path.display()
        )));
    }
    let columns = Columns::find(path, &names, fields)?;
    let mut give = |row: Result<serde_json::Map<String, Value>, String>| {
        each(row.map(|mut r| {
            let mut take = |name: &String| r.remove(name).unwrap_or_default();
            Raw {
                url: take(&columns.url),
                label: take(&columns.label),
                score: columns.score.as_ref().map(take).unwrap_or_default(),
            }
        }))
    };
    for row in early {
        give(row)?;
    }
    while let Some(row) = next()? {
        give(row)?;
    }
    Ok(())
}

fn parquet(
    path: &Path,
    file: File,
    fields: &Fields,
    each: &mut dyn FnMut(Result<Raw, String>) -> Result<()>,
) -> Result<()> {
    let bad = |e: parquet::errors::ParquetError| {
        Error::input(format!("{}: Parquet: {e}", path.display()))
    };
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema();
    let all = schema.get_fields();
    let names: Vec<String> = all.iter().map(|f| f.name().to_owned()).collect();
    let columns = Columns::find(path, &names, fields)?;
    let wanted = |name: &str| {
        [
            Some(&columns.url),
            Some(&columns.label),
            columns.score.as_ref(),
        ]
        .iter()
        .any(|c| c.is_some_and(|c| c == name))
    };
    // The other columns are not even read.
    let kept: Vec<Arc<Type>> = all.iter().filter(|f| wanted(f.name())).cloned().collect();
    let projection = Type::group_type_builder(schema.name())
        .with_fields(kept)
        .build()
        .map_err(bad)?;
    for row in reader.get_row_iter(Some(projection)).map_err(bad)? {
        let mut raw = Raw::default();
        for (name, value) in row.map_err(bad)?.get_column_iter() {
            let value = json(value);
            if *name == columns.url {
                raw.url = value;
            } else if *name == columns.label {
                raw.label = value;
            } else {
                raw.score = value;
            }
        }
        each(Ok(raw))?;
    }
    Ok(())
}

/// A field of Parquet's; kinds that neither a URL nor a label nor a score is of are left out.
fn json(field: &Field) -> Value {
    match field {
        Field::Bool(b) => Value::from(*b),
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::Float(n) => Value::from(*n),
        Field::Double(n) => Value::from(*n),
        Field::Str(s) => Value::from(s.as_str()),
        // Texts that are not marked as such.
        Field::Bytes(b) => Value::from(String::from_utf8_lossy(b.data()).as_ref()),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .filter_map(|(k, v)| Some((json(k).as_str()?.to_owned(), json(v))))
            .collect(),
        _ => Value::Null,
    }
}

/// The elements of a cell: a list, a text that holds one (`["a", "b"]`, `a|b`, `a;b`, or by `separator`), or one value.
fn elements(value: Value, separator: Option<char>) -> Vec<Value> {
    match value {
        Value::Null => vec![],
        Value::Array(all) => all,
        Value::String(text) => {
            let text = text.trim();
            if text.starts_with('[') && text.ends_with(']') {
                // As Python prints lists, too.
                let parsed = serde_json::from_str(text)
                    .or_else(|_| serde_json::from_str(&text.replace('\'', "\"")));
                if let Ok(Value::Array(all)) = parsed {
                    return all;
                }
            }
            let cut = separator.or_else(|| ['|', ';'].into_iter().find(|c| text.contains(*c)));
            let parts: Vec<&str> = match cut {
                Some(c) => text.split(c).collect(),
                None => vec![text],
            };
            let parts = parts.into_iter().map(str::trim);
            parts.filter(|p| !p.is_empty()).map(Value::from).collect()
        }
        one => vec![one],
    }
}

/// Labels of a row, with a score each where there are scores.
pub(super) type Labels = Vec<(String, Option<f64>)>;

/// The labels of a row; a map of labels to scores is both at once.
pub(super) fn labels(raw: &mut Raw, separator: Option<char>) -> Result<Labels, String> {
    let number = |v: &Value| match v {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    };
    let label = std::mem::take(&mut raw.label);
    if let Value::Object(map) = label {
        return map
            .into_iter()
            .map(|(name, v)| {
                let score = number(&v);
                score.ok_or(format!("score {v} is no number"))?;
                Ok((name, score))
            })
            .collect();
    }
    let names = elements(label, separator)
        .into_iter()
        .filter_map(|v| match v {
            Value::String(s) => Some(s),
            // 3.0, as tables with holes have whole numbers, is 3.
            Value::Number(n) => Some(match n.as_f64() {
                Some(f) if n.is_f64() && f.fract() == 0.0 => format!("{f:.0}"),
                _ => n.to_string(),
            }),
            Value::Bool(b) => Some(b.to_string()),
            _ => None,
        });
    let names: Vec<String> = names.collect();
    let scores = elements(std::mem::take(&mut raw.score), separator);
    if scores.is_empty() {
        return Ok(names.into_iter().map(|n| (n, None)).collect());
    }
    if scores.len() != names.len() {
        return Err(format!(
            "{} labels with {} scores",
            names.len(),
            scores.len()
        ));
    }
    names
        .into_iter()
        .zip(scores)
        .map(|(name, v)| match number(&v) {
            Some(score) if score.is_finite() => Ok((name, Some(score))),
            _ => Err(format!("score {v} is no number")),
        })
        .collect()
}

/// The URL of a row, empty where there is none.
pub(super) fn url(raw: &mut Raw) -> String {
    match std::mem::take(&mut raw.url) {
        Value::String(s) => s.trim().to_owned(),
        _ => String::new(),
    }
}
