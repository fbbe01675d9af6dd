//! `analyze` as a user meets it, on the built-in digits with small random networks.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

const VIT: &str = "vit:patch=4,dim=24,depth=2,heads=2,mlp=1,img=8";

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tilewright"))
        .arg("analyze")
        .args(args)
        .args(["--backend", "cpu"])
        .output()
        .unwrap()
}

fn good(args: &[&str]) -> Value {
    let o = run(&[args, &["--json"]].concat());
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(0), "{args:?}: {err}");
    serde_json::from_slice(&o.stdout).unwrap()
}

/// Bad usage, with every word of `says` in a few lines.
fn bad(args: &[&str], says: &[&str]) {
    let o = run(args);
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(2), "{args:?}: {err}");
    assert!(o.stdout.is_empty() && !err.contains("panicked"), "{err}");
    let lines = err.lines().filter(|l| !l.starts_with("note: ")).count();
    assert!((1..=4).contains(&lines), "{args:?}: {err}");
    for s in says {
        assert!(err.contains(s), "{args:?}: no {s:?} in: {err}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A photograph that is not square.
fn photo(dir: &Path) -> String {
    let path = dir.join("photo.png");
    image::RgbImage::from_fn(16, 12, |x, y| image::Rgb([x as u8 * 9, y as u8 * 9, 40]))
        .save(&path)
        .unwrap();
    path.display().to_string()
}

const DIGITS: [&str; 4] = ["-d", "digits", "--limit", "40"];

#[test]
fn receptive_fields_come_from_the_graph() {
    let fields = good(&["receptive-field", "-m", "resnet18", "-w", "random"]);
    let last = fields["layers"].as_array().unwrap().last().unwrap();
    assert_eq!(last["layer"], "layer4");
    let axis = &last["field"]["window"][0];
    let size = axis["high"].as_i64().unwrap() - axis["low"].as_i64().unwrap() + 1;
    assert_eq!(size, 435);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("fields");
    let effective = ["--effective", "--image-size", "8", "-o", text(&out)];
    let args = [
        &["receptive-field", "-m", "cnn_r14", "-w", "random"],
        &effective[..],
    ]
    .concat();
    assert!(!good(&args)["effective"].as_array().unwrap().is_empty());
    assert!(out.join("effective-fields.png").is_file());
}

#[test]
fn layers_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("cka.svg");
    let batch = ["--batch-size", "20", "--plot", text(&plot)];
    let own = [&["cka", "-m", VIT, "-w", "random"], &DIGITS[..], &batch].concat();
    for (i, row) in good(&own)["cka"].as_array().unwrap().iter().enumerate() {
        assert!((row[i].as_f64().unwrap() - 1.0).abs() < 1e-9);
    }
    assert!(std::fs::read_to_string(&plot).unwrap().contains("blocks.1"));
    let two = good(&[&own[..], &["--with-model", "cnn_r14", "--within"]].concat());
    assert_eq!(two["pairs"].as_array().unwrap().len(), 3);
    assert_eq!(two["pairs"][1]["models"][1], "cnn_r14");
    let small = [
        "cka",
        "-m",
        VIT,
        "-w",
        "random",
        "-d",
        "digits",
        "--batch-size",
        "3",
    ];
    bad(&small, &["at least 4"]);
    let small = [
        "cka", "-m", VIT, "-w", "random", "-d", "digits", "--limit", "8",
    ];
    bad(&small, &["fewer than a batch of 32"]);
}

#[test]
fn heads_are_measured_and_drawn() {
    let distance = [
        &["attention-distance", "-m", VIT, "-w", "random"],
        &DIGITS[..],
    ]
    .concat();
    for layer in good(&distance)["layers"].as_array().unwrap() {
        // Two by two patches of 4 px: between 0 and the diagonal's 5.7 px.
        let heads = layer["heads"].as_array().unwrap();
        assert_eq!(heads.len(), 2);
        assert!(
            heads
                .iter()
                .all(|h| (0.1..5.6).contains(&h.as_f64().unwrap()))
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let (maps, photo) = (dir.path().join("maps"), photo(dir.path()));
    let map = [
        "attention-map",
        "-m",
        VIT,
        "-w",
        "random",
        "-o",
        text(&maps),
        &photo,
    ];
    assert!(good(&map)["files"].as_array().unwrap().len() == 2);
    // Image, mean, rollout and two heads, each 16 times enlarged from 8 px.
    let width = image::open(maps.join("photo.png")).unwrap().width();
    assert_eq!(width, 5 * (128 + 6) + 6);
    bad(&[&map[..], &["--block", "2"]].concat(), &["blocks 0 to 1"]);
    let cnn = [
        "attention-map",
        "-m",
        "resnet20",
        "-w",
        "random",
        "-o",
        "x",
        &photo,
    ];
    bad(&cnn, &["give a ViT"]);
    bad(
        &["attention-map", "-m", VIT, "-w", "random", &photo],
        &["--output"],
    );
    bad(
        &["attention-map", "-m", VIT, "-w", "random", "-o", "x"],
        &["-d DATA"],
    );
}

#[test]
fn mistakes_are_counted_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let of = |what: &'static str| [what, "-m", "cnn_r14", "-w", "random", "-d", "digits"];
    let side_by_side = ["--with-model", VIT, "-o", text(&out)];
    let got = good(&[&of("calibration")[..], &side_by_side].concat());
    let models = got["models"].as_array().unwrap();
    assert_eq!(models.len(), 2);
    for m in models {
        let c = &m["calibration"];
        assert!((0.0..=1.0).contains(&c["ece"].as_f64().unwrap()));
        assert_eq!(c["bins"].as_array().unwrap().len(), 15);
    }
    let csv = std::fs::read_to_string(out.join("bins.csv")).unwrap();
    assert!(csv.starts_with("model,low,high,images,confidence,accuracy\n"));
    assert_eq!(csv.lines().count(), 31);
    assert!(out.join("reliability.svg").is_file());

    let most = ["--most", "7", "-o", text(&out)];
    let got = good(&[&of("errors")[..], &most].concat());
    let mistakes = got["mistakes"].as_array().unwrap();
    assert_eq!(mistakes.len(), 7);
    let losses: Vec<f64> = mistakes
        .iter()
        .map(|m| m["loss"].as_f64().unwrap())
        .collect();
    assert!(losses.is_sorted_by(|a, b| a >= b));
    assert!(image::open(out.join("errors.png")).unwrap().width() > 7 * 128);

    let pairs = ["--pairs", "3", "--each", "4", "-o", text(&out)];
    let got = good(&[&of("confusion")[..], &pairs].concat());
    for p in got["pairs"].as_array().unwrap() {
        assert_ne!(p["truth"], p["predicted"]);
        assert!((1..=4).contains(&p["shown"].as_array().unwrap().len()));
    }
    assert!(out.join("confused.png").is_file() && out.join("confusion.svg").is_file());
    let classes = ["--classes", "7", "-o", text(&out)];
    bad(
        &[&of("errors")[..], &classes].concat(),
        &["7 classes", "10"],
    );
    bad(&of("errors"), &["--output"]);
    bad(
        &["calibration", "-m", "cnn_r14", "-w", "random"],
        &["--data"],
    );
    bad(&["calibrate"], &["calibration"]);
}

#[test]
fn corrupted_images_are_the_same_for_every_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = [
        &[
            "robustness",
            "-m",
            "cnn_r14",
            "-w",
            "random",
            "--with-model",
            VIT,
        ][..],
        &DIGITS,
        &["--levels", "2", "-o", text(&out)],
    ]
    .concat();
    let got = good(&args);
    let models = got["models"].as_array().unwrap();
    assert_eq!(models.len(), 2);
    for m in models {
        assert_eq!(m["rows"].as_array().unwrap().len(), 7 * 2);
    }
    assert_eq!(good(&args)["models"], got["models"]);
    let csv = std::fs::read_to_string(out.join("robustness.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 2 * 15);
    assert!(csv.starts_with("model,corruption,level,unit,top1,loss,images\n"));
    for file in ["robustness.svg", "corruptions.png"] {
        assert!(out.join(file).is_file());
    }
    bad(&[&args[..], &["--only", "fog"]].concat(), &["fog", "blur"]);
}

#[test]
fn photographs_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (out, photo) = (dir.path().join("out"), photo(dir.path()));
    for model in ["cnn_r14", VIT] {
        let of = |what: &'static str, more: &[&str]| {
            let args = [
                what,
                "-m",
                model,
                "-w",
                "random",
                "-o",
                text(&out),
                "--image-size",
                "8",
            ];
            good(&[&args[..], &[&photo], more].concat())
        };
        let cam = of("grad-cam", &["--class", "3,7"]);
        assert_eq!(cam["maps"].as_array().unwrap().len(), 2);
        assert_eq!(cam["maps"][1]["class"], 7);
        let drops = of("occlusion", &["--patch", "4", "--stride", "2"]);
        assert_eq!(drops["maps"][0]["starts"], serde_json::json!([0, 2, 4]));
        let maps = of("feature-map", &["--channels", "3"]);
        assert_eq!(maps["maps"][0]["layer"], "stem");
        assert_eq!(maps["maps"][0]["channels"].as_array().unwrap().len(), 3);
        assert!(out.join("photo.png").is_file());
        let args = ["filters", "-m", model, "-w", "random", "-o", text(&out)];
        assert_eq!(
            good(&args)["parameter"]
                .as_str()
                .unwrap()
                .split('.')
                .next_back(),
            Some("weight")
        );
        assert!(out.join("filters.png").is_file());
    }
    let cam = [
        "grad-cam",
        "-m",
        VIT,
        "-w",
        "random",
        "-o",
        text(&out),
        &photo,
    ];
    bad(
        &[&cam[..], &["--layer", "block.1"]].concat(),
        &["nearest is blocks.1", "stem"],
    );
    bad(
        &[&cam[..], &["--layer", "blocks.1"]].concat(),
        &["earlier --layer"],
    );
    bad(&[&cam[..], &["--class", "ten"]].concat(), &["0 to 9"]);
    let backbone = [
        "occlusion",
        "-m",
        "dinov2_small",
        "-w",
        "random",
        "--image-size",
        "28",
        "-o",
        "x",
    ];
    bad(&[&backbone[..], &[&photo]].concat(), &["no classifier"]);
    bad(
        &[
            "occlusion",
            "-m",
            VIT,
            "-w",
            "random",
            "-o",
            "x",
            "no-such.jpg",
        ],
        &["no-such.jpg"],
    );
}

#[test]
fn features_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = [
        &["embedding", "-m", VIT, "-w", "random"],
        &DIGITS[..],
        &["-o", text(&out)],
    ]
    .concat();
    let got = good(&args);
    assert_eq!(got["points"].as_array().unwrap().len(), 40);
    assert!(got["divergence"].as_f64().unwrap() >= 0.0);
    let csv = std::fs::read_to_string(out.join("embedding.csv")).unwrap();
    assert!(csv.starts_with("index,class,pca_1,pca_2,tsne_1,tsne_2\n"));
    assert_eq!(csv.lines().count(), 41);
    assert!(out.join("embedding.svg").is_file());
    let few = [
        "embedding",
        "-m",
        VIT,
        "-w",
        "random",
        "-d",
        "digits",
        "--limit",
        "3",
    ];
    bad(&few, &["5 or more"]);
    bad(&[&args[..], &["--perplexity", "0"]].concat(), &["2 to 500"]);
}
