//! Reading safetensors files: mapped into memory, checked in full when opened, converted to float32 when read.

use super::header::{self, quote, show_shape};
use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::Mmap;
pub use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name, as in the state dict that was saved.
    pub name: String,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape in the file's own axis order (PyTorch's); empty for a scalar.
    pub shape: Vec<usize>,
    /// Where the data lie, in bytes from the start of the file; checked against dtype, shape and file.
    pub(super) range: Range<usize>,
}

impl Entry {
    /// Number of elements (1 for a scalar).
    pub fn numel(&self) -> usize {
        // Cannot overflow: the header check did this product with care.
        self.shape.iter().product()
    }

    /// Bytes of data.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// Whether [`WeightFile::read_f32`] can read it.
    pub fn is_float(&self) -> bool {
        matches!(
            self.dtype,
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16
        )
    }

    /// Whether [`WeightFile::read_i64`] can read it.
    pub fn is_integer(&self) -> bool {
        use Dtype::*;
        matches!(
            self.dtype,
            BOOL | U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64
        )
    }
}

enum Bytes {
    Mapped(Mmap),
    Held(Cow<'static, [u8]>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Held(bytes) => bytes,
        }
    }
}

/// An open safetensors file whose header has been checked: names are unique and every tensor's bytes are there.
///
/// The file is mapped, not read: opening costs its header only, and a tensor is converted when asked for. While it
/// is open the file must not be shortened or rewritten in place (the program's own writers replace files by rename,
/// which is safe).
pub struct WeightFile {
    path: PathBuf,
    bytes: Bytes,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    header_bytes: usize,
}

impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("WeightFile")
            .field("path", &self.path)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl WeightFile {
    /// Opens and checks the file at `path`.
    ///
    /// # Errors
    /// [`Error::Input`] naming the path and what is wrong: missing, a folder, empty, truncated, damaged, or another
    /// kind of file (PyTorch pickle, GGUF, HDF5, Git LFS pointer, HTML page ...) with what to do about it.
    pub fn open(path: impl AsRef<Path>) -> Result<WeightFile> {
        let path = path.as_ref();
        let fail = |e| Error::reading(path, e);
        // Asked before opening: opening a pipe would wait for its writer.
        let meta = std::fs::metadata(path).map_err(fail)?;
        if meta.is_dir() {
            return Err(Error::input(format!(
                "{} is a folder; give the .safetensors file inside it",
                path.display()
            )));
        }
        if !meta.is_file() {
            return Err(Error::input(format!(
                "{} is not a regular file; weights are read from a .safetensors file on disk",
                path.display()
            )));
        }
        let file = File::open(path).map_err(fail)?;
        if file.metadata().map_err(fail)?.len() == 0 {
            return Self::new(path.into(), Bytes::Held(Cow::Borrowed(&[])));
        }
        // SAFETY: the map is read-only and private to this value. That nobody shortens the file meanwhile cannot be
        // enforced (no system offers it); it is the documented condition of this type.
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        Self::new(path.into(), Bytes::Mapped(map))
    }

    /// The same for a file held in memory (built into the program, or made by a test); `label` names it in errors.
    ///
    /// # Errors
    /// As [`WeightFile::open`].
    pub fn from_bytes(
        label: impl Into<PathBuf>,
        bytes: impl Into<Cow<'static, [u8]>>,
    ) -> Result<WeightFile> {
        Self::new(label.into(), Bytes::Held(bytes.into()))
    }

    fn new(path: PathBuf, bytes: Bytes) -> Result<WeightFile> {
        let header = header::parse(bytes.as_slice())
            .map_err(|what| Error::input(format!("{} {what}", path.display())))?;
        let index = header
            .entries
            .iter()
            .enumerate()
            .map(|(i, e)| (e.name.clone(), i))
            .collect();
        Ok(WeightFile {
            path,
            bytes,
            entries: header.entries,
            index,
            metadata: header.metadata,
            header_bytes: header::PREFIX + header.json_bytes,
        })
    }

    /// The path it was opened from (or the label it was given).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file, for its checksum.
    pub fn contents(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Size of the whole file in bytes.
    pub fn file_bytes(&self) -> usize {
        self.bytes.as_slice().len()
    }

    /// Bytes before the data: the length and the header.
    pub fn header_bytes(&self) -> usize {
        self.header_bytes
    }

    /// Every tensor, in the header's order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The free-form `__metadata__` of the file (PyTorch writes `format: pt`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Whether a tensor of that name is there.
    pub fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The tensor of that name, if there.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.index.get(name).map(|&i| &self.entries[i])
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the tensor where it is not there.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.get(name).ok_or_else(|| {
            Error::input(format!(
                "{} has no tensor {} ({} tensors, the first is {})",
                self.path.display(),
                quote(name),
                self.entries.len(),
                self.entries
                    .first()
                    .map_or("none".into(), |e| quote(&e.name))
            ))
        })
    }

    /// A tensor's bytes as they lie in the file: row-major, little-endian, of the entry's dtype.
    ///
    /// # Errors
    /// As [`WeightFile::entry`].
    pub fn raw(&self, name: &str) -> Result<&[u8]> {
        Ok(self.bytes_of(self.entry(name)?))
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.bytes.as_slice()[entry.range.clone()]
    }

    /// A floating-point tensor (F64, F32, F16 or BF16) as float32, row-major in the file's axis order.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor, it is of another dtype, or an F64 value exceeds float32.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        self.need_float(entry)?;
        let mut out = vec![0.0; entry.numel()];
        self.convert(entry, &mut out)?;
        Ok(out)
    }

    /// As [`WeightFile::read_f32`], into a buffer of exactly the tensor's number of elements.
    ///
    /// # Errors
    /// As [`WeightFile::read_f32`], and where `out` has another length.
    pub fn read_f32_into(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let entry = self.entry(name)?;
        self.need_float(entry)?;
        if out.len() != entry.numel() {
            return Err(self.bad(
                entry,
                format!("has {} elements, {} are wanted", entry.numel(), out.len()),
            ));
        }
        self.convert(entry, out)
    }

    fn need_float(&self, entry: &Entry) -> Result<()> {
        if entry.is_float() {
            return Ok(());
        }
        let hint = if entry.is_integer() {
            ""
        } else {
            "; save it again as F32, F16 or BF16"
        };
        Err(self.bad(
            entry,
            format!("cannot be read as float32 (F64, F32, F16 and BF16 can){hint}"),
        ))
    }

    /// `out` has the entry's number of elements and the entry is a float.
    fn convert(&self, entry: &Entry, out: &mut [f32]) -> Result<()> {
        let raw = self.bytes_of(entry);
        match entry.dtype {
            Dtype::F32 => each(raw, out, f32::from_le_bytes),
            Dtype::F16 => each(raw, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => each(raw, out, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => {
                each(raw, out, |b| f64::from_le_bytes(b) as f32);
                let (wide, _) = raw.as_chunks();
                let lost = |(i, b): (usize, &[u8; 8])| {
                    f64::from_le_bytes(*b).is_finite() && out[i].is_infinite()
                };
                if let Some(i) = wide.iter().enumerate().position(lost) {
                    let value = f64::from_le_bytes(wide[i]);
                    return Err(self.bad(
                        entry,
                        format!("holds {value:e} at index {i}, beyond float32's range"),
                    ));
                }
            }
            _ => return self.need_float(entry),
        }
        self.let_go(entry);
        Ok(())
    }

    /// Pages of the file that were read need not stay beside what was made of them; read again, they come back.
    fn let_go(&self, entry: &Entry) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: a read-only map of a file, which is read again where it is looked at again. Advice that is refused
            // costs memory and nothing else.
            let _ =
                unsafe { map.unchecked_advise_range(advice, entry.range.start, entry.range.len()) };
        }
        #[cfg(not(unix))]
        let _ = entry;
    }

    /// An integer or boolean tensor as `i64` (labels, `num_batches_tracked`).
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor, it is of another dtype, or a U64 value exceeds `i64`.
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>> {
        let entry = self.entry(name)?;
        let raw = self.bytes_of(entry);
        let mut out = vec![0; if entry.is_integer() { entry.numel() } else { 0 }];
        match entry.dtype {
            Dtype::I64 => each(raw, &mut out, i64::from_le_bytes),
            Dtype::I32 => each(raw, &mut out, |b| i32::from_le_bytes(b).into()),
            Dtype::I16 => each(raw, &mut out, |b| i16::from_le_bytes(b).into()),
            Dtype::I8 => each(raw, &mut out, |b| i8::from_le_bytes(b).into()),
            Dtype::U32 => each(raw, &mut out, |b| u32::from_le_bytes(b).into()),
            Dtype::U16 => each(raw, &mut out, |b| u16::from_le_bytes(b).into()),
            Dtype::U8 => each(raw, &mut out, |[b]: [u8; 1]| b.into()),
            Dtype::BOOL => each(raw, &mut out, |[b]: [u8; 1]| (b != 0).into()),
            Dtype::U64 => {
                each(raw, &mut out, i64::from_le_bytes);
                if let Some(i) = out.iter().position(|&v| v < 0) {
                    let value = out[i] as u64;
                    return Err(self.bad(
                        entry,
                        format!("holds {value} at index {i}, beyond a signed 64-bit integer"),
                    ));
                }
            }
            _ => {
                return Err(self.bad(
                    entry,
                    "is not of an integer dtype, which is wanted here".into(),
                ));
            }
        }
        Ok(out)
    }

    fn bad(&self, entry: &Entry, what: String) -> Error {
        Error::input(format!(
            "{}: tensor {} ({} {}) {what}",
            self.path.display(),
            quote(&entry.name),
            entry.dtype,
            show_shape(&entry.shape)
        ))
    }
}

/// `out[i] = f(the i-th N bytes of raw)`.
fn each<const N: usize, T>(raw: &[u8], out: &mut [T], f: impl Fn([u8; N]) -> T) {
    let (chunks, _) = raw.as_chunks::<N>();
    for (o, b) in out.iter_mut().zip(chunks) {
        *o = f(*b);
    }
}
