//! The table for people.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::record::Departure;
use crate::verdict::{Path, Verdict};

/// Failures that are listed; the rest is counted.
const FAILURES_SHOWN: usize = 10;

/// Renders a verdict.
pub(crate) fn table(verdict: &Verdict) -> String {
    let mut out = String::new();
    let waits = &verdict.handover_ms;
    let rows = [
        ("requests", verdict.requests.to_string()),
        ("delivered", verdict.delivered.to_string()),
        ("failed", verdict.failed.to_string()),
        ("cancelled", verdict.cancelled.to_string()),
        ("bytes", verdict.bytes.to_string()),
        ("verified bytes", verdict.verified_bytes.to_string()),
        ("mismatched bytes", verdict.mismatched_bytes.to_string()),
        ("leaked blocks", verdict.leaked_blocks.to_string()),
        ("quarantined blocks", verdict.quarantined_blocks.to_string()),
        ("seconds", format!("{:.3}", verdict.seconds)),
        ("GB/s", format!("{:.3}", verdict.gigabytes_per_second)),
        ("handover ms", format!("p50 {:.2}   p99 {:.2}   max {:.2}", waits.p50, waits.p99, waits.max)),
    ];
    for (name, value) in rows {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{name:<20}{value}");
    }
    if !verdict.paths.is_empty() {
        let _ = writeln!(
            out,
            "\n{:<12}{:<12}{:<11}{:<10}{:<11}{:>15}{:>11}  evidence",
            "from", "to", "transport", "device", "direction", "bytes", "pieces"
        );
    }
    for path in &verdict.paths {
        let _ = writeln!(
            out,
            "{:<12}{:<12}{:<11}{:<10}{:<11}{:>15}{:>11}  {}",
            path.from, path.to, path.transport, path.device, path.direction, path.bytes, path.pieces, path.evidence
        );
    }
    for remark in remarks(&verdict.paths) {
        let _ = writeln!(out, "{remark}");
    }
    if !verdict.departures.is_empty() {
        let _ = writeln!(out, "\nleft");
    }
    for Departure { rank, left, seconds, exit_status } in &verdict.departures {
        let status = exit_status.map_or("a signal".to_owned(), |status| format!("exit status {status}"));
        let _ = writeln!(out, "{rank:<12}after {seconds:.3} s, {left} requests still offered, {status}");
    }
    if !verdict.failures.is_empty() {
        let _ = writeln!(out, "\nfailed");
    }
    for failure in verdict.failures.iter().take(FAILURES_SHOWN) {
        let _ = writeln!(out, "request {:<8} {}", failure.request, failure.reason);
    }
    if verdict.failures.len() > FAILURES_SHOWN {
        let _ = writeln!(out, "and {} more", verdict.failures.len() - FAILURES_SHOWN);
    }
    out
}

/// What holds for many paths, once each: what is not proven, what was passed over, what falls short.
fn remarks(paths: &[Path]) -> BTreeSet<String> {
    let mut remarks = BTreeSet::new();
    for path in paths {
        let unseen = path.proof.iter().flat_map(|proof| &proof.unseen);
        remarks.extend(unseen.map(|unseen| format!("{}: not shown: {unseen}", path.transport)));
        remarks.extend(
            path.passed_over.iter().map(|other| format!("{}: preferred, but not taken: {other}", path.transport)),
        );
        remarks.extend(path.rdma_shortfall.iter().map(|short| format!("{}: {short}", path.transport)));
    }
    remarks
}
