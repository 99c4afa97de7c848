//! What travels on the control link so that peers find and are let into this transport.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_transport::codec::{open, seal};
use serde::{Deserialize, Serialize};

/// Bytes of a session key or an instance id.
pub(crate) const KEY_BYTES: usize = 16;

/// Where a transport listens, and the key that lets a peer in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Address {
    pub(crate) ip: IpAddr,
    pub(crate) port: u16,
    pub(crate) key: [u8; KEY_BYTES],
    pub(crate) instance: [u8; KEY_BYTES],
}

impl Address {
    pub(crate) fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

/// Names one binding of a pool: a pool that is bound anew gets a new token, so old keys are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keys {
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
}

impl Address {
    const MARK: [u8; 4] = *b"ktA\x01";

    pub(crate) fn seal(&self) -> Bytes {
        seal(Address::MARK, self)
    }

    /// Reads what [`Address::seal`] wrote, or says what is wrong with the bytes.
    pub(crate) fn open(bytes: &[u8]) -> Result<Address, String> {
        open(Address::MARK, bytes)
    }
}

impl Keys {
    const MARK: [u8; 4] = *b"ktK\x01";

    pub(crate) fn seal(&self) -> Bytes {
        seal(Keys::MARK, self)
    }

    /// Reads what [`Keys::seal`] wrote, or says what is wrong with the bytes.
    pub(crate) fn open(bytes: &[u8]) -> Result<Keys, String> {
        open(Keys::MARK, bytes)
    }
}
