//! A loaded module: what PTX text becomes, and its variables in memory.

use super::ast::{Space, Var};
use super::decode::{Names, decode};
use super::memory::{Alloc, MODULE_BASE};
use super::parse::parse;
use super::program::{Param, Program};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kernel of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub params: Vec<Param>,
    /// Bytes that all parameters take together.
    pub param_bytes: usize,
    /// Static shared memory in bytes.
    pub static_shared: u32,
    /// Local memory a thread, in bytes.
    pub local: u32,
    /// `__launch_bounds__`.
    pub max_threads: Option<[u32; 3]>,
}

/// A module, ready to launch.
#[derive(Debug)]
pub struct Module {
    program: Program,
    entries: Vec<Entry>,
    globals: Vec<Alloc>,
    base: u64,
}

/// Room between two modules' variables.
const SPAN: u64 = 1 << 32;
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Module {
    /// Parses and decodes PTX text.
    ///
    /// # Errors
    /// Text that is not PTX, or an instruction, modifier or directive that the simulator does not know, with its line.
    pub fn parse(ptx: &str) -> Result<Module> {
        let ast = parse(ptx)?;
        let base = MODULE_BASE + (NEXT.fetch_add(1, Ordering::Relaxed) % (1 << 13)) * SPAN;
        let mut names = Names {
            symbols: HashMap::new(),
            funcs: HashMap::new(),
            shared: 0,
        };
        let mut at = base;
        let mut place: Vec<(u64, &Var)> = Vec::new();
        let mut dynamic = Vec::new();
        for v in &ast.vars {
            let addr = match v.space {
                Space::Shared if v.dynamic => {
                    dynamic.push(v.name.as_str());
                    continue;
                }
                Space::Shared => {
                    let a = u64::from(names.shared).next_multiple_of(v.align);
                    names.shared = (a + v.size) as u32;
                    a
                }
                _ => {
                    // A gap between any two, so that running over one's end is seen.
                    let a = (at + 4096).next_multiple_of(v.align.max(256));
                    at = a + v.size;
                    place.push((a, v));
                    a
                }
            };
            names.symbols.insert(&v.name, addr);
        }
        for (i, f) in ast.funcs.iter().filter(|f| !f.prototype).enumerate() {
            names.funcs.insert(&f.name, i as u32);
        }
        let program = if dynamic.is_empty() {
            decode(&ast, &names)?
        } else {
            // Dynamic shared memory begins after an entry's static part. Decoding twice finds that size first: the
            // largest of all entries serves for all of them.
            for d in &dynamic {
                names.symbols.insert(d, 0);
            }
            let first = decode(&ast, &names)?;
            let size = first
                .funcs
                .iter()
                .map(|f| f.shared)
                .max()
                .unwrap_or(0)
                .next_multiple_of(1024);
            for d in &dynamic {
                names.symbols.insert(d, u64::from(size));
            }
            let mut p = decode(&ast, &names)?;
            for f in &mut p.funcs {
                f.shared = size;
            }
            p
        };
        let mut globals = Vec::new();
        for (addr, v) in place {
            let mut bytes = v.init.clone().unwrap_or_default();
            bytes.resize(v.size as usize, 0);
            for (off, name) in &v.init_addr {
                let Some(s) = names.symbols.get(name.as_str()) else {
                    return Err(Error::input(format!(
                        "PTX: `{}` holds the address of unknown `{name}`",
                        v.name
                    )));
                };
                bytes[*off..*off + 8].copy_from_slice(&s.to_le_bytes());
            }
            globals
                .push(Alloc::new(addr, v.size, &v.name).with_data(&bytes, v.space == Space::Const));
        }
        let entries = program
            .funcs
            .iter()
            .filter(|f| f.entry)
            .map(|f| Entry {
                name: f.name.clone(),
                param_bytes: f.params.last().map_or(0, |p| p.offset + p.size),
                params: f.params.clone(),
                static_shared: f.shared,
                local: f.local,
                max_threads: f.maxntid,
            })
            .collect();
        Ok(Module {
            program,
            entries,
            globals,
            base,
        })
    }

    /// The kernels, in the order of the text.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The kernel called `name`.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    pub(super) fn program(&self) -> &Program {
        &self.program
    }

    /// The module's variable that an address belongs to, or the last one before it.
    pub(super) fn global(&self, addr: u64) -> Option<&Alloc> {
        if addr.wrapping_sub(self.base) >= SPAN {
            return None;
        }
        let i = self.globals.partition_point(|a| a.base <= addr);
        self.globals.get(i.checked_sub(1)?)
    }
}
