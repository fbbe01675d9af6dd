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

/// A terminal of 100 by 30 with the program in it; what is on its screen.
#[cfg(unix)]
struct Terminal {
    child: std::process::Child,
    keys: std::fs::File,
    screen: std::sync::Arc<std::sync::Mutex<vt100::Parser>>,
}

#[cfg(unix)]
impl Terminal {
    fn start(dir: &Path, args: &[&str]) -> Terminal {
        use std::io::Read;
        use std::num::NonZero;
        use std::os::fd::{FromRawFd, OwnedFd};
        use std::os::unix::process::CommandExt;
        let (mut ours, mut theirs) = (0, 0);
        const ROWS: NonZero<u16> = NonZero::new(30).unwrap();
        const COLUMNS: NonZero<u16> = NonZero::new(100).unwrap();
        let size = libc::winsize {
            ws_row: ROWS.get(),
            ws_col: COLUMNS.get(),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let null = std::ptr::null_mut();
        // SAFETY: the descriptors are written by the call and owned from here on.
        let (ours, theirs) = unsafe {
            // Some systems take the size by a pointer to what they do not change.
            let made = libc::openpty(
                &mut ours,
                &mut theirs,
                null,
                null.cast(),
                &raw const size as _,
            );
            assert_eq!(made, 0);
            (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
        };
        let end = || Stdio::from(theirs.try_clone().unwrap());
        let mut command = program();
        command
            .current_dir(dir)
            .args(args)
            .env("TERM", "xterm-256color");
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: two system calls, before the program starts: the terminal becomes its own.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY as _, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let keys = std::fs::File::from(ours);
        let screen =
            std::sync::Arc::new(std::sync::Mutex::new(vt100::Parser::new(ROWS, COLUMNS, 0)));
        let (sink, mut pipe) = (screen.clone(), keys.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut bytes) {
                sink.lock().unwrap().process(&bytes[..n]);
            }
        });
        Terminal {
            child,
            keys,
            screen,
        }
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    fn wait(&self, says: &str) {
        let clock = Instant::now();
        while !self.text().contains(says) {
            let late = clock.elapsed() > Duration::from_secs(60);
            assert!(!late, "no {says:?} in\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, keys: &str) {
        use std::io::Write;
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// The program's end; the terminal must be as it was.
    fn end(mut self, status: i32) {
        assert_eq!(self.child.wait().unwrap().code(), Some(status));
        // What it wrote last may still be on its way.
        let clock = Instant::now();
        let shown = |t: &Terminal| {
            let parser = t.screen.lock().unwrap();
            parser.screen().alternate_screen() || parser.screen().hide_cursor()
        };
        while shown(&self) {
            assert!(clock.elapsed() < Duration::from_secs(10), "{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
        use std::os::fd::AsRawFd;
        // SAFETY: a plain structure, filled by the call.
        let modes = unsafe {
            let mut modes = std::mem::zeroed::<libc::termios>();
            assert_eq!(libc::tcgetattr(self.keys.as_raw_fd(), &mut modes), 0);
            modes
        };
        assert_ne!(modes.c_lflag & libc::ICANON, 0, "the terminal stays raw");
    }
}

/// The same in a terminal: a screen that follows every save, keys, and a terminal that is left as it was.
#[cfg(unix)]
#[test]
fn the_lab_is_a_screen_in_a_terminal() {
    if !wgpu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shaders = dir.path().join("shaders");
    copy(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders"),
        &shaders,
    );
    let lab = [
        "lab",
        "scaled_sum",
        "--backend",
        "wgpu",
        "--shaders",
        "shaders",
    ];
    let mut t = Terminal::start(dir.path(), &lab);
    t.wait("RIGHT, worst error");
    assert!(t.screen.lock().unwrap().screen().alternate_screen());
    let file = shaders.join("elementwise.wgsl");
    let text = std::fs::read_to_string(&file).unwrap();
    let line = "y[i] = (a[i] + b[i]) * p.scale;";
    std::fs::write(&file, text.replace(line, "y[i] = nothing;")).unwrap();
    t.wait("DOES NOT RUN");
    t.wait("shaders/elementwise.wgsl:");
    t.wait("the newest that is right");
    std::fs::write(&file, &text).unwrap();
    t.wait("kernels of v3 beside v1");
    t.press("b");
    t.wait("kernels of v3, the base");
    t.press("r");
    t.wait("kernels of v4 beside the base, v3");
    t.press("?");
    t.wait("any key goes back");
    t.press(" q");
    t.end(0);
    let mut t = Terminal::start(dir.path(), &lab);
    t.wait("watching");
    t.press("\x03");
    t.end(130);
    let t = Terminal::start(dir.path(), &lab);
    t.wait("scaled_sum(");
    // SAFETY: our own child, which has not been waited for.
    unsafe { libc::kill(t.child.id() as i32, libc::SIGTERM) };
    t.end(130);
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
