//! Shards of our own and of other tools' making, whole and broken, through the loader.

use super::*;
use crate::data::{Batch, Feed, Images, Loader, LoaderOptions, OpenOptions, PrepareOptions, open};
use std::io::Write;

fn options() -> OpenOptions {
    OpenOptions::default()
}

/// All batches of some epochs.
fn batches(loader: &mut Loader, epochs: usize) -> Vec<Batch> {
    let mut all = vec![];
    for _ in 0..epochs {
        while let Some(b) = loader.next_batch().unwrap() {
            all.push(b);
        }
    }
    all
}

fn loader(sets: &crate::data::Sets, memory: u64, options: LoaderOptions) -> Loader {
    let prepare = PrepareOptions {
        memory,
        ..PrepareOptions::default()
    };
    let images = Images::prepare(&sets.train, sets.preprocess(8), prepare).unwrap();
    Loader::new(Arc::new(images), options).unwrap()
}

/// Labels and pixels, in an order of their own.
fn content(batches: &[Batch]) -> Vec<(u32, Vec<u32>)> {
    let mut all = vec![];
    for b in batches {
        let one = b.images.len() / b.labels.len();
        for i in 0..b.valid {
            let pixels = b.images[i * one..(i + 1) * one].iter();
            all.push((b.labels[i], pixels.map(|v| v.to_bits()).collect()));
        }
    }
    all.sort();
    all
}

#[test]
fn packed_digits_are_the_same_images_streamed_resumed_and_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let report = pack("digits", dir.path(), 100, options()).unwrap();
    assert_eq!(
        (report.train, report.test, report.shards),
        (1437, 360, 15 + 4)
    );
    let spec = format!("shards:{}", dir.path().display());
    let (plain, sets) = (
        open("digits", options()).unwrap(),
        open(&spec, options()).unwrap(),
    );
    assert_eq!(
        (sets.size, sets.mean, sets.std),
        (Some(8), plain.mean, plain.std)
    );
    assert_eq!(sets.classes(), plain.classes());
    assert_eq!(
        (sets.train.counts(), sets.test.counts()),
        (plain.train.counts(), plain.test.counts())
    );
    assert!(sets.notes.is_empty(), "{:?}", sets.notes);

    let eval = LoaderOptions::eval(64);
    let want = content(&batches(&mut loader(&plain, 1 << 30, eval), 1));
    assert_eq!(
        content(&batches(&mut loader(&sets, 1 << 30, eval), 1)),
        want
    );
    assert_eq!(content(&batches(&mut loader(&sets, 0, eval), 1)), want);

    // Streamed: the same at any number of threads, and from any step on.
    let train = |threads| LoaderOptions {
        threads,
        drop_last: false,
        ..LoaderOptions::train(64, 9)
    };
    let all = batches(&mut loader(&sets, 0, train(1)), 3);
    let steps = all.len() / 3;
    assert_eq!(content(&all[..steps]), want);
    assert_eq!(content(&all[steps..2 * steps]), want);
    assert_ne!(all[0].indices, all[steps].indices);
    assert_eq!(batches(&mut loader(&sets, 0, train(3)), 3), all);
    let mut late = loader(&sets, 0, train(2));
    for (epoch, step) in [(1, 7), (0, 1), (2, 0), (0, steps)] {
        late.skip_to(epoch, step).unwrap();
        let at = epoch as usize * steps + step;
        assert_eq!(
            late.next_batch().unwrap().as_ref(),
            all.get(at),
            "{epoch} {step}"
        );
    }
    // Drawn with replacement: read one by one.
    let balanced = LoaderOptions {
        balanced: true,
        ..train(2)
    };
    assert_eq!(batches(&mut loader(&sets, 0, balanced), 1).len(), steps);
    // A view of the images: each of its own, once.
    let some = crate::data::Sets {
        train: sets.train.subset(crate::data::PerClass::Count(20), 1),
        ..sets.clone()
    };
    let seen = batches(&mut loader(&some, 0, train(2)), 1);
    let mut seen: Vec<u32> = seen
        .iter()
        .flat_map(|b| b.indices[..b.valid].to_vec())
        .collect();
    seen.sort();
    assert_eq!(seen, some.train.indices());
    // Packing into the same folder is refused.
    let e = pack("digits", dir.path(), 100, options()).unwrap_err();
    assert!(
        e.exit_code() == 2 && e.to_string().contains("already"),
        "{e}"
    );
}

fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(vec![]);
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

fn picture(level: u8) -> Vec<u8> {
    let mut out = std::io::Cursor::new(vec![]);
    let pixels =
        image::RgbImage::from_fn(8, 8, |x, y| image::Rgb([level, x as u8 * 9, y as u8 * 9]));
    pixels.write_to(&mut out, image::ImageFormat::Png).unwrap();
    out.into_inner()
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::File::create(path)
        .unwrap()
        .write_all(bytes)
        .unwrap();
}

#[test]
fn broken_members_and_tails_are_counted_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let p: Vec<Vec<u8>> = (0..6).map(|i| picture(i * 40)).collect();
    let whole = tar_of(&[
        ("a/0.png", &p[0]),
        ("a/0.cls", b"0"),
        ("a/1.png", b"no picture"),
        ("a/1.cls", b"1"),
        ("a/2.png", &p[2]),
        ("a/2.json", br#"{"label": 2, "caption": "x"}"#),
        ("a/3.png", &p[3]),
        ("a/4.cls", b"1"),
        ("README.md", b"what this is"),
    ]);
    write(dir.path(), "train-0.tar", &whole);
    // A header that is none, in the middle: what follows it is found again.
    let mut hurt = tar_of(&[
        ("5.jpg", &p[4]),
        ("5.cls", b"1"),
        ("6.jpg", &p[5]),
        ("6.cls", b"0"),
        ("7.png", &p[1]),
        ("7.cls", b"2"),
    ]);
    let second = hurt.windows(5).position(|w| w == b"6.jpg").unwrap();
    hurt[second..second + 512].fill(0xA5);
    write(dir.path(), "train-1.tar", &hurt);
    // A tail that is cut off within an image.
    let cut = tar_of(&[("8.png", &p[0]), ("8.cls", b"1"), ("9.png", &vec![1; 9000])]);
    write(dir.path(), "train-2.tar", &cut[..5000]);
    write(
        dir.path(),
        "val-0.tar",
        &tar_of(&[("0.png", &p[1]), ("0.cls", b"1")]),
    );
    write(dir.path(), "val-1.tar", b"");
    write(dir.path(), "classes.txt", b"ant\nbee\ncat\n");
    let spec = format!("shards:{}", dir.path().display());
    let sets = open(&spec, options()).unwrap();
    assert_eq!(sets.classes(), ["ant", "bee", "cat"]);
    assert_eq!(sets.train.labels(), [0, 1, 2, 1, 2, 1]);
    assert_eq!(sets.test.labels(), [1]);
    let notes = sets.notes.join("\n");
    assert!(notes.contains("1 images have no label"), "{notes}");
    let broken = sets.broken.join("\n");
    assert!(broken.contains("4 has a label but no image"), "{broken}");
    assert!(broken.contains("train-1.tar: at byte"), "{broken}");
    assert!(broken.contains("9.png is cut short"), "{broken}");
    for memory in [0, 1 << 30] {
        let mut l = loader(&sets, memory, LoaderOptions::eval(8));
        let all = batches(&mut l, 1);
        assert_eq!((all.len(), all[0].valid), (1, 5));
        let bad = l.images().bad();
        assert!(
            bad.len() == 1 && bad[0].message.contains("a/1.png"),
            "{bad:?}"
        );
    }
    let report = crate::data::verify(&spec).unwrap();
    assert_eq!((report.train, report.test), (5, 1));
    assert!(report.bad.iter().any(|b| b.contains("a/1.png")));
    // By pattern; without shards for testing a share of the images is.
    let spec = format!("shards:{}/train-{{0..1}}.tar", dir.path().display());
    let sets = open(&spec, options()).unwrap();
    assert_eq!(sets.train.len() + sets.test.len(), 5);
    let spec = format!("shards:{}/val-*.tar", dir.path().display());
    let sets = open(&spec, options()).unwrap();
    assert_eq!((sets.train.len(), sets.test.len()), (1, 1));
}

#[test]
fn what_is_not_there_is_said_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let says = |rest: &str, word: &str| {
        let e = open(&format!("shards:{}{rest}", dir.path().display()), options()).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(word), "{e}");
        assert!(e.to_string().lines().count() <= 2);
    };
    says("", "no shards (*.tar)");
    says("/nothing-*.tar", "no file fits");
    says("/a{0..x}.tar", "numbers");
    says("/a{0", "not closed");
    let p = picture(9);
    write(
        dir.path(),
        "a/0.tar",
        &tar_of(&[("0.png", &p), ("1.png", &p)]),
    );
    says("/a", "2 images, but none with a label");
    write(dir.path(), "b/0.tar", b"not a tar at all");
    says("/b", "no images");
    write(
        dir.path(),
        "c/0.tar",
        &tar_of(&[
            ("0.png", &p),
            ("0.cls", b"1"),
            ("1.png", &p),
            ("1.txt", b"a cat"),
        ]),
    );
    says("/c", "one kind");
    write(
        dir.path(),
        "d/0.tar",
        &tar_of(&[("0.png", &p), ("0.cls", b"5")]),
    );
    write(dir.path(), "d/dataset.json", br#"{"classes": ["only"]}"#);
    says("/d", "no image has a label");
    assert!(open("packed:packed:digits", options()).is_err());
}

#[test]
fn braces_expand_as_in_a_shell() {
    assert_eq!(braces("a").unwrap(), ["a"]);
    assert_eq!(braces("{a,b}-{08..10}.tar").unwrap().len(), 6);
    assert_eq!(braces("x{08..10}").unwrap(), ["x08", "x09", "x10"]);
}
