//! A share of a device's memory on its way in: slots are filled by whoever receives and emptied by the device.

use std::collections::VecDeque;

use kvferry_core::End;

use crate::{Piece, Slot, Staged};

/// One staged share.
pub struct StagedIn {
    staged: Staged,
    /// The slot that is being filled, and its bytes so far.
    filling: Option<(Slot, usize)>,
    /// What the device empties.
    emptying: VecDeque<Slot>,
}

impl StagedIn {
    /// A share whose next byte is its first.
    pub fn new(staged: Staged) -> StagedIn {
        StagedIn { staged, filling: None, emptying: VecDeque::new() }
    }

    /// Copies of the device so far.
    pub fn chunks(&self) -> u64 {
        self.staged.chunks
    }

    /// Whether the next bytes have nowhere to go until a slot is free.
    pub fn is_stalled(&self) -> bool {
        self.filling.is_none() && self.staged.stage.left(End::Destination) == 0
    }

    /// Where the next at most `bytes` bytes go; none while there is no slot. Valid until anything else is called.
    pub fn room(&mut self, bytes: usize) -> Option<Piece> {
        let (slot, filled) = match &mut self.filling {
            Some(filling) => filling,
            None => self.filling.insert((self.staged.stage.take(End::Destination)?, 0)),
        };
        let length = slot.bytes().saturating_sub(*filled).min(bytes);
        Some(Piece { at: slot.base().wrapping_add(*filled), bytes: length })
    }

    /// Accounts for bytes that went there. `is_end`: no more will follow at once. Says whether the device empties anything.
    pub fn received(&mut self, bytes: usize, is_end: bool) -> Result<bool, String> {
        if let Some((slot, filled)) = &mut self.filling {
            *filled += bytes;
            if is_end || *filled >= slot.bytes() {
                self.flush()?;
            }
        }
        Ok(!self.emptying.is_empty())
    }

    /// Copies as many bytes as there are slots for; says how many.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<usize, String> {
        let before = bytes.len();
        while !bytes.is_empty()
            && let Some(room) = self.room(bytes.len())
        {
            let (now, rest) = bytes.split_at(room.bytes.min(bytes.len()));
            // SAFETY: the room has so many writable bytes of a slot that this share holds and that no copy runs in; nobody else knows of it.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), room.at, now.len()) };
            self.received(now.len(), false)?;
            bytes = rest;
        }
        Ok(before - bytes.len())
    }

    /// Gives an empty slot back, and has the device empty one that is only partly full if others may need it. Says whether it empties anything.
    pub fn rest(&mut self) -> Result<bool, String> {
        let stage = &self.staged.stage;
        let is_short = stage.left(End::Destination) < (stage.slots() / 4).max(1);
        if self.filling.as_ref().is_some_and(|(_, filled)| *filled == 0 || is_short) {
            self.flush()?;
        }
        Ok(!self.emptying.is_empty())
    }

    /// Has the device empty what is there.
    pub fn flush(&mut self) -> Result<(), String> {
        let Some((slot, filled)) = self.filling.take() else { return Ok(()) };
        let (mut at, staged) = (0, &mut self.staged);
        let mut flushed = Ok(());
        while at < filled && flushed.is_ok() {
            flushed = match slot.start(&staged.program, &mut staged.strips, at, filled - at) {
                Ok(0) => Err("a program ended before the bytes that came for it".to_owned()),
                Ok(bytes) => {
                    at += bytes;
                    staged.chunks += 1;
                    Ok(())
                }
                Err(reason) => Err(reason),
            };
        }
        if at > 0 {
            self.emptying.push_back(slot);
        }
        flushed
    }

    /// Lets go of slots that are empty; says whether the device has none left to empty.
    pub fn settle(&mut self) -> Result<bool, String> {
        while let Some(slot) = self.emptying.front() {
            if !slot.is_done()? {
                return Ok(false);
            }
            self.emptying.pop_front();
        }
        Ok(true)
    }

    /// Whether [`StagedIn::settle`] would let go of something.
    pub fn has_settled(&self) -> bool {
        self.emptying.front().is_some_and(|slot| slot.is_done() != Ok(false))
    }
}
