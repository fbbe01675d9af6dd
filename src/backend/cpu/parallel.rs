//! Loops over rayon's current pool.

use rayon::prelude::*;

/// Runs `f(0) .. f(n - 1)`, each once, on the threads of rayon's current pool.
pub(crate) fn parallel_for(n: usize, f: impl Fn(usize) + Sync + Send) {
    if n < 2 || rayon::current_num_threads() == 1 {
        (0..n).for_each(f);
    } else {
        (0..n).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// [`parallel_for`], or the same on this thread alone.
pub(crate) fn for_each(parallel: bool, n: usize, f: impl Fn(usize) + Sync + Send) {
    if parallel {
        parallel_for(n, f);
    } else {
        (0..n).for_each(f);
    }
}

/// A pointer that tasks share, each writing elements of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: whoever writes through it answers for the elements being disjoint between threads.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(s: &mut [f32]) -> Self {
        Shared(s.as_mut_ptr())
    }

    pub fn at(p: *mut f32) -> Self {
        Shared(p)
    }

    pub fn get(self) -> *mut f32 {
        self.0
    }
}

/// Part `i` of `0..n` cut into `parts` ranges whose lengths differ by at most one.
pub(crate) fn part(n: usize, parts: usize, i: usize) -> std::ops::Range<usize> {
    i * n / parts..(i + 1) * n / parts
}
