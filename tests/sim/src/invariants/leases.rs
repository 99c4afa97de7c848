//! I10: an unexpired, renewed lease is never revoked, and an expired one serves nobody.
//!
//! From the ranks' events, judged by the world's clock. A lease that runs out must have lasted its whole duration, less the stated drift, since it
//! was last granted or renewed. An offer that is closed sooner must have a reason that others saw, too: its request was finished, a handover of
//! it failed, another rank of its group could not keep its part, or that group or the scheduler had lost somebody. A reader that is refused
//! because a lease ran out must have been so by the clock. And what was pulled counts only if the lease still held, drift included, when the last
//! byte came.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{EngineEvent, Event, FailReason, LeaseTerms, Outcome, OutcomeReport, Refusal};
use kvferry_core::{Direction, GroupId, HandoverId, Rank, RequestId};

use super::{Groups, Invariant};
use crate::chronicle::{Entry, What};
use crate::world::World;
use crate::yard::{SCHEDULER, node_of};

pub(super) struct Leases {
    terms: LeaseTerms,
    groups: Groups,
    /// By request and node: the last lease, gone or not.
    leases: BTreeMap<(RequestId, usize), Lease>,
    /// When each request was first asked for.
    asked: BTreeMap<RequestId, u64>,
    /// Nobody wants to keep what was offered for these.
    finished: BTreeSet<RequestId>,
    /// Requests of which some lease ran out at any time.
    lapsed: BTreeSet<RequestId>,
    handovers: BTreeMap<HandoverId, Handover>,
    /// When something last happened to a request for which its offers may go.
    upset: BTreeMap<RequestId, u64>,
    /// The same, to a group's members.
    disturbed: BTreeMap<GroupId, u64>,
    /// And to the scheduler.
    restarted: u64,
}

/// A rank's lease.
struct Lease {
    /// Since when it is held.
    since: u64,
    stands: bool,
    /// When the last one of this rank and request ended.
    ended: u64,
}

#[derive(Default)]
struct Handover {
    request: RequestId,
    /// When the last bytes of each source rank came that were pulled.
    pulled: BTreeMap<Rank, u64>,
}

impl Leases {
    pub(super) fn new(groups: Groups, terms: LeaseTerms) -> Self {
        Leases {
            terms,
            groups,
            leases: BTreeMap::new(),
            asked: BTreeMap::new(),
            finished: BTreeSet::new(),
            lapsed: BTreeSet::new(),
            handovers: BTreeMap::new(),
            upset: BTreeMap::new(),
            disturbed: BTreeMap::new(),
            restarted: 0,
        }
    }

    /// How long a lease lasts at least, by the world's clock.
    fn least(&self) -> u64 {
        u64::try_from(self.terms.reliable().as_nanos()).unwrap_or(u64::MAX)
    }

    /// And at most.
    fn most(&self) -> u64 {
        let duration = u64::try_from(self.terms.duration.as_nanos()).unwrap_or(u64::MAX);
        duration.saturating_mul(2).saturating_sub(self.least())
    }

    fn leases_of(&self, request: RequestId) -> impl Iterator<Item = (usize, &Lease)> {
        self.leases.range((request, 0)..=(request, usize::MAX)).map(|((_, node), lease)| (*node, lease))
    }

    /// An offer is gone, and nobody said that its lease had run out.
    fn closed(&mut self, request: RequestId, node: usize, at: u64, broken: &mut Vec<String>) {
        let least = self.least();
        let Some(lease) = self.leases.get_mut(&(request, node)).filter(|lease| lease.stands) else { return };
        lease.stands = false;
        if at - lease.since >= least {
            lease.ended = at;
            self.lapsed.insert(request);
            return;
        }
        let ended = std::mem::replace(&mut lease.ended, at);
        // What happened may be older than the offer: a rank that stood still hears of everything later.
        let since = ended.max(self.asked.get(&request).copied().unwrap_or(0));
        let disturbed = self.groups.group(node).and_then(|group| self.disturbed.get(&group));
        let is_revoked = self.finished.contains(&request)
            || self
                .upset
                .get(&request)
                .into_iter()
                .chain(disturbed)
                .chain([&self.restarted])
                .any(|when| *when >= since);
        if !is_revoked {
            broken.push(format!(
                "the offer of {request} on n{node} was closed under its lease, and nothing had happened"
            ));
        }
    }

    /// Two nodes no longer talk, or one is gone.
    fn disturb(&mut self, here: usize, there: usize, at: u64) {
        let (here, there) = (self.groups.group(here), self.groups.group(there));
        if here.is_none() || there.is_none() || here == there {
            for group in here.into_iter().chain(there) {
                self.disturbed.insert(group, at);
            }
        }
    }

    fn settled(&mut self, report: &OutcomeReport, at: u64, broken: &mut Vec<String>) {
        let handover = report.handover;
        match &report.outcome {
            Outcome::Delivered => {
                for (rank, landed) in self.handovers.get(&handover).into_iter().flat_map(|known| &known.pulled) {
                    let request = self.handovers.get(&handover).map_or(RequestId::default(), |known| known.request);
                    let owners = self.leases_of(request).filter(|(node, _)| self.groups.rank(*node) == Some(*rank));
                    let last = owners.map(|(_, lease)| lease.since.saturating_add(self.most())).max();
                    if let Some(last) = last.filter(|last| last < landed) {
                        let late = landed - last;
                        broken.push(format!(
                            "{handover} of {request} counts, and {rank}'s lease ended {late} ns before its last byte"
                        ));
                    }
                }
            }
            Outcome::Failed { reason } => {
                let request = self.handovers.get(&handover).map(|known| known.request);
                if let Some(request) = request {
                    self.upset.insert(request, at);
                }
                let FailReason::Refused(Refusal::LeaseExpired(request)) = reason else { return };
                let ran_out = self.leases_of(*request).any(|(_, lease)| at - lease.since >= self.least());
                if !ran_out && !self.lapsed.contains(request) {
                    broken.push(format!(
                        "{handover} was refused because the lease of {request} had run out, and none had"
                    ));
                }
            }
            Outcome::Cancelled => {}
        }
    }
}

impl Invariant for Leases {
    fn name(&self) -> &'static str {
        "I10"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        let (node, at) = (entry.node, entry.at);
        match &entry.what {
            What::Observed(Event::OfferOpened { request }) => {
                let ended = self.leases.get(&(*request, node)).map_or(0, |lease| lease.ended);
                self.leases.insert((*request, node), Lease { since: at, stands: true, ended });
            }
            What::Observed(Event::LeaseHeld { request, .. }) => {
                if let Some(lease) = self.leases.get_mut(&(*request, node)) {
                    lease.since = at;
                }
            }
            What::Observed(Event::OfferClosed { request, .. }) => self.closed(*request, node, at, broken),
            What::Observed(Event::LeaseExpired { request }) => {
                let least = self.least();
                self.lapsed.insert(*request);
                self.upset.insert(*request, at);
                let Some(lease) = self.leases.get_mut(&(*request, node)).filter(|lease| lease.stands) else { return };
                lease.stands = false;
                lease.ended = at;
                let lasted = at - lease.since;
                if lasted < least {
                    broken.push(format!("the lease of {request} on n{node} ran out after {lasted} ns, not {least} ns"));
                }
            }
            What::Submitted { request, .. } => {
                self.asked.entry(*request).or_insert(at);
            }
            What::Told(EngineEvent::Unable { request, .. }) => {
                self.upset.insert(*request, at);
            }
            What::Observed(Event::Finished(finished)) => {
                self.finished.insert(finished.request);
            }
            What::Observed(Event::Paired { request, handover, .. }) => {
                self.handovers.entry(*handover).or_default().request = *request;
            }
            What::Posted { id, direction: Direction::Pull, .. } => {
                self.handovers.entry(id.handover()).or_default().pulled.insert(id.source(), 0);
            }
            What::Landed { id, bytes: Some(_) } => {
                let known = self.handovers.get_mut(&id.handover());
                if let Some(landed) = known.and_then(|known| known.pulled.get_mut(&id.source())) {
                    *landed = at;
                }
            }
            What::Observed(Event::Settled { report }) => self.settled(report, at, broken),
            What::Observed(Event::NodeLost { node: lost, .. } | Event::Parted { node: lost, .. }) => {
                self.disturb(node, node_of(*lost), at);
            }
            What::Crashed if node == SCHEDULER => self.restarted = at,
            What::Crashed => self.disturb(node, node, at),
            _ => {}
        }
    }
}
