//! One rank's share of Llama-70B at tp 8, 8,192 tokens (81,920 pieces of 4 KiB), from GPU to GPU through all actors of three nodes in one process,
//! and where the time goes.
//!
//! usage: cargo bench -p kvferry-benches --bench gpu_handover [-- FROM TO [LINGER...]]
//!
//! FROM and TO are numbers of GPUs, by default 0 and 1; LINGER is how many microseconds threads poll on before they sleep, by default 0. `memory` in
//! place of FROM and TO moves as many tokens of a few bytes each through shared memory: everything but the copy.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvferry::{
    Direction, Event, FetchCourse, Moment, MonotonicClock, OfferCourse, RequestCourse, RequestId, TransportKind, Watch,
};
use kvferry_benches::{Error, Nodes};
use tokio::runtime::Builder;

const GEOMETRY: &str = "layers=80,kv_heads=1,head_dim=128,dtype=bf16";
const TOKENS: u64 = 8192;
const BYTES: u64 = TOKENS * 80 * 2 * 128 * 2;
/// As many tokens with next to no bytes.
const THIN: &str = "layers=1,kv_heads=1,head_dim=8,dtype=bf16";
const WARM_UP: usize = 20;
const ROUNDS: usize = 200;

/// What is measured.
#[derive(Clone, Copy)]
struct Way<'a> {
    geometry: &'a str,
    kind: TransportKind,
    devices: [Option<&'a str>; 2],
    direction: Direction,
    linger: Duration,
}

/// When what happened to each request, as its three sides told.
#[derive(Debug, Default)]
struct Courses(Mutex<BTreeMap<RequestId, Course>>);

#[derive(Clone, Debug, Default)]
struct Course {
    request: Option<RequestCourse>,
    offer: Option<OfferCourse>,
    fetch: Option<FetchCourse>,
}

impl Watch for Courses {
    fn happened(&self, event: &Event) {
        let mut courses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::RequestEnded(course) => {
                courses.entry(course.request).or_default().request = Some((**course).clone())
            }
            Event::OfferEnded(course) => courses.entry(course.request).or_default().offer = Some(**course),
            Event::FetchEnded(course) => courses.entry(course.request).or_default().fetch = Some((**course).clone()),
            _ => {}
        }
    }
}

/// How long after the submission each stage was over, in its order.
fn stages(course: &Course, submitted: Moment, heard: Moment) -> Option<Vec<(&'static str, Duration)>> {
    let Course { request: Some(request), offer: Some(offer), fetch: Some(fetch) } = course else { return None };
    let stages = [
        ("submission heard", request.submitted),
        ("prefill asked", offer.asked),
        ("offer open", offer.opened?),
        ("layers ready", offer.ready?),
        ("paired", request.paired?),
        ("decode asked", fetch.asked),
        ("blocks placed", fetch.placed?),
        ("planned", fetch.planned?),
        ("posted", fetch.posted.unwrap_or(fetch.planned?)),
        ("last byte here", fetch.moved?),
        ("settled", fetch.settled),
        ("finished", request.finished),
        ("outcome heard", heard),
        ("offer closed", offer.closed),
    ];
    Some(stages.map(|(name, at)| (name, at.since(submitted))).into())
}

/// Median and 99th percentile.
fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |percent: usize| times.get(times.len() * percent / 100).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    format!("p50 {:.3} ms  p99 {:.3} ms", at(50), at(99))
}

async fn measure(way: Way<'_>) -> Result<(), Error> {
    let courses = Arc::new(Courses::default());
    let mut nodes = Nodes::start_watched(way.geometry, way.kind, way.direction, way.devices, |config| {
        config.watchers.push(courses.clone());
        config.linger = way.linger;
    })
    .await?;
    // The engines' thread, this one, does as the others do.
    let awake = tokio::spawn(async move {
        while !way.linger.is_zero() {
            tokio::task::yield_now().await;
        }
    });
    for _ in 0..WARM_UP {
        nodes.handover(TOKENS).await?;
    }
    let (mut whole, mut settled, mut ready) = (Vec::new(), Vec::new(), Vec::new());
    let mut moments = BTreeMap::new();
    for _ in 0..ROUNDS {
        let (start, submitted) = (Instant::now(), MonotonicClock::moment());
        let finished = nodes.handover(TOKENS).await?;
        whole.push(start.elapsed());
        moments.insert(finished.request, (submitted, MonotonicClock::moment()));
        if !finished.outcome.is_delivered() {
            return Err(format!("{:?}", finished.outcome).into());
        }
        if let (Some(first), Some(last)) = (finished.ready_at, finished.settled_at) {
            ready.push(last.since(first));
            settled.push(last.since(submitted));
        }
    }
    awake.abort();
    nodes.shutdown().await;

    let direction = format!("{:?}", way.direction).to_lowercase();
    let head = format!("{direction}, linger {} us", way.linger.as_micros());
    println!("{head}: submit to delivered at the decode side {}", quantiles(settled));
    println!("{head}: submit to outcome {}", quantiles(whole));
    println!("{head}: last layer ready to delivered {}", quantiles(ready));
    let courses = courses.0.lock().unwrap_or_else(PoisonError::into_inner);
    let mut by_stage: Vec<(&str, Vec<Duration>)> = Vec::new();
    for (request, (submitted, heard)) in moments {
        let Some(stages) = courses.get(&request).and_then(|course| stages(course, submitted, heard)) else { continue };
        by_stage.resize_with(stages.len(), Default::default);
        for ((name, times), (stage, time)) in by_stage.iter_mut().zip(stages) {
            *name = stage;
            times.push(time);
        }
    }
    let medians: Vec<String> = by_stage
        .iter_mut()
        .map(|(name, times)| {
            times.sort();
            let median = times.get(times.len() / 2).copied().unwrap_or_default();
            format!("{name} {}", median.as_micros())
        })
        .collect();
    println!("{head}: medians since the submission, us: {}", medians.join(", "));
    Ok(())
}

fn main() -> ExitCode {
    // Cargo adds an option of its own.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let is_thin = words.first().is_some_and(|word| word == "memory");
    let gpu = |at: usize, default: &str| format!("gpu{}", words.get(at).map_or(default, String::as_str));
    let (from, to) = (gpu(0, "0"), gpu(1, "1"));
    let lingers = words.get(if is_thin { 1 } else { 2 }..).unwrap_or_default();
    let lingers = lingers.iter().map(|word| word.parse().map(Duration::from_micros)).collect::<Result<Vec<_>, _>>();
    let (geometry, kind, devices) = if is_thin {
        println!("{TOKENS} tokens through shared memory");
        (THIN, TransportKind::Shm, [None, None])
    } else {
        println!("{from} to {to}, {BYTES} bytes");
        (GEOMETRY, TransportKind::Cuda, [Some(from.as_str()), Some(to.as_str())])
    };
    let done = lingers.map_err(Error::from).and_then(|mut lingers| {
        if lingers.is_empty() {
            lingers.push(Duration::ZERO);
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        for linger in lingers {
            for direction in [Direction::Pull, Direction::Push] {
                runtime.block_on(measure(Way { geometry, kind, devices, direction, linger }))?;
            }
        }
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_handover: {error}");
            ExitCode::FAILURE
        }
    }
}
