//! Readers of foreign bytes against random bytes, cuts and mutations: an answer or an error, never a panic.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

fn seeds() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data/fixtures");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    let known = ["jpg", "pickle"];
    paths.retain(|p| known.contains(&p.extension().and_then(|e| e.to_str()).unwrap_or_default()));
    let mut files: Vec<Vec<u8>> = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
    let image = image::DynamicImage::from(image::RgbaImage::from_fn(9, 7, |x, y| {
        image::Rgba([x as u8 * 20, y as u8 * 30, 3, 200])
    }));
    for format in ["png", "bmp", "gif", "webp", "tiff", "pam"] {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image
            .write_to(
                &mut bytes,
                image::ImageFormat::from_extension(format).unwrap(),
            )
            .unwrap();
        files.push(bytes.into_inner());
    }
    files
}

fn read_all(bytes: &[u8]) {
    let _ = decode(bytes);
    for kind in [cifar::Kind::Ten, cifar::Kind::Hundred] {
        let _ = cifar::parse_python(kind, bytes);
        let _ = cifar::parse_binary(kind, bytes);
    }
    let text = String::from_utf8_lossy(bytes);
    let _ = folder::parse_words(&text);
    let _ = folder::parse_annotations(&text, &HashMap::from([("n01", 0)]));
    let _ = text.parse::<Spec>();
    let _ = text.parse::<PerClass>();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        read_all(&bytes);
    }

    #[test]
    fn random_pickles(ops in proptest::collection::vec(prop::sample::select(b".()0125NKMJGUCTXB]}ltdaesupqrghjcRb\x80\x85\x86\x87\x88\x89\x8a\x8c\x8e\x93\x94\x95\x00\x01\x02\x03".to_vec()), 0..60)) {
        let _ = pickle::parse(&ops);
    }

    #[test]
    fn mutations_of_good_files(
        which in any::<prop::sample::Index>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let files = seeds();
        let mut bytes = which.get(&files).clone();
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        for (at, value) in edits {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        read_all(&bytes);
    }

    #[test]
    fn mutations_of_an_archive(
        cut in prop::option::of(any::<prop::sample::Index>()),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        packed in any::<bool>(),
    ) {
        let mut tar = tar::Builder::new(Vec::new());
        for name in ["cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-bin/test_batch.bin"] {
            let mut header = tar::Header::new_gnu();
            header.set_size(3073);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, &[5u8; 3073][..]).unwrap();
        }
        let mut bytes = tar.into_inner().unwrap();
        let gzip = |bytes: &[u8]| {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut gz, bytes).unwrap();
            gz.finish().unwrap()
        };
        if packed {
            bytes = gzip(&bytes);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        for (at, value) in edits {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        if !packed {
            bytes = gzip(&bytes);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let _ = cifar::open(cifar::Kind::Ten, file.path());
    }
}
