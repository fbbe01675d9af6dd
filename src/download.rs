//! Files from the network: with a progress bar, a checksum, and from where a download broke off.

use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A file on a server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remote<'a> {
    pub url: &'a str,
    /// For the progress bar.
    pub name: &'a str,
    pub bytes: u64,
    /// In hexadecimal, where it is known.
    pub sha256: Option<&'a str>,
    /// Sent as a bearer token.
    pub token: Option<&'a str>,
}

/// How long to try.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Attempts in a row that bring nothing new.
    pub attempts: u32,
    /// Pause after the first; it doubles.
    pub pause: Duration,
}

impl Patience {
    /// For people.
    pub const USUAL: Patience = Patience {
        attempts: 5,
        pause: Duration::from_secs(1),
    };
}

/// What one request brought about.
enum Outcome {
    Complete,
    /// Try again; why.
    Again(String),
}

/// Downloads `remote` to `target`, whole or not at all. What is there already is only checked; a download that broke off
/// goes on where it stopped (in `target.part`).
///
/// # Errors
/// [`Error::Run`]: the server or the disk fails, or the checksum differs.
pub(crate) fn download(remote: &Remote, target: &Path, patience: Patience) -> Result<()> {
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
    }
    let wrong_sum = |found: &str| remote.sha256.is_some_and(|wanted| wanted != found);
    if target.is_file() {
        let mut file = File::open(target).map_err(|e| Error::reading(target, e))?;
        let found = checksum(&mut file).map_err(|e| Error::reading(target, e))?;
        if !wrong_sum(&found) {
            return Ok(());
        }
        return Err(Error::run(format!(
            "{} is there, but is not the official file (its SHA-256 is {found}): remove it to download it again",
            target.display()
        )));
    }
    let mut part = target.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
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
    let url = remote.url;
    let agent = agent(MAX_REDIRECTS);
    let (mut idle, mut wrong) = (0, 0);
    loop {
        let before = file.metadata().map_err(fail)?.len();
        let why = match request(&agent, remote, &mut file, &part, &bar)? {
            Outcome::Complete => {
                let found = checksum(&mut file).map_err(fail)?;
                if !wrong_sum(&found) {
                    file.sync_all().map_err(fail)?;
                    fs::rename(&part, target).map_err(|e| Error::writing(target, e))?;
                    bar.finish_and_clear();
                    return Ok(());
                }
                // Perhaps an old part of another file: once more, from the beginning.
                file.set_len(0).map_err(fail)?;
                wrong += 1;
                if wrong == 2 {
                    return Err(Error::run(format!(
                        "{url}: the SHA-256 of what was downloaded is {found}, expected {}; nothing was kept",
                        remote.sha256.unwrap_or_default()
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

/// Redirects that are followed.
const MAX_REDIRECTS: u32 = 10;

/// A client that follows so many redirects. A token is not shown to another host than the one it was sent to.
pub(crate) fn agent(redirects: u32) -> ureq::Agent {
    ureq::Agent::config_builder()
        .max_redirects(redirects)
        .max_redirects_will_error(redirects > 0)
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
    remote: &Remote,
    file: &mut File,
    part: &Path,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let Remote { url, bytes, .. } = *remote;
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
    if let Some(token) = remote.token {
        get = get.header("Authorization", format!("Bearer {token}"));
    }
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    /// How the server answers a request, in turn; the last one for all that follow.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Answer {
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
        /// To another place on this server.
        Redirect,
        /// This status to a question for a file's metadata.
        HeadStatus(u16),
    }

    pub(crate) struct Server {
        pub base: String,
        /// The `Range` of each request.
        pub log: Arc<Mutex<Vec<Option<String>>>>,
    }

    pub(crate) fn content() -> Vec<u8> {
        (0..300_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect()
    }

    pub(crate) fn content_sha256() -> String {
        let sum = Sha256::digest(content());
        sum.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// As the hub answers to HEAD.
    fn head(stream: &mut TcpStream, answer: Answer) -> std::io::Result<()> {
        let (sum, bytes) = (content_sha256(), content().len());
        match answer {
            Answer::HeadStatus(code) => {
                write!(
                    stream,
                    "HTTP/1.1 {code} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            }
            _ => write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: http://elsewhere.invalid/\r\nX-Repo-Commit: 0123abc\r\n\
                 X-Linked-Etag: \"{sum}\"\r\nX-Linked-Size: {bytes}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            ),
        }
    }

    /// Serves [`content`] under any name; its thread ends with the test program.
    pub(crate) fn serve(answers: &[Answer]) -> Server {
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
        let (mut range, mut asks) = (None, false);
        for line in BufReader::new(stream.try_clone()?).lines() {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            asks |= line.starts_with("head ");
            if let Some(value) = line.strip_prefix("range: ") {
                range = Some(value.to_owned());
            }
        }
        if asks {
            return head(&mut stream, answer);
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
            Answer::Redirect => send("302 Found", body.len(), &body, "Location: /moved\r\n"),
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
        let hash = content_sha256();
        let remote = Remote {
            url: &format!("{}/set.bin", server.base),
            name: "set.bin",
            bytes: 300_000,
            sha256: Some(&hash),
            token: None,
        };
        let target = dir.join("set.bin");
        let patience = Patience {
            attempts: 3,
            pause: Duration::from_millis(1),
        };
        download(&remote, &target, patience).map(|()| target)
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
    }
}
