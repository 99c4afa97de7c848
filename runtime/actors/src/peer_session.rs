//! The actor under one control link.

use std::rc::Rc;

use actix::prelude::*;
use kvferry_core::protocol::{Message as Wire, Session, SessionEvent};
use kvferry_core::{Epoch, Moment, NodeId};

use crate::mesh::{Mesh, SessionDown, SessionUp};
use crate::router::Router;
use crate::seams::{Clock, Link, LinkInput, LinkUp, Tick};

/// Messages that a peer may send before its session is admitted, which takes one turn of the mesh.
const EARLY_MAX: usize = 1024;

/// Say this to the peer.
#[derive(Debug)]
pub(crate) struct Say(pub Wire);

impl Message for Say {
    type Result = ();
}

/// The mesh believes this incarnation of the peer: what it says may be heard.
#[derive(Debug)]
pub(crate) struct Admit;

impl Message for Admit {
    type Result = ();
}

/// End the session: another one replaces it, or the peer's epoch is over.
#[derive(Debug)]
pub(crate) struct Hangup;

impl Message for Hangup {
    type Result = ();
}

/// One session per remote node and epoch: the link, its handshake, its deadlines.
pub(crate) struct PeerSession {
    session: Session,
    link: Option<Box<dyn Link>>,
    attach: Option<LinkUp>,
    clock: Rc<dyn Clock>,
    router: Router,
    mesh: Addr<Mesh>,
    peer: Option<(NodeId, Epoch)>,
    /// What the peer said before it was admitted; `None` from then on.
    early: Option<Vec<Wire>>,
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
            early: Some(Vec::new()),
            dialed,
            armed: None,
        }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        if let Some(link) = &mut self.link {
            while let Some(frame) = self.session.poll_transmit() {
                link.send(frame);
            }
        }
        while let Some(event) = self.session.poll_event() {
            match event {
                SessionEvent::Established { node, epoch } => {
                    self.peer = Some((node, epoch));
                    if let Some(link) = &mut self.link {
                        link.trust();
                    }
                    self.mesh.do_send(SessionUp { node, epoch, session: ctx.address(), dialed: self.dialed.is_some() });
                }
                SessionEvent::Message(message) => match (&mut self.early, self.peer) {
                    (Some(early), _) if early.len() < EARLY_MAX => early.push(message),
                    (Some(_), _) => {
                        self.session.handle_link_closed("too much was said before the session was admitted")
                    }
                    (None, Some((node, _))) => self.router.deliver(node, message),
                    (None, None) => {}
                },
                SessionEvent::Closed(error) => {
                    self.mesh.do_send(SessionDown {
                        peer: self.peer,
                        dialed: self.dialed,
                        session: ctx.address(),
                        cause: error.to_string(),
                    });
                    if let Some(mut link) = self.link.take() {
                        while let Some(frame) = self.session.poll_transmit() {
                            link.send(frame);
                        }
                        link.close();
                    }
                    ctx.stop();
                }
            }
        }
        if let Some(link) = &mut self.link {
            while let Some(frame) = self.session.poll_transmit() {
                link.send(frame);
            }
        }
        if let Some(due) = self.session.poll_timeout()
            && self.armed.is_none_or(|armed| due < armed)
        {
            self.armed = Some(due);
            self.clock.wake(due, ctx.address().recipient());
        }
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

impl Handler<Say> for PeerSession {
    type Result = ();

    fn handle(&mut self, Say(message): Say, ctx: &mut Context<Self>) {
        self.session.send(self.clock.now(), message);
        self.turn(ctx);
    }
}

impl Handler<Admit> for PeerSession {
    type Result = ();

    fn handle(&mut self, _: Admit, _: &mut Context<Self>) {
        if let (Some(early), Some((node, _))) = (self.early.take(), self.peer) {
            for message in early {
                self.router.deliver(node, message);
            }
        }
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
        self.session.handle_timeout(now);
        self.turn(ctx);
    }
}
