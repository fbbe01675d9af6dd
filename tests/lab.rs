//! `profile`, `lab`, `tune` and recorded results as a user meets them.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tilewright"))
}

fn run(dir: &Path, args: &[&str]) -> Output {
    program().current_dir(dir).args(args).output().unwrap()
}

/// The output of a command that must succeed. A measurement on a machine so busy that its limits were measured too low is
/// refused by the program, and rightly so: it is made again.
fn good(dir: &Path, args: &[&str]) -> String {
    let refused =
        |o: &Output| String::from_utf8_lossy(&o.stderr).contains("measure the limits again");
    let mut o = run(dir, args);
    for _ in 0..9 {
        if !refused(&o) {
            break;
        }
        o = run(dir, args);
    }
    let err = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(0), "{args:?}: {err}");
    String::from_utf8(o.stdout).unwrap()
}

fn wgpu() -> bool {
    let there = tilewright::backend::wgpu::adapters();
    if let Err(e) = &there {
        assert!(std::env::var("CI").is_err(), "{e}");
        println!("skipped: {e}");
    }
    there.is_ok()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => std::fs::write(&target, std::fs::read(entry.path()).unwrap()).unwrap(),
        }
    }
}

const TINY: [&str; 6] = ["cnn_r14", "--batch", "2", "--image", "8", "--backend"];

#[test]
fn a_step_is_profiled_traced_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let profile = |backend: &str, more: &[&str]| {
        good(
            dir,
            &[&["profile"][..], &TINY, &[backend, "--steps", "3"], more].concat(),
        )
    };
    let text = profile("cpu", &["--trace", "t.json", "--save", "a.json"]);
    for says in [
        "what to fix first",
        "at the roofline",
        "alive at the peak",
        "conv2d_wgrad",
    ] {
        assert!(text.contains(says), "no {says} in {text}");
    }
    let trace: Value = serde_json::from_slice(&std::fs::read(dir.join("t.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let kinds: Vec<&str> = events.iter().map(|e| e["ph"].as_str().unwrap()).collect();
    assert!(kinds.contains(&"X") && kinds.contains(&"C") && kinds.contains(&"M"));
    profile("cpu", &["--save", "b.json", "--infer"]);
    let diff = good(
        dir,
        &["profile", "--diff", "a.json", "b.json", "--top", "3"],
    );
    assert!(diff.contains("all launches"), "{diff}");
    std::fs::write(dir.join("c.json"), "[]").unwrap();
    let bad = run(dir, &["profile", "--diff", "a.json", "c.json"]);
    assert_eq!(bad.status.code(), Some(2));
    if wgpu() {
        let text = profile("wgpu", &["--launches", "--by", "kernel"]);
        assert!(text.contains(".wgsl/"), "{text}");
    }
    if tilewright::backend::cuda::Nvrtc::get().is_ok() {
        let json = profile("cuda:sim", &["--json"]);
        let p: Value = serde_json::from_str(&json).unwrap();
        let launches = p["launches"].as_array().unwrap();
        let counted = |l: &Value| l["counted"]["instructions"].as_u64().unwrap() > 0;
        assert!(launches.len() > 30 && launches.iter().all(counted));
        let o = run(
            dir,
            &[&["profile"][..], &TINY, &["cuda:sim", "--trace", "x.json"]].concat(),
        );
        assert_eq!(o.status.code(), Some(2));
    }
}

#[test]
fn results_are_recorded_compared_and_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Bound by arithmetic, and too small to come near the peak: no limit measured on a busy machine is below it.
    let case = "conv2d(n=1,h=8,c=16,k=16,r=3,pad=1)";
    let bench = |more: &[&str]| {
        let flags = ["bench", case, "--backend", "cpu", "--seconds", "0.1"];
        good(dir, &[&flags[..], more].concat())
    };
    bench(&["--save", "first", "--html", "page.html"]);
    let page = std::fs::read_to_string(dir.join("page.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("Roofline"));
    let record = std::fs::read(dir.join("benches/results/first.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    for key in ["version", "commit", "backend", "device", "when"] {
        assert!(record["origin"][key].is_string(), "{key}");
    }
    let text = bench(&["--compare", "first", "--save", "second"]);
    let verdict = ["faster", "slower", "within noise"]
        .iter()
        .any(|v| text.contains(v));
    assert!(verdict, "{text}");
    let history = good(dir, &["bench", "history", "--html", "history.html"]);
    assert!(
        history.contains("first ms") && history.contains("second ms"),
        "{history}"
    );
    assert!(
        std::fs::read_to_string(dir.join("history.html"))
            .unwrap()
            .contains("<circle")
    );
    let none = run(
        dir,
        &[
            "bench",
            case,
            "--compare",
            "none",
            "--seconds",
            "0.1",
            "--backend",
            "cpu",
        ],
    );
    assert_eq!(none.status.code(), Some(2));
}

#[test]
fn tuned_variants_are_written_and_applied() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let case = "conv2d(n=1,h=8,c=16,k=16,r=3,pad=1)";
    let tune = [
        "tune",
        case,
        "--backend",
        "cpu",
        "--seconds",
        "0.1",
        "-o",
        "t.toml",
    ];
    good(dir, &tune);
    let text = std::fs::read_to_string(dir.join("t.toml")).unwrap();
    assert!(text.starts_with("# Kernel variants"), "{text}");
    let checked = good(
        dir,
        &[
            "check",
            "conv2d(n=1,h=8,c=16,k=16,r=3,pad=1)",
            "--backend",
            "cpu",
            "--tuned",
            "t.toml",
        ],
    );
    assert!(checked.contains("all good"));
    let missing = run(
        dir,
        &["check", "add", "--backend", "cpu", "--tuned", "none.toml"],
    );
    assert_eq!(missing.status.code(), Some(2));
    let sim = run(dir, &["tune", "add", "--backend", "cuda:sim"]);
    assert_eq!(sim.status.code(), Some(2));
}

/// Edit, see: a break is found, a compiler error has its file and line, and the repaired kernel is compared with the
/// one before.
#[test]
fn the_lab_sees_every_save() {
    if !wgpu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shaders = dir.path().join("shaders");
    copy(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders"),
        &shaders,
    );
    let mut child = program()
        .current_dir(dir.path())
        .args(["lab", "scaled_sum", "--backend", "wgpu", "--saves", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let out = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let (sink, mut pipe) = (out.clone(), child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        use std::io::Read;
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut bytes) {
            sink.lock()
                .unwrap()
                .push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
    });
    let wait = |says: &str| {
        let clock = Instant::now();
        while !out.lock().unwrap().contains(says) {
            assert!(
                clock.elapsed() < Duration::from_secs(240),
                "no {says:?} in: {}",
                out.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let file = shaders.join("elementwise.wgsl");
    let text = std::fs::read_to_string(&file).unwrap();
    let save = |text: &str| std::fs::write(&file, text).unwrap();
    wait("as it is: right");
    let line = "y[i] = (a[i] + b[i]) * p.scale;";
    assert!(
        text.contains(line),
        "elementwise.wgsl has no `{line}` any more"
    );
    save(&text.replace(line, "y[i] = (a[i] - b[i]) * p.scale;"));
    wait("elementwise.wgsl: WRONG");
    save(&text.replace(line, "y[i] = (a[i] + nothing[i]) * p.scale;"));
    wait("DOES NOT RUN");
    wait(&format!(
        "elementwise.wgsl:{}",
        text.lines().position(|l| l.contains(line)).unwrap() + 1
    ));
    save(&text);
    wait("elementwise.wgsl: right");
    wait("to the one before");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    reader.join().unwrap();
}

#[test]
fn what_the_compiler_makes_is_printed() {
    let dir = tempfile::tempdir().unwrap();
    let text = good(
        dir.path(),
        &[
            "lab",
            "wgsl",
            "layer_norm.wgsl",
            "--case",
            "layer_norm(n=2,t=3,c=5)",
        ],
    );
    assert!(
        text.contains("@compute") && text.contains("alias T = f32;"),
        "{text}"
    );
    let wrong = run(dir.path(), &["lab", "wgsl", "layer_norm.cu"]);
    assert_eq!(wrong.status.code(), Some(2));
    let unlaunched = run(
        dir.path(),
        &["lab", "wgsl", "pool.wgsl", "--case", "add(n=2,c=2)"],
    );
    assert_eq!(unlaunched.status.code(), Some(2));
    if tilewright::backend::cuda::Nvrtc::get().is_ok() {
        let text = good(dir.path(), &["lab", "ptx", "layer_norm.cu", "--arch", "90"]);
        assert!(text.contains(".target sm_90") && text.contains(".entry layer_norm"));
    }
}

/// The skeleton is the page's example under another name; its files stand where the page says.
#[test]
fn a_new_room_is_written_and_registered() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    assert_eq!(run(dir, &["lab", "new", "swish"]).status.code(), Some(2));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["src/ops", "shaders", "kernels"] {
        std::fs::create_dir_all(dir.join(folder)).unwrap();
    }
    std::fs::copy(root.join("src/ops/mod.rs"), dir.join("src/ops/mod.rs")).unwrap();
    good(dir, &["lab", "new", "hard_swish"]);
    let registry = std::fs::read_to_string(dir.join("src/ops/mod.rs")).unwrap();
    assert!(
        registry.contains("pub mod hard_swish;") && registry.contains("    &hard_swish::ROOM,\n];")
    );
    let room = std::fs::read_to_string(dir.join("src/ops/hard_swish.rs")).unwrap();
    assert!(room.contains("struct HardSwish;") && room.contains("\"hard_swish.wgsl\""));
    assert!(
        dir.join("shaders/hard_swish.wgsl").exists() && dir.join("kernels/hard_swish.cu").exists()
    );
    // Never over what is there.
    assert_eq!(
        run(dir, &["lab", "new", "hard_swish"]).status.code(),
        Some(2)
    );
    assert_eq!(run(dir, &["lab", "new", "Hard"]).status.code(), Some(2));
}
