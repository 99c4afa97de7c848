//! Whoever watches a node from outside: metrics, recorders. Watchers see everything and change nothing.

use std::fmt::Debug;

use actix::prelude::*;
use kvferry_core::protocol::{Event, Message as Wire, Role, Vitals};
use kvferry_core::{Epoch, NodeId};
use tokio::sync::mpsc;

use crate::shell::Inspect;

/// Sees what a node does. Called on the node's own thread, between two messages: what takes long delays handovers.
pub trait Watch: Debug + Send + Sync {
    /// An incarnation of a node runs.
    fn stands(&self, _node: &Standing) {}

    /// Something happened there.
    fn happened(&self, _event: &Event) {}

    /// A message was said to another node (`sent`), or heard of one.
    fn said(&self, _peer: NodeId, _sent: bool, _message: &Wire) {}

    /// That incarnation is over; nothing of it touches memory any more.
    fn ended(&self) {}
}

/// A node that runs.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Which.
    pub node: NodeId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// Its side; `None` for a scheduler.
    pub role: Option<Role>,
    /// Where its scheduler is.
    pub scheduler: NodeId,
    pub(crate) actors: Vec<Recipient<Inspect>>,
}

impl Standing {
    /// What its protocol actors have in hand. Pends for as long as one of them does not answer; those that are gone are left out.
    pub async fn vitals(&self) -> Vec<Vitals> {
        let (to, mut answers) = mpsc::unbounded_channel();
        for actor in &self.actors {
            actor.do_send(Inspect { to: to.clone() });
        }
        // Only the questions keep it open now.
        drop(to);
        let mut vitals = Vec::with_capacity(self.actors.len());
        while let Some(answer) = answers.recv().await {
            vitals.push(answer);
        }
        vitals
    }
}
