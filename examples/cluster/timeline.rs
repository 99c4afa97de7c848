//! When what happened to each request, as a Chrome trace: a process per rank, and on it a slice per request with its stages inside.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use kvferry::{Event, FetchCourse, Moment, OfferCourse, RequestCourse};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;

use crate::record::Record;
use crate::setup::Setup;

/// When what happened to a request somewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Course {
    Request(RequestCourse),
    Offer(OfferCourse),
    Fetch(FetchCourse),
}

impl Course {
    /// What an event tells of that.
    pub(crate) fn of(event: &Event) -> Option<Course> {
        match event {
            Event::RequestEnded(course) => Some(Course::Request((**course).clone())),
            Event::OfferEnded(course) => Some(Course::Offer(**course)),
            Event::FetchEnded(course) => Some(Course::Fetch((**course).clone())),
            _ => None,
        }
    }
}

/// Why there is no timeline.
#[derive(Debug, Error)]
#[error("--timeline {}: it cannot be written: {source}; name a file in a folder that is there", file.display())]
pub(crate) struct TimelineError {
    file: PathBuf,
    source: std::io::Error,
}

/// Writes the whole trace. All ranks are of one machine, and so is their clock.
pub(crate) fn write(file: &Path, setup: &Setup, record: &Record) -> Result<(), TimelineError> {
    let wrong = |source| TimelineError { file: file.to_owned(), source };
    let mut out = BufWriter::new(File::create(file).map_err(wrong)?);
    let text = json!({ "displayTimeUnit": "ms", "traceEvents": events(setup, record) });
    serde_json::to_writer(&mut out, &text).map_err(std::io::Error::from).and_then(|()| out.flush()).map_err(wrong)
}

fn events(setup: &Setup, record: &Record) -> Vec<Value> {
    let slices: Vec<Slice> = record.courses.iter().map(|(rank, course)| Slice::of(pid(*rank), course)).collect();
    let first = slices.iter().map(|slice| slice.from).min().unwrap_or_default();
    let names = setup.ranks.iter().enumerate().map(|(index, rank)| (pid(Some(index)), rank.name()));
    let names = std::iter::once((pid(None), "scheduler".to_owned())).chain(names);
    let named = names.map(|(pid, name)| json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}));
    named.chain(slices.iter().flat_map(|slice| slice.draw(first))).collect()
}

fn pid(rank: Option<usize>) -> usize {
    rank.map_or(1, |index| index + 2)
}

/// One request at one place.
struct Slice {
    pid: usize,
    request: u64,
    name: String,
    from: Moment,
    to: Moment,
    /// One after another.
    stages: Vec<(&'static str, Moment, Moment)>,
    about: Value,
}

impl Slice {
    fn of(pid: usize, course: &Course) -> Slice {
        match course {
            Course::Request(course) => Slice {
                pid,
                request: course.request.0,
                name: course.request.to_string(),
                from: course.submitted,
                to: course.finished,
                stages: stages(course.submitted, [("queue", course.paired), ("handover", Some(course.finished))]),
                about: json!({"outcome": format!("{:?}", course.outcome), "handover": course.handover.map(|id| id.0)}),
            },
            Course::Offer(course) => Slice {
                pid,
                request: course.request.0,
                name: format!("offer of {}", course.request),
                from: course.asked,
                to: course.closed,
                stages: stages(
                    course.asked,
                    [("room", course.opened), ("prefill", course.ready), ("offered", Some(course.closed))],
                ),
                about: json!({"view": format!("{:?}", course.view), "post_us": course.posting.as_micros() as u64}),
            },
            Course::Fetch(course) => Slice {
                pid,
                request: course.request.0,
                name: format!("{} of {}", course.handover, course.request),
                from: course.asked,
                to: course.settled,
                stages: stages(
                    course.asked,
                    [
                        ("room", course.placed),
                        ("plan", course.planned.or(course.posted)),
                        ("wire", course.moved),
                        ("notice", course.moved.map(|_| course.settled)),
                    ],
                ),
                about: json!({
                    "outcome": format!("{:?}", course.outcome),
                    "post_us": course.posting.as_micros() as u64,
                    "bytes": course.paths.iter().map(|path| path.bytes).sum::<u64>(),
                    "pieces": course.paths.iter().map(|path| path.pieces).sum::<u64>(),
                    "transports": course.paths.iter().map(|path| path.kind.to_string()).collect::<Vec<_>>(),
                }),
            },
        }
    }

    /// Begin and end of it and of its stages, in microseconds since `first`. Slices of several requests overlap, so each is a track of its own.
    fn draw(&self, first: Moment) -> Vec<Value> {
        let edge = |phase: &str, name: &str, at: Moment, about: &Value| {
            let ts = at.since(first).as_nanos() as f64 / 1e3;
            json!({"ph": phase, "cat": "handover", "id": self.request, "pid": self.pid, "tid": 0, "name": name, "ts": ts, "args": about})
        };
        let nothing = json!({});
        let mut drawn = vec![edge("b", &self.name, self.from, &self.about)];
        for (name, from, to) in &self.stages {
            drawn.push(edge("b", name, *from, &nothing));
            drawn.push(edge("e", name, *to, &nothing));
        }
        drawn.push(edge("e", &self.name, self.to, &nothing));
        drawn
    }
}

/// Each from the end of the one before it; those that were not reached are left out, and what overlaps its forerunner begins with its end.
fn stages<const N: usize>(
    from: Moment,
    ends: [(&'static str, Option<Moment>); N],
) -> Vec<(&'static str, Moment, Moment)> {
    let mut from = from;
    let mut stages = Vec::with_capacity(N);
    for (name, end) in ends {
        if let Some(end) = end {
            stages.push((name, from, end.max(from)));
            from = end.max(from);
        }
    }
    stages
}
