//! The actor that keeps a node's sessions: whom to dial, which incarnation to believe, who went away.

mod news;

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use actix::prelude::*;
use kvferry_core::protocol::{
    Attendance, Away, Event, Identity, JoinError, Lost, Member, MemberList, Message as Wire, Profile,
    RESUMING_PROTOCOL, Session, SessionError, SessionTerms, are_peers, dials,
};
use kvferry_core::{Epoch, Moment, NodeId};

pub(crate) use news::{Linked, Meet, PeerDown, SessionDown, SessionUp, StartedOver};

use crate::peer_session::{Admit, Hangup, PeerSession, Refuse};
use crate::router::{Incoming, Router};
use crate::seams::{Environment, Tick};
use crate::shell::Observer;
use crate::strangers::Strangers;
use crate::supervise::{self, OnEnd};

const REDIAL_FIRST: Duration = Duration::from_millis(20);
const REDIAL_MAX: Duration = Duration::from_secs(2);

/// What a mesh needs to know of its own node.
pub(crate) struct MeshConfig {
    /// Who this is.
    pub identity: Identity,
    /// How sessions wait.
    pub terms: SessionTerms,
    /// Ranks of other groups that are dialed unasked.
    pub eager_max: usize,
    /// This node as the directory is to list it.
    pub member: Member,
    /// What peers are told.
    pub profile: Profile,
    /// Where the scheduler is; `None` on its own node.
    pub scheduler: Option<(NodeId, String)>,
}

/// A peer with whom there is a conversation.
struct Standing {
    epoch: Epoch,
    /// Over which link; without one, since when and why.
    session: Result<Addr<PeerSession>, (Moment, String)>,
    since: Moment,
    /// Whether it goes on when its link breaks.
    resumes: bool,
}

/// A node that this one may dial.
struct Target {
    address: String,
    /// Whether to: beyond so many, only those whom a handover needs.
    wanted: bool,
    /// The scheduler, or a rank of this one's own group.
    near: bool,
    dialing: bool,
    backoff: Duration,
    redial_at: Option<Moment>,
}

/// The sessions of one node.
pub(crate) struct Mesh {
    config: MeshConfig,
    environment: Environment,
    router: Router,
    listeners: Vec<Recipient<PeerDown>>,
    observer: Observer,
    on_end: OnEnd,
    targets: BTreeMap<NodeId, Target>,
    /// Targets of other groups that are wanted.
    wanted: usize,
    /// Wanted targets that are neither dialed nor up, as far as anybody looked.
    to_dial: BTreeSet<NodeId>,
    /// Conversations whose link is broken.
    broken: BTreeSet<NodeId>,
    /// Conversations that were begun, to name the next.
    conversations: u64,
    /// Those that stand.
    up: BTreeMap<NodeId, Standing>,
    strangers: Strangers<Addr<PeerSession>>,
    /// The newest incarnation that was declared lost: nothing of it, or older, is believed.
    fenced: BTreeMap<NodeId, Epoch>,
    /// Whether this node was away itself, where it judges others: at the scheduler.
    attendance: Option<Attendance>,
    /// It was: nobody is judged any more.
    away: bool,
    armed: Option<Moment>,
}

impl Mesh {
    /// A mesh without sessions; it dials the scheduler as soon as it starts.
    pub(crate) fn new(
        config: MeshConfig,
        environment: Environment,
        router: Router,
        listeners: Vec<Recipient<PeerDown>>,
        observer: Observer,
        on_end: OnEnd,
    ) -> Self {
        let (mut targets, mut to_dial) = (BTreeMap::new(), BTreeSet::new());
        let judges = config.scheduler.is_none();
        let attendance = judges.then(|| Attendance::new(environment.clock.now(), config.terms));
        if let Some((node, address)) = &config.scheduler {
            targets.insert(*node, Target::new(address.clone(), true));
            to_dial.insert(*node);
        }
        Mesh {
            config,
            environment,
            router,
            listeners,
            observer,
            on_end,
            targets,
            wanted: 0,
            to_dial,
            broken: BTreeSet::new(),
            conversations: 0,
            up: BTreeMap::new(),
            strangers: Strangers::new(),
            fenced: BTreeMap::new(),
            attendance,
            away: false,
            armed: None,
        }
    }

    fn dial_all(&mut self, ctx: &mut Context<Self>) {
        let now = self.environment.clock.now();
        let mut due: Option<Moment> = None;
        for node in std::mem::take(&mut self.to_dial) {
            let Some(target) = self.targets.get_mut(&node).filter(|target| target.wanted && !target.dialing) else {
                continue;
            };
            if self.up.get(&node).is_some_and(|standing| standing.session.is_ok()) {
                continue;
            }
            if let Some(at) = target.redial_at.filter(|at| now < *at) {
                due = Some(due.map_or(at, |due| due.min(at)));
                self.to_dial.insert(node);
                continue;
            }
            target.dialing = true;
            // While there is something to resume, a packet that is lost must not take all the time that there is.
            let within = match self.up.contains_key(&node) {
                true => self.config.terms.resume_within / 4,
                false => self.config.terms.handshake_within,
            };
            let (mesh, dialed) = (ctx.address(), Some(node));
            let answer = Box::new(move |link| mesh.do_send(Linked { link, dialed }));
            self.environment.network.dial(&target.address, within, answer);
        }
        let resume_within = self.config.terms.resume_within;
        let broken = self.broken.iter().filter_map(|node| self.up.get(node)?.session.as_ref().err());
        let attend = self.attendance.as_ref().map(Attendance::poll_timeout);
        due = due.into_iter().chain(broken.map(|(since, _)| *since + resume_within)).chain(attend).min();
        if let Some(due) = due
            && self.armed.is_none_or(|armed| due < armed)
        {
            self.armed = Some(due);
            self.environment.clock.wake(due, ctx.address().recipient());
        }
    }

    /// Ends conversations whose link was not made again in time.
    fn give_up_broken(&mut self) {
        let (now, within) = (self.environment.clock.now(), self.config.terms.resume_within);
        let late: Vec<(NodeId, String)> = self
            .broken
            .iter()
            .filter_map(|node| Some((*node, self.up.get(node)?.session.as_ref().err()?)))
            .filter(|(_, (since, _))| now.since(*since) >= within)
            .map(|(node, (_, cause))| (node, cause.clone()))
            .collect();
        for (node, cause) in late {
            self.judge(node, cause);
        }
    }

    /// Whether this node was away and its incarnation is over: then others are right who have given it up.
    fn was_away(&mut self, look: impl FnOnce(&mut Attendance, Moment) -> Result<(), Away>) -> bool {
        if let Some(attendance) = self.attendance.as_mut().filter(|_| !self.away)
            && let Err(away) = look(attendance, self.environment.clock.now())
        {
            tracing::error!(%away, "this node's incarnation ends");
            self.away = true;
            (self.observer)(Event::WasAway(away.clone()));
            (self.on_end)(&away.to_string());
        }
        self.away
    }

    /// Ends a conversation because the peer is gone, unless it is this node that was.
    fn judge(&mut self, node: NodeId, cause: String) {
        let peers = self.up.len();
        if !self.was_away(|attendance, now| attendance.handle_loss(now, node, peers)) {
            self.give_up(node, cause);
        }
    }

    fn give_up(&mut self, node: NodeId, cause: String) {
        if let Some(Standing { epoch, session, .. }) = self.up.remove(&node) {
            self.router.end(node);
            self.broken.remove(&node);
            self.to_dial.insert(node);
            if let Ok(session) = session {
                session.do_send(Hangup);
            }
            self.tell(&PeerDown { node, epoch, cause });
        }
    }

    fn retry_later(&mut self, node: NodeId, ctx: &mut Context<Self>) {
        let now = self.environment.clock.now();
        // While there is something to resume, several attempts have to fit in.
        let longest = match self.up.get(&node) {
            Some(standing) if standing.session.is_err() => self.config.terms.resume_within / 8,
            _ => REDIAL_MAX,
        };
        if let Some(target) = self.targets.get_mut(&node) {
            target.dialing = false;
            self.to_dial.insert(node);
            let backoff = target.backoff.min(longest);
            target.redial_at = Some(now + backoff);
            target.backoff = (backoff * 2).min(REDIAL_MAX);
        }
        self.dial_all(ctx);
    }

    fn tell(&self, down: &PeerDown) {
        (self.observer)(Event::Parted { node: down.node, epoch: down.epoch, cause: down.cause.clone() });
        for listener in &self.listeners {
            listener.do_send(down.clone());
        }
    }

    fn members(&mut self, list: &MemberList, ctx: &mut Context<Self>) {
        if list.whole {
            let listed: BTreeSet<NodeId> = list.members.iter().map(|member| member.node).collect();
            let scheduler = self.config.scheduler.as_ref().map(|(node, _)| *node);
            let gone = |node: &&NodeId| Some(**node) != scheduler && !listed.contains(*node);
            for node in self.targets.keys().filter(gone).copied().collect::<Vec<_>>() {
                self.forget_target(node);
            }
        }
        for member in &list.members {
            let me = &self.config.member;
            if self.is_fenced(member.node, member.epoch) {
                self.report_lost(member.node, member.epoch);
                continue;
            }
            let known = self.targets.get(&member.node).is_some_and(|target| target.address == member.address);
            if known || member.node == me.node || !are_peers(me, member) || !dials(me, member) {
                continue;
            }
            let group = |member: &Member| member.place.as_ref().map(|place| place.group);
            let (near, was_wanted) = (group(me) == group(member), self.forget_target(member.node));
            let target = Target::new(member.address.clone(), near || was_wanted || self.wanted < self.config.eager_max);
            if target.wanted {
                self.to_dial.insert(member.node);
                self.wanted += usize::from(!near);
            }
            self.targets.insert(member.node, Target { near, ..target });
        }
        self.dial_all(ctx);
    }

    /// Says whether it was wanted.
    fn forget_target(&mut self, node: NodeId) -> bool {
        let target = self.targets.remove(&node);
        if target.as_ref().is_some_and(|target| target.wanted && !target.near) {
            self.wanted = self.wanted.saturating_sub(1);
        }
        target.is_some_and(|target| target.wanted)
    }

    fn is_fenced(&self, node: NodeId, epoch: Epoch) -> bool {
        self.fenced.get(&node).is_some_and(|fence| epoch <= *fence)
    }

    /// A scheduler that has started again may not know that a predecessor had declared an incarnation lost, and take it for a member, whom others
    /// refuse for ever. Only the scheduler can end it.
    fn report_lost(&self, node: NodeId, epoch: Epoch) {
        if let Some((scheduler, _)) = self.config.scheduler.as_ref().filter(|(scheduler, _)| *scheduler != node) {
            let cause = "an earlier scheduler had declared it lost".to_owned();
            self.router.send(*scheduler, Wire::Lost(Lost { node, epoch, cause }));
        }
    }

    fn lost(&mut self, lost: &Lost) {
        let fence = self.fenced.entry(lost.node).or_insert(lost.epoch);
        *fence = (*fence).max(lost.epoch);
        self.forget_target(lost.node);
        if self.up.get(&lost.node).is_none_or(|standing| standing.epoch <= lost.epoch) {
            self.give_up(lost.node, lost.cause.clone());
            self.router.forget(lost.node);
        }
    }
}

impl Target {
    fn new(address: String, wanted: bool) -> Self {
        Target { address, wanted, near: true, dialing: false, backoff: REDIAL_FIRST, redial_at: None }
    }
}

impl Actor for Mesh {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        self.dial_all(ctx);
    }
}

impl Handler<Linked> for Mesh {
    type Result = ();

    fn handle(&mut self, Linked { link, dialed }: Linked, ctx: &mut Context<Self>) {
        let link = match link {
            Ok(link) => link,
            Err(reason) => {
                tracing::debug!(?dialed, reason, "a dial failed");
                if let Some(node) = dialed {
                    self.retry_later(node, ctx);
                }
                return;
            }
        };
        let now = self.environment.clock.now();
        let (identity, nonce, terms) = (self.config.identity.clone(), (self.environment.nonce)(), self.config.terms);
        let session = match dialed {
            Some(node) => Session::dial(now, identity, node, link.loopback, nonce, terms),
            None => Session::accept(now, identity, link.loopback, nonce, terms),
        };
        let (clock, router, mesh) = (self.environment.clock.clone(), self.router.clone(), ctx.address());
        let session = PeerSession::new(session, link, clock, router, mesh, dialed);
        let session = supervise::start("peer session", &self.on_end, Context::new(), session);
        if dialed.is_none()
            && let Some(oldest) = self.strangers.come(session)
        {
            oldest.do_send(Hangup);
        }
    }
}

impl Handler<SessionUp> for Mesh {
    type Result = ();

    fn handle(&mut self, up: SessionUp, ctx: &mut Context<Self>) {
        if self.was_away(Attendance::handle_present) {
            return;
        }
        let SessionUp { node, epoch, protocol, session, dialed } = up;
        if dialed {
            self.targets.get_mut(&node).into_iter().for_each(|target| target.dialing = false);
        } else {
            self.strangers.leave(&session);
        }
        let fenced = self.is_fenced(node, epoch);
        let older = self.up.get(&node).is_some_and(|standing| epoch < standing.epoch);
        if fenced || older {
            let newest = self.fenced.get(&node).copied().unwrap_or(epoch).max(epoch);
            session.do_send(Refuse(JoinError::StaleEpoch { node, epoch, newest }));
            if fenced {
                self.report_lost(node, epoch);
            }
            self.retry_later(node, ctx);
            return;
        }
        let (now, resumes) = (self.environment.clock.now(), protocol >= RESUMING_PROTOCOL);
        let goes_on = self.up.get(&node).is_some_and(|standing| standing.epoch == epoch && standing.resumes && resumes);
        if !goes_on {
            // What was on its way to an earlier incarnation, or over a link that is not resumed, is lost: whoever waits must not wait on.
            self.give_up(node, "another session replaced it".to_owned());
            self.conversations += 1;
            self.router.begin(node, epoch, self.conversations);
        }
        let standing = Standing { epoch, session: Ok(session.clone()), since: now, resumes };
        self.broken.remove(&node);
        if let Some(Standing { session: Ok(replaced), .. }) = self.up.insert(node, standing) {
            replaced.do_send(Hangup);
        }
        self.router.link(node, Some(session.clone()));
        if !goes_on {
            self.router.send(node, Wire::Profile(Box::new(self.config.profile.clone())));
            if self.config.scheduler.as_ref().is_some_and(|(scheduler, _)| *scheduler == node) {
                self.router.send(node, Wire::Join(Box::new(self.config.member.clone())));
            }
            self.router.flush(node);
            (self.observer)(Event::Met { node, epoch });
        }
        session.do_send(Admit);
    }
}

impl Handler<SessionDown> for Mesh {
    type Result = ();

    fn handle(&mut self, SessionDown { peer, dialed, session, cause }: SessionDown, ctx: &mut Context<Self>) {
        if self.was_away(Attendance::handle_present) {
            return;
        }
        let now = self.environment.clock.now();
        if dialed.is_none() {
            self.strangers.leave(&session);
        }
        if let Some((node, _)) = peer
            && let Some(standing) = self.up.get_mut(&node).filter(|standing| standing.session.as_ref() == Ok(&session))
        {
            if let Some(attendance) = self.attendance.as_mut().filter(|_| matches!(cause, SessionError::Silent(_))) {
                attendance.handle_silence(now, node);
            }
            // Only a session that lasted shows that dialing at once is worth it.
            if now.since(standing.since) > REDIAL_MAX
                && let Some(target) = self.targets.get_mut(&node)
            {
                target.backoff = REDIAL_FIRST;
            }
            // What cannot cross would be said again over every other link.
            if standing.resumes && !matches!(cause, SessionError::CannotCross(_)) {
                standing.session = Err((now, cause.to_string()));
                self.broken.insert(node);
                self.to_dial.insert(node);
                self.router.link(node, None);
            } else {
                self.judge(node, cause.to_string());
            }
        }
        if let Some(node) = dialed {
            self.retry_later(node, ctx);
        }
        self.dial_all(ctx);
    }
}

impl Handler<StartedOver> for Mesh {
    type Result = ();

    fn handle(&mut self, StartedOver { node, epoch, session, why }: StartedOver, _: &mut Context<Self>) {
        let current = self.up.get(&node).is_some_and(|standing| standing.session.as_ref() == Ok(&session));
        if current && !self.was_away(Attendance::handle_present) {
            tracing::warn!(%node, %epoch, why, "a conversation is over");
            self.judge(node, why.to_owned());
        }
    }
}

impl Handler<Incoming> for Mesh {
    type Result = ();

    fn handle(&mut self, Incoming { message, .. }: Incoming, ctx: &mut Context<Self>) {
        match message {
            Wire::Members(list) => self.members(&list, ctx),
            Wire::Lost(lost) => self.lost(&lost),
            Wire::JoinRefused(error) => {
                tracing::error!(%error, "this node may not join");
                (self.on_end)(&error.to_string());
            }
            _ => {}
        }
    }
}

impl Handler<Meet> for Mesh {
    type Result = ();

    fn handle(&mut self, Meet(node): Meet, ctx: &mut Context<Self>) {
        if let Some(target) = self.targets.get_mut(&node) {
            if !target.wanted {
                target.wanted = true;
                self.wanted += 1;
            }
            self.to_dial.insert(node);
            self.dial_all(ctx);
        }
    }
}

impl Handler<Tick> for Mesh {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.environment.clock.now();
        self.armed = self.armed.filter(|armed| now < *armed);
        if self.was_away(Attendance::handle_present) {
            return;
        }
        self.give_up_broken();
        self.dial_all(ctx);
    }
}
