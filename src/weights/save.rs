//! Writing safetensors files: streamed, atomic, byte for byte the same for the same tensors.

use super::file::Dtype;
use super::header::{quote, show_shape};
use crate::report::write_atomic_with;
use crate::{Error, Result};
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

/// A tensor to write, its elements row-major.
#[derive(Debug, Clone)]
pub struct SaveTensor<'a> {
    /// Name; unique in the file.
    pub name: Cow<'a, str>,
    /// Shape in the file's axis order (PyTorch's); empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: SaveData<'a>,
}

/// Elements of a tensor to write.
#[derive(Debug, Clone)]
pub enum SaveData<'a> {
    /// Written in the file's [`FloatFormat`].
    F32(Cow<'a, [f32]>),
    /// Written as I64.
    I64(Cow<'a, [i64]>),
}

impl<'a> SaveTensor<'a> {
    /// A floating-point tensor.
    pub fn f32(
        name: impl Into<Cow<'a, str>>,
        shape: &[usize],
        data: impl Into<Cow<'a, [f32]>>,
    ) -> Self {
        let (name, shape, data) = (name.into(), shape.to_vec(), SaveData::F32(data.into()));
        SaveTensor { name, shape, data }
    }

    /// An integer tensor.
    pub fn i64(
        name: impl Into<Cow<'a, str>>,
        shape: &[usize],
        data: impl Into<Cow<'a, [i64]>>,
    ) -> Self {
        let (name, shape, data) = (name.into(), shape.to_vec(), SaveData::I64(data.into()));
        SaveTensor { name, shape, data }
    }

    fn dtype(&self, floats: FloatFormat) -> Dtype {
        match self.data {
            SaveData::F32(_) => floats.dtype(),
            SaveData::I64(_) => Dtype::I64,
        }
    }

    fn len(&self) -> usize {
        match &self.data {
            SaveData::F32(data) => data.len(),
            SaveData::I64(data) => data.len(),
        }
    }
}

/// How floating-point tensors are stored. Round to nearest, ties to even.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FloatFormat {
    /// Exact.
    #[default]
    F32,
    /// IEEE half precision: 11 bits of significand, largest value 65504.
    F16,
    /// bfloat16: 8 bits of significand, float32's range.
    BF16,
}

impl FloatFormat {
    fn dtype(self) -> Dtype {
        match self {
            FloatFormat::F32 => Dtype::F32,
            FloatFormat::F16 => Dtype::F16,
            FloatFormat::BF16 => Dtype::BF16,
        }
    }

    /// Whether the finite `v` becomes infinite.
    fn overflows(self, v: f32) -> bool {
        v.is_finite()
            && match self {
                FloatFormat::F32 => false,
                FloatFormat::F16 => f16::from_f32(v).is_infinite(),
                FloatFormat::BF16 => bf16::from_f32(v).is_infinite(),
            }
    }
}

impl std::str::FromStr for FloatFormat {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.to_ascii_lowercase().as_str() {
            "f32" | "fp32" | "float32" => Ok(FloatFormat::F32),
            "f16" | "fp16" | "float16" => Ok(FloatFormat::F16),
            "bf16" | "bfloat16" => Ok(FloatFormat::BF16),
            _ => Err(Error::input(format!(
                "no such weight format: {}; f32, f16 and bf16 are",
                quote(s)
            ))),
        }
    }
}

/// Writes `tensors` to `path`, whole or not at all, in the order PyTorch's own writer uses (wider types first, then
/// by name). `metadata` is written sorted, with `format: pt` added unless it says otherwise (transformers asks for it).
///
/// # Errors
/// [`Error::Input`] for a name given twice or reserved, a shape that does not fit its data, or a finite value that
/// `floats` cannot hold; [`Error::Run`] where the file cannot be written. The file at `path` then stays as it was.
pub fn save(
    path: impl AsRef<Path>,
    tensors: &[SaveTensor],
    metadata: &BTreeMap<String, String>,
    floats: FloatFormat,
) -> Result<()> {
    let path = path.as_ref();
    let bad = |what: String| Error::input(format!("cannot save {}: {what}", path.display()));
    let mut order: Vec<&SaveTensor> = tensors.iter().collect();
    order.sort_by(|a, b| {
        b.dtype(floats)
            .cmp(&a.dtype(floats))
            .then_with(|| a.name.cmp(&b.name))
    });
    let header = header(&order, metadata, floats).map_err(bad)?;
    for t in &order {
        let SaveData::F32(data) = &t.data else {
            continue;
        };
        if let Some(i) = data.iter().position(|&v| floats.overflows(v)) {
            let (name, value) = (quote(&t.name), data[i]);
            return Err(bad(format!(
                "tensor {name} holds {value:e} at index {i}, beyond {}'s range; save as f32",
                floats.dtype()
            )));
        }
    }
    write_atomic_with(path, |file| {
        write_all(file, &header, &order, floats).map_err(|e| Error::writing(path, e))
    })
}

/// The header's bytes, length in front and padding behind (the data then begin at a multiple of 8).
fn header(
    order: &[&SaveTensor],
    metadata: &BTreeMap<String, String>,
    floats: FloatFormat,
) -> Result<Vec<u8>, String> {
    let mut metadata = metadata.clone();
    metadata
        .entry("format".into())
        .or_insert_with(|| "pt".into());
    let mut json = serde_json::Map::new();
    json.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut begin = 0;
    for t in order {
        let count = t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if count != Some(t.len()) {
            let (name, shape) = (quote(&t.name), show_shape(&t.shape));
            return Err(format!(
                "tensor {name} of shape {shape} has {} elements",
                t.len()
            ));
        }
        let dtype = t.dtype(floats);
        let end = begin + t.len() * dtype.bitsize() / 8;
        let info = serde_json::json!({"dtype": dtype.to_string(), "shape": t.shape, "data_offsets": [begin, end]});
        if json.insert(t.name.to_string(), info).is_some() {
            let why = if t.name == "__metadata__" {
                "reserved by the format"
            } else {
                "there twice"
            };
            return Err(format!("tensor name {} is {why}", quote(&t.name)));
        }
        begin = end;
    }
    let mut text = serde_json::to_vec(&json).map_err(|e| e.to_string())?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

fn write_all(
    file: &mut dyn Write,
    header: &[u8],
    order: &[&SaveTensor],
    floats: FloatFormat,
) -> io::Result<()> {
    file.write_all(header)?;
    for t in order {
        match (&t.data, floats) {
            (SaveData::I64(d), _) => write_each(file, d, i64::to_le_bytes)?,
            (SaveData::F32(d), FloatFormat::F32) => write_each(file, d, f32::to_le_bytes)?,
            (SaveData::F32(d), FloatFormat::F16) => {
                write_each(file, d, |v| f16::from_f32(v).to_le_bytes())?
            }
            (SaveData::F32(d), FloatFormat::BF16) => {
                write_each(file, d, |v| bf16::from_f32(v).to_le_bytes())?
            }
        }
    }
    Ok(())
}

fn write_each<T: Copy, const N: usize>(
    file: &mut dyn Write,
    data: &[T],
    f: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(N * data.len().min(1 << 16));
    for chunk in data.chunks(1 << 16) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|&v| f(v)));
        file.write_all(&bytes)?;
    }
    Ok(())
}
