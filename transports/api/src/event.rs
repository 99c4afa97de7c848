//! What a transport reports.

use kvferry_core::{Evidence, FenceProof, PoolId, TransferId};
use thiserror::Error;

use crate::{Notice, PeerId};

/// One observation of a transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A connection is up: posts to it move.
    Connected {
        /// Which peer.
        peer: PeerId,
    },
    /// More is known of the way to a connected peer; replaces what was said of it before. Follows [`Event::Connected`] at once, or once the
    /// peer's memory is known, and comes again when more is shown: never once per transfer.
    Shown {
        /// Which peer.
        peer: PeerId,
        /// What.
        evidence: Box<Evidence>,
    },
    /// A posted transfer is done; for a push every byte is visible at the peer.
    Completed {
        /// Which transfer.
        id: TransferId,
        /// Bytes that moved.
        bytes: u64,
        /// Contiguous copies or spans that they took here.
        pieces: u64,
    },
    /// An expected push is here, every byte of it.
    Arrived {
        /// Which transfer.
        id: TransferId,
        /// Bytes that moved.
        bytes: u64,
        /// Contiguous copies or spans that they took here.
        pieces: u64,
    },
    /// A posted or expected transfer ended without success. Its local memory is no longer touched.
    Failed {
        /// Which transfer.
        id: TransferId,
        /// Why.
        error: TransferError,
    },
    /// A peer's notice.
    Notice {
        /// What it said.
        notice: Notice,
    },
    /// Nothing of that peer can touch local memory any more.
    Fenced {
        /// Which peer.
        peer: PeerId,
        /// How that is known.
        proof: FenceProof,
    },
    /// The connection is gone; its transfers have failed or will.
    PeerLost {
        /// Which peer.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// A withdrawn pool is untouched from now on.
    Unbound {
        /// Which pool.
        pool: PoolId,
    },
}

/// Why a transfer failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// It was cancelled here.
    #[error("cancelled")]
    Cancelled,
    /// The connection broke.
    #[error("the peer was lost: {0}")]
    PeerLost(String),
    /// The peer refused, saying why.
    #[error("the peer refused: {0}")]
    Refused(String),
    /// The pool was unbound.
    #[error("the pool was withdrawn")]
    Unbound,
    /// Both ends planned different programs.
    #[error("the two ends planned different programs ({local:#x} here, {remote:#x} there); compare their geometries")]
    Mismatch {
        /// Fingerprint here.
        local: u64,
        /// Fingerprint at the peer.
        remote: u64,
    },
    /// The operating system refused.
    #[error("{context}: {message}")]
    Io {
        /// What was tried.
        context: &'static str,
        /// What it said.
        message: String,
    },
}
