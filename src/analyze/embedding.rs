//! A map of the features in the plane: principal components, and t-SNE (van der Maaten & Hinton 2008).

use super::pca::pca;
use super::{Analysis, Context, Findings, for_batches};
use crate::report::plot::{Scatter, scatter};
use crate::report::table::{Table, number};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

/// The features of images (what the classifier reads) in the plane, coloured by class: by their first two principal
/// components, and by t-SNE.
///
/// The map is the same at every run: t-SNE starts from the principal components, not at random.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze embedding -m dinov2_small -w dinov2-small-f16.safetensors -d cifar10 -o embedding
  tilewright analyze embedding -w runs/vit -d digits --perplexity 15 --plot map.svg")]
pub(super) struct Args {
    /// About how many neighbours of a point count, in t-SNE
    #[arg(long, value_name = "P", default_value = "30", value_parser = perplexity)]
    perplexity: f32,
    /// Principal components alone
    #[arg(long)]
    pca: bool,
}

fn perplexity(text: &str) -> Result<f32, String> {
    let value = text.parse().ok();
    let fits = value.filter(|v| (2.0..=500.0).contains(v));
    fits.ok_or_else(|| "give a number from 2 to 500".into())
}

/// Components that t-SNE and the neighbours start from.
const COMPONENTS: usize = 50;
/// Neighbours that vote.
const NEIGHBOURS: usize = 10;
/// Largest number of points for which every pair is computed; above, Barnes-Hut's approximation.
const EXACT: usize = 2000;
const EPOCHS: usize = 1000;

fn squared(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}

/// The plane of t-SNE for `rows` `[n, d]`, from the start `[n, 2]`; and the divergence that is left.
fn tsne(rows: &[&[f32]], start: &[[f64; 2]], perplexity: f32) -> Result<(Vec<[f64; 2]>, f32)> {
    // As openTSNE and scikit-learn scale a start: 1e-4 along the first axis.
    let n = start.len() as f64;
    let spread = (start.iter().map(|p| p[0] * p[0]).sum::<f64>() / n).sqrt();
    let scale = 1e-4 / spread.max(1e-30);
    let start: Vec<f32> = start.iter().flatten().map(|v| (v * scale) as f32).collect();
    let most = (rows.len() - 1) as f32 / 3.0;
    let perplexity = perplexity.min(most).max(1.0);
    let distance = |a: &&[f32], b: &&[f32]| squared(a, b).sqrt();
    let fit = || {
        let mut t = bhtsne::tSNE::<f32, &[f32], 2>::new(rows);
        t.perplexity(perplexity)
            .epochs(EPOCHS)
            .initial_embedding(start);
        if rows.len() <= EXACT {
            t.exact(distance);
        } else {
            t.barnes_hut(0.5, distance);
        }
        (t.embedding(), t.kl_divergence().unwrap_or(f32::NAN))
    };
    // Several threads would add up in another order each time, and tiny differences grow over a thousand steps.
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let alone = alone.map_err(|e| Error::run(format!("cannot start a thread: {e}")))?;
    let (plane, divergence) = alone.install(fit);
    let points = plane
        .chunks_exact(2)
        .map(|p| [f64::from(p[0]), f64::from(p[1])]);
    Ok((points.collect(), divergence))
}

/// Share of the rows whose class most of their nearest other rows have (ties: the nearest class among the tied).
fn neighbours_agree(rows: &[&[f32]], classes: &[usize], k: usize) -> f64 {
    let agree = |i: usize| {
        let mut all: Vec<(f32, usize)> = (0..rows.len())
            .filter(|&j| j != i)
            .map(|j| (squared(rows[i], rows[j]), classes[j]))
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all.truncate(k);
        let votes = |c: usize| all.iter().filter(|a| a.1 == c).count();
        let most = all.iter().map(|a| votes(a.1)).max().unwrap_or(0);
        let answer = all.iter().find(|a| votes(a.1) == most);
        answer.is_some_and(|a| a.1 == classes[i])
    };
    let right = (0..rows.len())
        .into_par_iter()
        .filter(|&i| agree(i))
        .count();
    right as f64 / rows.len() as f64
}

#[derive(Serialize)]
struct Row {
    index: u32,
    class: String,
    pca_1: f64,
    pca_2: f64,
    tsne_1: Option<f64>,
    tsne_2: Option<f64>,
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let images = cx.images(subject)?;
        let n = images.len();
        if n < 5 {
            return Err(Error::input(format!("a map of {n} images: give 5 or more")));
        }
        let names = images.split().classes().to_vec();
        let batch = cx.batch.min(n);
        let (mut session, ()) = subject.session(cx.backend, (batch, None), false, |_| Ok(()))?;
        let (mut features, mut classes, mut indices) = (vec![], vec![], vec![]);
        for_batches(&mut session, images, &subject.name, 1, |s, b| {
            let all = s.features()?;
            features.extend_from_slice(&all[..all.len() / batch * b.valid]);
            classes.extend(b.labels[..b.valid].iter().map(|&l| l as usize));
            indices.extend_from_slice(&b.indices[..b.valid]);
            Ok(())
        })?;
        let n = classes.len();
        if let Some(bad) = features.iter().position(|v| !v.is_finite()) {
            return Err(Error::run(format!(
                "{}: feature {} is not finite; are the weights damaged?",
                subject.name,
                bad % (features.len() / n)
            )));
        }
        let width = features.len() / n;
        let few = pca(&features, n, COMPONENTS.min(width));
        let k = few.explained.len();
        if k < 2 {
            return Err(Error::input(format!(
                "the {width} features of {} lie on a line: there is no map",
                subject.name
            )));
        }
        let rows: Vec<&[f32]> = few.scores.chunks_exact(k).collect();
        let plane: Vec<[f64; 2]> = rows
            .iter()
            .map(|r| [f64::from(r[0]), f64::from(r[1])])
            .collect();
        let near = neighbours_agree(&rows, &classes, NEIGHBOURS);
        let held = 100.0 * (few.explained[0] + few.explained[1]);
        let head = format!("principal components ({held:.0} % of the variance)");
        let mut maps = vec![Scatter {
            heading: &head,
            points: &plane,
            classes: &classes,
        }];
        let mut t = Table::new(["measure", "value"]).left(&[0]);
        t.row(["images".into(), n.to_string()]);
        t.row(["features".into(), width.to_string()]);
        t.row(["variance in two components %".into(), number(held, 1)]);
        let voters = format!("right by {NEIGHBOURS} nearest neighbours %");
        t.row([voters, number(100.0 * near, 1)]);
        let mapped = (!self.pca).then(|| tsne(&rows, &plane, self.perplexity));
        let mapped = mapped.transpose()?;
        if let Some((points, divergence)) = &mapped {
            t.row(["t-SNE divergence".into(), number((*divergence).into(), 3)]);
            maps.push(Scatter {
                heading: "t-SNE",
                points,
                classes: &classes,
            });
        }
        let svg = scatter(&format!("Features of {}", subject.name), &names, &maps)?;
        let tsne_at = |i: usize, a: usize| mapped.as_ref().map(|m| m.0[i][a]);
        let each = (0..n).map(|i| Row {
            index: indices[i],
            class: names[classes[i]].clone(),
            pca_1: plane[i][0],
            pca_2: plane[i][1],
            tsne_1: tsne_at(i, 0),
            tsne_2: tsne_at(i, 1),
        });
        let each: Vec<Row> = each.collect();
        let data = json!({"model": subject.name, "data": cx.data(), "images": n, "features": width,
            "explained": few.explained[..2], "neighbours": NEIGHBOURS, "neighbour_accuracy": near,
            "perplexity": self.perplexity, "divergence": mapped.as_ref().map(|m| m.1), "points": each});
        let heading = format!(
            "features of {} for {n} images of {}",
            subject.name,
            cx.data()
        );
        Findings::new(heading, data)
            .plot(
                "embedding",
                "A point an image. Distances between far groups mean little in t-SNE; that a class forms a group of its own \
                 means that its features are near each other.",
                svg,
            )
            .table("", t)
            .note(format!(
                "Neighbours vote in the first {k} principal components; an image does not vote for itself."
            ))
            .csv("embedding", each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    /// Three groups in ten dimensions.
    fn groups(each: usize) -> (Vec<f32>, Vec<usize>) {
        let mut draw = Philox::new(1, 2);
        let classes: Vec<usize> = (0..3 * each).map(|i| i % 3).collect();
        let rows = classes.iter().flat_map(|&c| {
            let row: Vec<f32> = (0..10)
                .map(|j| draw.normal() + if j == c { 12.0 } else { 0.0 })
                .collect();
            row
        });
        (rows.collect(), classes)
    }

    #[test]
    fn groups_stay_groups_and_the_map_repeats() {
        let (x, classes) = groups(20);
        let few = pca(&x, 60, 10);
        let rows: Vec<&[f32]> = few.scores.chunks_exact(10).collect();
        let plane: Vec<[f64; 2]> = rows.iter().map(|r| [r[0].into(), r[1].into()]).collect();
        let (got, divergence) = tsne(&rows, &plane, 10.0).unwrap();
        let points: Vec<Vec<f32>> = got.iter().map(|p| vec![p[0] as f32, p[1] as f32]).collect();
        let points: Vec<&[f32]> = points.iter().map(Vec::as_slice).collect();
        assert_eq!(neighbours_agree(&points, &classes, 5), 1.0);
        // scikit-learn's exact method is left with about 0.2 on such groups.
        assert!((0.0..0.6).contains(&divergence), "{divergence}");
        assert_eq!(tsne(&rows, &plane, 10.0).unwrap().0, got);
    }

    #[test]
    fn neighbours_vote_without_themselves() {
        let x = [0.0f32, 1.0, 2.0, 10.0, 11.0, 5.0];
        let rows: Vec<&[f32]> = x.chunks(1).collect();
        // The last stands alone in its class; 10 and 11 see three classes once each, their own nearest.
        let classes = [0, 0, 0, 1, 1, 2];
        assert!((neighbours_agree(&rows, &classes, 1) - 5.0 / 6.0).abs() < 1e-9);
        assert!((neighbours_agree(&rows, &classes, 3) - 5.0 / 6.0).abs() < 1e-9);
    }
}
