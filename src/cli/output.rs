//! Standard output and standard error, either of which may be closed or full.

use serde::Serialize;
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use tilewright::{Error, Result};

/// Prints a result. A reader that has gone away (`| head`) is no failure: the program ends with status 0.
///
/// # Errors
/// Standard output cannot be written (a full disk).
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => Err(Error::run(format!("cannot write to standard output: {e}"))),
    }
}

/// Prints one JSON document.
///
/// # Errors
/// As [`print`].
pub fn json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::run(e.to_string()))?;
    text.push('\n');
    print(&text)
}

/// A line for people on standard error; dropped where that is closed.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Whether the terminal is a screen, as `lab` makes it, and what is needed to put it back.
pub struct Shown {
    on: AtomicBool,
    /// Standard error, which is kept away from the picture: drivers write there. -1: it is where it was.
    stderr: AtomicI32,
}

/// The terminal of this process.
pub static SHOWN: Shown = Shown {
    on: AtomicBool::new(false),
    stderr: AtomicI32::new(-1),
};

impl Shown {
    /// Says that the terminal becomes a screen.
    pub fn begin(&self) {
        self.on.store(true, Ordering::SeqCst);
        #[cfg(unix)]
        if std::io::stderr().is_terminal()
            && let Ok(null) = std::fs::File::options().write(true).open("/dev/null")
        {
            use std::os::fd::AsRawFd;
            // SAFETY: descriptors of this process; `null` is open.
            unsafe {
                self.stderr.store(libc::dup(2), Ordering::SeqCst);
                libc::dup2(null.as_raw_fd(), 2);
            }
        }
    }

    /// Puts the terminal back, if it is a screen.
    pub fn end(&self) {
        // Nobody draws a last picture over what comes after.
        let _lock = std::io::stdout().lock();
        if !self.on.swap(false, Ordering::SeqCst) {
            return;
        }
        let _ = ratatui::try_restore();
        let _ = ratatui::crossterm::execute!(std::io::stdout(), ratatui::crossterm::cursor::Show);
        #[cfg(unix)]
        {
            let stderr = self.stderr.swap(-1, Ordering::SeqCst);
            if stderr >= 0 {
                // SAFETY: the descriptor that `begin` made.
                unsafe {
                    libc::dup2(stderr, 2);
                    libc::close(stderr);
                }
            }
        }
    }
}

/// Ends the process at once, without running what drivers have registered for a normal exit: other threads may be in
/// the middle of their work.
pub fn leave(code: i32) -> ! {
    SHOWN.end();
    #[cfg(unix)]
    // SAFETY: ends the process; nothing runs after it.
    unsafe {
        libc::_exit(code)
    }
    #[cfg(not(unix))]
    std::process::exit(code)
}
