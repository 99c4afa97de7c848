//! What travels on the control link so that peers find and are let into this transport.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use kvferry_core::PoolId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

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

/// The mark tells what the bytes are, and their version, to a reader that was handed something else.
fn seal<T: Serialize>(mark: [u8; 4], value: &T) -> Bytes {
    let mut out = mark.to_vec();
    out.extend_from_slice(&encode(value));
    Bytes::from(out)
}

fn open<T: DeserializeOwned>(mark: [u8; 4], bytes: &[u8]) -> Result<T, String> {
    match bytes.split_first_chunk::<4>() {
        Some((first, rest)) if *first == mark => decode(rest),
        _ => Err("it does not begin with this transport's mark".to_owned()),
    }
}

/// postcard of a small value; these types always encode.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).unwrap_or_default()
}

/// Decodes all of `bytes`, or says what is wrong with them.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(format!("{} bytes too many", rest.len())),
        Err(error) => Err(error.to_string()),
    }
}

/// Compares in a time that does not depend on where the first difference is.
pub(crate) fn same_secret(left: &[u8; KEY_BYTES], right: &[u8; KEY_BYTES]) -> bool {
    let difference = left.iter().zip(right).fold(0u8, |sum, (l, r)| std::hint::black_box(sum | (l ^ r)));
    difference == 0
}
