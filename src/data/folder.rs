//! Folders of images: one folder a class, and Tiny ImageNet's own layout.

use super::decode::looks_like_image;
use super::split::{Pixels, Split};
use crate::{Error, Result};
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What was found, with remarks for the user.
pub(crate) struct Found {
    pub(crate) train: Split,
    pub(crate) test: Split,
    pub(crate) notes: Vec<String>,
}

/// The share that becomes the test split where there is no folder for one.
pub(crate) const TEST_SHARE: f64 = 0.2;
/// Names by which a file says that it is an image. A file with another name counts as one if its content does.
const EXTENSIONS: &[&str] = &[
    "jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "pam",
];

/// Class folders (sorted by name, as torchvision's `ImageFolder`), directly in `dir` or under `train` and `test|val`.
pub(crate) fn open(dir: &Path, seed: u64) -> Result<Found> {
    let mut notes = Vec::new();
    let train_dir = dir.join("train");
    if !train_dir.is_dir() {
        let (all, classes) = class_folders(dir, None)?;
        let all = Split::new(Pixels::Files(all.0), all.1, classes)?;
        notes.push(format!(
            "no train and test folders: a stratified {:.0} % of the images, drawn by seed {seed}, is the test split",
            TEST_SHARE * 100.0
        ));
        let (train, test) = all.split_off(TEST_SHARE, seed)?;
        return Ok(Found { train, test, notes });
    }
    let ((files, labels), classes) = class_folders(&train_dir, None)?;
    let train = Split::new(Pixels::Files(files), labels, classes.clone())?;
    let Some(test_dir) = ["test", "val", "valid", "validation"]
        .iter()
        .map(|n| dir.join(n))
        .find(|d| d.is_dir())
    else {
        notes.push(format!(
            "no test or val folder beside train: a stratified {:.0} % of train, drawn by seed {seed}, is the test split",
            TEST_SHARE * 100.0
        ));
        let (train, test) = train.split_off(TEST_SHARE, seed)?;
        return Ok(Found { train, test, notes });
    };
    let ((files, labels), _) = class_folders(&test_dir, Some(&classes))?;
    notes.push(format!("test split: {}", test_dir.display()));
    let test = Split::new(Pixels::Files(files), labels, classes)?;
    Ok(Found { train, test, notes })
}

type Labelled = (Vec<PathBuf>, Vec<u32>);

/// The images of the class folders in `dir`. With `known` classes (those of train), a folder may be absent, but not new.
fn class_folders(
    dir: &Path,
    known: Option<&Arc<Vec<String>>>,
) -> Result<(Labelled, Arc<Vec<String>>)> {
    let folders = sorted(dir)?
        .into_iter()
        .filter(|p| p.is_dir())
        .collect::<Vec<_>>();
    if folders.is_empty() {
        return Err(Error::input(format!(
            "no class folders in {}: one folder of images for each class is expected",
            dir.display()
        )));
    }
    let name = |p: &PathBuf| {
        p.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let classes = known
        .cloned()
        .unwrap_or_else(|| Arc::new(folders.iter().map(name).collect()));
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for folder in &folders {
        let Some(label) = classes.iter().position(|c| *c == name(folder)) else {
            return Err(Error::input(format!(
                "{}: the training data has no such class",
                folder.display()
            )));
        };
        let before = files.len();
        images_in(folder, &mut files, 0)?;
        if files.len() == before && known.is_none() {
            return Err(Error::input(format!(
                "class folder {} holds no images",
                folder.display()
            )));
        }
        labels.resize(files.len(), label as u32);
    }
    if files.is_empty() {
        return Err(Error::input(format!("no images in {}", dir.display())));
    }
    Ok(((files, labels), classes))
}

/// Entries of a folder by name, hidden ones left out.
fn sorted(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::reading(dir, e);
    let mut entries = std::fs::read_dir(dir)
        .map_err(fail)?
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<Vec<_>, std::io::Error>>()
        .map_err(fail)?;
    entries.retain(|p| {
        !p.file_name()
            .unwrap_or_default()
            .as_encoded_bytes()
            .starts_with(b".")
    });
    entries.sort();
    Ok(entries)
}

/// Image files in `dir` and below, by name.
fn images_in(dir: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
    // Links may make a loop.
    if depth > 16 {
        return Err(Error::input(format!(
            "{}: folders more than 16 deep",
            dir.display()
        )));
    }
    for path in sorted(dir)? {
        if path.is_dir() {
            images_in(&path, files, depth + 1)?;
        } else if is_image(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn is_image(path: &Path) -> bool {
    let named = path.extension().and_then(|e| e.to_str()).is_some_and(|e| {
        let lower = e.to_ascii_lowercase();
        EXTENSIONS.contains(&lower.as_str())
    });
    // Of files that are not named like images, those that cannot be read or are something else are no images of ours.
    named || {
        let mut head = Vec::new();
        let read = std::fs::File::open(path).and_then(|f| f.take(16).read_to_end(&mut head));
        read.is_ok() && looks_like_image(&head)
    }
}

/// Tiny ImageNet as its archive unpacks it: `train/<wnid>/images/*`, `val/images/*` with `val/val_annotations.txt`, the
/// classes in `wnids.txt` (taken in sorted order, as `ImageFolder` numbers them) and their names in `words.txt`.
pub(crate) fn open_tiny_imagenet(dir: &Path) -> Result<Found> {
    let text = |name: &str| {
        let path = dir.join(name);
        std::fs::read(&path)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .map_err(|e| Error::reading(&path, e))
    };
    let mut wnids: Vec<String> = text("wnids.txt")?
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    wnids.sort();
    wnids.dedup();
    // The names are a courtesy: without words.txt the identifiers stand for themselves.
    let words = parse_words(&text("words.txt").unwrap_or_default());
    let name = |id: &String| {
        words
            .get(id)
            .map_or_else(|| id.clone(), |w| format!("{id} {w}"))
    };
    let classes = Arc::new(wnids.iter().map(name).collect::<Vec<_>>());
    let label: HashMap<&str, u32> = wnids
        .iter()
        .enumerate()
        .map(|(i, id)| (id.as_str(), i as u32))
        .collect();

    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (i, id) in wnids.iter().enumerate() {
        let folder = dir.join("train").join(id);
        let before = files.len();
        images_in(&folder, &mut files, 0)?;
        if files.len() == before {
            return Err(Error::input(format!(
                "class folder {} holds no images",
                folder.display()
            )));
        }
        labels.resize(files.len(), i as u32);
    }
    let train = Split::new(Pixels::Files(files), labels, classes.clone())?;

    let annotations = parse_annotations(&text("val/val_annotations.txt")?, &label)
        .map_err(|e| e.context(dir.join("val/val_annotations.txt").display()))?;
    let images = dir.join("val/images");
    let (files, labels) = annotations
        .into_iter()
        .map(|(file, label)| (images.join(file), label))
        .unzip();
    let test = Split::new(Pixels::Files(files), labels, classes)?;
    Ok(Found {
        train,
        test,
        notes: Vec::new(),
    })
}

/// `wnid<TAB>name, another name`: the first name of each.
pub(crate) fn parse_words(text: &str) -> HashMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(id, names)| {
            (
                id.to_owned(),
                names
                    .split(',')
                    .next()
                    .unwrap_or_default()
                    .trim()
                    .to_owned(),
            )
        })
        .collect()
}

/// `file<TAB>wnid<TAB>box`: file names and labels.
pub(crate) fn parse_annotations(
    text: &str,
    label: &HashMap<&str, u32>,
) -> Result<Vec<(String, u32)>> {
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty());
    let found = lines
        .map(|(i, line)| {
            let mut fields = line.split('\t');
            let (Some(file), Some(id)) = (fields.next(), fields.next()) else {
                return Err(Error::input(format!(
                    "line {}: expected a file and a class, tab-separated",
                    i + 1
                )));
            };
            // A path in place of a name would read files outside of the data set.
            if Path::new(file).components().count() != 1 || Path::new(file).file_name().is_none() {
                return Err(Error::input(format!(
                    "line {}: `{file}` is not a file name",
                    i + 1
                )));
            }
            let label = label.get(id.trim()).copied();
            let label = label.ok_or_else(|| {
                Error::input(format!("line {}: `{id}` is not in wnids.txt", i + 1))
            })?;
            Ok((file.to_owned(), label))
        })
        .collect::<Result<Vec<_>>>()?;
    if found.is_empty() {
        return Err(Error::input("no images are listed"));
    }
    Ok(found)
}
