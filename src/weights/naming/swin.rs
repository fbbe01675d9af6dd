//! Swin transformers by other libraries' names. This program's own are timm's.

use super::Naming;

/// The ways in which a file may hold the parameter `path.leaf`, as [`Scheme::candidates`](super::Scheme::candidates).
pub(super) fn candidates(naming: Naming, path: &str, leaf: &str) -> Vec<Vec<String>> {
    let full = |p: String| {
        let dot = if p.is_empty() { "" } else { "." };
        vec![format!("{p}{dot}{leaf}")]
    };
    let inner = path.strip_prefix("layers.").and_then(|p| {
        let (stage, part) = p.split_once('.')?;
        Some((stage.parse::<usize>().ok()?, part))
    });
    let renamed = match (naming, inner) {
        (Naming::TorchvisionSwin, Some((stage, part))) => torchvision(stage, part),
        (Naming::TorchvisionSwin, None) => match path {
            "patch_embed.proj" => "features.0.0".into(),
            "patch_embed.norm" => "features.0.2".into(),
            other => other.into(),
        },
        (Naming::HfSwin, Some((stage, part))) => return hf(stage, part, leaf),
        (Naming::HfSwin, None) => match path {
            "patch_embed.proj" => "embeddings.patch_embeddings.projection".into(),
            "patch_embed.norm" => "embeddings.norm".into(),
            _ => "layernorm".into(),
        },
        // The paper's own release merges at the end of a stage.
        (Naming::MicrosoftSwin, Some((stage, part))) if part.starts_with("downsample") => {
            format!("layers.{}.{part}", stage.saturating_sub(1))
        }
        _ => path.into(),
    };
    vec![full(renamed)]
}

/// Stages are features 1, 3, 5, 7; what merges before them stands between.
fn torchvision(stage: usize, part: &str) -> String {
    if let Some(part) = part.strip_prefix("downsample.") {
        return format!("features.{}.{part}", 2 * stage);
    }
    let part = part.strip_prefix("blocks.").unwrap_or(part);
    let (block, part) = part.split_once('.').unwrap_or((part, ""));
    let part = match part {
        "mlp.fc1" => "mlp.0",
        "mlp.fc2" => "mlp.3",
        other => other,
    };
    format!("features.{}.{block}.{part}", 2 * stage + 1)
}

/// As the hub's files have it (transformers 4), then as transformers 5 has it.
fn hf(stage: usize, part: &str, leaf: &str) -> Vec<Vec<String>> {
    if part.starts_with("downsample") {
        let stage = stage.saturating_sub(1);
        return vec![vec![format!("encoder.layers.{stage}.{part}.{leaf}")]];
    }
    let part = part.strip_prefix("blocks.").unwrap_or(part);
    let (block, part) = part.split_once('.').unwrap_or((part, ""));
    let root = format!("encoder.layers.{stage}.blocks.{block}");
    let names: &[&str] = match part {
        "norm1" => &["layernorm_before"],
        "norm2" => &["layernorm_after"],
        "attn" => &["attention.self", "attention.relative_position_bias"],
        "attn.qkv" => {
            let three = |names: [&str; 3]| names.map(|n| format!("{root}.attention.{n}.{leaf}"));
            return vec![
                three(["self.query", "self.key", "self.value"]).to_vec(),
                three(["q_proj", "k_proj", "v_proj"]).to_vec(),
            ];
        }
        "attn.proj" => &["attention.output.dense", "attention.o_proj"],
        "mlp.fc1" => &["intermediate.dense", "mlp.fc1"],
        _ => &["output.dense", "mlp.fc2"],
    };
    let one = |n: &&str| vec![format!("{root}.{n}.{leaf}")];
    names.iter().map(one).collect()
}

/// The `relative_position_index` of a window of `side`: `[side^2, side^2]`, row-major (Liu et al. 2021, eq. 4).
pub(crate) fn relative_position_index(side: usize) -> Vec<i64> {
    let n = side * side;
    let cell = |i: usize, j: usize| {
        let rows = i / side + side - 1 - j / side;
        let columns = i % side + side - 1 - j % side;
        (rows * (2 * side - 1) + columns) as i64
    };
    (0..n * n).map(|k| cell(k / n, k % n)).collect()
}

/// The window's side of a relative position table with so many entries a head.
pub(crate) fn window_of(entries: usize) -> Option<usize> {
    let across = entries.isqrt();
    (across * across == entries && across % 2 == 1).then_some(across.div_ceil(2))
}
