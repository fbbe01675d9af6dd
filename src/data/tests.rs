//! The data path from end to end, against PIL's and torchvision's answers and against broken input.

use super::*;
use std::fs;
use std::sync::Arc;

/// Pixels of a fixture; a PNG, so that the file is the truth.
fn fixture(name: &str) -> Rgb {
    decode_file(&fixtures().join(name)).unwrap()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data/fixtures")
}

/// `shared_dir`, or say that it is absent (with `CI=true` its absence is a failure).
fn shared() -> Option<PathBuf> {
    let found = shared_dir();
    if found.is_none() {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "../shared is absent"
        );
        println!("skipped: no ../shared");
    }
    found
}

fn save(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// An image file of one colour.
fn png(width: u32, height: u32, colour: [u8; 3]) -> Vec<u8> {
    encode(
        &image::RgbImage::from_pixel(width, height, image::Rgb(colour)).into(),
        image::ImageFormat::Png,
    )
}

fn encode(image: &image::DynamicImage, format: image::ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn refused(spec: &str) -> String {
    let e = open(spec, OpenOptions::default()).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    e.to_string()
}

#[test]
fn jpeg_decodes_to_pils_bits() {
    for name in ["420", "422", "progressive", "grey", "cmyk"] {
        assert!(
            fixture(&format!("{name}.jpg")) == fixture(&format!("{name}.png")),
            "{name}"
        );
    }
}

#[test]
fn resizing_matches_torchvision_within_one_level() {
    let source = fixture("source.png");
    let kinds = [
        ("nearest", Interpolation::Nearest),
        ("bilinear", Interpolation::Bilinear),
        ("bicubic", Interpolation::Bicubic),
    ];
    for (name, interpolation) in kinds {
        for (size, crop_ratio) in [(12, 0.875), (40, 1.0), (51, 0.9)] {
            let want = fixture(&format!("{name}{size}.png"));
            let p = Preprocess {
                interpolation,
                crop_ratio,
                ..Preprocess::new(size)
            };
            let mut got = vec![0; want.pixels.len()];
            preprocess::Squares::new(&p)
                .unwrap()
                .make(&source, &mut got)
                .unwrap();
            let worst = got
                .iter()
                .zip(&want.pixels)
                .map(|(a, b)| a.abs_diff(*b))
                .max()
                .unwrap();
            assert!(
                worst <= u8::from(name != "nearest"),
                "{name} {size}: differs by {worst}"
            );
        }
    }
}

#[test]
fn preprocessing_is_plain_arithmetic() {
    let p = Preprocess::new(2);
    let image = Rgb {
        width: 2,
        height: 2,
        pixels: (0..12).map(|v| v * 20).collect(),
    };
    let got = p.apply(&image).unwrap();
    assert_eq!(got[4], (80.0 / 255.0 - 0.456) / 0.224);
    assert_eq!(p.black()[0], (0.0 - 0.485) / 0.229);
    let refuse = |p: Preprocess| assert!(p.check().is_err(), "{p:?}");
    refuse(Preprocess { size: 0, ..p });
    refuse(Preprocess {
        crop_ratio: 0.0,
        ..p
    });
    refuse(Preprocess {
        crop_ratio: f32::NAN,
        ..p
    });
    refuse(Preprocess {
        std: [1.0, 0.0, 1.0],
        ..p
    });
    let strip = Rgb {
        width: 100_000,
        height: 1,
        pixels: vec![0; 300_000],
    };
    assert!(
        Preprocess::new(224)
            .apply(&strip)
            .unwrap_err()
            .to_string()
            .contains("100000x1")
    );
}

#[test]
fn every_colour_mode_becomes_rgb() {
    use image::{DynamicImage, ImageFormat as F};
    let of = |bytes: &[u8]| decode(bytes).unwrap().pixels[..3].to_vec();
    let grey16: DynamicImage =
        image::ImageBuffer::from_pixel(3, 2, image::Luma([0x8000u16])).into();
    assert_eq!(of(&encode(&grey16, F::Png)), [128; 3]);
    assert_eq!(of(&encode(&grey16, F::Tiff)), [128; 3]);
    let rgb16: DynamicImage =
        image::ImageBuffer::from_pixel(3, 2, image::Rgb([0u16, 65535, 257])).into();
    assert_eq!(of(&encode(&rgb16, F::Png)), [0, 255, 1]);
    let alpha: DynamicImage = image::RgbaImage::from_pixel(3, 2, image::Rgba([9, 8, 7, 0])).into();
    assert_eq!(
        of(&encode(&alpha, F::Png)),
        [9, 8, 7],
        "alpha is dropped, not blended"
    );
    assert_eq!(of(&encode(&alpha, F::WebP)), [9, 8, 7]);
    let grey_alpha: DynamicImage =
        image::GrayAlphaImage::from_pixel(3, 2, image::LumaA([5, 200])).into();
    assert_eq!(of(&encode(&grey_alpha, F::Png)), [5; 3]);
    let opaque: DynamicImage =
        image::RgbaImage::from_pixel(3, 2, image::Rgba([255, 0, 0, 255])).into();
    assert_eq!(of(&encode(&opaque, F::Gif)), [255, 0, 0], "palette");
    let rgb: DynamicImage = image::RgbImage::from_pixel(1, 1, image::Rgb([1, 2, 3])).into();
    for format in [F::Png, F::Bmp, F::Tiff, F::Pnm, F::WebP] {
        assert_eq!(of(&encode(&rgb, format)), [1, 2, 3], "{format:?}");
    }
    let one = Preprocess::new(4)
        .apply(&decode(&encode(&rgb, F::Png)).unwrap())
        .unwrap();
    assert_eq!(one.len(), 48, "a 1x1 image fills the square");
}

#[test]
fn broken_images_are_named_and_a_few_do_not_stop_a_run() {
    let jpeg = fs::read(fixtures().join("420.jpg")).unwrap();
    let says = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    assert!(says(b"").contains("empty"));
    assert!(says(b"this is no picture").contains("not an image"));
    for keep in [0.3, 0.6, 0.9] {
        let cut = &jpeg[..(jpeg.len() as f64 * keep) as usize];
        assert!(says(cut).starts_with("JPEG:"), "{keep}");
    }
    let whole = png(9, 9, [1, 2, 3]);
    assert!(says(&whole[..whole.len() / 2]).contains("Png"));

    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for i in 0..30 {
        let class = if i % 2 == 0 { "cat" } else { "dog" };
        save(
            &at(&format!("train/{class}/{i:02}.png")),
            &png(10 + i, 12, [i as u8; 3]),
        );
        save(
            &at(&format!("val/{class}/deep/er/{i:02}.bin")),
            &png(10, 12, [i as u8; 3]),
        );
    }
    save(
        &at("train/cat/.hidden.png"),
        b"hidden files are not looked at",
    );
    save(
        &at("train/cat/notes.txt"),
        b"nor are files that neither are called images nor are any",
    );
    save(&at("train/dog/05.png"), b"text in a file called .png");
    save(&at("train/dog/empty.jpg"), b"");
    save(&at("train/cat/cut.jpg"), &jpeg[..jpeg.len() / 2]);
    let spec = format!("folder:{}", dir.path().display());
    let sets = open(&spec, OpenOptions::default()).unwrap();
    assert_eq!(
        (sets.train.len(), sets.test.len(), sets.classes()),
        (32, 30, &["cat".into(), "dog".into()][..])
    );
    let options = PrepareOptions::default();
    let e = Images::prepare(&sets.train, sets.preprocess(8), options)
        .err()
        .unwrap()
        .to_string();
    assert!(
        e.contains("3 of 32")
            && e.contains("05.png")
            && e.contains("empty.jpg")
            && e.contains("cut.jpg"),
        "{e}"
    );
    // In memory they are dropped; decoded on demand they are skipped: the same images are left.
    let mut seen = Vec::new();
    for memory in [1 << 30, 0] {
        let options = PrepareOptions {
            memory,
            max_bad: MaxBad::Count(3),
        };
        let images = Arc::new(Images::prepare(&sets.train, sets.preprocess(8), options).unwrap());
        assert_eq!(images.in_memory(), memory > 0);
        let mut loader = Loader::new(images.clone(), LoaderOptions::eval(8)).unwrap();
        let mut epoch = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            epoch.extend(batch.indices[..batch.valid].to_vec());
        }
        seen.push(epoch);
        assert_eq!(images.bad().len(), 3);
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].len(), 29);
    let report = verify(&spec).unwrap();
    assert_eq!((report.train, report.test, report.bad.len()), (29, 30, 3));
    assert!(
        report.bad.iter().any(|b| b.contains("cut.jpg")),
        "{:?}",
        report.bad
    );
}

#[test]
fn bad_specs_and_folders_say_what_to_do() {
    for spec in ["mnist", "digits:3", "folder", "cifar10:", ""] {
        assert!(refused(spec).contains("tiny-imagenet[:DIR]"), "{spec}");
    }
    for spec in [
        "synthetic:10",
        "synthetic:0x32",
        "synthetic:10x",
        "synthetic:-1x8",
        "synthetic:10x9999",
    ] {
        assert!(refused(spec).contains("CLASSESxSIZE"), "{spec}");
    }
    for spec in [
        "digits",
        "synthetic:3x8",
        "cifar10",
        "cifar100:a/b",
        "tiny-imagenet:x",
        "folder:c:d",
    ] {
        assert_eq!(spec.parse::<Spec>().unwrap().to_string(), spec);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display();
    for kind in ["cifar10", "cifar100", "tiny-imagenet"] {
        assert!(refused(&format!("{kind}:{path}")).contains("data fetch"));
        assert!(refused(&format!("{kind}:{path}/none")).contains("none"));
    }
    assert!(refused("folder:/does/not/exist").contains("/does/not/exist"));
    assert!(refused(&format!("folder:{path}")).contains("no class folders"));
    save(&dir.path().join("a/1.png"), &png(2, 2, [0; 3]));
    fs::create_dir(dir.path().join("b")).unwrap();
    assert!(refused(&format!("folder:{path}")).contains("holds no images"));
    save(&dir.path().join("b/1.png"), &png(2, 2, [0; 3]));
    save(&dir.path().join("b/2.png"), &png(2, 2, [0; 3]));
    let sets = open(&format!("folder:{path}"), OpenOptions::default()).unwrap();
    assert_eq!(
        (sets.train.counts(), sets.test.counts()),
        (vec![1, 1], vec![0, 1]),
        "a class of one trains"
    );
    assert!(sets.notes[0].contains("20 %") && sets.size == Some(2));
    let whole = tempfile::tempdir().unwrap();
    save(&whole.path().join("train/a/1.png"), &png(2, 2, [0; 3]));
    save(&whole.path().join("val/z/1.png"), &png(2, 2, [0; 3]));
    assert!(refused(&format!("folder:{}", whole.path().display())).contains("no such class"));
}

#[test]
fn loader_gives_every_image_once_in_a_seeded_order() {
    let sets = open("digits", OpenOptions::default()).unwrap();
    let images = Arc::new(
        Images::prepare(&sets.train, sets.preprocess(8), PrepareOptions::default()).unwrap(),
    );
    let augment = Augment {
        hflip: true,
        crop_pad: 1,
        rotate_degrees: 10.0,
        translate: 0.1,
        ..Augment::default()
    };
    let options = LoaderOptions {
        augment: Some(augment),
        ..LoaderOptions::train(64, 7)
    };
    let epochs = |options: LoaderOptions| {
        let mut loader = Loader::new(images.clone(), options).unwrap();
        let mut all = Vec::new();
        for epoch in 0..3 {
            let mut step = 0;
            while let Some(batch) = loader.next_batch().unwrap() {
                assert_eq!((batch.epoch, batch.step, batch.valid), (epoch, step, 64));
                step += 1;
                all.push(batch);
            }
            assert_eq!(step, loader.steps_per_epoch());
        }
        all
    };
    let one = epochs(options);
    assert_eq!(one.len(), 3 * 22);
    assert!(
        one == epochs(LoaderOptions {
            threads: 4,
            ahead: 7,
            ..options
        }),
        "threads change nothing"
    );
    assert_ne!(
        one[0].indices, one[22].indices,
        "another order in every epoch"
    );
    let mut first: Vec<u32> = one[..22].iter().flat_map(|b| b.indices.clone()).collect();
    first.sort_unstable();
    first.dedup();
    assert_eq!(first.len(), 22 * 64, "no image twice in an epoch");
    assert!(
        one[5].affine.len() == 64
            && one[5].affine[3] == augment.draw(8, 7, 0, one[5].indices[3]).map
    );

    // A jump, also back and to an epoch's end, gives what an unbroken run gave.
    let mut loader = Loader::new(
        images.clone(),
        LoaderOptions {
            threads: 3,
            ..options
        },
    )
    .unwrap();
    for (epoch, step) in [(1, 13), (0, 3), (2, 0), (0, 22), (1, 21)] {
        loader.skip_to(epoch, step).unwrap();
        for want in one.iter().skip(epoch as usize * 22 + step).take(4) {
            let batch = match loader.next_batch().unwrap() {
                Some(batch) => batch,
                None => loader.next_batch().unwrap().unwrap(),
            };
            assert!(
                batch == *want,
                "from epoch {epoch} step {step}: {}, {}",
                want.epoch,
                want.step
            );
            loader.recycle(batch);
        }
    }
    assert!(loader.skip_to(0, 23).is_err());

    // In order, whole, the last batch padded with copies.
    let mut loader = Loader::new(images.clone(), LoaderOptions::eval(100)).unwrap();
    for _ in 0..2 {
        let mut seen = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            assert_eq!((batch.images.len(), batch.labels.len()), (100 * 192, 100));
            seen.extend_from_slice(&batch.indices[..batch.valid]);
            if batch.valid < 100 {
                assert_eq!(batch.valid, 37);
                assert_eq!(batch.images[37 * 192..38 * 192], batch.images[..192]);
            }
            loader.recycle(batch);
        }
        assert_eq!(seen, sets.train.indices());
    }
    let refuse = |options: LoaderOptions| {
        Loader::new(images.clone(), options)
            .err()
            .unwrap()
            .to_string()
    };
    assert!(refuse(LoaderOptions::train(0, 0)).contains("batch size 0"));
    assert!(refuse(LoaderOptions::train(1438, 0)).contains("1437 images"));
}

#[test]
fn a_view_is_loaded_at_another_size_and_native_pixels_are_not_copied() {
    let sets = open("synthetic:4x16", OpenOptions::default()).unwrap();
    assert_eq!(
        (sets.train.len(), sets.test.len(), sets.size),
        (400, 80, Some(16))
    );
    let few = sets.train.subset(PerClass::Count(3), 1);
    let mut kept = Vec::new();
    for size in [16, 24] {
        for memory in [1 << 30, 0] {
            let options = PrepareOptions {
                memory,
                ..PrepareOptions::default()
            };
            let images = Arc::new(Images::prepare(&few, sets.preprocess(size), options).unwrap());
            let mut loader = Loader::new(images, LoaderOptions::eval(12)).unwrap();
            let batch = loader.next_batch().unwrap().unwrap();
            assert_eq!(batch.indices, few.indices());
            assert_eq!(batch.labels, few.labels());
            kept.push(batch.images);
        }
    }
    assert!(
        kept[0] == kept[1] && kept[2] == kept[3],
        "in memory or on demand"
    );
    assert_eq!(
        (kept[0].len(), kept[2].len()),
        (12 * 16 * 16 * 3, 12 * 24 * 24 * 3)
    );
    let again = open("synthetic:4x16", OpenOptions::default()).unwrap();
    let images = Arc::new(
        Images::prepare(&again.train, sets.preprocess(16), PrepareOptions::default()).unwrap(),
    );
    let mut loader = Loader::new(
        images,
        LoaderOptions {
            batch: 400,
            ..LoaderOptions::eval(1)
        },
    )
    .unwrap();
    let all = loader.next_batch().unwrap().unwrap().images;
    // Nearest class mean finds most test images: the patterns can be learned.
    let one = 16 * 16 * 3;
    let mean = |class: usize| -> Vec<f32> {
        (0..one)
            .map(|p| {
                (class..400)
                    .step_by(4)
                    .map(|i| all[i * one + p])
                    .sum::<f32>()
                    / 100.0
            })
            .collect()
    };
    let means: Vec<Vec<f32>> = (0..4).map(mean).collect();
    let test = Arc::new(
        Images::prepare(&sets.test, sets.preprocess(16), PrepareOptions::default()).unwrap(),
    );
    let batch = Loader::new(test, LoaderOptions::eval(80))
        .unwrap()
        .next_batch()
        .unwrap()
        .unwrap();
    let distance =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum::<f32>();
    let right = (0..80).filter(|&i| {
        let image = &batch.images[i * one..(i + 1) * one];
        let best = (0..4)
            .min_by(|a, b| distance(image, &means[*a]).total_cmp(&distance(image, &means[*b])));
        best == Some(batch.labels[i] as usize)
    });
    assert!(right.count() > 60);
}

#[test]
fn cifar_archives_are_read_in_every_form() {
    for name in ["protocol2", "protocol4", "protocol5", "bytes"] {
        let bytes = fs::read(fixtures().join(format!("cifar10_{name}.pickle"))).unwrap();
        let records = cifar::parse_python(cifar::Kind::Ten, &bytes).unwrap();
        assert_eq!(records.labels, [3, 8, 0], "{name}");
        // numpy.random.default_rng(1).integers(0, 256, (3, 3072), dtype=uint8): planes to pixels.
        assert_eq!(records.pixels.len(), 3 * 3072);
        assert!(
            records
                == cifar::parse_python(
                    cifar::Kind::Ten,
                    &fs::read(fixtures().join("cifar10_protocol2.pickle")).unwrap()
                )
                .unwrap()
        );
    }
    // A binary file of two records, as a folder, inside a folder, and in a .tar.gz.
    let record = |label: &[u8], shade: u8| {
        [
            label,
            &[shade; 1024],
            &[shade + 1; 1024],
            &[shade + 2; 1024],
        ]
        .concat()
    };
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("cifar-10-batches-bin");
    let train = [record(&[9], 10), record(&[2], 20)].concat();
    save(&inner.join("data_batch_1.bin"), &train);
    save(&inner.join("test_batch.bin"), &record(&[1], 30));
    let archive = dir.path().join("some.tar.gz");
    let gz = flate2::write::GzEncoder::new(
        fs::File::create(&archive).unwrap(),
        flate2::Compression::fast(),
    );
    let mut tar = tar::Builder::new(gz);
    tar.append_dir_all("cifar-10-batches-bin", &inner).unwrap();
    tar.into_inner().unwrap().finish().unwrap();
    for place in [&inner, &dir.path().to_path_buf(), &archive] {
        let sets = open(
            &format!("cifar10:{}", place.display()),
            OpenOptions::default(),
        )
        .unwrap();
        assert_eq!(
            (sets.train.labels(), sets.test.labels()),
            (vec![9, 2], vec![1])
        );
        let split::Pixels::Memory { bytes, .. } = &sets.train.source.pixels else {
            panic!("in memory")
        };
        assert_eq!(bytes[3072..3078], [20, 21, 22, 20, 21, 22]);
        assert_eq!(sets.classes()[9], "truck");
    }
    save(&dir.path().join("h/train.bin"), &record(&[19, 99], 1));
    save(&dir.path().join("h/test.bin"), &record(&[19, 0], 1));
    let sets = open(
        &format!("cifar100:{}/h", dir.path().display()),
        OpenOptions::default(),
    )
    .unwrap();
    assert_eq!(
        (
            sets.train.labels(),
            sets.test.labels(),
            sets.classes().len()
        ),
        (vec![99], vec![0], 100)
    );
    assert_eq!(sets.classes()[99], "worm");

    save(&inner.join("data_batch_2.bin"), &train[..5000]);
    save(&inner.join("data_batch_3.bin"), &record(&[10], 1));
    let spec = format!("cifar10:{}", inner.display());
    let e = refused(&spec);
    assert!(
        e.contains("data_batch_2.bin") && e.contains("5000 bytes"),
        "{e}"
    );
    let report = verify(&spec).unwrap();
    assert_eq!((report.train, report.test, report.bad.len()), (2, 1, 2));
    assert!(
        report.bad[1].contains("data_batch_3.bin") && report.bad[1].contains("label 10"),
        "{:?}",
        report.bad
    );
    let cut = fs::read(&archive).unwrap();
    save(&archive, &cut[..cut.len() / 2]);
    assert!(refused(&format!("cifar10:{}", archive.display())).contains("some.tar.gz"));
}

#[test]
fn tiny_imagenet_is_read_in_its_own_layout() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join("tiny-imagenet-200").join(name);
    save(&at("wnids.txt"), b"n02\nn01\n");
    save(
        &at("words.txt"),
        b"n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\tother\n",
    );
    for id in ["n01", "n02"] {
        save(
            &at(&format!("train/{id}/images/{id}_0.JPEG")),
            &png(64, 64, [1; 3]),
        );
        save(
            &at(&format!("train/{id}/{id}_boxes.txt")),
            b"x\t0\t0\t1\t1\n",
        );
    }
    save(&at("val/images/val_0.JPEG"), &png(64, 64, [1; 3]));
    save(
        &at("val/val_annotations.txt"),
        b"val_0.JPEG\tn02\t0\t0\t1\t1\n",
    );
    let spec = format!("tiny-imagenet:{}", dir.path().display());
    let sets = open(&spec, OpenOptions::default()).unwrap();
    assert_eq!(sets.classes(), ["n01 goldfish", "n02 bullfrog"]);
    assert_eq!(
        (sets.train.labels(), sets.test.labels()),
        (vec![0, 1], vec![1])
    );
    for (line, says) in [
        ("../x\tn01", "not a file name"),
        ("val_0.JPEG\tn09", "wnids.txt"),
        ("only", "line 1"),
        ("", "no images"),
    ] {
        save(&at("val/val_annotations.txt"), line.as_bytes());
        assert!(refused(&spec).contains(says), "{line}");
    }
}

#[test]
fn real_data_is_read() {
    let Some(shared) = shared() else { return };
    let spec = format!(
        "cifar10:{}",
        shared.join("data/cifar-10-binary-excerpt.tar.gz").display()
    );
    let sets = open(&spec, OpenOptions::default()).unwrap();
    assert_eq!((sets.train.len(), sets.test.len()), (5 * 761, 761));
    let images =
        Images::prepare(&sets.test, sets.preprocess(32), PrepareOptions::default()).unwrap();
    assert_eq!(images.len(), 761);
    // The first test image of CIFAR-10 is a cat whose first pixel is (158, 112, 49).
    let split::Pixels::Memory { bytes, .. } = &sets.test.source.pixels else {
        panic!("in memory")
    };
    assert_eq!((sets.test.label(0), &bytes[..3]), (3, &[158, 112, 49][..]));
    let counts = sets.test.counts();
    assert!(counts.iter().all(|c| (50..105).contains(c)), "{counts:?}");
}

#[test]
fn balanced_draws_and_repeats() {
    use super::loader::draw_order;
    // 900 of class 0, 100 of class 1.
    let labels: Vec<u32> = (0..1000).map(|i| u32::from(i % 10 == 0)).collect();
    let balanced = LoaderOptions {
        balanced: true,
        ..LoaderOptions::train(10, 3)
    };
    let order = draw_order(&balanced, &labels, 0);
    let ones = order.iter().filter(|&&i| labels[i as usize] == 1).count();
    assert!(order.len() == 1000 && (440..560).contains(&ones), "{ones}");
    assert_ne!(order, draw_order(&balanced, &labels, 1));
    let repeated = LoaderOptions {
        repeats: 3,
        ..LoaderOptions::train(10, 3)
    };
    let order = draw_order(&repeated, &labels, 0);
    assert!(order.chunks_exact(3).all(|c| c[0] == c[1] && c[1] == c[2]));
    assert_eq!(order.len(), 1000);
    // The copies of an image are augmented each in its own way.
    let sets = open("digits", OpenOptions::default()).unwrap();
    let images =
        Images::prepare(&sets.train, sets.preprocess(8), PrepareOptions::default()).unwrap();
    let augment = Augment {
        rotate_degrees: 30.0,
        ..Augment::default()
    };
    let options = LoaderOptions {
        repeats: 2,
        augment: Some(augment),
        ..LoaderOptions::train(8, 1)
    };
    let batch = Loader::new(Arc::new(images), options).unwrap().next_batch();
    let batch = batch.unwrap().unwrap();
    assert_eq!(batch.indices[0], batch.indices[1]);
    assert_ne!(batch.affine[0], batch.affine[1]);
}

/// The loader's own resampling is the device's.
#[test]
fn samples_are_moved_in_the_loader_as_on_the_device() {
    let sets = open("digits", OpenOptions::default()).unwrap();
    let images = Arc::new(
        Images::prepare(&sets.train, sets.preprocess(8), PrepareOptions::default()).unwrap(),
    );
    let fill = images.preprocess().black();
    let augment = Augment {
        hflip: true,
        crop_scale: 0.3,
        ..Augment::default()
    };
    let options = LoaderOptions {
        augment: Some(augment),
        ..LoaderOptions::train(16, 2)
    };
    let batch = |options| {
        let mut loader = Loader::new(images.clone(), options).unwrap();
        loader.next_batch().unwrap().unwrap()
    };
    let (maps, moved) = (
        batch(options),
        batch(LoaderOptions {
            resample: Some(fill),
            ..options
        }),
    );
    assert!(moved.affine.is_empty() && maps.affine.len() == 16);
    for (i, map) in maps.affine.iter().enumerate() {
        let (plain, got) = (
            &maps.images[i * 192..][..192],
            &moved.images[i * 192..][..192],
        );
        let mut want = vec![0.0; 192];
        crate::ops::augment::resample(plain, &fill, 8, map, &mut want);
        assert_eq!(got, want);
    }
}
