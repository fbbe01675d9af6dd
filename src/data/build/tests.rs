//! Tables of every kind, a server that fails in every way, kills in between.

use super::*;
use crate::data::{OpenOptions, open};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A photograph-like image, another one for each number.
fn picture(n: usize, side: u32) -> Vec<u8> {
    let image = image::RgbImage::from_fn(side, side + 8, |x, y| {
        let v = |a: usize, b: u32| ((x * (3 + a as u32) + y * b + n as u32 * 37) % 256) as u8;
        image::Rgb([v(n % 5, 2), v(1, 5), v(n % 3, 7)])
    });
    let mut out = std::io::Cursor::new(vec![]);
    image.write_to(&mut out, image::ImageFormat::Png).unwrap();
    out.into_inner()
}

fn black() -> Vec<u8> {
    let mut out = std::io::Cursor::new(vec![]);
    let image = image::RgbImage::new(64, 64);
    image.write_to(&mut out, image::ImageFormat::Jpeg).unwrap();
    out.into_inner()
}

/// What the server does with image `n`: seven in twenty fail, each in another way.
fn fate(n: usize) -> &'static str {
    match n % 20 {
        1 => "not-found",
        4 => "timeout",
        7 => "short-body",
        11 => "wrong-type",
        14 => "corrupt",
        17 => "placeholder",
        19 => "opted-out",
        _ => "good",
    }
}

struct Server {
    base: String,
    requests: Arc<AtomicUsize>,
}

/// Serves `/N.png` by [`fate`], and every seventh good one only at the second request for it.
fn serve() -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    let seen: Arc<std::sync::Mutex<BTreeMap<usize, usize>>> = Arc::default();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (count, seen) = (count.clone(), seen.clone());
            std::thread::spawn(move || {
                let _ = answer(stream.unwrap(), &count, &seen);
            });
        }
    });
    Server { base, requests }
}

fn answer(
    mut stream: TcpStream,
    count: &AtomicUsize,
    seen: &std::sync::Mutex<BTreeMap<usize, usize>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    count.fetch_add(1, Ordering::Relaxed);
    let n: usize = first
        .split(['/', '.'])
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    let times = {
        let mut seen = seen.lock().unwrap();
        let t = seen.entry(n).or_default();
        *t += 1;
        *t
    };
    let body = picture(n, 48);
    let mut send = |status: &str, kind: &str, length: usize, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )?;
        stream.write_all(body)
    };
    match fate(n) {
        "not-found" => send("404 Not Found", "text/html", 4, b"gone"),
        "timeout" => {
            // Until the client gives up.
            stream.read_exact(&mut [0]).map(drop)
        }
        "short-body" => send("200 OK", "image/png", body.len(), &body[..body.len() / 2]),
        "wrong-type" => send("200 OK", "text/html", 13, b"<html></html>"),
        "opted-out" => send(
            "200 OK\r\nX-Robots-Tag: other: noindex, noai",
            "image/png",
            body.len(),
            &body,
        ),
        "corrupt" => send(
            "200 OK",
            "image/png",
            body.len() / 2,
            &body[..body.len() / 2],
        ),
        "placeholder" => send("200 OK", "image/jpeg", black().len(), &black()),
        _ if n.is_multiple_of(7) && times == 1 => send("503 Busy", "text/plain", 0, b""),
        _ => send("200 OK", "image/png", body.len(), &body),
    }
}

fn table(dir: &Path, base: &str, rows: usize) -> std::path::PathBuf {
    let mut text = String::from("id,url,label\n");
    for n in 0..rows {
        text += &format!("{n},{base}/{n}.png,c{}\n", n % 3);
    }
    let path = dir.join("table.csv");
    std::fs::write(&path, text).unwrap();
    path
}

fn options(table: &Path, dir: &Path) -> BuildOptions {
    BuildOptions {
        timeout: Duration::from_millis(400),
        pause: Duration::from_millis(5),
        per_shard: 25,
        per_host: 16,
        downloads: 16,
        size: 40,
        ..BuildOptions::new(vec![table.to_path_buf()], dir.to_path_buf())
    }
}

fn run(o: &BuildOptions) -> crate::Result<BuildReport> {
    build(o, &AtomicBool::new(false))
}

/// Every shard's bytes by name.
fn shards(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files
        .filter(|p| p.extension().is_some_and(|e| e == "tar"))
        .map(|p| {
            let name = p.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(p).unwrap())
        })
        .collect()
}

#[test]
fn a_server_that_fails_in_every_way_loses_just_what_it_does_not_give() {
    let tmp = tempfile::tempdir().unwrap();
    let server = serve();
    let rows = 200;
    let table = table(tmp.path(), &server.base, rows);
    let dir = tmp.path().join("out");
    let report = run(&options(&table, &dir)).unwrap();
    let good = (0..rows).filter(|n| fate(*n) == "good").count() as u64;
    assert_eq!((report.rows, report.train + report.test), (200, good));
    let lost: u64 = report.lost.values().sum();
    assert_eq!(report.rows, report.train + report.test + lost);
    for cause in [
        "not-found",
        "timeout",
        "short-body",
        "wrong-type",
        "corrupt",
        "placeholder",
        "opted-out",
    ] {
        let n = report
            .lost
            .iter()
            .find(|(c, _)| c.name() == cause)
            .unwrap()
            .1;
        assert_eq!(*n, 10, "{cause}");
    }
    // Every failure by its cause.
    let csv = std::fs::read_to_string(dir.join("failures.csv")).unwrap();
    assert_eq!(csv.lines().count(), 71, "{csv}");
    for line in csv.lines().skip(1) {
        let row: usize = line.split(',').next().unwrap().parse().unwrap();
        assert!(line.contains(fate(row - 1)), "{line}");
    }
    let text = std::fs::read_to_string(dir.join("report.txt")).unwrap();
    assert!(
        text.contains("[placeholder]") && text.contains("training images"),
        "{text}"
    );
    // What is in the shards can be read, is resized, and is no placeholder.
    let sets = open(&format!("shards:{}", dir.display()), OpenOptions::default()).unwrap();
    assert_eq!(sets.classes(), ["c0", "c1", "c2"]);
    assert_eq!(
        (sets.train.len() as u64, sets.test.len() as u64),
        (report.train, report.test)
    );
    assert!(sets.test.len() > 10 && sets.test.len() < 60);
    assert!(sets.notes.is_empty(), "{:?}", sets.notes);
    for split in [&sets.train, &sets.test] {
        for &i in split.indices() {
            let image = split.source.pixels.decode(i).unwrap();
            assert_eq!((image.width, image.height), (40, 46));
            assert!(image.pixels.iter().any(|v| *v > 100));
        }
    }
    // The same command again does nothing.
    let asked = server.requests.load(Ordering::Relaxed);
    let before = shards(&dir);
    let again = run(&options(&table, &dir)).unwrap();
    assert_eq!(
        (again.settled, again.lost, again.train),
        (0, report.lost, report.train)
    );
    assert_eq!(server.requests.load(Ordering::Relaxed), asked);
    assert!(shards(&dir) == before);
    // A shard that is gone is made again.
    std::fs::remove_file(dir.join("train-000001.tar")).unwrap();
    assert_eq!(run(&options(&table, &dir)).unwrap().settled, 25);
    assert!(shards(&dir) == before);
    // Other settings are refused, and so are folders with other shards.
    let e = run(&BuildOptions {
        size: 32,
        ..options(&table, &dir)
    })
    .unwrap_err();
    assert!(
        e.exit_code() == 2 && e.to_string().contains("--size was 40 and is 32"),
        "{e}"
    );
    std::fs::remove_dir_all(dir.join(STATE_DIR)).unwrap();
    let e = run(&options(&table, &dir)).unwrap_err();
    assert!(e.to_string().contains("did not write"), "{e}");
}

const STATE_DIR: &str = ".build";

#[test]
fn a_build_that_was_stopped_goes_on_and_ends_with_the_same_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let server = serve();
    let table = table(tmp.path(), &server.base, 120);
    let [whole, torn] = ["whole", "torn"].map(|n| tmp.path().join(n));
    run(&options(&table, &whole)).unwrap();
    for ms in [30, 60, 100] {
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(ms));
                stop.store(true, Ordering::Relaxed);
            });
            // Stopped, or quicker than that.
            if let Err(e) = build(&options(&table, &torn), &stop) {
                assert!(e.to_string().contains("interrupted"), "{e}");
            }
        });
        // A journal that a dying process left half written.
        for entry in std::fs::read_dir(torn.join(STATE_DIR)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "journal") {
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len().saturating_sub(5)]).unwrap();
            }
        }
    }
    let report = run(&options(&table, &torn)).unwrap();
    assert!(shards(&whole) == shards(&torn));
    let lost = |d: &Path| std::fs::read(d.join("failures.csv")).unwrap();
    assert_eq!(lost(&whole), lost(&torn));
    assert!(report.settled < 120, "{}", report.settled);
    let left = std::fs::read_dir(torn.join(STATE_DIR)).unwrap();
    assert!(
        left.map(|e| e.unwrap().path())
            .all(|p| p.extension().is_none_or(|e| e != "journal"))
    );
}

/// Images in files, and a table of their names.
fn files(dir: &Path, text: &str, name: &str) -> std::path::PathBuf {
    for n in 0..12 {
        std::fs::write(dir.join(format!("{n}.png")), picture(n, 40)).unwrap();
    }
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn local(
    dir: &Path,
    name: &str,
    text: &str,
    change: impl Fn(&mut BuildOptions),
) -> (BuildReport, BTreeMap<String, usize>) {
    let table = files(dir, text, name);
    let out = tempfile::tempdir().unwrap();
    let mut o = options(&table, &out.path().join("o"));
    o.test_share = 0.0;
    change(&mut o);
    let report = run(&o).unwrap();
    let sets = open(
        &format!("shards:{}/train-*.tar", o.dir.display()),
        OpenOptions::default(),
    )
    .unwrap();
    let counts = sets.train.counts().into_iter().zip(sets.test.counts());
    let counts = sets
        .classes()
        .iter()
        .cloned()
        .zip(counts.map(|(a, b)| a + b))
        .collect();
    (report, counts)
}

#[test]
fn tables_of_every_kind_and_rules_for_several_labels() {
    let tmp = tempfile::tempdir().unwrap();
    let d = tmp.path();
    let of = |pairs: &[(&str, usize)]| -> BTreeMap<String, usize> {
        pairs.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect()
    };
    let lines = r#"{"Image_URL": "0.png", "Labels": ["cat", "dog"], "label_probs": [0.2, 0.7]}
{"Image_URL": "1.png", "Labels": ["cat"], "label_probs": [0.9]}
{"Image_URL": "2.png", "Labels": ["cat", "ant"], "label_probs": [0.5, 0.5]}
not json
{"Image_URL": "3.png", "Labels": [], "label_probs": []}
{"Image_URL": "4.png", "Labels": ["ant", "dog"], "label_probs": [0.1]}
{"Image_URL": "1.png", "Labels": ["cat"], "label_probs": [0.9]}
{"Labels": ["cat"], "label_probs": [0.9]}
"#;
    let (r, counts) = local(d, "t.jsonl", lines, |_| {});
    assert_eq!(counts, of(&[("cat", 2), ("dog", 1),]));
    let lost: Vec<(String, u64)> = r.lost.iter().map(|(c, n)| (c.name(), *n)).collect();
    let want = [
        ("bad-row", 2),
        ("no-url", 1),
        ("no-label", 1),
        ("duplicate", 1),
    ];
    assert_eq!(lost, want.map(|(c, n)| (c.to_owned(), n)));
    assert_eq!(r.rows, r.train + r.lost.values().sum::<u64>());
    let (_, counts) = local(d, "t.jsonl", lines, |o| o.reduce = Some(Reduce::Rarest));
    assert_eq!(counts, of(&[("ant", 1), ("cat", 1), ("dog", 1)]));
    let (_, counts) = local(d, "t.jsonl", lines, |o| o.reduce = Some(Reduce::Frequent));
    assert_eq!(counts, of(&[("cat", 3)]));
    let (r, counts) = local(d, "t.jsonl", lines, |o| {
        o.reduce = Some(Reduce::Single);
        o.min_score = Some(0.6);
    });
    assert_eq!(
        (counts, r.lost[&Cause::LowScore]),
        (of(&[("cat", 1), ("dog", 1)]), 1)
    );

    // Semicolons, lists in a cell, numbers in the order of numbers, the most frequent classes, a cap.
    let mut text = String::from("path;klass\n");
    for n in 0..12 {
        text += &format!("{n}.png;{}\n", ["10", "9", "9", "2", "10", "9"][n % 6]);
    }
    let klass = |o: &mut BuildOptions| o.fields.label = Some("klass".into());
    let (r, counts) = local(d, "t.csv", &text, |o| {
        klass(o);
        o.top = Some(2);
        o.per_class = Some(5);
    });
    assert_eq!(counts, of(&[("9", 5), ("10", 4)]));
    assert_eq!(
        (r.lost[&Cause::ClassNotKept], r.lost[&Cause::OverCap]),
        (2, 1)
    );
    let (_, counts) = local(
        d,
        "t.tsv",
        "file\tlabel\n0.png\t['a', 'b']\n1.png\tb|a\n2.png\tc\n3.png\tb\n",
        |_| {},
    );
    assert_eq!(counts, of(&[("b", 3), ("c", 1)]));
    let gz = |text: &str| {
        let mut e = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        e.write_all(text.as_bytes()).unwrap();
        e.finish().unwrap()
    };
    files(d, "", "x");
    std::fs::write(
        d.join("t.csv.gz"),
        gz("url,label\n0.png,x\n1.png,y\nmissing.png,x\n"),
    )
    .unwrap();
    let o = BuildOptions {
        test_share: 0.0,
        ..options(&d.join("t.csv.gz"), &d.join("gz"))
    };
    let r = run(&o).unwrap();
    assert_eq!((r.train, r.lost[&Cause::Unreadable]), (2, 1));
}

#[test]
fn parquet_tables_are_read() {
    use parquet::data_type::{ByteArray, ByteArrayType, FloatType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    let tmp = tempfile::tempdir().unwrap();
    files(tmp.path(), "", "x");
    let schema = "message m { required binary url (UTF8); required binary text (UTF8);
        repeated int64 labels; repeated float label_probs; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let path = tmp.path().join("t.parquet");
    let file = std::fs::File::create(&path).unwrap();
    let properties =
        WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY);
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties.build())).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let text = |t: &[&str]| t.iter().map(|s| ByteArray::from(*s)).collect::<Vec<_>>();
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<ByteArrayType>()
        .write_batch(&text(&["0.png", "1.png", "2.png"]), None, None)
        .unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<ByteArrayType>()
        .write_batch(&text(&["a", "b", "c"]), None, None)
        .unwrap();
    column.close().unwrap();
    // Rows [7, 8], [], [7].
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<Int64Type>()
        .write_batch(&[7, 8, 7], Some(&[1, 1, 0, 1]), Some(&[0, 1, 0, 0]))
        .unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<FloatType>()
        .write_batch(&[0.1, 0.6, 0.9], Some(&[1, 1, 0, 1]), Some(&[0, 1, 0, 0]))
        .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    let o = BuildOptions {
        test_share: 0.0,
        ..options(&path, &tmp.path().join("o"))
    };
    let r = run(&o).unwrap();
    assert_eq!(
        (r.rows, r.train, r.classes, r.lost[&Cause::NoLabel]),
        (3, 2, 2, 1)
    );
    assert_eq!(r.reduce, "score");
    let sets = open(
        &format!("shards:{}/train-*", o.dir.display()),
        OpenOptions::default(),
    )
    .unwrap();
    assert_eq!(sets.classes(), ["7", "8"]);
}

#[test]
fn what_cannot_be_done_is_said_in_a_line_or_two() {
    let tmp = tempfile::tempdir().unwrap();
    let d = tmp.path();
    let says = |o: &BuildOptions, word: &str| {
        let e = run(o).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(word), "{e}");
        assert!(e.to_string().lines().count() <= 2, "{e}");
    };
    let out = d.join("out");
    says(&options(&d.join("none.csv"), &out), "none.csv");
    says(&options(d, &out), "a folder");
    let t = |text: &str, name: &str| files(d, text, name);
    says(&options(&t("", "a.csv"), &out), "is empty");
    says(
        &options(&t("picture,label\n", "b.csv"), &out),
        "picture, label",
    );
    let mut o = options(&t("picture,label\n0.png,a\n", "b.csv"), &out);
    o.fields.url = Some("pic".into());
    says(&o, "no field `pic`");
    says(
        &options(&t("url,kind\n0.png,a\n", "b.csv"), &out),
        "--label-field",
    );
    says(
        &options(&t("url,label\n0.png,\n", "b.csv"), &out),
        "1 rows without a label",
    );
    says(&options(&t("url,label\n", "b.csv"), &out), "no rows");
    says(&options(&t("[{\"url\": 1}]", "b.json"), &out), "JSON lines");
    says(
        &options(&t("PAR1 and no more", "b.parquet"), &out),
        "Parquet",
    );
    let good = t("url,label\n0.png,a\n", "b.csv");
    says(
        &BuildOptions {
            reduce: Some(Reduce::Score),
            ..options(&good, &out)
        },
        "no scores",
    );
    says(
        &BuildOptions {
            quality: 0,
            ..options(&good, &out)
        },
        "--quality",
    );
    says(&options(&good, &good.join("in-a-file")), "cannot write");
    assert!(!out.exists());
    // A dry run writes nothing.
    let r = run(&BuildOptions {
        dry_run: true,
        ..options(&good, &out)
    })
    .unwrap();
    assert!(r.candidates == 1 && !out.exists() && r.to_text().contains("to be tried"));
    // A known placeholder.
    let mut o = options(&good, &out);
    o.placeholders = vec![d.join("0.png")];
    o.test_share = 0.0;
    let r = run(&o).unwrap();
    assert_eq!(
        (r.train, r.lost[&Cause::Placeholder], r.empty_classes),
        (0, 1, vec!["a".to_owned()])
    );
}
