//! What an agent tells of itself: how to reach it, and the memory that may be read and written there.
//!
//! The layout is NIXL's since 0.6 (`nixlAgent::getLocalMD`, `loadRemoteMD`): agent name, connections by backend, sections by backend and kind of
//! memory. Readers skip connections and sections of backends that they do not have, as long as one is common, and what follows the last section.

use std::fmt;

use bytes::Bytes;

use crate::WireError;
use crate::ours::{OURS, OURS_BYTES_MAX};
use crate::serdes::{Reader, Writer};

/// Bytes of an agent's name.
pub const NAME_BYTES_MAX: usize = 1 << 10;
/// Bytes of a backend's name.
const BACKEND_BYTES_MAX: usize = 64;
/// Backends of an agent.
const CONNECTIONS_MAX: usize = 32;
/// Bytes by which a backend is reached. A UCX worker with 32 devices has 6 KiB.
const CONNECTION_BYTES_MAX: usize = 1 << 16;
const SECTIONS_MAX: usize = 64;
/// Ranges of an agent's memory.
pub const RANGES_MAX: usize = 1 << 20;
/// Bytes that a backend says of a range: UCX's packed key.
const KEY_BYTES_MAX: usize = 1 << 12;
/// An address, a length and a device, eight bytes each.
const RANGE_BYTES: usize = 24;

/// What an agent tells of itself, whole or in part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentMetadata {
    /// Its name; peers know it by that.
    pub name: String,
    /// How to reach it; empty in a part that only adds memory.
    pub connections: Vec<Connection>,
    /// Its memory.
    pub sections: Vec<Section>,
}

/// How a backend of an agent is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Whose: `UCX`, `LIBFABRIC`, …
    pub backend: String,
    /// The backend's own bytes; UCX's worker address.
    pub address: Bytes,
}

/// Memory of one kind that a backend has registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Whose.
    pub backend: String,
    /// Where.
    pub kind: MemoryKind,
    /// By device, then address; never empty.
    pub ranges: Vec<Range>,
}

/// Kinds of memory, by NIXL's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemoryKind {
    /// The host's.
    Dram = 0,
    /// A GPU's.
    Vram = 1,
    /// A block device's.
    Block = 2,
    /// An object store's.
    Object = 3,
    /// A file's.
    File = 4,
}

impl MemoryKind {
    const ALL: [MemoryKind; 5] =
        [MemoryKind::Dram, MemoryKind::Vram, MemoryKind::Block, MemoryKind::Object, MemoryKind::File];
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemoryKind::Dram => "DRAM",
            MemoryKind::Vram => "VRAM",
            MemoryKind::Block => "BLK",
            MemoryKind::Object => "OBJ",
            MemoryKind::File => "FILE",
        })
    }
}

/// A range of registered memory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// Which device: a GPU's number; 0 for the host.
    pub device: u64,
    /// Its first byte, as its owner sees it.
    pub address: u64,
    /// How many.
    pub bytes: u64,
    /// What the backend says of it; UCX's packed key.
    pub key: Bytes,
}

impl Range {
    /// Whether it has all of another's bytes.
    pub fn holds(&self, device: u64, address: u64, bytes: u64) -> bool {
        let offset = address.checked_sub(self.address);
        device == self.device
            && offset.and_then(|offset| offset.checked_add(bytes)).is_some_and(|end| end <= self.bytes)
    }
}

impl Section {
    /// Orders the ranges; refuses none at all and the same one twice, which a NIXL agent would not take.
    pub fn new(backend: &str, kind: MemoryKind, mut ranges: Vec<Range>) -> Result<Section, WireError> {
        ranges.sort();
        let section = Section { backend: backend.to_owned(), kind, ranges };
        section.check(0)?;
        Ok(section)
    }

    /// The range that has all bytes of another, if one has. Ranges do not overlap in a well-made section; of those that do, the last that begins
    /// before counts.
    pub fn find(&self, device: u64, address: u64, bytes: u64) -> Option<&Range> {
        let after = self.ranges.partition_point(|range| (range.device, range.address) <= (device, address));
        self.ranges.get(..after)?.iter().rev().take(2).find(|range| range.holds(device, address, bytes))
    }

    fn check(&self, section: usize) -> Result<(), WireError> {
        let wrong = |what| Err(WireError::Section { section, what });
        if self.ranges.is_empty() {
            return wrong("it has no range, which NIXL agents refuse; leave it out");
        }
        if let Some(range) = self.ranges.iter().find(|range| range.address.checked_add(range.bytes).is_none()) {
            return Err(WireError::Range { address: range.address, bytes: range.bytes });
        }
        let place = |range: &Range| (range.device, range.address, range.bytes);
        let pairs = || self.ranges.iter().zip(self.ranges.iter().skip(1));
        if pairs().any(|(one, other)| place(one) == place(other)) {
            return wrong("it names one range twice; name each once");
        }
        if pairs().any(|(one, other)| place(one) > place(other)) {
            return wrong("its ranges are not in the order of their addresses");
        }
        Ok(())
    }
}

impl AgentMetadata {
    /// How a backend is reached, if it is there.
    pub fn connection(&self, backend: &str) -> Option<&Connection> {
        self.connections.iter().find(|connection| connection.backend == backend)
    }

    /// The bytes that agents of NIXL 0.6 and later load. Sections must be as [`Section::new`] makes them.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Writer::new();
        out.field("Agent", self.name.as_bytes());
        out.number("Conns", self.connections.len() as u64);
        for connection in &self.connections {
            out.field("t", connection.backend.as_bytes());
            out.field("c", &connection.address);
        }
        out.field("", b"MemSection");
        out.number("nixlSecElms", self.sections.len() as u64);
        for (number, section) in self.sections.iter().enumerate() {
            section.check(number)?;
            out.field("bknd", section.backend.as_bytes());
            out.field("nixlDList", b"nixlSDList");
            out.field("t", &(section.kind as i32).to_le_bytes());
            out.number("n", section.ranges.len() as u64);
            for range in &section.ranges {
                let numbers = [range.address, range.bytes, range.device].map(u64::to_le_bytes).concat();
                out.parts("", &[&numbers, &range.key]);
            }
        }
        Ok(out.finish())
    }

    /// Reads what an agent gave, strictly: every length is checked before anything is kept. What follows the last section, where other runtimes
    /// may keep extensions, is left alone.
    pub fn decode(bytes: Bytes) -> Result<AgentMetadata, WireError> {
        let mut reader = Reader::new(bytes)?;
        let name = reader.text("Agent", NAME_BYTES_MAX)?;
        let connections = reader.count("Conns", CONNECTIONS_MAX)?;
        let connections = (0..connections).map(|_| {
            let backend = reader.text("t", BACKEND_BYTES_MAX)?;
            let bytes_max = if backend == OURS { OURS_BYTES_MAX } else { CONNECTION_BYTES_MAX };
            Ok(Connection { backend, address: reader.field("c", bytes_max)? })
        });
        let connections = connections.collect::<Result<Vec<_>, WireError>>()?;
        reader.constant("", "MemSection")?;
        let sections = reader.count("nixlSecElms", SECTIONS_MAX)?;
        let sections = (0..sections).map(|number| section(&mut reader, number)).collect::<Result<Vec<_>, _>>()?;
        Ok(AgentMetadata { name, connections, sections })
    }
}

fn section(reader: &mut Reader, number: usize) -> Result<Section, WireError> {
    let backend = reader.text("bknd", BACKEND_BYTES_MAX)?;
    reader.constant("nixlDList", "nixlSDList")?;
    let at = reader.at();
    let field = reader.field("t", 4)?;
    let kind: [u8; 4] =
        field.as_ref().try_into().map_err(|_| WireError::Size { at, field: "t", bytes: field.len(), needed: 4 })?;
    let kind = u32::from_le_bytes(kind);
    let known = MemoryKind::ALL.into_iter().find(|known| *known as u32 == kind);
    let kind = known.ok_or(WireError::MemoryKind { at, kind })?;
    let count = reader.count("n", RANGES_MAX)?;
    // What is claimed is not yet there.
    let mut ranges = Vec::with_capacity(count.min(1 << 12));
    for _ in 0..count {
        ranges.push(range(reader)?);
    }
    let section = Section { backend, kind, ranges };
    section.check(number)?;
    Ok(section)
}

fn range(reader: &mut Reader) -> Result<Range, WireError> {
    let at = reader.at();
    let field = reader.field("", RANGE_BYTES + KEY_BYTES_MAX)?;
    let number = |index: usize| {
        let bytes = field.get(index * 8..index * 8 + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or(WireError::Size { at, field: "", bytes: field.len(), needed: RANGE_BYTES })
    };
    let (address, bytes, device) = (number(0)?, number(1)?, number(2)?);
    // A copy of its own: it outlives the metadata.
    let key = Bytes::copy_from_slice(field.get(RANGE_BYTES..).unwrap_or_default());
    Ok(Range { device, address, bytes, key })
}
