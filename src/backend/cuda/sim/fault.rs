//! What goes wrong in a kernel, and where.

use crate::error::Error;
use std::fmt;

/// An error that a kernel makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kernel: String,
    /// Source file, as the compiler was given it; empty without `-lineinfo`.
    pub file: String,
    /// Line in it, or in the PTX where there is no source line.
    pub line: u32,
    /// Where the code was inlined into, where it was.
    pub inlined_at: Option<(String, u32)>,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// What happened, with the address's owner.
    pub what: String,
    pub address: Option<u64>,
}

fn base(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let p = |v: &[u32; 3]| format!("({}, {}, {})", v[0], v[1], v[2]);
        write!(f, "kernel `{}`, ", self.kernel)?;
        if self.file.is_empty() {
            write!(f, "PTX line {}", self.line)?;
        } else {
            write!(f, "{}:{}", base(&self.file), self.line)?;
        }
        if let Some((file, line)) = &self.inlined_at {
            write!(f, " (called at {}:{line})", base(file))?;
        }
        write!(
            f,
            ", block {}, thread {}: {}",
            p(&self.block),
            p(&self.thread),
            self.what
        )
    }
}

impl std::error::Error for Fault {}

impl From<Box<Fault>> for Error {
    fn from(f: Box<Fault>) -> Error {
        Error::run(f.to_string())
    }
}
