//! Standard output and standard error, either of which may be closed or full.

use serde::Serialize;
use std::io::{ErrorKind, Write};
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

/// Ends the process at once, without running what drivers have registered for a normal exit: other threads may be in
/// the middle of their work.
pub fn leave(code: i32) -> ! {
    #[cfg(unix)]
    // SAFETY: ends the process; nothing runs after it.
    unsafe {
        libc::_exit(code)
    }
    #[cfg(not(unix))]
    std::process::exit(code)
}
