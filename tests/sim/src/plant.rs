//! Bugs that are planted on the simulator's side of the seams, to show that each invariant would be missed if it did not hold.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::BuildHasher;
use std::str::FromStr;
use std::sync::OnceLock;

use kvferry_core::protocol::{Event, Finished, Outcome, OutcomeReport, Refusal};
use kvferry_core::{GroupId, HandoverId, RequestId};
use thiserror::Error;

macro_rules! plants {
    ($($(#[$doc:meta])* $plant:ident = $word:literal, $what:literal;)+) => {
        /// A bug. Production code knows nothing of it: it lives in the simulated clock, network, transports, engines and observers, or is a
        /// term that only the simulator gives.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Plant {
            $($(#[$doc])* $plant),+
        }

        impl Plant {
            /// All of them, in the order of the invariants that they break.
            pub const ALL: &[Plant] = &[$(Plant::$plant),+];

            /// The word used in command lines.
            pub fn name(self) -> &'static str {
                match self {
                    $(Plant::$plant => $word),+
                }
            }
        }

        impl fmt::Display for Plant {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Plant::$plant => $what),+
                })
            }
        }
    };
}

plants! {
    /// Engines take quarantined blocks back at once (I1).
    HastyEngine = "hasty-engine", "engines take quarantined blocks back at once";
    /// NICs report pulls as complete of which only the first half has come (I2).
    HalfNic = "half-nic", "NICs report half a pull as the whole";
    /// Decode leaders report a second, other outcome of some handovers (I3).
    TwoOutcomes = "two-outcomes", "leaders report a second outcome";
    /// Users hear of some requests that are delivered that they failed (I3).
    FalseAnswers = "false-answers", "delivered requests are answered with failures";
    /// Decode engines never say that they have let some handovers' blocks go (I4).
    SilentEngine = "silent-engine", "engines do not say that blocks are free";
    /// Some alarms never ring (I5).
    LostAlarms = "lost-alarms", "alarms are lost";
    /// Nodes restart in the epoch that they had before (I6).
    OldEpoch = "old-epoch", "nodes restart in their old epoch";
    /// Decode engines say that blocks are free while they still hold them (I7).
    OverbookedEngine = "overbooked-engine", "engines say that blocks are free which they hold";
    /// Nodes that are woken at one instant are polled in the order of a randomly keyed hash map (I8).
    RandomOrder = "random-order", "nodes are polled in the order of a hash map";
    /// The same, but the keys are those of the process: it runs a seed the same way again, and another process does not (I8).
    ProcessOrder = "process-order", "nodes are polled in an order that is the process's own";
    /// Decode engines place some handovers where another one is (I9).
    DoubleBooking = "double-booking", "engines place two handovers in the same blocks";
    /// Schedulers are heard to give some offers to a second consumer while the first reads (I9). It is planted at the observer: a second
    /// pairing for real would be refused by the leaders.
    TwoConsumers = "two-consumers", "schedulers seem to pair offers that somebody reads";
    /// Some nodes' clocks go ten times too fast (I10).
    RacingClock = "racing-clock", "clocks go ten times too fast";
}

/// A word that is no planted bug.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no bug called {word:?} to plant; there are {known}")]
pub struct UnknownPlant {
    /// The word.
    pub word: String,
    /// All that there are.
    pub known: String,
}

impl FromStr for Plant {
    type Err = UnknownPlant;

    fn from_str(word: &str) -> Result<Self, UnknownPlant> {
        let known = || Plant::ALL.iter().map(|plant| plant.name()).collect::<Vec<_>>().join(", ");
        let found = Plant::ALL.iter().copied().find(|plant| plant.name() == word);
        found.ok_or_else(|| UnknownPlant { word: word.to_owned(), known: known() })
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

/// A scheduler that seems to pair every seventh offer once more as soon as its first transfer has begun.
#[derive(Debug, Default)]
pub(crate) struct SecondConsumers {
    paired: BTreeMap<HandoverId, (RequestId, GroupId)>,
}

impl SecondConsumers {
    /// What it says besides.
    pub(crate) fn pair(&mut self, event: &Event) -> Option<Event> {
        match event {
            Event::Paired { request, handover, group } if handover.0.is_multiple_of(7) => {
                self.paired.insert(*handover, (*request, *group));
                None
            }
            Event::Started { handover } => {
                let (request, group) = self.paired.remove(handover)?;
                // No scheduler counts so far in one epoch.
                let handover = HandoverId(handover.0 | 1 << 31);
                Some(Event::Paired { request, handover, group })
            }
            _ => None,
        }
    }
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

/// An order that is the same throughout a process, and another one in the next: what two runs in one process cannot show.
#[allow(clippy::disallowed_types, reason = "the planted nondeterminism")]
pub(crate) fn process_order(nodes: &mut [usize]) {
    static KEYS: OnceLock<std::hash::RandomState> = OnceLock::new();
    let keys = KEYS.get_or_init(std::hash::RandomState::new);
    nodes.sort_by_key(|node| keys.hash_one(node));
}
