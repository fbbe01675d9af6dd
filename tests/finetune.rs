//! Fine-tuning from weights: probes on kept features, thinned networks, groups, averages, teachers; and what is refused.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tilewright::weights::WeightFile;

fn run(cache: &Path, args: &str) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tilewright"));
    c.args(args.split_whitespace()).args(["--backend", "cpu"]);
    c.env("XDG_CACHE_HOME", cache).output().unwrap()
}

/// Runs what must succeed; standard error.
fn good(cache: &Path, args: &str) -> String {
    let out = run(cache, args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{args}: {said}");
    said
}

/// Runs what must fail with `code`, saying every word of `says` in a few lines.
fn bad(cache: &Path, args: &str, code: i32, says: &[&str]) {
    let out = run(cache, args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args}: {said}");
    for word in says {
        assert!(said.contains(word), "{args}: no {word:?} in {said}");
    }
    let error = said.find("error:").map_or("", |i| &said[i..]);
    assert!(
        error.lines().count() <= 4 && !said.contains("panicked"),
        "{said}"
    );
}

/// Weights of a run's checkpoint: (name, bits), running statistics too.
fn weights(dir: &Path, name: &str) -> Vec<(String, Vec<f32>)> {
    let file = WeightFile::open(dir.join(format!("checkpoints/{name}.safetensors"))).unwrap();
    let floats = file.entries().iter().filter(|e| e.is_float());
    floats
        .map(|e| (e.name.clone(), file.read_f32(&e.name).unwrap()))
        .collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

fn is_head(name: &str) -> bool {
    ["fc.", "head.", "linear."]
        .iter()
        .any(|h| name.starts_with(h))
}

/// A network trained for a moment on digits, as a file to start from.
fn backbone(root: &Path, model: &str) -> PathBuf {
    let dir = root.join("backbone");
    good(
        root,
        &format!(
            "train -m {model} -d digits --epochs 1 --lr 2e-3 --limit-train 640 -o {}",
            dir.display()
        ),
    );
    dir.join("checkpoints/last.safetensors")
}

fn rows(dir: &Path) -> usize {
    let text = std::fs::read_to_string(dir.join("metrics.csv")).unwrap();
    text.lines().count() - 1
}

#[test]
fn a_probe_on_kept_features_is_the_frozen_network_trained() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let init = backbone(root, "cnn_r14");
    let probe = |out: &str, more: &str| {
        good(
            root,
            &format!(
                "train --init {} -d digits --freeze-backbone --replace-head --epochs 3 --optimizer sgd --lr 0.1 --seed 4 {more} -o {}",
                init.display(),
                root.join(out).display()
            ),
        )
    };
    let first = probe("kept", "");
    assert!(
        first.contains("cnn_r14: 175258 parameters, 650 of them trained"),
        "{first}"
    );
    assert!(!first.contains("kept from before"), "{first}");
    let again = probe("again", "");
    assert_eq!(again.matches("kept from before").count(), 2, "{again}");
    // The mirror images of the evaluation need the whole network; the training is the same.
    let whole = probe("whole", "--test-flip");
    assert!(!whole.contains("features of"), "{whole}");

    let start = WeightFile::open(&init).unwrap();
    let [kept, again, whole] = ["kept", "again", "whole"].map(|d| weights(&root.join(d), "last"));
    assert!(kept == again, "the same command gives other bits");
    let mut moved = 0.0f32;
    for ((name, a), (_, b)) in kept.iter().zip(&whole) {
        let from = start.read_f32(name).unwrap();
        if is_head(name) {
            assert!(distance(a, b) < 2e-3, "{name}: {}", distance(a, b));
            moved = moved.max(distance(a, &from));
        } else {
            // Frozen, the running statistics too.
            assert_eq!(distance(a, &from), 0.0, "{name}");
            assert_eq!(distance(b, &from), 0.0, "{name}");
        }
    }
    assert!(moved > 1e-2, "the classifier did not move: {moved}");
    // Prolonged, it goes on from its own state to what a longer run ends in.
    good(
        root,
        &format!("train --resume {} --epochs 5", root.join("kept").display()),
    );
    assert_eq!(rows(&root.join("kept")), 5);
}

#[test]
fn blocks_that_stay_keep_their_weights() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let model = "vit:patch=2,dim=32,depth=4,heads=2,mlp=2";
    let init = backbone(root, model);
    let start = WeightFile::open(&init).unwrap();
    let out = root.join("thin");
    // A rate that moves nothing.
    let said = good(
        root,
        &format!(
            "train -m {model} --init {} -d digits --keep-blocks 0,2-3 --epochs 1 --lr 1e-30 --weight-decay 0 --limit-train 128 -o {}",
            init.display(),
            out.display()
        ),
    );
    assert!(said.contains("depth=3: "), "{said}");
    for (name, values) in weights(&out, "last") {
        let from = name
            .replace("blocks.2.", "blocks.3.")
            .replace("blocks.1.", "blocks.2.");
        let from = start.read_f32(if name.contains("blocks.") {
            &from
        } else {
            &name
        });
        assert_eq!(distance(&values, &from.unwrap()), 0.0, "{name}");
    }
    // What was saved is a network of three blocks to everyone.
    let file = out.join("checkpoints/last.safetensors");
    good(
        root,
        &format!("eval -w {} -d digits --limit 50", file.display()),
    );
    let drop = |what: &str| {
        format!(
            "train -m {model} --init {} -d digits {what}",
            init.display()
        )
    };
    bad(
        root,
        &drop("--drop-blocks 4"),
        2,
        &["--drop-blocks 4", "4 blocks"],
    );
    bad(root, &drop("--keep-blocks 0-4"), 2, &["0-3"]);
    bad(root, &drop("--keep-blocks 2,1"), 2, &["in order"]);
    bad(
        root,
        &drop("--drop-stages 1"),
        2,
        &["no stages", "--drop-blocks"],
    );
    bad(
        root,
        &drop("--keep-blocks 0 --drop-blocks 1"),
        2,
        &["one of"],
    );
}

#[test]
fn a_resnet_loses_its_last_stage() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let init = backbone(root, "cnn_r14");
    let out = root.join("thin");
    let said = good(
        root,
        &format!(
            "train -m cnn_r14 --init {} -d digits --drop-stages 1 --epochs 1 --lr 1e-30 --weight-decay 0 --limit-train 128 -o {}",
            init.display(),
            out.display()
        ),
    );
    assert!(
        said.contains("cnn_r14:stages=2: 43226 parameters"),
        "{said}"
    );
    let start = WeightFile::open(&init).unwrap();
    for (name, values) in weights(&out, "last") {
        assert!(!name.starts_with("layer3"), "{name}");
        if !is_head(&name) && !name.contains("running") {
            assert_eq!(
                distance(&values, &start.read_f32(&name).unwrap()),
                0.0,
                "{name}"
            );
        }
    }
    bad(
        root,
        "train -m cnn_r14 -d digits --drop-stages 3",
        2,
        &["3 stages", "at least one"],
    );
    bad(
        root,
        "train -m cnn_r14 -d digits --drop-blocks 1",
        2,
        &["--drop-stages"],
    );
}

/// A student that is its own teacher has nothing to learn from it; from the labels it has.
#[test]
fn a_teacher_draws_the_student_towards_itself() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let model = "vit:patch=4,dim=32,depth=2,heads=2,mlp=2";
    let init = backbone(root, model);
    let start = WeightFile::open(&init).unwrap();
    let student = |out: &str, more: &str| {
        let dir = root.join(out);
        good(
            root,
            &format!(
                "train --init {0} --teacher {0} -d digits --epochs 1 --optimizer sgd --lr 0.5 --weight-decay 0 \
                 --limit-train 256 --batch-size 64 {more} -o {1}",
                init.display(),
                dir.display()
            ),
        );
        let all = weights(&dir, "last");
        let moved = all
            .iter()
            .map(|(n, v)| distance(v, &start.read_f32(n).unwrap()));
        moved.fold(0.0, f32::max)
    };
    let own = student("own", "--distill-alpha 1 --distill-temperature 2");
    let labels = student("labels", "--distill-alpha 0 --distill-temperature 2");
    let both = student("both", "--distill-alpha 0.5");
    let hard = student("hard", "--distill-alpha 1 --distill-hard");
    assert!(
        own < 1e-4 && labels > 1e-2 && hard > 1e-3,
        "{own} {labels} {hard}"
    );
    assert!(both > 1e-3 && both != labels, "{both} {labels}");
    let other = root.join("other");
    good(
        root,
        &format!(
            "train -m cnn_r14 -d synthetic:3x8 --epochs 1 -o {}",
            other.display()
        ),
    );
    bad(
        root,
        &format!(
            "train -m cnn_r14 -d digits --teacher {}/checkpoints/last.safetensors",
            other.display()
        ),
        2,
        &["3 classes", "10"],
    );
}

/// DeiT's way with two classifiers: labels for the one, the teacher for the other.
#[test]
fn of_two_classifiers_one_learns_from_the_teacher() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let teacher = backbone(root, "cnn_r14");
    // How far the biases of the two heads move from zero.
    let moved = |alpha: &str| {
        let dir = root.join(alpha);
        good(
            root,
            &format!(
                "train -m deit_tiny_distilled_patch16_32 --teacher {} -d digits --image-size 32 --epochs 1 \
                 --optimizer sgd --lr 0.01 --weight-decay 0 --limit-train 64 --batch-size 32 --distill-hard \
                 --distill-alpha {alpha} -o {}",
                teacher.display(),
                dir.display()
            ),
        );
        let all = weights(&dir, "last");
        ["head.bias", "head_dist.bias"].map(|name| {
            let (_, bias) = all.iter().find(|(n, _)| n == name).unwrap();
            bias.iter().fold(0f32, |most, v| most.max(v.abs()))
        })
    };
    let [own, taught] = moved("0");
    assert!(own > 0.0 && taught == 0.0, "{own} {taught}");
    let [own, taught] = moved("1");
    assert!(own == 0.0 && taught > 0.0, "{own} {taught}");
}

#[test]
fn recomputed_blocks_end_in_the_same_bits() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    for (i, model) in [
        "cnn_r14",
        "vit:patch=4,dim=32,depth=3,heads=2,mlp=2,dropout=0.1",
    ]
    .into_iter()
    .enumerate()
    {
        let train = |out: &str, more: &str| {
            let dir = root.join(format!("{out}{i}"));
            let settings = "--epochs 1 --limit-train 256 --batch-size 64 --seed 2";
            let said = good(
                root,
                &format!(
                    "train -m {model} -d digits {settings} {more} -o {}",
                    dir.display()
                ),
            );
            (weights(&dir, "last"), said)
        };
        let (plain, _) = train("plain", "");
        let (again, said) = train("again", "--recompute");
        assert!(plain == again, "{model}");
        assert!(said.contains("recomputation: activations take"), "{said}");
    }
}

#[test]
fn a_run_without_progress_ends_early() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("run");
    let said = good(
        tmp.path(),
        &format!(
            "train -m vit:patch=4,dim=16,depth=1,heads=1,mlp=1 -d digits --epochs 9 --lr 1e-20 --limit-train 128 --patience 2 -o {}",
            dir.display()
        ),
    );
    assert!(said.contains("ends early"), "{said}");
    assert_eq!(rows(&dir), 3);
    let before = weights(&dir, "last");
    good(tmp.path(), &format!("train --resume {}", dir.display()));
    assert!(before == weights(&dir, "last") && rows(&dir) == 3);
}

#[test]
fn a_loss_that_is_not_finite_is_traced_to_its_layer() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let (early, late) = (root.join("early"), root.join("late"));
    let model = "vit:patch=4,dim=16,depth=1,heads=1,mlp=1";
    bad(
        root,
        &format!(
            "train -m {model} -d digits --optimizer sgd --lr 1e38 --epochs 2 -o {}",
            early.display()
        ),
        1,
        &[
            "at step 2",
            "epoch 1, batch 2",
            "the first value",
            "No checkpoint",
        ],
    );
    // Weights with a value in one layer that overflows there, not before.
    let init = backbone(root, model);
    let broken = root.join("broken.safetensors");
    let file = WeightFile::open(&init).unwrap();
    let tensors: Vec<_> = file
        .entries()
        .iter()
        .map(|e| {
            let mut v = file.read_f32(&e.name).unwrap();
            if e.name == "blocks.0.mlp.fc1.bias" {
                v[0] = 1e18;
            }
            if e.name == "blocks.0.mlp.fc2.weight" {
                v[0] = 1e25;
            }
            tilewright::weights::SaveTensor::f32(e.name.clone(), &e.shape, v)
        })
        .collect();
    tilewright::weights::save(&broken, &tensors, &Default::default(), Default::default()).unwrap();
    bad(
        root,
        &format!(
            "train -m {model} --init {} -d digits --epochs 1 -o {}",
            broken.display(),
            late.display()
        ),
        1,
        &[
            "at step 1",
            "the output of blocks.0.mlp.fc2",
            "No checkpoint",
        ],
    );
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let init = backbone(root, "cnn_r14");
    let init = init.display();
    let train = |rest: &str| format!("train -d digits -o {} {rest}", root.join("no").display());
    for (rest, says) in [
        ("-m cnn_r14 --lr 0".to_string(), &["learning rate is 0"][..]),
        ("-m cnn_r14 --lr NaN".into(), &["learning rate is NaN"]),
        ("-m cnn_r14 --layer-decay 0".into(), &["layer decay"]),
        ("-m cnn_r14 --ema 1".into(), &["moving average"]),
        (
            "-m cnn_r14 --unfreeze-from layer7".into(),
            &["layer7", "layer3.0"],
        ),
        ("-m cnn_r14 --lr-scale heat=2".into(), &["heat"]),
        ("-m cnn_r14 --erase 2".into(), &["erasing"]),
        // Another architecture, another size of it, another number of classes.
        (
            format!("-m resnet20 --init {init}"),
            &["does not fit resnet20", "cnn_r14"],
        ),
        (
            format!("-m vit_p4_e128_d6 --init {init}"),
            &["does not hold vit_p4_e128_d6", "cnn_r14"],
        ),
        (
            format!("-m resnet50 --init {init}"),
            &["resnet50", "cnn_r14"],
        ),
    ] {
        bad(root, &train(&rest), 2, says);
    }
    let other = format!(
        "train -m cnn_r14 -d synthetic:3x8 --init {init} -o {}",
        root.join("no").display()
    );
    bad(
        root,
        &other,
        2,
        &["10 classes", "3 are asked", "--replace-head"],
    );
    assert!(!root.join("no").exists(), "something was written");
}

#[test]
fn an_average_of_the_weights_is_saved() {
    let tmp = tempfile::tempdir().unwrap();
    let one = |out: &str, more: &str| {
        let dir = tmp.path().join(out);
        let settings =
            "--epochs 1 --limit-train 64 --batch-size 64 --schedule constant --weight-decay 0";
        good(
            tmp.path(),
            &format!(
                "train -m vit:patch=4,dim=16,depth=1,heads=1,mlp=1 -d digits {settings} {more} -o {}",
                dir.display()
            ),
        );
        weights(&dir, "last")
    };
    let (start, end) = (one("start", "--lr 1e-30"), one("end", "--lr 1e-2"));
    // The first update counts with 1 - 2 / 11.
    let average = one("average", "--lr 1e-2 --ema 0.9");
    for ((name, a), ((_, s), (_, e))) in average.iter().zip(start.iter().zip(&end)) {
        let want: Vec<f32> = s
            .iter()
            .zip(e)
            .map(|(s, e)| (2.0 * s + 9.0 * e) / 11.0)
            .collect();
        assert!(distance(a, &want) < 1e-6, "{name}");
        assert!(distance(s, e) > 1e-3, "{name} did not move");
    }
}
