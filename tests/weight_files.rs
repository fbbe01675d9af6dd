//! Weight files, whole and damaged: what is written is read back bit for bit, and nothing that a disk, a download
//! or a wrong argument can do to a file leads to more than a clear error.

use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;
use tilewright::Error;
use tilewright::weights::{FloatFormat, SaveTensor, WeightFile, save};

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

/// Opens `bytes`; where they are refused, the message must be fit for a person.
fn open(bytes: &[u8]) -> Result<WeightFile, String> {
    WeightFile::from_bytes("w.safetensors", bytes.to_vec()).map_err(|e| {
        assert!(matches!(e, Error::Input(_)), "{e:?}");
        let text = e.to_string();
        assert!(text.starts_with("w.safetensors "), "{text}");
        assert!(
            text.chars().count() < 500 && text.lines().count() <= 2,
            "{text}"
        );
        assert!(!text.chars().any(|c| c.is_control()), "{text:?}");
        text
    })
}

/// Opens `bytes` and reads everything, held against the safetensors crate: what we accept it accepts, with the same
/// data; what it accepts we accept, except a name given twice and more than 64 dimensions.
fn check(bytes: &[u8]) {
    let theirs = SafeTensors::deserialize(bytes);
    let ours = match open(bytes) {
        Ok(f) => f,
        Err(e) => {
            let stricter = e.contains("is there twice") || e.contains("dimensions (at most");
            assert!(theirs.is_err() || stricter, "only we refuse: {e}");
            return;
        }
    };
    let theirs = theirs.unwrap_or_else(|e| panic!("only we accept: {e}"));
    assert_eq!(ours.entries().len(), theirs.len());
    for e in ours.entries() {
        let view = theirs.tensor(&e.name).unwrap();
        assert_eq!((e.dtype, &e.shape[..]), (view.dtype(), view.shape()));
        assert_eq!(ours.raw(&e.name).unwrap(), view.data());
        assert_eq!(e.bytes(), e.numel() * e.dtype.bitsize() / 8);
        match ours.read_f32(&e.name) {
            Ok(values) => assert_eq!(values.len(), e.numel()),
            Err(why) => assert!(
                !e.is_float() || why.to_string().contains("beyond float32"),
                "{why}"
            ),
        }
        match ours.read_i64(&e.name) {
            Ok(values) => assert_eq!(values.len(), e.numel()),
            Err(why) => assert!(
                !e.is_integer() || why.to_string().contains("beyond a signed"),
                "{why}"
            ),
        }
    }
    assert!(!ours.inspect().to_string().is_empty());
}

#[test]
fn every_file_of_the_corpus_gets_its_message() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/safetensors");
    let expected = std::fs::read_to_string(dir.join("EXPECTED")).unwrap();
    let expected: BTreeMap<&str, &str> = expected
        .lines()
        .map(|l| l.split_once(": ").unwrap())
        .collect();
    let mut seen = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name == "EXPECTED" {
            continue;
        }
        let phrase = expected
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not in EXPECTED"));
        match WeightFile::open(&path) {
            Ok(_) => assert_eq!(*phrase, "whole", "{name}"),
            Err(e) => assert!(e.to_string().contains(phrase), "{name}: {e}"),
        }
        check(&std::fs::read(&path).unwrap());
        seen += 1;
    }
    assert_eq!(seen, expected.len());
}

#[test]
fn what_is_no_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let message = |p: &Path| WeightFile::open(p).unwrap_err().to_string();
    let missing = dir.path().join("no.safetensors");
    assert!(message(&missing).starts_with(&format!("cannot read {}: ", missing.display())));
    assert!(message(dir.path()).contains("is a folder"));
    let empty = dir.path().join("empty.safetensors");
    std::fs::write(&empty, "").unwrap();
    assert!(message(&empty).contains("is empty"));
    #[cfg(unix)]
    assert!(message(Path::new("/dev/zero")).contains("not a regular file"));
}

/// A length in front of nothing must not be believed: the refusal is immediate and allocates nothing.
#[test]
fn a_huge_header_length_is_not_allocated() {
    for length in [100_000_000u64, 100_000_001, 1 << 40, u64::MAX - 7, u64::MAX] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(b"{}      ");
        assert!(open(&bytes).is_err(), "{length}");
    }
}

#[test]
fn every_prefix_of_a_file_is_refused() {
    let whole = sample();
    check(&whole);
    for n in 0..whole.len() {
        assert!(open(&whole[..n]).is_err(), "{n} of {} bytes", whole.len());
    }
}

/// A small file with each kind of tensor.
fn sample() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.safetensors");
    let tensors = [
        SaveTensor::f32(
            "layer1.0.conv1.weight",
            &[2, 1, 3, 3],
            (0..18).map(|i| i as f32 - 9.5).collect::<Vec<_>>(),
        ),
        SaveTensor::f32("bn1.running_var", &[2], vec![1.0, f32::MIN_POSITIVE]),
        SaveTensor::f32("none", &[0, 4], vec![]),
        SaveTensor::f32("scale", &[], vec![f32::NEG_INFINITY]),
        SaveTensor::i64("bn1.num_batches_tracked", &[], vec![i64::MIN]),
    ];
    save(&path, &tensors, &BTreeMap::new(), FloatFormat::F32).unwrap();
    std::fs::read(&path).unwrap()
}

#[test]
fn reads_what_pytorch_wrote() {
    let Some(dir) = tilewright::data::shared_dir() else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "no ../shared");
        println!("skipped: no ../shared");
        return;
    };
    let f = WeightFile::open(dir.join("weights/resnet20-12fca82f.safetensors")).unwrap();
    assert_eq!(f.metadata().get("format").map(String::as_str), Some("pt"));
    assert_eq!(f.entry("conv1.weight").unwrap().shape, [16, 3, 3, 3]);
    let sum = |v: Vec<f32>| v.iter().map(|&x| f64::from(x)).sum::<f64>();
    // torch: state["conv1.weight"].double().sum(), and likewise below.
    assert!((sum(f.read_f32("conv1.weight").unwrap()) - CONV1_SUM).abs() < 1e-9);
    assert_eq!(f.inspect().parameters, 269_722);
    let f = WeightFile::open(dir.join("weights/dinov2-small-f16.safetensors")).unwrap();
    assert_eq!(
        f.entry("embeddings.position_embeddings").unwrap().dtype,
        Dtype::F16
    );
    let v = f.read_f32("embeddings.position_embeddings").unwrap();
    assert_eq!(v.len(), 1370 * 384);
    assert!((sum(v) - POSITION_SUM).abs() < 1e-9);
    let e = f.read_i64("embeddings.cls_token").unwrap_err().to_string();
    assert!(
        e.contains("(F16 [1, 1, 384]) is not of an integer dtype"),
        "{e}"
    );
    let e = f.entry("head.weight").unwrap_err().to_string();
    assert!(e.contains("has no tensor `head.weight`"), "{e}");
}
const CONV1_SUM: f64 = 1.3100982000032673;
const POSITION_SUM: f64 = 42.892539501190186;

#[test]
fn other_dtypes_convert_or_say_why_not() {
    let header = r#"{"a":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},"u":{"dtype":"U64","shape":[1],"data_offsets":[16,24]},"b":{"dtype":"BOOL","shape":[3],"data_offsets":[24,27]},"q":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[27,28]},"i":{"dtype":"I32","shape":[1],"data_offsets":[28,32]}}"#;
    let mut data = [
        1.5f64.to_le_bytes(),
        0.1f64.to_le_bytes(),
        u64::MAX.to_le_bytes(),
    ]
    .concat();
    data.extend([1, 0, 255, 7]);
    data.extend((-5i32).to_le_bytes());
    let f = open(&file(header, &data)).unwrap();
    assert_eq!(f.read_f32("a").unwrap(), [1.5, 0.1]);
    assert_eq!(f.read_i64("b").unwrap(), [1, 0, 1]);
    assert_eq!(f.read_i64("i").unwrap(), [-5]);
    let e = f.read_i64("u").unwrap_err().to_string();
    assert!(e.contains("holds 18446744073709551615 at index 0"), "{e}");
    let e = f.read_f32("q").unwrap_err().to_string();
    assert!(
        e.contains("tensor `q` (F8_E4M3 [1]) cannot be read as float32"),
        "{e}"
    );
    let mut short = [0.0];
    let e = f.read_f32_into("a", &mut short).unwrap_err().to_string();
    assert!(e.contains("has 2 elements, 1 are wanted"), "{e}");

    data[..8].copy_from_slice(&1e300f64.to_le_bytes());
    let e = open(&file(header, &data))
        .unwrap()
        .read_f32("a")
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("holds 1e300 at index 0, beyond float32's range"),
        "{e}"
    );
}

/// The same bytes as the format's own writer makes.
#[test]
fn writes_what_the_safetensors_crate_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let (b, a, n) = ([1.0f32, -2.0], [0.5f32; 6], [7i64]);
    let tensors = [
        SaveTensor::f32("b", &[2], &b[..]),
        SaveTensor::f32("a", &[2, 3], &a[..]),
        SaveTensor::i64("n", &[], &n[..]),
    ];
    save(&path, &tensors, &BTreeMap::new(), FloatFormat::F32).unwrap();
    let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (b, a, n) = (bytes(&b), bytes(&a), n[0].to_le_bytes());
    let view = |dtype, shape: &[usize], data| {
        safetensors::tensor::TensorView::new(dtype, shape.to_vec(), data).unwrap()
    };
    let views = [
        ("b", view(Dtype::F32, &[2], &b)),
        ("a", view(Dtype::F32, &[2, 3], &a)),
        ("n", view(Dtype::I64, &[], &n)),
    ];
    let format = [("format".to_string(), "pt".to_string())].into();
    assert_eq!(
        std::fs::read(&path).unwrap(),
        safetensors::serialize(views, Some(format)).unwrap()
    );
}

#[test]
fn saving_refuses_what_would_not_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    std::fs::write(&path, "before").unwrap();
    let refused = |tensors: &[SaveTensor], floats, phrase: &str| {
        let e = save(&path, tensors, &BTreeMap::new(), floats)
            .unwrap_err()
            .to_string();
        assert!(e.contains(phrase), "{e}");
    };
    let one = |name: &'static str, shape: &[usize], v: f32| SaveTensor::f32(name, shape, vec![v]);
    refused(
        &[one("a", &[2], 1.0)],
        FloatFormat::F32,
        "tensor `a` of shape [2] has 1 elements",
    );
    refused(
        &[one("a", &[usize::MAX, 2], 1.0)],
        FloatFormat::F32,
        "has 1 elements",
    );
    refused(
        &[one("a", &[], 1.0), one("a", &[1], 1.0)],
        FloatFormat::F32,
        "`a` is there twice",
    );
    refused(
        &[one("__metadata__", &[], 1.0)],
        FloatFormat::F32,
        "reserved",
    );
    refused(
        &[one("a", &[], 65520.0)],
        FloatFormat::F16,
        "holds 6.552e4 at index 0, beyond F16's range; save as f32",
    );
    refused(
        &[one("a", &[], f32::MAX)],
        FloatFormat::BF16,
        "beyond BF16's range",
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "a temporary file stayed"
    );
    let nowhere = dir.path().join("no/w.safetensors");
    let e = save(&nowhere, &[], &BTreeMap::new(), FloatFormat::F32).unwrap_err();
    assert!(
        matches!(&e, Error::Run(m) if m.contains("no/w.safetensors")),
        "{e}"
    );
}

/// A valid header for random tensors, then damaged in one number, dtype or key.
fn damaged_header() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        0u64..40,
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 32),
        Just((1 << 61) + 1),
        any::<u64>(),
    ];
    let dtype = prop::sample::select(vec![
        "F32", "F16", "BF16", "F64", "I64", "BOOL", "F4", "F6_E2M3", "C64", "U64", "Q4",
    ]);
    let tensor = (
        dtype,
        prop::collection::vec(number.clone(), 0..4),
        number.clone(),
        number,
        any::<[bool; 3]>(),
    );
    (
        prop::collection::vec(("[a-c]", tensor), 0..4),
        prop::collection::vec(any::<u8>(), 0..64),
    )
        .prop_map(|(tensors, data)| {
            let mut begin = 0u64;
            let mut parts = Vec::new();
            for (name, (dtype, shape, b, e, damage)) in tensors {
                // Mostly small shapes and true offsets, so that some files are whole and the damage is met alone.
                let shape: Vec<u64> = if damage[0] {
                    shape
                } else {
                    shape.iter().map(|d| d % 3).collect()
                };
                let bits = match dtype {
                    "F4" => 4,
                    "F6_E2M3" => 6,
                    "BOOL" => 8,
                    "F16" | "BF16" => 16,
                    "F32" => 32,
                    _ => 64,
                };
                let size = shape.iter().fold(bits, |n: u64, &d| n.wrapping_mul(d)) / 8;
                let (b, e) = if damage[1] && damage[2] {
                    (b, e)
                } else {
                    (begin, begin.wrapping_add(size))
                };
                parts.push(format!(
                    r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{b},{e}]}}"#
                ));
                begin = e;
            }
            let data: Vec<u8> = if begin < 64 {
                data.iter()
                    .copied()
                    .cycle()
                    .chain([0; 64])
                    .take(begin as usize)
                    .collect()
            } else {
                data
            };
            file(&format!("{{{}}}", parts.join(",")), &data)
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(1000), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check(&bytes);
    }

    /// A believable length, so that the JSON is reached.
    #[test]
    fn random_json_never_panics(text in r#"[{}\[\]",:0-9a-cF_ \\u-]{0,60}"#, data in prop::collection::vec(any::<u8>(), 0..16)) {
        check(&file(&text, &data));
        check(&file(&format!("{{\"a\":{text}}}"), &data));
    }

    #[test]
    fn flipped_bits_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4)) {
        let mut bytes = sample();
        for (at, bit) in flips {
            let i = at.index(bytes.len());
            bytes[i] ^= 1 << bit;
        }
        check(&bytes);
    }

    #[test]
    fn cut_and_spliced_files_never_panic(from in any::<prop::sample::Index>(), n in 0usize..64, with in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut bytes = sample();
        let from = from.index(bytes.len());
        let to = (from + n).min(bytes.len());
        bytes.splice(from..to, with);
        check(&bytes);
    }

    #[test]
    fn damaged_headers_never_panic(bytes in damaged_header()) {
        check(&bytes);
    }

    /// Any bits, NaN payloads included, in any number of tensors with any names.
    #[test]
    fn float32_round_trips_bit_for_bit(tensors in prop::collection::btree_map("\\PC{0,12}", prop::collection::vec(any::<u32>(), 0..20), 0..6)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let list: Vec<SaveTensor> = tensors
            .iter()
            .map(|(k, v)| SaveTensor::f32(k.as_str(), &[v.len()], v.iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>()))
            .collect();
        let metadata = [("seed".to_string(), "0\n\"\u{7f}".to_string())].into();
        save(&path, &list, &metadata, FloatFormat::F32).unwrap();
        let f = WeightFile::open(&path).unwrap();
        prop_assert_eq!(f.metadata().get("seed"), metadata.get("seed"));
        prop_assert_eq!(f.entries().len(), tensors.len());
        for (k, v) in &tensors {
            let read: Vec<u32> = f.read_f32(k).unwrap().iter().map(|x| x.to_bits()).collect();
            prop_assert_eq!(&read, v);
        }
        check(&std::fs::read(&path).unwrap());
    }
}

/// Every half-precision value there is: read to float32, written back, the same bits.
#[test]
fn half_precision_round_trips_bit_for_bit() {
    for (dtype, floats) in [("F16", FloatFormat::F16), ("BF16", FloatFormat::BF16)] {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let header =
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":[65536],"data_offsets":[0,131072]}}}}"#);
        let values = open(&file(&header, &all)).unwrap().read_f32("a").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        save(
            &path,
            &[SaveTensor::f32("a", &[65536], &values[..])],
            &BTreeMap::new(),
            floats,
        )
        .unwrap();
        let f = WeightFile::open(&path).unwrap();
        for (i, (was, is)) in all
            .as_chunks::<2>()
            .0
            .iter()
            .zip(f.raw("a").unwrap().as_chunks::<2>().0)
            .enumerate()
        {
            // A signalling NaN may come back quiet.
            assert!(
                was == is || values[i].is_nan(),
                "{dtype} {i:04x}: {was:?} {is:?}"
            );
        }
    }
}
