//! A position table on another grid, by bicubic convolution (Keys 1981), as PyTorch's `F.interpolate` computes it.

use crate::{Error, Result};

/// Which of PyTorch's two bicubic filters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interpolation {
    /// `antialias=False`: a = -0.75, four taps, the border repeated. Hugging Face's DINOv2 and ViT.
    Bicubic,
    /// `antialias=True`: a = -0.5, widened where the grid shrinks, cut at the border. timm.
    BicubicAntialias,
}

/// A position table `[n_prefix + from.0 * from.1, dim]` on the grid `to` (rows, columns): the prefix (class token) rows
/// stay, the grid is interpolated, `align_corners=False`.
///
/// The same as Hugging Face's `Dinov2Embeddings.interpolate_pos_encoding` ([`Interpolation::Bicubic`]) and timm's
/// `resample_abs_pos_embed` ([`Interpolation::BicubicAntialias`]).
///
/// # Errors
/// The table has another size, or a grid is empty.
pub fn interpolate_pos(
    table: &[f32],
    from: (usize, usize),
    to: (usize, usize),
    dim: usize,
    n_prefix: usize,
    mode: Interpolation,
) -> Result<Vec<f32>> {
    let prefix = n_prefix * dim;
    if table.len() != prefix + from.0 * from.1 * dim || from.0 * from.1 * to.0 * to.1 == 0 {
        return Err(Error::input(format!(
            "a position table of {} elements cannot go from {n_prefix} + {}x{} to {n_prefix} + {}x{} positions of {dim}",
            table.len(),
            from.0,
            from.1,
            to.0,
            to.1
        )));
    }
    if from == to {
        return Ok(table.to_vec());
    }
    let (rows, columns) = (taps(from.0, to.0, mode), taps(from.1, to.1, mode));
    let grid = &table[prefix..];
    let mut out = table[..prefix].to_vec();
    for row in &rows {
        for column in &columns {
            let mut sum = vec![0.0f64; dim];
            for &(y, wy) in row {
                for &(x, wx) in column {
                    let source = &grid[(y * from.1 + x) * dim..][..dim];
                    for (s, &v) in sum.iter_mut().zip(source) {
                        *s += wy * wx * f64::from(v);
                    }
                }
            }
            out.extend(sum.iter().map(|&s| s as f32));
        }
    }
    Ok(out)
}

/// For each of `to` positions, the source positions and their weights.
fn taps(from: usize, to: usize, mode: Interpolation) -> Vec<Vec<(usize, f64)>> {
    let scale = from as f64 / to as f64;
    let plain = |i: usize| -> Vec<(usize, f64)> {
        let center = (i as f64 + 0.5) * scale - 0.5;
        let first = center.floor() as isize - 1;
        (first..first + 4)
            .map(|j| {
                let at = j.clamp(0, from as isize - 1) as usize;
                (at, cubic(j as f64 - center, -0.75))
            })
            .collect()
    };
    let widened = |i: usize| -> Vec<(usize, f64)> {
        let width = scale.max(1.0);
        let center = (i as f64 + 0.5) * scale;
        let first = (center - 2.0 * width + 0.5).max(0.0) as usize;
        let end = ((center + 2.0 * width + 0.5) as usize).min(from);
        let weight = |j: usize| cubic((j as f64 + 0.5 - center) / width, -0.5);
        let total: f64 = (first..end).map(weight).sum();
        (first..end).map(|j| (j, weight(j) / total)).collect()
    };
    (0..to)
        .map(|i| match mode {
            Interpolation::Bicubic => plain(i),
            Interpolation::BicubicAntialias => widened(i),
        })
        .collect()
}

/// Keys' kernel with parameter `a`.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((x - 5.0) * x + 8.0) * x * a - 4.0 * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From torch 2.15 through timm 1.0.31 (antialias) and transformers 5.23 (plain; the 4x2 grid, which it cannot take, by
    /// `F.interpolate` itself).
    #[rustfmt::skip]
    #[allow(clippy::type_complexity)]
    const FIXTURES: &[((usize, usize), (usize, usize), Interpolation, &[f32])] = &[
        ((3, 3), (5, 4), Interpolation::Bicubic, &[0.0, 0.841471, -0.9644942, 0.5662063, -0.4165491, 0.1124566, -0.47395, -0.5927116, -1.09533, -1.041108, -0.09111782, 0.004245653, -0.2031925, 0.3924552, -0.5305321, -0.03551866, -0.8372344, -0.9712504, 1.022409, -0.746792, 0.005951085, 0.5877803, -0.6575444, 0.6008937, -0.4899203, -0.7169021, 1.187377, -0.9849205, -0.1939062, 0.02321549, -0.8778073, 0.4235441, -0.3714624, -0.07243745, 1.08409, -1.018775, -0.4016691, -0.4791906, -1.030403, 0.1428634, -0.3490045, 0.3990954]),
        ((4, 4), (2, 3), Interpolation::Bicubic, &[0.0, 0.841471, -0.6071436, 0.5992981, -0.1203772, -1.006004, -0.02977818, -0.4681953, -0.5536669, 0.1497203, -0.1621607, 0.338315, -0.3370979, 0.5535928]),
        ((4, 2), (3, 5), Interpolation::Bicubic, &[0.0, 0.841471, -0.8771105, 0.2247962, -0.740823, 0.1505043, -0.4444996, -0.01102484, -0.1481759, -0.1725542, -0.01188867, -0.2468459, -1.047999, 0.1626182, -0.8015264, 0.01038399, -0.265633, -0.3206114, 0.2702611, -0.6516072, 0.5167333, -0.8038413, 0.9269005, -0.6756707, 0.6017644, -0.5774823, -0.1051633, -0.3639957, -0.8120917, -0.1505088, -1.137228, -0.05232056]),
        ((3, 3), (5, 4), Interpolation::BicubicAntialias, &[0.0, 0.841471, -0.9153225, 0.5277708, -0.4466282, 0.1002174, -0.5114613, -0.5520582, -1.069177, -1.020136, -0.160501, 0.04700893, -0.2444105, 0.2997122, -0.5328452, -0.1126201, -0.8449816, -0.9314916, 0.9945391, -0.7149695, 0.02495285, 0.5032198, -0.6007128, 0.5155856, -0.4902201, -0.6856245, 1.104094, -0.9370264, -0.177646, -0.05683662, -0.8072429, 0.3233607, -0.3899944, -0.03478511, 1.044299, -0.9970948, -0.3431695, -0.452292, -0.9366692, 0.1235396, -0.364127, 0.3694038]),
        ((7, 5), (2, 3), Interpolation::BicubicAntialias, &[0.0, 0.841471, -0.1834911, 0.1215788, -0.4130138, -0.3220346, -0.3198677, 0.1386325, -0.06486637, 0.42601, 0.1532335, 0.1181834, -0.4722117, 0.2168625]),
        ((4, 2), (3, 5), Interpolation::BicubicAntialias, &[0.0, 0.841471, -0.9351621, -0.01537633, -0.7814208, -0.05155079, -0.3756484, -0.1470267, 0.03012408, -0.2425026, 0.1838656, -0.2786771, -0.9155343, 0.1113008, -0.73724, -0.003276364, -0.2666647, -0.3056822, 0.2039106, -0.608088, 0.3822051, -0.7226654, 0.7649159, -0.3589707, 0.5074214, -0.3302414, -0.1721884, -0.2544157, -0.8517984, -0.1785899, -1.109293, -0.1498605]),
    ];

    /// The table of the fixtures: element i is sin(i * i), with one prefix row of two elements.
    fn table(positions: usize) -> Vec<f32> {
        (0..2 * (1 + positions))
            .map(|i| ((i * i) as f64).sin() as f32)
            .collect()
    }

    #[test]
    fn follows_pytorch() {
        for (from, to, mode, want) in FIXTURES {
            let got = interpolate_pos(&table(from.0 * from.1), *from, *to, 2, 1, *mode).unwrap();
            assert_eq!(got.len(), want.len());
            for (g, w) in got.iter().zip(*want) {
                assert!(
                    (g - w).abs() < 2e-6,
                    "{from:?} to {to:?} {mode:?}: {g} for {w}"
                );
            }
        }
    }

    #[test]
    fn refuses_a_table_of_another_size() {
        let t = table(9);
        assert!(interpolate_pos(&t, (3, 4), (5, 5), 2, 1, Interpolation::Bicubic).is_err());
        assert!(interpolate_pos(&t, (3, 3), (0, 5), 2, 1, Interpolation::Bicubic).is_err());
        assert_eq!(
            interpolate_pos(&t, (3, 3), (3, 3), 2, 1, Interpolation::Bicubic).unwrap(),
            t
        );
    }
}
