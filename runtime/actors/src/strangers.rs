//! Links that came in and belong to nobody yet.

use std::collections::VecDeque;

/// Links that may be in their handshake at once: a whole deployment that finds its scheduler again at the same moment, and no more.
const STRANGERS_MAX: usize = 1024;

/// Whoever dialed and has not said who it is, oldest first.
#[derive(Debug)]
pub(crate) struct Strangers<T> {
    waiting: VecDeque<T>,
}

impl<T: PartialEq> Strangers<T> {
    /// Nobody.
    pub(crate) fn new() -> Self {
        Strangers { waiting: VecDeque::new() }
    }

    /// Another one came. Who has to go for it, if there are too many, is the one that has said nothing for longest.
    pub(crate) fn come(&mut self, stranger: T) -> Option<T> {
        self.waiting.push_back(stranger);
        if self.waiting.len() > STRANGERS_MAX { self.waiting.pop_front() } else { None }
    }

    /// One has said who it is, or is gone.
    pub(crate) fn leave(&mut self, stranger: &T) {
        self.waiting.retain(|waiting| waiting != stranger);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_when_there_are_too_many() {
        let mut strangers = Strangers::new();
        for stranger in 0..STRANGERS_MAX {
            assert_eq!(strangers.come(stranger), None);
        }
        strangers.leave(&0);
        assert_eq!(strangers.come(STRANGERS_MAX), None);
        assert_eq!(strangers.come(STRANGERS_MAX + 1), Some(1), "who has left is not asked to");
        strangers.leave(&0);
        assert_eq!(strangers.waiting.len(), STRANGERS_MAX);
    }
}
