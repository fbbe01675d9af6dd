//! What an op asks of the GPU, as data: launches over its inputs, its outputs and planned workspace.
//!
//! An op records [`Launch`]es in a [`WgpuCx`] while a plan is made. The planner places tensors and workspace in
//! arenas and turns every [`Arg`] into a [`Place`](super::program::Place); a program then runs the list again and
//! again without looking at shapes.

use super::device::AdapterTraits;
use crate::graph::Spec;
use crate::{Error, Result};

/// Most storage buffers one launch may bind (WebGPU's default limit).
pub const MAX_STORAGE: usize = 8;
/// Most workgroups in one dimension (WebGPU's default limit).
pub const MAX_GROUPS: u32 = 65_535;
/// Floats per 256 bytes: every binding starts at a multiple of this.
pub const ALIGN: usize = 64;

/// Workspace of one node, by order of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkId(pub usize);

/// Which buffer a binding shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The node's i-th input.
    In(usize),
    /// The node's i-th output.
    Out(usize),
    /// Workspace asked for with [`WgpuCx::workspace`].
    Work(WorkId),
}

/// One storage binding of a launch: a whole tensor, or the part of it that one launch of several works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arg {
    /// The buffer.
    pub slot: Slot,
    /// First element and number of elements; the start is a multiple of [`ALIGN`]. `None` is all of it.
    pub part: Option<(usize, usize)>,
}

#[allow(non_snake_case)] // read like variants: Arg::In(0), Arg::Out(0), Arg::Work(id)
impl Arg {
    /// The node's i-th input.
    pub fn In(i: usize) -> Arg {
        Arg {
            slot: Slot::In(i),
            part: None,
        }
    }

    /// The node's i-th output.
    pub fn Out(i: usize) -> Arg {
        Arg {
            slot: Slot::Out(i),
            part: None,
        }
    }

    /// Workspace.
    pub fn Work(id: WorkId) -> Arg {
        Arg {
            slot: Slot::Work(id),
            part: None,
        }
    }

    /// The elements `start .. start + len` only.
    pub fn part(self, start: usize, len: usize) -> Arg {
        Arg {
            slot: self.slot,
            part: Some((start, len)),
        }
    }
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// File name in `shaders/`.
    pub shader: &'static str,
    /// Entry point.
    pub entry: &'static str,
    /// Put before the source as `const NAME = value;`; part of the pipeline's key, so keep the number of different
    /// values small.
    pub consts: Vec<(&'static str, String)>,
    /// Storage buffers in binding order, from `@binding(1)`.
    pub args: Vec<Arg>,
    /// The uniform block at `@binding(0)`, f32 as bits.
    pub params: Vec<u32>,
    /// Workgroups.
    pub groups: [u32; 3],
}

/// What an op sees while it describes its launches.
#[derive(Debug)]
pub struct WgpuCx<'a> {
    /// The adapter the plan is for.
    pub traits: &'a AdapterTraits,
    /// Operand specs.
    pub x: &'a [Spec],
    /// Result specs.
    pub y: &'a [Spec],
    /// The variant that was asked for; `None` leaves it to the op's rule.
    pub variant: Option<&'a str>,
    /// Launches recorded so far.
    pub launches: Vec<Launch>,
    /// Elements of each workspace asked for so far.
    pub work: Vec<usize>,
}

impl<'a> WgpuCx<'a> {
    /// An empty recording for one node.
    pub fn new(
        traits: &'a AdapterTraits,
        x: &'a [Spec],
        y: &'a [Spec],
        variant: Option<&'a str>,
    ) -> Self {
        WgpuCx {
            traits,
            x,
            y,
            variant,
            launches: Vec::new(),
            work: Vec::new(),
        }
    }

    /// Workspace of `floats` elements (at least one) that lives for this node alone.
    pub fn workspace(&mut self, floats: usize) -> WorkId {
        self.work.push(floats.max(1));
        WorkId(self.work.len() - 1)
    }

    /// Records one launch; a launch without workgroups is dropped.
    ///
    /// # Errors
    /// [`Error::Run`] where the launch breaks a limit: a bug in the op, caught when the plan is made.
    pub fn launch(&mut self, launch: Launch) -> Result<()> {
        let Launch {
            shader,
            entry,
            ref args,
            groups,
            ..
        } = launch;
        if groups.contains(&0) {
            return Ok(());
        }
        if args.len() > MAX_STORAGE {
            return Err(Error::run(format!(
                "{shader}/{entry} binds {} buffers, at most {MAX_STORAGE}",
                args.len()
            )));
        }
        if groups.iter().any(|&g| g > MAX_GROUPS) {
            return Err(Error::run(format!(
                "{shader}/{entry} wants {groups:?} workgroups, at most {MAX_GROUPS} each"
            )));
        }
        for arg in args {
            let len = self.slot_len(arg.slot)?;
            let (start, n) = arg.part.unwrap_or((0, len));
            if start % ALIGN != 0 || start + n > len {
                return Err(Error::run(format!(
                    "{shader}/{entry}: part {start}+{n} of {len} elements is out of place"
                )));
            }
            if n * 4 > self.traits.max_binding {
                return Err(Error::run(format!(
                    "{shader}/{entry}: a binding of {} bytes is over this adapter's {}",
                    n * 4,
                    self.traits.max_binding
                )));
            }
        }
        self.launches.push(launch);
        Ok(())
    }

    /// [`chunks`](Self::chunks) as [`Cut`]s.
    ///
    /// # Errors
    /// As `chunks`.
    pub fn cuts(&self, rows: usize, widths: &[usize]) -> Result<Vec<Cut>> {
        let chunks = self.chunks(rows, widths)?;
        let whole = chunks.len() == 1;
        Ok(chunks
            .into_iter()
            .map(|(first, rows)| Cut { first, rows, whole })
            .collect())
    }

    /// Records one launch of 64 invocations a group over `n` items; the parameters are `n`, the groups in x, `params`.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn items(
        &mut self,
        (shader, entry): (&'static str, &'static str),
        consts: &[(&'static str, String)],
        n: usize,
        args: &[Arg],
        params: &[u32],
    ) -> Result<()> {
        let groups = fold(n, 64);
        let mut all = vec![n as u32, groups[0]];
        all.extend_from_slice(params);
        self.launch(Launch {
            shader,
            entry,
            consts: consts.to_vec(),
            args: args.to_vec(),
            params: all,
            groups,
        })
    }

    /// `y[i] = sum over parts of x[part, i]`, in order; `x` has `stride` elements a part.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn sum_parts(
        &mut self,
        x: Arg,
        y: Arg,
        parts: usize,
        stride: usize,
        n: usize,
    ) -> Result<()> {
        self.sum_padded(x, y, parts, stride, n, (n, n))
    }

    /// [`sum_parts`](Self::sum_parts) where rows of `x` are padded from `inner.0` to `inner.1` elements.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn sum_padded(
        &mut self,
        x: Arg,
        y: Arg,
        parts: usize,
        stride: usize,
        n: usize,
        inner: (usize, usize),
    ) -> Result<()> {
        let params = [parts, stride, inner.0, inner.1, 0, 0].map(|v| v as u32);
        self.items(("reduce.wgsl", "sum_parts"), &[], n, &[x, y], &params)
    }

    /// Records a map over tensors of `n` elements each: one invocation per four elements (one where `n` is odd). The
    /// entry's parameters begin with the number of items and the groups in x; `params` follow.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn map(
        &mut self,
        shader: &'static str,
        entry: &'static str,
        n: usize,
        args: &[Arg],
        params: &[u32],
    ) -> Result<()> {
        let width = if n.is_multiple_of(4) { 4 } else { 1 };
        let most = self.max_elements();
        for start in (0..n).step_by(most) {
            let len = most.min(n - start);
            let groups = fold(len / width, 64);
            let mut all = vec![(len / width) as u32, groups[0]];
            all.extend_from_slice(params);
            self.launch(Launch {
                shader,
                entry,
                consts: item_types(width),
                args: args.iter().map(|a| a.part(start, len)).collect(),
                params: all,
                groups,
            })?;
        }
        Ok(())
    }

    fn slot_len(&self, slot: Slot) -> Result<usize> {
        let len = match slot {
            Slot::In(i) => self.x.get(i).map(Spec::len),
            Slot::Out(i) => self.y.get(i).map(Spec::len),
            Slot::Work(WorkId(i)) => self.work.get(i).copied(),
        };
        len.ok_or_else(|| {
            Error::run(format!(
                "a launch names {slot:?}, which the node does not have"
            ))
        })
    }

    /// Most elements one binding may show.
    pub fn max_elements(&self) -> usize {
        self.traits.max_binding / 4 / ALIGN * ALIGN
    }

    /// Cuts `rows` rows into chunks for several launches, so that no binding shows more than the adapter allows.
    /// `widths` are the elements per row of every tensor cut along the rows; each chunk starts at a place that is
    /// aligned in all of them. Returns (first row, rows) pairs.
    ///
    /// # Errors
    /// [`Error::Input`] where even the smallest aligned chunk is too large.
    pub fn chunks(&self, rows: usize, widths: &[usize]) -> Result<Vec<(usize, usize)>> {
        let widest = widths.iter().copied().max().unwrap_or(1).max(1);
        let step = widths
            .iter()
            .map(|&w| ALIGN / gcd(w.max(1), ALIGN))
            .max()
            .unwrap_or(1);
        let fit = self.max_elements() / widest;
        if rows <= fit {
            return Ok(vec![(0, rows)]);
        }
        let most = fit / step * step;
        if most == 0 {
            return Err(Error::input(format!(
                "{step} rows of {widest} elements do not fit in one binding of {} bytes on this adapter: use a smaller image",
                self.traits.max_binding
            )));
        }
        Ok((0..rows)
            .step_by(most)
            .map(|r| (r, most.min(rows - r)))
            .collect())
    }
}

/// A run of rows that one launch of several works on; see [`WgpuCx::cuts`].
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// First row.
    pub first: usize,
    /// Rows.
    pub rows: usize,
    whole: bool,
}

impl Cut {
    /// This run's part of a tensor with `width` elements a row.
    pub fn of(&self, arg: Arg, width: usize) -> Arg {
        if self.whole {
            arg
        } else {
            arg.part(self.first * width, self.rows * width)
        }
    }
}

/// Interleaved partial sums down columns of `items` each: enough invocations to fill a GPU, few enough for a CPU to
/// add the parts.
pub fn column_parts(rows: usize, items: usize) -> usize {
    (4096 / items).clamp(1, rows.min(256))
}

/// The constants of a shader that is generic over items of 1 or 4 floats.
pub fn item_types(width: usize) -> Vec<(&'static str, String)> {
    if width == 4 {
        return vec![];
    }
    vec![
        ("T", "f32".into()),
        ("I", "i32".into()),
        ("U", "u32".into()),
    ]
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Workgroups for `n` items of `per_group` each, folded into y where x alone is too small. The kernel reads its
/// linear group as `wg.x + wg.y * groups.x`.
pub fn fold(n: usize, per_group: usize) -> [u32; 3] {
    let groups = n.div_ceil(per_group);
    if groups <= MAX_GROUPS as usize {
        return [groups as u32, 1, 1];
    }
    let y = groups.div_ceil(MAX_GROUPS as usize);
    [groups.div_ceil(y) as u32, y as u32, 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_aligned_and_whole() {
        let traits = AdapterTraits {
            max_binding: 1 << 20,
            ..AdapterTraits::default()
        };
        let cx = WgpuCx::new(&traits, &[], &[], None);
        let parts = cx.chunks(1000, &[3001, 96]).unwrap();
        assert_eq!(parts.iter().map(|p| p.1).sum::<usize>(), 1000);
        let mut next = 0;
        for (start, n) in parts {
            assert_eq!(start, next);
            assert_eq!(start * 3001 % ALIGN, 0);
            assert_eq!(start * 96 % ALIGN, 0);
            assert!(n * 3001 * 4 <= 1 << 20);
            next += n;
        }
        assert!(cx.chunks(2, &[1 << 20]).is_err());
    }

    #[test]
    fn groups_fold_into_y() {
        assert_eq!(fold(1000, 64), [16, 1, 1]);
        let g = fold(100_000_000, 64);
        assert!(g[0] <= MAX_GROUPS && g[0] as usize * g[1] as usize * 64 >= 100_000_000);
    }
}
