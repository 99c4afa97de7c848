//! Buffers that one side fills and its peer reads, each known by its number: whose they are at the moment, a bit each. Pure.
//!
//! A buffer that a peer was told of is the peer's, however long that takes: only a buffer that was given back is written again.

/// Buffers of a source, at most 64.
#[derive(Clone, Debug)]
pub struct Lending {
    count: u32,
    lent: u64,
}

impl Lending {
    /// All of them free.
    pub fn new(count: u32) -> Lending {
        Lending { count: count.min(u64::BITS), lent: 0 }
    }

    /// A free one.
    pub fn idle(&self) -> Option<u32> {
        (0..self.count).find(|buffer| self.lent & bit(*buffer) == 0)
    }

    /// Whether there is such a buffer, and it is free.
    pub fn is_idle(&self, buffer: u32) -> bool {
        buffer < self.count && self.lent & bit(buffer) == 0
    }

    /// How many are free.
    pub fn idle_count(&self) -> usize {
        self.count.saturating_sub(self.lent.count_ones()) as usize
    }

    /// The peer is told of one.
    pub fn lend(&mut self, buffer: u32) {
        self.lent |= bit(buffer);
    }

    /// The peer gives some back, a bit each. An error where it gives what it does not have.
    pub fn take_back(&mut self, buffers: u64) -> Result<(), String> {
        if buffers & !self.lent != 0 {
            return Err("it gives buffers back that it was not told of".to_owned());
        }
        self.lent &= !buffers;
        Ok(())
    }

    /// Whether every one is free.
    pub fn is_whole(&self) -> bool {
        self.lent == 0
    }
}

/// A peer's buffers, as their reader sees them.
#[derive(Clone, Debug)]
pub struct Borrowing {
    count: u32,
    bytes_max: usize,
    open: u64,
    over: u64,
}

impl Borrowing {
    /// Of so many buffers, at most 64, of so many bytes.
    pub fn new(count: u32, bytes_max: usize) -> Borrowing {
        Borrowing { count: count.min(u64::BITS), bytes_max, open: 0, over: 0 }
    }

    /// The peer names a chunk. An error where it has no such buffer, or named it before and has not had it back.
    pub fn open(&mut self, buffer: u32, bytes: u32) -> Result<(), String> {
        if buffer >= self.count || bytes == 0 || bytes as usize > self.bytes_max {
            return Err(format!("a packed chunk of {bytes} bytes in buffer {buffer}, which its staging has not"));
        }
        if self.open & bit(buffer) != 0 {
            return Err(format!("a packed chunk in buffer {buffer}, which was not given back"));
        }
        self.open |= bit(buffer);
        Ok(())
    }

    /// A chunk is not needed any more: its buffer goes back next.
    pub fn close(&mut self, buffer: u32) {
        self.over |= bit(buffer) & self.open;
    }

    /// Whether none is here.
    pub fn is_whole(&self) -> bool {
        self.open == 0
    }

    /// What goes back now, a bit each.
    pub fn give_back(&mut self) -> u64 {
        let over = std::mem::take(&mut self.over);
        self.open &= !over;
        over
    }
}

/// A buffer's bit.
fn bit(buffer: u32) -> u64 {
    1u64.checked_shl(buffer).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_lent_until_it_comes_back() {
        let mut ours = Lending::new(3);
        for buffer in 0..3 {
            assert_eq!(ours.idle(), Some(buffer));
            ours.lend(buffer);
        }
        assert!(ours.idle().is_none() && !ours.is_idle(1) && !ours.is_idle(3) && !ours.is_whole());
        assert!(ours.take_back(0b1000).is_err(), "there is no such buffer");
        ours.take_back(0b010).unwrap();
        assert!(ours.take_back(0b010).is_err(), "it has none of that any more");
        assert_eq!((ours.idle(), ours.is_idle(1), ours.idle_count()), (Some(1), true, 1));
        ours.take_back(0b101).unwrap();
        assert!(ours.is_whole());
        assert!(!Lending::new(u32::MAX).is_idle(64), "a bit each is all there is");
    }

    #[test]
    fn what_a_peer_names_is_checked_and_goes_back_once() {
        let mut theirs = Borrowing::new(2, 100);
        for (buffer, bytes) in [(2, 1), (u32::MAX, 1), (0, 0), (0, 101)] {
            assert!(theirs.open(buffer, bytes).is_err(), "{bytes} bytes in {buffer}");
        }
        theirs.open(0, 100).unwrap();
        assert!(theirs.open(0, 1).unwrap_err().contains("given back"));
        theirs.close(1);
        assert_eq!(theirs.give_back(), 0, "nothing of it was open");
        theirs.close(0);
        assert!(theirs.open(0, 1).is_err(), "its peer was not told yet");
        assert!(!theirs.is_whole());
        assert_eq!((theirs.give_back(), theirs.give_back(), theirs.is_whole()), (1, 0, true));
        theirs.open(0, 1).unwrap();
    }
}
