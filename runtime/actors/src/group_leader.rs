//! The actor of a group's leader: a shell around [`PrefillLeader`] or [`DecodeLeader`].

use actix::prelude::*;
use kvferry_core::protocol::{DecodeLeader, Message as Wire, Outbox, PrefillLeader};
use kvferry_core::{GroupId, Moment};

use crate::mesh::PeerDown;
use crate::router::Incoming;
use crate::seams::Tick;
use crate::shell::{Inspect, Shell};

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
}

/// One group's leader, on the node of its rank 0.
pub(crate) struct GroupLeader {
    core: LeaderCore,
    shell: Shell,
    group: GroupId,
}

impl GroupLeader {
    /// A leader over its core.
    pub(crate) fn new(core: LeaderCore, shell: Shell, group: GroupId) -> Self {
        GroupLeader { core, shell, group }
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
                for member in &list.members {
                    if let Some(place) = member.place.as_ref().filter(|place| place.group == self.group) {
                        match core {
                            LeaderCore::Prefill(core) => core.handle_rank(place.rank, member.node),
                            LeaderCore::Decode(core) => core.handle_rank(place.rank, member.node),
                        }
                    }
                }
            }
            // A scheduler introduces itself once to every node: then it knows nothing of its work.
            (Wire::Profile(profile), core) if profile.worker.is_none() => match core {
                LeaderCore::Prefill(core) => core.handle_scheduler(),
                LeaderCore::Decode(core) => core.handle_scheduler(),
            },
            (Wire::Profile(profile), core) => {
                // The directory's word may be later than the rank itself.
                let rank = profile.worker.filter(|worker| worker.group == self.group).map(|worker| worker.rank);
                match (core, rank) {
                    (LeaderCore::Prefill(core), Some(rank)) => {
                        core.handle_rank(rank, from);
                        core.handle_peer_up(from);
                    }
                    // It says what it holds as well: then it is met.
                    (LeaderCore::Decode(core), Some(rank)) => core.handle_rank(rank, from),
                    (_, None) => {}
                }
            }
            // The rank's next incarnation is here already: what was given to the earlier one failed when that was noticed.
            (Wire::Lost(lost), core) if self.shell.router().is_newer(lost.node, lost.epoch) => match core {
                LeaderCore::Prefill(core) => core.handle_late_loss(),
                LeaderCore::Decode(core) => core.handle_late_loss(),
            },
            (Wire::Lost(lost), LeaderCore::Prefill(core)) => core.handle_lost(now, &lost),
            (Wire::Lost(lost), LeaderCore::Decode(core)) => core.handle_lost(now, &lost),
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
