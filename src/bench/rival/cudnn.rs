//! Convolutions by cuDNN: NHWC, the algorithm that its own search finds fastest.
//!
//! These are the functions of cuDNN 7, which cuDNN 9 still has. Forward, dgrad and wgrad have the same parameters up to
//! which tensor stands where, so one piece of code calls all three.

use super::device::{Owned, Sets, Stream, check, int, load, symbol};
use super::task::Task;
use super::{Library, Run};
use crate::backend::cuda::Precision;
use crate::ops::conv2d::{ConvShape, Pass};
use crate::{Error, Result};
use libloading::Library as Loaded;
use std::ffi::{c_char, c_int, c_void};

#[cfg(not(windows))]
const NAMES: &[&str] = &["libcudnn.so.9", "libcudnn.so"];
#[cfg(windows)]
const NAMES: &[&str] = &["cudnn64_9.dll"];
const FOLDERS: &[&str] = &["cudnn"];

/// `CUDNN_TENSOR_NHWC`, `CUDNN_CROSS_CORRELATION`, `CUDNN_DATA_FLOAT`, `CUDNN_DATA_BFLOAT16`.
const NHWC: c_int = 1;
const CROSS_CORRELATION: c_int = 1;
const FLOAT: c_int = 0;
const BFLOAT16: c_int = 9;
/// `CUDNN_DEFAULT_MATH` (which rounds float32 operands to tf32), `CUDNN_TENSOR_OP_MATH`, `CUDNN_FMA_MATH`.
const DEFAULT_MATH: c_int = 0;
const TENSOR_OP_MATH: c_int = 1;
const FMA_MATH: c_int = 3;

/// Element type and kind of arithmetic.
fn types(precision: Precision) -> (c_int, c_int) {
    match precision {
        Precision::F32 => (FLOAT, FMA_MATH),
        Precision::Tf32 => (FLOAT, DEFAULT_MATH),
        Precision::Bf16 => (BFLOAT16, TENSOR_OP_MATH),
    }
}

/// Whether an algorithm does every product of the definition: the others are Winograd's and Fourier's
/// (`cudnnConvolutionFwdAlgo_t`, `...BwdDataAlgo_t`, `...BwdFilterAlgo_t`).
fn direct(pass: Pass, algorithm: c_int) -> bool {
    match pass {
        Pass::Fprop => matches!(algorithm, 0..=3),
        Pass::Dgrad => matches!(algorithm, 0 | 1),
        Pass::Wgrad => matches!(algorithm, 0 | 1 | 3),
    }
}

/// `cudnnConvolutionFwdAlgoPerf_t`, and the two others alike.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    algorithm: c_int,
    status: c_int,
    milliseconds: f32,
    memory: usize,
    determinism: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

/// Results that are asked for: more than there are algorithms.
const RESULTS: usize = 16;

type Handle = *mut c_void;
type Descriptor = *mut c_void;
type Create = unsafe extern "C" fn(*mut Descriptor) -> c_int;
type SetTensor =
    unsafe extern "C" fn(Descriptor, c_int, c_int, c_int, c_int, c_int, c_int) -> c_int;
type SetConvolution = unsafe extern "C" fn(
    Descriptor,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;
type SetNumber = unsafe extern "C" fn(Descriptor, c_int) -> c_int;
type Find = unsafe extern "C" fn(
    Handle,
    Descriptor,
    Descriptor,
    Descriptor,
    Descriptor,
    c_int,
    *mut c_int,
    *mut Found,
) -> c_int;
type Size = unsafe extern "C" fn(
    Handle,
    Descriptor,
    Descriptor,
    Descriptor,
    Descriptor,
    c_int,
    *mut usize,
) -> c_int;
type Convolve = unsafe extern "C" fn(
    Handle,
    *const f32,
    Descriptor,
    u64,
    Descriptor,
    u64,
    Descriptor,
    c_int,
    u64,
    usize,
    *const f32,
    Descriptor,
    u64,
) -> c_int;

/// The functions of one pass.
#[derive(Clone, Copy)]
struct Functions {
    find: Find,
    size: Size,
    convolve: Convolve,
}

impl Functions {
    /// # Errors
    /// The library has not all of them.
    fn of(library: &'static Loaded, pass: Pass) -> Result<Functions> {
        let name = match pass {
            Pass::Fprop => "Forward",
            Pass::Dgrad => "BackwardData",
            Pass::Wgrad => "BackwardFilter",
        };
        // SAFETY: the types are those of cudnn_cnn.h.
        unsafe {
            Ok(Functions {
                find: symbol(library, &format!("cudnnFindConvolution{name}Algorithm"))?,
                size: symbol(library, &format!("cudnnGetConvolution{name}WorkspaceSize"))?,
                convolve: symbol(library, &format!("cudnnConvolution{name}"))?,
            })
        }
    }
}

/// cuDNN with a handle on the backend's stream.
pub struct Cudnn<'a> {
    stream: Stream<'a>,
    library: &'static Loaded,
    handle: Owned,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl<'a> Cudnn<'a> {
    /// Loads the library.
    ///
    /// # Errors
    /// It is not here, or refuses the device.
    pub fn open(stream: Stream<'a>) -> Result<Cudnn<'a>> {
        let library = load("cuDNN", NAMES, FOLDERS, "nvidia-cudnn-cu13")?;
        // The handle is made in the context that is current: the backend's.
        stream.driver.synchronize()?;
        // SAFETY: the types are those of cudnn_graph.h; the handle is made once and destroyed in drop.
        unsafe {
            let create: unsafe extern "C" fn(*mut Handle) -> c_int =
                symbol(library, "cudnnCreate")?;
            let on: unsafe extern "C" fn(Handle, *mut c_void) -> c_int =
                symbol(library, "cudnnSetStream")?;
            let mut cudnn = Cudnn {
                stream,
                library,
                handle: Owned::none(symbol(library, "cudnnDestroy")?),
                text: symbol(library, "cudnnGetErrorString")?,
            };
            let created = create(&mut cudnn.handle.raw);
            cudnn.check(created, "cudnnCreate")?;
            cudnn.check(on(cudnn.handle.raw, stream.raw), "cudnnSetStream")?;
            Ok(cudnn)
        }
    }

    fn check(&self, status: c_int, doing: &str) -> Result<()> {
        check(status, &format!("cuDNN, {doing}"), self.text)
    }

    /// A descriptor of `kind` (`Tensor`, `Filter`, `Convolution`).
    fn descriptor(&self, kind: &str) -> Result<Owned> {
        // SAFETY: the types are those of cudnn_ops.h; destroyed once, in drop.
        unsafe {
            let create: Create = symbol(self.library, &format!("cudnnCreate{kind}Descriptor"))?;
            let destroy = symbol(self.library, &format!("cudnnDestroy{kind}Descriptor"))?;
            let mut owned = Owned::none(destroy);
            self.check(create(&mut owned.raw), &format!("a {kind} descriptor"))?;
            Ok(owned)
        }
    }

    /// Input, weights, result and convolution.
    fn describe(&self, sizes: &Sizes) -> Result<[Owned; 4]> {
        let (data, math) = types(self.stream.precision);
        let all = [
            self.descriptor("Tensor")?,
            self.descriptor("Filter")?,
            self.descriptor("Tensor")?,
            self.descriptor("Convolution")?,
        ];
        let [x, w, y, convolution] = &all;
        // SAFETY: the types are those of cudnn_ops.h and cudnn_cnn.h; the descriptors were created above.
        unsafe {
            let tensor: SetTensor = symbol(self.library, "cudnnSetTensor4dDescriptor")?;
            let filter: SetTensor = symbol(self.library, "cudnnSetFilter4dDescriptor")?;
            for (t, [n, c, height, width]) in [(x, sizes.x), (y, sizes.y)] {
                let set = tensor(t.raw, NHWC, data, n, c, height, width);
                self.check(set, "a tensor's sizes")?;
            }
            let [k, c, height, width] = sizes.w;
            let set = filter(w.raw, data, NHWC, k, c, height, width);
            self.check(set, "the weights' sizes")?;
            let set: SetConvolution = symbol(self.library, "cudnnSetConvolution2dDescriptor")?;
            let ([p, q], [u, v]) = (sizes.pad, sizes.stride);
            let set = set(convolution.raw, p, q, u, v, 1, 1, CROSS_CORRELATION, FLOAT);
            self.check(set, "the convolution's sizes")?;
            let groups: SetNumber = symbol(self.library, "cudnnSetConvolutionGroupCount")?;
            self.check(groups(convolution.raw, sizes.groups), "its groups")?;
            let arithmetic: SetNumber = symbol(self.library, "cudnnSetConvolutionMathType")?;
            self.check(arithmetic(convolution.raw, math), "its arithmetic")?;
        }
        Ok(all)
    }
}

/// Extents in cuDNN's order, N C H W, whatever the order in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    x: [c_int; 4],
    w: [c_int; 4],
    y: [c_int; 4],
    pad: [c_int; 2],
    stride: [c_int; 2],
    groups: c_int,
}

impl Sizes {
    fn of(s: &ConvShape) -> Result<Sizes> {
        Ok(Sizes {
            x: [int(s.n)?, int(s.c)?, int(s.h)?, int(s.w)?],
            w: [int(s.k)?, int(s.cg())?, int(s.r)?, int(s.s)?],
            y: [int(s.n)?, int(s.k)?, int(s.ho)?, int(s.wo)?],
            pad: [int(s.pad[0])?, int(s.pad[1])?],
            stride: [int(s.stride[0])?, int(s.stride[1])?],
            groups: int(s.groups)?,
        })
    }
}

struct Prepared<'a> {
    cudnn: &'a Cudnn<'a>,
    sets: Sets<'a>,
    /// First operand, second, result, convolution.
    descriptors: [Owned; 4],
    convolve: Convolve,
    algorithm: c_int,
    direct: bool,
    workspace: (u64, usize),
}

impl Library for Cudnn<'_> {
    fn name(&self) -> &'static str {
        "cuDNN"
    }

    fn takes(&self, task: &Task) -> bool {
        matches!(task, Task::Convolution(..))
    }

    fn prepare<'a>(
        &'a self,
        task: &Task,
        operands: [&[f32]; 2],
        copies: usize,
    ) -> Result<Box<dyn Run + 'a>> {
        let Task::Convolution(shape, pass) = task else {
            return Err(Error::run("this is no convolution"));
        };
        let functions = Functions::of(self.library, *pass)?;
        let [x, w, y, convolution] = self.describe(&Sizes::of(shape)?)?;
        let [first, second, result] = match pass {
            Pass::Fprop => [x, w, y],
            Pass::Dgrad => [w, y, x],
            Pass::Wgrad => [x, y, w],
        };
        let mut found = [Found::default(); RESULTS];
        let mut n = 0;
        // SAFETY: live descriptors, and room for as many results as are asked for.
        let status = unsafe {
            (functions.find)(
                self.handle.raw,
                first.raw,
                second.raw,
                convolution.raw,
                result.raw,
                RESULTS as c_int,
                &mut n,
                found.as_mut_ptr(),
            )
        };
        self.check(status, "its search for an algorithm")?;
        // The fastest stands first, and what failed has a status.
        let best = found[..(n.max(0) as usize).min(RESULTS)].iter();
        let best = best
            .copied()
            .find(|f| f.status == 0)
            .ok_or_else(|| Error::run("it has no algorithm for this convolution"))?;
        // In float32 the arithmetic stays what was asked for, without tf32.
        if self.stream.precision != Precision::F32 {
            // SAFETY: the type is that of cudnn_cnn.h.
            let status = unsafe {
                let set: SetNumber = symbol(self.library, "cudnnSetConvolutionMathType")?;
                set(convolution.raw, best.math)
            };
            self.check(status, "its arithmetic")?;
        }
        let mut bytes = 0;
        // SAFETY: live descriptors.
        let status = unsafe {
            (functions.size)(
                self.handle.raw,
                first.raw,
                second.raw,
                convolution.raw,
                result.raw,
                best.algorithm,
                &mut bytes,
            )
        };
        self.check(status, "the size of its workspace")?;
        let mut sets = Sets::new(self.stream, operands, task.lengths()[2], copies)?;
        let workspace = sets.alloc(bytes)?;
        Ok(Box::new(Prepared {
            cudnn: self,
            sets,
            descriptors: [first, second, result, convolution],
            convolve: functions.convolve,
            algorithm: best.algorithm,
            direct: direct(*pass, best.algorithm),
            workspace: (workspace, bytes),
        }))
    }
}

impl Run for Prepared<'_> {
    fn run(&mut self, copy: usize) -> Result<f64> {
        let (one, zero) = (1f32, 0f32);
        let [first, second, result, convolution] = &self.descriptors;
        let convolve = |[a, b, c]: [u64; 3]| {
            // SAFETY: `Sets` holds tensors of the described sizes and the workspace; the factors are read before the call
            // returns.
            let status = unsafe {
                (self.convolve)(
                    self.cudnn.handle.raw,
                    &one,
                    first.raw,
                    a,
                    second.raw,
                    b,
                    convolution.raw,
                    self.algorithm,
                    self.workspace.0,
                    self.workspace.1,
                    &zero,
                    result.raw,
                    c,
                )
            };
            self.cudnn.check(status, "the convolution")
        };
        self.sets.timed(copy, convolve)
    }

    fn result(&mut self) -> Result<Vec<f32>> {
        self.sets.result()
    }

    fn direct(&self) -> bool {
        self.direct
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::Host;
    use super::*;
    use crate::philox::Philox;
    use std::mem::offset_of;

    /// As a C compiler lays out the structures of cudnn_cnn.h.
    #[test]
    fn search_results_are_laid_out_as_in_c() {
        assert_eq!(size_of::<Found>(), 48);
        assert_eq!(offset_of!(Found, milliseconds), 8);
        assert_eq!(offset_of!(Found, memory), 16);
        assert_eq!(offset_of!(Found, math), 28);
    }

    /// A convolution computed from what cuDNN is told, NHWC tensors by its formula for their strides, is ours.
    #[test]
    fn sizes_describe_the_convolution() {
        let mut rng = Philox::new(9, 0);
        let shape = ConvShape::new([2, 6, 5, 6], [4, 3, 2], [2, 1], [1, 0], 2).unwrap();
        let task = Task::Convolution(shape, Pass::Fprop);
        let [lx, lw, ly] = task.lengths();
        let mut random = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
        let (x, w, mut y) = (random(lx), random(lw), vec![f32::NAN; ly]);
        let sizes = Sizes::of(&shape).unwrap();
        let at = |[_, c, h, w]: [c_int; 4], i: [c_int; 4]| {
            let strides = [h * w * c, 1, w * c, c];
            strides.iter().zip(i).map(|(s, i)| s * i).sum::<c_int>() as usize
        };
        let per_group = sizes.y[1] / sizes.groups;
        for n in 0..sizes.y[0] {
            for k in 0..sizes.y[1] {
                for p in 0..sizes.y[2] {
                    for q in 0..sizes.y[3] {
                        let mut sum = 0.0;
                        for c in 0..sizes.w[1] {
                            for r in 0..sizes.w[2] {
                                for s in 0..sizes.w[3] {
                                    let h = p * sizes.stride[0] + r - sizes.pad[0];
                                    let v = q * sizes.stride[1] + s - sizes.pad[1];
                                    let channel = k / per_group * sizes.w[1] + c;
                                    if (0..sizes.x[2]).contains(&h) && (0..sizes.x[3]).contains(&v)
                                    {
                                        sum += x[at(sizes.x, [n, channel, h, v])]
                                            * w[at(sizes.w, [k, c, r, s])];
                                    }
                                }
                            }
                        }
                        y[at(sizes.y, [n, k, p, q])] = sum;
                    }
                }
            }
        }
        assert!(task.error([&x, &w], &y, Precision::F32) <= 1.0);
    }

    /// The real library, where it is installed, has every function and sees the same convolution; descriptors need no
    /// device.
    #[test]
    fn the_library_sees_the_same_convolution() {
        let host = Host::default();
        let stream = Stream::of(&host, Precision::Tf32).unwrap();
        let library = match load("cuDNN", NAMES, FOLDERS, "nvidia-cudnn-cu13") {
            Ok(library) => library,
            Err(e) => {
                println!("skipped: {e}");
                return;
            }
        };
        if let Err(e) = Cudnn::open(stream) {
            assert!(e.to_string().contains("cuDNN, cudnnCreate"), "{e}");
        }
        for pass in [Pass::Fprop, Pass::Dgrad, Pass::Wgrad] {
            Functions::of(library, pass).unwrap();
        }
        // SAFETY: the types are those of cudnn_graph.h, cudnn_ops.h and cudnn_cnn.h.
        unsafe {
            let cudnn = Cudnn {
                stream,
                library,
                handle: Owned::none(symbol(library, "cudnnDestroy").unwrap()),
                text: symbol(library, "cudnnGetErrorString").unwrap(),
            };
            let shape = ConvShape::new([2, 6, 5, 6], [4, 3, 2], [2, 1], [1, 0], 2).unwrap();
            let sizes = Sizes::of(&shape).unwrap();
            let [x, w, _, convolution] = cudnn.describe(&sizes).unwrap();
            type Out = unsafe extern "C" fn(
                Descriptor,
                Descriptor,
                Descriptor,
                *mut c_int,
                *mut c_int,
                *mut c_int,
                *mut c_int,
            ) -> c_int;
            let out: Out = symbol(library, "cudnnGetConvolution2dForwardOutputDim").unwrap();
            let mut y = [0; 4];
            let [n, c, h, v] = &mut y;
            let status = out(convolution.raw, x.raw, w.raw, n, c, h, v);
            cudnn.check(status, "the result's sizes").unwrap();
            assert_eq!(y, sizes.y);
            let refused = cudnn.describe(&Sizes {
                groups: -1,
                ..sizes
            });
            assert!(refused.is_err_and(|e| e.to_string().contains("its groups")));
        }
    }
}
