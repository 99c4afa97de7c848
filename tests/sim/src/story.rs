//! What happened to one request, in words: what `simulate --replay` prints.

use std::collections::BTreeSet;
use std::fmt::{self, Write};

use kvferry_core::protocol::{EngineCall, EngineEvent, Event, Outcome};
use kvferry_core::{Direction, HandoverId, RequestId};

use crate::chronicle::{Entry, What};

/// The story of one request, told as it happens: everything about it and its handovers, and all faults in between.
#[derive(Clone, Debug)]
pub struct Story {
    request: RequestId,
    handovers: BTreeSet<HandoverId>,
    /// Faults that have begun and are not mended.
    standing: BTreeSet<String>,
    /// Whether it is under way: only then faults belong to it.
    told: bool,
    ended: bool,
}

impl Story {
    /// Of that request.
    pub fn new(request: RequestId) -> Self {
        Story { request, handovers: BTreeSet::new(), standing: BTreeSet::new(), told: false, ended: false }
    }

    /// Whether there is such a request, as far as the run has come.
    pub fn is_told(&self) -> bool {
        self.told
    }

    /// What belongs to it of an entry: one line, and under the first those faults that have begun before.
    pub fn tell(&mut self, entry: &Entry) -> Option<String> {
        if let What::Observed(Event::Paired { request, handover, .. }) = &entry.what
            && *request == self.request
        {
            self.handovers.insert(*handover);
        }
        let begins = !self.told;
        self.note_fault(&entry.what);
        let what = self.words(&entry.what)?;
        self.told = true;
        let mut line = format!("{:>4}.{:09}  ", entry.at / 1_000_000_000, entry.at % 1_000_000_000);
        // Writing to a string does not fail.
        let _ = match entry.epoch {
            0 => write!(line, "{:<8}{what}", ""),
            epoch => write!(line, "{:<8}{what}", format!("n{}/{epoch}", entry.node)),
        };
        for fault in self.standing.iter().filter(|_| begins) {
            let _ = write!(line, "\n{:28}~ since before: {fault}", "");
        }
        Some(line)
    }

    fn note_fault(&mut self, what: &What) {
        match what {
            What::Fault(fault, true) => self.standing.insert(fault.to_string()),
            What::Fault(fault, false) => self.standing.remove(&fault.to_string()),
            What::Healed => {
                self.standing.clear();
                false
            }
            _ => false,
        };
    }

    fn words(&mut self, what: &What) -> Option<String> {
        let mine = |request: &RequestId| *request == self.request;
        let ours = |handover: &HandoverId| self.handovers.contains(handover);
        Some(match what {
            What::Submitted { request, tokens, again: false } if mine(request) => format!("submitted: {tokens} tokens"),
            What::Submitted { request, .. } if mine(request) => "submitted again, to the next scheduler".to_owned(),
            What::CancelAsked(request) if mine(request) => "its user no longer wants it".to_owned(),
            What::Answered(request, answer) if mine(request) => {
                self.ended = true;
                match answer {
                    Ok(finished) if finished.attempts == 1 => format!("answered: {}", Ended(&finished.outcome)),
                    Ok(finished) => {
                        format!("answered after {} attempts: {}", finished.attempts, Ended(&finished.outcome))
                    }
                    Err(refusal) => format!("refused: {refusal}"),
                }
            }
            What::Called(EngineCall::Prefill(job)) if mine(&job.spec.request) => {
                "prefill: the engine is asked".to_owned()
            }
            What::Told(EngineEvent::Opened { request, steps, .. }) if mine(request) => {
                format!("prefill: blocks found, steps to come: {}", steps.len())
            }
            What::Told(EngineEvent::Ready { request, steps }) if mine(request) => format!("step {steps} is ready"),
            What::Told(EngineEvent::Unable { request, reason }) if mine(request) => {
                format!("prefill: unable: {reason}")
            }
            What::Called(EngineCall::Release { request, view }) if mine(request) => {
                format!("prefill: released, {view:?}")
            }
            What::Called(EngineCall::Rejected { request, refusal }) if mine(request) => {
                format!("the engine was rejected: {refusal}")
            }
            What::Observed(Event::OfferOpened { request }) if mine(request) => "the offer stands".to_owned(),
            What::Observed(Event::OfferClosed { request, view }) if mine(request) => {
                format!("the offer is gone: {view:?}")
            }
            What::Observed(Event::LeaseExpired { request }) if mine(request) => "the lease has run out".to_owned(),
            What::Observed(Event::Paired { request, handover, group }) if mine(request) => {
                format!("paired with {group} as {handover}")
            }
            What::Observed(Event::Freed { request }) if mine(request) => "all its credits are back".to_owned(),
            What::Called(EngineCall::Place { handover, .. }) if ours(handover) => {
                format!("{handover}: the engine is asked for blocks")
            }
            What::Told(EngineEvent::Placed { handover, .. }) if ours(handover) => format!("{handover}: placed"),
            What::Told(EngineEvent::NoRoom { handover, reason }) if ours(handover) => {
                format!("{handover}: no room: {reason}")
            }
            What::Observed(Event::Started { handover }) if ours(handover) => format!("{handover}: the first transfer"),
            What::Posted { id, direction, .. } if ours(&id.handover()) => {
                let verb = if *direction == Direction::Pull { "reads" } else { "writes" };
                format!("{id}: posted, {verb}")
            }
            What::Expected { id, bytes, .. } if ours(&id.handover()) => {
                format!("{id}: a push of {bytes} bytes is expected")
            }
            What::Landed { id, bytes: Some(bytes) } if ours(&id.handover()) => format!("{id}: {bytes} bytes landed"),
            What::Landed { id, bytes: None } if ours(&id.handover()) => format!("{id}: failed"),
            What::Observed(Event::Settled { report }) if ours(&report.handover) => {
                format!("{}: decided: {}", report.handover, Ended(&report.outcome))
            }
            What::Called(EngineCall::Settled { handover, outcome, quarantined, .. }) if ours(handover) => {
                let quarantined = if *quarantined { ", its blocks are quarantined" } else { "" };
                format!("{handover}: the engine is told: {}{quarantined}", Ended(outcome))
            }
            What::Called(EngineCall::Returned { handover, proof }) if ours(handover) => {
                format!("{handover}: nothing writes its blocks any more: {proof:?}")
            }
            What::LetGo(handover) if ours(handover) => format!("{handover}: its blocks are free"),
            What::Breach(violation) if ours(&violation.handover) => format!("BREACH {violation:?}"),
            // What happened around it.
            _ if !self.told || self.ended => return None,
            What::Fault(fault, true) => format!("      ~ {fault}"),
            What::Fault(fault, false) => format!("      ~ no longer: {fault}"),
            What::Started => "      ~ starts".to_owned(),
            What::Crashed => "      ~ dies".to_owned(),
            What::Ended(why) => format!("      ~ its incarnation ends: {why}"),
            What::Healed => "      ~ all is mended".to_owned(),
            _ => return None,
        })
    }
}

/// An outcome in words.
struct Ended<'a>(&'a Outcome);

impl fmt::Display for Ended<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Outcome::Delivered => f.write_str("delivered"),
            Outcome::Failed { reason } => write!(f, "failed: {reason}"),
            Outcome::Cancelled => f.write_str("cancelled"),
        }
    }
}
