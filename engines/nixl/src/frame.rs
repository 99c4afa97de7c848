//! NIXL's socket exchange of metadata: a length of eight bytes (little-endian), then a command.
//!
//! Whoever connects gets every key, and whoever is believed may have peers dropped: it is for networks in which everybody is trusted.

use bytes::{BufMut, Bytes, BytesMut};

use crate::WireError;
use crate::metadata::NAME_BYTES_MAX;

/// What every command begins with. NIXL's reader looks for it everywhere in a frame.
const COMMAND: &[u8] = b"NIXLCOMM:";
/// Bytes of a frame that are taken: metadata of [`RANGES_MAX`](crate::RANGES_MAX) ranges fits.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Load this metadata.
    Load(Bytes),
    /// Send yours, by [`Frame::Load`] on the same connection.
    Send,
    /// Forget the agent of this name.
    Invalidate(String),
}

impl Frame {
    /// Length and command.
    pub fn encode(&self) -> Result<Bytes, WireError> {
        let (command, body): (&[u8], &[u8]) = match self {
            Frame::Load(metadata) => (b"LOAD", metadata),
            Frame::Send => (b"SEND", b""),
            Frame::Invalidate(name) => (b"INVL", name.as_bytes()),
        };
        // A NIXL agent would cut it there.
        if body.windows(COMMAND.len()).any(|part| part == COMMAND) {
            return Err(WireError::Frame(
                "this metadata holds the bytes NIXLCOMM:, at which NIXL cuts a frame; register its memory anew or give the agent another name",
            ));
        }
        let bytes = COMMAND.len() + command.len() + body.len();
        if bytes > FRAME_BYTES_MAX {
            return Err(WireError::Frame(
                "this metadata is longer than a frame may be; send it in parts of fewer ranges",
            ));
        }
        let mut out = BytesMut::with_capacity(8 + bytes);
        out.put_u64_le(bytes as u64);
        out.put_slice(COMMAND);
        out.put_slice(command);
        out.put_slice(body);
        Ok(out.freeze())
    }

    /// How long a frame is whose length was read; refused when no real one is.
    pub fn length(length: [u8; 8]) -> Result<usize, WireError> {
        let bytes = u64::from_le_bytes(length);
        let known = usize::try_from(bytes).ok().filter(|bytes| *bytes <= FRAME_BYTES_MAX);
        known.ok_or(WireError::TooLong { at: 0, field: "NIXLCOMM:", bytes, max: FRAME_BYTES_MAX })
    }

    /// Reads a command, without the length.
    pub fn decode(bytes: Bytes) -> Result<Frame, WireError> {
        let at = COMMAND.len();
        if bytes.get(..at) != Some(COMMAND) {
            return Err(WireError::Frame("a frame that does not begin with NIXLCOMM:; only NIXL agents connect here"));
        }
        let body = || bytes.slice(at + 4..);
        match bytes.get(at..at + 4) {
            Some(b"LOAD") => Ok(Frame::Load(body())),
            Some(b"SEND") => Ok(Frame::Send),
            Some(b"INVL") if bytes.len() - at - 4 <= NAME_BYTES_MAX => {
                let name = String::from_utf8(body().to_vec());
                Ok(Frame::Invalidate(name.map_err(|_| WireError::NotText { at: at + 4, field: "INVL" })?))
            }
            _ => Err(WireError::Frame("a frame with a command that is not LOAD, SEND or INVL")),
        }
    }
}
