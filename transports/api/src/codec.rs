//! What transports say to each other in small pieces: postcard values behind a mark, secrets.

use std::io;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// postcard of a value behind a mark. The mark tells what the bytes are, and their version, to a reader that was handed something else.
pub fn seal<T: Serialize>(mark: [u8; 4], value: &T) -> Bytes {
    let mut out = mark.to_vec();
    out.extend_from_slice(&encode(value));
    Bytes::from(out)
}

/// Reads what [`seal`] wrote behind the same mark, or says what is wrong with the bytes.
pub fn open<T: DeserializeOwned>(mark: [u8; 4], bytes: &[u8]) -> Result<T, String> {
    match bytes.split_first_chunk::<4>() {
        Some((first, rest)) if *first == mark => decode(rest),
        _ => Err("it does not begin with this transport's mark".to_owned()),
    }
}

/// postcard of a small value; these types always encode.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).unwrap_or_default()
}

/// Decodes all of `bytes`, or says what is wrong with them.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(format!("{} bytes too many", rest.len())),
        Err(error) => Err(error.to_string()),
    }
}

/// Compares in a time that does not depend on where the first difference is.
pub fn same_secret<const N: usize>(left: &[u8; N], right: &[u8; N]) -> bool {
    let difference = left.iter().zip(right).fold(0u8, |sum, (l, r)| std::hint::black_box(sum | (l ^ r)));
    difference == 0
}

/// Secret bytes from the operating system.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}
