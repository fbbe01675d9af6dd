//! A run that is killed (SIGKILL, no clean-up of any kind) goes on with `--resume` and ends as one never killed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tilewright::philox::Philox;

/// Deaths before the run may end.
const KILLS: u32 = 10;

fn train(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tilewright"));
    c.arg("train").args(args).args(["--backend", "cpu"]);
    c.stdout(Stdio::null()).stderr(Stdio::piped());
    c
}

fn finish(mut c: Command) -> Duration {
    let clock = Instant::now();
    let out = c.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    clock.elapsed()
}

/// The files that must be the same to the byte, and the columns of the metrics that no clock touches.
fn outcome(dir: &Path) -> (Vec<Vec<u8>>, Vec<Vec<String>>, usize) {
    let files = ["last", "best"]
        .map(|n| std::fs::read(dir.join(format!("checkpoints/{n}.safetensors"))).unwrap());
    let metrics = std::fs::read_to_string(dir.join("metrics.csv")).unwrap();
    let header: Vec<&str> = metrics.lines().next().unwrap().split(',').collect();
    let timeless = |name: &str| !name.contains("second");
    let rows = metrics.lines().map(|l| {
        l.split(',')
            .zip(&header)
            .filter(|(_, h)| timeless(h))
            .map(|(v, _)| v.to_string())
            .collect()
    });
    let events = std::fs::read_to_string(dir.join("events.jsonl")).unwrap();
    (files.into(), rows.collect(), events.lines().count())
}

#[test]
fn a_run_killed_ten_times_ends_in_the_same_bits() {
    let tmp = tempfile::tempdir().unwrap();
    let [whole, killed] = ["whole", "killed"].map(|n| tmp.path().join(n));
    let args = |dir: &Path| -> Vec<String> {
        let settings =
            "-m cnn_r14 -d digits --epochs 6 --batch-size 32 --lr 2e-3 --rotate 5 --seed 11 -o";
        settings
            .split(' ')
            .map(String::from)
            .chain([dir.display().to_string()])
            .collect()
    };
    let start = |dir: &Path| train(&args(dir).iter().map(String::as_str).collect::<Vec<_>>());
    let resume = |dir: &Path| train(&["--resume", dir.to_str().unwrap()]);
    let time = finish(start(&whole));

    let (mut deaths, mut random) = (0, Philox::new(7, 0));
    for _ in 0..KILLS {
        // Between the start and somewhat more than an epoch's time, so that some die before the first checkpoint and
        // some while files are written.
        let life = time.mul_f64(0.02 + 0.3 * f64::from(random.uniform()));
        let begun = killed.join("config.toml").exists();
        let mut child = if begun {
            resume(&killed)
        } else {
            start(&killed)
        }
        .spawn()
        .unwrap();
        std::thread::sleep(life);
        deaths += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(
        deaths >= KILLS / 2,
        "only {deaths} of {KILLS} runs lived long enough to be killed"
    );
    let begun = killed.join("config.toml").exists();
    finish(if begun {
        resume(&killed)
    } else {
        start(&killed)
    });
    let (a, b) = (outcome(&whole), outcome(&killed));
    assert_eq!(a.1, b.1, "metrics");
    assert_eq!(a.2, b.2, "events");
    assert!(a.0 == b.0, "the weights differ");
    let files = std::fs::read_dir(killed.join("checkpoints")).unwrap();
    let mut files: Vec<_> = files
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let want = ["best", "last", "resume"].map(|n| format!("{n}.safetensors"));
    assert_eq!(files, want, "files among the checkpoints");
}
