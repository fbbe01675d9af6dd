//! The header of a safetensors file, checked in full before any tensor is touched.
//!
//! Layout (<https://huggingface.co/docs/safetensors>): 8 bytes little-endian header length `n`, `n` bytes of JSON
//! (`{"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {..}}`, padded with spaces),
//! then the data. The offsets count from the end of the header and must tile the data without gap or overlap.
//!
//! The `safetensors` crate checks the same rules, but its errors name neither the tensor nor the sizes, and a
//! repeated name passes; the tests hold this parser to that crate's verdicts.

use super::file::Entry;
use super::mistaken::recognise;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{Deserializer, Error as _, IntoDeserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// Longest header read: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions a tensor may have: what NumPy and PyTorch's iterators take.
const MAX_RANK: usize = 64;
/// Bytes before the header: its length.
pub(super) const PREFIX: usize = 8;

/// A checked header: every range of every entry lies inside the file and fits its shape and dtype.
pub(super) struct Header {
    /// In the header's order, ranges counted from the start of the file.
    pub entries: Vec<Entry>,
    pub metadata: BTreeMap<String, String>,
    /// Bytes of JSON, padding included.
    pub json_bytes: usize,
}

/// Reads and checks the header of the file whose bytes are `file`.
///
/// # Errors
/// What is wrong, as the rest of a sentence that begins with the file's name ("is empty ...").
pub(super) fn parse(file: &[u8]) -> Result<Header, String> {
    let json = match header_json(file) {
        Ok(json) => json,
        Err(why) => return Err(recognise(file).unwrap_or(why)),
    };
    let raw = parse_json(json)?;
    let start = PREFIX + json.len();
    let (entries, data_bytes) = place(raw.tensors, start)?;
    let wanted = start as u128 + data_bytes as u128;
    let found = file.len() as u128;
    if found < wanted {
        return Err(format!(
            "is truncated: its header wants {wanted} bytes, the file has {found}; download or copy it again"
        ));
    }
    if found > wanted {
        return Err(format!(
            "has {} bytes more than its header describes ({found}, not {wanted}); it is damaged or not plain \
             safetensors",
            found - wanted
        ));
    }
    Ok(Header {
        entries,
        metadata: raw.metadata,
        json_bytes: json.len(),
    })
}

/// The header's JSON text, cut out by the length in front of it.
fn header_json(file: &[u8]) -> Result<&str, String> {
    if file.is_empty() {
        return Err("is empty (0 bytes); download or copy it again".into());
    }
    let size = file.len();
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return Err(format!(
            "is {size} bytes long; a safetensors file begins with 8 bytes of header length"
        ));
    };
    let length = u64::from_le_bytes(*prefix);
    let looks_like_json = rest
        .first()
        .is_none_or(|&b| b == b'{' || b.is_ascii_whitespace());
    if length > MAX_HEADER {
        let swapped = u64::from_be_bytes(*prefix);
        if swapped <= rest.len() as u64 && swapped <= MAX_HEADER && rest.first() == Some(&b'{') {
            return Err(format!(
                "looks big-endian: its header length is {swapped} read backwards, {length} as the format has it; \
                 write it again with a little-endian length and data"
            ));
        }
        return Err(format!(
            "is not a safetensors file: its first 8 bytes announce a header of {length} bytes (at most {MAX_HEADER})"
        ));
    }
    if length < 2 {
        let why = if file.iter().take(4096).all(|&b| b == 0) {
            "it begins with zeros only, as an interrupted download does; download it again".into()
        } else {
            format!("its header length is {length}")
        };
        return Err(format!("is not a safetensors file: {why}"));
    }
    let Some(json) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
        let wanted = length + PREFIX as u64;
        return Err(if looks_like_json {
            format!(
                "is truncated: its header alone wants {wanted} bytes, the file has {size}; download or copy it again"
            )
        } else {
            format!(
                "is not a safetensors file: its first 8 bytes announce a header of {length} bytes, the file has {size}"
            )
        });
    };
    if !looks_like_json {
        return Err(
            "is not a safetensors file: its header is not JSON (it does not begin with `{`)".into(),
        );
    }
    std::str::from_utf8(json).map_err(|e| {
        format!(
            "has a damaged header: not UTF-8 text at byte {}",
            PREFIX + e.valid_up_to()
        )
    })
}

/// One tensor as the header states it, nothing checked yet.
#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

#[derive(Default)]
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

fn parse_json(json: &str) -> Result<RawHeader, String> {
    serde_json::from_str(json)
        .map_err(|e| format!("has a damaged header: {}", clip(&e.to_string(), 240)))
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Keeps the header's order and refuses a name given twice, which a map type would swallow.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("{} is there twice", quote(&name))));
            }
            let at = |e: A::Error| A::Error::custom(format!("{}: {e}", quote(&name)));
            if name == "__metadata__" {
                header.metadata = map
                    .next_value::<Option<_>>()
                    .map_err(at)?
                    .unwrap_or_default();
            } else {
                let tensor = map.next_value().map_err(at)?;
                header.tensors.push((name, tensor));
            }
        }
        Ok(header)
    }
}

/// Checks dtype, shape and offsets of every tensor; entries with ranges from the start of the file, and the data's
/// length. `start` is where the data begins.
fn place(raw: Vec<(String, RawTensor)>, start: usize) -> Result<(Vec<Entry>, usize), String> {
    let mut order: Vec<usize> = (0..raw.len()).collect();
    order.sort_by_key(|&i| raw[i].1.data_offsets);
    let mut end_of_last = 0;
    let mut last = "";
    for &i in &order {
        let (name, t) = &raw[i];
        let (begin, end) = t.data_offsets;
        let bad = |what: String| format!("has a damaged header: tensor {} {what}", quote(name));
        let size = byte_size(&t.dtype, &t.shape).map_err(bad)?;
        if end < begin {
            return Err(bad(format!(
                "has data offsets [{begin}, {end}], which end before they begin"
            )));
        }
        if end - begin != size {
            return Err(bad(format!(
                "is {} {}, {size} bytes, but its data offsets [{begin}, {end}] hold {}",
                t.dtype,
                show_shape(&t.shape),
                end - begin
            )));
        }
        if begin < end_of_last {
            return Err(bad(format!(
                "overlaps {} by {} bytes",
                quote(last),
                end_of_last - begin
            )));
        }
        if begin > end_of_last {
            let gap = begin - end_of_last;
            return Err(bad(format!(
                "comes after a gap: the {gap} bytes before it belong to no tensor"
            )));
        }
        end_of_last = end;
        last = name;
    }
    if start.checked_add(end_of_last).is_none() {
        return Err("has a damaged header: its tensors are larger than the address space".into());
    }
    let entries = raw.into_iter().map(|(name, t)| {
        let (begin, end) = t.data_offsets;
        Ok(Entry {
            name,
            dtype: dtype(&t.dtype)?,
            shape: t.shape,
            range: start + begin..start + end,
        })
    });
    Ok((entries.collect::<Result<_, String>>()?, end_of_last))
}

fn dtype(name: &str) -> Result<Dtype, String> {
    let text: StrDeserializer<serde::de::value::Error> = name.into_deserializer();
    Dtype::deserialize(text).map_err(|_| {
        format!(
            "has dtype {}, which safetensors does not define",
            quote(name)
        )
    })
}

/// Bytes of a tensor of that dtype and shape.
fn byte_size(dtype_name: &str, shape: &[usize]) -> Result<usize, String> {
    let dtype = dtype(dtype_name)?;
    if shape.len() > MAX_RANK {
        return Err(format!(
            "has {} dimensions (at most {MAX_RANK})",
            shape.len()
        ));
    }
    let too_large = || {
        format!(
            "of shape {} is larger than the address space",
            show_shape(shape)
        )
    };
    let count = shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or_else(too_large)?;
    let bits = count.checked_mul(dtype.bitsize()).ok_or_else(too_large)?;
    if bits % 8 != 0 {
        return Err(format!(
            "of {dtype} {} does not fill whole bytes",
            show_shape(shape)
        ));
    }
    Ok(bits / 8)
}

/// `text` on one line, without control characters, at most `max` characters: whatever a damaged file holds, the
/// message stays readable.
pub(super) fn clip(text: &str, max: usize) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == max {
            out.push_str("...");
            break;
        }
        if c.is_control() || c == '\u{2028}' || c == '\u{2029}' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// A tensor's name for a message.
pub(super) fn quote(name: &str) -> String {
    format!("`{}`", clip(name, 80))
}

/// A shape for a message: `[64, 3, 7, 7]`.
pub(super) fn show_shape(shape: &[usize]) -> String {
    if shape.len() <= 8 {
        format!("{shape:?}")
    } else {
        let first: Vec<String> = shape[..8].iter().map(usize::to_string).collect();
        format!("[{}, ... {} dimensions]", first.join(", "), shape.len())
    }
}
