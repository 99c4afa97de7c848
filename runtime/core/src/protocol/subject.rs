//! What messages and events are called and what they are about, for whoever records them.

use super::message::{Domains, Gpus};
use super::{Event, Message, NicAdvert};
use crate::{HandoverId, MemoryDomain, RequestId, TraceContext, limits};

/// What one message is about. Of a message about several, the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Which request, if the message says so.
    pub request: Option<RequestId>,
    /// Which handover, if the message says so.
    pub handover: Option<HandoverId>,
}

impl Subject {
    fn request(request: RequestId) -> Self {
        Subject { request: Some(request), handover: None }
    }

    fn handover(handover: HandoverId) -> Self {
        Subject { request: None, handover: Some(handover) }
    }

    fn both(request: RequestId, handover: HandoverId) -> Self {
        Subject { request: Some(request), handover: Some(handover) }
    }
}

impl Message {
    /// The name of its kind.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Profile(_) => "Profile",
            Message::Join(_) => "Join",
            Message::JoinRefused(_) => "JoinRefused",
            Message::Members(_) => "Members",
            Message::Lost(_) => "Lost",
            Message::Prefill(_) => "Prefill",
            Message::RankOpened { .. } => "RankOpened",
            Message::RankReady { .. } => "RankReady",
            Message::RankFailed { .. } => "RankFailed",
            Message::Offered(_) => "Offered",
            Message::OfferReady { .. } => "OfferReady",
            Message::OfferFailed { .. } => "OfferFailed",
            Message::Renew { .. } => "Renew",
            Message::Release { .. } => "Release",
            Message::Pair(_) => "Pair",
            Message::Abort { .. } => "Abort",
            Message::Fetch(_) => "Fetch",
            Message::Started { .. } => "Started",
            Message::RankDone { .. } => "RankDone",
            Message::Settled { .. } => "Settled",
            Message::Outcome(_) => "Outcome",
            Message::OutcomesKnown { .. } => "OutcomesKnown",
            Message::Holding { .. } => "Holding",
            Message::Health { .. } => "Health",
            Message::StandingOffers(_) => "StandingOffers",
            Message::StandingHandovers(_) => "StandingHandovers",
            Message::Freed { .. } => "Freed",
            Message::Holds { .. } => "Holds",
            Message::Open(_) => "Open",
            Message::Opened(_) => "Opened",
            Message::Expecting { .. } => "Expecting",
            Message::StepsReady { .. } => "StepsReady",
            Message::Refused { .. } => "Refused",
            Message::Reading { .. } => "Reading",
            Message::Fetched { .. } => "Fetched",
            Message::Confirmed { .. } => "Confirmed",
            Message::Abandon { .. } => "Abandon",
            Message::Resume { .. } => "Resume",
            Message::Heard { .. } => "Heard",
            Message::Shares(_) => "Shares",
            Message::ShareStopped(_) => "ShareStopped",
            Message::ShareEnded { .. } => "ShareEnded",
        }
    }

    /// The span that it belongs to, if it is one that says so.
    pub fn trace(&self) -> Option<TraceContext> {
        match self {
            Message::Prefill(job) => job.trace,
            Message::Pair(pairing) => pairing.trace,
            Message::Fetch(job) => job.pairing.trace,
            _ => None,
        }
    }

    /// Where that stands, in a message that may say so.
    pub(crate) fn trace_mut(&mut self) -> Option<&mut Option<TraceContext>> {
        match self {
            Message::Prefill(job) => Some(&mut job.trace),
            Message::Pair(pairing) => Some(&mut pairing.trace),
            Message::Fetch(job) => Some(&mut job.pairing.trace),
            _ => None,
        }
    }

    /// Over how many rails the worker whose profile it is shares pushes out, if it is one that does.
    pub(crate) fn rails(&self) -> Option<u32> {
        match self {
            Message::Profile(profile) => profile.worker.as_ref().map(|worker| worker.rails).filter(|rails| *rails > 0),
            _ => None,
        }
    }

    /// Where that stands, in a profile that may say so.
    pub(crate) fn rails_mut(&mut self) -> Option<&mut u32> {
        match self {
            Message::Profile(profile) => profile.worker.as_mut().map(|worker| &mut worker.rails),
            _ => None,
        }
    }

    /// The NICs of a profile that are reached from other hosts of a domain, in order.
    pub(crate) fn domains(&self) -> Option<Domains> {
        let Message::Profile(profile) = self else { return None };
        let domains =
            (0..).zip(&profile.worker.as_ref()?.nics).filter_map(|(index, nic)| Some((index, nic.domain.clone()?)));
        Some(Domains(domains.collect())).filter(|domains| !domains.0.is_empty())
    }

    /// As [`Message::domains`] tells them. An error says what no profile can have.
    pub(crate) fn set_domains(&mut self, Domains(domains): Domains) -> Result<(), String> {
        let is_named = |domain: &MemoryDomain| (1..=limits::NAME_BYTES_MAX).contains(&domain.name.len());
        if let Some((index, _)) = domains.iter().find(|(_, domain)| !is_named(domain)) {
            return Err(format!("the name of NIC {index}'s domain is empty or too long"));
        }
        self.each_nic(domains, |nic, domain| nic.domain = Some(domain))
    }

    /// The NICs of a profile that are GPUs, in order.
    pub(crate) fn gpus(&self) -> Option<Gpus> {
        let Message::Profile(profile) = self else { return None };
        let gpus = (0..).zip(&profile.worker.as_ref()?.nics).filter_map(|(index, nic)| Some((index, nic.gpu.clone()?)));
        Some(Gpus(gpus.collect())).filter(|gpus| !gpus.0.is_empty())
    }

    /// As [`Message::gpus`] tells them. An error says what no profile can have.
    pub(crate) fn set_gpus(&mut self, Gpus(gpus): Gpus) -> Result<(), String> {
        if gpus.is_empty() {
            return Err("an empty list is not said".to_owned());
        }
        self.each_nic(gpus, |nic, gpu| nic.gpu = Some(gpu))
    }

    /// Gives NICs of a profile, in order, what is said of them.
    fn each_nic<T>(&mut self, said: Vec<(u32, T)>, mut set: impl FnMut(&mut NicAdvert, T)) -> Result<(), String> {
        let nics = match self {
            Message::Profile(profile) => profile.worker.as_mut().map(|worker| worker.nics.as_mut_slice()),
            _ => None,
        };
        let nics = nics.unwrap_or_default();
        let mut next = 0;
        for (index, value) in said {
            if index < next {
                return Err(format!("NIC {index} is out of order"));
            }
            set(nics.get_mut(index as usize).ok_or_else(|| format!("there is no NIC {index}"))?, value);
            next = index + 1;
        }
        Ok(())
    }

    /// What it is about.
    pub fn subject(&self) -> Subject {
        match self {
            Message::Prefill(job) => Subject::request(job.spec.request),
            Message::RankOpened { request, .. }
            | Message::RankReady { request, .. }
            | Message::RankFailed { request, .. }
            | Message::OfferReady { request, .. }
            | Message::OfferFailed { request, .. }
            | Message::Release { request, .. } => Subject::request(*request),
            Message::Offered(offer) => Subject::request(offer.request),
            Message::Renew { requests } => Subject { request: requests.first().copied(), handover: None },
            Message::Pair(pairing) => Subject::both(pairing.spec.request, pairing.handover),
            Message::Fetch(job) => Subject::both(job.pairing.spec.request, job.pairing.handover),
            Message::Open(open) => Subject::both(open.request, open.handover),
            Message::Opened(opened) => Subject::handover(opened.handover),
            Message::Outcome(report) => Subject::handover(report.handover),
            Message::Shares(shares) => Subject::handover(shares.handover),
            Message::ShareStopped(share) | Message::ShareEnded { share, .. } => Subject::handover(share.handover),
            Message::Abort { handover, .. }
            | Message::Started { handover }
            | Message::RankDone { handover, .. }
            | Message::Settled { handover, .. }
            | Message::Freed { handover }
            | Message::Expecting { handover }
            | Message::StepsReady { handover, .. }
            | Message::Refused { handover, .. }
            | Message::Fetched { handover }
            | Message::Confirmed { handover }
            | Message::Abandon { handover } => Subject::handover(*handover),
            Message::OutcomesKnown { handovers } | Message::Reading { handovers } => {
                Subject { request: None, handover: handovers.first().copied() }
            }
            Message::Holding { handovers } => {
                handovers.first().map(|(handover, request, _)| Subject::both(*request, *handover)).unwrap_or_default()
            }
            _ => Subject::default(),
        }
    }
}

impl Event {
    /// The name of its kind.
    pub fn name(&self) -> &'static str {
        match self {
            Event::Began(_) => "Began",
            Event::GroupReady { .. } => "GroupReady",
            Event::Met { .. } => "Met",
            Event::PathChosen(_) => "PathChosen",
            Event::PathShown(_) => "PathShown",
            Event::RailTurned(_) => "RailTurned",
            Event::Parted { .. } => "Parted",
            Event::NodeLost { .. } => "NodeLost",
            Event::WasAway(_) => "WasAway",
            Event::OfferOpened { .. } => "OfferOpened",
            Event::OfferClosed { .. } => "OfferClosed",
            Event::LeaseHeld { .. } => "LeaseHeld",
            Event::Quarantined { .. } => "Quarantined",
            Event::Drained { .. } => "Drained",
            Event::Health { .. } => "Health",
            Event::Draining { .. } => "Draining",
            Event::DrainEnded { .. } => "DrainEnded",
            Event::FetchEnded(_) => "FetchEnded",
            Event::OfferEnded(_) => "OfferEnded",
            Event::RequestEnded(_) => "RequestEnded",
            Event::LeaseExpired { .. } => "LeaseExpired",
            Event::Paired { .. } => "Paired",
            Event::Started { .. } => "Started",
            Event::Settled { .. } => "Settled",
            Event::Finished(_) => "Finished",
            Event::Freed { .. } => "Freed",
            Event::Ignored { .. } => "Ignored",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_called_as_it_is_written() {
        let event = Event::DrainEnded { left: 3 };
        assert!(format!("{event:?}").starts_with(event.name()));
    }

    #[test]
    fn a_message_is_called_as_it_is_written() {
        let message = Message::Confirmed { handover: HandoverId(4) };
        assert!(format!("{message:?}").starts_with(message.name()));
        assert_eq!(message.subject(), Subject::handover(HandoverId(4)));
        let renew = Message::Renew { requests: vec![RequestId(2), RequestId(3)] };
        assert_eq!(renew.subject(), Subject::request(RequestId(2)));
        assert_eq!(Message::Health { trouble: None }.subject(), Subject::default());
    }
}
