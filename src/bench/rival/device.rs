//! What cuBLAS and cuDNN share: the backend's stream, and operands in device memory.

use crate::backend::cuda::{Driver, Precision, find};
use crate::{Error, Result};
use half::bf16;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};

/// The backend's stream, and what is computed in.
#[derive(Clone, Copy)]
pub struct Stream<'a> {
    pub driver: &'a dyn Driver,
    pub raw: *mut c_void,
    pub precision: Precision,
}

impl<'a> Stream<'a> {
    /// None on the simulator.
    pub fn of(driver: &'a dyn Driver, precision: Precision) -> Option<Stream<'a>> {
        let raw = driver.stream()?;
        Some(Stream {
            driver,
            raw,
            precision,
        })
    }
}

/// A library, loaded; `package` is what to install.
///
/// # Errors
/// It is not here: where it was looked for and how to get it.
pub fn load(
    what: &str,
    names: &[&str],
    folders: &[&str],
    package: &str,
) -> Result<&'static Library> {
    let folders = find::folders(folders);
    find::load(names, &folders).ok_or_else(|| {
        Error::run(format!(
            "{what} is not here, so it has no rows: looked for {} in the library path, CUDA_HOME, Python's site-packages \
             and the toolkit's folders; `pip install {package}` gets it",
            names.join(", ")
        ))
    })
}

/// A function of a loaded library.
///
/// # Safety
/// `T` is its type.
///
/// # Errors
/// The library has none of that name.
pub unsafe fn symbol<T: Copy>(library: &'static Library, name: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found
        .map(|f| *f)
        .map_err(|e| Error::run(format!("the library has no {name}: {e}")))
}

/// A handle or a descriptor that a library made, destroyed by it in the end.
pub struct Owned {
    /// Null until it is made.
    pub raw: *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void) -> c_int,
}

impl Owned {
    /// Room for what `destroy` will end.
    pub fn none(destroy: unsafe extern "C" fn(*mut c_void) -> c_int) -> Owned {
        Owned {
            raw: std::ptr::null_mut(),
            destroy,
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by the library, destroyed once.
            unsafe { (self.destroy)(self.raw) };
        }
    }
}

/// A status that is not 0 as an error, with the library's own words for it.
pub fn check(
    status: c_int,
    doing: &str,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the libraries return a static string for every code, or null.
    let text = unsafe {
        let text = text(status);
        match text.is_null() {
            true => "unknown".into(),
            false => CStr::from_ptr(text).to_string_lossy(),
        }
    };
    Err(Error::run(format!("{doing}: {text} (status {status})")))
}

/// A size as the libraries take it.
pub fn int(v: usize) -> Result<c_int> {
    c_int::try_from(v)
        .map_err(|_| Error::run(format!("an extent of {v} is too large for the library")))
}

/// Operands and results of one task in several places, and a workspace.
pub struct Sets<'a> {
    stream: Stream<'a>,
    /// First operand, second, result.
    copies: Vec<[u64; 3]>,
    result: usize,
    owned: Vec<u64>,
}

impl<'a> Sets<'a> {
    /// Uploads the operands; the results are NaN.
    pub fn new(
        stream: Stream<'a>,
        operands: [&[f32]; 2],
        result: usize,
        copies: usize,
    ) -> Result<Sets<'a>> {
        let mut sets = Sets {
            stream,
            copies: vec![],
            result,
            owned: vec![],
        };
        let operands = operands.map(|v| encode(v, stream.precision));
        for _ in 0..copies {
            let mut places = [0; 3];
            for (place, bytes) in places.iter_mut().zip(&operands) {
                *place = sets.alloc(bytes.len())?;
                stream.driver.upload(*place, bytes)?;
            }
            let words = (size(stream.precision) * result).div_ceil(4);
            places[2] = sets.alloc(4 * words)?;
            // NaN as float32, and as two bf16.
            stream.driver.fill(places[2], 0x7fff_ffff, words)?;
            sets.copies.push(places);
        }
        Ok(sets)
    }

    /// Memory that lives as long as the operands.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64> {
        let address = self.stream.driver.alloc(bytes.max(4), "a rival")?;
        self.owned.push(address);
        Ok(address)
    }

    /// Calls for one copy and returns the seconds of its work. The copy before is computed first, so that the device is
    /// busy while the host prepares this one, as it is between the kernels of a step.
    pub fn timed(&self, copy: usize, call: impl Fn([u64; 3]) -> Result<()>) -> Result<f64> {
        let before = (copy + self.copies.len() - 1) % self.copies.len();
        let copies = [before, copy];
        let driver = self.stream.driver;
        let times = driver.timed_calls(2, &mut |i| call(self.copies[copies[i]]))?;
        let last = times
            .last()
            .ok_or_else(|| Error::run("nothing was timed"))?;
        Ok(last.as_secs_f64())
    }

    /// The result of copy 0.
    pub fn result(&self) -> Result<Vec<f32>> {
        let mut bytes = vec![0; size(self.stream.precision) * self.result];
        self.stream.driver.download(self.copies[0][2], &mut bytes)?;
        Ok(decode(&bytes, self.stream.precision))
    }
}

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.owned.iter().for_each(|&a| self.stream.driver.free(a));
    }
}

/// Bytes of an element.
fn size(precision: Precision) -> usize {
    match precision {
        Precision::Bf16 => 2,
        Precision::F32 | Precision::Tf32 => 4,
    }
}

fn encode(values: &[f32], precision: Precision) -> Vec<u8> {
    match precision {
        Precision::Bf16 => {
            let halves = values.iter().map(|&v| bf16::from_f32(v).to_le_bytes());
            halves.flatten().collect()
        }
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], precision: Precision) -> Vec<f32> {
    match precision {
        Precision::Bf16 => {
            let halves = bytes.as_chunks().0.iter();
            halves.map(|&b| bf16::from_le_bytes(b).to_f32()).collect()
        }
        _ => {
            let words = bytes.as_chunks().0.iter();
            words.map(|&b| f32::from_le_bytes(b)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_come_back() {
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            let bytes = encode(&[1.5, -0.0, f32::NAN], precision);
            assert_eq!(bytes.len(), 3 * size(precision));
            let back = decode(&bytes, precision);
            assert_eq!(back[..2], [1.5, -0.0]);
            assert!(back[2].is_nan());
            let nan = 0x7fff_ffffu32.to_le_bytes();
            assert!(decode(&nan, precision).iter().all(|v| v.is_nan()));
        }
    }

    #[test]
    fn a_missing_library_is_told_with_its_package() {
        let e = load("cuNONE", &["libcunone.so.1"], &["none"], "nvidia-none").unwrap_err();
        let e = e.to_string();
        assert!(
            e.contains("libcunone.so.1") && e.contains("pip install nvidia-none"),
            "{e}"
        );
    }
}
