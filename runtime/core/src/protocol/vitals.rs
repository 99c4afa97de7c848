//! What a state machine has in hand, for whoever watches.

use crate::Moment;

/// Counts of what one state machine has not finished, and when it will act by itself.
///
/// When all is quiet every count is zero; whoever waits for something that may never come has a `due`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vitals {
    /// Which machine.
    pub name: &'static str,
    /// What waits for a peer, a NIC or another node: something that may never answer.
    pub waiting: Vec<(&'static str, u64)>,
    /// What waits for the local engine, which lives and dies with the node.
    pub engine: Vec<(&'static str, u64)>,
    /// Credits that are out.
    pub credits: Vec<(&'static str, u64)>,
    /// When it acts next even if nothing comes.
    pub due: Option<Moment>,
}

impl Vitals {
    /// Whether nothing is in hand.
    pub fn is_quiet(&self) -> bool {
        self.waiting.iter().chain(&self.engine).chain(&self.credits).all(|(_, count)| *count == 0)
    }

    /// Whether something may be waited for without end.
    pub fn is_stuck(&self) -> bool {
        self.due.is_none() && self.waiting.iter().any(|(_, count)| *count > 0)
    }
}
