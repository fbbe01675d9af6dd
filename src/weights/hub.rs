//! Files from the Hugging Face hub, in the hub library's own cache: what Python fetched is found here, and the other
//! way round.
//!
//! `models--OWNER--NAME/refs/main` holds a commit, `snapshots/COMMIT/FILE` leads to `blobs/ETAG`. The environment is
//! the library's: `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`.

use crate::download::{Patience, Remote, agent, download};
use crate::report::write_atomic;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The branch that is fetched.
const REVISION: &str = "main";

/// Redirects to another place on the same server (renamed repositories).
const MOVES: usize = 5;

/// A hub and its cache.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Base URL.
    pub endpoint: String,
    /// The cache folder.
    pub cache: PathBuf,
    /// Shown to the endpoint.
    pub token: Option<String>,
    /// The network is not used.
    pub offline: bool,
    patience: Patience,
}

/// What the hub says of a file.
struct Meta {
    url: String,
    commit: String,
    etag: String,
    bytes: u64,
}

impl Hub {
    /// As the environment says.
    pub fn from_env() -> Self {
        Self::configured(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn configured(var: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name| var(name).map(PathBuf::from);
        let home = || {
            let cache = path("XDG_CACHE_HOME").or_else(|| {
                path("HOME")
                    .or_else(|| path("USERPROFILE"))
                    .map(|h| h.join(".cache"))
            });
            cache.unwrap_or_default().join("huggingface")
        };
        let home = path("HF_HOME").unwrap_or_else(home);
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let kept = || {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            std::fs::read_to_string(file).ok()
        };
        let token = var("HF_TOKEN")
            .or_else(|| var("HUGGING_FACE_HUB_TOKEN"))
            .or_else(kept);
        let yes = |v: String| ["1", "ON", "YES", "TRUE"].contains(&v.to_ascii_uppercase().as_str());
        Hub {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            cache,
            token: token
                .map(|t| t.trim().to_string())
                .filter(|t| !t.is_empty()),
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            patience: Patience::USUAL,
        }
    }

    fn folder(&self, repo: &str) -> PathBuf {
        self.cache
            .join(format!("models--{}", repo.replace('/', "--")))
    }

    /// The file of `repo` in the cache, where it is there.
    pub fn cached(&self, repo: &str, file: &str) -> Option<PathBuf> {
        let folder = self.folder(repo);
        let commit = std::fs::read_to_string(folder.join("refs").join(REVISION)).ok()?;
        let path = folder.join("snapshots").join(commit.trim()).join(file);
        path.is_file().then_some(path)
    }

    /// The file of `repo`, from the cache or from the hub, held against `sha256` and what the hub says of it.
    ///
    /// # Errors
    /// [`Error::Input`]: the hub is offline by the environment, has no such file or does not give it to everyone;
    /// [`Error::Run`]: the network or the disk fails, or a checksum differs.
    pub fn fetch(&self, repo: &str, file: &str, sha256: Option<&str>) -> Result<PathBuf> {
        if let Some(path) = self.cached(repo, file) {
            return Ok(path);
        }
        if self.offline {
            return Err(Error::input(format!(
                "{repo}/{file} is not in {}, and HF_HUB_OFFLINE forbids to fetch it; run the same command with \
                 HF_HUB_OFFLINE=0",
                self.cache.display()
            )));
        }
        let meta = self.meta(repo, file)?;
        // The hub names large files by their SHA-256, small ones by Git's hash.
        let offered = (meta.etag.len() == 64).then_some(meta.etag.as_str());
        if let (Some(wanted), Some(offered)) = (sha256, offered)
            && !wanted.eq_ignore_ascii_case(offered)
        {
            return Err(Error::run(format!(
                "{}: the hub offers a file with the SHA-256 {offered}, the registry expects {wanted}; nothing was fetched",
                meta.url
            )));
        }
        let folder = self.folder(repo);
        let blob = folder.join("blobs").join(&meta.etag);
        let wanted = sha256.map(str::to_ascii_lowercase);
        let remote = Remote {
            url: &meta.url,
            name: &format!("{repo}/{file}"),
            bytes: meta.bytes,
            sha256: wanted.as_deref().or(offered),
            token: self.token.as_deref(),
        };
        download(&remote, &blob, self.patience)?;
        let path = folder.join("snapshots").join(&meta.commit).join(file);
        link(&blob, &path, file)?;
        let reference = folder.join("refs").join(REVISION);
        make_parent(&reference)?;
        write_atomic(&reference, meta.commit.as_bytes())?;
        Ok(path)
    }

    /// Asks the hub for commit, etag and size of a file.
    fn meta(&self, repo: &str, file: &str) -> Result<Meta> {
        let base = self.endpoint.trim_end_matches('/');
        let mut url = format!("{base}/{repo}/resolve/{REVISION}/{file}");
        for _ in 0..MOVES {
            let response = self.head(&url)?;
            let header = |names: [&str; 2]| {
                let found = names.iter().find_map(|n| response.headers().get(*n));
                found.and_then(|v| v.to_str().ok()).map(str::to_string)
            };
            let status = response.status().as_u16();
            let moved = header(["location", "location"])
                .filter(|l| (300..400).contains(&status) && l.starts_with('/'));
            if let Some(to) = moved {
                url = format!("{base}{to}");
                continue;
            }
            match status {
                200..=399 => {}
                401 | 403 => {
                    return Err(Error::input(format!(
                        "{url}: the hub answers {status}: the file is not for everyone, or not there; accept its licence on \
                         its page and set HF_TOKEN"
                    )));
                }
                404 => {
                    return Err(Error::input(format!(
                        "{url}: the hub has no such file (404)"
                    )));
                }
                _ => return Err(Error::run(format!("{url}: the hub answers {status}"))),
            }
            let commit = header(["x-repo-commit", "x-repo-commit"]);
            let etag = header(["x-linked-etag", "etag"])
                .map(|e| e.trim_start_matches("W/").trim_matches('"').to_string());
            let bytes = header(["x-linked-size", "content-length"]).and_then(|b| b.parse().ok());
            let name = |s: &String| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric());
            return match (commit.filter(name), etag.filter(name), bytes) {
                (Some(commit), Some(etag), Some(bytes)) => Ok(Meta {
                    url,
                    commit,
                    etag,
                    bytes,
                }),
                _ => Err(Error::run(format!(
                    "{url}: the answer has no commit, etag and size as the hub's have; is HF_ENDPOINT right?"
                ))),
            };
        }
        Err(Error::run(format!("{url}: moved {MOVES} times")))
    }

    fn head(&self, url: &str) -> Result<ureq::http::Response<ureq::Body>> {
        let agent = agent(0);
        let mut pause = self.patience.pause;
        let mut left = self.patience.attempts;
        loop {
            let mut head = agent.head(url).header("Accept-Encoding", "identity");
            if let Some(token) = &self.token {
                head = head.header("Authorization", format!("Bearer {token}"));
            }
            left = left.saturating_sub(1);
            match head.call() {
                Ok(r) if left > 0 && matches!(r.status().as_u16(), 408 | 429 | 500..) => {}
                Ok(r) => return Ok(r),
                Err(_) if left > 0 => {}
                Err(e) => return Err(Error::run(format!("{url}: {e}"))),
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
    }
}

fn make_parent(path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))
}

/// Makes `path` (`file` within a snapshot) lead to `blob`: by a link, or by a copy where the system makes none.
fn link(blob: &Path, path: &Path, file: &str) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    make_parent(path)?;
    let up = "../".repeat(2 + file.matches('/').count());
    let name = blob.file_name().unwrap_or_default();
    let target = Path::new(&up).join("blobs").join(name);
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&target, path).is_ok();
    #[cfg(not(unix))]
    let linked = std::os::windows::fs::symlink_file(&target, path).is_ok();
    if linked {
        return Ok(());
    }
    std::fs::copy(blob, path)
        .map(drop)
        .map_err(|e| Error::writing(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::download::tests::{Answer, content, content_sha256, serve};
    use std::time::Duration;

    fn hub(endpoint: &str, cache: &Path) -> Hub {
        Hub {
            endpoint: endpoint.into(),
            cache: cache.into(),
            token: Some("hf_x".into()),
            offline: false,
            patience: Patience {
                attempts: 3,
                pause: Duration::from_millis(1),
            },
        }
    }

    #[test]
    fn a_file_comes_into_the_hubs_own_layout() {
        use Answer::*;
        let plans: [&[Answer]; 4] = [
            &[Good],
            &[Short(100_000), Drop, Good],
            &[Redirect, Good],
            &[Corrupt, Good],
        ];
        for answers in plans {
            let dir = tempfile::tempdir().unwrap();
            let server = serve(answers);
            let hub = hub(&server.base, dir.path());
            assert_eq!(hub.cached("some/repo", "model.safetensors"), None);
            let path = hub.fetch("some/repo", "model.safetensors", None).unwrap();
            assert!(std::fs::read(&path).unwrap() == content(), "{answers:?}");
            let folder = dir.path().join("models--some--repo");
            assert_eq!(
                path,
                folder.join("snapshots/0123abc/model.safetensors"),
                "{answers:?}"
            );
            let read = |p: &str| std::fs::read(folder.join(p)).unwrap();
            assert_eq!(read("refs/main"), b"0123abc");
            assert!(read(&format!("blobs/{}", content_sha256())) == content());
            // A second time nothing is asked for.
            let asked = server.log.lock().unwrap().len();
            assert_eq!(
                hub.fetch("some/repo", "model.safetensors", None).unwrap(),
                path
            );
            assert_eq!(server.log.lock().unwrap().len(), asked);
        }
    }

    #[test]
    fn what_goes_wrong_is_said_and_leaves_nothing() {
        use Answer::*;
        let fails = |answers: &[Answer], sha256: Option<&str>| {
            let dir = tempfile::tempdir().unwrap();
            let server = serve(answers);
            let hub = hub(&server.base, dir.path());
            let e = hub.fetch("a/b", "m.safetensors", sha256).unwrap_err();
            assert_eq!(hub.cached("a/b", "m.safetensors"), None);
            (e.to_string(), e.exit_code())
        };
        assert!(fails(&[Corrupt], None).0.contains("SHA-256"));
        let other = "0".repeat(64);
        let (e, code) = fails(&[Good], Some(&other));
        assert!(e.contains("the registry expects 000") && code == 1, "{e}");
        assert!(fails(&[Drop], None).0.contains("3 attempts"));
        assert!(fails(&[HeadStatus(404)], None).0.contains("no such file"));
        let (e, code) = fails(&[HeadStatus(401)], None);
        assert!(e.contains("HF_TOKEN") && code == 2, "{e}");
        assert!(fails(&[HeadStatus(503)], None).0.contains("503"));
    }

    #[test]
    fn the_environment_is_the_librarys() {
        let with = |vars: &'static [(&'static str, &'static str)]| {
            Hub::configured(move |name| {
                let found = vars.iter().find(|(n, _)| *n == name);
                found.map(|(_, v)| v.to_string())
            })
        };
        let plain = with(&[("HOME", "/h")]);
        assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert!(!plain.offline && plain.token.is_none());
        let set = with(&[
            ("HF_HOME", "/x"),
            ("HF_TOKEN", " t\n"),
            ("HF_ENDPOINT", "http://mirror"),
            ("HF_HUB_OFFLINE", "true"),
        ]);
        assert_eq!(set.cache, Path::new("/x/hub"));
        assert_eq!(
            (set.token.as_deref(), set.endpoint.as_str()),
            (Some("t"), "http://mirror")
        );
        let e = set.fetch("a/b", "c.safetensors", None).unwrap_err();
        assert!(
            e.exit_code() == 2 && e.to_string().contains("HF_HUB_OFFLINE"),
            "{e}"
        );
        let moved = with(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/x")]);
        assert_eq!(moved.cache, Path::new("/c"));
    }
}
