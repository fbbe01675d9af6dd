//! The loop of `lab`: watch, compile, check, measure, compare.

use super::super::case::case;
use super::super::global::{Global, default_backend};
use super::super::output::{note, print};
use super::Lab;
use super::inspect::validated;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};
use tilewright::backend::cuda::{self, CudaOptions};
use tilewright::backend::wgpu::shaders::ShaderSource;
use tilewright::backend::wgpu::{Wgpu, WgpuCx};
use tilewright::backend::{Backend, CompileOptions};
use tilewright::bench::Limits;
use tilewright::bench::kernel::{KernelOptions, count_case, time_case};
use tilewright::ops::Room;
use tilewright::ops::check::{case_graph, run_seeded};
use tilewright::report::table::{Table, number};
use tilewright::{Error, Result};

/// How often the folder is looked at.
const LOOK: Duration = Duration::from_millis(80);

/// `op` or `op(params)`: the first of its cases.
pub fn parse_case(text: &str) -> Result<(&'static Room, Option<String>)> {
    let c = case(text)?;
    Ok((c.room, c.params.and_then(|p| p.into_iter().next())))
}

/// A case that is large enough to say something and small enough for a second: the middle one by elements.
fn middling(room: &Room) -> String {
    let size = |p: &&str| {
        let case = room.build(p);
        case.map_or(0, |c| {
            c.operands.iter().map(|o| o.spec.len()).sum::<usize>()
        })
    };
    let mut all: Vec<&str> = room.cases.to_vec();
    all.sort_by_key(size);
    all.get(all.len() / 2).copied().unwrap_or("").to_string()
}

/// Times in milliseconds, or warp instructions, by op.
type Figures = BTreeMap<String, f64>;

/// What one version of the kernels came to.
enum Outcome {
    /// Right, with its figures and the worst error over its allowance.
    Right(f64, Figures),
    Wrong(String),
    Broken(String),
}

struct Bench<'a> {
    g: &'a Global,
    room: &'static Room,
    params: String,
    /// `wgpu`, `cuda:sim`, ...
    name: String,
    /// What is watched.
    dir: PathBuf,
}

impl Bench<'_> {
    fn counts(&self) -> bool {
        self.name == "cuda:sim"
    }

    fn open(&self) -> Result<Box<dyn Backend>> {
        let (kind, which) = match self.name.split_once(':') {
            Some((kind, which)) => (kind, Some(which)),
            None => (self.name.as_str(), None),
        };
        if kind == "cuda" {
            let mut options = self.g.cuda_options()?;
            options.source.0 = options.source.0.replaced_by(&self.dir)?;
            return cuda::open_device(
                which,
                CudaOptions {
                    graph: false,
                    ..options
                },
            );
        }
        let mut options = self.g.wgpu_options()?;
        options.shaders.0 = options.shaders.0.replaced_by(&self.dir)?;
        options.adapter = which.map(Into::into);
        Ok(Box::new(Wgpu::open(&options)?))
    }

    fn look(&self) -> Outcome {
        if let Some(fault) = self.fault() {
            return Outcome::Broken(fault);
        }
        match self.measure() {
            Ok(o) => o,
            Err(e) => Outcome::Broken(e.to_string()),
        }
    }

    fn measure(&self) -> Result<Outcome> {
        let backend = self.open()?;
        let options = CompileOptions {
            poison: true,
            ..CompileOptions::default()
        };
        let found = run_seeded(
            self.room,
            &self.params,
            backend.as_ref(),
            &options,
            self.g.seed,
        )?;
        let wrong: Vec<String> = found
            .iter()
            .filter(|f| !f.ok())
            .map(ToString::to_string)
            .collect();
        if !wrong.is_empty() {
            return Ok(Outcome::Wrong(wrong.join("\n  ")));
        }
        let worst = found.iter().map(|f| f.worst).fold(0.0, f64::max);
        let figures = if self.counts() {
            count_case(backend.as_ref(), self.room, &self.params, &options)?
                .into_iter()
                .map(|(op, c)| (op, c.instructions as f64))
                .collect()
        } else {
            let options = KernelOptions {
                passes: vec![],
                all_variants: false,
                hot: true,
                rivals: false,
                machine: None,
                limits: Limits {
                    warm_up: 2,
                    min_runs: 9,
                    precision: 0.02,
                    time: Duration::from_millis(250),
                },
            };
            let times = time_case(backend.as_ref(), self.room, &self.params, &options)?;
            times.into_iter().map(|(op, t)| (op, t.ms())).collect()
        };
        Ok(Outcome::Right(worst, figures))
    }

    /// What naga says of the case's shaders, with the file and line that the text came from. NVRTC tells them itself.
    fn fault(&self) -> Option<String> {
        if self.name.starts_with("cuda") {
            return None;
        }
        let source = ShaderSource(
            self.g
                .wgpu_options()
                .ok()?
                .shaders
                .0
                .replaced_by(&self.dir)
                .ok()?,
        );
        let adapter = tilewright::backend::wgpu::adapters()
            .ok()?
            .into_iter()
            .next()?;
        let cg = case_graph(&self.room.build(&self.params).ok()?, 1).ok()?;
        let mut seen = BTreeSet::new();
        for node in &cg.graph.nodes {
            let (x, y) = cg.graph.node_specs(node);
            let mut cx = WgpuCx::new(&adapter.traits, &x, &y, None);
            node.op.wgpu(&mut cx).ok()?;
            for l in cx.launches {
                if !seen.insert((l.shader, l.consts.clone())) {
                    continue;
                }
                let text = match source.assemble(l.shader, &l.consts) {
                    Ok(text) => text,
                    Err(e) => return Some(e.to_string()),
                };
                if let Err(f) = validated(l.shader, &text) {
                    let line = f.line.and_then(|n| text.lines().nth(n as usize - 1));
                    let place = line.and_then(|l| self.place(&f.file, l));
                    let place = place.unwrap_or_else(|| f.file.clone());
                    let line = line.map_or(String::new(), |l| format!("\n  | {}", l.trim()));
                    return Some(format!("{place}: {}{line}", f.message));
                }
            }
        }
        None
    }

    /// `layer_norm.wgsl:41` of a line of assembled text: the line of the file, or of one that it includes, that is the
    /// same up to numbers, which unrolling puts in.
    fn place(&self, file: &str, line: &str) -> Option<String> {
        let mut files = vec![file.to_string()];
        let mut i = 0;
        while let Some(name) = files.get(i).cloned() {
            let text = std::fs::read_to_string(self.dir.join(&name)).ok()?;
            for (n, l) in text.lines().enumerate() {
                if plain(l) == plain(line) {
                    let path = self.dir.join(&name);
                    return Some(format!("{}:{}", path.display(), n + 1));
                }
                let include = l.trim().strip_prefix("//#include \"");
                if let Some(inc) = include.and_then(|l| l.strip_suffix('"')) {
                    files.push(inc.to_string());
                }
            }
            i += 1;
        }
        None
    }
}

/// A line with every number and every `${i}` as `#`.
fn plain(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line.trim();
    while let Some(c) = rest.chars().next() {
        let placeholder = rest.strip_prefix("${").and_then(|r| r.split_once('}'));
        if let Some((_, after)) = placeholder {
            rest = after;
        } else if c.is_ascii_digit() {
            rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        }
        if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}

/// Files of `dir` with the times they were written.
fn files(dir: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(d) = dirs.pop() {
        // A file may go away while an editor saves it: the next look finds it again.
        let Ok(entries) = std::fs::read_dir(&d) else {
            continue;
        };
        for e in entries.flatten() {
            let Ok(meta) = e.metadata() else { continue };
            if meta.is_dir() {
                dirs.push(e.path());
            } else if e
                .path()
                .extension()
                .is_some_and(|x| x == "wgsl" || x == "cu" || x == "cuh")
                && let Ok(time) = meta.modified()
            {
                found.insert(e.path(), time);
            }
        }
    }
    found
}

fn change(now: f64, then: Option<f64>) -> String {
    match then {
        Some(t) if t > 0.0 => format!("{:+.1} %", 100.0 * (now / t - 1.0)),
        _ => "-".into(),
    }
}

/// Runs until Ctrl-C.
pub fn run(lab: &Lab, g: &Global) -> Result<ExitCode> {
    let (room, params) = parse_case(&lab.what)?;
    let params = match lab.case.clone().or(params) {
        Some(p) => p,
        None => middling(room),
    };
    room.build(&params)?;
    let name = match &g.backend {
        Some(name) => name.clone(),
        None if default_backend() == "cuda" => "cuda".into(),
        None => "wgpu".into(),
    };
    let cuda = name.starts_with("cuda");
    if !cuda && !name.starts_with("wgpu") {
        return Err(Error::input(format!(
            "lab watches device kernels: --backend wgpu, cuda or cuda:sim, not {name}; Rust is rebuilt by cargo"
        )));
    }
    let (given, default) = match cuda {
        true => (&g.kernels, "kernels"),
        false => (&g.shaders, "shaders"),
    };
    let dir = given.clone().unwrap_or_else(|| default.into());
    if !dir.is_dir() {
        return Err(Error::input(format!(
            "{}: not a folder; run `lab` in a checkout of the sources or give --{default} DIR",
            dir.display()
        )));
    }
    let bench = Bench {
        g,
        room,
        params,
        name,
        dir,
    };
    note(&format!(
        "{}({}) on {}: watching {}; Ctrl-C ends",
        room.name,
        bench.params,
        bench.name,
        bench.dir.display()
    ));
    let (mut before, mut best) = (Figures::new(), Figures::new());
    let mut seen = files(&bench.dir);
    let mut good = show(&bench, "as it is", Instant::now(), &mut before, &mut best)?;
    let mut saves = 0;
    while !lab.once && lab.saves.is_none_or(|n| saves < n) {
        std::thread::sleep(LOOK);
        let now = files(&bench.dir);
        if now == seen {
            continue;
        }
        let clock = Instant::now();
        let changed: Vec<String> = now
            .iter()
            .filter(|(path, time)| seen.get(*path) != Some(*time))
            .filter_map(|(path, _)| Some(path.file_name()?.to_string_lossy().into_owned()))
            .collect();
        seen = now;
        if changed.is_empty() {
            continue;
        }
        saves += 1;
        good = show(&bench, &changed.join(", "), clock, &mut before, &mut best)?;
    }
    Ok(ExitCode::from(u8::from(!good)))
}

/// One look, printed; whether it was right.
fn show(
    bench: &Bench,
    what: &str,
    clock: Instant,
    before: &mut Figures,
    best: &mut Figures,
) -> Result<bool> {
    let outcome = bench.look();
    let seconds = number(clock.elapsed().as_secs_f64(), 2);
    let (worst, figures) = match outcome {
        Outcome::Right(worst, figures) => (worst, figures),
        Outcome::Wrong(why) => {
            print(&format!(
                "{what}: WRONG, {seconds} s after the save\n  {why}\n"
            ))?;
            return Ok(false);
        }
        Outcome::Broken(why) => {
            print(&format!(
                "{what}: DOES NOT RUN, {seconds} s after the save\n  {why}\n"
            ))?;
            return Ok(false);
        }
    };
    let counts = bench.counts();
    let unit = if counts { "instructions" } else { "ms" };
    let mut t = Table::new(["op", unit, "to the one before", "to the best"]).left(&[0]);
    for (op, &v) in &figures {
        t.row([
            op.clone(),
            number(v, if counts { 0 } else { 4 }),
            change(v, before.get(op).copied()),
            change(v, best.get(op).copied()),
        ]);
    }
    for (op, &v) in &figures {
        let b = best.entry(op.clone()).or_insert(v);
        *b = b.min(v);
    }
    *before = figures;
    print(&format!(
        "{what}: right (worst error {} of the allowance), {seconds} s after the save\n{}",
        number(worst, 3),
        t.to_text()
    ))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unrolled_lines_are_found_again() {
        assert_eq!(
            plain("  let a${i} = b[${i} + 1u];"),
            plain("let a3 = b[3 + 1u];")
        );
        assert_ne!(plain("let a = b;"), plain("let a = c;"));
    }

    #[test]
    fn cases_are_read_and_chosen() {
        assert!(parse_case("conv2d(n=1").is_err() && parse_case("none").is_err());
        let (room, params) = parse_case("add(n=2,c=3)").unwrap();
        assert_eq!((room.name, params.as_deref()), ("add", Some("n=2,c=3")));
        assert!(room.build(&middling(room)).is_ok());
    }
}
