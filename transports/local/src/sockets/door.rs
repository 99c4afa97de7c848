//! Where peers come in: an abstract Unix socket for those of this host, a TCP port for those beyond it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, getsockname, listen,
    socket_with, sockopt,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Connections that are accepted in one poll: what is under way has its turn, however many call.
const ACCEPTS_PER_LOOK: u32 = 64;
/// How long nothing is accepted after descriptors ran out.
const DEAF: Duration = Duration::from_millis(50);
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
/// A host that has gone silent is noticed after 5 s and five questions, 2 s apart; data that nobody acknowledges after 15 s.
const QUESTION_AFTER: Duration = Duration::from_secs(5);
const QUESTION_EVERY: Duration = Duration::from_secs(2);
const QUESTIONS: u32 = 5;
const SILENCE_MS: u32 = 15_000;

/// One listening socket.
pub(super) struct Door {
    listener: OwnedFd,
    /// What epoll calls it.
    token: u64,
    /// Whether somebody waits to be accepted.
    pub(super) is_called: bool,
    /// How many more are accepted before the next look.
    left: u32,
    /// Until when it is not listened to, since nothing could be accepted.
    pub(super) deaf_until: Option<Instant>,
}

impl Door {
    /// Listens under a name of this host.
    pub(super) fn here(name: &[u8; 16], token: u64) -> Result<Door, (&'static str, Errno)> {
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None).map_err(|e| ("making a socket", e))?;
        let address = abstract_name(name).map_err(|e| ("naming the socket", e))?;
        bind(&listener, &address).map_err(|e| ("binding the socket", e))?;
        listen(&listener, BACKLOG).map_err(|e| ("listening", e))?;
        Ok(Door::new(listener, token))
    }

    /// Listens at an address of this host, and says at which port.
    pub(super) fn beyond(ip: IpAddr, token: u64) -> Result<(Door, SocketAddr), (&'static str, Errno)> {
        let listener = socket_with(family(ip), SocketType::STREAM, FLAGS, None)
            .map_err(|e| ("making a socket for peers of other hosts", e))?;
        bind(&listener, &SocketAddr::new(ip, 0)).map_err(|e| ("binding it to this host's address", e))?;
        listen(&listener, BACKLOG).map_err(|e| ("listening for peers of other hosts", e))?;
        let bound = getsockname(&listener).and_then(SocketAddr::try_from);
        let bound = bound.map_err(|e| ("asking for its port", e))?;
        Ok((Door::new(listener, token), SocketAddr::new(ip, bound.port())))
    }

    fn new(listener: OwnedFd, token: u64) -> Door {
        Door { listener, token, is_called: false, left: ACCEPTS_PER_LOOK, deaf_until: None }
    }

    pub(super) fn watch(&self, poller: &OwnedFd) -> Result<(), Errno> {
        epoll::add(poller, &self.listener, epoll::EventData::new_u64(self.token), epoll::EventFlags::IN)
    }

    /// The socket of one of those who wait.
    pub(super) fn accept(&mut self, poller: &OwnedFd) -> Option<OwnedFd> {
        while self.is_called && self.left > 0 {
            self.left -= 1;
            match accept_with(&self.listener, FLAGS) {
                Ok(socket) => return Some(socket),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => self.is_called = false,
                Err(error) => {
                    // Out of descriptors or memory. Those that wait would wake us at once, again and again.
                    tracing::warn!(%error, "a connection was not accepted");
                    if self.listen_for(poller, epoll::EventFlags::empty()) {
                        self.deaf_until = Some(Instant::now() + DEAF);
                    }
                    self.is_called = false;
                }
            }
        }
        None
    }

    /// A look begins: more are accepted, and who was not listened to is heard again when it is time.
    pub(super) fn look(&mut self, poller: &OwnedFd, now: Instant) {
        self.left = ACCEPTS_PER_LOOK;
        if self.deaf_until.is_some_and(|until| until <= now) && self.listen_for(poller, epoll::EventFlags::IN) {
            self.deaf_until = None;
            self.is_called = true;
        }
    }

    fn listen_for(&self, poller: &OwnedFd, flags: epoll::EventFlags) -> bool {
        epoll::modify(poller, &self.listener, epoll::EventData::new_u64(self.token), flags).is_ok()
    }
}

/// Where a peer listens, as its place says.
pub(super) enum Place {
    Here([u8; 16]),
    Beyond(SocketAddr),
}

impl Place {
    pub(super) fn decode(bytes: &[u8]) -> Option<Place> {
        if let Ok(name) = bytes.try_into() {
            return Some(Place::Here(name));
        }
        let (ip, port) = bytes.split_last_chunk::<2>()?;
        let ip = match ip.len() {
            4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(ip).ok()?)),
            16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(ip).ok()?)),
            _ => return None,
        };
        let at = SocketAddr::new(ip, u16::from_le_bytes(*port));
        (at.port() != 0 && !ip.is_unspecified() && !ip.is_multicast()).then_some(Place::Beyond(at))
    }
}

/// As [`Place::decode`] reads it.
pub(super) fn place_beyond(at: SocketAddr) -> Bytes {
    let port = at.port().to_le_bytes();
    match at.ip() {
        IpAddr::V4(ip) => [ip.octets().as_slice(), &port].concat().into(),
        IpAddr::V6(ip) => [ip.octets().as_slice(), &port].concat().into(),
    }
}

/// A socket of this host that connects to a name; the name, too, if that has to be tried again.
pub(super) fn dial_here(name: &[u8; 16]) -> Result<(OwnedFd, Option<SocketAddrUnix>), (&'static str, Errno)> {
    let to = abstract_name(name).map_err(|e| ("naming its socket", e))?;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None).map_err(|e| ("making a socket", e))?;
    match connect(&socket, &to) {
        Ok(()) => Ok((socket, None)),
        Err(Errno::AGAIN | Errno::INTR) => Ok((socket, Some(to))),
        Err(error) => Err(("connecting (has it ended, or has it another network namespace?)", error)),
    }
}

/// A socket that connects to another host. What is written before it has is taken when it has.
pub(super) fn dial_beyond(to: SocketAddr, from: IpAddr) -> Result<OwnedFd, (&'static str, Errno)> {
    let socket = socket_with(family(to.ip()), SocketType::STREAM, FLAGS, None).map_err(|e| ("making a socket", e))?;
    // From a loopback device every address of this host can be reached, from others only by that device.
    if !from.is_loopback() && from.is_ipv4() == to.is_ipv4() {
        bind(&socket, &SocketAddr::new(from, 0)).map_err(|e| ("binding to this host's address", e))?;
    }
    tune(&socket).map_err(|e| ("setting its socket up", e))?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(error) => Err(("connecting to its host", error)),
    }
}

/// Small frames go at once, and a host that is gone is noticed though it says nothing.
pub(super) fn tune(socket: &impl AsFd) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_tcp_keepidle(socket, QUESTION_AFTER)?;
    sockopt::set_tcp_keepintvl(socket, QUESTION_EVERY)?;
    sockopt::set_tcp_keepcnt(socket, QUESTIONS)?;
    sockopt::set_tcp_user_timeout(socket, SILENCE_MS)?;
    sockopt::set_socket_keepalive(socket, true)
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// The address of an abstract socket: gone with its last holder, never a file.
fn abstract_name(socket: &[u8; 16]) -> Result<SocketAddrUnix, Errno> {
    let hex: String = socket.iter().map(|byte| format!("{byte:02x}")).collect();
    SocketAddrUnix::new_abstract_name(format!("kvferry-{hex}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_leads_where_it_was_made_for() {
        for at in ["10.1.2.3:4711", "[fd00::1]:65535"].map(|at| at.parse::<SocketAddr>().unwrap()) {
            let bytes = place_beyond(at);
            assert!(matches!(Place::decode(&bytes), Some(Place::Beyond(read)) if read == at));
            let cut = (0..bytes.len()).filter(|length| *length != 16);
            assert!(cut.into_iter().all(|length| Place::decode(&bytes[..length]).is_none() || length == 6));
        }
        assert!(matches!(Place::decode(&[7; 16]), Some(Place::Here(name)) if name == [7; 16]));
        for nowhere in ["0.0.0.0:1", "10.0.0.1:0", "224.0.0.1:9", "[::]:9"] {
            assert!(Place::decode(&place_beyond(nowhere.parse().unwrap())).is_none(), "{nowhere}");
        }
    }

    #[test]
    fn a_host_that_says_nothing_is_asked_and_given_up() {
        let (door, at) = Door::beyond(IpAddr::from([127, 0, 0, 1]), 0).unwrap();
        let socket = dial_beyond(at, at.ip()).unwrap();
        drop(door);
        assert!(sockopt::socket_keepalive(&socket).unwrap() && sockopt::tcp_nodelay(&socket).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), SILENCE_MS);
        let asked = sockopt::tcp_keepidle(&socket).unwrap()
            + sockopt::tcp_keepintvl(&socket).unwrap() * sockopt::tcp_keepcnt(&socket).unwrap();
        assert_eq!(asked, Duration::from_secs(15));
    }
}
