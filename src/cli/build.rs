//! `data build`.

use super::global::Global;
use super::output::{json, print};
use super::source::positive;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tilewright::data::{self, BuildOptions, Fields, Reduce};
use tilewright::{Error, Result};

pub const BUILD_HELP: &str = "Example:
  tilewright data build coyo/*.parquet -o shards --top 1000 --per-class 1000 --size 256
  tilewright train -m resnet50 -d shards:shards

The same command goes on where an earlier one was stopped. Shards, dataset.json (the classes), report.txt, report.json and
failures.csv are in DIR.";

/// From a table of URLs and labels to shards.
#[derive(Args)]
pub struct BuildArgs {
    /// Tables of URLs (or paths, from the table's folder on) and labels: CSV, TSV, JSON lines, also gzipped; Parquet
    #[arg(value_name = "TABLE", required = true)]
    tables: Vec<PathBuf>,
    /// Folder of the shards
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Field of the URL [default: the one called url, image_url, path ...]
    #[arg(long, value_name = "NAME", help_heading = "Table")]
    url_field: Option<String>,
    /// Field of the label or labels [default: the one called label, labels, class ...]
    #[arg(long, value_name = "NAME", help_heading = "Table")]
    label_field: Option<String>,
    /// Field of the score of each label [default: the one called score, scores, label_probs ...]
    #[arg(long, value_name = "NAME", help_heading = "Table")]
    score_field: Option<String>,
    /// Between several labels in a text [default: | or ;]
    #[arg(long, value_name = "CHAR", help_heading = "Table")]
    separator: Option<char>,
    /// Which of several labels counts [default: score where there are scores, else frequent]
    #[arg(long, value_name = "RULE", help_heading = "Choice")]
    reduce: Option<Rule>,
    /// Labels with a lower score do not count
    #[arg(long, value_name = "X", help_heading = "Choice")]
    min_score: Option<f64>,
    /// Keep the K most frequent classes
    #[arg(long, value_name = "K", value_parser = positive, help_heading = "Choice")]
    top: Option<usize>,
    /// Try N images of each class at most
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Choice")]
    per_class: Option<usize>,
    /// Share of the test split, by a hash of the URL
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.2,
        help_heading = "Choice"
    )]
    test_share: f64,
    /// Make images smaller whose shorter side is longer than this; 0: none
    #[arg(
        long,
        value_name = "PX",
        default_value_t = 256,
        help_heading = "Images"
    )]
    size: u32,
    /// Cut out the centre, as a square of --size
    #[arg(long, help_heading = "Images")]
    square: bool,
    /// Of the JPEG files that are written, 1 to 100
    #[arg(long, value_name = "Q", default_value_t = 95, help_heading = "Images")]
    quality: u8,
    /// Leave out images with a shorter side than this
    #[arg(long, value_name = "PX", default_value_t = 32, help_heading = "Images")]
    min_side: u32,
    /// A file that servers send in place of an image (may be given several times); images of one colour always count as
    /// such
    #[arg(long, value_name = "FILE", help_heading = "Images")]
    placeholder: Vec<PathBuf>,
    /// Candidates of a shard
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = positive, help_heading = "Images")]
    per_shard: usize,
    /// Downloads at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive, help_heading = "Downloads")]
    downloads: usize,
    /// Of them, from one host
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive, help_heading = "Downloads")]
    per_host: usize,
    /// Attempts after the first, where another may do better
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        help_heading = "Downloads"
    )]
    retries: u32,
    /// Seconds before the first new attempt; doubles, and varies by half
    #[arg(long, value_name = "S", default_value = "1", value_parser = seconds, help_heading = "Downloads")]
    pause: Duration,
    /// Seconds that a whole request may take
    #[arg(long, value_name = "S", default_value = "30", value_parser = seconds, help_heading = "Downloads")]
    timeout: Duration,
    /// Seconds until a connection must be there
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds, help_heading = "Downloads")]
    connect_timeout: Duration,
    /// Leave out files that are larger, in megabytes
    #[arg(
        long,
        value_name = "MB",
        default_value_t = 20.0,
        help_heading = "Downloads"
    )]
    max_size: f64,
    /// Say what would be tried, and download nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rule {
    /// The label with the highest score
    Score,
    /// The label that most rows have
    Frequent,
    /// The label that fewest rows have
    Rarest,
    /// The first
    First,
    /// None: rows with several labels are left out
    Single,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let given = text.parse::<f64>().ok();
    given
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .ok_or_else(|| "give a number of seconds, 0 or more".into())
}

impl BuildArgs {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        if !(self.max_size > 0.0 && self.max_size <= 1000.0) {
            return Err(Error::input(format!(
                "--max-size {}: give megabytes, up to 1000",
                self.max_size
            )));
        }
        let rule = |r| match r {
            Rule::Score => Reduce::Score,
            Rule::Frequent => Reduce::Frequent,
            Rule::Rarest => Reduce::Rarest,
            Rule::First => Reduce::First,
            Rule::Single => Reduce::Single,
        };
        let options = BuildOptions {
            tables: self.tables,
            dir: self.output,
            fields: Fields {
                url: self.url_field,
                label: self.label_field,
                score: self.score_field,
            },
            separator: self.separator,
            reduce: self.reduce.map(rule),
            min_score: self.min_score,
            top: self.top,
            per_class: self.per_class,
            test_share: self.test_share,
            size: self.size,
            square: self.square,
            quality: self.quality,
            min_side: self.min_side,
            max_bytes: (self.max_size * 1e6) as u64,
            per_shard: self.per_shard,
            downloads: self.downloads,
            per_host: self.per_host,
            retries: self.retries,
            timeout: self.timeout,
            connect_timeout: self.connect_timeout,
            pause: self.pause,
            placeholders: self.placeholder,
            dry_run: self.dry_run,
        };
        let report = data::build(&options, super::end_in_order())?;
        match g.json {
            true => json(&report)?,
            false => {
                let mut text = report.to_text();
                if report.settled > 0 {
                    text += &format!(
                        "{} candidates in {:.1} s, {:.0} a second\n",
                        report.settled,
                        report.seconds,
                        report.settled as f64 / report.seconds
                    );
                }
                if !options.dry_run {
                    text += &format!("tilewright train -d shards:{}\n", report.dir.display());
                }
                print(&text)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
