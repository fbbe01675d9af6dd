//! `data build`: from a table of URLs and labels to shards.
//!
//! The tables are read first and everything is decided ([`plan`]): the label of each row, the classes, the split, and which
//! candidates make up which shard. Then shard after shard is filled ([`run`]); a shard that is done is never touched again,
//! and one under way lies in a [`journal`], so that a build that was killed goes on and ends with the same bytes.

mod get;
mod journal;
mod picture;
mod plan;
mod report;
mod run;
mod table;

#[cfg(test)]
mod tests;

pub use plan::Reduce;
pub use report::{BuildReport, Spread};
pub use run::build;
pub use table::Fields;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// What [`build`] does.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Tables of one kind: CSV, JSON lines or Parquet.
    pub tables: Vec<PathBuf>,
    /// Folder of the shards.
    pub dir: PathBuf,
    /// Columns.
    pub fields: Fields,
    /// Between several labels in a text; `None`: `|` or `;`, or a list in brackets.
    pub separator: Option<char>,
    /// Which of several labels counts; `None`: by score where there are scores, else the most frequent.
    pub reduce: Option<Reduce>,
    /// Labels with a lower score do not count.
    pub min_score: Option<f64>,
    /// The most frequent classes that are kept.
    pub top: Option<usize>,
    /// Candidates of each class at most.
    pub per_class: Option<usize>,
    /// Share of the test split.
    pub test_share: f64,
    /// Side in pixels: images with a longer shorter side are made smaller; 0: as they are.
    pub size: u32,
    /// Cut out the centre as a square of exactly that side.
    pub square: bool,
    /// Of the JPEG files, 1 to 100.
    pub quality: u8,
    /// Images with a shorter side are left out.
    pub min_side: u32,
    /// Larger files are left out.
    pub max_bytes: u64,
    /// Candidates of a shard.
    pub per_shard: usize,
    /// Downloads at once.
    pub downloads: usize,
    /// Of them, from one host.
    pub per_host: usize,
    /// Attempts after the first.
    pub retries: u32,
    /// Of a whole request.
    pub timeout: Duration,
    /// Until a connection is there.
    pub connect_timeout: Duration,
    /// Before the first new attempt; it doubles, and varies by half.
    pub pause: Duration,
    /// Files that servers send in place of an image.
    pub placeholders: Vec<PathBuf>,
    /// Decide only; download nothing.
    pub dry_run: bool,
}

impl BuildOptions {
    /// With the usual settings.
    #[must_use]
    pub fn new(tables: Vec<PathBuf>, dir: PathBuf) -> Self {
        BuildOptions {
            tables,
            dir,
            fields: Fields::default(),
            separator: None,
            reduce: None,
            min_score: None,
            top: None,
            per_class: None,
            test_share: 0.2,
            size: 256,
            square: false,
            quality: 95,
            min_side: 32,
            max_bytes: 20_000_000,
            per_shard: 5000,
            downloads: 64,
            per_host: 8,
            retries: 2,
            timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            pause: Duration::from_secs(1),
            placeholders: vec![],
            dry_run: false,
        }
    }
}

/// Why a row gives no image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The row cannot be read.
    BadRow,
    /// It has no URL.
    NoUrl,
    /// It has no label.
    NoLabel,
    /// No label has the score that is asked for.
    LowScore,
    /// It has several labels, and only single ones are asked for.
    SeveralLabels,
    /// An earlier row has the same URL.
    Duplicate,
    /// Its class is none of the most frequent ones.
    ClassNotKept,
    /// There are enough of its class.
    OverCap,
    /// Status 404 or 410.
    NotFound,
    /// Status 401, 403 or 451.
    Refused,
    /// Its owner asks not to use it for training (`X-Robots-Tag: noai` or `noimageai`).
    OptedOut,
    /// Status 408, 429 or 5xx at every attempt.
    ServerError,
    /// Another status, or redirects without end.
    OtherStatus,
    /// There is no such host.
    NoHost,
    /// No connection.
    Connection,
    /// The server took too long.
    Timeout,
    /// The connection ended before the file did.
    ShortBody,
    /// The file is too large.
    TooLarge,
    /// The path cannot be read, or the URL is none.
    Unreadable,
    /// The file is no image.
    WrongType,
    /// The image cannot be decoded.
    Corrupt,
    /// The image is too small.
    TooSmall,
    /// One colour, or a known placeholder.
    Placeholder,
}

impl Cause {
    /// In words, after a number.
    #[must_use]
    pub fn about(self) -> &'static str {
        match self {
            Cause::BadRow => "rows cannot be read",
            Cause::NoUrl => "rows without a URL",
            Cause::NoLabel => "rows without a label",
            Cause::LowScore => "rows without a label of a high enough score",
            Cause::SeveralLabels => "rows with several labels",
            Cause::Duplicate => "rows with the URL of an earlier one",
            Cause::ClassNotKept => "of a class that is not kept",
            Cause::OverCap => "more than are kept of their class",
            Cause::NotFound => "not found (404, 410)",
            Cause::Refused => "refused (401, 403, 451)",
            Cause::OptedOut => "not to be used for training (X-Robots-Tag)",
            Cause::ServerError => "server errors (408, 429, 5xx)",
            Cause::OtherStatus => "another status",
            Cause::NoHost => "no such host",
            Cause::Connection => "no connection",
            Cause::Timeout => "too slow (time-out)",
            Cause::ShortBody => "ended before the whole file came",
            Cause::TooLarge => "files too large",
            Cause::Unreadable => "paths that cannot be read",
            Cause::WrongType => "not images",
            Cause::Corrupt => "images that cannot be decoded",
            Cause::TooSmall => "images too small",
            Cause::Placeholder => "placeholders",
        }
    }

    /// The name in tables: `not-found`.
    #[must_use]
    pub fn name(self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value.as_str().unwrap_or_default().to_owned()
    }
}

/// A row that was lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lost {
    pub row: u64,
    pub url: String,
    pub cause: Cause,
    pub detail: String,
}
