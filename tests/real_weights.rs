//! Pretrained CIFAR ResNets on real, lossless test images: as many right as PyTorch has.

use tilewright::backend;
use tilewright::data::{IMAGENET_MEAN, IMAGENET_STD, shared_dir};
use tilewright::models::find;
use tilewright::models::session::{Session, SessionOptions};
use tilewright::weights::WeightFile;

/// A record of the binary CIFAR-10 files: the label, then red, green and blue planes of 32x32.
const RECORD: usize = 1 + 3 * 1024;

fn right_on(backend: &str, model: &str, file: &str) -> Option<(usize, usize)> {
    use std::io::Read;
    let Some(shared) = shared_dir() else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "no ../shared");
        println!("skipped: no ../shared");
        return None;
    };
    let archive = shared.join("data/cifar-10-binary-excerpt.tar.gz");
    let archive = std::fs::File::open(archive).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(archive));
    let mut bytes = vec![];
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().ends_with("test_batch.bin") {
            entry.read_to_end(&mut bytes).unwrap();
        }
    }
    let weights = WeightFile::open(shared.join("weights").join(file)).unwrap();
    let batch = 64;
    let options = SessionOptions::new(batch, (32, 32));
    let backend = backend::open(backend).unwrap();
    let model = find(model).unwrap();
    let mut session = Session::open(backend.as_ref(), &model, Some(&weights), &options).unwrap();
    let (mut right, mut seen) = (0, 0);
    for records in bytes.chunks(batch * RECORD) {
        let mut images = vec![0.0; batch * 3 * 1024];
        for (image, record) in images.chunks_mut(3 * 1024).zip(records.chunks(RECORD)) {
            for (i, v) in image.iter_mut().enumerate() {
                let (pixel, c) = (i / 3, i % 3);
                let level = f32::from(record[1 + c * 1024 + pixel]) / 255.0;
                *v = (level - IMAGENET_MEAN[c]) / IMAGENET_STD[c];
            }
        }
        let logits = session.run(&images).unwrap();
        for (row, record) in logits.chunks(10).zip(records.chunks(RECORD)) {
            let best = (0..10).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            right += usize::from(best == usize::from(record[0]));
            seen += 1;
        }
    }
    Some((right, seen))
}

#[test]
fn resnet20_and_32_classify_the_lossless_test_images_as_pytorch_does() {
    for (model, file, want) in [
        ("resnet20", "resnet20-12fca82f.safetensors", 698usize),
        ("resnet32", "resnet32-d509ac18.safetensors", 709),
    ] {
        let Some((right, seen)) = right_on("cpu", model, file) else {
            return;
        };
        println!("{model}: {right} of {seen}");
        assert_eq!(seen, 761);
        assert!(
            right.abs_diff(want) <= 1,
            "{model}: {right} right, {want} wanted"
        );
    }
}
