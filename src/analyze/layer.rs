//! Layers by name, and what they hold as maps.

use super::room::unknown;
use crate::Result;
use crate::models::{Arch, Model};

/// The place among `taps` of the layer called `name`.
///
/// # Errors
/// There is none: the message names the nearest and all others.
pub(super) fn named(taps: &[(String, Vec<usize>)], name: &str) -> Result<usize> {
    if let Some(i) = taps.iter().position(|t| t.0 == name) {
        return Ok(i);
    }
    let names: Vec<&str> = taps.iter().map(|t| t.0.as_str()).collect();
    Err(unknown("layer", name, &names))
}

/// Rows, columns, and the tokens before the patches, of one image in a tap of `shape` (`[N, H, W, C]` or `[N, T, C]`).
pub(super) fn places(
    shape: &[usize],
    grid: Option<(usize, usize)>,
) -> Option<(usize, usize, usize)> {
    match (shape, grid) {
        (&[_, h, w, _], _) => Some((h, w, 0)),
        (&[_, t, _], Some((h, w))) if t >= h * w => Some((h, w, t - h * w)),
        _ => None,
    }
}

/// The last layer whose places the classifier still looks at: a CNN's or a Swin's last, and for a ViT the input of its last
/// block, because after that block only the class token is read.
pub(super) fn last_with_places(model: &Model, taps: &[(String, Vec<usize>)]) -> usize {
    match &model.arch {
        Arch::Vit(v) => taps
            .iter()
            .position(|t| t.0 == format!("blocks.{}", v.depth.saturating_sub(2)))
            .filter(|_| v.depth > 1)
            .unwrap_or(0),
        _ => taps.len() - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_gives_the_right_ones() {
        let taps = ["stem", "layer1", "layer2"].map(|n| (n.to_string(), vec![1, 8, 8, 4]));
        assert_eq!(named(&taps, "layer2").unwrap(), 2);
        let e = named(&taps, "layer9").unwrap_err().to_string();
        assert!(e.contains("nearest is layer1") && e.contains("stem"), "{e}");
        assert_eq!(places(&[1, 8, 4, 3], None), Some((8, 4, 0)));
        assert_eq!(places(&[1, 17, 3], Some((4, 4))), Some((4, 4, 1)));
        assert_eq!(places(&[1, 17, 3], None), None);
    }
}
