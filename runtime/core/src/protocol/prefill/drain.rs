//! A rank that leaves: nothing new is offered, what is offered is waited for. With attention-data parallelism other ranks of the group may hold offers that
//! would be lost with this one: then the leader's word that the group holds nothing, an empty `Renew`, is waited for, too.

use core::time::Duration;

use super::PrefillRank;
use crate::protocol::{EngineCall, Event, FailReason, Message, PrefillView};
use crate::{Moment, RequestId};

/// What a leader hears of a rank that leaves.
const TROUBLE: &str = "it leaves and offers nothing new";

/// A rank leaves.
#[derive(Debug)]
pub(super) struct Drain {
    until: Moment,
    ended: bool,
    /// Other ranks of the group may offer something, as far as is known.
    others_offer: bool,
}

impl Drain {
    /// When it is over, whatever is still offered.
    pub(super) fn due(&self) -> Option<Moment> {
        (!self.ended).then_some(self.until)
    }
}

impl PrefillRank {
    /// Whether this rank leaves.
    pub fn is_draining(&self) -> bool {
        self.drain.is_some()
    }

    /// The group takes no work from now on. What the engine has not opened yet is not offered any more; what is offered goes on until it was
    /// fetched or its lease expires, or until the time is up. Whoever says so again can only make it shorter.
    pub(super) fn drain(&mut self, now: Moment, within: Duration) {
        let until = now + within;
        if let Some(drain) = &mut self.drain {
            drain.until = drain.until.min(until);
            self.go_on_draining(now);
            return;
        }
        // First: what fails below is given to another group.
        self.tell_leader(Message::Health { trouble: Some(TROUBLE.to_owned()) });
        let unopened = self.offers.values().filter(|offer| offer.closing.is_none() && offer.held.is_none());
        for request in unopened.map(|offer| offer.job.spec.request).collect::<Vec<_>>() {
            self.fail_to_leader(request, FailReason::Unhealthy(TROUBLE.to_owned()));
            self.close(now, request, PrefillView::Ended);
        }
        // What was to follow them is not begun either.
        let next = self.offers.values_mut().filter_map(|offer| offer.next.take());
        let next: Vec<_> = next.chain(self.releasing.values_mut().filter_map(Option::take)).collect();
        for job in next {
            self.fail_to_leader(job.spec.request, FailReason::Unhealthy(TROUBLE.to_owned()));
        }
        let others_offer = self.local.geometry.parallel.adp > 1 && self.leader.is_some();
        self.drain = Some(Drain { until, ended: false, others_offer });
        self.outbox.event(Event::Draining { offers: self.offers.len() as u64, until });
        self.go_on_draining(now);
    }

    /// A leader that has not heard of it gave a job.
    pub(super) fn refuse_to_begin(&mut self, request: RequestId) {
        self.tell_of_drain();
        self.fail_to_leader(request, FailReason::Unhealthy(TROUBLE.to_owned()));
    }

    /// No rank of the group offers anything: its leader says so, or is gone, and every offer with it.
    pub(super) fn group_offers_nothing(&mut self, now: Moment) {
        if let Some(drain) = &mut self.drain {
            drain.others_offer = false;
            self.go_on_draining(now);
        }
    }

    pub(super) fn tell_of_drain(&mut self) {
        if self.drain.is_some() {
            self.tell_leader(Message::Health { trouble: Some(TROUBLE.to_owned()) });
        }
    }

    /// Says so once nothing is offered any more that would be lost with this rank, or the time is up.
    pub(super) fn go_on_draining(&mut self, now: Moment) {
        let left = self.offers.len() as u64;
        let over = |drain: &Drain| (left == 0 && !drain.others_offer) || now >= drain.until;
        if let Some(drain) = self.drain.as_mut().filter(|drain| !drain.ended && over(drain)) {
            drain.ended = true;
            self.outbox.event(Event::DrainEnded { left });
            self.outbox.engine(EngineCall::Drained { left });
        }
    }
}
