//! The socket that peers find this transport by, and the host that it is on.

use std::sync::Arc;

use kvferry_transport::{NicInfo, OpenError, Options};
use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

use crate::backend::Backend;
use crate::transport::{LISTENER, LocalTransport, TIMER};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Opens a transport over a backend. `info.host` is [`host`]; peers of other hosts are refused.
pub fn open<B: Backend>(backend: B, info: NicInfo, options: &Options) -> Result<LocalTransport<B>, OpenError> {
    let device = info.device.clone();
    let io =
        |context, error: rustix::io::Errno| OpenError::Io { device: device.clone(), context, source: error.into() };
    let [socket, key, instance] =
        random().map_err(|reason| OpenError::Unavailable { device: device.clone(), reason })?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| io("making a socket", e))?;
    let name = abstract_name(&socket).map_err(|e| io("naming the socket", e))?;
    bind(&listener, &name).map_err(|e| io("binding the socket", e))?;
    listen(&listener, BACKLOG).map_err(|e| io("listening", e))?;
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
        .map_err(|e| io("making a timer", e))?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| io("making an epoll instance", e))?;
    let watch = |fd, data| epoll::add(&poller, fd, epoll::EventData::new_u64(data), epoll::EventFlags::IN);
    watch(&listener, LISTENER).and_then(|()| watch(&timer, TIMER)).map_err(|e| io("watching the socket", e))?;
    Ok(LocalTransport::new(backend, info, socket, key, instance, listener, timer, Arc::new(poller), options.clone()))
}

/// The address of an abstract socket: gone with its last holder, never a file.
pub(crate) fn abstract_name(socket: &[u8; 16]) -> Result<SocketAddrUnix, rustix::io::Errno> {
    let hex: String = socket.iter().map(|byte| format!("{byte:02x}")).collect();
    SocketAddrUnix::new_abstract_name(format!("kvferry-{hex}").as_bytes())
}

/// Identity of this host: equal in every process since its last boot. An error says what to change.
pub fn host() -> Result<String, String> {
    let host = std::fs::read_to_string(BOOT_ID).map_err(|e| format!("{BOOT_ID} cannot be read ({e}); mount /proc"))?;
    match host.trim() {
        "" => Err(format!("{BOOT_ID} is empty; mount the real /proc")),
        host => Ok(host.chars().take(64).collect()),
    }
}

fn random() -> Result<[[u8; 16]; 3], String> {
    let mut out = [[0; 16]; 3];
    for part in &mut out {
        getrandom::fill(part).map_err(|e| format!("the system gives no random bytes: {e}"))?;
    }
    Ok(out)
}
