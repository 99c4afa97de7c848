//! What an agent of ours tells of itself beside NIXL's protocol: an entry among its connections, which NIXL agents skip.

use bytes::Bytes;
use kvferry_core::{PoolId, PoolLayout, TransportKind};
use kvferry_transport::codec;
use kvferry_ucx::raw::PackedKey;
use serde::{Deserialize, Serialize};

use crate::agent::{Kvferry, PeerKind, PeerPool};
use crate::{AgentMetadata, Ticket};

/// The entry's name among connections.
pub(crate) const OURS: &str = "KVFERRY";
/// What the entry begins with.
const VERSION: u8 = b'2';
/// Bytes of the entry: layouts of pools with thousands of planes have their place.
pub(crate) const OURS_BYTES_MAX: usize = 1 << 20;
/// Bytes of [`AgentConfig::extension`](crate::AgentConfig::extension).
pub(crate) const EXTENSION_BYTES_MAX: usize = (1 << 16) - 1;
/// Pools of one agent that are told of.
const POOLS_MAX: usize = 4096;
/// Tickets of one agent at a time: eight bytes each that its peers read.
pub(crate) const SLOTS: u32 = 8192;

/// The entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ours {
    /// Grows from incarnation to incarnation of an agent of that name.
    pub(crate) incarnation: u64,
    /// Grows whenever memory is registered or deregistered: later words count.
    pub(crate) edition: u64,
    /// All of its memory is named beside this.
    pub(crate) whole: bool,
    /// Where tickets are confirmed.
    pub(crate) board: ToldBoard,
    /// What carries programs, if anything does.
    pub(crate) nic: Option<ToldNic>,
    /// Memory, as programs and tickets name it.
    pub(crate) pools: Vec<ToldPool>,
    /// The serving stack's own bytes.
    pub(crate) extension: Bytes,
}

/// Where an agent's tickets stand, by slot, eight bytes each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ToldBoard {
    pub(crate) address: u64,
    pub(crate) slots: u32,
    /// UCX's packed key of it.
    pub(crate) key: Bytes,
}

/// A device of kvferry's own transports that an agent has opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ToldNic {
    pub(crate) kind: TransportKind,
    pub(crate) device: String,
    /// Of a transport that reaches one host only: which.
    pub(crate) host: String,
    /// For [`Transport::connect`](kvferry_transport::Transport::connect).
    pub(crate) address: Bytes,
}

/// A registered pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ToldPool {
    pub(crate) id: PoolId,
    /// Good for as long as it is registered.
    pub(crate) ticket: Option<Ticket>,
    /// Where its regions begin, as their owner sees them.
    pub(crate) bases: Vec<u64>,
    pub(crate) layout: PoolLayout,
    /// For [`Transport::import`](kvferry_transport::Transport::import).
    pub(crate) keys: Option<Bytes>,
}

impl Ours {
    /// The entry's bytes. Of pools that do not fit, which takes tens of thousands of planes, nothing is told: peers then have NIXL's protocol for them.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let sealed = |ours: &Ours| [&[VERSION][..], &codec::encode(ours)].concat();
        let whole = sealed(self);
        if whole.len() <= OURS_BYTES_MAX && self.pools.len() <= POOLS_MAX {
            return whole;
        }
        let mut part = Ours { pools: Vec::new(), ..self.clone() };
        let mut room = OURS_BYTES_MAX.saturating_sub(sealed(&part).len());
        for pool in &self.pools {
            let bytes = codec::encode(pool).len();
            // The count before them takes up to five bytes.
            if bytes + 5 <= room && part.pools.len() < POOLS_MAX {
                room -= bytes;
                part.pools.push(pool.clone());
            } else {
                tracing::warn!(pool = %pool.id, bytes, "its layout is too large for the metadata: no programs move it");
            }
        }
        sealed(&part)
    }

    /// Reads what an agent of ours wrote. `None` of another version: that agent speaks NIXL's protocol with this one.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Ours>, String> {
        let Some((&VERSION, rest)) = bytes.split_first() else { return Ok(None) };
        let wrong = |reason: String| format!("its entry {OURS}: {reason}; pass its metadata on unchanged");
        let ours: Ours = codec::decode(rest).map_err(wrong)?;
        ours.check().map_err(wrong)?;
        Ok(Some(ours))
    }

    /// What such a peer is; `programs` says by what they move, or why not.
    pub(crate) fn kind(&self, programs: Result<String, String>) -> PeerKind {
        let pool = |pool: &ToldPool| PeerPool {
            id: pool.id,
            layout: pool.layout.clone(),
            bases: pool.bases.clone(),
            keys: pool.keys.clone(),
        };
        PeerKind::Kvferry(Box::new(Kvferry {
            incarnation: self.incarnation,
            extension: self.extension.clone(),
            pools: self.pools.iter().map(pool).collect(),
            programs,
        }))
    }

    fn check(&self) -> Result<(), String> {
        let ToldBoard { address, slots, key } = &self.board;
        if *slots > SLOTS || address % 8 != 0 || address.checked_add(u64::from(*slots) * 8).is_none() {
            return Err(format!(
                "{slots} tickets at {address:#x}; at most {SLOTS} are taken, inside the address space"
            ));
        }
        PackedKey::check(key).map_err(|error| format!("the key of its tickets: {error}"))?;
        if self.extension.len() > EXTENSION_BYTES_MAX || self.pools.len() > POOLS_MAX {
            let (pools, bytes) = (self.pools.len(), self.extension.len());
            return Err(format!(
                "{pools} pools and an extension of {bytes} bytes; at most {POOLS_MAX} and {EXTENSION_BYTES_MAX}"
            ));
        }
        for (index, pool) in self.pools.iter().enumerate() {
            let id = pool.id;
            pool.layout.validate().map_err(|error| format!("{id}: {error}"))?;
            let regions = pool.layout.regions.len();
            if pool.bases.len() != regions {
                return Err(format!("{id} has {regions} regions and {} beginnings", pool.bases.len()));
            }
            if pool.bases.iter().zip(&pool.layout.regions).any(|(base, bytes)| base.checked_add(*bytes).is_none()) {
                return Err(format!("{id} ends beyond the address space"));
            }
            if pool.ticket.is_some_and(|ticket| ticket.slot >= *slots) {
                return Err(format!("the ticket of {id} is in no slot"));
            }
            if self.pools.iter().take(index).any(|other| other.id == id) {
                return Err(format!("{id} is named twice"));
            }
        }
        Ok(())
    }
}

impl PeerKind {
    /// What the agent is whose metadata this is, as it says itself; by what programs move is known once it was added to an agent. The error says what is
    /// wrong with its own entry.
    pub fn of(metadata: &AgentMetadata) -> Result<PeerKind, String> {
        let entry = metadata.connection(OURS).map(|connection| Ours::decode(&connection.address));
        let told = entry.transpose()?.flatten();
        Ok(told.map_or(PeerKind::Nixl, |told| told.kind(Err("it was not added to an agent".to_owned()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_core::Plane;
    use proptest::prelude::*;

    fn key() -> Bytes {
        Bytes::from_static(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff])
    }

    fn pool(id: u32, planes: usize) -> ToldPool {
        let plane = Plane { region: 0, offset: 0, blocks: 4, block_stride: 64, block_bytes: 64 };
        ToldPool {
            id: PoolId(id),
            ticket: Some(Ticket { slot: 3, value: 77 }),
            bases: vec![1 << 40],
            layout: PoolLayout { regions: vec![256], planes: vec![plane; planes] },
            keys: Some(Bytes::from_static(b"keys")),
        }
    }

    fn ours() -> Ours {
        Ours {
            incarnation: 5,
            edition: 2,
            whole: true,
            board: ToldBoard { address: 4096, slots: 16, key: key() },
            nic: Some(ToldNic {
                kind: TransportKind::Ucx,
                device: "lo".into(),
                host: String::new(),
                address: Bytes::from_static(b"there"),
            }),
            pools: vec![pool(0, 2), pool(9, 1)],
            extension: Bytes::from_static(b"control=10.0.0.1:7000"),
        }
    }

    #[test]
    fn what_is_written_is_read_and_other_versions_are_left_alone() {
        assert_eq!(Ours::decode(&ours().encode()), Ok(Some(ours())));
        assert_eq!(Ours::decode(b"1control"), Ok(None));
        assert_eq!(Ours::decode(b""), Ok(None));
    }

    #[test]
    fn whatever_is_cut_or_goes_on_is_refused() {
        let bytes = ours().encode();
        for end in 1..bytes.len() {
            assert!(Ours::decode(&bytes[..end]).is_err(), "{end}");
        }
        let error = Ours::decode(&[bytes, vec![0]].concat()).unwrap_err();
        assert!(error.contains("1 bytes too many") && error.contains("unchanged"), "{error}");
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_the_reason() {
        let refused = |change: fn(&mut Ours), word: &str| {
            let mut told = ours();
            change(&mut told);
            let error = Ours::decode(&told.encode()).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        refused(|told| told.board.address = u64::MAX - 7, "tickets at");
        refused(|told| told.board.address += 1, "tickets at");
        refused(|told| told.board.slots = SLOTS + 1, "tickets at");
        refused(|told| told.board.key = Bytes::from_static(b"short"), "key");
        refused(|told| told.pools[1].id = PoolId(0), "twice");
        refused(|told| told.pools[1].bases.clear(), "beginnings");
        refused(|told| told.pools[1].bases[0] = u64::MAX, "address space");
        refused(|told| told.pools[1].layout.planes[0].blocks = 5, "plane 0");
        refused(|told| told.pools[1].ticket = Some(Ticket { slot: 16, value: 0 }), "slot");
    }

    #[test]
    fn a_layout_that_does_not_fit_is_left_out_and_the_others_are_told() {
        let mut told = ours();
        (4..8).for_each(|id| told.pools.insert(1, pool(id, 60_000)));
        let bytes = told.encode();
        assert!(bytes.len() <= OURS_BYTES_MAX);
        let ids = |told: Ours| told.pools.iter().map(|pool| pool.id.0).collect::<Vec<_>>();
        let read = ids(Ours::decode(&bytes).unwrap().unwrap());
        assert_eq!(read, [0, 7, 6, 5, 9]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_changed_byte_never_panics(at in any::<prop::sample::Index>(), byte: u8) {
            let mut bytes = ours().encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(Some(read)) = Ours::decode(&bytes) {
                prop_assert_eq!(Ours::decode(&read.encode()), Ok(Some(read)));
            }
        }
    }
}
