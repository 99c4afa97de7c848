//! What is wrong with bytes that claim to be NIXL's.

use kvferry_core::TransferId;
use thiserror::Error;

/// Bytes that are not what a NIXL agent sends. Offsets are in bytes from the beginning.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// They begin otherwise.
    #[error(
        "this is nothing of a NIXL agent: it does not begin with nixlSerDes; pass what the agent's get_agent_metadata returned, unchanged"
    )]
    NotNixl,
    /// They end too early.
    #[error("cut at byte {at}, where {what:?} should be; pass all that the agent gave")]
    Cut {
        /// Where the unfinished field begins.
        at: usize,
        /// Its tag.
        what: &'static str,
    },
    /// Another field is there.
    #[error("byte {at} does not begin the field {expected:?}; agents of NIXL 0.6 and later are understood")]
    Tag {
        /// Where.
        at: usize,
        /// Its tag.
        expected: &'static str,
    },
    /// A field does not end where its length says.
    #[error("the field {field:?} does not end at byte {at}")]
    Bar {
        /// Where it should.
        at: usize,
        /// Its tag.
        field: &'static str,
    },
    /// A field is longer than any real one.
    #[error("the field {field:?} at byte {at} claims {bytes} bytes; at most {max} are taken")]
    TooLong {
        /// Where.
        at: usize,
        /// Its tag.
        field: &'static str,
        /// What it claims.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// A list is longer than any real one.
    #[error("the field {field:?} at byte {at} announces {number} entries; at most {max} are taken")]
    TooMany {
        /// Where.
        at: usize,
        /// Its tag.
        field: &'static str,
        /// What it announces.
        number: u64,
        /// The limit.
        max: usize,
    },
    /// A number has another size.
    #[error("the field {field:?} at byte {at} has {bytes} bytes, {needed} are needed")]
    Size {
        /// Where.
        at: usize,
        /// Its tag.
        field: &'static str,
        /// What it has.
        bytes: usize,
        /// What it needs at least.
        needed: usize,
    },
    /// A name is not UTF-8.
    #[error("the field {field:?} at byte {at} is not UTF-8")]
    NotText {
        /// Where.
        at: usize,
        /// Its tag.
        field: &'static str,
    },
    /// A constant is another.
    #[error("the field at byte {at} does not say {expected:?}")]
    Value {
        /// Where.
        at: usize,
        /// What it says in every agent's words.
        expected: &'static str,
    },
    /// A kind of memory that NIXL does not have.
    #[error("the section at byte {at} is of memory of kind {kind}; there are 0 (DRAM) to 4 (file)")]
    MemoryKind {
        /// Where.
        at: usize,
        /// Which.
        kind: u32,
    },
    /// A range ends beyond the address space.
    #[error("the range of {bytes} bytes at {address:#x} ends beyond the address space")]
    Range {
        /// Where it begins.
        address: u64,
        /// How long it is.
        bytes: u64,
    },
    /// Memory of one kind is named twice, or out of order, or not at all.
    #[error("section {section}: {what}")]
    Section {
        /// Which, from 0.
        section: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Our own extension, or what looks like it.
    #[error("{0}")]
    Frame(&'static str),
}

/// Why an agent could not do something.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AgentError {
    /// The agent cannot be set up so.
    #[error("the agent cannot be set up: {0}")]
    Config(String),
    /// UCX does not do it.
    #[error("{0}")]
    Ucx(String),
    /// A peer's metadata is not what it should be.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The agent's thread is gone: it was shut down.
    #[error("the agent is shut down")]
    Gone,
    /// A pool of that number is registered already, or none is.
    #[error("{0}")]
    Pool(String),
    /// A peer cannot be added.
    #[error("agent {name:?}: {reason}")]
    Peer {
        /// Its name.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A transfer's bytes are not local or not the peer's.
    #[error("piece {piece}: {reason}")]
    Piece {
        /// Which, from 0.
        piece: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A notification is longer than agents take.
    #[error("a notification of {bytes} bytes; at most {max} are taken")]
    Notification {
        /// What it has.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// A program does not fit the pools.
    #[error("the program does not fit: {0}")]
    Program(String),
    /// What was read was lent under a lease that its owner has ended.
    #[error(
        "agent {name:?} has ended the lease: what was read may be another request's; ask it where the request is now"
    )]
    LeaseEnded {
        /// The owner's name.
        name: String,
    },
    /// What was read was deregistered by its owner, or is another incarnation's.
    #[error(
        "agent {name:?} has withdrawn the memory that was read; add its newer metadata, and ask where the request is now"
    )]
    Withdrawn {
        /// The owner's name.
        name: String,
    },
    /// There are too many leases.
    #[error("{max} leases and registrations stand already; end those that are over")]
    Leases {
        /// The limit.
        max: u32,
    },
    /// A push that was expected did not come in time. It is let in no more.
    #[error(
        "nothing came as {id} within {waited_ms} ms; look whether its sender still runs and has pushed it under this name"
    )]
    Unsent {
        /// The transfer's name.
        id: TransferId,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// A push that was expected failed.
    #[error("{id} did not come: {reason}")]
    Refused {
        /// The transfer's name.
        id: TransferId,
        /// Why.
        reason: String,
    },
    /// The peer failed.
    #[error("agent {name:?} failed: {reason}; add it again once it is back, under its new name")]
    Failed {
        /// Its name.
        name: String,
        /// What UCX said.
        reason: String,
    },
    /// Time is up. If anything was in flight, the connection to the peer was closed, so that nothing of the transfer touches memory any more; the next
    /// one connects again.
    #[error(
        "agent {name:?} did not answer within {waited_ms} ms; look whether it still runs: for NIXL it must call its agent now and then, or have a progress thread"
    )]
    Deadline {
        /// Its name.
        name: String,
        /// How long it was waited for.
        waited_ms: u64,
    },
}
