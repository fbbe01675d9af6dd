//! A profile as a trace in Chrome's JSON format, which Perfetto (ui.perfetto.dev) opens: a row for the host, one for
//! the phases, one for the device's queue, and memory as a counter.

use super::Profile;
use crate::{Error, Result};
use serde_json::{Value, json};

const HOST: u32 = 1;
const PHASES: u32 = 2;
const QUEUE: u32 = 3;

/// The trace of a profile: times in microseconds from the start of the step.
///
/// # Errors
/// The profile has counts in place of times.
pub fn chrome(p: &Profile) -> Result<Value> {
    if p.counted() {
        return Err(Error::input(
            "a trace shows times, and cuda:sim counts: profile on another backend for a trace",
        ));
    }
    let us = |seconds: f64| 1e6 * seconds;
    let span = |row: u32, name: &str, kind: &str, start: f64, seconds: f64, args: Value| {
        json!({
            "ph": "X", "pid": 1, "tid": row, "name": name, "cat": kind, "ts": us(start), "dur": us(seconds),
            "args": args,
        })
    };
    let named = |row: u32, name: &str| json!({"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}});
    let process = format!(
        "{} {}, batch {}",
        p.model,
        format!("{:?}", p.direction).to_lowercase(),
        p.batch
    );
    let mut events = vec![
        json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": process}}),
        named(HOST, "host"),
        named(PHASES, "phases"),
        named(QUEUE, &format!("queue: {}", p.origin.device)),
    ];
    let whole = p.write + p.run + p.read;
    let none = || json!({});
    events.push(span(HOST, "step", "host", 0.0, whole, none()));
    events.push(span(HOST, "data", "host", 0.0, p.write, none()));
    events.push(span(HOST, "run", "host", p.write, p.run, none()));
    events.push(span(
        HOST,
        "result",
        "host",
        p.write + p.run,
        p.read,
        none(),
    ));
    let mut first = 0;
    while first < p.launches.len() {
        let phase = &p.launches[first].phase;
        let mut last = first;
        while p.launches.get(last + 1).is_some_and(|l| l.phase == *phase) {
            last += 1;
        }
        let (start, end) = (&p.launches[first], &p.launches[last]);
        let seconds = end.start + end.seconds - start.start;
        events.push(span(
            PHASES,
            phase,
            "phase",
            p.write + start.start,
            seconds,
            none(),
        ));
        first = last + 1;
    }
    for l in &p.launches {
        let name = format!("{} {}", l.scope, l.op);
        let args = json!({
            "shape": l.shape, "variant": l.variant, "kernel": l.kernel, "flops": l.flops, "executed": l.executed,
            "bytes": l.bytes, "roofline_us": us(l.floor), "share_of_roofline": l.share(), "bound": l.bound,
            "gap_us": us(l.gap), "node": l.node,
        });
        events.push(span(
            QUEUE,
            name.trim(),
            &l.phase,
            p.write + l.start,
            l.seconds,
            args,
        ));
    }
    let mut before = u64::MAX;
    for l in &p.launches {
        let bytes = p.memory.temporaries.get(l.node).copied().unwrap_or(0);
        if bytes != before {
            events.push(json!({
                "ph": "C", "pid": 1, "name": "temporaries", "ts": us(p.write + l.start), "args": {"bytes": bytes},
            }));
            before = bytes;
        }
    }
    Ok(json!({
        "traceEvents": events, "displayTimeUnit": "ms",
        "otherData": {"version": p.origin.version, "commit": p.origin.commit, "backend": p.origin.backend},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::model::Direction;

    /// Sums of a trace's spans over its step, in microseconds: of the host's row, and of the queue's with data and
    /// result.
    fn shares(p: &Profile) -> [f64; 2] {
        let t = chrome(p).unwrap();
        let events = t["traceEvents"].as_array().unwrap();
        let sum = |row: u64, skip: &str| -> f64 {
            let of = events.iter().filter(|e| e["ph"] == "X" && e["tid"] == row);
            of.filter(|e| e["name"] != skip)
                .map(|e| e["dur"].as_f64().unwrap())
                .sum()
        };
        let step = events.iter().find(|e| e["name"] == "step").unwrap();
        let step = step["dur"].as_f64().unwrap();
        let host = 1e6 * (p.write + p.read);
        [sum(1, "step") / step, (sum(3, "") + host) / step]
    }

    #[test]
    fn spans_sum_to_the_step() {
        // On a busy machine the thread may be held up between a launch and its clock.
        assert!((0..10).any(|_| {
            let [host, queue] = shares(&crate::profile::tests::tiny(Direction::Train));
            assert!((host - 1.0).abs() < 1e-6);
            (0.9..=1.0001).contains(&queue)
        }));
    }
}
