//! Shards read ahead of the batches: long pieces, shard by shard, through a shuffle buffer.
//!
//! What an epoch gives out is drawn before it is read, from (seed, epoch) alone: the shards in a random order, [`OPEN`] of
//! them side by side, piece by piece, through a buffer of [`BUFFER`] images, each new one taking the place of a random one
//! that leaves it. So an epoch can begin at any step, and the number of readers changes nothing. What was read and not
//! yet taken is at most the buffer and a few pieces.

use super::{Entry, Shards};
use crate::data::random::{Use, shuffle, stream};
use crate::data::split::{Pixels, Source, Split};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Shards that are read side by side.
const OPEN: usize = 8;
/// Images in the shuffle buffer, and their bytes.
const BUFFER: usize = 8192;
const BUFFER_BYTES: u64 = 256 << 20;
/// Bytes that are read at once, and what lies between two images that are still read at once.
const PIECE: u64 = 1 << 20;
const GAP: u64 = 64 << 10;
/// Threads that read, and pieces that each may be ahead.
const READERS: usize = 4;

/// Positions of a view that one read brings.
type Piece = Range<u32>;

/// What is read at once, of the entries in view order.
fn pieces(shards: &Shards, indices: &[u32]) -> Vec<Piece> {
    let entry = |position: u32| shards.entries[indices[position as usize] as usize];
    let end = |e: Entry| e.at + u64::from(e.len);
    let mut all = vec![];
    let mut from = 0;
    for next in 1..=indices.len() as u32 {
        let together = (next < indices.len() as u32) && {
            let (first, last, new) = (entry(from), entry(next - 1), entry(next));
            new.shard == first.shard
                && new.at >= end(last)
                && new.at - end(last) <= GAP
                && end(new) - first.at <= PIECE
        };
        if !together {
            all.push(from..next);
            from = next;
        }
    }
    all
}

/// An epoch: what is read, in which order, and what is given out.
pub(crate) struct Plan {
    /// Positions of the view as they are given out.
    pub order: Arc<Vec<u32>>,
    /// In reading order.
    pieces: Vec<Piece>,
    /// Pieces that must have been read before a step is complete.
    need: Vec<u32>,
}

impl Plan {
    /// The plan for steps of `batch` images. Without `shuffled` (seed and epoch) it is the view's own order.
    fn new(
        shards: &Shards,
        indices: &[u32],
        pieces: &[Piece],
        batch: usize,
        shuffled: Option<(u64, u32)>,
    ) -> Plan {
        let n = indices.len();
        let shard = |p: &Piece| shards.entries[indices[p.start as usize] as usize].shard;
        let mut order: Vec<u32> = (0..n as u32).collect();
        let mut pieces = pieces.to_vec();
        if let Some((seed, epoch)) = shuffled {
            let mut random = stream(seed, Use::Shards, epoch, 1);
            let bytes: u64 = indices
                .iter()
                .map(|&i| u64::from(shards.entries[i as usize].len))
                .sum();
            let mean = (bytes / n.max(1) as u64).max(1);
            let size = BUFFER.min((BUFFER_BYTES / mean).max(1) as usize);
            let mut queue: Vec<Range<usize>> = vec![];
            for at in 0..pieces.len() {
                match queue.last_mut() {
                    Some(last) if shard(&pieces[last.start]) == shard(&pieces[at]) => last.end += 1,
                    _ => queue.push(at..at + 1),
                }
            }
            let mut ids: Vec<u32> = (0..queue.len() as u32).collect();
            shuffle(&mut ids, &mut random);
            let mut waiting = ids.into_iter().map(|i| queue[i as usize].clone());
            let mut open: Vec<Range<usize>> = waiting.by_ref().take(OPEN).collect();
            let mut read = Vec::with_capacity(pieces.len());
            while !open.is_empty() {
                let mut i = 0;
                while i < open.len() {
                    match open[i].next() {
                        Some(piece) => {
                            read.push(pieces[piece].clone());
                            i += 1;
                        }
                        None => match waiting.next() {
                            Some(other) => open[i] = other,
                            None => _ = open.remove(i),
                        },
                    }
                }
            }
            pieces = read;
            order.clear();
            let mut buffer: Vec<u32> = Vec::with_capacity(size);
            for position in pieces.iter().flat_map(Clone::clone) {
                if buffer.len() < size {
                    buffer.push(position);
                    continue;
                }
                let slot = random.below(size as u32) as usize;
                order.push(std::mem::replace(&mut buffer[slot], position));
            }
            shuffle(&mut buffer, &mut random);
            order.extend(buffer);
        }
        let mut rank = vec![0; n];
        for (i, piece) in (1..).zip(&pieces) {
            rank[piece.start as usize..piece.end as usize].fill(i);
        }
        let mut most = 0;
        let need = order
            .chunks(batch)
            .map(|step| {
                most = step.iter().map(|&p| rank[p as usize]).fold(most, u32::max);
                most
            })
            .collect();
        Plan {
            order: Arc::new(order),
            pieces,
            need,
        }
    }
}

/// An epoch that is being read.
struct Epoch {
    plan: Arc<Plan>,
    /// Positions that are wanted, where not all are: the epoch was begun in its middle.
    wanted: Option<Vec<bool>>,
    /// The next piece to read, and the one that must wait.
    next: usize,
    until: usize,
    /// Pieces that are being read.
    reading: usize,
    ready: HashMap<u32, Result<Vec<u8>>>,
}

#[derive(Default)]
struct State {
    epochs: BTreeMap<u32, Epoch>,
    generation: u64,
    stop: bool,
}

struct Shared {
    source: Arc<Source>,
    indices: Arc<Vec<u32>>,
    pieces: Vec<Piece>,
    batch: usize,
    /// The seed, where epochs are shuffled.
    seed: Option<u64>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Reads a view of shards ahead of the batches, with threads of its own; dropping it ends them.
pub(crate) struct Stream {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

/// A batch under way: images may be taken for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    epoch: u32,
    generation: u64,
}

impl Stream {
    /// Of the images of `split`, in steps of `batch`; `None` where they are not in shards. With a seed every epoch is
    /// shuffled.
    ///
    /// # Errors
    /// [`Error::Run`] where no thread can be started.
    pub(crate) fn new(split: &Split, batch: usize, seed: Option<u64>) -> Result<Option<Stream>> {
        let Pixels::Shards(shards) = &split.source.pixels else {
            return Ok(None);
        };
        let shared = Arc::new(Shared {
            pieces: pieces(shards, &split.indices),
            source: split.source.clone(),
            indices: split.indices.clone(),
            batch,
            seed,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut it = Stream {
            shared,
            readers: vec![],
        };
        for i in 0..READERS {
            let shared = it.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("shards-{i}"))
                .spawn(move || shared.work())
                .map_err(|e| Error::run(format!("cannot start a reader thread: {e}")))?;
            it.readers.push(thread);
        }
        Ok(Some(it))
    }

    /// Begins a batch: its images, and those of the batches that follow it soon, are read. Batches are begun in order;
    /// epochs before `oldest` are over.
    pub(crate) fn begin(&self, epoch: u32, step: usize, oldest: u32) -> (Lease, Arc<Vec<u32>>) {
        let mut state = self.shared.lock();
        state.epochs = state.epochs.split_off(&oldest);
        let state = &mut *state;
        let at = state
            .epochs
            .entry(epoch)
            .or_insert_with(|| self.shared.epoch(epoch, step));
        let need = at.plan.need.get(step).map_or(0, |n| *n as usize);
        at.until = at.until.max(need + READERS).min(at.plan.pieces.len());
        self.shared.changed.notify_all();
        let lease = Lease {
            epoch,
            generation: state.generation,
        };
        (lease, at.plan.order.clone())
    }

    /// The bytes of the image at `position` of the view, once; `None` where the batch is not wanted any more.
    pub(crate) fn take(&self, lease: Lease, position: u32) -> Option<Result<Vec<u8>>> {
        let mut state = self.shared.lock();
        loop {
            if state.generation != lease.generation || state.stop {
                return None;
            }
            let at = state.epochs.get_mut(&lease.epoch)?;
            if let Some(bytes) = at.ready.remove(&position) {
                return Some(bytes);
            }
            if at.next >= at.until && at.reading == 0 {
                return Some(Err(Error::run(format!(
                    "image {position} of the view was not read for its batch; this is a defect, please report it"
                ))));
            }
            state = self.shared.wait(state);
        }
    }

    /// Forgets what was read: the next batch may be any.
    pub(crate) fn reset(&self) {
        let mut state = self.shared.lock();
        state.generation += 1;
        state.epochs.clear();
        self.shared.changed.notify_all();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        for thread in self.readers.drain(..) {
            // A thread that panicked has said so; there is nothing left to do for it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|e| e.into_inner())
    }

    fn shards(&self) -> Option<&Shards> {
        match &self.source.pixels {
            Pixels::Shards(shards) => Some(shards),
            _ => None,
        }
    }

    fn epoch(&self, epoch: u32, step: usize) -> Epoch {
        let empty = Shards {
            files: vec![],
            entries: vec![],
        };
        let plan = Plan::new(
            self.shards().unwrap_or(&empty),
            &self.indices,
            &self.pieces,
            self.batch,
            self.seed.map(|s| (s, epoch)),
        );
        let wanted = (step > 0).then(|| {
            let mut wanted = vec![false; plan.order.len()];
            let left = plan.order.iter().skip(step * self.batch);
            left.for_each(|&p| wanted[p as usize] = true);
            wanted
        });
        Epoch {
            plan: Arc::new(plan),
            wanted,
            next: 0,
            until: 0,
            reading: 0,
            ready: HashMap::new(),
        }
    }

    /// A thread: claim the next piece that is wanted, read it, put it down, until told to stop.
    fn work(&self) {
        let Some(shards) = self.shards() else { return };
        let mut state = self.lock();
        while !state.stop {
            let due = state.epochs.iter_mut().find(|(_, e)| e.next < e.until);
            let Some((&epoch, at)) = due else {
                state = self.wait(state);
                continue;
            };
            let piece = at.plan.pieces[at.next].clone();
            let wanted = |p: &u32| at.wanted.as_ref().is_none_or(|w| w[*p as usize]);
            let positions: Vec<u32> = piece.filter(wanted).collect();
            at.next += 1;
            at.reading += 1;
            let generation = state.generation;
            drop(state);
            let read = self.read(shards, &positions);
            state = self.lock();
            if state.generation == generation
                && let Some(at) = state.epochs.get_mut(&epoch)
            {
                at.reading -= 1;
                at.ready.extend(positions.into_iter().zip(read));
            }
            self.changed.notify_all();
        }
    }

    /// The images at `positions` of one piece: at once, and one by one where that fails.
    fn read(&self, shards: &Shards, positions: &[u32]) -> Vec<Result<Vec<u8>>> {
        let entry = |p: &u32| shards.entries[self.indices[*p as usize] as usize];
        let (Some(first), Some(last)) = (positions.first().map(entry), positions.last().map(entry))
        else {
            return vec![];
        };
        let end = last.at + u64::from(last.len);
        let bytes = shards.piece(first.shard, first.at, end);
        let one = |p: &u32| match &bytes {
            Ok(bytes) => {
                let e = entry(p);
                let at = (e.at - first.at) as usize;
                Ok(bytes[at..at + e.len as usize].to_vec())
            }
            Err(_) => shards.read(self.indices[*p as usize]),
        };
        positions.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 20 shards of 300 images of 5,000 bytes, with a header between each.
    fn shards() -> Shards {
        let entry = |i: u32| Entry {
            at: u64::from(i % 300) * 5632 + 512,
            len: 5000,
            shard: i / 300,
        };
        Shards {
            files: vec![],
            entries: (0..6000).map(entry).collect(),
        }
    }

    #[test]
    fn an_epoch_gives_every_image_once_in_another_order_from_long_pieces() {
        let s = shards();
        let indices: Vec<u32> = (0..6000).collect();
        let pieces = pieces(&s, &indices);
        assert_eq!(pieces.len(), 20 * 2, "a piece is up to a megabyte");
        let plan = |epoch| Plan::new(&s, &indices, &pieces, 64, Some((5, epoch)));
        let (a, again, b) = (plan(0), plan(0), plan(1));
        assert_eq!(a.order, again.order);
        assert_ne!(a.order, b.order);
        for p in [&a, &b] {
            let mut sorted = p.order.to_vec();
            sorted.sort();
            assert_eq!(sorted, indices);
            assert_eq!(p.need.last(), Some(&(pieces.len() as u32)));
        }
        // No more than eight shards at once.
        let of = |p: &Piece| p.start / 300;
        for window in a.pieces.chunks(OPEN) {
            let mut open: Vec<u32> = window.iter().map(of).collect();
            open.dedup();
            assert_eq!(open.len(), OPEN.min(window.len()));
        }
        let plain = Plan::new(&s, &indices, &pieces, 64, None);
        assert_eq!((&plain.order[..], &plain.pieces), (&indices[..], &pieces));
        assert_eq!(plain.need[0], 1);
    }

    #[test]
    fn a_view_with_holes_is_read_in_pieces_without_them() {
        let s = shards();
        let some: Vec<u32> = (0..6000).step_by(40).collect();
        assert!(pieces(&s, &some).iter().all(|p| p.len() == 1));
        let near: Vec<u32> = (0..600).step_by(3).collect();
        assert_eq!(pieces(&s, &near).len(), 4);
        assert!(pieces(&s, &[]).is_empty());
    }
}
