//! The code that talks to NVIDIA's driver, against a model of it (`tests/driver_model`): the whole program on `--backend
//! cuda`, launches, copies, graphs, events and all, with the simulator doing what the device would.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use tilewright::backend::cuda::Nvrtc;
use tilewright::backend::{self, CompileOptions};
use tilewright::graph::{Graph, Phase, Spec};
use tilewright::ops::act::{Act, ActFwd};

/// Where cargo puts the model's `libcuda.so`: it builds examples before it runs tests.
fn model_of_the_driver() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_tilewright")).with_file_name("examples");
    assert!(
        folder.join("libcuda.so").exists(),
        "{} has no libcuda.so: `cargo test` builds it, and so does `cargo build --example cuda` (with --release for a release \
         build)",
        folder.display()
    );
    folder
}

fn tilewright(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tilewright"))
        .args(args)
        .envs(env.iter().copied())
        .env("LD_LIBRARY_PATH", model_of_the_driver())
        .output()
        .unwrap()
}

/// What it prints; it succeeded, and broke none of the driver's rules.
fn clean(args: &[&str]) -> String {
    clean_with(args, &[])
}

fn clean_with(args: &[&str], env: &[(&str, &str)]) -> String {
    let output = tilewright(args, env);
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success() && !err.contains("driver model:"),
        "{args:?}\n{out}{err}"
    );
    out.into_owned()
}

fn compiler() -> bool {
    let found = Nvrtc::get();
    if let Err(e) = &found {
        eprintln!("left out: {e}");
    }
    found.is_ok()
}

#[test]
fn the_device_is_found_and_checked() {
    if !compiler() {
        return;
    }
    let devices = clean(&["devices"]);
    assert!(devices.contains("driver model (sm_990"), "{devices}");
    assert!(
        devices.contains("Without --backend, cuda is used"),
        "{devices}"
    );
    for args in [
        ["check", "conv2d", "--precision", "f32"],
        ["check", "attention", "--precision", "bf16"],
        ["check", "softmax_ce", "--precision", "tf32"],
    ] {
        let table = clean(&[&args[..], &["--backend", "cuda", "--variants"]].concat());
        assert!(table.contains("all good"), "{table}");
    }
}

/// Trains a small ViT with dropout, augmentation and clipping on images large enough to take a way of their own.
fn trained(backend: &[&str], seed: Option<&str>, dir: &Path) -> Vec<u8> {
    let out = dir.to_str().unwrap();
    let model = "vit:patch=8,dim=16,depth=1,heads=1,mlp=1,img=32";
    let settings = [
        "train",
        "-m",
        model,
        "-d",
        "synthetic:10x32",
        "--epochs",
        "2",
        "--subset",
        "6",
        "--batch-size",
        "8",
        "--dropout",
        "0.1",
        "--clip",
        "1",
        "--seed",
        "3",
        "-o",
        out,
    ];
    let seed: Vec<(&str, &str)> = seed.iter().map(|s| ("DRIVER_MODEL_SEED", *s)).collect();
    clean_with(&[&settings[..], backend].concat(), &seed);
    std::fs::read(dir.join("checkpoints/last.safetensors")).unwrap()
}

#[test]
fn training_by_the_driver_ends_in_the_weights_of_the_simulator() {
    if !compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let simulated = trained(&["--backend", "cuda:sim"], None, &dir.path().join("sim"));
    let by_driver: [(&[&str], Option<&str>); 4] = [
        (&["--backend", "cuda"], None),
        (&["--backend", "cuda"], Some("1")),
        (&["--backend", "cuda"], Some("2")),
        (&["--backend", "cuda", "--no-graph"], Some("3")),
    ];
    for (i, (backend, seed)) in by_driver.into_iter().enumerate() {
        let weights = trained(backend, seed, &dir.path().join(i.to_string()));
        assert!(
            weights == simulated,
            "{backend:?} with seed {seed:?} ends in other weights"
        );
    }
}

/// In a process that has the model for its driver: an input is written again before anybody has waited.
#[test]
#[ignore = "for inputs_keep_their_order, which starts it"]
fn inputs_keep_their_order_here() {
    let n = 64 << 10;
    let mut g = Graph::new();
    let x = g.input("x", Spec::f32([n]));
    let y = g.push1(ActFwd { act: Act::Relu }, &[x]).unwrap();
    g.keep(y);
    let cuda = backend::open("cuda").unwrap();
    let mut exec = cuda
        .compile(Arc::new(g), &CompileOptions::default())
        .unwrap();
    for i in 0..6 {
        exec.write(x, &vec![2.0 * i as f32; n]).unwrap();
        exec.run(&[Phase::Forward]).unwrap();
        exec.write(x, &vec![2.0 * i as f32 + 1.0; n]).unwrap();
        let got = exec.read(y).unwrap();
        assert!(got.iter().all(|&v| v == 2.0 * i as f32), "{i}: {}", got[0]);
    }
}

#[test]
fn inputs_keep_their_order() {
    if !compiler() {
        return;
    }
    for seed in 1..=6 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "inputs_keep_their_order_here", "--ignored"])
            .env("LD_LIBRARY_PATH", model_of_the_driver())
            .env("DRIVER_MODEL_SEED", seed.to_string())
            .output()
            .unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(
            output.status.success() && out.contains("1 passed") && !err.contains("driver model:"),
            "seed {seed}: {out}{err}"
        );
    }
}

#[test]
fn kernels_and_steps_are_timed_by_events() {
    if !compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json");
    let table = clean(&[
        "profile",
        "vit:patch=4,dim=16,depth=1,heads=1,mlp=1,img=8",
        "--train",
        "--batch",
        "2",
        "--backend",
        "cuda",
        "--trace",
        trace.to_str().unwrap(),
    ]);
    assert!(table.contains("attention_bwd"), "{table}");
    let trace = std::fs::read_to_string(trace).unwrap();
    assert!(trace.contains("attention.cu"), "{trace}");
}

#[test]
fn too_little_memory_says_what_would_fit() {
    if !compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let args = [
        "train",
        "-m",
        "vit:patch=2,dim=16,depth=2,heads=1,mlp=1",
        "-d",
        "digits",
        "--batch-size",
        "512",
        "--backend",
        "cuda",
        "-o",
        out.to_str().unwrap(),
    ];
    let output = tilewright(&args, &[("DRIVER_MODEL_MEMORY", "3000000")]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(
        err.contains("the device's memory does not suffice"),
        "{err}"
    );
    assert!(err.contains("would fit instead of 512"), "{err}");
}
