//! Page-locked host memory between a pool in a device's memory and a transport that reaches host memory only.
//!
//! A pool's stage has a fixed number of slots. A slot belongs to whoever took it, and to every copy that reads or writes it: it is free again
//! only when its holder has let go of it **and** no copy of the device runs in it. So whatever is cancelled, no slot is reused under a
//! running copy, and [`Stage::is_past`] says when a pool is no longer touched.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use kvferry_core::{End, Program, Strip, Strips};

use crate::device::Copier;
use crate::{Options, Pool};

/// Slots begin and end at pages.
const PAGE_BYTES: usize = 4096;
/// Strips of one copy: what its description takes is bounded by that.
const STRIPS_MAX: usize = 2048;
/// So long after a copy's start its end is looked for all the time; later, now and then.
const SPIN: Duration = Duration::from_millis(2);

/// The stage of one bound pool. Clones are the same one. It belongs to the thread of its transport.
#[derive(Clone)]
pub struct Stage {
    inner: Rc<RefCell<Inner>>,
}

struct Inner {
    copier: Box<dyn Copier>,
    /// The copier touches it.
    _pool: Pool,
    slot_bytes: usize,
    slots: Vec<SlotState>,
    free: Vec<u32>,
    /// Slots that somebody has for copies out of the pool, and into it.
    taken: [usize; 2],
    copies: Vec<Copying>,
    /// Of the last copy that was started.
    serial: u64,
    started: Option<Instant>,
    /// Since when there has been a copy under way at any time.
    busy_since: Option<Instant>,
    busy: Duration,
    bytes: u64,
    strips: Vec<Strip>,
}

#[derive(Default)]
struct SlotState {
    is_held: bool,
    end: Option<End>,
    copies: usize,
    failed: Option<String>,
}

struct Copying {
    serial: u64,
    number: u64,
    slot: u32,
}

/// A slot that somebody has.
pub struct Slot {
    stage: Stage,
    index: u32,
    base: *mut u8,
    bytes: usize,
}

impl Stage {
    /// Makes a stage for a pool in a device's memory. An error says why there cannot be one.
    pub fn open(pool: &Pool, options: &Options) -> Result<Stage, String> {
        let memory = pool.device().ok_or("the pool is in host memory, which needs no stage")?;
        let slot_bytes = options.staged_chunk_bytes.clamp(1, 64 << 20).next_multiple_of(PAGE_BYTES);
        let count = options.staged_chunks.clamp(2, 4096) as usize;
        let copier = memory.copier(pool, slot_bytes * count)?;
        if copier.arena().1 < slot_bytes * count {
            return Err(format!("{} gave too little host memory", memory.device()));
        }
        let inner = Inner {
            copier,
            _pool: pool.clone(),
            slot_bytes,
            slots: (0..count).map(|_| SlotState::default()).collect(),
            free: (0..count as u32).rev().collect(),
            taken: [0; 2],
            copies: Vec::new(),
            serial: 0,
            started: None,
            busy_since: None,
            busy: Duration::ZERO,
            bytes: 0,
            strips: Vec::new(),
        };
        Ok(Stage { inner: Rc::new(RefCell::new(inner)) })
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.inner.borrow().slot_bytes
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.inner.borrow().slots.len()
    }

    /// Takes a slot for copies out of the pool ([`End::Source`]) or into it, if one is left: each has half of them, so that neither waits for the
    /// other.
    pub fn take(&self, end: End) -> Option<Slot> {
        let mut inner = self.inner.borrow_mut();
        if inner.left(end) == 0 {
            return None;
        }
        let index = inner.free.pop()?;
        *inner.taken(end) += 1;
        if let Some(state) = inner.slots.get_mut(index as usize) {
            *state = SlotState { is_held: true, end: Some(end), ..SlotState::default() };
        }
        let bytes = inner.slot_bytes;
        // In bounds: `open` checked that the arena has room for all slots.
        let base = inner.copier.arena().0.wrapping_add(index as usize * bytes);
        drop(inner);
        Some(Slot { stage: self.clone(), index, base, bytes })
    }

    /// How many slots [`Stage::take`] would give.
    pub fn left(&self, end: End) -> usize {
        self.inner.borrow().left(end)
    }

    /// Looks which copies have ended; says whether any has.
    pub fn poll(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let before = inner.copies.len();
        let mut at = 0;
        while let Some(copy) = inner.copies.get(at) {
            match inner.copier.is_done(copy.number) {
                Ok(false) => {
                    at += 1;
                    continue;
                }
                Ok(true) => {}
                Err(reason) => {
                    if let Some(state) = inner.slots.get_mut(copy.slot as usize) {
                        state.failed.get_or_insert(reason);
                    }
                }
            }
            let slot = copy.slot;
            inner.copies.remove(at);
            inner.release(slot, |state| state.copies = state.copies.saturating_sub(1));
        }
        if inner.copies.is_empty()
            && let Some(since) = inner.busy_since.take()
        {
            inner.busy += since.elapsed();
        }
        inner.copies.len() < before
    }

    /// Whether a copy is under way, and whether it was started so lately that its end is worth looking for all the time.
    pub fn is_busy(&self) -> (bool, bool) {
        let inner = self.inner.borrow();
        (!inner.copies.is_empty(), inner.started.is_some_and(|at| at.elapsed() < SPIN))
    }

    /// What [`Stage::is_past`] is asked with, to learn when every copy that was started before now has ended.
    pub fn mark(&self) -> u64 {
        self.inner.borrow().serial
    }

    /// Whether every copy that was started before the mark has ended, so that nothing of it touches the pool.
    pub fn is_past(&self, mark: u64) -> bool {
        self.inner.borrow().copies.iter().all(|copy| copy.serial > mark)
    }

    /// How fast the device copied so far, in bytes per second while any copy was under way; none before the first copy's end.
    pub fn speed(&self) -> Option<f64> {
        let inner = self.inner.borrow();
        let seconds = inner.busy.as_secs_f64();
        (seconds > 0.0).then(|| inner.bytes as f64 / seconds)
    }
}

impl Inner {
    fn taken(&mut self, end: End) -> &mut usize {
        let [out, back] = &mut self.taken;
        match end {
            End::Source => out,
            End::Destination => back,
        }
    }

    fn left(&self, end: End) -> usize {
        let [out, back] = self.taken;
        let half = self.slots.len() / 2;
        match end {
            End::Source => half.saturating_sub(out),
            End::Destination => (self.slots.len() - half).saturating_sub(back),
        }
    }

    /// Notes an end, of a copy or of a hold; the slot is free when it was the last one.
    fn release(&mut self, index: u32, end: impl FnOnce(&mut SlotState)) {
        let Some(state) = self.slots.get_mut(index as usize) else { return };
        end(state);
        if state.copies > 0 || state.is_held {
            return;
        }
        if let Some(end) = state.end.take() {
            *self.taken(end) -= 1;
            self.free.push(index);
        }
    }
}

impl Slot {
    /// Its first byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Starts copying the next at most `bytes` bytes of a stream between the pool and this slot, where they lie from byte `at` on, as the slot was
    /// taken for. Returns how many that are: fewer where they are scattered widely, none at the end of the stream.
    pub fn start(&self, program: &Program, strips: &mut Strips, at: usize, bytes: usize) -> Result<usize, String> {
        let mut inner = self.stage.inner.borrow_mut();
        let inner = &mut *inner;
        let state = inner.slots.get_mut(self.index as usize).ok_or("no such slot")?;
        let end = state.end.ok_or("a slot that nobody took")?;
        let room = self.bytes.saturating_sub(at).min(bytes);
        inner.strips.clear();
        let taken = strips.take(program, room as u64, STRIPS_MAX, &mut inner.strips) as usize;
        if taken == 0 {
            return Ok(0);
        }
        let place = self.index as usize * inner.slot_bytes + at;
        let number = inner.copier.start(program, end, &inner.strips, place)?;
        state.copies += 1;
        inner.serial += 1;
        inner.bytes += taken as u64;
        inner.copies.push(Copying { serial: inner.serial, number, slot: self.index });
        let now = Instant::now();
        inner.started = Some(now);
        inner.busy_since.get_or_insert(now);
        Ok(taken)
    }

    /// Whether every copy that was started in it has ended. An error says why one failed; none runs any more then either.
    pub fn is_done(&self) -> Result<bool, String> {
        let inner = self.stage.inner.borrow();
        let Some(state) = inner.slots.get(self.index as usize) else { return Ok(true) };
        match &state.failed {
            _ if state.copies > 0 => Ok(false),
            Some(reason) => Err(reason.clone()),
            None => Ok(true),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.stage.inner.borrow_mut().release(self.index, |state| state.is_held = false);
    }
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage").field("slots", &self.slots()).field("slot_bytes", &self.slot_bytes()).finish()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("index", &self.index).finish_non_exhaustive()
    }
}
