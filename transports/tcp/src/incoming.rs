//! A share of a device's memory on its way out of a socket: slots are filled by the socket and emptied by the device.

use std::collections::VecDeque;

use kvferry_core::End;
use kvferry_transport::Slot;

use crate::share::Staged;

/// One staged share.
pub(crate) struct Incoming {
    staged: Staged,
    /// The slot that the socket fills, and its bytes so far.
    filling: Option<(Slot, usize)>,
    /// What the device empties.
    emptying: VecDeque<Slot>,
}

impl Incoming {
    pub(crate) fn new(staged: Staged) -> Incoming {
        Incoming { staged, filling: None, emptying: VecDeque::new() }
    }

    /// Copies of the device so far.
    pub(crate) fn chunks(&self) -> u64 {
        self.staged.chunks
    }

    /// Whether the next bytes have nowhere to go until a slot is free.
    pub(crate) fn is_stalled(&self) -> bool {
        self.filling.is_none() && self.staged.stage.left(End::Destination) == 0
    }

    /// Where the next at most `bytes` bytes go; none while there is no slot. Valid until anything else is called.
    pub(crate) fn room(&mut self, bytes: usize) -> Option<libc::iovec> {
        let (slot, filled) = match &mut self.filling {
            Some(filling) => filling,
            None => self.filling.insert((self.staged.stage.take(End::Destination)?, 0)),
        };
        let length = slot.bytes().saturating_sub(*filled).min(bytes);
        Some(libc::iovec { iov_base: slot.base().wrapping_add(*filled).cast(), iov_len: length })
    }

    /// Accounts for bytes that went there. `is_end`: no more will follow at once. Says whether the device empties anything.
    pub(crate) fn received(&mut self, bytes: usize, is_end: bool) -> Result<bool, String> {
        if let Some((slot, filled)) = &mut self.filling {
            *filled += bytes;
            if is_end || *filled >= slot.bytes() {
                self.flush()?;
            }
        }
        Ok(!self.emptying.is_empty())
    }

    /// Gives an empty slot back, and has the device empty one that is only partly full if others may need it. Says whether it empties anything.
    pub(crate) fn rest(&mut self) -> Result<bool, String> {
        let stage = &self.staged.stage;
        let is_short = stage.left(End::Destination) < (stage.slots() / 4).max(1);
        if self.filling.as_ref().is_some_and(|(_, filled)| *filled == 0 || is_short) {
            self.flush()?;
        }
        Ok(!self.emptying.is_empty())
    }

    /// Has the device empty what is there.
    fn flush(&mut self) -> Result<(), String> {
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
    pub(crate) fn settle(&mut self) -> Result<bool, String> {
        while let Some(slot) = self.emptying.front() {
            if !slot.is_done()? {
                return Ok(false);
            }
            self.emptying.pop_front();
        }
        Ok(true)
    }

    /// Whether [`Incoming::settle`] would let go of something.
    pub(crate) fn has_settled(&self) -> bool {
        self.emptying.front().is_some_and(|slot| slot.is_done() != Ok(false))
    }
}
