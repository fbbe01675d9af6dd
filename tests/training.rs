//! Training from images to a report, and on after every kind of stop.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use tilewright::data::Augment;
use tilewright::report::html::RunReport;
use tilewright::train::TrainConfig;
use tilewright::train::run::RunPlace;
use tilewright::weights::WeightFile;

fn train(
    config: &TrainConfig,
    place: &RunPlace,
    stop: &AtomicBool,
) -> tilewright::Result<RunReport> {
    let backend = tilewright::backend::open(&config.backend)?;
    tilewright::train::run::train(config, backend.as_ref(), place, stop)
}

fn place(dir: &Path, resume: bool) -> RunPlace {
    RunPlace {
        dir: dir.to_path_buf(),
        resume,
        command: "tilewright train".into(),
    }
}

fn small(model: &str) -> TrainConfig {
    TrainConfig {
        model: model.into(),
        data: "digits".into(),
        epochs: 4,
        batch_size: 64,
        lr: 3e-3,
        warmup_epochs: 0.5,
        augment: Augment {
            crop_pad: 1,
            rotate_degrees: 5.0,
            ..Default::default()
        },
        clip: 1.0,
        seed: 3,
        ..Default::default()
    }
}

fn weights(dir: &Path) -> Vec<(String, Vec<u32>)> {
    let file = WeightFile::open(dir.join("checkpoints/last.safetensors")).unwrap();
    let floats = file.entries().iter().filter(|e| e.is_float());
    floats
        .map(|e| {
            (
                e.name.clone(),
                file.read_f32(&e.name)
                    .unwrap()
                    .iter()
                    .map(|v| v.to_bits())
                    .collect(),
            )
        })
        .collect()
}

#[test]
fn small_networks_learn_digits() {
    let go = AtomicBool::new(false);
    // A transformer of this size needs more than these few epochs once the digits move.
    for (model, floor, augment) in [
        ("cnn_r14", 90.0, small("").augment),
        (
            "vit:patch=2,dim=64,depth=3,heads=4,mlp=2",
            50.0,
            Augment::default(),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let report = train(
            &TrainConfig {
                epochs: 8,
                lr: 2e-3,
                augment,
                ..small(model)
            },
            &place(dir.path(), false),
            &go,
        )
        .unwrap();
        let top1 = report.eval.as_ref().unwrap().top1;
        assert!(top1 > floor, "{model}: {top1} %");
        for file in [
            "config.toml",
            "metrics.csv",
            "events.jsonl",
            "report.html",
            "eval.json",
            "checkpoints/best.safetensors",
        ] {
            assert!(
                dir.path().join(file).metadata().unwrap().len() > 0,
                "{file}"
            );
        }
        let config = std::fs::read_to_string(dir.path().join("config.toml")).unwrap();
        assert_eq!(TrainConfig::parse(&config).unwrap().model, model);
    }
}

#[test]
fn a_stopped_run_ends_in_the_same_bits() {
    let vit = small("vit:patch=4,dim=32,depth=2,heads=2,mlp=2,dropout=0.1");
    stopped_runs_are_the_same(TrainConfig {
        epochs: 2,
        limit_train: 640,
        accumulate: 2,
        ..vit.clone()
    });
    // Everything that draws numbers or keeps a state of its own.
    stopped_runs_are_the_same(TrainConfig {
        epochs: 2,
        limit_train: 640,
        accumulate: 2,
        ema: 0.9,
        layer_decay: 0.75,
        lr_scale: [("head".to_string(), 2.0)].into(),
        drop_path: 0.1,
        mixup: 0.8,
        cutmix: 1.0,
        repeats: 2,
        balanced: true,
        patience: 5,
        recompute: true,
        augment: Augment {
            crop_scale: 0.5,
            brightness: 0.2,
            rand_ops: 2,
            rand_magnitude: 9.0,
            erase: 0.3,
            ..Default::default()
        },
        ..vit
    });
}

fn stopped_runs_are_the_same(config: TrainConfig) {
    let go = AtomicBool::new(false);
    let whole = tempfile::tempdir().unwrap();
    train(&config, &place(whole.path(), false), &go).unwrap();
    // Stopped after the first step each time, and resumed until it is through.
    let stopped = tempfile::tempdir().unwrap();
    let halt = AtomicBool::new(true);
    let mut stops = 0;
    while let Err(e) = train(&config, &place(stopped.path(), true), &halt) {
        assert!(e.to_string().contains("interrupted"), "{e}");
        stops += 1;
        if stops == 6 {
            train(&config, &place(stopped.path(), true), &go).unwrap();
            break;
        }
    }
    assert_eq!(weights(whole.path()), weights(stopped.path()));
    let rows = |dir: &Path| {
        let text = std::fs::read_to_string(dir.join("metrics.csv")).unwrap();
        // All but the two last columns, which are times.
        text.lines()
            .map(|l| l.split(',').take(7).collect::<Vec<_>>().join(","))
            .collect::<Vec<_>>()
    };
    assert_eq!(rows(whole.path()), rows(stopped.path()));
    let events = std::fs::read_to_string(stopped.path().join("events.jsonl")).unwrap();
    assert_eq!(events.lines().count(), 10);
}

#[test]
fn what_cannot_run_is_refused_before_anything_is_written() {
    let go = AtomicBool::new(false);
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("run");
    for (config, says) in [
        (
            TrainConfig {
                batch_size: 0,
                ..small("cnn_r14")
            },
            "batch size",
        ),
        (
            TrainConfig {
                batch_size: 100_000,
                ..small("cnn_r14")
            },
            "batch",
        ),
        (
            TrainConfig {
                model: "resnet19".into(),
                ..small("x")
            },
            "resnet1",
        ),
        (
            TrainConfig {
                data: "folder:/nowhere".into(),
                ..small("cnn_r14")
            },
            "/nowhere",
        ),
        (
            TrainConfig {
                lr: f64::NAN,
                ..small("cnn_r14")
            },
            "learning rate",
        ),
        (
            TrainConfig {
                backend: "tpu".into(),
                ..small("cnn_r14")
            },
            "tpu",
        ),
        (
            TrainConfig {
                init: Some("/nowhere.safetensors".into()),
                ..small("cnn_r14")
            },
            "/nowhere",
        ),
    ] {
        let e = train(&config, &place(&dir, false), &go).unwrap_err();
        assert!(e.to_string().contains(says) && e.exit_code() == 2, "{e}");
    }
}

#[test]
fn a_diverging_run_stops_and_says_where() {
    let go = AtomicBool::new(false);
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        lr: 1e30,
        warmup_epochs: 0.0,
        clip: 0.0,
        ..small("vit:patch=4,dim=32,depth=1,heads=2,mlp=2")
    };
    let e = train(&config, &place(dir.path(), false), &go).unwrap_err();
    assert!(
        e.to_string().contains("not finite at step 2") && e.exit_code() == 1,
        "{e}"
    );
}
