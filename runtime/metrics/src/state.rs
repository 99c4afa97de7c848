//! Whether a node runs and takes work, from what is seen of it.

use kvferry_actors::Standing;
use kvferry_core::protocol::Event;

/// What is known of a node's present incarnation.
#[derive(Debug, Default)]
pub(crate) struct State {
    standing: Option<Standing>,
    /// Incarnations that ran, the present one included.
    pub(crate) lives: u64,
    met_scheduler: bool,
    trouble: Option<String>,
    pub(crate) draining: bool,
}

impl State {
    pub(crate) fn stands(&mut self, standing: Standing) {
        self.standing = Some(standing);
        self.lives += 1;
    }

    pub(crate) fn ended(&mut self) {
        *self = State { lives: self.lives, ..State::default() };
    }

    pub(crate) fn standing(&self) -> Option<Standing> {
        self.standing.clone()
    }

    /// Takes in what happened.
    pub(crate) fn happened(&mut self, event: &Event) {
        match event {
            Event::Met { node, .. } if self.is_scheduler(*node) => self.met_scheduler = true,
            Event::Parted { node, .. } if self.is_scheduler(*node) => self.met_scheduler = false,
            Event::Health { trouble } => self.trouble.clone_from(trouble),
            Event::Draining { .. } => self.draining = true,
            _ => {}
        }
    }

    fn is_scheduler(&self, node: kvferry_core::NodeId) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.scheduler == node)
    }

    /// Why no new work is welcome; `None` when it is.
    pub(crate) fn unready(&self) -> Option<String> {
        let Some(standing) = &self.standing else {
            return Some(if self.lives == 0 { "it has not started" } else { "its incarnation is over" }.to_owned());
        };
        if self.draining {
            return Some("it leaves and offers nothing new".to_owned());
        }
        if standing.role.is_some() && !self.met_scheduler {
            return Some(format!("it has not met the scheduler, {}", standing.scheduler));
        }
        self.trouble.clone()
    }
}
