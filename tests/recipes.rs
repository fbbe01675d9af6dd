//! Every recipe in `configs/` is read, resolved and planned, and says what it is.

use std::path::Path;
use tilewright::train::{TrainConfig, dry};

fn recipes() -> Vec<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let files = std::fs::read_dir(dir).unwrap();
    let mut all: Vec<_> = files.map(|f| f.unwrap().path()).collect();
    all.sort();
    all
}

#[test]
fn every_recipe_could_run() {
    let all = recipes();
    assert!(all.len() >= 12, "{all:?}");
    for path in all {
        let at = path.display();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{at} does not say what it is");
        assert!(text.lines().count() < 45, "{at} is not short");
        let config = TrainConfig::read(&path).unwrap();
        let plan = dry::plan(&config).unwrap_or_else(|e| panic!("{at}: {e}"));
        assert!(plan.trained > 0 && plan.trained <= plan.params, "{at}");
        assert_eq!(plan.trained < plan.params, config.freeze_backbone, "{at}");
        assert!(plan.flops > 0 && plan.activations > 0 && plan.persistent > 0);
        // What is written into a run directory reads back as itself.
        let text = plan.to_text().unwrap();
        let toml = &text[text.find("\n\n").unwrap()..];
        assert_eq!(TrainConfig::parse(toml).unwrap(), plan.config, "{at}");
    }
}

#[test]
fn an_unknown_key_names_the_nearest() {
    for (text, nearest) in [
        ("epoch = 3", "`epochs`"),
        ("layerdecay = 0.75", "`layer_decay`"),
        ("mix_up = 0.8", "`mixup`"),
        ("[augment]\nrand_op = 2", "`augment.rand_ops`"),
    ] {
        let e = TrainConfig::parse(text).unwrap_err().to_string();
        assert!(e.contains(nearest), "{text}: {e}");
    }
    let scaled = TrainConfig::parse("[lr_scale]\nhead = 10.0\n\"blocks.0\" = 0.1").unwrap();
    assert_eq!(scaled.lr_scale.len(), 2);
}
