//! What belongs to the context: memory, streams with what is queued on them, and the simulator that does it.

use super::{R, refused};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::thread::ThreadId;
use std::time::Instant;
use tilewright::backend::cuda::Simulated;
use tilewright::backend::cuda::driver::{Driver, KernelId, ModuleId, Placed, Step};
use tilewright::backend::cuda::sim::{Entry, Module};

pub type Done = Result<(), R>;

/// One thing on a stream.
#[derive(Clone)]
pub enum Work {
    Kernel(Placed),
    Set(u64, u32, usize),
    /// From pageable memory: staged at the call.
    CopyStaged(u64, Vec<u8>),
    /// From page-locked memory: read when the copy is made.
    CopyPinned(u64, usize, usize),
    CopyOut(u64, usize, usize),
    CopyWithin(u64, u64, usize),
    /// Event, and which of its records.
    Record(usize, u64),
    Wait(usize, u64),
}

pub struct Capture {
    pub thread: ThreadId,
    pub works: Vec<Work>,
    pub broken: bool,
}

#[derive(Default)]
pub struct Stream {
    pub queue: VecDeque<Work>,
    pub capture: Option<Capture>,
}

pub struct Event {
    pub timing: bool,
    /// How often it was recorded, and which of these was reached last, and when.
    pub recorded: u64,
    pub reached: u64,
    pub at: Option<Instant>,
}

pub struct Function {
    pub module: usize,
    pub kernel: KernelId,
    pub entry: Entry,
    pub dynamic: u32,
}

/// What belongs to the context.
pub struct Machine {
    pub simulator: Simulated,
    pub total: u64,
    pub next: usize,
    pub modules: HashMap<usize, (ModuleId, Module)>,
    pub functions: HashMap<usize, Function>,
    pub streams: HashMap<usize, Stream>,
    pub events: HashMap<usize, Event>,
    pub graphs: HashMap<usize, Vec<Work>>,
    pub execs: HashMap<usize, Vec<Work>>,
    pub allocations: BTreeMap<u64, u64>,
    pub pinned: BTreeMap<usize, usize>,
    /// Where streams get ahead by themselves, the state of the generator that says which.
    pub chance: Option<u64>,
    /// After a kernel failed everything does.
    pub broken: bool,
}

pub fn known<'a, T>(
    map: &'a mut HashMap<usize, T>,
    handle: usize,
    what: &str,
) -> Result<&'a mut T, R> {
    match map.get_mut(&handle) {
        Some(found) => Ok(found),
        None => refused(
            R::CUDA_ERROR_INVALID_HANDLE,
            format!("{handle:#x} is no {what}"),
        ),
    }
}

/// Takes out what a handle stands for: it is destroyed once.
pub fn take<T>(map: &mut HashMap<usize, T>, handle: usize, what: &str) -> Result<T, R> {
    known(map, handle, what)?;
    Ok(map.remove(&handle).expect("known"))
}

impl Machine {
    pub fn new() -> Machine {
        let number = |name| {
            let text = std::env::var(name).ok()?;
            Some(
                text.parse()
                    .unwrap_or_else(|_| panic!("{name} is no number: {text}")),
            )
        };
        Machine {
            simulator: Simulated::default(),
            total: number("DRIVER_MODEL_MEMORY").unwrap_or(4 << 30),
            next: 0x1000,
            modules: HashMap::new(),
            functions: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            graphs: HashMap::new(),
            execs: HashMap::new(),
            allocations: BTreeMap::new(),
            pinned: BTreeMap::new(),
            chance: number("DRIVER_MODEL_SEED"),
            broken: false,
        }
    }

    pub fn handle(&mut self) -> usize {
        self.next += 0x10;
        self.next
    }

    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.allocations.values().sum())
    }

    /// The stretch lies within one allocation.
    pub fn owned(&self, address: u64, bytes: u64) -> Done {
        let below = self.allocations.range(..=address).next_back();
        match below {
            Some((start, size)) if address + bytes <= start + size => Ok(()),
            _ => refused(
                R::CUDA_ERROR_INVALID_VALUE,
                format!("{bytes} bytes at {address:#x} are not within one allocation"),
            ),
        }
    }

    pub fn enqueue(&mut self, stream: usize, work: Work) -> Done {
        self.advance()?;
        let stream = known(&mut self.streams, stream, "stream")?;
        match &mut stream.capture {
            Some(capture) => capture.works.push(work),
            None => stream.queue.push_back(work),
        }
        Ok(())
    }

    pub fn perform(&mut self, work: Work) -> tilewright::Result<()> {
        match work {
            Work::Kernel(p) => self.simulator.step(&Step::Launch(p)),
            Work::Set(address, word, n) => self.simulator.fill(address, word, n),
            Work::CopyStaged(to, bytes) => self.simulator.upload(to, &bytes),
            Work::CopyPinned(to, from, bytes) => {
                // SAFETY: page-locked memory cannot be freed while a copy from it is queued.
                let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
                self.simulator.upload(to, bytes)
            }
            Work::CopyOut(from, to, bytes) => {
                // SAFETY: the caller of the copy keeps the memory until it has waited.
                let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
                self.simulator.download(from, bytes)
            }
            Work::CopyWithin(to, from, bytes) => {
                let mut all = vec![0; bytes];
                self.simulator.download(from, &mut all)?;
                self.simulator.upload(to, &all)
            }
            Work::Record(event, which) => {
                if let Some(e) = self.events.get_mut(&event) {
                    (e.reached, e.at) = (which, Some(Instant::now()));
                }
                Ok(())
            }
            Work::Wait(event, which) => self
                .reach(event, which)
                .map_err(|e| tilewright::Error::run(format!("{e:?}"))),
        }
    }

    /// Does what is queued on one stream.
    pub fn drain(&mut self, stream: usize) -> Done {
        let s = known(&mut self.streams, stream, "stream")?;
        if let Some(capture) = &mut s.capture {
            capture.broken = true;
            return refused(
                R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                "waiting for a stream that is captured",
            );
        }
        while self.next_of(stream)? {}
        Ok(())
    }

    /// Streams get ahead by chance, if they may: what they must wait for is all that orders them.
    fn advance(&mut self) -> Done {
        let Some(state) = &mut self.chance else {
            return Ok(());
        };
        // Xorshift.
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        let (which, steps) = ((*state >> 8) as usize, *state % 4);
        let mut streams: Vec<usize> = self.streams.keys().copied().collect();
        streams.sort_unstable();
        for _ in 0..steps {
            self.next_of(streams[which % streams.len()])?;
        }
        Ok(())
    }

    /// Does what comes next on a stream; false where nothing does.
    pub fn next_of(&mut self, stream: usize) -> Result<bool, R> {
        let Some(work) = known(&mut self.streams, stream, "stream")?
            .queue
            .pop_front()
        else {
            return Ok(false);
        };
        match self.perform(work) {
            Ok(()) => Ok(true),
            Err(e) => {
                self.broken = true;
                refused(R::CUDA_ERROR_LAUNCH_FAILED, e)
            }
        }
    }

    /// Works on whichever stream has record number `which` of an event until it is reached.
    pub fn reach(&mut self, event: usize, which: u64) -> Done {
        let recorded = |w: &Work| matches!(w, Work::Record(e, n) if *e == event && *n == which);
        while self.events.get(&event).is_some_and(|e| e.reached < which) {
            let found = self
                .streams
                .iter()
                .find(|(_, s)| s.queue.iter().any(recorded));
            let Some(stream) = found.map(|(&handle, _)| handle) else {
                return refused(
                    R::CUDA_ERROR_UNKNOWN,
                    "an event is waited for that no stream will reach",
                );
            };
            self.next_of(stream)?;
        }
        Ok(())
    }

    pub fn drain_all(&mut self) -> Done {
        let streams: Vec<usize> = self.streams.keys().copied().collect();
        streams.into_iter().try_for_each(|s| self.drain(s))
    }

    /// What was not given back.
    pub fn report(&self) {
        let left = [
            (self.modules.len(), "modules"),
            (self.streams.len(), "streams"),
            (self.events.len(), "events"),
            (self.graphs.len(), "graphs"),
            (self.execs.len(), "executable graphs"),
            (self.allocations.len(), "allocations"),
            (self.pinned.len(), "page-locked buffers"),
        ];
        for (n, what) in left.into_iter().filter(|l| l.0 > 0) {
            eprintln!("driver model: the context was released with {n} {what} alive");
        }
    }
}
