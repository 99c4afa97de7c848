//! Where one transfer's chunks are put: in order, into blocks, or into slots that a device empties.

use std::collections::BTreeMap;

use kvferry_transport::{Cursor, StagedIn};

use crate::share::Share;
use crate::staging::Buffer;

/// Chunks of one transfer that came before an earlier one.
pub(crate) const EARLY_MAX: usize = 64;

/// Where a transfer is put.
pub(crate) struct Sink {
    way: Way,
    left: u64,
    /// The chunk that is put next.
    next: u32,
    early: BTreeMap<u32, Early>,
}

enum Way {
    /// Into blocks, by this thread.
    Direct(Box<Cursor>),
    /// Into slots of a stage, which the device empties.
    Staged(Box<StagedIn>),
}

/// What ends a transfer that is being put.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// Its peer broke the rules.
    Breach(&'static str),
    /// The device does not copy.
    Device(String),
}

/// A chunk's bytes.
pub(crate) enum Body<'a> {
    /// UCX's, for the time of a call.
    Lent(&'a [u8]),
    Own(Buffer),
}

impl Body<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Body::Lent(bytes) => bytes,
            Body::Own(buffer) => buffer,
        }
    }

    fn keep(self) -> Buffer {
        match self {
            Body::Lent(bytes) => bytes.to_vec().into(),
            Body::Own(buffer) => buffer,
        }
    }
}

/// A chunk that came before one that is put ahead of it, or that lacks room.
pub(crate) struct Early {
    body: Buffer,
    /// Bytes of it that were put.
    put: usize,
    pub(crate) place: Option<u32>,
}

impl Sink {
    /// A place for a transfer's bytes, of which none has come.
    pub(crate) fn new(share: Share, bytes: u64) -> Sink {
        let way = match share {
            Share::Direct(cursor) => Way::Direct(cursor),
            Share::Staged(staged) => Way::Staged(Box::new(StagedIn::new(staged))),
        };
        Sink { way, left: bytes, next: 0, early: BTreeMap::new() }
    }

    /// What came and was not put.
    pub(crate) fn into_early(self) -> impl Iterator<Item = Early> {
        self.early.into_values()
    }

    /// Puts a chunk in place, or keeps it until the ones before it are there: reads end in any order, and UCX does not promise that messages come
    /// in theirs. Says how many bytes were put; for each chunk that was, which buffer it was in goes to `freed`, in order.
    pub(crate) fn take(
        &mut self,
        number: u32,
        body: Body<'_>,
        place: Option<u32>,
        freed: &mut Vec<Option<u32>>,
    ) -> Result<u64, Wrong> {
        // The next one is kept, too, where it lacks room.
        if number != self.next || self.early.contains_key(&number) {
            let ahead = number.checked_sub(self.next).filter(|ahead| (*ahead as usize) < EARLY_MAX);
            if ahead.is_none() || self.early.insert(number, Early { body: body.keep(), put: 0, place }).is_some() {
                return Err(Wrong::Breach("a chunk came twice, or far too early"));
            }
            return Ok(0);
        }
        let put = self.put(body.bytes()).inspect_err(|_| freed.push(place))?;
        if put < body.bytes().len() {
            self.early.insert(number, Early { body: body.keep(), put, place });
            return Ok(put as u64);
        }
        self.next = self.next.wrapping_add(1);
        freed.push(place);
        Ok(put as u64 + self.go_on(freed)?)
    }

    /// Puts what was kept and is next, as far as there is room.
    pub(crate) fn go_on(&mut self, freed: &mut Vec<Option<u32>>) -> Result<u64, Wrong> {
        let mut all = 0;
        while let Some(mut next) = self.early.remove(&self.next) {
            let rest = next.body.get(next.put..).unwrap_or_default();
            let lacks = rest.len();
            let put = self.put(rest).inspect_err(|_| freed.push(next.place))?;
            all += put as u64;
            if put < lacks {
                next.put += put;
                self.early.insert(self.next, next);
                break;
            }
            self.next = self.next.wrapping_add(1);
            freed.push(next.place);
        }
        Ok(all)
    }

    /// Puts bytes of the chunk that is next; says how many there was room for.
    fn put(&mut self, body: &[u8]) -> Result<usize, Wrong> {
        let bytes = body.len() as u64;
        if bytes > self.left || (bytes == 0 && self.left > 0) {
            return Err(Wrong::Breach("a chunk does not fit the transfer that it is of"));
        }
        let put = match &mut self.way {
            Way::Direct(cursor) => put_straight(cursor, body)?,
            Way::Staged(staged) => staged.put(body).map_err(Wrong::Device)?,
        };
        self.left -= put as u64;
        Ok(put)
    }

    /// Has the device empty what is filled. Says whether every byte of the transfer is in place.
    pub(crate) fn settle(&mut self) -> Result<bool, Wrong> {
        let is_put = self.is_put();
        match &mut self.way {
            Way::Direct(_) => Ok(is_put),
            Way::Staged(staged) => {
                staged.flush().map_err(Wrong::Device)?;
                Ok(staged.settle().map_err(Wrong::Device)? && is_put)
            }
        }
    }

    /// Whether a chunk that was kept could be put, or a slot be let go of.
    pub(crate) fn can_go_on(&self) -> bool {
        match &self.way {
            Way::Direct(_) => false,
            Way::Staged(staged) => {
                staged.has_settled() || (self.early.contains_key(&self.next) && !staged.is_stalled())
            }
        }
    }

    /// Whether every chunk came and was put. One without bytes is a transfer's only one.
    pub(crate) fn is_put(&self) -> bool {
        self.left == 0 && self.early.is_empty() && self.next > 0
    }

    pub(crate) fn pieces(&self) -> u64 {
        match &self.way {
            Way::Direct(cursor) => cursor.pieces(),
            Way::Staged(staged) => staged.chunks(),
        }
    }
}

/// Puts all bytes of a chunk into blocks.
fn put_straight(cursor: &mut Cursor, body: &[u8]) -> Result<usize, Wrong> {
    // SAFETY: the bytes are a message of UCX's or ours, which nobody writes, and never pool memory.
    match unsafe { cursor.unpack(body.as_ptr(), body.len()) } {
        true => Ok(body.len()),
        false => Err(Wrong::Breach("a program ended before the bytes that came for it")),
    }
}
