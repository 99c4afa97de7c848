//! This agent's tickets, and those of peers that it has confirmed.

use std::collections::BTreeSet;
use std::rc::Rc;

use kvferry_core::{Plane, PoolId, PoolLayout};
use kvferry_transport::{Pool, PoolOptions, codec};
use kvferry_ucx::raw::{RawMemory, RawWorker};

use crate::Ticket;
use crate::ours::SLOTS;

/// Eight bytes for each of the tickets, or of the answers.
const SLOT_BYTES: u64 = 8;
/// Of no ticket: slots begin with it.
const NOTHING: u64 = 0;

/// The slots that peers read, and those into which peers' slots are read.
pub(crate) struct Board {
    told: Rc<RawMemory>,
    answers: Rc<RawMemory>,
    /// Slots without a ticket, and places without an answer.
    free: Vec<u32>,
    places: BTreeSet<u32>,
    /// The number of the next ticket; it begins anywhere, so that no other incarnation has the same.
    next: u64,
}

/// Places for answers, next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    first: u32,
    count: u32,
}

impl Places {
    /// Where in the region of answers the answer of this index comes.
    pub(crate) fn offset(self, index: usize) -> u64 {
        (u64::from(self.first) + index as u64) * SLOT_BYTES
    }
}

impl Board {
    pub(crate) fn new(worker: &RawWorker) -> Result<Board, String> {
        let slots = || {
            let bytes = u64::from(SLOTS) * SLOT_BYTES;
            let plane =
                Plane { region: 0, offset: 0, blocks: SLOTS, block_stride: SLOT_BYTES, block_bytes: SLOT_BYTES };
            let layout = PoolLayout { regions: vec![bytes], planes: vec![plane] };
            // Registered by itself, never in the agent's list of pools.
            let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
            let pool = Pool::allocate_private(PoolId(u32::MAX), layout, &options);
            worker.register(&pool.map_err(|error| format!("no memory for tickets: {error}"))?)
        };
        let start = codec::random().map_err(|error| format!("no random bytes for tickets: {error}"))?;
        Ok(Board {
            told: slots()?,
            answers: slots()?,
            free: (0..SLOTS).rev().collect(),
            places: (0..SLOTS).collect(),
            // It would take centuries to come round to nothing.
            next: u64::from_le_bytes(start) | 1,
        })
    }

    /// Where peers read tickets, and by which key.
    pub(crate) fn told(&self) -> (u64, &[u8]) {
        let base = self.told.pool().regions().first().map_or(0, |region| region.base() as u64);
        (base, self.told.keys().first().map_or(&[], |key| key))
    }

    /// A new ticket; none when every slot has one.
    pub(crate) fn issue(&mut self) -> Option<Ticket> {
        let slot = self.free.pop()?;
        let ticket = Ticket { slot, value: self.number() };
        self.write(slot, ticket.value);
        Some(ticket)
    }

    /// Ends a ticket: whoever reads its slot from now on finds another number.
    pub(crate) fn end(&mut self, ticket: Ticket) {
        self.write(ticket.slot, NOTHING);
        // What the owner does next, with the memory, is seen later than this.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.free.push(ticket.slot);
    }

    /// Places for answers, if there are so many next to each other.
    pub(crate) fn places(&mut self, count: usize) -> Option<Places> {
        let count = u32::try_from(count).ok().filter(|count| *count <= SLOTS)?;
        let mut run = 0;
        let mut last = None;
        for place in &self.places {
            run = if last.is_some_and(|last: u32| last + 1 == *place) { run + 1 } else { 1 };
            last = Some(*place);
            if run >= count {
                let first = place + 1 - count;
                let places = Places { first, count };
                (first..first + count).for_each(|place| {
                    self.places.remove(&place);
                });
                return Some(places);
            }
        }
        (count == 0).then_some(Places { first: 0, count })
    }

    /// Where answers are read into.
    pub(crate) fn answers(&self) -> &Rc<RawMemory> {
        &self.answers
    }

    /// The first of the tickets that the answers do not confirm; the places are free again.
    pub(crate) fn judge(&mut self, places: Places, tickets: &[Ticket]) -> Option<Ticket> {
        let wrong = tickets.iter().enumerate().find(|(index, ticket)| {
            let mut answer = [0; SLOT_BYTES as usize];
            let block = places.first.saturating_add(*index as u32);
            // A block that is not there confirms nothing.
            self.answers.pool().read(0, block, 0, &mut answer).is_err() || u64::from_le_bytes(answer) != ticket.value
        });
        let wrong = wrong.map(|(_, ticket)| *ticket);
        self.release(places);
        wrong
    }

    /// Nothing comes into these places any more.
    pub(crate) fn release(&mut self, places: Places) {
        self.places.extend(places.first..places.first.saturating_add(places.count));
    }

    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next = self.next.wrapping_add(2);
        number
    }

    fn write(&self, slot: u32, value: u64) {
        // Slots are those of the pool.
        if let Err(error) = self.told.pool().write(0, slot, 0, &value.to_le_bytes()) {
            tracing::error!(slot, %error, "a ticket is not on the board");
        }
    }
}
