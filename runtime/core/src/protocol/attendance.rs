//! Whether a node that judges others by their silence was itself away.

use core::time::Duration;
use std::collections::BTreeMap;

use thiserror::Error;

use super::SessionTerms;
use crate::{Moment, NodeId};

/// Parts of the longest sleep in which a node looks whether it slept.
const LOOKS: u32 = 8;

/// The state machine by which a scheduler's node finds out that not others were gone but itself: asleep (stopped, swapped out), or cut off from
/// most of them at once. They have given it up by then. If it went on, it would declare every one of them lost; its next incarnation learns from
/// them what stands.
///
/// Before a judgement of others ask [`Attendance::handle_present`], and [`Attendance::handle_loss`] whether one of them may be declared lost.
#[derive(Debug)]
pub struct Attendance {
    terms: SessionTerms,
    /// When this node surely ran.
    present: Moment,
    /// Peers whose link broke in silence, when they last did.
    silent: BTreeMap<NodeId, Moment>,
}

/// A node was away: its incarnation is over.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Away {
    /// It did not run.
    #[error("it did not run for {0:?}, and others have given it up; start it again in its next epoch")]
    Asleep(Duration),
    /// Nothing was heard of most others at once.
    #[error(
        "{silent} of {peers} nodes fell silent within {within:?}: it is this one that is cut off; start it again in its next epoch"
    )]
    CutOff {
        /// Who fell silent.
        silent: usize,
        /// Of so many.
        peers: usize,
        /// Within how long.
        within: Duration,
    },
}

impl Attendance {
    /// A node that runs now.
    pub fn new(now: Moment, terms: SessionTerms) -> Self {
        Attendance { terms, present: now, silent: BTreeMap::new() }
    }

    /// When [`Attendance::handle_present`] is due.
    pub fn poll_timeout(&self) -> Moment {
        self.present + self.sleep_max() / LOOKS
    }

    /// This node runs.
    pub fn handle_present(&mut self, now: Moment) -> Result<(), Away> {
        let slept = now.since(self.present);
        if slept > self.sleep_max() {
            return Err(Away::Asleep(slept));
        }
        self.present = now;
        Ok(())
    }

    /// The link to a peer broke because nothing was heard of it.
    pub fn handle_silence(&mut self, now: Moment, node: NodeId) {
        self.silent.insert(node, now);
    }

    /// The conversation with one of `peers` is about to end. An error says that it is not to be held against that one.
    pub fn handle_loss(&mut self, now: Moment, node: NodeId, peers: usize) -> Result<(), Away> {
        let within = self.terms.silence_max;
        self.silent.retain(|_, at| now.since(*at) < within);
        let silent = self.silent.len();
        // Links of a process that ended are closed, whoever ended it.
        if self.silent.remove(&node).is_some() && silent > 1 && silent * 2 > peers {
            return Err(Away::CutOff { silent, peers, within });
        }
        Ok(())
    }

    /// A longer sleep may have made others give this node up. They last heard of it up to a beat before it fell asleep.
    fn sleep_max(&self) -> Duration {
        let SessionTerms { beat_every, silence_max, resume_within, .. } = self.terms;
        (silence_max + resume_within / 2).saturating_sub(beat_every).max(silence_max / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment(0) + Duration::from_millis(ms)
    }

    fn attendance() -> Attendance {
        Attendance::new(at(0), SessionTerms::default())
    }

    #[test]
    fn a_sleep_after_which_others_may_have_given_up_is_noticed() {
        let mut attendance = attendance();
        let mut now = at(0);
        for _ in 0..100 {
            now = attendance.poll_timeout();
            assert_eq!(attendance.handle_present(now), Ok(()));
        }
        let SessionTerms { beat_every, silence_max, resume_within, .. } = SessionTerms::default();
        // It fell asleep just after it had looked, a beat after it was last heard.
        let given_up = now + (silence_max + resume_within) - beat_every;
        assert_eq!(attendance.handle_present(given_up), Err(Away::Asleep(given_up.since(now))));
        assert_eq!(attendance.handle_present(now + silence_max / 2), Ok(()), "a short one is only a delay");
    }

    #[test]
    fn whoever_loses_most_others_at_once_is_cut_off_itself() {
        let mut attendance = attendance();
        (1..=3).for_each(|node| attendance.handle_silence(at(node), NodeId(node)));
        assert_eq!(
            attendance.handle_loss(at(1000), NodeId(1), 5),
            Err(Away::CutOff { silent: 3, peers: 5, within: SessionTerms::default().silence_max })
        );
    }

    #[test]
    fn a_minority_is_lost_and_so_is_whoever_hung_up() {
        let mut attendance = attendance();
        (1..=2).for_each(|node| attendance.handle_silence(at(0), NodeId(node)));
        assert_eq!(attendance.handle_loss(at(1000), NodeId(3), 3), Ok(()), "its link was closed");
        assert_eq!(attendance.handle_loss(at(1000), NodeId(1), 4), Ok(()), "two of four");
        assert_eq!(attendance.handle_loss(at(1000), NodeId(2), 1), Ok(()), "the only one");
        (1..=2).for_each(|node| attendance.handle_silence(at(0), NodeId(node)));
        assert_eq!(attendance.handle_loss(at(6000), NodeId(1), 2), Ok(()), "it was heard again long ago");
    }
}
