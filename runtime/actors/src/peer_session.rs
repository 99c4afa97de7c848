//! The actor under one control link.

use core::time::Duration;
use std::rc::Rc;

use actix::prelude::*;
use kvferry_core::protocol::{Heard, JoinError, Message as Wire, Session, SessionEvent};
use kvferry_core::{Epoch, Moment, NodeId};

use crate::mesh::{Mesh, SessionDown, SessionUp, StartedOver};
use crate::router::Router;
use crate::seams::{Clock, Link, LinkInput, LinkUp, Tick};

/// Messages that a peer may send before its session is admitted, which takes one turn of the mesh.
const EARLY_MAX: usize = 1024;
/// How long an authenticated peer may take to say where the conversation goes on.
const RESUME_WITHIN: Duration = Duration::from_secs(5);

/// The conversation with the peer has more to say.
#[derive(Debug)]
pub(crate) struct Speak;

impl Message for Speak {
    type Result = ();
}

/// The mesh believes this incarnation of the peer: what it says may be heard.
#[derive(Debug)]
pub(crate) struct Admit;

impl Message for Admit {
    type Result = ();
}

/// The mesh does not believe it: the peer is told why, so that it ends instead of dialing for ever.
#[derive(Debug)]
pub(crate) struct Refuse(pub JoinError);

impl Message for Refuse {
    type Result = ();
}

/// End the session: another one replaces it, or the peer's epoch is over.
#[derive(Debug)]
pub(crate) struct Hangup;

impl Message for Hangup {
    type Result = ();
}

/// One link of the conversation with a remote node and epoch: its handshake, its deadlines.
pub(crate) struct PeerSession {
    session: Session,
    link: Option<Box<dyn Link>>,
    attach: Option<LinkUp>,
    clock: Rc<dyn Clock>,
    router: Router,
    mesh: Addr<Mesh>,
    peer: Option<(NodeId, Epoch)>,
    protocol: u16,
    /// What the peer said before it was admitted; `None` from then on.
    early: Option<Vec<Wire>>,
    admitted: Moment,
    /// Whom this side dialed; tells the mesh which attempt ended.
    dialed: Option<NodeId>,
    armed: Option<Moment>,
}

impl PeerSession {
    /// A session over a link that stands.
    pub(crate) fn new(
        session: Session,
        link: LinkUp,
        clock: Rc<dyn Clock>,
        router: Router,
        mesh: Addr<Mesh>,
        dialed: Option<NodeId>,
    ) -> Self {
        PeerSession {
            session,
            link: None,
            attach: Some(link),
            clock,
            router,
            mesh,
            peer: None,
            protocol: 0,
            early: Some(Vec::new()),
            admitted: Moment(0),
            dialed,
            armed: None,
        }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        self.react(ctx);
        self.speak(false, ctx);
        // What was said may not have been a message that can cross.
        self.react(ctx);
        if let Some(due) = self.session.poll_timeout()
            && self.armed.is_none_or(|armed| due < armed)
        {
            self.armed = Some(due);
            self.clock.wake(due, ctx.address().recipient());
        }
    }

    fn react(&mut self, ctx: &mut Context<Self>) {
        self.transmit();
        while let Some(event) = self.session.poll_event() {
            match event {
                SessionEvent::Established { node, epoch, protocol } => {
                    (self.peer, self.protocol) = (Some((node, epoch)), protocol);
                    if let Some(link) = &mut self.link {
                        link.trust();
                    }
                    let dialed = self.dialed.is_some();
                    self.mesh.do_send(SessionUp { node, epoch, protocol, session: ctx.address(), dialed });
                }
                SessionEvent::Message(message) => match &mut self.early {
                    Some(early) if early.len() < EARLY_MAX => early.push(message),
                    Some(_) => self.session.handle_link_closed("too much was said before the session was admitted"),
                    None => self.hear(message, ctx),
                },
                SessionEvent::Closed(error) => {
                    self.mesh.do_send(SessionDown {
                        peer: self.peer,
                        dialed: self.dialed,
                        session: ctx.address(),
                        cause: error,
                    });
                    self.transmit();
                    if let Some(mut link) = self.link.take() {
                        link.close();
                    }
                    ctx.stop();
                }
            }
        }
    }

    fn transmit(&mut self) {
        if let Some(link) = &mut self.link {
            while let Some(frame) = self.session.poll_transmit() {
                link.send(frame);
            }
        }
    }

    /// Takes what the admitted peer said.
    fn hear(&mut self, message: Wire, ctx: &mut Context<Self>) {
        let Some((node, epoch)) = self.peer else { return };
        if matches!(message, Wire::JoinRefused(_)) {
            // Whoever says so does not believe this incarnation: it is no part of any conversation. Only the scheduler is believed, and
            // a node that this side looked for; a stranger who dials could end anybody.
            self.router.refuse(node, message, self.dialed == Some(node));
            return;
        }
        match self.router.converse(node, &ctx.address(), |conversation| conversation.handle_message(message)) {
            Some(Heard::Message(message)) => self.router.deliver(node, message),
            Some(Heard::StartedOver(why)) => self.start_over(node, epoch, why, ctx),
            Some(Heard::Nothing) | None => {}
        }
    }

    /// Says what there is to say; an acknowledgement, too, if one is `due`.
    fn speak(&mut self, due: bool, ctx: &mut Context<Self>) {
        let (Some((node, epoch)), None) = (self.peer, &self.early) else { return };
        let (now, session) = (self.clock.now(), &mut self.session);
        let over = self.router.converse(node, &ctx.address(), |conversation| {
            while let Some(message) = conversation.next_message() {
                session.send(now, message);
            }
            if let Some(heard) = conversation.acknowledgement(due) {
                session.send(now, &heard);
            }
            conversation.over()
        });
        // A peer that acknowledges nothing may say nothing either.
        if let Some(why) = over.flatten() {
            self.start_over(node, epoch, why, ctx);
        }
    }

    fn start_over(&mut self, node: NodeId, epoch: Epoch, why: &'static str, ctx: &mut Context<Self>) {
        self.mesh.do_send(StartedOver { node, epoch, session: ctx.address(), why });
        self.session.handle_link_closed(why);
    }
}

impl Actor for PeerSession {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        if let Some(link) = self.attach.take() {
            self.link = Some((link.attach)(ctx.address().recipient()));
        }
        self.turn(ctx);
    }
}

impl Handler<LinkInput> for PeerSession {
    type Result = ();

    fn handle(&mut self, input: LinkInput, ctx: &mut Context<Self>) {
        let now = self.clock.now();
        match input {
            LinkInput::Frames(frames) => {
                for frame in frames {
                    self.session.handle_frame(now, frame);
                }
            }
            LinkInput::Garbage(error) => self.session.handle_wire_error(now, error),
            LinkInput::Closed(reason) => self.session.handle_link_closed(&reason),
        }
        self.turn(ctx);
    }
}

impl Handler<Speak> for PeerSession {
    type Result = ();

    fn handle(&mut self, _: Speak, ctx: &mut Context<Self>) {
        self.turn(ctx);
    }
}

impl Handler<Admit> for PeerSession {
    type Result = ();

    fn handle(&mut self, _: Admit, ctx: &mut Context<Self>) {
        if let (Some(early), Some((node, _))) = (self.early.take(), self.peer) {
            self.admitted = self.clock.now();
            let protocol = self.protocol;
            let first = self.router.converse(node, &ctx.address(), |conversation| conversation.handle_link(protocol));
            if let Some(resume) = first.flatten() {
                self.session.send(self.clock.now(), &resume);
            }
            for message in early {
                self.hear(message, ctx);
            }
        }
        self.turn(ctx);
    }
}

impl Handler<Refuse> for PeerSession {
    type Result = ();

    fn handle(&mut self, Refuse(error): Refuse, ctx: &mut Context<Self>) {
        self.session.send(self.clock.now(), &Wire::JoinRefused(error));
        self.transmit();
        self.session.handle_link_closed("this side does not believe the peer's incarnation");
        self.turn(ctx);
    }
}

impl Handler<Hangup> for PeerSession {
    type Result = ();

    fn handle(&mut self, _: Hangup, ctx: &mut Context<Self>) {
        self.session.handle_link_closed("this side hung up");
        self.turn(ctx);
    }
}

impl Handler<Tick> for PeerSession {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.clock.now();
        self.armed = self.armed.filter(|armed| now < *armed);
        // Instead of an empty beat.
        self.speak(true, ctx);
        if let (Some((node, _)), None) = (self.peer, &self.early)
            && now.since(self.admitted) >= RESUME_WITHIN
            && self.router.converse(node, &ctx.address(), |conversation| conversation.is_resuming()) == Some(true)
        {
            self.session.handle_link_closed("the peer does not say where it goes on");
        }
        self.session.handle_timeout(now);
        self.turn(ctx);
    }
}
