//! Notifications: what an agent says to another, mostly after a transfer.

use bytes::Bytes;

use crate::WireError;
use crate::metadata::NAME_BYTES_MAX;
use crate::serdes::{Reader, Writer};

/// Bytes of a notification that are taken.
pub const NOTIFICATION_BYTES_MAX: usize = 16 << 20;

/// A message of an agent. Who it says it is from is not proven: NIXL's peers may claim any name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// The sender's name.
    pub from: String,
    /// What it says.
    pub message: Bytes,
}

impl Notification {
    /// The body of UCX's active message 0.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.field("name", self.from.as_bytes());
        out.field("msg", &self.message);
        out.finish()
    }

    /// Reads one; what follows is left alone, as NIXL does.
    pub fn decode(bytes: Bytes) -> Result<Notification, WireError> {
        let mut reader = Reader::new(bytes)?;
        let from = reader.text("name", NAME_BYTES_MAX)?;
        Ok(Notification { from, message: reader.field("msg", NOTIFICATION_BYTES_MAX)? })
    }
}
