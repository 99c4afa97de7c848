//! What a mesh hears and tells of links and conversations.

use actix::prelude::*;
use kvferry_core::protocol::SessionError;
use kvferry_core::{Epoch, NodeId};

use crate::peer_session::PeerSession;
use crate::seams::LinkUp;

/// A session stands.
#[derive(Debug)]
pub(crate) struct SessionUp {
    /// With whom.
    pub node: NodeId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// What both speak.
    pub protocol: u16,
    /// The actor.
    pub session: Addr<PeerSession>,
    /// Whether this side dialed.
    pub dialed: bool,
}

impl Message for SessionUp {
    type Result = ();
}

/// A session, or an attempt at one, is over.
#[derive(Debug)]
pub(crate) struct SessionDown {
    /// With whom it stood, if it did.
    pub peer: Option<(NodeId, Epoch)>,
    /// Whom this side had dialed.
    pub dialed: Option<NodeId>,
    /// The actor.
    pub session: Addr<PeerSession>,
    /// Why.
    pub cause: SessionError,
}

impl Message for SessionDown {
    type Result = ();
}

/// The peer does not go on with the conversation: it is over.
#[derive(Debug)]
pub(crate) struct StartedOver {
    /// With whom.
    pub node: NodeId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// Over which session that was noticed.
    pub session: Addr<PeerSession>,
    /// How.
    pub why: &'static str,
}

impl Message for StartedOver {
    type Result = ();
}

/// A link came up, dialed or accepted.
pub(crate) struct Linked {
    /// The link, or why the dial failed.
    pub link: Result<LinkUp, String>,
    /// Whom this side dialed.
    pub dialed: Option<NodeId>,
}

impl Message for Linked {
    type Result = ();
}

/// A peer's session ended. For the worker and, at the scheduler's node, the directory.
#[derive(Clone, Debug)]
pub(crate) struct PeerDown {
    /// Who.
    pub(crate) node: NodeId,
    /// In which incarnation.
    pub(crate) epoch: Epoch,
    /// Why.
    pub(crate) cause: String,
}

impl Message for PeerDown {
    type Result = ();
}

/// Somebody waits for a session with a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meet(pub NodeId);

impl Message for Meet {
    type Result = ();
}
