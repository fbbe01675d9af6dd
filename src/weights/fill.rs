//! The deterministic fill: every parameter is a pure function of its name and shape, so that this program and
//! PyTorch can hold bit-identical weights without shipping any.
//!
//! `seed(name)` is FNV-1a (64 bit) of the name, element `i` takes splitmix64's output `i` from that seed, its top 24
//! bits give `u` in [-1, 1), and the leaf of the name sets the scale ([`fill`]). All in float64, rounded once.

use super::naming::relative_position_index;
use super::save::{FloatFormat, SaveTensor, save};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// FNV-1a, 64 bit.
fn fnv1a64(name: &str) -> u64 {
    name.bytes().fold(0xcbf29ce484222325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100000001b3)
    })
}

/// The stream of 64-bit words of `name`: splitmix64 seeded with its hash.
fn bits(name: &str) -> impl Iterator<Item = u64> {
    let mut state = fnv1a64(name);
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9E3779B97F4A7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        z ^ (z >> 31)
    })
}

/// Values in [-1, 1) with 24 bits each, exact in float32.
fn uniform(name: &str) -> impl Iterator<Item = f64> {
    bits(name).map(|b| (b >> 40) as f64 * (1.0 / (1u64 << 23) as f64) - 1.0)
}

/// The values of the parameter or buffer `name` of shape `shape` (the state dict's own axis order), row-major.
///
/// With `u` uniform in [-1, 1) and the leaf being the text after the last dot: `...weight` of two or more dimensions
/// is sqrt(3 / fan_in) u, of one 1 + 0.1 u; `...bias` and `running_mean` 0.1 u; `running_var` 1 + 0.5 |u|; all
/// others (tokens, position tables, layer scales) 0.02 u.
pub fn fill(name: &str, shape: &[usize]) -> Vec<f32> {
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let fan_in = || shape[1..].iter().map(|&d| d as f64).product::<f64>();
    let (offset, scale) = match leaf {
        _ if leaf.ends_with("weight") && shape.len() >= 2 => (0.0, (3.0 / fan_in()).sqrt()),
        _ if leaf.ends_with("weight") => (1.0, 0.1),
        _ if leaf.ends_with("bias") || leaf == "running_mean" => (0.0, 0.1),
        "running_var" => (1.0, 0.5),
        _ => (0.0, 0.02),
    };
    let absolute = leaf == "running_var";
    let value = |u: f64| (offset + scale * if absolute { u.abs() } else { u }) as f32;
    uniform(name)
        .take(shape.iter().product())
        .map(value)
        .collect()
}

/// The test image batch of shape `shape` (`[N, C, H, W]`, row-major): uniform in [-1, 1).
pub fn image(shape: &[usize]) -> Vec<f32> {
    uniform("input")
        .take(shape.iter().product())
        .map(|u| u as f32)
        .collect()
}

/// `n` test labels in `0..classes`.
pub fn labels(n: usize, classes: usize) -> Vec<i64> {
    bits("labels")
        .take(n)
        .map(|b| ((b >> 40) % classes as u64) as i64)
        .collect()
}

/// The probe vector of `name`: a gradient's dot product with it tells a permuted or transposed gradient, whose norm
/// is right.
pub fn probe(name: &str, n: usize) -> Vec<f64> {
    uniform(&format!("probe:{name}")).take(n).collect()
}

/// Writes the filled weight file of the network whose state dict `names` lists, a line an entry: name, tab, shape
/// (`64x3x7x7` or `scalar`), tab, dtype (`float32`, `int64`).
///
/// # Errors
/// [`Error::Input`] naming the list and line where it cannot be read; as [`save`] for the output.
pub fn write_filled(names: &Path, output: &Path) -> Result<()> {
    let list = std::fs::read_to_string(names).map_err(|e| Error::reading(names, e))?;
    let tensors = list.lines().enumerate().map(|(i, line)| {
        filled_tensor(line).ok_or_else(|| {
            Error::input(format!(
                "{} line {}: no name, shape and dtype",
                names.display(),
                i + 1
            ))
        })
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    save(output, &tensors, &BTreeMap::new(), FloatFormat::F32)
}

fn filled_tensor(line: &str) -> Option<SaveTensor<'_>> {
    let mut columns = line.split('\t');
    let (name, dims, dtype) = (columns.next()?, columns.next()?, columns.next()?);
    let shape: Vec<usize> = match dims {
        "scalar" => Vec::new(),
        _ => dims
            .split('x')
            .map(|d| d.parse().ok())
            .collect::<Option<_>>()?,
    };
    match dtype {
        "float32" => Some(SaveTensor::f32(name, &shape, fill(name, &shape))),
        "int64" if name.ends_with("relative_position_index") => {
            // [T, T] of Hugging Face, [T * T] of torchvision.
            let cells: usize = shape.iter().product();
            let index = relative_position_index(cells.isqrt().isqrt());
            Some(SaveTensor::i64(name, &shape, index))
        }
        "int64" => Some(SaveTensor::i64(
            name,
            &shape,
            vec![0; shape.iter().product()],
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::WeightFile;
    use serde_json::Value;

    fn vectors() -> Option<Value> {
        let Some(dir) = crate::data::shared_dir() else {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "no ../shared");
            println!("skipped: no ../shared");
            return None;
        };
        let text = std::fs::read_to_string(dir.join("golden/fill_vectors.json")).unwrap();
        Some(serde_json::from_str(&text).unwrap())
    }

    /// Values, first bits and sums as the recorded ones: `values` against an entry of the vectors.
    fn same(case: &Value, values: &[f32]) {
        let hex = case["first4_f32_hex"].as_array().unwrap();
        for (v, h) in values.iter().zip(hex) {
            assert_eq!(
                format!("{:08x}", v.to_bits()),
                h.as_str().unwrap(),
                "{case}"
            );
        }
        let last = case["last2"].as_array().unwrap();
        for (v, l) in values[values.len() - 2..].iter().zip(last) {
            assert_eq!(*v, l.as_f64().unwrap() as f32, "{case}");
        }
        let (sum, l2) = values.iter().fold((0.0, 0.0), |(s, q), &v| {
            (s + f64::from(v), q + f64::from(v).powi(2))
        });
        assert!(
            (sum - case["sum"].as_f64().unwrap()).abs() < 1e-6,
            "{case}: sum {sum}"
        );
        assert!(
            (l2.sqrt() - case["l2"].as_f64().unwrap()).abs() < 1e-9 * l2.sqrt(),
            "{case}: l2"
        );
    }

    #[test]
    fn agrees_with_the_recorded_vectors() {
        let Some(v) = vectors() else { return };
        for (name, hash) in v["fnv1a64"].as_object().unwrap() {
            assert_eq!(format!("{:016x}", fnv1a64(name)), hash.as_str().unwrap());
        }
        for (name, words) in v["bits"].as_object().unwrap() {
            let ours: Vec<String> = bits(name).take(4).map(|b| format!("{b:016x}")).collect();
            assert_eq!(Value::from(ours), *words);
        }
        for (name, values) in v["uniform"].as_object().unwrap() {
            // Exact in float32; serde_json's own parse may be off by the last bit of float64.
            let recorded: Vec<f32> = serde_json::from_value(values.clone()).unwrap();
            let ours: Vec<f32> = uniform(name).take(4).map(|u| u as f32).collect();
            assert_eq!(ours, recorded);
        }
        assert_eq!(Value::from(labels(16, 1000)), v["labels_mod_1000"]);
        assert_eq!(Value::from(labels(16, 10)), v["labels_mod_10"]);
        for case in v["fill"].as_array().unwrap() {
            let shape: Vec<usize> = serde_json::from_value(case["shape"].clone()).unwrap();
            same(case, &fill(case["name"].as_str().unwrap(), &shape));
        }
        same(&v["image_2x3x224x224"], &image(&[2, 3, 224, 224]));
    }

    #[test]
    fn a_probe_is_the_prefixed_stream() {
        assert_eq!(
            probe("fc.bias", 3),
            uniform("probe:fc.bias").take(3).collect::<Vec<_>>()
        );
    }

    #[test]
    fn filled_files_hold_the_recorded_norms() {
        if vectors().is_none() {
            return;
        }
        let golden = crate::data::shared_dir().unwrap().join("golden");
        let out = tempfile::tempdir().unwrap();
        for model in ["resnet18", "cnn_r14", "vit_p4_e128_d6"] {
            let path = out.path().join("filled.safetensors");
            write_filled(&golden.join(format!("names/{model}.txt")), &path).unwrap();
            let json = std::fs::read_to_string(golden.join(format!("{model}.json"))).unwrap();
            let json: Value = serde_json::from_str(&json).unwrap();
            let file = WeightFile::open(&path).unwrap();
            assert_eq!(Value::from(file.entries().len()), json["num_state_tensors"]);
            assert_eq!(
                Value::from(file.inspect().parameters),
                json["num_parameters"]
            );
            let floats = file.entries().iter().filter(|e| e.is_float());
            let sum: f64 = floats
                .flat_map(|e| file.read_f32(&e.name).unwrap())
                .map(|v| f64::from(v).powi(2))
                .sum();
            let l2 = json["fill_check"]["l2_of_float_state"].as_f64().unwrap();
            assert!(
                (sum.sqrt() - l2).abs() < 1e-5,
                "{model}: {} against {l2}",
                sum.sqrt()
            );
        }
    }

    /// Window 2, worked by hand: offsets (0..=2) * 3 + (0..=2), the diagonal in the middle.
    #[test]
    fn relative_position_index_of_a_small_window() {
        let expected = [4, 3, 1, 0, 5, 4, 2, 1, 7, 6, 4, 3, 8, 7, 5, 4];
        assert_eq!(relative_position_index(2), expected);
    }

    #[test]
    fn a_bad_list_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("names.txt");
        std::fs::write(&list, "a\t2x2\tfloat32\nb\t2xx\tfloat32\n").unwrap();
        let e = write_filled(&list, &dir.path().join("out")).unwrap_err();
        assert!(
            e.to_string()
                .ends_with("names.txt line 2: no name, shape and dtype"),
            "{e}"
        );
    }
}
