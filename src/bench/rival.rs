//! Other libraries' kernels for a case that is one matrix product, timed in the same run on the CPU: the `gemm` crate,
//! and oneDNN, MKL, BLIS and OpenBLAS where they are found at run time.

use super::kernel::ROTATED;
use super::measure::{Limits, Sample, measure};
use crate::ops::Product;
use crate::philox::Philox;
use crate::{Error, Result};
use libloading::Library;
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

/// `C = A B`, all three stored by rows, A and B perhaps transposed.
type Multiply = Box<dyn Fn(&Product, &[f32], &[f32], &mut [f32]) + Send + Sync>;

/// One library's single-precision matrix product.
pub struct Rival {
    /// `gemm`, `oneDNN`...
    pub name: &'static str,
    multiply: Multiply,
}

impl std::fmt::Debug for Rival {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_tuple("Rival").field(&self.name).finish()
    }
}

/// Every library there is on this machine, with as many threads as this program has.
pub fn rivals() -> &'static [Rival] {
    static FOUND: OnceLock<Vec<Rival>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut all = vec![Rival {
            name: "gemm",
            multiply: Box::new(by_gemm),
        }];
        all.extend(onednn());
        for (name, files, threads) in BLAS {
            all.extend(blas(name, files, threads));
        }
        all
    })
}

fn by_gemm(p: &Product, a: &[f32], b: &[f32], c: &mut [f32]) {
    let stride = |s: usize| s as isize;
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    // SAFETY: the strides stay inside the slices, as `Rival::multiply` asserted; c is written whole and not read.
    unsafe {
        gemm::gemm(
            p.m,
            p.n,
            p.k,
            c.as_mut_ptr(),
            1,
            stride(p.n),
            false,
            a.as_ptr(),
            if p.ta { stride(p.m) } else { 1 },
            if p.ta { 1 } else { stride(p.k) },
            b.as_ptr(),
            if p.tb { stride(p.k) } else { 1 },
            if p.tb { 1 } else { stride(p.n) },
            0.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// A library that stays loaded: its functions are kept.
fn load(files: &[&str]) -> Option<&'static Library> {
    // SAFETY: numerical libraries, whose initialisers ask for the processor and start threads.
    let found = files
        .iter()
        .find_map(|f| unsafe { Library::new(*f).ok() })?;
    Some(Box::leak(Box::new(found)))
}

/// Leading dimensions of A and B.
fn leading(p: &Product) -> [usize; 2] {
    [if p.ta { p.m } else { p.k }, if p.tb { p.k } else { p.n }]
}

/// As many threads as this program has, by the library's own function for it.
fn set_threads(library: &Library, function: &str) {
    // SAFETY: of OpenMP and of every BLAS here, it takes an int; dlsym also finds what the library itself needs.
    unsafe {
        if let Ok(set) = library.get::<unsafe extern "C" fn(c_int)>(function.as_bytes()) {
            set(rayon::current_num_threads() as c_int);
        }
    }
}

fn onednn() -> Option<Rival> {
    type Sgemm = unsafe extern "C" fn(
        c_char,
        c_char,
        i64,
        i64,
        i64,
        f32,
        *const f32,
        i64,
        *const f32,
        i64,
        f32,
        *mut f32,
        i64,
    ) -> c_int;
    let library = load(&["libdnnl.so.3", "libdnnl.so.2", "libdnnl.so", "dnnl.dll"])?;
    set_threads(library, "omp_set_num_threads");
    // SAFETY: the type is that of dnnl.h.
    let sgemm: Sgemm = unsafe { *library.get(b"dnnl_sgemm").ok()? };
    let multiply = move |p: &Product, a: &[f32], b: &[f32], c: &mut [f32]| {
        let letter = |t: bool| if t { b'T' } else { b'N' } as c_char;
        let [lda, ldb] = leading(p);
        let [m, n, k, lda, ldb] = [p.m, p.n, p.k, lda, ldb].map(|v| v as i64);
        // SAFETY: row-major matrices inside the slices, as `Rival::multiply` asserted.
        unsafe {
            sgemm(
                letter(p.ta),
                letter(p.tb),
                m,
                n,
                k,
                1.0,
                a.as_ptr(),
                lda,
                b.as_ptr(),
                ldb,
                0.0,
                c.as_mut_ptr(),
                n,
            );
        }
    };
    Some(Rival {
        name: "oneDNN",
        multiply: Box::new(multiply),
    })
}

/// Name, files, and the function that sets the number of threads.
const BLAS: &[(&str, &[&str], &str)] = &[
    (
        "MKL",
        &["libmkl_rt.so.2", "libmkl_rt.so", "mkl_rt.2.dll"],
        "MKL_Set_Num_Threads",
    ),
    (
        "BLIS",
        &["libblis.so.4", "libblis.so"],
        "bli_thread_set_num_threads",
    ),
    (
        "OpenBLAS",
        &["libopenblas.so.0", "libopenblas.so", "libopenblas.dll"],
        "openblas_set_num_threads",
    ),
];

fn blas(name: &'static str, files: &[&str], threads: &str) -> Option<Rival> {
    type Sgemm = unsafe extern "C" fn(
        c_int,
        c_int,
        c_int,
        c_int,
        c_int,
        c_int,
        f32,
        *const f32,
        c_int,
        *const f32,
        c_int,
        f32,
        *mut f32,
        c_int,
    );
    const ROW_MAJOR: c_int = 101;
    let library = load(files)?;
    set_threads(library, threads);
    // SAFETY: the type is that of cblas.h.
    let sgemm: Sgemm = unsafe { *library.get(b"cblas_sgemm").ok()? };
    let multiply = move |p: &Product, a: &[f32], b: &[f32], c: &mut [f32]| {
        let code = |t: bool| if t { 112 } else { 111 };
        let [lda, ldb] = leading(p);
        let [m, n, k, lda, ldb] = [p.m, p.n, p.k, lda, ldb].map(|v| v as c_int);
        // SAFETY: row-major matrices inside the slices, as `Rival::multiply` asserted.
        unsafe {
            sgemm(
                ROW_MAJOR,
                code(p.ta),
                code(p.tb),
                m,
                n,
                k,
                1.0,
                a.as_ptr(),
                lda,
                b.as_ptr(),
                ldb,
                0.0,
                c.as_mut_ptr(),
                n,
            );
        }
    };
    Some(Rival {
        name,
        multiply: Box::new(multiply),
    })
}

impl Rival {
    fn multiply(&self, p: &Product, a: &[f32], b: &[f32], c: &mut [f32]) {
        assert!(p.fits(a.len(), b.len(), c.len()));
        (self.multiply)(p, a, b, c);
    }

    /// Times the product of random matrices, after a look at some of its results; `hot`: on the same memory each time.
    ///
    /// # Errors
    /// The library's results are wrong.
    pub fn time(&self, p: &Product, hot: bool, limits: Limits) -> Result<(f64, Sample)> {
        let mut rng = Philox::new(0x7269_7661, 0);
        let mut random = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
        let (la, lb, lc) = (p.m * p.k, p.k * p.n, p.m * p.n);
        let copies = match hot {
            true => 1,
            false => (ROTATED / (4 * (la + lb + lc)) + 1).min(64),
        };
        let (a, b) = (random(la), random(lb));
        let mut sets = vec![(a, b, vec![f32::NAN; lc]); copies];
        let error = {
            let (a, b, c) = &mut sets[0];
            self.multiply(p, a, b, c);
            p.error(a, b, c)
        };
        if error.is_nan() || error > 1.0 {
            return Err(Error::run(format!(
                "{} is {error} times its allowance off in a product of {} x {} x {}; it is not timed",
                self.name, p.m, p.n, p.k
            )));
        }
        let mut turn = 0;
        let sample = measure(limits, || {
            turn = (turn + 1) % copies;
            let (a, b, c) = &mut sets[turn];
            self.multiply(p, a, b, c);
            Ok(())
        })?;
        Ok((error, sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Every library here gives the product, however the operands are stored; strides that swap rows and columns show.
    #[test]
    fn rivals_multiply() {
        let limits = Limits {
            warm_up: 0,
            min_runs: 1,
            precision: 1.0,
            time: Duration::ZERO,
        };
        let (m, n, k) = (5, 7, 19);
        for (ta, tb) in [(false, true), (false, false), (true, false)] {
            let p = Product { m, n, k, ta, tb };
            for rival in rivals() {
                let (error, _) = rival.time(&p, true, limits).unwrap();
                assert!(error <= 1.0, "{} {p:?}: {error}", rival.name);
            }
            let (x, y) = (vec![1.0; m * k], vec![1.0; k * n]);
            assert!(p.error(&x, &y, &vec![k as f32 + 0.1; m * n]) > 1.0);
            assert!(p.error(&x, &y, &vec![f32::NAN; m * n]).is_nan());
        }
    }
}
