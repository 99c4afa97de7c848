//! Bugs that are planted on the simulator's side of the seams, to show that each invariant would be missed if it did not hold.

use std::fmt;

use kvferry_core::protocol::{Event, Finished, Outcome, OutcomeReport, Refusal};

/// A bug. Production code knows nothing of it: it lives in the simulated clock, network, transports, engines and observers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Plant {
    /// Engines take quarantined blocks back at once (I1).
    HastyEngine,
    /// NICs report pulls as complete of which only the first half has come (I2).
    HalfNic,
    /// Decode leaders report a second, other outcome of some handovers (I3).
    TwoOutcomes,
    /// Users hear of some requests that are delivered that they failed (I3).
    FalseAnswers,
    /// Decode engines never say that they have let some handovers' blocks go (I4).
    SilentEngine,
    /// Some alarms never ring (I5).
    LostAlarms,
    /// Nodes restart in the epoch that they had before (I6).
    OldEpoch,
    /// Decode engines say that blocks are free while they still hold them (I7).
    OverbookedEngine,
    /// Nodes that are woken at one instant are polled in the order of a randomly keyed hash map (I8).
    RandomOrder,
    /// Decode engines place some handovers where another one is (I9).
    DoubleBooking,
    /// Some nodes' clocks go ten times too fast (I10).
    RacingClock,
}

impl Plant {
    /// All of them, in the order of the invariants that they break.
    pub const ALL: [Plant; 11] = [
        Plant::HastyEngine,
        Plant::HalfNic,
        Plant::TwoOutcomes,
        Plant::FalseAnswers,
        Plant::SilentEngine,
        Plant::LostAlarms,
        Plant::OldEpoch,
        Plant::OverbookedEngine,
        Plant::RandomOrder,
        Plant::DoubleBooking,
        Plant::RacingClock,
    ];
}

impl fmt::Display for Plant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Plant::HastyEngine => "engines take quarantined blocks back at once",
            Plant::HalfNic => "NICs report half a pull as the whole",
            Plant::TwoOutcomes => "leaders report a second outcome",
            Plant::FalseAnswers => "delivered requests are answered with failures",
            Plant::SilentEngine => "engines do not say that blocks are free",
            Plant::LostAlarms => "alarms are lost",
            Plant::OldEpoch => "nodes restart in their old epoch",
            Plant::OverbookedEngine => "engines say that blocks are free which they hold",
            Plant::RandomOrder => "nodes are polled in the order of a hash map",
            Plant::DoubleBooking => "engines place two handovers in the same blocks",
            Plant::RacingClock => "clocks go ten times too fast",
        })
    }
}

/// How much too fast a racing clock goes, in parts per million: ten times as fast as the world, on every third node.
pub(crate) fn racing_ppm(node: usize) -> i64 {
    if node.is_multiple_of(3) { 9_000_000 } else { 0 }
}

/// Whether an alarm is one of those that are lost: one in eight.
pub(crate) fn is_lost(node: usize, at: u64) -> bool {
    crate::trace::hash_bytes(&(at ^ node as u64).to_le_bytes()).is_multiple_of(8)
}

/// What a leader with two minds says besides: every seventh handover ends the other way as well.
pub(crate) fn other_outcome(event: &Event) -> Option<Event> {
    let Event::Settled { report } = event else { return None };
    if !report.handover.0.is_multiple_of(7) {
        return None;
    }
    let outcome = if report.outcome.is_delivered() { Outcome::Cancelled } else { Outcome::Delivered };
    Some(Event::Settled { report: OutcomeReport { outcome, ..report.clone() } })
}

/// What a user hears instead of an answer: every eighth delivery is a failure.
pub(crate) fn other_answer(answer: Result<Finished, Refusal>) -> Result<Finished, Refusal> {
    match answer {
        Ok(finished) if finished.outcome.is_delivered() && finished.request.0.is_multiple_of(8) => {
            Err(Refusal::UnknownRequest(finished.request))
        }
        answer => answer,
    }
}

/// The order of a randomly keyed hash map: what the simulator must never depend on.
#[allow(clippy::disallowed_types, reason = "the planted nondeterminism")]
pub(crate) fn random_order(nodes: &mut Vec<usize>) {
    let set: std::collections::HashSet<usize> = nodes.drain(..).collect();
    nodes.extend(set);
}
