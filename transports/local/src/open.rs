//! Opening a transport over Unix sockets, and the host that it is on.

use std::net::IpAddr;

use kvferry_transport::{NicInfo, OpenError, Options};

use crate::backend::Backend;
use crate::sockets::Sockets;
use crate::transport::LocalTransport;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Opens a transport over a backend. `info.host` is [`host`]; peers of other hosts are refused.
pub fn open<B: Backend<Carrier = Sockets>>(
    backend: B,
    info: NicInfo,
    options: &Options,
) -> Result<LocalTransport<B>, OpenError> {
    let carrier = Sockets::open(B::KIND, &info.device, B::RINGS)?;
    LocalTransport::over(backend, carrier, info, options)
}

/// The same, and peers of other hosts come in at an address of this one: those whose memory is reached all the same, as
/// [`Backend::domain`] tells.
pub fn open_beyond<B: Backend<Carrier = Sockets>>(
    backend: B,
    info: NicInfo,
    options: &Options,
    ip: IpAddr,
) -> Result<LocalTransport<B>, OpenError> {
    let mut carrier = Sockets::open(B::KIND, &info.device, B::RINGS)?;
    carrier.listen_beyond(ip).map_err(|(context, error)| OpenError::Io {
        device: info.device.clone(),
        context,
        source: error.into(),
    })?;
    LocalTransport::over(backend, carrier, info, options)
}

/// Identity of this host: equal in every process since its last boot. An error says what to change.
pub fn host() -> Result<String, String> {
    let host = std::fs::read_to_string(BOOT_ID).map_err(|e| format!("{BOOT_ID} cannot be read ({e}); mount /proc"))?;
    match host.trim() {
        "" => Err(format!("{BOOT_ID} is empty; mount the real /proc")),
        host => Ok(host.chars().take(64).collect()),
    }
}
