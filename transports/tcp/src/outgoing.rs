//! Shares of a device's memory on their way into a socket: the device fills slots ahead, the socket empties them in the same order.

use std::collections::VecDeque;

use kvferry_core::End;
use kvferry_transport::Slot;

use crate::frame::DATA_BYTES_MAX;
use crate::receiver::Signal;
use crate::share::Staged;
use crate::stream::Key;

/// Slots that one stream fills ahead of its socket: the device, and what it takes to start a copy, are hidden behind the wire.
const AHEAD: usize = 4;

/// One stream's staged shares.
#[derive(Default)]
pub(crate) struct Outgoing {
    /// What is left of them, the next one's turn first.
    shares: VecDeque<Leaving>,
    /// Slots that are being filled or are full, in the order in which they are sent.
    ahead: VecDeque<Chunk>,
}

#[derive(Clone)]
struct Leaving {
    key: Key,
    staged: Staged,
    left: u64,
}

/// A slot's bytes of one transfer.
pub(crate) struct Chunk {
    pub(crate) key: Key,
    pub(crate) slot: Slot,
    pub(crate) bytes: usize,
    /// The device's copies for the share, when this is its last chunk.
    pub(crate) last: Option<u64>,
    /// What was left of the share before it.
    before: Leaving,
}

impl Outgoing {
    /// Queues a share of `left` bytes, at least one.
    pub(crate) fn add(&mut self, key: Key, staged: Staged, left: u64) {
        self.shares.push_back(Leaving { key, staged, left });
    }

    /// Sends nothing more of a transfer. Copies that are under way keep their slots until they end.
    pub(crate) fn remove(&mut self, key: Key) {
        self.shares.retain(|leaving| leaving.key != key);
        self.ahead.retain(|chunk| chunk.key != key);
    }

    /// Whether there is something to send, now or later.
    pub(crate) fn is_idle(&self) -> bool {
        self.shares.is_empty() && self.ahead.is_empty()
    }

    /// Whether [`Outgoing::next`] or [`Outgoing::refill`] would get anywhere.
    pub(crate) fn has_work(&self) -> bool {
        self.ahead.front().is_some_and(|chunk| chunk.slot.is_done() != Ok(false))
            || (self.ahead.len() < AHEAD
                && self.shares.front().is_some_and(|leaving| leaving.staged.stage.left(End::Source) > 0))
    }

    /// Whether it has something to send and no slot for it.
    pub(crate) fn is_starved(&self) -> bool {
        self.ahead.is_empty() && self.shares.front().is_some_and(|leaving| leaving.staged.stage.left(End::Source) == 0)
    }

    /// Gives up the slots that are filled ahead: the device will fill others with the same bytes.
    pub(crate) fn shed(&mut self) {
        while let Some(chunk) = self.ahead.pop_back() {
            match self.shares.iter_mut().find(|leaving| leaving.key == chunk.key) {
                Some(leaving) => *leaving = chunk.before,
                None => self.shares.push_front(chunk.before),
            }
        }
    }

    /// Has the device fill slots while there are some, the shares in turn.
    pub(crate) fn refill(&mut self, signals: &mut Vec<Signal>) {
        while self.ahead.len() < AHEAD
            && let Some(leaving) = self.shares.front_mut()
            && let Some(slot) = leaving.staged.stage.take(End::Source)
        {
            let (key, before) = (leaving.key, leaving.clone());
            let most = slot.bytes().min(DATA_BYTES_MAX as usize);
            let bytes = usize::try_from(leaving.left).map_or(most, |left| left.min(most));
            let staged = &mut leaving.staged;
            let bytes = match slot.start(&staged.program, &mut staged.strips, 0, bytes) {
                Ok(0) => Err("the program ends before the bytes that it announced".to_owned()),
                started => started,
            };
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(reason) => {
                    self.fail(key, reason, signals);
                    continue;
                }
            };
            staged.chunks += 1;
            leaving.left = leaving.left.saturating_sub(bytes as u64);
            let last = (leaving.left == 0).then_some(staged.chunks);
            self.ahead.push_back(Chunk { key, slot, bytes, last, before });
            if last.is_some() {
                self.shares.pop_front();
            } else {
                self.shares.rotate_left(1);
            }
        }
    }

    /// The next chunk, if it is full.
    pub(crate) fn next(&mut self, signals: &mut Vec<Signal>) -> Option<Chunk> {
        loop {
            let chunk = self.ahead.front()?;
            match chunk.slot.is_done() {
                Ok(true) => return self.ahead.pop_front(),
                Ok(false) => return None,
                Err(reason) => self.fail(chunk.key, reason, signals),
            }
        }
    }

    fn fail(&mut self, key: Key, reason: String, signals: &mut Vec<Signal>) {
        self.remove(key);
        signals.push(Signal::Broken { key, is_outgoing: true, reason });
    }
}
