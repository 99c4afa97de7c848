//! What came out.

use std::time::Duration;

use kvferry_core::Evidence;
use serde::Serialize;

use super::Options;
use super::initiator::{Measured, Sample};
use super::kv::Shape;

/// The result; serialised, it is what `--json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    transport: &'static str,
    device: String,
    /// The native library here, and what it says of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    library: Option<String>,
    op: &'static str,
    /// Blocks of the request in all planes, whatever the transport makes of them.
    pieces: u64,
    /// Of all pieces.
    bytes: u64,
    seconds: Spread,
    /// Of the first one after the connection stood, which `seconds` leaves out.
    first_seconds: f64,
    /// Of the last one, which `seconds` leaves out, too: after everything was compared and overwritten, and both processes' caches were filled with other
    /// memory. What the first one is to be compared with. Absent where the comparison found a difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    rested_seconds: Option<f64>,
    /// With `--contiguous`: as many bytes in as few pieces as there can be, one transfer after each timed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    contiguous_seconds: Option<Spread>,
    /// How fast the request's pieces went, of how fast those did: medians.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_contiguous: Option<f64>,
    /// `bytes` in the median of `seconds`, in 10⁹ bytes a second.
    gigabytes_per_second: f64,
    /// Median.
    plan_microseconds: f64,
    /// Of both processes while the bytes moved: median.
    cpu_seconds: f64,
    /// The destination's GPU by CUDA events, with `--gpu-times`.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_seconds: Option<Spread>,
    /// With several rails: bytes of all timed iterations, by device here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rails: Vec<Carried>,
    /// What is known of the path, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    evidence: Option<Evidence>,
    /// What the other process is, where it may be somebody else's.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    /// What its protocol lacks beside kvferry's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    lacks: Vec<&'static str>,
    /// Whether every byte was right.
    verified: bool,
    #[serde(skip)]
    shape: (u32, u32, u32, u32),
    /// The first byte that was not.
    #[serde(skip)]
    pub(crate) mismatch: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Carried {
    device: String,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    min: f64,
    p50: f64,
    max: f64,
}

impl Report {
    pub(crate) fn new(
        options: &Options,
        (device, library): (String, Option<String>),
        shape: &Shape,
        measured: Measured,
    ) -> Report {
        let Measured { first, samples, contiguous, rested, carried, evidence, mismatch } = measured;
        let several = carried.len() > 1;
        let rails = carried.into_iter().filter(|_| several).map(|(device, bytes)| Carried { device, bytes });
        let spread =
            |part: fn(&Sample) -> Duration| Spread::of(samples.iter().map(|sample| part(sample).as_secs_f64()));
        let seconds = spread(|sample| sample.moved);
        let contiguous =
            (!contiguous.is_empty()).then(|| Spread::of(contiguous.iter().map(|sample| sample.moved.as_secs_f64())));
        Report {
            transport: options.transport.name(),
            device,
            library,
            op: options.op.name(),
            pieces: shape.pieces(),
            bytes: shape.bytes(),
            seconds,
            first_seconds: first.moved.as_secs_f64(),
            rested_seconds: rested.map(|rested| rested.moved.as_secs_f64()),
            contiguous_seconds: contiguous,
            of_contiguous: contiguous.map(|contiguous| contiguous.p50 / seconds.p50),
            gigabytes_per_second: shape.bytes() as f64 / seconds.p50 / 1e9,
            plan_microseconds: spread(|sample| sample.plan).p50 * 1e6,
            cpu_seconds: spread(|sample| sample.processor).p50,
            gpu_seconds: options.gpu_times.then(|| spread(|sample| sample.gpu)),
            rails: rails.collect(),
            evidence,
            peer: None,
            lacks: Vec::new(),
            verified: mismatch.is_none(),
            shape: (2 * options.layers, options.blocks, options.block_bytes, options.iters),
            mismatch,
        }
    }

    /// Says what the other process is, and what its protocol lacks.
    pub(crate) fn beside(self, peer: String, lacks: Vec<&'static str>) -> Report {
        Report { peer: Some(peer), lacks, ..self }
    }

    /// One object, on one line.
    pub(crate) fn json(&self) -> String {
        // Numbers and strings always have a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let (planes, blocks, block_bytes, iters) = self.shape;
        let Spread { min, p50, max } = self.seconds;
        let milliseconds = |seconds: f64| format!("{:.3}", seconds * 1e3);
        let gpu = self.gpu_seconds.map(|Spread { min, p50, max }| {
            let text = format!("{} median, {} to {}", milliseconds(p50), milliseconds(min), milliseconds(max));
            ("GPU ms", text)
        });
        let rested = self.rested_seconds.map(|rested| format!("{} with nothing in caches", milliseconds(rested)));
        let rows = [
            ("path", format!("{} on {}, {}, between two processes", self.transport, self.device, self.op)),
            ("request", format!("{planes} planes × {blocks} blocks × {block_bytes} bytes")),
            ("pieces", self.pieces.to_string()),
            ("bytes", self.bytes.to_string()),
            ("ms", format!("{} median, {} to {} in {iters}", milliseconds(p50), milliseconds(min), milliseconds(max))),
            ("first ms", format!("{} after the connection stood", milliseconds(self.first_seconds))),
            ("rested ms", rested.unwrap_or_else(|| "none, since bytes differ".to_owned())),
            ("GB/s", format!("{:.2}", self.gigabytes_per_second)),
            ("plan µs", format!("{:.1}", self.plan_microseconds)),
            ("CPU ms", format!("{} in both processes", milliseconds(self.cpu_seconds))),
            ("verified", if self.verified { "every byte".to_owned() } else { "NO".to_owned() }),
        ];
        let contiguous = self.contiguous_seconds.zip(self.of_contiguous).map(|(Spread { min, p50, max }, part)| {
            let times = format!("{} median, {} to {}", milliseconds(p50), milliseconds(min), milliseconds(max));
            ("large ms", format!("{times}; the pieces went at {part:.2} of that speed"))
        });
        let peer = self.peer.clone().map(|peer| ("peer", peer));
        let lacks = self.lacks.iter().map(|lack| ("lacks", (*lack).to_owned()));
        let shares = self.rails.iter().map(|Carried { device, bytes }| format!("{device} {bytes}"));
        let shares = shares.collect::<Vec<_>>().join(", ");
        let rails = (!shares.is_empty()).then_some(("rails", shares));
        let library = self.library.clone().map(|library| ("library", library));
        let evidence = self.evidence.as_ref().map(|evidence| ("evidence", evidence.to_string()));
        let lines: Vec<String> = rows
            .into_iter()
            .chain(gpu)
            .chain(contiguous)
            .chain(rails)
            .chain(library)
            .chain(evidence)
            .chain(peer)
            .chain(lacks)
            .map(|(name, value)| format!("{name:<9} {value}"))
            .collect();
        lines.join("\n")
    }
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        Spread { min: at(0), p50: at(sorted.len() / 2), max: at(sorted.len().saturating_sub(1)) }
    }
}
