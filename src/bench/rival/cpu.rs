//! Matrix products by the CPU's libraries.

use super::task::Task;
use super::{Library as Rival, Run};
use crate::ops::Product;
use crate::{Error, Result};
use libloading::Library;
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;
use std::time::Instant;

/// `C = A B`, all three stored by rows, A and B perhaps transposed.
type Multiply = Box<dyn Fn(&Product, &[f32], &[f32], &mut [f32]) + Send + Sync>;

/// One library's single-precision matrix product.
pub struct Multiplier {
    name: &'static str,
    multiply: Multiply,
}

/// Every library there is on this machine, with as many threads as this program has.
pub fn libraries() -> &'static [Multiplier] {
    static FOUND: OnceLock<Vec<Multiplier>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut all = vec![Multiplier {
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

impl Rival for &'static Multiplier {
    fn name(&self) -> &'static str {
        self.name
    }

    fn takes(&self, task: &Task) -> bool {
        matches!(task, Task::Product(_))
    }

    fn prepare<'a>(
        &'a self,
        task: &Task,
        [a, b]: [&[f32]; 2],
        copies: usize,
    ) -> Result<Box<dyn Run + 'a>> {
        let Task::Product(product) = *task else {
            return Err(Error::run("this is no matrix product"));
        };
        let [_, _, lc] = task.lengths();
        let set = (a.to_vec(), b.to_vec(), vec![f32::NAN; lc]);
        Ok(Box::new(Prepared {
            library: self,
            product,
            sets: vec![set; copies],
        }))
    }
}

struct Prepared {
    library: &'static Multiplier,
    product: Product,
    sets: Vec<(Vec<f32>, Vec<f32>, Vec<f32>)>,
}

impl Run for Prepared {
    fn run(&mut self, copy: usize) -> Result<f64> {
        let (p, (a, b, c)) = (&self.product, &mut self.sets[copy]);
        assert!(p.fits(a.len(), b.len(), c.len()));
        let clock = Instant::now();
        (self.library.multiply)(p, a, b, c);
        Ok(clock.elapsed().as_secs_f64())
    }

    fn result(&mut self) -> Result<Vec<f32>> {
        Ok(self.sets[0].2.clone())
    }
}

fn by_gemm(p: &Product, a: &[f32], b: &[f32], c: &mut [f32]) {
    let stride = |s: usize| s as isize;
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    // SAFETY: the strides stay inside the slices, as `Prepared::run` asserted; c is written whole and not read.
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

fn onednn() -> Option<Multiplier> {
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
        // SAFETY: row-major matrices inside the slices, as `Prepared::run` asserted.
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
    Some(Multiplier {
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

fn blas(name: &'static str, files: &[&str], threads: &str) -> Option<Multiplier> {
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
        // SAFETY: row-major matrices inside the slices, as `Prepared::run` asserted.
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
    Some(Multiplier {
        name,
        multiply: Box::new(multiply),
    })
}
