//! Where the images of a shard lie and what their labels are, from the headers of its members.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Extensions of an image, whole: WebDataset's `img.seg.png` is another field of `img`.
const IMAGES: &[&str] = &[
    "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm",
];
/// Keys of a JSON member that hold a label, the first of them that is there.
const JSON_LABELS: &[&str] = &["label", "cls", "class_id", "class", "target", "labels"];
/// No label is longer.
const MAX_LABEL: u64 = 1 << 20;
const BLOCK: u64 = 512;

/// A label as it is written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Label {
    Number(u64),
    Name(String),
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Label::Number(n) => write!(f, "{n}"),
            Label::Name(name) => write!(f, "{name:?}"),
        }
    }
}

/// An image with its label.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub at: u64,
    pub len: u32,
    pub label: Label,
}

/// What is in a shard.
#[derive(Default, Debug)]
pub(super) struct Scan {
    pub samples: Vec<Sample>,
    /// Images without a label.
    pub unlabelled: usize,
    /// What cannot be used, and why.
    pub broken: Vec<String>,
}

/// The members of one sample so far.
#[derive(Default)]
struct Group {
    key: String,
    image: Option<(u64, u32)>,
    /// With its rank: `.cls` goes before `.json`, `.json` before `.txt`.
    label: Option<(u8, Label)>,
}

/// Reads the headers of `path` and its small members. Never fails: what cannot be read is in the result.
pub(super) fn scan(path: &Path) -> Scan {
    let mut scan = Scan::default();
    let shown = path.display();
    let opened = File::open(path).and_then(|f| Ok((f.metadata()?.len(), f)));
    let (len, file) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            scan.broken.push(format!("{shown}: cannot be read: {e}"));
            return scan;
        }
    };
    let mut file = Forward {
        start: 0,
        at: 0,
        file: BufReader::new(file),
    };
    let mut start = 0;
    // After a header that is none, members are looked for from the next block on.
    loop {
        let Err((after, why)) = walk(&mut file, start, len, path, &mut scan) else {
            return scan;
        };
        scan.broken.push(format!("{shown}: {why}"));
        match next_header(&mut file, after + BLOCK, len) {
            Some(found) => start = found,
            None => return scan,
        }
    }
}

/// Walks the members from byte `start` on. An error says near which byte it is.
fn walk(
    file: &mut Forward,
    start: u64,
    len: u64,
    path: &Path,
    scan: &mut Scan,
) -> Result<(), (u64, String)> {
    let mut good = start;
    let at = |good: u64| move |e: io::Error| (good, format!("at byte {good}: {}", plain(&e)));
    file.start_at(start).map_err(at(good))?;
    file.start = start;
    let mut archive = tar::Archive::new(file);
    let mut group = Group::default();
    for entry in archive.entries_with_seek().map_err(at(good))? {
        let mut entry = match entry {
            Ok(entry) => entry,
            Err(e) => {
                group.close(path, scan);
                return Err(at(good)(e));
            }
        };
        let from = start + entry.raw_file_position();
        let size = entry.size();
        good = from;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if from.saturating_add(size) > len {
            group.close(path, scan);
            scan.broken.push(format!(
                "{}: {name} is cut short: {} of {size} bytes",
                path.display(),
                len.saturating_sub(from)
            ));
            return Ok(());
        }
        good = from + size.next_multiple_of(BLOCK);
        let Some((key, extension)) = split_name(&name) else {
            continue;
        };
        if key != group.key {
            group.close(path, scan);
            group = Group {
                key: key.to_owned(),
                ..Group::default()
            };
        }
        let extension = extension.to_ascii_lowercase();
        let rank = match extension.as_str() {
            e if IMAGES.contains(&e) => {
                match u32::try_from(size) {
                    Ok(0) | Err(_) => scan
                        .broken
                        .push(format!("{}: {name} has {size} bytes", path.display())),
                    Ok(bytes) => group.image = group.image.or(Some((from, bytes))),
                }
                continue;
            }
            "cls" => 0,
            "json" => 1,
            "txt" => 2,
            _ => continue,
        };
        if group.label.as_ref().is_some_and(|l| l.0 <= rank) {
            continue;
        }
        let mut text = String::new();
        let read = entry.by_ref().take(MAX_LABEL).read_to_string(&mut text);
        let label = read.ok().and_then(|_| parse(&text, rank == 1));
        match label {
            Some(label) => group.label = Some((rank, label)),
            // JSON may hold anything else beside the label; a .txt a caption of any length.
            None if rank > 0 => {}
            None => scan
                .broken
                .push(format!("{}: {name} holds no label", path.display())),
        }
    }
    group.close(path, scan);
    Ok(())
}

impl Group {
    fn close(&mut self, path: &Path, scan: &mut Scan) {
        match (self.image.take(), self.label.take()) {
            (Some((at, len)), Some((_, label))) => scan.samples.push(Sample { at, len, label }),
            (Some(_), None) => scan.unlabelled += 1,
            (None, Some(_)) if !self.key.is_empty() => scan.broken.push(format!(
                "{}: {} has a label but no image",
                path.display(),
                self.key
            )),
            _ => {}
        }
    }
}

/// Key and extension: the dot is the first one in the file's own name. Names without either are no members of samples.
fn split_name(name: &str) -> Option<(&str, &str)> {
    let base = name.rfind('/').map_or(0, |s| s + 1);
    let dot = base + name[base..].find('.')?;
    (dot > base).then(|| (&name[..dot], &name[dot + 1..]))
}

fn parse(text: &str, json: bool) -> Option<Label> {
    use serde_json::Value;
    fn of(value: &Value) -> Option<Label> {
        match value {
            Value::Number(n) => n.as_u64().map(Label::Number),
            Value::String(s) => plain(s),
            Value::Array(all) => all.first().and_then(of),
            _ => None,
        }
    }
    fn plain(text: &str) -> Option<Label> {
        let text = text.trim();
        match text.parse() {
            Ok(n) => Some(Label::Number(n)),
            Err(_) if text.is_empty() || text.contains('\n') => None,
            Err(_) => Some(Label::Name(text.to_owned())),
        }
    }
    if !json {
        return plain(text);
    }
    match serde_json::from_str(text).ok()? {
        Value::Object(all) => JSON_LABELS.iter().find_map(|k| of(all.get(*k)?)),
        other => of(&other),
    }
}

/// One line of an I/O error.
fn plain(e: &io::Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The first block from `from` on whose checksum is that of a header.
fn next_header(file: &mut Forward, from: u64, len: u64) -> Option<u64> {
    let mut at = from.next_multiple_of(BLOCK);
    file.start_at(at).ok()?;
    let mut block = [0u8; BLOCK as usize];
    while at + BLOCK <= len {
        file.read_exact(&mut block).ok()?;
        let header = tar::Header::from_byte_slice(&block);
        let sum = |bytes: &[u8]| bytes.iter().map(|b| u32::from(*b)).sum::<u32>();
        // The checksum's own field counts as spaces.
        let own = sum(&block[..148]) + 8 * 32 + sum(&block[156..]);
        if block[0] != 0 && header.cksum().is_ok_and(|c| c == own) {
            return Some(at);
        }
        at += BLOCK;
    }
    None
}

/// A file that is read from front to back with small jumps, which stay within the buffer where they can.
struct Forward {
    start: u64,
    at: u64,
    file: BufReader<File>,
}

impl Forward {
    /// Goes to a byte of the file.
    fn start_at(&mut self, at: u64) -> io::Result<()> {
        self.at = at;
        self.file.seek(SeekFrom::Start(at)).map(drop)
    }
}

impl Read for Forward {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(out)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Forward {
    /// Positions count from where the walk began, as those of an archive do.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Current(by) => {
                self.file.seek_relative(by)?;
                self.at = self.at.wrapping_add_signed(by);
            }
            SeekFrom::Start(to) => self.start_at(self.start + to)?,
            SeekFrom::End(_) => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(self.at - self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_read_as_webdataset_writes_them() {
        assert_eq!(
            split_name("a/b.c/000001.seg.png"),
            Some(("a/b.c/000001", "seg.png"))
        );
        assert_eq!(split_name("x.jpg"), Some(("x", "jpg")));
        assert_eq!((split_name("x"), split_name("a/.hidden")), (None, None));
        let name = |n: &str| Some(Label::Name(n.into()));
        assert_eq!(parse("7\n", false), Some(Label::Number(7)));
        assert_eq!(parse("tabby cat", false), name("tabby cat"));
        assert_eq!(parse("", false), None);
        assert_eq!(
            parse(r#"{"url": "u", "label": 3}"#, true),
            Some(Label::Number(3))
        );
        assert_eq!(parse(r#"{"class": "cat"}"#, true), name("cat"));
        assert_eq!(parse("[4, 5]", true), Some(Label::Number(4)));
        assert_eq!(parse(r#"{"caption": "x"}"#, true), None);
        assert_eq!(parse("{", true), None);
    }
}
