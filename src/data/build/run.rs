//! Shards filled by many downloads at once.

use super::get::{Failure, agent, get, host};
use super::journal::{Journal, Record};
use super::picture::{self, Picture};
use super::plan::{Candidate, Plan};
use super::report::{BuildReport, Done};
use super::{BuildOptions, Lost};
use crate::data::random::{Use, stream};
use crate::data::shards::{About, Member, write_about, write_shard};
use crate::report::{remove_parts, write_atomic};
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Shards that are filled at once: a slow host's images do not hold up the others.
const OPEN: usize = 8;
/// The longest pause before a new attempt.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A line of progress, where nobody looks at a bar.
const EVERY: Duration = Duration::from_secs(30);
/// Where the state of a build lies, beside its shards.
const STATE: &str = ".build";

/// Downloads what `options` says and writes shards of it into `options.dir`: `train-000000.tar`, `test-000000.tar` and so
/// on, `dataset.json` (the classes), `failures.csv`, `report.txt` and `report.json`. The same call goes on where an earlier
/// one was stopped, in whatever way.
///
/// # Errors
/// [`Error::Input`]: bad options, a table that cannot be read, a folder that holds another build; [`Error::Run`]: the
/// folder cannot be written, or `stop` was set.
pub fn build(options: &BuildOptions, stop: &AtomicBool) -> Result<BuildReport> {
    check(options)?;
    let clock = Instant::now();
    let plan = Plan::make(options)?;
    let mut report = BuildReport {
        dir: options.dir.clone(),
        rows: plan.rows,
        candidates: plan.candidates(),
        lost: plan.lost.clone(),
        classes: plan.classes.len(),
        reduce: serde_json::to_value(plan.reduce)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default(),
        ..BuildReport::default()
    };
    if options.dry_run {
        return Ok(report);
    }
    let state = options.dir.join(STATE);
    let _lock = claim(options, &state, &plan)?;
    let mut job = Job::new(options, &plan, &state, stop)?;
    job.run()?;
    if stop.load(Ordering::Relaxed) && job.left() > 0 {
        return Err(Error::run(format!(
            "interrupted: {} of {} candidates are left; the same command goes on",
            job.left(),
            plan.candidates()
        )));
    }
    let mut lost = plan.failures.clone();
    let mut images = vec![0; plan.classes.len()];
    for shard in &job.shards {
        let done = shard.finished()?.ok_or_else(|| {
            Error::run(format!(
                "{} is gone; the same command makes it again",
                shard.tar.display()
            ))
        })?;
        report.add(shard.split, &done);
        if shard.split == "train" {
            for (class, n) in &done.classes {
                images[*class as usize] += n;
            }
        }
        lost.extend(done.lost);
    }
    report.count(&plan.classes, &images);
    report.settled = job.settled.load(Ordering::Relaxed);
    report.seconds = clock.elapsed().as_secs_f64();
    lost.sort_by_key(|l| l.row);
    report.write(options, &lost)?;
    Ok(report)
}

fn check(o: &BuildOptions) -> Result<()> {
    let bad = |what: String| Err(Error::input(what));
    if o.tables.is_empty() {
        return bad("no table is given".into());
    }
    if !(0.0..1.0).contains(&o.test_share) {
        return bad(format!(
            "--test-share {}: give 0 or more and less than 1",
            o.test_share
        ));
    }
    if !(1..=100).contains(&o.quality) {
        return bad(format!("--quality {}: give 1 to 100", o.quality));
    }
    if o.size > 8192 || (o.square && o.size == 0) {
        return bad(format!("--size {}: give 1 to 8192 pixels", o.size));
    }
    if o.per_shard == 0 || o.downloads == 0 || o.downloads > 4096 || o.per_host == 0 {
        return bad("--per-shard, --downloads (up to 4096) and --per-host: give 1 or more".into());
    }
    if o.timeout.is_zero() || o.connect_timeout.is_zero() {
        return bad("a time-out of 0 s lets nothing through".into());
    }
    if o.top == Some(0) || o.per_class == Some(0) {
        return bad("--top and --per-class: give 1 or more".into());
    }
    Ok(())
}

/// What decides the bytes of the shards: a build goes on only with the same.
#[derive(Serialize, Deserialize, PartialEq)]
struct Settings(serde_json::Map<String, serde_json::Value>);

impl Settings {
    fn of(o: &BuildOptions, plan: &Plan) -> Result<Settings> {
        let mut candidates = Sha256::new();
        for p in &plan.parts {
            for c in &p.candidates {
                candidates.update(format!("{} {} {} {}\n", p.split, c.row, c.class, c.url));
            }
        }
        let placeholders: Vec<String> = placeholders(o)?.into_iter().collect();
        let value = serde_json::json!({
            "version": 1,
            "images to get": format!("{:x}", candidates.finalize()),
            "--size": o.size,
            "--square": o.square,
            "--quality": o.quality,
            "--min-side": o.min_side,
            "--max-bytes": o.max_bytes,
            "--per-shard": o.per_shard,
            "--placeholder": placeholders,
        });
        match value {
            serde_json::Value::Object(map) => Ok(Settings(map)),
            _ => Err(Error::run("the settings are no object")),
        }
    }
}

fn placeholders(o: &BuildOptions) -> Result<std::collections::BTreeSet<String>> {
    let sum = |p: &PathBuf| {
        let bytes = std::fs::read(p).map_err(|e| Error::reading(p, e))?;
        Ok(picture::sha256(&bytes))
    };
    o.placeholders.iter().map(sum).collect()
}

/// Makes the folder this build's own.
fn claim(o: &BuildOptions, state: &Path, plan: &Plan) -> Result<File> {
    let settings = Settings::of(o, plan)?;
    let path = state.join("settings.json");
    let unwritable =
        |e: std::io::Error| Error::input(format!("cannot write into {}: {e}", o.dir.display()));
    std::fs::create_dir_all(&o.dir).map_err(unwritable)?;
    let known = path.is_file();
    if !known {
        let entries = std::fs::read_dir(&o.dir).map_err(unwritable)?;
        let is_shard = |e: std::io::Result<std::fs::DirEntry>| {
            e.is_ok_and(|e| e.path().extension().is_some_and(|x| x == "tar"))
        };
        if entries.into_iter().any(is_shard) {
            return Err(Error::input(format!(
                "{} holds shards that this command did not write; name another folder",
                o.dir.display()
            )));
        }
    }
    std::fs::create_dir_all(state).map_err(unwritable)?;
    let lock = File::create(state.join("lock")).map_err(unwritable)?;
    if lock.try_lock().is_err() {
        return Err(Error::input(format!(
            "another build is writing into {}",
            o.dir.display()
        )));
    }
    remove_parts(&o.dir)?;
    remove_parts(state)?;
    if known {
        let text = std::fs::read_to_string(&path).map_err(|e| Error::reading(&path, e))?;
        let before: Settings = serde_json::from_str(&text)
            .map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
        let other = settings.0.iter().find(|(k, v)| before.0.get(*k) != Some(v));
        if let Some((key, value)) = other {
            let was = before.0.get(key).cloned().unwrap_or_default();
            let what = match key.starts_with("--") {
                true => format!("{key} was {was} and is {value}"),
                false => "the tables or what is chosen from them changed".to_owned(),
            };
            return Err(Error::input(format!(
                "{} holds a build with other settings: {what}\nName another folder, or give the same settings to go on.",
                o.dir.display()
            )));
        }
        return Ok(lock);
    }
    let about = About {
        classes: plan.classes.clone(),
        ..About::default()
    };
    write_about(&o.dir, &about)?;
    let text = serde_json::to_vec_pretty(&settings).map_err(|e| Error::run(e.to_string()))?;
    write_atomic(&path, &text)?;
    Ok(lock)
}

/// A shard of the plan.
struct Shard<'a> {
    split: &'static str,
    number: usize,
    candidates: &'a [Candidate],
    tar: PathBuf,
    journal: PathBuf,
    done: PathBuf,
}

impl Shard<'_> {
    /// What the shard holds, where it is done, and there as it was written.
    fn finished(&self) -> Result<Option<Done>> {
        let bytes = match std::fs::read(&self.done) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::reading(&self.done, e)),
        };
        let done: Done = serde_json::from_slice(&bytes)
            .map_err(|e| Error::input(format!("{}: {e}", self.done.display())))?;
        let there = std::fs::metadata(&self.tar).is_ok_and(|m| m.len() == done.bytes);
        Ok(there.then_some(done))
    }
}

/// A candidate to be tried: shard, place in it, attempts before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Task {
    shard: usize,
    slot: u32,
    attempt: u32,
}

/// A shard that is being filled.
struct Open {
    journal: Arc<Mutex<Journal>>,
    left: usize,
}

#[derive(Default)]
struct Schedule {
    next_shard: usize,
    open: HashMap<usize, Open>,
    ready: VecDeque<Task>,
    /// Tasks of hosts that have enough to do.
    waiting: HashMap<String, VecDeque<Task>>,
    /// Downloads under way, by host.
    active: HashMap<String, usize>,
    /// Tasks that wait for their time.
    later: BinaryHeap<Reverse<(Instant, Task)>>,
    failed: Option<Error>,
}

struct Job<'a> {
    options: &'a BuildOptions,
    plan: &'a Plan,
    stop: &'a AtomicBool,
    agent: ureq::Agent,
    placeholders: HashSet<String>,
    folders: Vec<PathBuf>,
    shards: Vec<Shard<'a>>,
    schedule: Mutex<Schedule>,
    changed: Condvar,
    view: View,
    settled: AtomicU64,
    /// Settled before this process began.
    before: AtomicU64,
}

impl<'a> Job<'a> {
    fn new(
        options: &'a BuildOptions,
        plan: &'a Plan,
        state: &Path,
        stop: &'a AtomicBool,
    ) -> Result<Job<'a>> {
        let mut shards = vec![];
        for part in &plan.parts {
            let chunks = part.candidates.chunks(options.per_shard);
            for (number, candidates) in chunks.enumerate() {
                let name = format!("{}-{number:06}", part.split);
                shards.push(Shard {
                    split: part.split,
                    number,
                    candidates,
                    tar: options.dir.join(format!("{name}.tar")),
                    journal: state.join(format!("{name}.journal")),
                    done: state.join(format!("{name}.json")),
                });
            }
        }
        let folder = |t: &PathBuf| t.parent().unwrap_or(Path::new("")).to_path_buf();
        Ok(Job {
            options,
            plan,
            stop,
            agent: agent(options),
            placeholders: placeholders(options)?.into_iter().collect(),
            folders: options.tables.iter().map(folder).collect(),
            shards,
            schedule: Mutex::default(),
            changed: Condvar::new(),
            view: View::new(plan.candidates()),
            settled: AtomicU64::new(0),
            before: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn left(&self) -> u64 {
        let done = self.settled.load(Ordering::Relaxed) + self.before.load(Ordering::Relaxed);
        self.plan.candidates() - done
    }

    fn run(&mut self) -> Result<()> {
        let job = &*self;
        std::thread::scope(|scope| {
            for i in 0..job.options.downloads.min(job.plan.candidates() as usize) {
                let thread = std::thread::Builder::new()
                    .name(format!("download-{i}"))
                    .spawn_scoped(scope, || job.work());
                if let Err(e) = thread {
                    // With fewer threads it goes on as well.
                    if i == 0 {
                        job.fail(Error::run(format!("cannot start a thread: {e}")));
                    }
                    break;
                }
            }
        });
        self.view.finish();
        match self.lock().failed.take() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    fn fail(&self, e: Error) {
        self.lock().failed.get_or_insert(e);
        self.changed.notify_all();
    }

    fn candidate(&self, task: Task) -> &Candidate {
        &self.shards[task.shard].candidates[task.slot as usize]
    }

    /// A thread: try one candidate after the other.
    fn work(&self) {
        while let Some(task) = self.next() {
            let candidate = self.candidate(task);
            let folder = &self.folders[candidate.table as usize];
            let got = get(&self.agent, &candidate.url, folder, self.options.max_bytes);
            self.release(host(&candidate.url));
            let made = match got {
                Err(f) if f.again.is_some() && task.attempt < self.options.retries => {
                    self.again(task, f.again.unwrap_or_default());
                    continue;
                }
                Err(f) => Err(f),
                // As many at once as there are cores, however many downloads there are.
                Ok(bytes) => {
                    rayon::scope(|_| picture::make(&bytes, self.options, &self.placeholders))
                }
            };
            if let Err(e) = self.settle(task, made) {
                self.fail(e);
                return;
            }
        }
    }

    /// The next candidate whose host may be asked; waits for one; `None` at the end.
    fn next(&self) -> Option<Task> {
        let mut s = self.lock();
        loop {
            if s.failed.is_some() || self.stop.load(Ordering::Relaxed) {
                return None;
            }
            while s.open.len() < OPEN
                && s.ready.len() < self.options.downloads
                && s.next_shard < self.shards.len()
            {
                if let Err(e) = self.open_next(&mut s) {
                    s.failed.get_or_insert(e);
                    self.changed.notify_all();
                    return None;
                }
            }
            let now = Instant::now();
            while s.later.peek().is_some_and(|Reverse((at, _))| *at <= now) {
                if let Some(Reverse((_, task))) = s.later.pop() {
                    s.ready.push_front(task);
                }
            }
            while let Some(task) = s.ready.pop_front() {
                let host = host(&self.candidate(task).url);
                let active = s.active.get(host).copied().unwrap_or(0);
                // Files have no host, and no limit.
                if !host.is_empty() && active >= self.options.per_host {
                    s.waiting
                        .entry(host.to_owned())
                        .or_default()
                        .push_back(task);
                    continue;
                }
                *s.active.entry(host.to_owned()).or_default() += 1;
                return Some(task);
            }
            if s.open.is_empty() && s.next_shard >= self.shards.len() {
                return None;
            }
            // A stop is looked for twice a second.
            let until = s
                .later
                .peek()
                .map(|Reverse((at, _))| at.saturating_duration_since(now));
            let wait = until
                .unwrap_or(LONGEST_PAUSE)
                .min(Duration::from_millis(500));
            s = match self.changed.wait_timeout(s, wait) {
                Ok((s, _)) => s,
                Err(e) => e.into_inner().0,
            };
        }
    }

    /// Opens the next shard that is not done.
    fn open_next(&self, s: &mut Schedule) -> Result<()> {
        let index = s.next_shard;
        s.next_shard += 1;
        let shard = &self.shards[index];
        let n = shard.candidates.len();
        if let Some(done) = shard.finished()? {
            self.before.fetch_add(n as u64, Ordering::Relaxed);
            self.view.skip(n as u64, done.images);
            return Ok(());
        }
        let journal = Journal::open(&shard.journal)?;
        let left: Vec<u32> = (0..n as u32).filter(|slot| !journal.has(*slot)).collect();
        let had = (n - left.len()) as u64;
        self.before.fetch_add(had, Ordering::Relaxed);
        self.view.skip(had, 0);
        if left.is_empty() {
            return self.finish(shard, journal);
        }
        s.open.insert(
            index,
            Open {
                left: left.len(),
                journal: Arc::new(Mutex::new(journal)),
            },
        );
        let task = |slot| Task {
            shard: index,
            slot,
            attempt: 0,
        };
        s.ready.extend(left.into_iter().map(task));
        self.changed.notify_all();
        Ok(())
    }

    fn release(&self, host: &str) {
        let mut s = self.lock();
        if let Some(n) = s.active.get_mut(host) {
            *n -= 1;
            if *n == 0 {
                s.active.remove(host);
            }
        }
        if let Some(waiting) = s.waiting.get_mut(host) {
            let task = waiting.pop_front();
            if waiting.is_empty() {
                s.waiting.remove(host);
            }
            if let Some(task) = task {
                s.ready.push_front(task);
            }
        }
        self.changed.notify_one();
    }

    /// Tries again later: twice as late at each attempt, and varied by half, so that what failed together does not come
    /// back together.
    fn again(&self, task: Task, least: Duration) {
        let mut random = stream(0, Use::Shards, task.shard as u32, task.slot);
        let doubled = self.options.pause * 2u32.pow(task.attempt.min(16));
        let pause = doubled.mul_f32(0.5 + random.uniform()).min(LONGEST_PAUSE);
        let task = Task {
            attempt: task.attempt + 1,
            ..task
        };
        let at = Instant::now() + pause.max(least);
        self.lock().later.push(Reverse((at, task)));
        self.changed.notify_all();
    }

    /// Writes down what became of a candidate, and the shard where it was its last.
    fn settle(&self, task: Task, made: Result<Picture, Failure>) -> Result<()> {
        let c = self.candidate(task);
        let record = match made {
            Ok(p) => Record {
                about: json(&serde_json::json!({
                    "label": c.class,
                    "class": self.plan.classes[c.class as usize],
                    "url": c.url,
                    "row": c.row,
                    "width": p.size[0],
                    "height": p.size[1],
                    "original_width": p.original[0],
                    "original_height": p.original[1],
                    "sha256": p.sha256,
                }))?,
                image: p.jpeg,
            },
            Err(f) => Record {
                about: json(&Lost {
                    row: c.row,
                    url: c.url.clone(),
                    cause: f.cause,
                    detail: f.detail,
                })?,
                image: vec![],
            },
        };
        let journal = {
            let s = self.lock();
            let open = s.open.get(&task.shard);
            open.map(|o| o.journal.clone())
                .ok_or_else(|| Error::run("a shard was closed too early"))?
        };
        journal
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .add(task.slot, &record)?;
        drop(journal);
        self.settled.fetch_add(1, Ordering::Relaxed);
        self.view.step(!record.image.is_empty());
        let full = {
            let mut s = self.lock();
            let open = s.open.get_mut(&task.shard);
            let left = open.map(|o| {
                o.left -= 1;
                o.left
            });
            match left {
                Some(0) => s.open.remove(&task.shard),
                _ => None,
            }
        };
        let Some(full) = full else { return Ok(()) };
        // The last one: nobody else holds the journal.
        let journal = Arc::into_inner(full.journal)
            .ok_or_else(|| Error::run("a shard's journal is still in use"))?
            .into_inner()
            .unwrap_or_else(|e| e.into_inner());
        self.finish(&self.shards[task.shard], journal)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Writes a shard whose candidates are all settled, in their order.
    fn finish(&self, shard: &Shard, mut journal: Journal) -> Result<()> {
        let mut done = Done {
            images: 0,
            bytes: 0,
            classes: Default::default(),
            lost: vec![],
        };
        let samples = (0..).zip(shard.candidates).filter_map(|(slot, c)| {
            let mut next = || -> Result<Option<Member>> {
                let record = journal.get(slot)?.ok_or_else(|| {
                    Error::run(format!(
                        "{}: record {slot} is gone",
                        shard.journal.display()
                    ))
                })?;
                if record.image.is_empty() {
                    let lost = serde_json::from_slice(&record.about)
                        .map_err(|e| Error::run(format!("{}: {e}", shard.journal.display())))?;
                    done.lost.push(lost);
                    return Ok(None);
                }
                done.images += 1;
                *done.classes.entry(c.class).or_default() += 1;
                Ok(Some(Member {
                    key: format!("{:09}", c.row),
                    extension: "jpg",
                    image: record.image,
                    label: c.class,
                    json: Some(record.about),
                }))
            };
            next().transpose()
        });
        let path = write_shard(&self.options.dir, shard.split, shard.number, samples)?;
        done.bytes = std::fs::metadata(&path)
            .map_err(|e| Error::reading(&path, e))?
            .len();
        // From here on the shard is done; the journal has served.
        write_atomic(&shard.done, &json(&done)?)?;
        std::fs::remove_file(&shard.journal).map_err(|e| Error::writing(&shard.journal, e))
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::run(e.to_string()))
}

/// Progress on standard error: a bar, or a line now and then.
struct View {
    bar: ProgressBar,
    lines: Option<Mutex<Instant>>,
    total: u64,
    start: Instant,
    done: AtomicU64,
    skipped: AtomicU64,
    kept: AtomicU64,
}

impl View {
    fn new(total: u64) -> View {
        let lines = !std::io::stderr().is_terminal();
        let bar = if lines {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(total)
        };
        let template = "images {bar:30} {pos} of {len}, {msg}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        View {
            bar,
            lines: lines.then(|| Mutex::new(Instant::now())),
            total,
            start: Instant::now(),
            done: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            kept: AtomicU64::new(0),
        }
    }

    /// These were settled before.
    fn skip(&self, n: u64, kept: u64) {
        self.kept.fetch_add(kept, Ordering::Relaxed);
        self.done.fetch_add(n, Ordering::Relaxed);
        self.skipped.fetch_add(n, Ordering::Relaxed);
        self.bar.inc(n);
        self.bar.reset_eta();
    }

    fn step(&self, kept: bool) {
        let kept = self.kept.fetch_add(u64::from(kept), Ordering::Relaxed) + u64::from(kept);
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let own = done - self.skipped.load(Ordering::Relaxed);
        let rate = own as f64 / self.start.elapsed().as_secs_f64().max(1e-9);
        let message = || format!("{kept} kept, {rate:.0} a second");
        let Some(last) = &self.lines else {
            self.bar.inc(1);
            self.bar.set_message(message());
            return;
        };
        let mut last = last.lock().unwrap_or_else(|e| e.into_inner());
        if last.elapsed() >= EVERY {
            *last = Instant::now();
            eprintln!("images {done} of {}, {}", self.total, message());
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
