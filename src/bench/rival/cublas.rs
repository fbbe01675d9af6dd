//! Matrix products by cuBLAS: `cublasGemmEx` with float32 sums.

use super::device::{Owned, Sets, Stream, check, int, load, symbol};
use super::task::Task;
use super::{Library, Run};
use crate::backend::cuda::Precision;
use crate::ops::Product;
use crate::{Error, Result};
use std::ffi::{c_char, c_int, c_void};

#[cfg(not(windows))]
const NAMES: &[&str] = &["libcublas.so.13", "libcublas.so.12", "libcublas.so"];
#[cfg(windows)]
const NAMES: &[&str] = &["cublas64_13.dll", "cublas64_12.dll"];
/// What cuBLAS itself needs: loaded before, it is found wherever it lies.
#[cfg(not(windows))]
const BEFORE: &[&str] = &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
#[cfg(windows)]
const BEFORE: &[&str] = &["cublasLt64_13.dll", "cublasLt64_12.dll"];
const FOLDERS: &[&str] = &["cu13", "cublas"];

/// `CUBLAS_OP_N` and `CUBLAS_OP_T`.
const PLAIN: c_int = 0;
const TRANSPOSED: c_int = 1;
/// `CUBLAS_GEMM_DEFAULT`.
const DEFAULT: c_int = -1;

/// `cudaDataType` of the operands and the result, and `cublasComputeType_t`.
fn types(precision: Precision) -> (c_int, c_int) {
    const R_32F: c_int = 0;
    const R_16BF: c_int = 14;
    const COMPUTE_32F: c_int = 68;
    const COMPUTE_32F_FAST_TF32: c_int = 77;
    match precision {
        Precision::F32 => (R_32F, COMPUTE_32F),
        Precision::Tf32 => (R_32F, COMPUTE_32F_FAST_TF32),
        Precision::Bf16 => (R_16BF, COMPUTE_32F),
    }
}

type Handle = *mut c_void;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const f32,
    u64,
    c_int,
    c_int,
    u64,
    c_int,
    c_int,
    *const f32,
    u64,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// cuBLAS with a handle on the backend's stream.
pub struct Cublas<'a> {
    stream: Stream<'a>,
    handle: Owned,
    gemm: GemmEx,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl<'a> Cublas<'a> {
    /// Loads the library.
    ///
    /// # Errors
    /// It is not here, or refuses the device.
    pub fn open(stream: Stream<'a>) -> Result<Cublas<'a>> {
        let _ = load("cuBLASLt", BEFORE, FOLDERS, "nvidia-cublas");
        let library = load("cuBLAS", NAMES, FOLDERS, "nvidia-cublas")?;
        // The handle is made in the context that is current: the backend's.
        stream.driver.synchronize()?;
        // SAFETY: the types are those of cublas_api.h; the handle is made once and destroyed in drop.
        unsafe {
            let create: unsafe extern "C" fn(*mut Handle) -> c_int =
                symbol(library, "cublasCreate_v2")?;
            let on: unsafe extern "C" fn(Handle, *mut c_void) -> c_int =
                symbol(library, "cublasSetStream_v2")?;
            let mut cublas = Cublas {
                stream,
                handle: Owned::none(symbol(library, "cublasDestroy_v2")?),
                gemm: symbol(library, "cublasGemmEx")?,
                text: symbol(library, "cublasGetStatusString")?,
            };
            let created = create(&mut cublas.handle.raw);
            cublas.check(created, "cublasCreate")?;
            cublas.check(on(cublas.handle.raw, stream.raw), "cublasSetStream")?;
            Ok(cublas)
        }
    }

    fn check(&self, status: c_int, doing: &str) -> Result<()> {
        check(status, &format!("cuBLAS, {doing}"), self.text)
    }

    fn multiply(&self, g: &ColumnMajor, [a, b, c]: [u64; 3]) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        let (data, compute) = types(self.stream.precision);
        let [m, n, k] = g.mnk;
        let [ld_first, ld_second, ld_result] = g.leading;
        // SAFETY: `Sets` holds operands and result of the product's sizes; the factors are read before the call returns.
        let status = unsafe {
            (self.gemm)(
                self.handle.raw,
                g.transposed[0],
                g.transposed[1],
                m,
                n,
                k,
                &one,
                b,
                data,
                ld_first,
                a,
                data,
                ld_second,
                &zero,
                c,
                data,
                ld_result,
                compute,
                DEFAULT,
            )
        };
        self.check(status, "cublasGemmEx")
    }
}

/// Arguments of a product of matrices stored by columns that, of matrices stored by rows, computes `p`: what lies in
/// memory by rows is its transpose by columns, so `C = A B` becomes `C' = B' A'`, with B first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ColumnMajor {
    mnk: [c_int; 3],
    /// Of B and A.
    transposed: [c_int; 2],
    /// Leading dimensions of B, A and C.
    leading: [c_int; 3],
}

impl ColumnMajor {
    fn of(p: &Product) -> Result<ColumnMajor> {
        let op = |t: bool| if t { TRANSPOSED } else { PLAIN };
        Ok(ColumnMajor {
            mnk: [int(p.n)?, int(p.m)?, int(p.k)?],
            transposed: [op(p.tb), op(p.ta)],
            leading: [
                int(if p.tb { p.k } else { p.n })?,
                int(if p.ta { p.m } else { p.k })?,
                int(p.n)?,
            ],
        })
    }
}

struct Prepared<'a> {
    cublas: &'a Cublas<'a>,
    sets: Sets<'a>,
    arguments: ColumnMajor,
}

impl Library for Cublas<'_> {
    fn name(&self) -> &'static str {
        "cuBLAS"
    }

    fn takes(&self, task: &Task) -> bool {
        matches!(task, Task::Product(_))
    }

    fn prepare<'a>(
        &'a self,
        task: &Task,
        operands: [&[f32]; 2],
        copies: usize,
    ) -> Result<Box<dyn Run + 'a>> {
        let Task::Product(product) = task else {
            return Err(Error::run("this is no matrix product"));
        };
        Ok(Box::new(Prepared {
            cublas: self,
            sets: Sets::new(self.stream, operands, task.lengths()[2], copies)?,
            arguments: ColumnMajor::of(product)?,
        }))
    }
}

impl Run for Prepared<'_> {
    fn run(&mut self, copy: usize) -> Result<f64> {
        let multiply = |places| self.cublas.multiply(&self.arguments, places);
        self.sets.timed(copy, multiply)
    }

    fn result(&mut self) -> Result<Vec<f32>> {
        self.sets.result()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Rivals;
    use super::super::host::Host;
    use super::*;
    use crate::bench::Limits;
    use half::bf16;
    use std::time::Duration;

    /// GEMM as the BLAS defines it, matrices stored by columns, on the host's memory.
    #[allow(clippy::too_many_arguments)]
    unsafe extern "C" fn by_columns(
        _handle: Handle,
        transa: c_int,
        transb: c_int,
        m: c_int,
        n: c_int,
        k: c_int,
        alpha: *const f32,
        a: u64,
        atype: c_int,
        lda: c_int,
        b: u64,
        btype: c_int,
        ldb: c_int,
        beta: *const f32,
        c: u64,
        ctype: c_int,
        ldc: c_int,
        compute: c_int,
        algorithm: c_int,
    ) -> c_int {
        assert_eq!((atype, btype, algorithm), (ctype, ctype, -1));
        let place = |t: c_int, ld: c_int, i: c_int, j: c_int| match t {
            0 => (i + j * ld) as usize,
            _ => (j + i * ld) as usize,
        };
        // SAFETY: the test's operands and result are this large.
        unsafe {
            assert_eq!((*alpha, *beta), (1.0, 0.0));
            let get = |base: u64, i: usize| match (ctype, compute) {
                (0, 68 | 77) => *(base as *const f32).add(i),
                (14, 68) => (*(base as *const bf16).add(i)).to_f32(),
                _ => f32::NAN,
            };
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let terms = (0..k)
                    .map(|l| get(a, place(transa, lda, i, l)) * get(b, place(transb, ldb, l, j)));
                let (sum, at) = (terms.sum(), place(0, ldc, i, j));
                match ctype {
                    0 => *(c as *mut f32).add(at) = sum,
                    _ => *(c as *mut bf16).add(at) = bf16::from_f32(sum),
                }
            }
        }
        0
    }

    unsafe extern "C" fn nothing(_handle: Handle) -> c_int {
        0
    }

    unsafe extern "C" fn text(_status: c_int) -> *const c_char {
        c"out of order".as_ptr()
    }

    fn with(driver: &Host, gemm: GemmEx, precision: Precision) -> Rivals<'_> {
        let cublas = Cublas {
            stream: Stream::of(driver, precision).unwrap(),
            handle: Owned::none(nothing),
            gemm,
            text,
        };
        Rivals {
            libraries: vec![Box::new(cublas)],
            precision,
            missing: vec![],
        }
    }

    /// From the rows of a product through the arguments of the call to its checked result.
    #[test]
    fn products_by_rows_become_products_by_columns() {
        let host = Host::default();
        let limits = Limits {
            warm_up: 1,
            min_runs: 3,
            precision: 1.0,
            time: Duration::ZERO,
        };
        let (m, n, k) = (5, 7, 19);
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            for (ta, tb) in [(false, true), (false, false), (true, false), (true, true)] {
                let task = Task::Product(Product { m, n, k, ta, tb });
                let timed = with(&host, by_columns, precision).time(&task, false, limits);
                let timed = timed[0]
                    .as_ref()
                    .unwrap_or_else(|e| panic!("{task:?}: {e}"));
                let element = if precision == Precision::Bf16 { 2 } else { 4 };
                assert_eq!(timed.bytes as usize, element * (m * k + k * n + m * n));
                // The second of two calls counts.
                assert_eq!(timed.time.median, 2e-6);
            }
        }
        assert_eq!(host.alive(), 0);
    }

    #[test]
    fn what_fails_or_is_wrong_has_no_row() {
        /// Computes nothing.
        unsafe extern "C" fn idle(
            _: Handle,
            _: c_int,
            _: c_int,
            _: c_int,
            _: c_int,
            _: c_int,
            _: *const f32,
            _: u64,
            _: c_int,
            _: c_int,
            _: u64,
            _: c_int,
            _: c_int,
            _: *const f32,
            _: u64,
            _: c_int,
            _: c_int,
            compute: c_int,
            _: c_int,
        ) -> c_int {
            if compute == 77 { 13 } else { 0 }
        }
        let host = Host::default();
        let product = |m| Product {
            m,
            n: 3,
            k: 2,
            ta: false,
            tb: false,
        };
        let told = |precision, m| {
            let rivals = with(&host, idle, precision);
            let task = Task::Product(product(m));
            let timed = rivals.time(&task, true, Limits::default());
            timed[0].as_ref().unwrap_err().to_string()
        };
        assert!(told(Precision::F32, 4).contains("cuBLAS: its result is NaN"));
        assert!(told(Precision::Tf32, 4).contains("cublasGemmEx: out of order (status 13)"));
        assert!(ColumnMajor::of(&product(1 << 40)).is_err());
        assert_eq!(host.alive(), 0);
    }

    /// The real library, where it is installed, has every function; without a device it says so.
    #[test]
    fn the_library_is_found_or_told() {
        let host = Host::default();
        let stream = Stream::of(&host, Precision::F32).unwrap();
        match Cublas::open(stream) {
            Ok(_) => {}
            Err(e) => {
                let e = e.to_string();
                let known = ["pip install nvidia-cublas", "cuBLAS, cublasCreate"];
                assert!(known.iter().any(|k| e.contains(k)), "{e}");
            }
        }
    }
}
