//! The loop of `lab`: watch, look, tell.

use super::super::case::case;
use super::probe::{Outcome, Probe, Stage};
use super::versions::Version;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};
use tilewright::Result;
use tilewright::ops::Room;

/// How often the folder is looked at.
const POLL: Duration = Duration::from_millis(80);
/// How long the files must stay as they are: editors write in several steps.
const SETTLE: Duration = Duration::from_millis(10);

/// What the loop tells.
pub enum Event {
    /// A look begins, at a version saved at that time.
    Begun { what: String, since: Instant },
    /// What it is about.
    Stage(Stage),
    /// It ended.
    Done(Version),
}

/// What the loop is asked.
pub enum Order {
    /// Look at the kernels as they are once more.
    Again,
    /// Go over to another case of the op.
    Case(String),
}

/// `op` or `op(params)`: the first of its cases.
pub fn parse_case(text: &str) -> Result<(&'static Room, Option<String>)> {
    let c = case(text)?;
    Ok((c.room, c.params.and_then(|p| p.into_iter().next())))
}

/// A case that is large enough to say something and small enough for a second: the middle one by elements.
pub fn middling(room: &Room) -> String {
    let size = |p: &&str| {
        let case = room.build(p);
        case.map_or(0, |c| {
            c.operands.iter().map(|o| o.spec.len()).sum::<usize>()
        })
    };
    let mut all: Vec<&str> = room.cases.to_vec();
    all.sort_by_key(size);
    all.get(all.len() / 2).copied().unwrap_or("").to_string()
}

/// Files of `dir` with the times they were written.
fn files(dir: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(d) = dirs.pop() {
        // A file may go away while an editor saves it: the next look finds it again.
        let Ok(entries) = std::fs::read_dir(&d) else {
            continue;
        };
        for e in entries.flatten() {
            let Ok(meta) = e.metadata() else { continue };
            if meta.is_dir() {
                dirs.push(e.path());
            } else if e
                .path()
                .extension()
                .is_some_and(|x| x == "wgsl" || x == "cu" || x == "cuh")
                && let Ok(time) = meta.modified()
            {
                found.insert(e.path(), time);
            }
        }
    }
    found
}

/// When the newest of `times` was, where the clocks of the files and of this machine agree that it was just now.
fn saved(times: impl Iterator<Item = SystemTime>) -> Instant {
    let age = times.max().and_then(|t| t.elapsed().ok());
    let age = age.filter(|a| *a < POLL + 10 * SETTLE).unwrap_or_default();
    Instant::now().checked_sub(age).unwrap_or_else(Instant::now)
}

/// Looks at the kernels as they are and then after every save (of which there are `saves` at most) and at every order,
/// until the orders end. Whether the last version was right.
///
/// # Errors
/// What `tell` fails with.
pub fn watch(
    mut probe: Probe,
    saves: Option<usize>,
    orders: &Receiver<Order>,
    tell: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<bool> {
    let mut look = |probe: &Probe, what: String, since: Instant| -> Result<bool> {
        let case = format!("{}({})", probe.room.name, probe.params);
        tell(Event::Begun {
            what: what.clone(),
            since,
        })?;
        let mut told = Ok(());
        let outcome = probe.look(&mut |stage| {
            if told.is_ok() {
                told = tell(Event::Stage(stage));
            }
        });
        told?;
        let good = matches!(outcome, Outcome::Right { .. });
        tell(Event::Done(Version {
            case,
            what,
            outcome,
            seconds: since.elapsed().as_secs_f64(),
            device: probe.device().into(),
        }))?;
        Ok(good)
    };
    let mut seen = files(&probe.dir);
    let mut good = look(&probe, "as it is".into(), Instant::now())?;
    let mut taken = 0;
    while saves.is_none_or(|n| taken < n) {
        match orders.recv_timeout(POLL) {
            Ok(mut order) => {
                // Keys pressed in the meantime: the last one counts.
                while let Ok(later) = orders.try_recv() {
                    order = match (order, later) {
                        (Order::Case(c), Order::Again) => Order::Case(c),
                        (_, later) => later,
                    };
                }
                let what = match order {
                    Order::Again => "again",
                    Order::Case(params) => {
                        probe.params = params;
                        "as it is"
                    }
                };
                seen = files(&probe.dir);
                good = look(&probe, what.into(), Instant::now())?;
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let mut now = files(&probe.dir);
        if now == seen {
            continue;
        }
        loop {
            std::thread::sleep(SETTLE);
            let later = files(&probe.dir);
            if later == now {
                break;
            }
            now = later;
        }
        let changed: Vec<(&PathBuf, &SystemTime)> = now
            .iter()
            .filter(|(path, time)| seen.get(*path) != Some(*time))
            .collect();
        if !changed.is_empty() {
            let names = changed.iter().filter_map(|(path, _)| path.file_name());
            let names: Vec<_> = names.map(|n| n.to_string_lossy()).collect();
            let since = saved(changed.iter().map(|(_, time)| **time));
            taken += 1;
            good = look(&probe, names.join(", "), since)?;
        }
        seen = now;
    }
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_read_and_chosen() {
        assert!(parse_case("conv2d(n=1").is_err() && parse_case("none").is_err());
        let (room, params) = parse_case("add(n=2,c=3)").unwrap();
        assert_eq!((room.name, params.as_deref()), ("add", Some("n=2,c=3")));
        assert!(room.build(&middling(room)).is_ok());
    }

    #[test]
    fn a_save_has_its_time_where_the_clocks_agree() {
        let now = SystemTime::now();
        let ago = |ms| now - Duration::from_millis(ms);
        let age = |t| saved([t].into_iter()).elapsed().as_millis();
        assert!((60..100).contains(&age(ago(60))));
        assert!(age(ago(60_000)) < 20 && age(now + Duration::from_secs(60)) < 20);
    }
}
