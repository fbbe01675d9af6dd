//! The program as a user meets it: flags, files, messages, exit status.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tilewright::models::{ModelOptions, find};
use tilewright::weights::{FloatFormat, SaveTensor, WeightFile, fill, save};

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tilewright"))
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

fn stdout(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

/// The standard output of a command that must succeed.
fn good(args: &[&str]) -> String {
    let o = run(args);
    assert_eq!(o.status.code(), Some(0), "{args:?}: {}", stderr(&o));
    stdout(&o)
}

fn good_json(args: &[&str]) -> Value {
    let text = good(&[args, &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
}

/// A command that must fail with `code`, at most three short lines that hold every word of `says`, and no output.
fn bad(args: &[&str], code: i32, says: &[&str]) {
    let o = run(args);
    let err = stderr(&o);
    assert_eq!(o.status.code(), Some(code), "{args:?}: {err}");
    assert!(o.stdout.is_empty(), "{args:?}: {}", stdout(&o));
    assert!(
        !err.contains("panicked") && !err.contains("internal error"),
        "{args:?}: {err}"
    );
    let lines = err.lines().filter(|l| !l.starts_with("note: ")).count();
    assert!((1..=3).contains(&lines), "{args:?}: {err}");
    for s in says {
        assert!(err.contains(s), "{args:?}: no {s:?} in: {err}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A weight file of `model` whose values are a function of their names.
fn weights(dir: &Path, model: &str, classes: usize) -> PathBuf {
    let path = dir.join(format!("{classes}.safetensors"));
    let model = find(model).unwrap();
    let options = ModelOptions {
        classes: Some(classes),
        ..ModelOptions::default()
    };
    let net = model
        .net(1, (model.image, model.image), Default::default(), &options)
        .unwrap();
    let names = tilewright::weights::FileNames::plain(&net.graph, model.naming());
    let values: Vec<Vec<f32>> = net
        .graph
        .params
        .iter()
        .map(|p| fill::fill(&p.name, net.graph.shape(p.tid)))
        .collect();
    let metadata = Default::default();
    names
        .save(&path, &net.graph, values, 0, &metadata, FloatFormat::F32)
        .unwrap();
    path
}

fn batch(dir: &Path, n: usize, side: usize, labels: &[i64]) -> PathBuf {
    let path = dir.join("batch.safetensors");
    let pixels: Vec<f32> = (0..n * 3 * side * side)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
        .collect();
    let tensors = [
        SaveTensor::f32("input", &[n, 3, side, side], pixels),
        SaveTensor::i64("labels", &[labels.len()], labels.to_vec()),
    ];
    save(&path, &tensors, &Default::default(), FloatFormat::F32).unwrap();
    path
}

#[test]
fn help_and_version_succeed_and_no_command_is_bad_usage() {
    assert!(good(&["--help"]).contains("predict"));
    assert!(good(&["eval", "--help"]).contains("Examples:"));
    assert!(good(&["--version"]).starts_with("tilewright "));
    assert_eq!(run(&[]).status.code(), Some(2));
}

#[test]
fn bad_usage_is_named_in_a_few_lines() {
    bad(&["evaluate"], 2, &["evaluate", "eval"]);
    bad(&["info"], 2, &["<MODEL>"]);
    bad(&["info", "resnet19"], 2, &["resnet19", "resnet18"]);
    bad(&["info", "resnet18", "--image-size", "0"], 2, &["0x0"]);
    bad(&["info", "resnet18", "--batch", "0"], 2, &["batch of 0"]);
    bad(
        &["info", "resnet18", "--backend", "metal", "--plan"],
        2,
        &["metal", "cpu, wgpu"],
    );
    bad(&["models", "--threads", "0"], 2, &["--threads 0"]);
    bad(
        &[
            "eval",
            "-m",
            "resnet20",
            "-w",
            "random",
            "-d",
            "digits",
            "--batch-size",
            "0",
        ],
        2,
        &["batch-size", "1 or more"],
    );
    bad(
        &["eval", "-m", "resnet20", "-w", "random", "-d", "mnist"],
        2,
        &["mnist", "digits"],
    );
    bad(&["eval", "-w", "random", "-d", "digits"], 2, &["-m MODEL"]);
    bad(
        &[
            "eval",
            "-m",
            "resnet20",
            "-w",
            "random",
            "-d",
            "cifar10:/nowhere",
        ],
        2,
        &["/nowhere"],
    );
    bad(
        &[
            "eval",
            "-m",
            "resnet20",
            "-w",
            "random",
            "-d",
            "digits",
            "--report",
            "/no/such/r.html",
        ],
        2,
        &["/no/such"],
    );
    bad(&["data", "verify", "folder:/nowhere"], 2, &["/nowhere"]);
    bad(&["data", "fetch", "digits"], 2, &["digits", "cifar10"]);
    bad(
        &["weights", "inspect", "/no/such.safetensors"],
        2,
        &["/no/such.safetensors"],
    );
    bad(&["check", "conv9d"], 2, &["conv9d", "conv2d"]);
    bad(&["check", "relu(wrong=1)"], 2, &["relu"]);
    bad(
        &[
            "predict", "-m", "resnet18", "-w", "random", "--mean", "1,2", "x.png",
        ],
        2,
        &["--mean"],
    );
    bad(
        &[
            "predict", "-m", "resnet18", "-w", "random", "--std", "0", "x.png",
        ],
        2,
        &["std"],
    );
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ten = weights(dir.path(), "resnet20", 10);
    let ten = text(&ten);
    bad(
        &["eval", "-m", "resnet20", "-w", ten, "-d", "synthetic:100x8"],
        2,
        &["10 classes", "100"],
    );
    bad(
        &[
            "eval",
            "-m",
            "resnet20",
            "-w",
            ten,
            "-d",
            "synthetic:100x8",
            "--classes",
            "100",
        ],
        2,
        &["10", "100"],
    );
    bad(
        &["eval", "-m", "resnet32", "-w", ten, "-d", "digits"],
        2,
        &["resnet20", "missing"],
    );
    bad(
        &["eval", "-m", "vit_p4_e128_d6", "-w", ten, "-d", "digits"],
        2,
        &["resnet20"],
    );
    bad(&["weights", "fetch", "resnet51"], 2, &["resnet51"]);
    let name = "swin_tiny_patch4_window7_224.ms_in1k";
    let o = Command::new(env!("CARGO_BIN_EXE_tilewright"))
        .args(["predict", "-w", name, "x.png"])
        .env("HF_HUB_CACHE", dir.path())
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains(&format!("weights fetch {name}")));
    let cut = dir.path().join("cut.safetensors");
    std::fs::write(&cut, &std::fs::read(ten).unwrap()[..5000]).unwrap();
    bad(&["weights", "inspect", text(&cut)], 2, &["cut.safetensors"]);
}

#[test]
fn every_listing_is_one_json_document() {
    let devices = good_json(&["devices"]);
    assert_eq!(devices["backends"][0]["name"], "cpu");
    let models = good_json(&["models"]);
    let resnet = models
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["id"] == "resnet18")
        .unwrap();
    assert_eq!(resnet["params"], 11_689_512);
    let info = good_json(&[
        "info",
        "vit:patch=4,dim=32,depth=2,heads=2,mlp=2",
        "--classes",
        "7",
        "--plan",
        "--backend",
        "cpu",
    ]);
    assert_eq!(info["output"], serde_json::json!([1, 7]));
    assert!(info["plan"]["peak_bytes"].as_u64().unwrap() > 0);
    let plan = good(&[
        "info",
        "resnet20",
        "--plan=gradients",
        "--batch",
        "2",
        "--backend",
        "cpu",
    ]);
    assert!(
        plan.contains("backward") && plan.contains("peak: "),
        "{plan}"
    );
    assert!(good_json(&["data", "list"]).as_array().unwrap().len() >= 5);
    assert_eq!(
        good_json(&["data", "verify", "digits"])["bad"],
        serde_json::json!([])
    );
}

#[test]
fn check_finds_nothing_wrong_with_an_op() {
    let r = good_json(&["check", "add", "--backend", "cpu"]);
    assert_eq!(r["failed"], 0);
    assert!(r["results"][1]["tensors"].as_u64().unwrap() > 0);
    let one = good(&["check", "add", "--list"]);
    good(&[
        "check",
        one.lines().next().unwrap(),
        "--backend",
        "cpu",
        "--variants",
    ]);
}

#[test]
fn digits_are_evaluated_with_random_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (svg, html) = (dir.path().join("c.svg"), dir.path().join("r.html"));
    let args = [
        "eval",
        "-m",
        "resnet20",
        "-w",
        "random",
        "-d",
        "digits",
        "--backend",
        "cpu",
    ];
    let more = [
        "--limit",
        "50",
        "--batch-size",
        "16",
        "--seed",
        "3",
        "--plot",
        text(&svg),
        "--report",
        text(&html),
    ];
    let r = good_json(&[&args[..], &more[..]].concat());
    assert_eq!(r["images"], 50);
    assert_eq!(r["model"], "resnet20");
    assert_eq!(r["backend"], "cpu");
    assert_eq!(r["confusion"].as_array().unwrap().len(), 10);
    for key in [
        "data",
        "top1",
        "top5",
        "loss",
        "macro_f1",
        "weighted_f1",
        "per_class",
        "images_per_second",
    ] {
        assert!(!r[key].is_null(), "{key}");
    }
    assert!(std::fs::read_to_string(&svg).unwrap().contains("</svg>"));
    assert!(std::fs::read_to_string(&html).unwrap().contains("</html>"));
    let table = good(&[&args[..], &["--limit", "20"]].concat());
    assert!(
        table.contains("top-1") && table.contains("confusion"),
        "{table}"
    );
}

#[test]
fn an_image_is_classified_and_a_broken_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.png");
    image::RgbImage::from_fn(40, 30, |x, y| {
        image::Rgb([(x * 6) as u8, (y * 8) as u8, 90])
    })
    .save(&image)
    .unwrap();
    let w = weights(dir.path(), "resnet20", 3);
    let names = dir.path().join("names.txt");
    std::fs::write(&names, "ant\nbee\ncat\n").unwrap();
    let args = [
        "predict",
        "-m",
        "resnet20",
        "-w",
        text(&w),
        "--backend",
        "cpu",
        "--classes-file",
        text(&names),
    ];
    let r = good_json(&[&args[..], &[text(&image), "--top", "2"]].concat());
    let top = r["predictions"][0]["top"].as_array().unwrap();
    assert_eq!(top.len(), 2);
    assert!(["ant", "bee", "cat"].contains(&top[0]["name"].as_str().unwrap()));
    assert!(top[0]["probability"].as_f64().unwrap() >= top[1]["probability"].as_f64().unwrap());

    let fake = dir.path().join("text.png");
    std::fs::write(&fake, "this is no image").unwrap();
    bad(
        &[&args[..], &[text(&fake)]].concat(),
        2,
        &["text.png", "not an image"],
    );
    let o = run(&[&args[..], &[text(&fake), text(&image)]].concat());
    assert_eq!(o.status.code(), Some(2));
    assert!(stdout(&o).contains("a.png") && stderr(&o).contains("text.png"));
    std::fs::write(&names, "ant\nbee\n").unwrap();
    bad(
        &[&args[..], &[text(&image)]].concat(),
        2,
        &["2 class names", "3 classes"],
    );
}

#[test]
fn tensors_go_in_and_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let w = weights(dir.path(), "resnet20", 10);
    let input = batch(dir.path(), 3, 32, &[1, 0, 9]);
    let out = dir.path().join("out.safetensors");
    let files = [
        "-m",
        "resnet20",
        "-w",
        text(&w),
        "-i",
        text(&input),
        "-o",
        text(&out),
        "--backend",
        "cpu",
    ];
    good(&[&["forward"], &files[..], &["--taps", "--batch-size", "2"]].concat());
    let f = WeightFile::open(&out).unwrap();
    assert_eq!(f.entry("logits").unwrap().shape, [3, 10]);
    assert_eq!(f.entry("layer3").unwrap().shape, [3, 64, 8, 8]);
    let forward = f.read_f32("logits").unwrap();

    let r = good_json(&[&["grad"], &files[..], &["--eval"]].concat());
    let f = WeightFile::open(&out).unwrap();
    assert_eq!(
        f.entry("grad.layer2.0.conv1.weight").unwrap().shape,
        [32, 16, 3, 3]
    );
    let loss = f.read_f32("loss").unwrap()[0];
    assert!((r["loss"].as_f64().unwrap() - f64::from(loss)).abs() < 1e-6);
    for (a, b) in forward.iter().zip(f.read_f32("logits").unwrap()) {
        assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{a} {b}");
    }

    batch(dir.path(), 3, 32, &[1, 0, 10]);
    bad(&[&["grad"], &files[..]].concat(), 2, &["label 10", "0..10"]);
    batch(dir.path(), 3, 32, &[1, 0]);
    bad(
        &[&["grad"], &files[..]].concat(),
        2,
        &["2 labels for 3 images"],
    );
    bad(
        &[&["forward"], &files[..], &["--classes", "7"]].concat(),
        2,
        &["10", "7", "--replace-head"],
    );
    good(
        &[
            &["forward"],
            &files[..],
            &["--classes", "7", "--replace-head"],
        ]
        .concat(),
    );
    let nowhere = [
        "-m",
        "resnet20",
        "-w",
        text(&w),
        "-i",
        text(&w),
        "-o",
        text(&out),
    ];
    bad(&[&["forward"], &nowhere[..]].concat(), 2, &["input"]);
}

#[cfg(unix)]
#[test]
fn a_closed_or_full_standard_output_is_no_panic() {
    let mut child = program()
        .arg("models")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let o = child.wait_with_output().unwrap();
    assert_eq!((o.status.code(), stderr(&o)), (Some(0), String::new()));
    if let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") {
        let o = program()
            .arg("models")
            .stdout(full)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(o.status.code(), Some(1));
        assert!(stderr(&o).contains("standard output"));
    }
}

/// A machine without any Vulkan driver, as far as the loader can tell.
#[cfg(target_os = "linux")]
#[test]
fn no_vulkan_driver_is_said_and_the_cpu_still_works() {
    let without = |args: &[&str]| {
        let mut c = program();
        c.env("VK_ICD_FILENAMES", "/nonexistent.json")
            .env("VK_DRIVER_FILES", "/nonexistent.json");
        c.args(args).output().unwrap()
    };
    let o = without(&["info", "resnet20", "--plan", "--backend", "wgpu"]);
    assert_eq!(o.status.code(), Some(2), "{}", stderr(&o));
    assert!(stderr(&o).contains("mesa-vulkan-drivers"), "{}", stderr(&o));
    let o = without(&["devices"]);
    assert_eq!(o.status.code(), Some(0));
    assert!(stdout(&o).contains("wgpu  absent"), "{}", stdout(&o));
}
