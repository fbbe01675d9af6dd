//! The one error type: what was asked, what was found, what to do, and the exit status that goes with it.

use std::path::Path;

/// Why something could not be done. Messages are one or two lines, for people.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bad usage or bad input (a flag, a file, a shape): exit status 2.
    #[error("{0}")]
    Input(String),
    /// A failure while running (a device lost, a disk full, a check that failed): exit status 1.
    #[error("{0}")]
    Run(String),
}

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Bad usage or bad input: exit status 2.
    pub fn input(message: impl Into<String>) -> Self {
        Error::Input(message.into())
    }

    /// A failure while running: exit status 1.
    pub fn run(message: impl Into<String>) -> Self {
        Error::Run(message.into())
    }

    /// The process exit status: 2 for bad input, 1 for a failed run.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Input(_) => 2,
            Error::Run(_) => 1,
        }
    }

    /// The same error with `what` put before the message (`"layer1.0.conv1: ..."`).
    pub fn context(self, what: impl std::fmt::Display) -> Self {
        match self {
            Error::Input(m) => Error::Input(format!("{what}: {m}")),
            Error::Run(m) => Error::Run(format!("{what}: {m}")),
        }
    }

    /// An I/O failure on reading `path`: bad input.
    pub fn reading(path: &Path, e: std::io::Error) -> Self {
        Error::Input(format!("cannot read {}: {e}", path.display()))
    }

    /// An I/O failure on writing `path`: a failed run.
    pub fn writing(path: &Path, e: std::io::Error) -> Self {
        Error::Run(format!("cannot write {}: {e}", path.display()))
    }
}
