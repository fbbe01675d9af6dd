//! Scratch memory that each thread keeps between calls, so that a steady-state step allocates nothing.

use std::cell::RefCell;

thread_local! {
    static FLOATS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    static INDICES: RefCell<Vec<Vec<usize>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` with `len` floats of unspecified value, taken from this thread's store.
///
/// Calls may be nested, also by a stolen task: the buffer in use is out of the store.
pub(crate) fn with_floats<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = FLOATS.with_borrow_mut(|store| take(store, len));
    if buffer.len() < len {
        // Exactly: twice what is asked for is much for the largest.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    FLOATS.with_borrow_mut(|store| store.push(buffer));
    result
}

/// As [`with_floats`], with `len` indices.
pub(crate) fn with_indices<R>(len: usize, f: impl FnOnce(&mut [usize]) -> R) -> R {
    let mut buffer = INDICES.with_borrow_mut(|store| take(store, len));
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let result = f(&mut buffer[..len]);
    INDICES.with_borrow_mut(|store| store.push(buffer));
    result
}

/// The smallest stored buffer of at least `len`, else the largest, else an empty one.
fn take<T>(store: &mut Vec<Vec<T>>, len: usize) -> Vec<T> {
    let fit = (0..store.len())
        .filter(|&i| store[i].len() >= len)
        .min_by_key(|&i| store[i].len());
    match fit.or_else(|| (0..store.len()).max_by_key(|&i| store[i].len())) {
        Some(i) => store.swap_remove(i),
        None => Vec::new(),
    }
}
