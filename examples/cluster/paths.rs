//! What ranks know of the paths between them, as their nodes tell.

use std::collections::BTreeMap;

use kvferry::{Event, Evidence, NodeId, TransportKind};
use serde::{Deserialize, Serialize};

/// What one rank knows of the path to a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    /// What its transport shows, where it initiates.
    pub(crate) evidence: Option<Evidence>,
    /// Transports that would have been preferred, each with why it was not taken.
    pub(crate) passed_over: Vec<String>,
    /// Why it is no RDMA though that was expected.
    pub(crate) shortfall: Option<String>,
}

/// The peer, the transport, and its device at whoever knows.
pub(crate) type Key = (NodeId, TransportKind, String);

/// All that one rank knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Paths(BTreeMap<Key, Known>);

/// One of them, on its way to the parent.
pub(crate) type Told = (Key, Known);

impl Paths {
    /// Takes in what an event says of a path; says of which.
    pub(crate) fn note(&mut self, event: &Event) -> Option<Key> {
        match event {
            Event::PathChosen(chosen) => {
                let key = (chosen.peer.node, chosen.kind, chosen.device.clone());
                let known = self.0.entry(key.clone()).or_default();
                known.passed_over = chosen.passed_over.iter().map(ToString::to_string).collect();
                known.shortfall = chosen.shortfall.as_ref().map(ToString::to_string);
                Some(key)
            }
            Event::PathShown(shown) => {
                let key = (shown.peer.node, shown.kind, shown.device.clone());
                let known = self.0.entry(key.clone()).or_default();
                known.evidence = Some(shown.evidence.clone());
                // The choice of the device fell short already, or its lanes do.
                known.shortfall = shown.shortfall.as_ref().map(ToString::to_string).or(known.shortfall.take());
                Some(key)
            }
            _ => None,
        }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Known> {
        self.0.get(key)
    }

    /// Of the path to a peer by a transport: over that device, where several are in use, or the only one.
    pub(crate) fn find(&self, peer: NodeId, kind: TransportKind, device: &str) -> Option<&Known> {
        let of_peer = || self.0.iter().filter(|((node, by, _), _)| *node == peer && *by == kind);
        of_peer().find(|((.., on), _)| on == device).or_else(|| of_peer().next()).map(|(_, known)| known)
    }

    /// Takes in what a rank told.
    pub(crate) fn extend(&mut self, told: Vec<Told>) {
        self.0.extend(told);
    }
}
