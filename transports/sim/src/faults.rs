//! What goes wrong, when somebody says so.

use kvferry_core::TransferId;
use kvferry_transport::{Event, PeerId, TransferError};

use crate::due::Due;
use crate::fabric::{NicDeath, NicId, OnTheWire};
use crate::flow::{INITIATOR, OWNER};
use crate::link::LinkId;
use crate::nic::Health;
use crate::state::{State, nanos};

impl State {
    pub(crate) fn kill_nic(&mut self, nic: NicId, death: NicDeath) {
        let Some(state) = self.nic_mut(nic).filter(|state| state.health == Health::Up) else { return };
        state.egress.clear();
        match death {
            NicDeath::Error => {
                state.health = Health::Dead;
                self.flush(nic, "the NIC is dead");
            }
            NicDeath::BlackHole => {
                state.health = Health::BlackHole;
                let links: Vec<LinkId> = state.links.iter().copied().collect();
                let at = self.now.saturating_add(nanos(self.options.retry_for));
                // Whoever waits for something from here will not wait for ever.
                for id in links {
                    let waits =
                        self.links.get(id.0).is_some_and(|link| link.sides[OWNER].nic == nic && !link.flows.is_empty());
                    if waits {
                        self.at(at, Due::GiveUp { link: id });
                    }
                }
            }
        }
    }

    /// After a black hole everything that was under way ends in errors, as after a reset.
    pub(crate) fn revive_nic(&mut self, nic: NicId) {
        let Some(state) = self.nic_mut(nic) else { return };
        let was = state.health;
        if !matches!(was, Health::Dead | Health::BlackHole) {
            return;
        }
        state.health = Health::Up;
        if was == Health::BlackHole {
            self.flush(nic, "the NIC was reset");
            if let Some(state) = self.nic_mut(nic) {
                let mut withheld = std::mem::take(&mut state.withheld);
                state.events.append(&mut withheld);
            }
            self.wake(nic);
        }
    }

    /// Ends everything that a NIC has under way with an error, and its connections with it.
    fn flush(&mut self, nic: NicId, reason: &'static str) {
        let error = TransferError::Io { context: "the NIC", message: reason.to_owned() };
        let Some(state) = self.nic(nic) else { return };
        let lost: Vec<PeerId> = state.peers.iter().filter(|(_, peer)| peer.open).map(|(peer, _)| *peer).collect();
        self.close_all(nic, None, &error, Some("its NIC is down"));
        let Some(state) = self.nic_mut(nic) else { return };
        let mut ended: Vec<TransferId> = std::mem::take(&mut state.posted).into_keys().collect();
        ended.extend(std::mem::take(&mut state.expected).into_keys());
        for id in ended {
            state.events.push(Event::Failed { id, error: error.clone() });
        }
        for peer in lost {
            state.events.push(Event::PeerLost { peer, reason: reason.to_owned() });
        }
        self.wake(nic);
    }

    /// A NIC that was let go: nothing of it reaches anybody's memory any more.
    pub(crate) fn remove_nic(&mut self, nic: NicId) {
        if self.nic(nic).is_some_and(|state| state.health != Health::Gone) {
            self.bury(nic, OnTheWire::Lost);
        }
    }

    pub(crate) fn process_died(&mut self, nic: NicId, on_the_wire: OnTheWire) {
        if self.nic(nic).is_some_and(|state| state.health != Health::Gone)
            && let Some(state) = self.nic_mut(nic)
        {
            state.process_died = true;
            self.bury(nic, on_the_wire);
        }
    }

    fn bury(&mut self, nic: NicId, on_the_wire: OnTheWire) {
        let flows = self.flows_of(nic);
        if on_the_wire == OnTheWire::Lost {
            for id in flows {
                if let Some(flow) = self.flows.get_mut(id.0)
                    && flow.nics[flow.source()] == nic
                {
                    flow.lost = true;
                }
            }
        }
        let Some(state) = self.nic_mut(nic) else { return };
        let died = state.process_died;
        state.health = Health::Gone;
        let links: Vec<LinkId> = state.links.iter().copied().collect();
        let error = TransferError::PeerLost("its NIC is down".to_owned());
        for link in links {
            for side in [INITIATOR, OWNER] {
                if self.links.get(link.0).is_none_or(|link| link.sides[side].nic != nic) {
                    continue;
                }
                self.close_side(link, side, &error, None);
                // A dead process says no farewell: its peers notice, sooner or later.
                let patience = nanos(self.options.retry_for).saturating_sub(self.latency());
                let notice = if died { self.deaths.below(patience) } else { 0 };
                let at = self.now.saturating_add(self.latency()).saturating_add(notice);
                self.at(at, Due::Farewell { link, side: 1 - side, reason: "its NIC is down" });
            }
        }
        if let Some(state) = self.nic_mut(nic) {
            state.pools.clear();
            state.peers.clear();
            state.remotes.clear();
            state.posted.clear();
            state.expected.clear();
            state.waiting.clear();
            state.egress.clear();
            state.events = Vec::new();
            state.withheld = Vec::new();
        }
    }
}
