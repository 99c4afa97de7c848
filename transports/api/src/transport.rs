//! The two traits that every transport implements.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::{
    Direction, Epoch, GpuIdentity, MemoryDomain, PoolId, PoolLayout, Program, TransferId, TransportKind, UnitRange,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Device, Event, NicInfo, Options, Pool, PoolError, PoolKeys, Wait};

/// Finds and opens devices of one kind.
pub trait Provider: Send + Sync {
    /// The kind of transport that it opens.
    fn kind(&self) -> TransportKind;

    /// The devices of this host, usable or not; an unusable one says why in [`Device::unavailable`].
    fn discover(&self) -> Vec<Device>;

    /// The device that somebody names, which [`Provider::discover`] need not have found; `None` where there cannot be such a one. Whether it
    /// can be used is looked into more closely than for a list.
    fn named(&self, name: &str) -> Option<Device> {
        self.discover().into_iter().find(|device| device.name == name)
    }

    /// Makes a pool in the memory that `device` moves best; host memory unless the transport says otherwise. `name` is for people.
    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        let _any = device;
        Pool::allocate(id, layout, name)
    }

    /// Opens one device on the calling thread, where it stays.
    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError>;
}

/// One opened device. It is opened on its host thread and never leaves it.
///
/// Nothing blocks. Every posted or expected transfer ends in exactly one [`Event::Completed`], [`Event::Arrived`] or [`Event::Failed`],
/// and until then its memory belongs to the operation: dropping handles frees nothing.
pub trait Transport {
    /// Kind, device, library, capabilities.
    fn info(&self) -> &NicInfo;

    /// What a peer needs for [`Transport::connect`]. Holds a per-session key: it travels on the authenticated control link only.
    fn address(&self) -> Bytes;

    /// Where peers of other hosts find it that can read its pools all the same, as GPUs of one NVLink domain do: instead of the address, for those of
    /// another host in a domain of the same name. Asked once its pools are bound, of which one may not be for all.
    fn domain(&self) -> Option<MemoryDomain> {
        None
    }

    /// Which GPU it is, where it is one: by that peers judge whether its memory is read from theirs before they choose it.
    fn gpu(&self) -> Option<GpuIdentity> {
        None
    }

    /// Makes a pool reachable for local posts and, through the returned keys, for peers.
    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError>;

    /// Withdraws a pool; [`Event::Unbound`] follows once nothing touches it any more.
    fn unbind(&mut self, pool: PoolId);

    /// Starts connecting; ends in [`Event::Connected`] or [`Event::PeerLost`]. Posts before that are queued.
    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError>;

    /// Makes a peer's pool nameable in posts. The layout was validated by the session; bounds are checked again where the bytes are touched.
    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError>;

    /// The receiver's side of a push: registers what may be written before any byte of it can arrive.
    ///
    /// A push whose id is not expected (yet) waits at the receiver, bounded in number and time, and is then refused.
    fn expect(&mut self, transfer: Expected) -> Result<(), PostError>;

    /// Starts a transfer that this side initiates. [`PostError::Full`] is back-pressure: poll, then post again.
    fn post(&mut self, transfer: Transfer) -> Result<(), PostError>;

    /// As [`Transport::post`], but touches the local pool, or lets the peer read it, only once `after` is done. An event that fails fails the
    /// transfer. A stopped transfer may end only when the event has.
    ///
    /// A transport that knows nothing of events takes those that are done already, and refuses others: [`PostError::Unordered`].
    fn post_after(&mut self, transfer: Transfer, after: Arc<dyn DeviceEvent>) -> Result<(), PostError> {
        let unordered = |reason| PostError::Unordered { id: transfer.id, device: after.device().to_owned(), reason };
        match after.is_done() {
            Ok(true) => self.post(transfer),
            Ok(false) => Err(unordered("this transport cannot wait for it; post once it is done".to_owned())),
            Err(reason) => Err(unordered(reason)),
        }
    }

    /// Stops a posted or expected transfer as soon as its memory is safe; it ends in [`Event::Failed`] with
    /// [`TransferError::Cancelled`](crate::TransferError::Cancelled), unless it ended before. Unknown ids are ignored.
    fn cancel(&mut self, id: TransferId);

    /// Ends every transfer with a peer and proves that nothing of it can touch local memory any more: [`Event::Fenced`].
    ///
    /// Where that takes new keys, all peers that hold old ones lose the connection ([`Event::PeerLost`] there) and get the new ones when they
    /// connect again. Such a transport's [`PoolKeys`] name the pool only; the keys themselves it hands over on the connection.
    fn fence(&mut self, peer: PeerId);

    /// Lets a peer go; its unfinished transfers end in [`Event::Failed`].
    fn disconnect(&mut self, peer: PeerId);

    /// Makes progress and appends what happened. Bounded work per call: copies at most a few MiB.
    fn poll(&mut self, events: &mut Vec<Event>);

    /// Call when `poll` returned nothing: says how to wait.
    fn arm(&mut self) -> Wait;
}

/// Work of a device that was started and may not be done, such as the kernels that produce KV.
pub trait DeviceEvent: Any + fmt::Debug + Send + Sync {
    /// The device, as device lists call it.
    fn device(&self) -> &str;

    /// Whether it is done. An error says why it never will be.
    fn is_done(&self) -> Result<bool, String>;
}

/// A peer of one transport, numbered by that transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// An imported pool of a peer, numbered by that transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemotePool(pub u32);

/// A transfer that this side initiates.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// Its name at both ends.
    pub id: TransferId,
    /// The other end.
    pub peer: PeerId,
    /// Who reads and who writes.
    pub direction: Direction,
    /// The local pool: destination of a pull, source of a push.
    pub local: PoolId,
    /// The peer's pool.
    pub remote: RemotePool,
    /// What moves. A pull needs both sides' tables; a push needs its own (source) tables, the destination's stay with the peer's [`Expected`].
    pub program: Arc<Program>,
    /// Which part of it.
    pub range: UnitRange,
    /// Told to the peer after the last byte: for a push every byte is visible there, for a pull "I will read no more".
    pub notice: Option<Notice>,
}

/// The receiver's side of a push.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its name at both ends.
    pub id: TransferId,
    /// The address of the transport that it may come from, where that is known; `None` takes it from any peer. shm, cuda and libfabric take it from
    /// nobody else; the others know a push by its id and fingerprint.
    pub from: Option<Bytes>,
    /// The local pool that is written.
    pub pool: PoolId,
    /// What may arrive: the same segments as the peer's, with the destination's tables. [`Program::fingerprint`] is compared.
    pub program: Arc<Program>,
    /// Which part of it.
    pub range: UnitRange,
}

/// A few bytes of protocol that follow a transfer's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Notice {
    /// Incarnation of the sender; notices of an older one are dropped.
    pub epoch: Epoch,
    /// Which transfer.
    pub transfer: TransferId,
    /// Which share of it, where rails split it.
    pub chunk: u32,
}

/// Why a device did not open.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The device is not on this host or is not usable; the reason says what to change.
    #[error("{device} cannot be opened: {reason}")]
    Unavailable {
        /// Its name.
        device: String,
        /// Cause and remedy.
        reason: String,
    },
    /// The operating system refused.
    #[error("{device} cannot be opened: {context}: {source}")]
    Io {
        /// Its name.
        device: String,
        /// What was tried.
        context: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a pool was not bound.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// A pool of that id is bound already; unbind it first.
    #[error("{0} is bound already; unbind it first")]
    Duplicate(PoolId),
    /// This transport cannot reach such memory.
    #[error("{pool} cannot be bound: {reason}")]
    Unsupported {
        /// Which pool.
        pool: PoolId,
        /// Cause and remedy.
        reason: String,
    },
}

/// Why a connection was not even started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not one of this transport's, or was cut.
    #[error("not a {kind} address: {reason}")]
    BadAddress {
        /// This transport.
        kind: TransportKind,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused.
    #[error("cannot connect: {context}: {source}")]
    Io {
        /// What was tried.
        context: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a peer's pool was not imported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The peer is not known (any more).
    #[error("peer {0:?} is not connected; connect again")]
    UnknownPeer(PeerId),
    /// The keys are not this transport's, or were cut.
    #[error("not keys of a {kind} pool: {reason}")]
    BadKeys {
        /// This transport.
        kind: TransportKind,
        /// What is wrong with them.
        reason: String,
    },
    /// The layout does not fit the peer's pool.
    #[error("the peer's pool and its layout disagree: {0}")]
    Layout(String),
}

/// Why a transfer was not accepted. Nothing was started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PostError {
    /// Queues are full: poll, then post again.
    #[error("the transport's queue is full; poll it and post again")]
    Full,
    /// The peer is not known (any more).
    #[error("peer {0:?} is not connected; connect again")]
    UnknownPeer(PeerId),
    /// The local pool is not bound.
    #[error("{0} is not bound here")]
    UnknownPool(PoolId),
    /// The remote pool was not imported.
    #[error("the peer's pool {0:?} was not imported")]
    UnknownRemote(RemotePool),
    /// A transfer of that id is in flight.
    #[error("{0} is in flight already")]
    Duplicate(TransferId),
    /// The program does not fit the pools, or lacks a table.
    #[error("{id} does not fit the pools: {source}")]
    Program {
        /// Which transfer.
        id: TransferId,
        /// What is wrong.
        #[source]
        source: kvferry_core::ProgramError,
    },
    /// The address that it is expected from is none.
    #[error("{id} is expected from no transport of this kind: {reason}")]
    BadSource {
        /// Which transfer.
        id: TransferId,
        /// What is wrong.
        reason: String,
    },
    /// It was to follow a device's event, which this transport cannot wait for, or which has failed.
    #[error("{id} cannot follow the event of {device}: {reason}")]
    Unordered {
        /// Which transfer.
        id: TransferId,
        /// Whose event.
        device: String,
        /// Cause and remedy.
        reason: String,
    },
}
