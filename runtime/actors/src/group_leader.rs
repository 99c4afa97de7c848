//! The actor of a group's leader: a shell around [`PrefillLeader`] or [`DecodeLeader`].

use std::collections::BTreeMap;

use actix::prelude::*;
use kvferry_core::protocol::{DecodeLeader, Event, Message as Wire, Outbox, PrefillLeader};
use kvferry_core::{GroupId, Moment, NodeId, Rank};

use crate::mesh::PeerDown;
use crate::router::Incoming;
use crate::seams::Tick;
use crate::shell::{Inspect, Shell};
use crate::worker::{NOT_ITS_PLACE, Roster};

/// The core of either kind of group.
pub(crate) enum LeaderCore {
    /// Of a prefill group.
    Prefill(PrefillLeader),
    /// Of a decode group.
    Decode(DecodeLeader),
}

impl LeaderCore {
    fn outbox(&mut self) -> &mut Outbox {
        match self {
            LeaderCore::Prefill(core) => core.outbox(),
            LeaderCore::Decode(core) => core.outbox(),
        }
    }

    fn poll_timeout(&self) -> Option<Moment> {
        match self {
            LeaderCore::Prefill(core) => core.poll_timeout(),
            LeaderCore::Decode(core) => core.poll_timeout(),
        }
    }

    /// A rank of the group introduced itself.
    fn introduce(&mut self, rank: Rank, node: NodeId) {
        match self {
            LeaderCore::Prefill(core) => {
                core.handle_rank(rank, node);
                core.handle_peer_up(node);
            }
            // It says what it holds as well: then it is met.
            LeaderCore::Decode(core) => core.handle_rank(rank, node),
        }
    }
}

/// One group's leader, on the node of its rank 0.
pub(crate) struct GroupLeader {
    core: LeaderCore,
    shell: Shell,
    group: GroupId,
    roster: Roster,
    /// Nodes that say to be ranks of the group, which the directory has yet to confirm.
    doubted: BTreeMap<NodeId, Rank>,
}

impl GroupLeader {
    /// A leader over its core.
    pub(crate) fn new(core: LeaderCore, shell: Shell, group: GroupId) -> Self {
        GroupLeader { core, shell, group, roster: Roster::default(), doubted: BTreeMap::new() }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        self.shell.run(self.core.outbox(), |_| {});
        self.shell.arm(self.core.poll_timeout(), || ctx.address().recipient());
    }
}

impl Actor for GroupLeader {
    type Context = Context<Self>;
}

impl Handler<Incoming> for GroupLeader {
    type Result = ();

    fn handle(&mut self, Incoming { from, talk, message }: Incoming, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        self.shell.hear(from, talk);
        match (message, &mut self.core) {
            (Wire::Members(list), core) => {
                self.roster.update(&list, self.group);
                for member in &list.members {
                    if let Some(place) = member.place.as_ref().filter(|place| place.group == self.group) {
                        match core {
                            LeaderCore::Prefill(core) => core.handle_rank(place.rank, member.node),
                            LeaderCore::Decode(core) => core.handle_rank(place.rank, member.node),
                        }
                    }
                }
                for (node, rank) in self.doubted.extract_if(.., |node, rank| self.roster.allows(*node, *rank)) {
                    core.introduce(rank, node);
                }
            }
            // A scheduler introduces itself once to every node: then it knows nothing of its work.
            (Wire::Profile(profile), core) if profile.worker.is_none() => match core {
                LeaderCore::Prefill(core) => core.handle_scheduler(),
                LeaderCore::Decode(core) => core.handle_scheduler(),
            },
            (Wire::Profile(profile), core) => {
                // The directory's word may be later than the rank itself.
                match profile.worker.filter(|worker| worker.group == self.group).map(|worker| worker.rank) {
                    Some(rank) if self.roster.allows(from, rank) => core.introduce(rank, from),
                    Some(rank) => {
                        self.doubted.insert(from, rank);
                        self.shell.observe(Event::Ignored { from, what: NOT_ITS_PLACE });
                    }
                    None => {}
                }
            }
            (Wire::Lost(lost), core) if !self.shell.router().is_newer(lost.node, lost.epoch) => {
                self.roster.vacate(&lost);
                match core {
                    LeaderCore::Prefill(core) => core.handle_lost(now, &lost),
                    LeaderCore::Decode(core) => core.handle_lost(now, &lost),
                }
            }
            // The rank's next incarnation is here already: what was given to the earlier one failed when that was noticed.
            (Wire::Lost(_), core) => match core {
                LeaderCore::Prefill(core) => core.handle_late_loss(),
                LeaderCore::Decode(core) => core.handle_late_loss(),
            },
            (message, LeaderCore::Prefill(core)) => core.handle_message(now, from, message),
            (message, LeaderCore::Decode(core)) => core.handle_message(now, from, message),
        }
        self.turn(ctx);
    }
}

impl Handler<PeerDown> for GroupLeader {
    type Result = ();

    fn handle(&mut self, PeerDown { node, cause, .. }: PeerDown, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        self.shell.part(node);
        self.doubted.remove(&node);
        match &mut self.core {
            LeaderCore::Prefill(core) => core.handle_peer_down(now, node, &cause),
            LeaderCore::Decode(core) => core.handle_peer_down(now, node, &cause),
        }
        self.turn(ctx);
    }
}

impl Handler<Inspect> for GroupLeader {
    type Result = ();

    fn handle(&mut self, inspect: Inspect, _: &mut Context<Self>) {
        inspect.answer(match &self.core {
            LeaderCore::Prefill(core) => core.vitals(),
            LeaderCore::Decode(core) => core.vitals(),
        });
    }
}

impl Handler<Tick> for GroupLeader {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.shell.ticked();
        match &mut self.core {
            LeaderCore::Prefill(core) => core.handle_timeout(now),
            LeaderCore::Decode(core) => core.handle_timeout(now),
        }
        self.turn(ctx);
    }
}
