//! Shares of a device's memory on their way out: the device fills slots ahead, whoever sends them empties them in the same order.

use std::collections::VecDeque;
use std::sync::Arc;

use kvferry_core::{End, Program, Strips, UnitRange};

use crate::{Slot, Stage};

/// Slots that are filled ahead of one way out: the device, and what it takes to start a copy, are hidden behind the wire.
pub const STAGED_AHEAD: usize = 4;

/// One side's share of a transfer, which the device copies chunk by chunk.
#[derive(Clone, Debug)]
pub struct Staged {
    pub(crate) stage: Stage,
    pub(crate) program: Arc<Program>,
    pub(crate) strips: Strips,
    pub(crate) chunks: u64,
}

impl Staged {
    /// A part of a program that was validated against the pool's layout.
    pub fn new(stage: &Stage, program: &Arc<Program>, part: UnitRange) -> Staged {
        Staged { stage: stage.clone(), program: program.clone(), strips: program.strips(part), chunks: 0 }
    }
}

/// The staged shares of one way out, such as a socket; `K` tells transfers apart.
pub struct StagedOut<K> {
    /// What is left of them, the next one's turn first.
    shares: VecDeque<Leaving<K>>,
    /// Slots that are being filled or are full, in the order in which they are sent.
    ahead: VecDeque<StagedChunk<K>>,
}

#[derive(Clone)]
struct Leaving<K> {
    key: K,
    staged: Staged,
    left: u64,
}

/// A slot's bytes of one transfer.
pub struct StagedChunk<K> {
    /// Which transfer.
    pub key: K,
    slot: Slot,
    /// How many.
    pub bytes: usize,
    /// How many chunks of its share came before it.
    pub number: u64,
    /// The device's copies for the share, when this is its last chunk.
    pub last: Option<u64>,
    /// What was left of the share before it.
    before: Leaving<K>,
}

impl<K> Default for StagedOut<K> {
    fn default() -> Self {
        StagedOut { shares: VecDeque::new(), ahead: VecDeque::new() }
    }
}

impl<K: Clone + PartialEq> StagedOut<K> {
    /// Queues a share of `left` bytes, at least one.
    pub fn add(&mut self, key: K, staged: Staged, left: u64) {
        self.shares.push_back(Leaving { key, staged, left });
    }

    /// Sends nothing more of the transfers that `which` names. Copies that are under way keep their slots until they end.
    pub fn remove(&mut self, which: impl Fn(&K) -> bool) {
        self.shares.retain(|leaving| !which(&leaving.key));
        self.ahead.retain(|chunk| !which(&chunk.key));
    }

    /// Whether there is nothing to send, now or later.
    pub fn is_idle(&self) -> bool {
        self.shares.is_empty() && self.ahead.is_empty()
    }

    /// Whether anything of a transfer is still to be sent.
    pub fn holds(&self, which: impl Fn(&K) -> bool) -> bool {
        self.shares.iter().any(|leaving| which(&leaving.key)) || self.ahead.iter().any(|chunk| which(&chunk.key))
    }

    /// How long the chunks are that are filled ahead.
    pub fn ahead(&self) -> impl Iterator<Item = usize> {
        self.ahead.iter().map(|chunk| chunk.bytes)
    }

    /// Whether [`StagedOut::next`] would say something.
    pub fn has_next(&self) -> bool {
        self.ahead.front().is_some_and(|chunk| chunk.slot.is_done() != Ok(false))
    }

    /// Whether [`StagedOut::refill`] would start a copy.
    pub fn can_refill(&self) -> bool {
        self.ahead.len() < STAGED_AHEAD
            && self.shares.front().is_some_and(|leaving| leaving.staged.stage.left(End::Source) > 0)
    }

    /// Whether it has something to send and no slot for it.
    pub fn is_starved(&self) -> bool {
        self.ahead.is_empty() && self.shares.front().is_some_and(|leaving| leaving.staged.stage.left(End::Source) == 0)
    }

    /// Takes the chunk back that [`StagedOut::next`] gave last.
    pub fn put_back(&mut self, chunk: StagedChunk<K>) {
        self.ahead.push_front(chunk);
    }

    /// Gives up the slots that are filled ahead: the device will fill others with the same bytes.
    pub fn shed(&mut self) {
        while let Some(chunk) = self.ahead.pop_back() {
            match self.shares.iter_mut().find(|leaving| leaving.key == chunk.key) {
                Some(leaving) => *leaving = chunk.before,
                None => self.shares.push_front(chunk.before),
            }
        }
    }

    /// Has the device fill the next slot of the next share, with as many bytes as `most` makes of what the share lacks. Says whether it did. A share whose copy cannot be started is told of in `failed`, and goes no further.
    pub fn refill(&mut self, most: impl FnOnce(u64) -> usize, failed: &mut Vec<(K, String)>) -> bool {
        if self.ahead.len() >= STAGED_AHEAD {
            return false;
        }
        let Some(leaving) = self.shares.front_mut() else { return false };
        let Some(slot) = leaving.staged.stage.take(End::Source) else { return false };
        let (key, before) = (leaving.key.clone(), leaving.clone());
        let most = slot.bytes().min(most(leaving.left));
        let bytes = usize::try_from(leaving.left).map_or(most, |left| left.min(most));
        let staged = &mut leaving.staged;
        let bytes = match slot.start(&staged.program, &mut staged.strips, 0, bytes) {
            Ok(0) => Err("the program ends before the bytes that it announced".to_owned()),
            started => started,
        };
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(reason) => {
                self.fail(key, reason, failed);
                return true;
            }
        };
        let number = staged.chunks;
        staged.chunks += 1;
        leaving.left = leaving.left.saturating_sub(bytes as u64);
        let last = (leaving.left == 0).then_some(staged.chunks);
        self.ahead.push_back(StagedChunk { key, slot, bytes, number, last, before });
        if last.is_some() {
            self.shares.pop_front();
        } else {
            self.shares.rotate_left(1);
        }
        true
    }

    /// The next chunk, if it is full. Failures are told of as by [`StagedOut::refill`].
    pub fn next(&mut self, failed: &mut Vec<(K, String)>) -> Option<StagedChunk<K>> {
        loop {
            let chunk = self.ahead.front()?;
            match chunk.slot.is_done() {
                Ok(true) => return self.ahead.pop_front(),
                Ok(false) => return None,
                Err(reason) => {
                    let key = chunk.key.clone();
                    self.fail(key, reason, failed);
                }
            }
        }
    }

    fn fail(&mut self, key: K, reason: String, failed: &mut Vec<(K, String)>) {
        self.remove(|of| *of == key);
        failed.push((key, reason));
    }
}

impl<K> StagedChunk<K> {
    /// Where they lie, from its first byte on.
    pub fn into_slot(self) -> Slot {
        self.slot
    }

    /// Its bytes.
    pub fn contents(&self) -> &[u8] {
        // SAFETY: the slot has so many bytes, which are this chunk's alone since its copy ended (`StagedOut::next`): nothing of the device runs in it,
        // and nobody can start anything while it is not given away.
        unsafe { std::slice::from_raw_parts(self.slot.base().cast_const(), self.bytes.min(self.slot.bytes())) }
    }
}
