//! `data build` killed and gone on with; and at a hundred thousand images.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tilewright::data::{Feed, Images, Loader, LoaderOptions, OpenOptions, PrepareOptions, open};

fn picture(n: usize, side: u32) -> Vec<u8> {
    let image = image::RgbImage::from_fn(side, side, |x, y| {
        let wave = |a: usize, b: u32| ((x * (1 + a as u32) + y * b) as usize + n * 7) % 256;
        image::Rgb([wave(n % 5, 2) as u8, wave(1, 3) as u8, wave(n % 3, 1) as u8])
    });
    let mut out = std::io::Cursor::new(vec![]);
    image.write_to(&mut out, image::ImageFormat::Jpeg).unwrap();
    out.into_inner()
}

/// Serves `/N.jpg` from so many pictures, each after a pause; every tenth is not found. Connections stay open.
fn serve(pictures: usize, side: u32, pause: Duration) -> String {
    let pictures: Arc<Vec<Vec<u8>>> = Arc::new((0..pictures).map(|n| picture(n, side)).collect());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let pictures = pictures.clone();
            // A client that hangs up is no failure of the server's.
            std::thread::spawn(move || _ = answers(stream.unwrap(), &pictures, pause));
        }
    });
    base
}

fn answers(mut stream: TcpStream, pictures: &[Vec<u8>], pause: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        let mut line = String::new();
        while reader.read_line(&mut line)? > 2 {
            line.clear();
        }
        let number = first.split(['/', '.']).nth(1).and_then(|n| n.parse().ok());
        let n: usize = number.unwrap_or(0);
        std::thread::sleep(pause);
        let mut out = vec![];
        match n % 10 {
            9 => out.extend(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            _ => {
                let body = &pictures[n % pictures.len()];
                let length = body.len();
                write!(
                    out,
                    "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {length}\r\n\r\n"
                )?;
                out.extend(body);
            }
        }
        stream.write_all(&out)?;
    }
}

fn table(dir: &Path, base: &str, rows: usize) -> PathBuf {
    let mut text = String::from("url,label\n");
    for n in 0..rows {
        text += &format!("{base}/{n}.jpg,{}\n", n % 10);
    }
    let path = dir.join(format!("{rows}.csv"));
    std::fs::write(&path, text).unwrap();
    path
}

fn build(table: &Path, dir: &Path, more: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tilewright"));
    c.args(["data", "build"]).arg(table).arg("-o").arg(dir);
    c.args(more).stdout(Stdio::null()).stderr(Stdio::piped());
    c
}

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
fn a_build_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let base = serve(50, 40, Duration::from_millis(20));
    let table = table(tmp.path(), &base, 300);
    let [whole, killed] = ["whole", "killed"].map(|n| tmp.path().join(n));
    let more = ["--per-shard", "40", "--downloads", "8"];
    let clock = Instant::now();
    let out = build(&table, &whole, &more).output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let time = clock.elapsed();
    let mut deaths = 0;
    for i in 0..6 {
        let mut child = build(&table, &killed, &more).spawn().unwrap();
        std::thread::sleep(time.mul_f64(0.08 + 0.05 * f64::from(i)));
        deaths += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(
        deaths >= 3,
        "only {deaths} of 6 lived long enough to be killed"
    );
    let out = build(&table, &killed, &more).output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let (a, b) = (shards(&whole), shards(&killed));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    assert!(a == b, "the shards differ");
    let report = |d: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(d.join("report.json")).unwrap()).unwrap()
    };
    let (a, b) = (report(&whole), report(&killed));
    for key in ["rows", "train", "test", "lost", "per_class", "bytes"] {
        assert_eq!(a[key], b[key], "{key}");
    }
    assert_eq!(
        (a["lost"]["not-found"].as_u64(), a["rows"].as_u64()),
        (Some(30), Some(300))
    );
    let left = std::fs::read_dir(&killed)
        .unwrap()
        .map(|e| e.unwrap().file_name());
    let left: Vec<_> = left
        .filter(|n| n.to_string_lossy().ends_with(".part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Kilobytes of this process: now, and the most so far.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// `cargo test --release --test large_data -- --ignored --nocapture` prints the numbers of docs/large-data.md.
#[test]
#[ignore = "minutes; for the numbers"]
#[cfg(target_os = "linux")]
fn a_hundred_thousand_images() {
    let tmp = tempfile::tempdir().unwrap();
    let base = serve(2000, 80, Duration::ZERO);
    for rows in [10_000, 100_000] {
        let dir = tmp.path().join(format!("shards-{rows}"));
        let table = table(tmp.path(), &base, rows);
        let clock = Instant::now();
        let more = ["--per-host", "64", "--size", "64", "--per-shard", "5000"];
        let mut child = build(&table, &dir, &more).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        let mut peak = 0u64;
        while child.try_wait().unwrap().is_none() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find(|l| l.starts_with("VmHWM:"));
            let kb = line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok());
            peak = peak.max(kb.unwrap_or(0));
            std::thread::sleep(Duration::from_millis(50));
        }
        let seconds = clock.elapsed().as_secs_f64();
        assert!(child.wait().unwrap().success());
        println!(
            "build: {rows} URLs in {seconds:.1} s, {:.0} a second; peak memory {:.0} MB",
            rows as f64 / seconds,
            peak as f64 / 1e3
        );
    }
    let spec = format!("shards:{}", tmp.path().join("shards-100000").display());
    let clock = Instant::now();
    let sets = open(&spec, OpenOptions::default()).unwrap();
    println!(
        "open: {} images in {:.2} s",
        sets.train.len() + sets.test.len(),
        clock.elapsed().as_secs_f64()
    );
    let prepare = PrepareOptions::default();
    let images = Images::prepare(&sets.train, sets.preprocess(64), prepare).unwrap();
    assert!(!images.in_memory());
    let mut loader = Loader::new(Arc::new(images), LoaderOptions::train(128, 0)).unwrap();
    for epoch in 0..2 {
        let (clock, mut n) = (Instant::now(), 0);
        let mut early = 0;
        while let Some(batch) = loader.next_batch().unwrap() {
            n += batch.valid;
            if batch.step == 100 {
                early = memory().0;
            }
            loader.recycle(batch);
        }
        let seconds = clock.elapsed().as_secs_f64();
        let (now, most) = memory();
        println!(
            "read: epoch {epoch}, {n} images in {seconds:.1} s, {:.0} a second; memory {:.0} MB after 100 batches, {:.0} MB at the end, {:.0} MB at most",
            n as f64 / seconds,
            early as f64 / 1e3,
            now as f64 / 1e3,
            most as f64 / 1e3
        );
    }
}
