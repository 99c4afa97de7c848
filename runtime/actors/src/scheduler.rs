//! The actors of the scheduler's node: the scheduler itself, and the directory beside it.

use std::collections::BTreeMap;

use actix::prelude::*;
use kvferry_core::protocol::{
    self, Directory, Event, Finished, Lost, Member, Message as Wire, Refusal, RequestSpec, Submitted,
};
use kvferry_core::{RequestId, TraceContext};
use tokio::sync::oneshot;

use crate::mesh::PeerDown;
use crate::router::Incoming;
use crate::seams::Tick;
use crate::shell::{Inspect, Shell};

/// A request, and who waits for its end.
#[derive(Debug)]
pub struct Submit {
    /// What to move.
    pub spec: RequestSpec,
    /// The span that it belongs to, if whoever asks says one.
    pub trace: Option<TraceContext>,
    /// Tells submissions of one request id apart.
    pub ticket: u64,
    /// Answered once: refused at once, or finished later.
    pub answer: oneshot::Sender<Result<Finished, Refusal>>,
}

impl Message for Submit {
    type Result = ();
}

/// Nobody waits for a request any more.
#[derive(Clone, Copy, Debug)]
pub struct CancelRequest {
    /// Which request.
    pub request: RequestId,
    /// Which submission of it; another one's is left alone.
    pub ticket: u64,
}

impl Message for CancelRequest {
    type Result = ();
}

/// Pairs offers with decode consumers.
pub struct Scheduler {
    core: protocol::Scheduler,
    shell: Shell,
    waiting: BTreeMap<RequestId, (u64, oneshot::Sender<Result<Finished, Refusal>>)>,
}

impl Scheduler {
    /// A scheduler over its core.
    pub(crate) fn new(mut core: protocol::Scheduler, shell: Shell, first: bool) -> Self {
        if !first {
            core.expect_announcements(shell.now());
        }
        Scheduler { core, shell, waiting: BTreeMap::new() }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        let waiting = &mut self.waiting;
        self.shell.run(self.core.outbox(), |event| {
            if let Event::Finished(finished) = event
                && let Some((_, answer)) = waiting.remove(&finished.request)
            {
                // Whoever asked may have gone; the event is still observed.
                let _ = answer.send(Ok(finished.clone()));
            }
        });
        self.shell.arm(self.core.poll_timeout(), || ctx.address().recipient());
    }
}

impl Actor for Scheduler {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        self.turn(ctx);
    }
}

impl Handler<Submit> for Scheduler {
    type Result = ();

    fn handle(&mut self, Submit { spec, trace, ticket, answer }: Submit, ctx: &mut Context<Self>) {
        let request = spec.request;
        match self.core.handle_submit_traced(self.shell.now(), spec, trace) {
            Ok(Submitted::Taken) => {
                self.waiting.insert(request, (ticket, answer));
            }
            Ok(Submitted::Ended(finished)) => {
                // Whoever asked may have gone again.
                let _ = answer.send(Ok(finished));
            }
            Err(refusal) => {
                let _ = answer.send(Err(refusal));
            }
        }
        self.turn(ctx);
    }
}

impl Handler<CancelRequest> for Scheduler {
    type Result = ();

    fn handle(&mut self, CancelRequest { request, ticket }: CancelRequest, ctx: &mut Context<Self>) {
        if self.waiting.get(&request).is_some_and(|(theirs, _)| *theirs == ticket) {
            self.core.handle_cancel(self.shell.now(), request);
        }
        self.turn(ctx);
    }
}

impl Handler<Incoming> for Scheduler {
    type Result = ();

    fn handle(&mut self, Incoming { from, talk, message }: Incoming, ctx: &mut Context<Self>) {
        self.shell.hear(from, talk);
        self.core.handle_message(self.shell.now(), from, message);
        self.turn(ctx);
    }
}

impl Handler<Inspect> for Scheduler {
    type Result = ();

    fn handle(&mut self, inspect: Inspect, _: &mut Context<Self>) {
        inspect.answer(self.core.vitals());
    }
}

impl Handler<Membership> for Scheduler {
    type Result = ();

    fn handle(&mut self, change: Membership, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        match change {
            Membership::Joined { member, talk } => {
                self.shell.hear(member.node, talk);
                self.core.handle_member(now, &member);
            }
            Membership::Lost(lost) => {
                self.shell.part(lost.node);
                self.core.handle_lost(now, &lost);
            }
        }
        self.turn(ctx);
    }
}

impl Handler<Tick> for Scheduler {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.shell.ticked();
        self.core.handle_timeout(now);
        self.turn(ctx);
    }
}

/// What the directory tells the scheduler.
#[derive(Debug)]
pub(crate) enum Membership {
    /// A member joined, in this conversation.
    Joined { member: std::sync::Arc<Member>, talk: u64 },
    /// A member is gone.
    Lost(Lost),
}

impl Message for Membership {
    type Result = ();
}

/// Knows who is alive: in memory, on the scheduler's node.
pub(crate) struct DirectoryActor {
    core: Directory,
    shell: Shell,
    scheduler: Addr<Scheduler>,
}

impl DirectoryActor {
    /// A directory over its core.
    pub(crate) fn new(core: Directory, shell: Shell, scheduler: Addr<Scheduler>) -> Self {
        DirectoryActor { core, shell, scheduler }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        self.shell.run(self.core.outbox(), |_| {});
        self.shell.arm(self.core.poll_timeout(), || ctx.address().recipient());
    }

    fn lose(&mut self, lost: Option<Lost>, ctx: &mut Context<Self>) {
        if let Some(lost) = lost {
            self.turn(ctx);
            self.shell.router().deliver(self.shell.router().node(), Wire::Lost(lost.clone()));
            self.scheduler.do_send(Membership::Lost(lost));
        }
    }
}

impl Actor for DirectoryActor {
    type Context = Context<Self>;
}

impl Handler<Incoming> for DirectoryActor {
    type Result = ();

    fn handle(&mut self, Incoming { from, talk, message }: Incoming, ctx: &mut Context<Self>) {
        self.shell.hear(from, talk);
        let member = match message {
            Wire::Join(member) => member,
            Wire::Lost(lost) => {
                let lost = self.core.handle_report(from, &lost);
                self.lose(lost, ctx);
                return;
            }
            message => {
                // What a node says to the scheduler must not overtake its own join.
                self.scheduler.do_send(Incoming { from, talk, message });
                return;
            }
        };
        // A node joins for itself only.
        if member.node != from {
            self.shell.observe(Event::Ignored { from, what: "a join in another node's name" });
            return;
        }
        match self.core.handle_join(self.shell.now(), *member) {
            Ok(member) => {
                // The newcomer's group hears of it before any work that it makes possible.
                self.turn(ctx);
                self.scheduler.do_send(Membership::Joined { member, talk });
            }
            Err(error) => {
                tracing::warn!(%from, %error, "a join was refused");
                self.shell.router().send(from, Wire::JoinRefused(error));
            }
        }
    }
}

impl Handler<PeerDown> for DirectoryActor {
    type Result = ();

    fn handle(&mut self, PeerDown { node, epoch, cause }: PeerDown, ctx: &mut Context<Self>) {
        self.shell.part(node);
        let lost = self.core.handle_lost(node, epoch, &cause);
        self.lose(lost, ctx);
    }
}

impl Handler<Tick> for DirectoryActor {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.shell.ticked();
        self.core.handle_timeout(now);
        self.turn(ctx);
    }
}
