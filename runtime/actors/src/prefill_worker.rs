//! The actor of a prefill rank: a shell around [`PrefillRank`].

use actix::prelude::*;
use kvferry_core::GroupId;
use kvferry_core::protocol::{Event, Message as Wire, PrefillRank};

use crate::mesh::PeerDown;
use crate::nic::NicReport;
use crate::router::Incoming;
use crate::seams::Tick;
use crate::shell::Shell;
use crate::worker::{Answer, Leader, Roster};

/// One prefill rank.
pub(crate) struct PrefillWorker {
    core: PrefillRank,
    shell: Shell,
    group: GroupId,
    roster: Roster,
    /// The node of the group's rank 0: only it gives work and decides.
    leader: Leader,
}

impl PrefillWorker {
    /// A worker over its core.
    pub(crate) fn new(core: PrefillRank, shell: Shell, group: GroupId) -> Self {
        let leader = Leader::new(shell.router().node());
        PrefillWorker { core, shell, group, roster: Roster::default(), leader }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        self.shell.run(self.core.outbox(), |_| {});
        self.shell.arm(self.core.poll_timeout(), || ctx.address().recipient());
    }
}

impl Actor for PrefillWorker {
    type Context = Context<Self>;
}

impl Handler<Incoming> for PrefillWorker {
    type Result = ();

    fn handle(&mut self, Incoming { from, message }: Incoming, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        match message {
            Wire::Members(members) => self.roster.update(&members),
            Wire::Lost(lost) => {
                let mine = self.roster.rank_in(self.group, lost.node).is_some();
                // The loss of an earlier incarnation is no news once a later one is here, except for its group.
                if mine || !self.shell.router().is_newer(lost.node, lost.epoch) {
                    self.core.handle_lost(now, &lost, mine);
                }
            }
            Wire::Profile(profile) => {
                if let Some(profile) = profile.worker {
                    self.leader.meet(self.group, from, &profile);
                    self.core.handle_peer(now, from, profile);
                }
            }
            Wire::Prefill(_) | Wire::Renew { .. } | Wire::Release { .. } if !self.leader.is(from) => {
                self.shell.observe(Event::Ignored { from, what: "work from a node that does not lead this group" });
            }
            message => self.core.handle_message(now, from, message),
        }
        self.turn(ctx);
    }
}

impl Handler<Answer> for PrefillWorker {
    type Result = ();

    fn handle(&mut self, Answer(event): Answer, ctx: &mut Context<Self>) {
        self.core.handle_engine(self.shell.now(), event);
        self.turn(ctx);
    }
}

impl Handler<NicReport> for PrefillWorker {
    type Result = ();

    fn handle(&mut self, NicReport { nic, events }: NicReport, ctx: &mut Context<Self>) {
        for event in events {
            self.core.handle_nic(self.shell.now(), nic, event);
        }
        self.turn(ctx);
    }
}

impl Handler<PeerDown> for PrefillWorker {
    type Result = ();

    fn handle(&mut self, PeerDown { node, .. }: PeerDown, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        self.core.handle_peer_down(now, node);
        self.turn(ctx);
    }
}

impl Handler<Tick> for PrefillWorker {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.shell.ticked();
        self.core.handle_timeout(now);
        self.turn(ctx);
    }
}
