//! What names a NIC or a pool to others.

use bytes::Bytes;
use kvferry_core::PoolId;

use crate::fabric::NicId;

const NIC_MAGIC: &[u8; 6] = b"simnic";
const POOL_MAGIC: &[u8; 6] = b"simmem";

pub(crate) fn encode_address(nic: NicId, key: u128) -> Bytes {
    encode(NIC_MAGIC, &[nic.0], key)
}

pub(crate) fn decode_address(bytes: &[u8]) -> Result<(NicId, u128), String> {
    let ([nic], key) = decode(NIC_MAGIC, bytes)?;
    Ok((NicId(nic), key))
}

pub(crate) fn encode_keys(nic: NicId, pool: PoolId, key: u128) -> Bytes {
    encode(POOL_MAGIC, &[nic.0, pool.0], key)
}

pub(crate) fn decode_keys(bytes: &[u8]) -> Result<(NicId, PoolId, u128), String> {
    let ([nic, pool], key) = decode(POOL_MAGIC, bytes)?;
    Ok((NicId(nic), PoolId(pool), key))
}

fn encode(magic: &[u8; 6], numbers: &[u32], key: u128) -> Bytes {
    let mut bytes = magic.to_vec();
    for number in numbers {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(key.to_le_bytes());
    bytes.into()
}

fn decode<const N: usize>(magic: &[u8; 6], bytes: &[u8]) -> Result<([u32; N], u128), String> {
    let mut rest = bytes.strip_prefix(magic.as_slice()).ok_or("it was not made by a simulated fabric")?;
    let cut = || format!("it has {} bytes, not {}", bytes.len(), magic.len() + 4 * N + 16);
    let mut numbers = [0; N];
    for number in &mut numbers {
        let (head, tail) = rest.split_first_chunk().ok_or_else(cut)?;
        (*number, rest) = (u32::from_le_bytes(*head), tail);
    }
    let key: [u8; 16] = rest.try_into().map_err(|_| cut())?;
    Ok((numbers, u128::from_le_bytes(key)))
}
