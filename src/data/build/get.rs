//! One image file from its URL or path: time-outs, a limit of size, and a cause for every failure.

use super::{BuildOptions, Cause};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::Timeout;

/// Why there is no image.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub cause: Cause,
    pub detail: String,
    /// Whether another attempt may do better, and how long the server asks to wait.
    pub again: Option<Duration>,
}

impl Failure {
    pub(super) fn new(cause: Cause, detail: impl ToString) -> Self {
        let detail = detail.to_string();
        Failure {
            cause,
            detail: detail.lines().next().unwrap_or_default().to_owned(),
            again: None,
        }
    }

    fn again(cause: Cause, detail: impl ToString) -> Self {
        Failure {
            again: Some(Duration::ZERO),
            ..Failure::new(cause, detail)
        }
    }
}

/// The most that a server's `Retry-After` is heeded.
const LONGEST_WAIT: u64 = 60;

pub(super) fn agent(options: &BuildOptions) -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(5)
        .timeout_connect(Some(options.connect_timeout))
        .timeout_global(Some(options.timeout))
        .max_idle_connections_per_host(options.per_host)
        .max_idle_connections(options.downloads)
        .user_agent(concat!("tilewright/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// Where an image is.
#[derive(Debug, PartialEq)]
pub(super) enum Source {
    Remote,
    Local(PathBuf),
    Other,
}

/// What a URL means; a path is relative to its table's folder.
pub(super) fn source(url: &str, folder: &Path) -> Source {
    let lower = url.get(..8).unwrap_or(url).to_ascii_lowercase();
    if lower.starts_with("http://") || lower.starts_with("https://") {
        return Source::Remote;
    }
    if let Some(path) = url.strip_prefix("file://") {
        let path = path.strip_prefix("localhost").unwrap_or(path);
        return Source::Local(PathBuf::from(percent_decoded(path)));
    }
    match url.contains("://") {
        true => Source::Other,
        false => Source::Local(folder.join(url)),
    }
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut i) = (vec![], 0);
    while i < bytes.len() {
        let hex = text.get(i + 1..i + 3).filter(|_| bytes[i] == b'%');
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The host of a URL, for the limit of requests to each; empty for files.
pub(super) fn host(url: &str) -> &str {
    let Some((_, rest)) = url.split_once("://") else {
        return "";
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let host = &rest[..end];
    host.rsplit_once('@').map_or(host, |(_, h)| h)
}

/// Gets the file, whole.
pub(super) fn get(
    agent: &ureq::Agent,
    url: &str,
    folder: &Path,
    most: u64,
) -> Result<Vec<u8>, Failure> {
    let too_large = || Failure::new(Cause::TooLarge, format!("more than {most} bytes"));
    match source(url, folder) {
        Source::Remote => remote(agent, url, most),
        Source::Other => Err(Failure::new(
            Cause::Unreadable,
            "no http, https or file URL",
        )),
        Source::Local(path) => {
            let fail = |e: std::io::Error| Failure::new(Cause::Unreadable, e);
            let file = std::fs::File::open(&path).map_err(fail)?;
            let mut bytes = vec![];
            file.take(most + 1).read_to_end(&mut bytes).map_err(fail)?;
            match bytes.len() as u64 > most {
                true => Err(too_large()),
                false => Ok(bytes),
            }
        }
    }
}

fn remote(agent: &ureq::Agent, url: &str, most: u64) -> Result<Vec<u8>, Failure> {
    let asked = agent.get(url).header("Accept", "image/*,*/*;q=0.5");
    let mut response = asked.call().map_err(|e| failed(&e))?;
    let status = response.status().as_u16();
    let head = |name: &str| response.headers().get(name)?.to_str().ok();
    if status != 200 {
        let wait = head("retry-after").and_then(|t| t.trim().parse().ok());
        let wait = Duration::from_secs(wait.unwrap_or(0).min(LONGEST_WAIT));
        let (cause, again) = match status {
            404 | 410 => (Cause::NotFound, None),
            401 | 403 | 451 => (Cause::Refused, None),
            408 | 429 | 500..=599 => (Cause::ServerError, Some(wait)),
            _ => (Cause::OtherStatus, None),
        };
        return Err(Failure {
            again,
            ..Failure::new(cause, format!("status {status}"))
        });
    }
    let tags = response.headers().get_all("x-robots-tag").iter();
    let mut tags = tags.filter_map(|t| t.to_str().ok());
    if let Some(tag) = tags.find(|t| {
        let mut words = t.split(|c: char| !c.is_ascii_alphanumeric());
        words.any(|w| ["noai", "noimageai"].contains(&w.to_ascii_lowercase().as_str()))
    }) {
        return Err(Failure::new(Cause::OptedOut, tag));
    }
    let length: Option<u64> = head("content-length").and_then(|l| l.parse().ok());
    let kind = head("content-type").unwrap_or_default();
    if [
        "text/",
        "application/json",
        "application/xml",
        "application/pdf",
        "video/",
        "audio/",
    ]
    .iter()
    .any(|k| kind.starts_with(k))
    {
        return Err(Failure::new(Cause::WrongType, kind));
    }
    let too_large = |n: &str| Failure::new(Cause::TooLarge, format!("{n} bytes, limit {most}"));
    if let Some(n) = length.filter(|n| *n > most) {
        return Err(too_large(&n.to_string()));
    }
    let mut bytes = Vec::with_capacity(length.unwrap_or(0).min(most) as usize);
    let body = response.body_mut().with_config().limit(u64::MAX).reader();
    match body.take(most + 1).read_to_end(&mut bytes) {
        Ok(_) if bytes.len() as u64 > most => Err(too_large("more")),
        Ok(_) => match length {
            Some(n) if n != bytes.len() as u64 => {
                let detail = format!("{} of {n} bytes", bytes.len());
                Err(Failure::again(Cause::ShortBody, detail))
            }
            _ => Ok(bytes),
        },
        Err(e) => {
            let inner = e.get_ref().and_then(|e| e.downcast_ref::<ureq::Error>());
            let timed = matches!(inner, Some(ureq::Error::Timeout(_)))
                || e.kind() == std::io::ErrorKind::TimedOut;
            match timed {
                true => Err(Failure::again(
                    Cause::Timeout,
                    format!("after {} bytes", bytes.len()),
                )),
                false => {
                    let of = length.map_or(String::new(), |n| format!(" of {n}"));
                    let detail = format!("{}{of} bytes", bytes.len());
                    Err(Failure::again(Cause::ShortBody, detail))
                }
            }
        }
    }
}

fn failed(e: &ureq::Error) -> Failure {
    use ureq::Error as E;
    match e {
        E::Timeout(Timeout::Resolve | Timeout::Connect) => Failure::again(Cause::Connection, e),
        E::Timeout(_) => Failure::again(Cause::Timeout, e),
        E::HostNotFound => Failure::new(Cause::NoHost, e),
        E::BadUri(_) | E::Http(_) => Failure::new(Cause::Unreadable, e),
        E::TooManyRedirects | E::RedirectFailed => Failure::new(Cause::OtherStatus, e),
        E::Io(io) if io.kind() == std::io::ErrorKind::TimedOut => Failure::again(Cause::Timeout, e),
        E::Tls(_) | E::Rustls(_) => Failure::new(Cause::Connection, e),
        _ => Failure::again(Cause::Connection, e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_paths_are_told_apart() {
        let local = |p: &str| Source::Local(p.into());
        let of = |url| source(url, Path::new("/t"));
        assert_eq!(of("HTTPS://a/b.jpg"), Source::Remote);
        assert_eq!(of("file:///a%20b/c%zz.jpg"), local("/a b/c%zz.jpg"));
        assert_eq!(
            (of("x/y.jpg"), of("/z.jpg")),
            (local("/t/x/y.jpg"), local("/z.jpg"))
        );
        assert_eq!(of("s3://bucket/x"), Source::Other);
        assert_eq!(host("https://me@a.b:80/x?y@z"), "a.b:80");
        assert_eq!((host("http://a.b"), host("x/y")), ("a.b", ""));
    }
}
