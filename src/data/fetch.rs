//! `data fetch`: data sets from their home pages, with a checksum, and from where it broke off.

use super::{Spec, data_dir};
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where to download from instead of a data set's home page (a base URL), for a mirror or a test.
pub const MIRROR_VARIABLE: &str = "TILEWRIGHT_DATA_MIRROR";

/// A file on a home page.
#[derive(Debug, Clone, Copy)]
struct Remote<'a> {
    base: &'a str,
    name: &'a str,
    bytes: u64,
    sha256: &'a str,
}

const CIFAR10: Remote = Remote {
    base: "https://www.cs.toronto.edu/~kriz",
    name: "cifar-10-binary.tar.gz",
    bytes: 170_052_171,
    sha256: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
};
const CIFAR100: Remote = Remote {
    base: "https://www.cs.toronto.edu/~kriz",
    name: "cifar-100-binary.tar.gz",
    bytes: 168_513_733,
    sha256: "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
};
const TINY_IMAGENET: Remote = Remote {
    base: "http://cs231n.stanford.edu",
    name: "tiny-imagenet-200.zip",
    bytes: 248_100_043,
    sha256: "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
};

/// How long to try.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Attempts in a row that bring nothing new.
    attempts: u32,
    /// Pause after the first; it doubles.
    pause: Duration,
}

/// Downloads `cifar10`, `cifar100` or `tiny-imagenet` into a folder (the spec's own, else [`data_dir`]) and returns
/// where the data set lies. What is there already is not fetched again; a download that broke off goes on where it
/// stopped. The CIFAR archives stay packed; Tiny ImageNet is unpacked.
///
/// # Errors
/// [`Error::Input`] for a data set that cannot be fetched; [`Error::Run`] where the server or the disk fails, or the
/// checksum differs.
pub fn fetch(spec: &str) -> Result<PathBuf> {
    let parsed: Spec = spec.parse()?;
    let (remote, dir) = match &parsed {
        Spec::Cifar10(dir) => (CIFAR10, dir),
        Spec::Cifar100(dir) => (CIFAR100, dir),
        Spec::TinyImagenet(dir) => (TINY_IMAGENET, dir),
        _ => {
            return Err(Error::input(format!(
                "`{spec}` is not fetched from anywhere; cifar10, cifar100 and tiny-imagenet are"
            )));
        }
    };
    let dir = dir.clone().unwrap_or_else(data_dir);
    let mirror = std::env::var(MIRROR_VARIABLE)
        .ok()
        .filter(|m| !m.is_empty());
    let remote = Remote {
        base: mirror.as_deref().unwrap_or(remote.base),
        ..remote
    };
    let patience = Patience {
        attempts: 5,
        pause: Duration::from_secs(1),
    };
    if !matches!(parsed, Spec::TinyImagenet(_)) {
        return download(remote, &dir, patience);
    }
    let unpacked = dir.join("tiny-imagenet-200");
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let archive = download(remote, &dir, patience)?;
    unpack(&archive, &dir, "tiny-imagenet-200")?;
    // It has served: what is unpacked takes its place.
    fs::remove_file(&archive).map_err(|e| Error::writing(&archive, e))?;
    Ok(unpacked)
}

/// What one request brought about.
enum Outcome {
    Complete,
    /// Try again; why.
    Again(String),
}

fn download(remote: Remote, dir: &Path, patience: Patience) -> Result<PathBuf> {
    fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
    let target = dir.join(remote.name);
    if target.is_file() {
        let mut file = File::open(&target).map_err(|e| Error::reading(&target, e))?;
        let found = checksum(&mut file).map_err(|e| Error::reading(&target, e))?;
        if found == remote.sha256 {
            return Ok(target);
        }
        return Err(Error::run(format!(
            "{} is there, but is not the official file (its SHA-256 is {found}): remove it to download it again",
            target.display()
        )));
    }
    let part = dir.join(format!("{}.part", remote.name));
    let fail = |e| Error::writing(&part, e);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&part)
        .map_err(fail)?;
    if file.try_lock().is_err() {
        return Err(Error::run(format!(
            "another download is writing {}",
            part.display()
        )));
    }
    let bar = ProgressBar::new(remote.bytes).with_message(remote.name.to_owned());
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style);
    }
    let url = format!("{}/{}", remote.base.trim_end_matches('/'), remote.name);
    let agent = agent();
    let (mut idle, mut wrong) = (0, 0);
    loop {
        let before = file.metadata().map_err(fail)?.len();
        let why = match request(&agent, &url, remote.bytes, &mut file, &part, &bar)? {
            Outcome::Complete => {
                let found = checksum(&mut file).map_err(fail)?;
                if found == remote.sha256 {
                    file.sync_all().map_err(fail)?;
                    fs::rename(&part, &target).map_err(|e| Error::writing(&target, e))?;
                    bar.finish_and_clear();
                    return Ok(target);
                }
                // Perhaps an old part of another file: once more, from the beginning.
                file.set_len(0).map_err(fail)?;
                wrong += 1;
                if wrong == 2 {
                    return Err(Error::run(format!(
                        "{url}: the SHA-256 of what was downloaded is {found}, expected {}; nothing was kept",
                        remote.sha256
                    )));
                }
                continue;
            }
            Outcome::Again(why) => why,
        };
        let after = file.metadata().map_err(fail)?.len();
        idle = if after > before { 0 } else { idle + 1 };
        if idle >= patience.attempts {
            return Err(Error::run(format!(
                "{url}: {why} ({idle} attempts)\n{after} of {} bytes are kept in {}; the same command goes on from there.",
                remote.bytes,
                part.display()
            )));
        }
        bar.suspend(|| eprintln!("{url}: {why}; trying again"));
        std::thread::sleep(patience.pause * 2u32.pow(idle.saturating_sub(1).min(6)));
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        // A server that stops sending is left after this; the next request goes on from there.
        .timeout_recv_body(Some(Duration::from_secs(300)))
        .user_agent(concat!("tilewright/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// Asks for what is missing of the part file and appends it.
fn request(
    agent: &ureq::Agent,
    url: &str,
    bytes: u64,
    file: &mut File,
    part: &Path,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let fail = |e| Error::writing(part, e);
    let mut have = file.seek(SeekFrom::End(0)).map_err(fail)?;
    if have == bytes {
        return Ok(Outcome::Complete);
    }
    if have > bytes {
        file.set_len(0).map_err(fail)?;
        have = file.seek(SeekFrom::Start(0)).map_err(fail)?;
    }
    let mut get = agent.get(url).header("Accept-Encoding", "identity");
    if have > 0 {
        get = get.header("Range", format!("bytes={have}-"));
    }
    let mut response = match get.call() {
        Ok(response) => response,
        Err(e) => return Ok(Outcome::Again(e.to_string())),
    };
    let status = response.status().as_u16();
    match status {
        206 if starts_at(&response) == Some(have) => {}
        // The server sends the whole file (it knows no ranges), or another range than was asked for.
        200 => {
            file.set_len(0).map_err(fail)?;
            have = file.seek(SeekFrom::Start(0)).map_err(fail)?;
        }
        206 | 416 => {
            file.set_len(0).map_err(fail)?;
            return Ok(Outcome::Again(format!(
                "the server answers {status} to a request for the rest"
            )));
        }
        408 | 429 | 500..=599 => return Ok(Outcome::Again(format!("the server answers {status}"))),
        _ => return Err(Error::run(format!("{url}: the server answers {status}"))),
    }
    bar.set_position(have);
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) => return Ok(Outcome::Again(e.to_string())),
        };
        have += n as u64;
        if have > bytes {
            file.set_len(0).map_err(fail)?;
            return Err(Error::run(format!(
                "{url}: more than the {bytes} bytes that the file has; nothing was kept"
            )));
        }
        file.write_all(&buffer[..n]).map_err(fail)?;
        bar.set_position(have);
    }
    if have < bytes {
        return Ok(Outcome::Again(format!(
            "the connection ended at {have} of {bytes} bytes"
        )));
    }
    Ok(Outcome::Complete)
}

/// The first byte of `Content-Range: bytes FIRST-LAST/TOTAL`.
fn starts_at<B>(response: &ureq::http::Response<B>) -> Option<u64> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    range
        .trim()
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .trim()
        .parse()
        .ok()
}

fn checksum(file: &mut File) -> std::io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    std::io::copy(file, &mut hash)?;
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Unpacks the folder `name` of a zip archive into `dir`, whole or not at all.
fn unpack(archive: &Path, dir: &Path, name: &str) -> Result<()> {
    let bad =
        |e: zip::result::ZipError| Error::run(format!("cannot unpack {}: {e}", archive.display()));
    let file = File::open(archive).map_err(|e| Error::reading(archive, e))?;
    let mut zip = zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(bad)?;
    let staging = tempfile::Builder::new()
        .prefix(".unpacking-")
        .tempdir_in(dir)
        .map_err(|e| Error::writing(dir, e))?;
    let bar = ProgressBar::new(zip.len() as u64).with_message("unpacking");
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).map_err(bad)?;
        let Some(path) = entry.enclosed_name() else {
            return Err(Error::run(format!(
                "{}: entry {i} has a name that leads out of the archive",
                archive.display()
            )));
        };
        let path = staging.path().join(path);
        let write = |entry: &mut dyn Read| {
            fs::create_dir_all(path.parent().unwrap_or(staging.path()))?;
            std::io::copy(entry, &mut File::create(&path)?)
        };
        if entry.is_dir() {
            fs::create_dir_all(&path).map_err(|e| Error::writing(&path, e))?;
        } else {
            write(&mut entry).map_err(|e| Error::writing(&path, e))?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let from = staging.path().join(name);
    if !from.is_dir() {
        return Err(Error::run(format!(
            "{} holds no folder {name}",
            archive.display()
        )));
    }
    let to = dir.join(name);
    fs::rename(&from, &to).map_err(|e| Error::writing(&to, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    /// How the server answers a request, in turn; the last one for all that follow.
    #[derive(Clone, Copy, Debug)]
    enum Answer {
        /// As asked, ranges included.
        Good,
        /// Drop the connection at once.
        Drop,
        /// Announce everything, send this many bytes, then drop.
        Short(usize),
        /// The whole file, whatever range was asked for.
        IgnoreRange,
        /// A range that was not asked for.
        WrongRange,
        /// Other bytes of the same length.
        Corrupt,
        /// More than there should be.
        TooLong,
        Status(u16),
    }

    struct Server {
        base: String,
        /// The `Range` of each request.
        log: Arc<Mutex<Vec<Option<String>>>>,
    }

    fn content() -> Vec<u8> {
        (0..300_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect()
    }

    /// Serves [`content`]; its thread ends with the test program.
    fn serve(answers: &[Answer]) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (seen, answers) = (log.clone(), answers.to_vec());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let n = seen.lock().unwrap().len();
                let answer = answers[n.min(answers.len() - 1)];
                // A client that hangs up early is not the server's failure.
                let _ = respond(stream.unwrap(), answer, &seen);
            }
        });
        Server { base, log }
    }

    fn respond(
        mut stream: TcpStream,
        answer: Answer,
        log: &Mutex<Vec<Option<String>>>,
    ) -> std::io::Result<()> {
        let mut range = None;
        for line in BufReader::new(stream.try_clone()?).lines() {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("range: ") {
                range = Some(value.to_owned());
            }
        }
        log.lock().unwrap().push(range.clone());
        let body = content();
        let from = range
            .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
            .unwrap_or(0usize);
        let mut send = |status: &str, from: usize, body: &[u8], extra: &str| {
            let announced = body.len() - from;
            write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Length: {announced}\r\nConnection: close\r\n{extra}\r\n"
            )?;
            match answer {
                Answer::Short(n) => stream.write_all(&body[from..(from + n).min(body.len())]),
                _ => stream.write_all(&body[from..]),
            }
        };
        let span = |from: usize| {
            format!(
                "Content-Range: bytes {from}-{}/{}\r\n",
                body.len() - 1,
                body.len()
            )
        };
        match answer {
            Answer::Drop => Ok(()),
            Answer::Status(code) => send(&format!("{code} x"), 0, b"", ""),
            Answer::WrongRange if from > 0 => send("206 Partial", from + 1, &body, &span(from + 1)),
            Answer::Good | Answer::Short(_) if from > 0 => {
                send("206 Partial", from, &body, &span(from))
            }
            Answer::Corrupt => send("200 OK", 0, &vec![7; body.len()], ""),
            Answer::TooLong => send("200 OK", 0, &[&body[..], b"more"].concat(), ""),
            _ => send("200 OK", 0, &body, ""),
        }
    }

    fn get(server: &Server, dir: &Path) -> Result<PathBuf> {
        let hash: String = Sha256::digest(content())
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let remote = Remote {
            base: &server.base,
            name: "set.bin",
            bytes: 300_000,
            sha256: &hash,
        };
        download(
            remote,
            dir,
            Patience {
                attempts: 3,
                pause: Duration::from_millis(1),
            },
        )
    }

    fn run(
        answers: &[Answer],
    ) -> (
        Result<Vec<u8>, String>,
        Vec<Option<String>>,
        tempfile::TempDir,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(answers);
        let got = get(&server, dir.path())
            .map(|p| fs::read(p).unwrap())
            .map_err(|e| e.to_string());
        let log = server.log.lock().unwrap().clone();
        (got, log, dir)
    }

    #[test]
    fn a_download_survives_what_servers_do() {
        use Answer::*;
        let cases: [(&[Answer], usize); 7] = [
            (&[Good], 1),
            (&[Drop, Drop, Good], 3),
            (&[Short(100_000), Short(50_000), Good], 3),
            (&[Short(100_000), IgnoreRange], 2),
            (&[Short(100_000), WrongRange, Good], 3),
            (&[Short(70_000), Status(416), Status(503), Good], 4),
            (&[Corrupt, Good], 2),
        ];
        for (answers, requests) in cases {
            let (got, log, dir) = run(answers);
            assert!(
                got.as_deref() == Ok(&content()[..]),
                "{answers:?}: {:?}",
                got.map(|b| b.len())
            );
            assert_eq!(log.len(), requests, "{answers:?}");
            assert!(!dir.path().join("set.bin.part").exists(), "{answers:?}");
        }
        let (_, log, _) = run(&[Short(100_000), Good]);
        assert_eq!(
            log,
            [None, Some("bytes=100000-".to_owned())],
            "goes on from where it broke off"
        );
    }

    #[test]
    fn a_download_that_fails_says_why_and_keeps_its_part() {
        use Answer::*;
        let (got, log, dir) = run(&[Short(100_000), Drop]);
        let e = got.unwrap_err();
        assert!(
            e.contains("3 attempts") && e.contains("100000 of 300000") && log.len() == 4,
            "{e} {log:?}"
        );
        assert_eq!(
            fs::metadata(dir.path().join("set.bin.part")).unwrap().len(),
            100_000
        );
        // The next run asks only for the rest, and the one after it for nothing.
        let server = serve(&[Good]);
        assert!(fs::read(get(&server, dir.path()).unwrap()).unwrap() == content());
        get(&server, dir.path()).unwrap();
        assert_eq!(
            *server.log.lock().unwrap(),
            [Some("bytes=100000-".to_owned())]
        );

        fs::write(dir.path().join("set.bin"), b"something else").unwrap();
        assert!(
            get(&server, dir.path())
                .unwrap_err()
                .to_string()
                .contains("not the official file")
        );
        let (got, log, dir) = run(&[Corrupt]);
        assert!(got.unwrap_err().contains("SHA-256") && log.len() == 2);
        assert!(!dir.path().join("set.bin").exists());
        let (got, log, _) = run(&[Status(404)]);
        assert!(got.unwrap_err().contains("404") && log.len() == 1);
        assert!(run(&[TooLong]).0.unwrap_err().contains("300000 bytes"));
        let gone = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let server = Server {
            base: format!("http://{gone}"),
            log: Arc::default(),
        };
        assert_eq!(
            get(&server, dir.path()).unwrap_err().exit_code(),
            1,
            "nobody listens"
        );
        assert!(fetch("digits").unwrap_err().to_string().contains("cifar10"));
    }

    #[test]
    fn an_archive_is_unpacked_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let pack = |names: &[&str]| {
            let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
            for name in names {
                zip.start_file(*name, zip::write::SimpleFileOptions::default())
                    .unwrap();
                zip.write_all(b"hello").unwrap();
            }
            zip.finish().unwrap().into_inner()
        };
        let archive = dir.path().join("a.zip");
        let bytes = pack(&["set/wnids.txt", "set/train/x/1.txt"]);
        fs::write(&archive, &bytes[..bytes.len() - 30]).unwrap();
        assert!(unpack(&archive, dir.path(), "set").is_err());
        fs::write(&archive, pack(&["set/a", "../outside"])).unwrap();
        assert!(
            unpack(&archive, dir.path(), "set")
                .unwrap_err()
                .to_string()
                .contains("leads out")
        );
        fs::write(&archive, pack(&["other/a"])).unwrap();
        assert!(
            unpack(&archive, dir.path(), "set")
                .unwrap_err()
                .to_string()
                .contains("no folder set")
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing is left behind"
        );
        fs::write(&archive, &bytes).unwrap();
        unpack(&archive, dir.path(), "set").unwrap();
        assert_eq!(
            fs::read(dir.path().join("set/train/x/1.txt")).unwrap(),
            b"hello"
        );
    }
}
