//! What a weight file holds, as data and as a table: `tilewright weights inspect FILE`.

use super::file::WeightFile;
use super::header::clip;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Contents of a weight file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The file's path.
    pub path: String,
    /// Size of the file in bytes.
    pub file_bytes: usize,
    /// Bytes before the data.
    pub header_bytes: usize,
    /// Elements of all trainable tensors.
    pub parameters: usize,
    /// Elements of all others: BatchNorm's running statistics, counters, index tables.
    pub buffers: usize,
    /// Totals by dtype.
    pub dtypes: BTreeMap<String, DtypeTotal>,
    /// The file's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Every tensor, in the header's order.
    pub tensors: Vec<TensorRow>,
}

/// One tensor of an [`Inspection`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorRow {
    /// Name.
    pub name: String,
    /// dtype, in safetensors' spelling (`F32`).
    pub dtype: String,
    /// Shape in the file's axis order.
    pub shape: Vec<usize>,
    /// Number of elements.
    pub elements: usize,
    /// Bytes of data.
    pub bytes: usize,
    /// Whether it is a buffer, not a parameter.
    pub buffer: bool,
}

/// Totals of one dtype.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct DtypeTotal {
    /// Tensors.
    pub tensors: usize,
    /// Elements.
    pub elements: usize,
    /// Bytes of data.
    pub bytes: usize,
}

/// Whether a state dict's entry of that name is a buffer, not a parameter (as torchvision, timm and transformers
/// name them).
pub fn is_buffer_name(name: &str) -> bool {
    const BUFFERS: [&str; 6] = [
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "relative_position_index",
        "relative_coords_table",
        "attn_mask",
    ];
    BUFFERS.contains(&name.rsplit('.').next().unwrap_or(name))
}

impl WeightFile {
    /// What the file holds.
    pub fn inspect(&self) -> Inspection {
        let mut dtypes: BTreeMap<String, DtypeTotal> = BTreeMap::new();
        let (mut parameters, mut buffers) = (0, 0);
        let tensors = self.entries().iter().map(|e| {
            let total = dtypes.entry(e.dtype.to_string()).or_default();
            total.tensors += 1;
            total.elements += e.numel();
            total.bytes += e.bytes();
            let buffer = !e.is_float() || is_buffer_name(&e.name);
            *if buffer {
                &mut buffers
            } else {
                &mut parameters
            } += e.numel();
            TensorRow {
                name: e.name.clone(),
                dtype: e.dtype.to_string(),
                shape: e.shape.clone(),
                elements: e.numel(),
                bytes: e.bytes(),
                buffer,
            }
        });
        let tensors = tensors.collect();
        Inspection {
            path: self.path().display().to_string(),
            file_bytes: self.file_bytes(),
            header_bytes: self.header_bytes(),
            parameters,
            buffers,
            dtypes,
            metadata: self.metadata().clone(),
            tensors,
        }
    }
}

impl fmt::Display for Inspection {
    /// A table with a line for each tensor and the totals below.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rows: Vec<(String, String)> = self
            .tensors
            .iter()
            .map(|t| (clip(&t.name, 100), clip(&format!("{:?}", t.shape), 60)))
            .collect();
        let name_width = rows
            .iter()
            .map(|r| r.0.chars().count())
            .max()
            .unwrap_or(0)
            .max(6);
        let shape_width = rows.iter().map(|r| r.1.len()).max().unwrap_or(0).max(5);
        writeln!(
            f,
            "{:name_width$}  {:6}  {:shape_width$}  {:>12}",
            "tensor", "dtype", "shape", "elements"
        )?;
        for ((name, shape), t) in rows.iter().zip(&self.tensors) {
            writeln!(
                f,
                "{name:name_width$}  {:6}  {shape:shape_width$}  {:>12}",
                t.dtype, t.elements
            )?;
        }
        writeln!(f)?;
        for (dtype, t) in &self.dtypes {
            writeln!(
                f,
                "{dtype:6}  {} tensors, {} elements, {} bytes",
                t.tensors, t.elements, t.bytes
            )?;
        }
        for (key, value) in &self.metadata {
            writeln!(f, "metadata {}: {}", clip(key, 60), clip(value, 200))?;
        }
        writeln!(
            f,
            "{} tensors, {} parameters, {} elements of buffers, {} bytes",
            self.tensors.len(),
            self.parameters,
            self.buffers,
            self.file_bytes
        )
    }
}
