//! Launching: blocks over host threads.

use super::counters::{Counters, PcStat};
use super::exec::{Block, Grid, Trouble};
use super::fault::Fault;
use super::memory::Memory;
use super::module::Module;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Choices of a launch.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// Host threads; 0 for as many as rayon has.
    pub threads: usize,
    /// Look for uninitialised reads, races and threads that are missing where all must be. Bounds are always checked.
    pub checks: bool,
    /// Order of blocks (where it matters) and of lanes in atomics; 0 is the order of their numbers.
    pub seed: u64,
    /// Warp instructions that one block may execute before it counts as hanging.
    pub budget: u64,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        LaunchOptions {
            threads: 0,
            checks: true,
            seed: 0,
            budget: 1 << 33,
        }
    }
}

/// A failure before any thread runs.
fn refuse(kernel: &str, what: String) -> Box<Fault> {
    Box::new(Fault {
        kernel: kernel.to_string(),
        file: String::new(),
        line: 0,
        inlined_at: None,
        block: [0; 3],
        thread: [0; 3],
        what,
        address: None,
    })
}

/// Runs kernel `entry` of `module` on a grid of blocks, with `params` laid out as [`Module::entry`] says.
///
/// Blocks run in parallel; a kernel whose atomics return a value, or add floating-point numbers in global memory, runs
/// its blocks one after the other, so that results never depend on the number of host threads.
///
/// # Errors
/// The first error that a thread makes: of the lowest block number that fails.
#[allow(clippy::too_many_arguments)]
pub fn launch(
    module: &Module,
    entry: &str,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_smem: u32,
    params: &[u8],
    mem: &Memory,
    options: &LaunchOptions,
) -> Result<Counters, Box<Fault>> {
    let prog = module.program();
    let Some((func, e)) = prog
        .funcs
        .iter()
        .find(|f| f.entry && f.name == entry)
        .zip(module.entry(entry))
    else {
        return Err(refuse(entry, "the module has no such kernel".into()));
    };
    let size = |d: [u32; 3]| d.iter().map(|&x| u64::from(x)).product::<u64>();
    let (blocks, threads) = (size(grid), size(block));
    if threads == 0 || threads > 1024 || blocks == 0 || grid[1] > 65535 || grid[2] > 65535 {
        return Err(refuse(
            entry,
            format!("a grid of {grid:?} blocks of {block:?} threads is not possible"),
        ));
    }
    if let Some(max) = e.max_threads.map(size)
        && threads > max
    {
        return Err(refuse(
            entry,
            format!("{threads} threads a block, but __launch_bounds__ allows {max}"),
        ));
    }
    if params.len() != e.param_bytes {
        return Err(refuse(
            entry,
            format!(
                "{} bytes of parameters expected, {} given",
                e.param_bytes,
                params.len()
            ),
        ));
    }
    if func.shared + dynamic_smem > 232_448 {
        return Err(refuse(
            entry,
            format!(
                "{} bytes of shared memory: there are 232448",
                func.shared + dynamic_smem
            ),
        ));
    }
    let g = Grid {
        module,
        mem,
        func,
        grid,
        block,
        dynamic: dynamic_smem,
        params,
        checks: options.checks,
        seed: options.seed,
        budget: options.budget,
    };
    let workers = match options.threads {
        _ if func.ordered => 1,
        0 => rayon::current_num_threads(),
        n => n,
    };
    let workers = workers.min(blocks as usize);
    let next = AtomicU64::new(0);
    // The lowest failing block so far: later ones need not run.
    let limit = AtomicU64::new(blocks);
    let found: Mutex<Option<(u64, Box<Fault>)>> = Mutex::new(None);
    let totals: Mutex<Vec<PcStat>> = Mutex::new(vec![PcStat::default(); prog.insts.len()]);
    let work = || {
        let mut b = Block::new(&g);
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= limit.load(Ordering::Relaxed) {
                break;
            }
            let i = if func.ordered {
                permuted(n, blocks, options.seed)
            } else {
                n
            };
            let (x, y) = (u64::from(grid[0]), u64::from(grid[1]));
            let id = [(i % x) as u32, (i / x % y) as u32, (i / x / y) as u32];
            if let Err((wi, t)) = b.run(id) {
                limit.fetch_min(n, Ordering::Relaxed);
                let fault = locate(&b, entry, wi, *t);
                let mut f = found
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                if f.as_ref().is_none_or(|old| n < old.0) {
                    *f = Some((n, fault));
                }
                break;
            }
        }
        let mut t = totals
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (t, s) in t.iter_mut().zip(&b.stats) {
            t.add(s);
        }
    };
    if workers == 1 {
        work();
    } else {
        rayon::scope(|s| {
            for _ in 0..workers {
                s.spawn(|_| work());
            }
        });
    }
    mem.settle();
    if let Some((_, f)) = found
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        return Err(f);
    }
    let totals = totals
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(Counters::from_stats(
        prog,
        &totals,
        blocks,
        blocks * threads,
    ))
}

/// The `n`th block to run: with a seed, a step through the blocks that is prime to their number.
fn permuted(n: u64, blocks: u64, seed: u64) -> u64 {
    if seed == 0 {
        return n;
    }
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut step = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks) | 1;
    while gcd(step, blocks) != 1 {
        step += 2;
    }
    ((u128::from(n) * u128::from(step) + u128::from(seed)) % u128::from(blocks)) as u64
}

/// Adds the place to a failure.
fn locate(b: &Block, entry: &str, wi: usize, t: Trouble) -> Box<Fault> {
    let prog = b.g.module.program();
    let pc = b.fault_pc as usize;
    let loc = prog.locs[pc];
    let file = |n: u32| {
        prog.files
            .iter()
            .find(|f| f.0 == n)
            .map(|f| f.1.clone())
            .unwrap_or_default()
    };
    let lane = t.lane as usize & 31;
    let tid = &b.warps[wi].tid;
    Box::new(Fault {
        kernel: entry.to_string(),
        file: if loc.line == 0 {
            String::new()
        } else {
            file(loc.file)
        },
        line: if loc.line == 0 {
            prog.lines[pc]
        } else {
            loc.line
        },
        inlined_at: (loc.outer.0 != 0).then(|| (file(loc.outer.0), loc.outer.1)),
        block: b.id,
        thread: [tid[0][lane], tid[1][lane], tid[2][lane]],
        what: t.what,
        address: t.address,
    })
}
