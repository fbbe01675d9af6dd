//! Progress on standard error: a bar in a terminal, a plain line now and then in a log file.

use super::table::{duration, number};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Time between two plain lines where standard error is not a terminal.
const EVERY: Duration = Duration::from_secs(10);

/// The bars of all threads.
static SCREEN: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

thread_local! {
    static NAME: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Names what `work` reports on this thread: one of several runs under way at once. Every line and bar begins with it.
pub fn named<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let before = NAME.replace(format!("{name}: "));
    let result = work();
    NAME.set(before);
    result
}

fn with_name(line: &str) -> String {
    NAME.with_borrow(|name| format!("{name}{line}"))
}

/// Prints a line on standard error, above the bars.
pub fn say(line: &str) {
    let line = with_name(line);
    SCREEN.suspend(|| {
        let _ = writeln!(std::io::stderr(), "{line}");
    });
}

/// Progress over a known number of steps. It writes to standard error alone and never fails a run: what cannot be
/// written is dropped.
pub struct Progress {
    label: String,
    steps: u64,
    done: u64,
    images: u64,
    /// Set at the first step, so that the rate leaves out compilation and the first batch's decoding.
    start: Option<Instant>,
    view: View,
}

enum View {
    Bar(ProgressBar),
    Lines {
        out: Box<dyn Write + Send>,
        every: Duration,
        last: Instant,
    },
}

impl Progress {
    /// Progress named `label` (`epoch 3/10`) over `steps` steps, as a bar or as lines, whichever standard error is.
    pub fn new(label: &str, steps: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::lines(label, steps, EVERY, Box::new(std::io::stderr()));
        }
        let bar = SCREEN.add(ProgressBar::new(steps));
        if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(with_name(label));
        Self::with_view(label, steps, View::Bar(bar))
    }

    /// Plain lines to `out`, at most one in `every`.
    pub fn lines(label: &str, steps: u64, every: Duration, out: Box<dyn Write + Send>) -> Self {
        Self::with_view(
            label,
            steps,
            View::Lines {
                out,
                every,
                last: Instant::now(),
            },
        )
    }

    fn with_view(label: &str, steps: u64, view: View) -> Self {
        Progress {
            label: with_name(label),
            steps,
            done: 0,
            images: 0,
            start: None,
            view,
        }
    }

    /// One step over `images` images is done; `loss` and `top1` (percent) are shown as given, NaN as `-`.
    pub fn step(&mut self, images: u64, loss: f64, top1: f64) {
        let start = match self.start {
            None => {
                // The rate counts whole steps between two ends of a step; the first one only starts the clock.
                self.start = Some(Instant::now());
                self.done += 1;
                return;
            }
            Some(start) => start,
        };
        self.done += 1;
        self.images += images;
        let state = State {
            done: self.done,
            steps: self.steps,
            images: self.images,
            elapsed: start.elapsed().as_secs_f64(),
            loss,
            top1,
        };
        match &mut self.view {
            View::Bar(bar) => {
                bar.set_position(self.done);
                // indicatif limits its own redraws; the message costs a few hundred nanoseconds.
                bar.set_message(state.message());
            }
            View::Lines { out, every, last } => {
                if last.elapsed() >= *every {
                    *last = Instant::now();
                    let percent = 100 * self.done / self.steps.max(1);
                    let _ = writeln!(
                        out,
                        "{} {}/{} ({percent} %) {}",
                        self.label,
                        self.done,
                        self.steps,
                        state.message()
                    );
                }
            }
        }
    }

    /// Prints a line of its own, above the bar.
    pub fn note(&mut self, line: &str) {
        match &mut self.view {
            View::Bar(_) => say(line),
            View::Lines { out, .. } => {
                let _ = writeln!(out, "{}", with_name(line));
            }
        }
    }

    /// Takes the bar off the screen and prints `summary` in its place (nothing where it is empty).
    pub fn finish(mut self, summary: &str) {
        if let View::Bar(bar) = &self.view {
            bar.finish_and_clear();
            SCREEN.remove(bar);
        }
        if !summary.is_empty() {
            self.note(summary);
        }
    }
}

struct State {
    done: u64,
    steps: u64,
    images: u64,
    elapsed: f64,
    loss: f64,
    top1: f64,
}

impl State {
    fn message(&self) -> String {
        let rate = self.images as f64 / self.elapsed;
        // `done - 1` steps were timed.
        let left =
            self.elapsed / (self.done - 1) as f64 * self.steps.saturating_sub(self.done) as f64;
        format!(
            "{} images/s  loss {}  top-1 {} %  {} left",
            number(rate, 0),
            number(self.loss, 4),
            number(self.top1, 2),
            duration(left)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn rate_and_time_left() {
        // Three timed steps of 100 images in 6 s: 50 images/s, 2 s a step, 6 steps to go.
        let s = State {
            done: 4,
            steps: 10,
            images: 300,
            elapsed: 6.0,
            loss: f64::NAN,
            top1: 12.345,
        };
        assert_eq!(s.message(), "50 images/s  loss -  top-1 12.35 %  12 s left");
    }

    #[test]
    fn lines_keep_their_distance() {
        let out = Shared::default();
        let mut p = Progress::lines(
            "epoch 1/2",
            5,
            Duration::from_secs(3600),
            Box::new(out.clone()),
        );
        (0..5).for_each(|_| p.step(10, 1.0, 50.0));
        p.finish("done");
        assert_eq!(
            String::from_utf8(out.0.lock().unwrap().clone()).unwrap(),
            "done\n"
        );

        let out = Shared::default();
        let mut p = Progress::lines("epoch 1/2", 5, Duration::ZERO, Box::new(out.clone()));
        (0..5).for_each(|_| p.step(10, 1.0, 50.0));
        p.note("a note");
        p.finish("");
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(
            lines[3].starts_with("epoch 1/2 5/5 (100 %) ") && lines[3].ends_with("0.0 s left"),
            "{text}"
        );
    }
}
