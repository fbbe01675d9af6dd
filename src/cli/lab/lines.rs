//! What is seen, as lines: a table a version, or a JSON document.

use super::super::output::{json, print};
use super::probe::Outcome;
use super::versions::{Version, Versions, change};
use tilewright::Result;
use tilewright::report::table::{Table, number};

/// Prints the newest version.
pub fn print_version(versions: &Versions, as_json: bool) -> Result<()> {
    let Some((version, _)) = versions.all.split_last() else {
        return Ok(());
    };
    match as_json {
        true => json(version),
        false => print(&text(versions, version)),
    }
}

fn text(versions: &Versions, version: &Version) -> String {
    let (what, seconds) = (&version.what, number(version.seconds, 2));
    let (worst, figures) = match &version.outcome {
        Outcome::Right { worst, figures } => (worst, figures),
        Outcome::Wrong(why) => {
            let why = why.replace('\n', "\n  ");
            return format!("{what}: WRONG, {seconds} s after the save\n  {why}\n");
        }
        Outcome::Broken(why) => {
            return format!("{what}: DOES NOT RUN, {seconds} s after the save\n  {why}\n");
        }
    };
    let i = versions.all.len() - 1;
    let counts = figures.values().any(|f| f.counted.is_some());
    let unit = if counts { "instructions" } else { "ms" };
    let before = versions
        .reference(i)
        .and_then(|b| versions.all[b].figures());
    let mut t = Table::new(["op", unit, "to the one before", "to the best"]).left(&[0]);
    for (op, f) in figures {
        let then = before.and_then(|b| b.get(op));
        t.row([
            op.clone(),
            number(f.value, if counts { 0 } else { 4 }),
            change(f.value, then.map(|f| f.value)),
            change(f.value, versions.best_before(i, op).map(|f| f.value)),
        ]);
    }
    format!(
        "{what}: right (worst error {} of the allowance), {seconds} s after the save\n{}",
        number(*worst, 3),
        t.to_text()
    )
}

#[cfg(test)]
mod tests {
    use super::super::versions::tests::{right, version};
    use super::*;

    #[test]
    fn a_version_is_a_table_beside_the_one_before() {
        let mut v = Versions::default();
        v.all.push(right("as it is", &[("a", 2.0)]));
        v.all.push(right("x.wgsl", &[("a", 1.5)]));
        let of = |v: &Versions| text(v, v.all.last().unwrap());
        assert_eq!(
            of(&v),
            "x.wgsl: right (worst error 0.125 of the allowance), 0.31 s after the save\n\
             op      ms  to the one before  to the best\n\
             a   1.5000            -25.0 %      -25.0 %\n"
        );
        v.all
            .push(version("x.wgsl", Outcome::Wrong("y0\ny1".into())));
        assert_eq!(of(&v), "x.wgsl: WRONG, 0.31 s after the save\n  y0\n  y1\n");
    }
}
