//! What of one leg is under way: shares of programs, and the transfers that move them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Moment, Program, TransferId, UnitRange};

/// The transfers of one leg that have not ended, and the shares that are not here yet.
///
/// A share may be moved by several transfers: one whose rail fell silent goes on until it is stopped or fenced, while another one moves the
/// same bytes to the same place. What counts is that a share is here, not how often; nothing is over before every transfer has ended.
#[derive(Debug, Default)]
pub(super) struct Flight {
    transfers: BTreeMap<TransferId, Attempt>,
    shares: BTreeMap<u32, Share>,
    next_share: u32,
    next_chunk: u16,
    /// Bytes and pieces that have come, by local NIC.
    carried: BTreeMap<usize, (u64, u64)>,
}

/// A part of a program that is to be moved, by whichever rail.
#[derive(Clone, Debug)]
pub(super) struct Share {
    pub(super) step: u32,
    pub(super) program: Arc<Program>,
    pub(super) range: UnitRange,
    /// Transfers that were posted for it so far.
    pub(super) tries: u32,
}

/// One transfer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    /// Which NIC here.
    pub(super) nic: usize,
    /// What it is to move; `None` for a push that is not shared out, which the peer posts.
    pub(super) share: Option<u32>,
    /// In which conversation with the peer it was posted: the rails of a later one have not heard of it.
    pub(super) conversation: Option<u64>,
    pub(super) bytes: u64,
    pub(super) course: Course,
    /// When something is to be done about it, where another rail could take over.
    pub(super) due: Option<Moment>,
}

impl Attempt {
    /// Whether it is one of the shares in which the peer pushes: those belong to no conversation's rails here.
    pub(super) fn is_pushed_share(&self) -> bool {
        self.share.is_some() && self.conversation.is_none()
    }
}

/// How far one transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    Running,
    /// It was told to stop: somebody else moves its share, or has moved it.
    GivenUp,
    /// A fence was asked for that covers it: this one, and each that is asked for later.
    Fencing(u64),
}

impl Flight {
    pub(super) fn is_empty(&self) -> bool {
        self.transfers.is_empty()
    }

    /// Whether all that was to be moved is here, and nothing else is under way.
    pub(super) fn is_over(&self) -> bool {
        self.transfers.is_empty() && self.shares.is_empty()
    }

    /// Bytes that have come.
    pub(super) fn bytes(&self) -> u64 {
        self.carried.values().map(|(bytes, _)| bytes).sum()
    }

    /// Bytes and pieces that have come, by local NIC.
    pub(super) fn carried(&self) -> impl Iterator<Item = (usize, (u64, u64))> + '_ {
        self.carried.iter().map(|(nic, carried)| (*nic, *carried))
    }

    /// The steps of what is not here yet.
    pub(super) fn steps(&self) -> impl Iterator<Item = u32> + '_ {
        self.transfers.keys().map(|id| id.step()).chain(self.shares.values().map(|share| share.step))
    }

    pub(super) fn attempts(&self) -> impl Iterator<Item = (TransferId, &Attempt)> {
        self.transfers.iter().map(|(id, attempt)| (*id, attempt))
    }

    pub(super) fn attempt(&self, id: TransferId) -> Option<&Attempt> {
        self.transfers.get(&id)
    }

    pub(super) fn contains(&self, id: TransferId) -> bool {
        self.transfers.contains_key(&id)
    }

    /// When something is to be done about a transfer.
    pub(super) fn due(&self) -> Option<Moment> {
        self.transfers.values().filter_map(|attempt| attempt.due).min()
    }

    /// A push is expected.
    pub(super) fn expect(&mut self, id: TransferId, nic: usize, bytes: u64) {
        self.transfers
            .insert(id, Attempt { nic, share: None, conversation: None, bytes, course: Course::Running, due: None });
    }

    /// The peer pushes a share.
    pub(super) fn expect_share(&mut self, id: TransferId, number: u32, nic: usize) {
        let bytes = self.shares.get(&number).map_or(0, |share| share.program.bytes_in(share.range));
        self.expect(id, nic, bytes);
        if let Some(attempt) = self.transfers.get_mut(&id) {
            attempt.share = Some(number);
        }
    }

    /// The share of a step that is exactly that range, and that nobody moves.
    pub(super) fn open_share(&self, step: u32, range: UnitRange) -> Option<u32> {
        let moved = |number: &u32| self.transfers.values().any(|attempt| attempt.share == Some(*number));
        let is_it = |(number, share): &(&u32, &Share)| (share.step, share.range) == (step, range) && !moved(number);
        self.shares.iter().find(is_it).map(|(number, _)| *number)
    }

    /// Something is to be moved. Returns its number.
    pub(super) fn add(&mut self, step: u32, program: Arc<Program>, range: UnitRange) -> u32 {
        let number = self.next_share;
        self.next_share = number.wrapping_add(1);
        self.shares.insert(number, Share { step, program, range, tries: 0 });
        number
    }

    pub(super) fn share(&self, number: u32) -> Option<&Share> {
        self.shares.get(&number)
    }

    /// A share is posted at that NIC, as the transfer that `first` is chunk 0 of; as that itself where it is `alone`, and has been. Returns its
    /// name, its bytes and what it moves.
    pub(super) fn post(
        &mut self,
        number: u32,
        nic: usize,
        first: TransferId,
        alone: bool,
    ) -> Option<(TransferId, u64, Share)> {
        let mut id = first;
        // Whoever is alone now may not have been so before: a share that comes again, or beside another one of its step, takes a number, too.
        let tried = self.shares.get(&number)?.tries > 0;
        if !alone || tried || self.transfers.contains_key(&first) {
            // Numbers come again after 65,536 transfers of one leg.
            while self.transfers.contains_key(&id) || id == first {
                self.next_chunk = self.next_chunk.wrapping_add(1);
                id = first.with_chunk(self.next_chunk);
            }
        }
        let share = self.shares.get_mut(&number)?;
        share.tries += 1;
        let bytes = share.program.bytes_in(share.range);
        let attempt =
            Attempt { nic, share: Some(number), conversation: None, bytes, course: Course::Running, due: None };
        self.transfers.insert(id, attempt);
        Some((id, bytes, share.clone()))
    }

    /// A transfer belongs to that conversation.
    pub(super) fn book(&mut self, id: TransferId, conversation: u64) {
        if let Some(attempt) = self.transfers.get_mut(&id) {
            attempt.conversation = Some(conversation);
        }
    }

    /// Something is to be done about a transfer that has not ended by then.
    pub(super) fn wait_until(&mut self, id: TransferId, due: Moment) {
        if let Some(attempt) = self.transfers.get_mut(&id) {
            attempt.due = Some(due);
        }
    }

    /// A transfer was told to stop; it is to be fenced when it has not ended by then, if ever.
    pub(super) fn give_up(&mut self, id: TransferId, due: Option<Moment>) {
        if let Some(attempt) = self.transfers.get_mut(&id) {
            (attempt.course, attempt.due) = (Course::GivenUp, due);
        }
    }

    /// The peer says that a share is here.
    pub(super) fn arrived(&mut self, number: u32) {
        self.shares.remove(&number);
    }

    /// The peer says that a share is not here, whatever was heard of it before.
    pub(super) fn reopen(&mut self, number: u32, share: Share) {
        self.shares.entry(number).or_insert(share);
    }

    /// What is not here yet is of no interest any more; what is under way still has to end.
    pub(super) fn forget_shares(&mut self) {
        self.shares.clear();
    }

    /// All of them are to stop. Returns which they are, each with its NIC; when they are fenced somebody else says.
    pub(super) fn stop(&mut self) -> Vec<(TransferId, usize)> {
        for attempt in self.transfers.values_mut().filter(|attempt| attempt.course == Course::Running) {
            (attempt.course, attempt.due) = (Course::GivenUp, None);
        }
        self.attempts().map(|(id, attempt)| (id, attempt.nic)).collect()
    }

    /// A transfer is done. Returns what it was, and the others that move the same share and need not any more.
    pub(super) fn done(
        &mut self,
        id: TransferId,
        bytes: u64,
        pieces: u64,
    ) -> Option<(Attempt, Vec<(TransferId, usize)>)> {
        let attempt = self.transfers.remove(&id)?;
        let is_new = attempt.share.is_none_or(|share| self.shares.remove(&share).is_some());
        if is_new {
            let carried = self.carried.entry(attempt.nic).or_default();
            *carried = (carried.0.saturating_add(bytes), carried.1.saturating_add(pieces));
        }
        Some((attempt, self.running(attempt.share)))
    }

    /// A transfer ended without success. Returns what it was, and the share that nobody moves now, if there is one.
    pub(super) fn failed(&mut self, id: TransferId) -> Option<(Attempt, Option<u32>)> {
        let attempt = self.transfers.remove(&id)?;
        let open = attempt.share.filter(|share| self.shares.contains_key(share));
        Some((attempt, open.filter(|share| self.running(Some(*share)).is_empty())))
    }

    /// A fence is asked for that covers what was told to stop at that NIC. It is to be asked for again when there is no proof by then.
    pub(super) fn fence(&mut self, nic: usize, ticket: u64, due: Moment) {
        let given_up = |attempt: &&mut Attempt| attempt.nic == nic && attempt.course != Course::Running;
        for attempt in self.transfers.values_mut().filter(given_up) {
            let first = if let Course::Fencing(first) = attempt.course { first } else { ticket };
            (attempt.course, attempt.due) = (Course::Fencing(first), Some(due));
        }
    }

    /// A fence was proved: what it, or an earlier one, was asked for can write nothing any more.
    pub(super) fn fenced(&mut self, nic: usize, ticket: u64) -> Vec<(TransferId, Attempt)> {
        let covered = |attempt: &Attempt| matches!(attempt.course, Course::Fencing(first) if first <= ticket);
        let fenced = |attempt: &Attempt| attempt.nic == nic && covered(attempt);
        let ended: Vec<TransferId> = self.attempts().filter(|(_, one)| fenced(one)).map(|(id, _)| id).collect();
        ended.into_iter().filter_map(|id| Some((id, self.transfers.remove(&id)?))).collect()
    }

    fn running(&self, share: Option<u32>) -> Vec<(TransferId, usize)> {
        let same = |attempt: &Attempt| share.is_some() && attempt.share == share && attempt.course == Course::Running;
        self.attempts().filter(|(_, attempt)| same(attempt)).map(|(id, attempt)| (id, attempt.nic)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HandoverId, Rank};

    fn flight() -> (Flight, TransferId, u32) {
        let mut flight = Flight::default();
        let share = flight.add(2, Arc::default(), UnitRange { start: 0, end: 4 });
        (flight, TransferId::of(HandoverId(1), Rank(0), Rank(0), 2), share)
    }

    #[test]
    fn a_share_counts_once_and_nothing_is_over_before_every_transfer_has_ended() {
        let (mut flight, first, share) = flight();
        let (silent, ..) = flight.post(share, 0, first, false).expect("posted");
        flight.give_up(silent, Some(Moment(5)));
        let (again, _, moved) = flight.post(share, 1, first, false).expect("posted again");
        assert_ne!(silent, again);
        assert_eq!((again.step(), moved.tries), (2, 2));
        let (_, others) = flight.done(again, 40, 4).expect("under way");
        assert!(others.is_empty() && !flight.is_over(), "the silent one may still write");
        let (late, _) = flight.done(silent, 40, 4).expect("under way");
        assert_eq!((late.nic, flight.bytes(), flight.is_over()), (0, 40, true));
        assert_eq!(flight.carried().collect::<Vec<_>>(), [(1, (40, 4))]);
    }

    #[test]
    fn who_comes_first_spares_the_others() {
        let (mut flight, first, share) = flight();
        let (silent, ..) = flight.post(share, 0, first, false).expect("posted");
        flight.give_up(silent, Some(Moment(5)));
        let (again, ..) = flight.post(share, 1, first, false).expect("posted again");
        let (_, others) = flight.done(silent, 40, 4).expect("under way");
        assert_eq!(others, [(again, 1)]);
        assert_eq!(flight.failed(again).map(|(_, open)| open), Some(None), "it is here already");
        assert!(flight.is_over());
    }

    #[test]
    fn no_two_transfers_have_one_name_when_one_rail_is_left() {
        let (mut flight, first, share) = flight();
        let other = flight.add(2, Arc::default(), UnitRange { start: 4, end: 8 });
        let (one, ..) = flight.post(share, 0, first, false).expect("posted");
        let (two, ..) = flight.post(other, 1, first, false).expect("posted");
        flight.failed(one);
        flight.failed(two);
        let (one_again, ..) = flight.post(share, 2, first, true).expect("posted again");
        let (two_again, ..) = flight.post(other, 2, first, true).expect("posted again");
        let names = std::collections::BTreeSet::from([first, one, two, one_again, two_again]);
        assert_eq!((names.len(), flight.attempts().count()), (5, 2));
        flight.failed(two_again);
        assert!(!flight.is_empty(), "the other one is still under way");
        // Whoever comes first takes chunk 0, once.
        let next = [0, 4].map(|start| flight.add(3, Arc::default(), UnitRange { start, end: start + 4 }));
        let third = TransferId::of(HandoverId(1), Rank(0), Rank(0), 3);
        let posted = next.map(|share| flight.post(share, 2, third, true).expect("posted").0);
        assert!(posted[0] == third && posted[1] != third);
    }

    #[test]
    fn only_the_last_failure_leaves_a_share_open() {
        let (mut flight, first, share) = flight();
        let (one, ..) = flight.post(share, 0, first, false).expect("posted");
        let (other, ..) = flight.post(share, 1, first, false).expect("posted");
        assert_eq!(flight.failed(one).map(|(_, open)| open), Some(None));
        assert_eq!(flight.failed(other).map(|(_, open)| open), Some(Some(share)));
        assert!(flight.is_empty() && !flight.is_over());
    }

    #[test]
    fn a_pushed_share_is_open_when_nobody_moves_it_and_it_is_not_here() {
        let (mut flight, first, share) = flight();
        let range = UnitRange { start: 0, end: 4 };
        assert_eq!((flight.open_share(2, range), flight.open_share(1, range)), (Some(share), None));
        assert_eq!(flight.open_share(2, UnitRange { start: 0, end: 3 }), None, "part of it is none");
        flight.expect_share(first, share, 1);
        flight.give_up(first, None);
        assert_eq!((flight.open_share(2, range), flight.due()), (None, None), "it may still be written");
        assert_eq!(flight.failed(first).and_then(|(_, open)| open), Some(share));
        assert_eq!(flight.open_share(2, range), Some(share));
        assert_eq!(flight.steps().collect::<Vec<_>>(), [2]);
        let kept = flight.share(share).cloned().expect("it is open");
        flight.arrived(share);
        assert!(flight.is_over());
        flight.reopen(share, kept);
        assert_eq!(flight.open_share(2, range), Some(share));
        flight.forget_shares();
        assert!(flight.is_over());
    }

    #[test]
    fn a_fence_ends_what_it_was_asked_for_at_its_nic() {
        let (mut flight, first, share) = flight();
        let ids: Vec<TransferId> =
            [0, 0, 1].into_iter().filter_map(|nic| Some(flight.post(share, nic, first, false)?.0)).collect();
        for id in [ids[0], ids[2]] {
            flight.give_up(id, Some(Moment(5)));
        }
        assert!(flight.fenced(0, 7).is_empty(), "nobody has asked for one");
        flight.fence(0, 7, Moment(8));
        flight.fence(0, 8, Moment(9));
        assert!(flight.fenced(0, 6).is_empty(), "that one was asked for before");
        assert_eq!(flight.fenced(1, 8).len() + flight.fenced(0, 7).len(), 1, "the other NIC was not asked");
        let left: Vec<TransferId> = flight.attempts().map(|(id, _)| id).collect();
        assert_eq!((left, flight.due()), (vec![ids[1], ids[2]], Some(Moment(5))));
        assert_eq!(flight.stop(), [(ids[1], 0), (ids[2], 1)]);
        flight.fence(0, 9, Moment(9));
        assert!(flight.fenced(0, 8).is_empty(), "it had not been told to stop");
        assert_eq!(flight.fenced(0, 9).len(), 1);
    }
}
