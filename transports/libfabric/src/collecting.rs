//! The reader's side of packed chunks: each that the peer names is read by one large read into a buffer of this link's own, and unpacked from
//! there by the copy that asked for it. A fence waits for none of that, since no read writes a pool.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use kvferry_transport::Borrowing;

use crate::domain::Domain;
use crate::reader::{Reader, Source, Ticket};
use crate::staging::{BUFFERS, CHUNK_BYTES, STAGING_BYTES, Staging};
use crate::words::{Pack, Parcel, Word};

/// What one peer packs for this side.
pub(crate) struct Collecting {
    reader: Rc<Reader>,
    landing: Rc<Staging>,
    state: RefCell<State>,
}

struct State {
    supply: Supply,
    borrowed: Borrowing,
    /// Chunks that were named and not unpacked yet, in order.
    parcels: VecDeque<Waiting>,
    /// Copies that wait for chunks, and why the peer refused them.
    copies: BTreeMap<u64, Option<String>>,
    next_serial: u64,
    said: Vec<Word>,
}

/// The peer's staging.
#[derive(Clone, Copy)]
enum Supply {
    Asked,
    Never,
    /// Where it begins, and its key.
    There(u64, u64),
}

struct Waiting {
    parcel: Parcel,
    ticket: Rc<Ticket>,
    is_asked: bool,
}

/// Whether a peer packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// It has not said yet.
    Unknown,
    Yes,
    No,
}

/// A chunk that is here.
pub(crate) struct Chunk {
    buffer: u32,
    /// Its first byte; nobody writes it before [`Collecting::unpacked`].
    pub(crate) at: *const u8,
    pub(crate) bytes: usize,
}

impl Collecting {
    /// Asks a peer that is read through `reader` to pack short pieces. `None` where the limit of staging is reached.
    pub(crate) fn ask(domain: &Rc<Domain>, reader: &Rc<Reader>, bytes_max: u64) -> Result<Option<Collecting>, String> {
        let Some(landing) = Staging::landing(domain, bytes_max)? else { return Ok(None) };
        let state = State {
            supply: Supply::Asked,
            borrowed: Borrowing::new(BUFFERS, CHUNK_BYTES),
            parcels: VecDeque::new(),
            copies: BTreeMap::new(),
            next_serial: 0,
            said: vec![Word::Ask],
        };
        Ok(Some(Collecting { reader: reader.clone(), landing: Rc::new(landing), state: RefCell::new(state) }))
    }

    /// Takes what the peer says; an error where it breaks the rules.
    pub(crate) fn hear(&self, word: Word) -> Result<(), String> {
        let mut state = self.state.borrow_mut();
        match word {
            Word::Staged(told) => {
                if !matches!(state.supply, Supply::Asked) {
                    return Err("it tells of staging that nobody asked for".to_owned());
                }
                state.supply = match told {
                    None => Supply::Never,
                    Some((base, _)) if base.checked_add(STAGING_BYTES).is_none() => {
                        return Err("its staging reaches beyond the address space".to_owned());
                    }
                    Some((base, key)) => Supply::There(base, key),
                };
            }
            Word::Parcel(parcel) => {
                if !matches!(state.supply, Supply::There(..)) {
                    return Err("a packed chunk in staging that was not shown".to_owned());
                }
                state.borrowed.open(parcel.buffer, parcel.bytes)?;
                if state.copies.contains_key(&parcel.serial) {
                    state.parcels.push_back(Waiting { parcel, ticket: Rc::default(), is_asked: false });
                } else {
                    // Of a transfer that has ended here.
                    state.borrowed.close(parcel.buffer);
                }
            }
            Word::Refused { serial, reason } => {
                if let Some(refusal) = state.copies.get_mut(&serial) {
                    refusal.get_or_insert(reason);
                }
            }
            Word::Ask | Word::Pack(_) | Word::Back { .. } | Word::Stop { .. } => {
                return Err("it says what a reader says".to_owned());
            }
        }
        Ok(())
    }

    pub(crate) fn readiness(&self) -> Readiness {
        match self.state.borrow().supply {
            Supply::Asked => Readiness::Unknown,
            Supply::Never => Readiness::No,
            Supply::There(..) => Readiness::Yes,
        }
    }

    /// Asks for a transfer; returns its number, which is to be [left](Collecting::leave).
    pub(crate) fn begin(&self, pack: impl FnOnce(u64) -> Pack) -> u64 {
        let mut state = self.state.borrow_mut();
        let serial = state.next_serial;
        state.next_serial = serial.wrapping_add(1);
        state.copies.insert(serial, None);
        state.said.push(Word::Pack(pack(serial)));
        serial
    }

    /// Nothing more of a transfer is wanted here.
    pub(crate) fn leave(&self, serial: u64, is_whole: bool) {
        let mut state = self.state.borrow_mut();
        if state.copies.remove(&serial) == Some(None) && !is_whole {
            state.said.push(Word::Stop { serial });
        }
        drop(state);
        self.let_go();
    }

    /// Reads what was named, as far as the library takes it.
    pub(crate) fn progress(&self) {
        let mut state = self.state.borrow_mut();
        let Supply::There(base, key) = state.supply else { return };
        for waiting in state.parcels.iter_mut().filter(|waiting| !waiting.is_asked) {
            let Parcel { buffer, bytes, .. } = waiting.parcel;
            let from = base.wrapping_add(u64::from(buffer) * CHUNK_BYTES as u64);
            let source = Source { address: from, key, bytes: bytes as usize };
            match self.reader.collect(source, &self.landing, buffer, &waiting.ticket) {
                Ok(true) => waiting.is_asked = true,
                Ok(false) => break,
                Err(reason) => {
                    self.reader.give_up(format!("its packed chunks cannot be read: {reason}"));
                    break;
                }
            }
        }
        let failed = state.parcels.iter().find_map(|waiting| waiting.ticket.failed.borrow_mut().take());
        if let Some(reason) = failed {
            // What a failed read may still write is known only once its endpoint is closed.
            self.reader.give_up(format!("a read of its packed chunks failed: {reason}"));
        }
        drop(state);
        self.let_go();
    }

    /// Gives back what nobody waits for any more, once nothing writes there.
    fn let_go(&self) {
        let State { parcels, copies, borrowed, .. } = &mut *self.state.borrow_mut();
        parcels.retain(|waiting| {
            let is_kept =
                copies.contains_key(&waiting.parcel.serial) || (waiting.is_asked && waiting.ticket.is_under_way());
            if !is_kept {
                borrowed.close(waiting.parcel.buffer);
            }
            is_kept
        });
    }

    /// The next chunk of a transfer, if it is here. An error: the peer refused.
    pub(crate) fn next(&self, serial: u64) -> Result<Option<Chunk>, String> {
        let mut state = self.state.borrow_mut();
        if let Some(Some(reason)) = state.copies.get(&serial) {
            return Err(reason.clone());
        }
        // Reads that were cut off seem to be over.
        if self.reader.is_closed() {
            return Ok(None);
        }
        let Some(at) = state.parcels.iter().position(|waiting| waiting.parcel.serial == serial) else {
            return Ok(None);
        };
        let is_here = state.parcels.get(at).is_some_and(|first| {
            first.is_asked && !first.ticket.is_under_way() && first.ticket.failed.borrow().is_none()
        });
        if !is_here {
            return Ok(None);
        }
        let Some(Waiting { parcel, .. }) = state.parcels.remove(at) else { return Ok(None) };
        let Some(start) = self.landing.buffer(parcel.buffer) else { return Ok(None) };
        Ok(Some(Chunk { buffer: parcel.buffer, at: start, bytes: parcel.bytes as usize }))
    }

    /// A chunk is not needed any more.
    pub(crate) fn unpacked(&self, chunk: &Chunk) {
        self.state.borrow_mut().borrowed.close(chunk.buffer);
    }

    /// What is to be said to the peer.
    pub(crate) fn take_said(&self) -> Vec<Word> {
        let mut state = self.state.borrow_mut();
        let buffers = state.borrowed.give_back();
        let mut said = std::mem::take(&mut state.said);
        if buffers != 0 {
            said.push(Word::Back { buffers });
        }
        said
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use kvferry_transport::conformance::absent;

    use super::*;
    use crate::device;
    use crate::library::Library;

    fn collecting() -> Option<Collecting> {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => {
                absent("libfabric", &reason);
                return None;
            }
        };
        let domain = Domain::open(library, device::find(library, "lo").unwrap(), false).unwrap();
        let reader = Rc::new(Reader::closed());
        assert!(Collecting::ask(&domain, &reader, STAGING_BYTES - 1).unwrap().is_none(), "the limit is reached");
        let collecting = Collecting::ask(&domain, &reader, STAGING_BYTES).unwrap().unwrap();
        assert_eq!(collecting.take_said(), [Word::Ask]);
        Some(collecting)
    }

    fn begin(collecting: &Collecting) -> u64 {
        collecting.begin(|serial| Pack { serial, pool: 1, start: 0, end: 1, program: Bytes::new() })
    }

    fn parcel(serial: u64, buffer: u32, bytes: u32) -> Word {
        Word::Parcel(Parcel { serial, buffer, bytes })
    }

    #[test]
    fn what_a_peer_says_of_its_staging_is_checked() {
        let Some(collecting) = collecting() else { return };
        assert!(collecting.hear(parcel(0, 0, 1)).unwrap_err().contains("not shown"));
        assert!(collecting.hear(Word::Staged(Some((u64::MAX, 1)))).unwrap_err().contains("address space"));
        assert_eq!(collecting.readiness(), Readiness::Unknown);
        collecting.hear(Word::Staged(Some((4096, 1)))).unwrap();
        assert!(collecting.hear(Word::Staged(None)).unwrap_err().contains("nobody asked"));
        assert_eq!(collecting.readiness(), Readiness::Yes);
        let serial = begin(&collecting);
        for (buffer, bytes) in [(BUFFERS, 1), (0, 0), (0, CHUNK_BYTES as u32 + 1)] {
            assert!(collecting.hear(parcel(serial, buffer, bytes)).is_err(), "{bytes} bytes in {buffer}");
        }
        collecting.hear(parcel(serial, 0, 1)).unwrap();
        assert!(collecting.hear(parcel(serial, 0, 1)).unwrap_err().contains("given back"));
        let program = Bytes::new();
        let pack = Pack { serial, pool: 1, start: 0, end: 1, program };
        for word in [Word::Ask, Word::Pack(pack), Word::Back { buffers: 1 }, Word::Stop { serial }] {
            assert!(collecting.hear(word).is_err());
        }
    }

    #[test]
    fn what_nobody_waits_for_goes_back_and_a_refusal_ends_its_transfer_only() {
        let Some(collecting) = collecting() else { return };
        collecting.hear(Word::Staged(Some((4096, 1)))).unwrap();
        let (first, second) = (begin(&collecting), begin(&collecting));
        collecting.take_said();
        collecting.hear(parcel(second + 1, 5, 1)).unwrap();
        collecting.hear(parcel(first, 1, 9)).unwrap();
        collecting.hear(parcel(second, 2, 9)).unwrap();
        assert_eq!(collecting.take_said(), [Word::Back { buffers: 1 << 5 }]);
        collecting.leave(first, false);
        assert_eq!(collecting.take_said(), [Word::Stop { serial: first }, Word::Back { buffers: 1 << 1 }]);
        collecting.hear(Word::Refused { serial: second, reason: "why".to_owned() }).unwrap();
        assert!(collecting.next(second).is_err_and(|reason| reason == "why"));
        collecting.leave(second, false);
        assert_eq!(collecting.take_said(), [Word::Back { buffers: 1 << 2 }], "whoever refused knows that it is over");
        collecting.hear(Word::Refused { serial: first, reason: "late".to_owned() }).unwrap();
    }

    /// Reads that were cut off seem to be over: none of their bytes counts.
    #[test]
    fn nothing_is_unpacked_that_was_cut_off() {
        let Some(collecting) = collecting() else { return };
        collecting.hear(Word::Staged(Some((4096, 1)))).unwrap();
        let serial = begin(&collecting);
        collecting.hear(parcel(serial, 1, 9)).unwrap();
        for waiting in &mut collecting.state.borrow_mut().parcels {
            waiting.is_asked = true;
        }
        assert!(collecting.next(serial).is_ok_and(|chunk| chunk.is_none()));
    }
}
