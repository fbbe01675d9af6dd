//! Every built-in experiment's small setting, on real images, from the command line.

use std::path::Path;
use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tilewright"))
        .args(args)
        .output()
        .unwrap()
}

fn experiment(name: &str, dir: &Path, more: &[&str]) -> serde_json::Value {
    let dir = dir.to_str().unwrap();
    let args = [
        "experiment",
        name,
        "--small",
        "-o",
        dir,
        "--json",
        "--backend",
        "cpu",
    ];
    let o = run(&[&args[..], more].concat());
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(0), "{name}: {err}");
    serde_json::from_slice(&o.stdout).unwrap()
}

#[test]
fn every_small_setting_gives_a_whole_report() {
    for (name, title) in tilewright::experiment::matrix::presets() {
        let dir = tempfile::tempdir().unwrap();
        let result = experiment(&name, dir.path(), &["--set", "limit_train=400"]);
        let runs = result["runs"].as_array().unwrap();
        assert!(runs.len() >= 3, "{name}");
        for r in runs {
            let top1 = r["top1"].as_f64().unwrap();
            assert!((0.0..=100.0).contains(&top1), "{name}: {r}");
        }
        let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
        for part in [
            &title,
            "Summary",
            "Learning curves",
            "Confusion matrices",
            "Reproduce",
        ] {
            assert!(page.contains(part), "{name}: no {part}");
        }
        assert!(page.len() < 5_000_000 && page.contains("(small setting)"));
        let analyses = tilewright::experiment::matrix::Experiment::open(&name).unwrap();
        for (i, a) in analyses.made_small().analyses().unwrap().iter().enumerate() {
            let place = format!("analyses/{}-{}", i + 1, a.kind);
            let result = dir.path().join(place).join(format!("{}.json", a.kind));
            assert!(result.is_file(), "{name}: {}", a.kind);
            assert!(page.contains(&a.title), "{name}: {}", a.title);
        }
        let csv = std::fs::read_to_string(dir.path().join("results.csv")).unwrap();
        assert_eq!(csv.lines().count(), runs.len() + 1);
        assert!(csv.starts_with(
            "model,setting,data,seed,top1,top1_err,top5,top5_err,param_count,img_size"
        ));
    }
}

#[test]
fn what_is_done_is_kept_shards_add_up_and_a_changed_setting_is_refused() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let quick = ["--set", "epochs=1", "--set", "limit_train=200"];
    let half = experiment(
        "three-datasets",
        one.path(),
        &[&quick[..], &["--shard", "1/2"]].concat(),
    );
    assert_eq!(half["missing"].as_array().unwrap().len(), 2);
    experiment(
        "three-datasets",
        two.path(),
        &[&quick[..], &["--shard", "2/2"]].concat(),
    );
    let merge = ["--merge", two.path().to_str().unwrap()];
    let whole = experiment("three-datasets", one.path(), &[&quick[..], &merge].concat());
    assert_eq!(whole["runs"].as_array().unwrap().len(), 4);
    assert!(whole["missing"].as_array().unwrap().is_empty());

    let result = one.path().join("CNN_data=digits-seed0/result.json");
    let before = std::fs::metadata(&result).unwrap().modified().unwrap();
    experiment(
        "three-datasets",
        one.path(),
        &[&quick[..], &["--shard", "1/2"]].concat(),
    );
    assert_eq!(
        std::fs::metadata(&result).unwrap().modified().unwrap(),
        before
    );

    let dir = one.path().to_str().unwrap();
    let o = run(&[
        "experiment",
        "three-datasets",
        "--small",
        "-o",
        dir,
        "--set",
        "epochs=3",
    ]);
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("another configuration"));
    let o = run(&["experiment", "no-such-thing"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("three-datasets"));
    let o = run(&["experiment", "imbalance", "--small", "--set", "epoch=3"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("epochs"));
}

#[test]
fn runs_at_once_end_as_runs_one_after_the_other() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let quick = ["--set", "epochs=1", "--set", "limit_train=200"];
    experiment("layer-drop", one.path(), &quick);
    experiment(
        "layer-drop",
        two.path(),
        &[&quick[..], &["--jobs", "3"]].concat(),
    );
    let weights = |dir: &Path| {
        let mut all: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().path().join("checkpoints/last.safetensors"))
            .filter(|p| p.is_file())
            .map(|p| {
                (
                    p.strip_prefix(dir).unwrap().to_owned(),
                    std::fs::read(&p).unwrap(),
                )
            })
            .collect();
        all.sort();
        all
    };
    let (a, b) = (weights(one.path()), weights(two.path()));
    assert_eq!(a.len(), 4);
    assert!(a == b, "the weights differ");

    let o = run(&["experiment", "layer-drop", "--small", "--jobs", "0"]);
    assert_eq!(o.status.code(), Some(2));
}

#[test]
fn a_dry_run_says_what_it_would_take() {
    let args = [
        "experiment",
        "three-datasets",
        "--small",
        "--dry-run",
        "--backend",
        "cpu",
    ];
    let o = run(&args);
    let text = String::from_utf8_lossy(&o.stdout);
    for word in ["4 runs", "one after the other: about", "memory", "steps"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let o = run(&[&args[..], &["--json"]].concat());
    let all: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    for r in all["runs"].as_array().unwrap() {
        assert!(r["seconds"].as_f64().unwrap() > 0.0 && r["time_from"] == "steps");
        assert!(r["memory_bytes"].as_u64().unwrap() > 4 * r["params"].as_u64().unwrap());
    }
}
