//! The page about several runs.

use super::*;
use crate::Error;

/// Several runs on one page.
#[derive(Clone, Debug)]
pub struct CompareReport {
    /// Heading of the page.
    pub title: String,
    /// What is compared and why, one paragraph of plain text.
    pub question: String,
    /// The runs, in the order of the table.
    pub runs: Vec<RunReport>,
    /// The command line that reproduces the whole comparison.
    pub command: String,
}

impl CompareReport {
    /// One row a run: size, accuracy, time. The gap is the last epoch's training top-1 minus the evaluated top-1.
    pub fn table(&self) -> Table {
        let mut table = Table::new([
            "run",
            "params",
            "FLOPs/image",
            "epochs",
            "top-1 %",
            "± 95 %",
            "loss",
            "macro F1",
            "train-test gap",
            "training time",
            "train images/s",
            "eval images/s",
        ])
        .left(&[0]);
        for run in &self.runs {
            let e = run.eval.as_ref();
            let value = |get: fn(&EvalReport) -> f64, decimals| {
                e.map_or("-".into(), |e| number(get(e), decimals))
            };
            let train = run.epochs.last().map_or(f64::NAN, |r| r.train_top1);
            table.row([
                run.name.clone(),
                si(run.params as f64),
                run.flops.map_or("-".into(), |f| si(f as f64)),
                run.epochs
                    .last()
                    .map_or("-".into(), |r| r.epoch.to_string()),
                value(|e| e.top1, 2),
                value(|e| accuracy_margin(e.top1, e.images), 2),
                value(|e| e.loss, 4),
                value(|e| e.macro_f1, 4),
                e.map_or("-".into(), |e| number(train - e.top1, 2)),
                if run.epochs.is_empty() {
                    "-".into()
                } else {
                    duration(run.train_seconds())
                },
                number(run.train_rate(), 0),
                value(|e| e.images_per_second, 0),
            ]);
        }
        table
    }

    /// One sentence on what came out, where at least two runs were evaluated on the same images; else empty.
    fn in_short(&self) -> String {
        let mut ranked: Vec<(&RunReport, &EvalReport)> = self
            .runs
            .iter()
            .filter_map(|r| Some((r, r.eval.as_ref()?)))
            .collect();
        ranked.sort_by(|a, b| b.1.top1.total_cmp(&a.1.top1));
        let [(first, a), (second, b), ..] = ranked[..] else {
            return String::new();
        };
        if ranked
            .iter()
            .any(|(_, e)| (&e.data, e.images) != (&a.data, a.images))
        {
            return String::new();
        }
        let gap = a.top1 - b.top1;
        // The intervals are those of independent samples; over the same images the true uncertainty is smaller.
        let unsure =
            gap < accuracy_margin(a.top1, a.images).hypot(accuracy_margin(b.top1, b.images));
        format!(
            "<p class=\"short\"><strong>{}</strong> is right most often: {:.2} % of {} images, {gap:.2} points before \
             <strong>{}</strong>{}.</p>\n",
            escape(&first.name),
            a.top1,
            a.images,
            escape(&second.name),
            if unsure {
                "; with so few images or so small a gap this may be chance"
            } else {
                ""
            }
        )
    }

    /// The page.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no run, or parts of a run's report contradict each other.
    pub fn to_html(&self) -> Result<String> {
        if self.runs.is_empty() {
            return Err(Error::input(format!("{}: no runs to compare", self.title)));
        }
        let lead = if self.question.is_empty() {
            String::new()
        } else {
            format!("<p>{}</p>\n", escape(&self.question))
        };
        let mut page = Page::new(&self.title, lead + &self.in_short());
        page.section("Summary", table_html(&self.table()));
        page.more(format!("<p class=\"soft\">{SUMMARY}</p>\n"));
        for run in &self.runs {
            page.more(notes(
                &run.notes
                    .iter()
                    .map(|n| format!("{}: {n}", run.name))
                    .collect::<Vec<_>>(),
            ));
        }
        let curves: Vec<RunCurve> = self
            .runs
            .iter()
            .filter(|r| !r.epochs.is_empty())
            .map(RunReport::curve)
            .collect();
        if !curves.is_empty() {
            page.section(
                "Learning curves",
                figure(&plot::learning_curves(&curves)?, CURVES),
            );
            page.more(figure(
                &plot::learning_rate(&curves)?,
                "Learning rate of each epoch's last step.",
            ));
        }
        self.per_class(&mut page)?;
        let evaluated = || self.runs.iter().filter_map(|r| Some((r, r.eval.as_ref()?)));
        if evaluated().next().is_some() {
            page.section(
                "Confusion matrices",
                format!("<p class=\"soft\">{MATRIX}</p>\n"),
            );
            for (run, eval) in evaluated() {
                page.more(format!(
                    "<h3>{}</h3>\n{}",
                    escape(&run.name),
                    figure(&plot::confusion(eval)?, "")
                ));
            }
        }
        let with_samples: Vec<_> = self.runs.iter().filter(|r| !r.samples.is_empty()).collect();
        if let Some(most) = SAMPLES.checked_div(with_samples.len()) {
            page.section(
                "Sample predictions",
                format!("<p class=\"soft\">{SHEET}</p>\n"),
            );
            for run in with_samples {
                let sheet = samples_html(&run.samples, most.max(8));
                page.more(format!("<h3>{}</h3>\n{sheet}", escape(&run.name)));
            }
        }
        page.section("Configurations", String::new());
        for run in &self.runs {
            let name = escape(&run.name);
            page.more(format!(
                "<details><summary>{name}</summary>\n{}</details>\n",
                code(&run.config)
            ));
        }
        page.section("Reproduce", code(&self.command));
        for run in &self.runs {
            page.more(format!("<h3>{}</h3>\n", escape(&run.name)));
            page.more(code(&run.command) + &facts(&run.provenance.facts()));
        }
        Ok(page.finish())
    }

    /// Bars and a table for the runs that share the first one's classes; the others are named.
    fn per_class(&self, page: &mut Page) -> Result<()> {
        let evaluated: Vec<(&RunReport, &EvalReport)> = self
            .runs
            .iter()
            .filter_map(|r| Some((r, r.eval.as_ref()?)))
            .collect();
        let Some((_, first)) = evaluated.first() else {
            return Ok(());
        };
        let same = |e: &EvalReport| {
            e.per_class
                .iter()
                .map(|c| &c.name)
                .eq(first.per_class.iter().map(|c| &c.name))
        };
        let (alike, others): (Vec<_>, Vec<_>) = evaluated.iter().partition(|(_, e)| same(e));
        let bars: Vec<_> = alike
            .iter()
            .map(|(r, e)| (r.name.as_str(), r.family, *e))
            .collect();
        page.section("Per class", figure(&plot::class_f1(&bars)?, F1));
        if !others.is_empty() {
            let names: Vec<_> = others.iter().map(|(r, _)| escape(&r.name)).collect();
            page.more(format!(
                "<p>Not shown, with other classes: {}.</p>\n",
                names.join(", ")
            ));
        }
        let headings = ["class", "name", "support"]
            .into_iter()
            .chain(alike.iter().map(|(r, _)| r.name.as_str()));
        let mut table = Table::new(headings).left(&[1]);
        for (c, class) in first.per_class.iter().enumerate() {
            let head = [c.to_string(), class.name.clone(), class.support.to_string()];
            table.row(
                head.into_iter().chain(
                    alike
                        .iter()
                        .map(|(_, e)| format!("{:.4}", e.per_class[c].f1)),
                ),
            );
        }
        page.more(format!(
            "<details{}><summary>F1 of every class as numbers</summary>\n{}</details>\n",
            if first.per_class.len() <= SMALL {
                " open"
            } else {
                ""
            },
            table_html(&table)
        ));
        Ok(())
    }
}

const SUMMARY: &str = "FLOPs of one forward pass, a multiply-add counted as 2. ± 95 %: half the width of the interval \
    that the number of test images allows (Wilson), in points. Train-test gap: last epoch's training top-1 minus test \
    top-1, in points. Times are wall times of all epochs, validation included.";
