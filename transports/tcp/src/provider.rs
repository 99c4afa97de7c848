//! Finds the network devices of this host and opens them.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};

use kvferry_transport::{Device, NicInfo, OpenError, Options, Provider, Transport, TransportKind};

use crate::transport::TcpTransport;

const UNSPECIFIED: &str = "peers cannot connect to it; name a concrete address or an interface";

/// Opens network interfaces, or addresses of them, as TCP transports.
#[derive(Clone, Debug, Default)]
pub struct TcpProvider {
    socket_buffer_bytes: Option<usize>,
}

impl TcpProvider {
    /// A provider whose sockets have buffers that the kernel tunes.
    pub fn new() -> TcpProvider {
        TcpProvider::default()
    }

    /// Fixes the size of both buffers of every socket, in bytes (the kernel doubles it and has a minimum), instead of leaving them to
    /// the kernel's tuning.
    pub fn with_socket_buffers(mut self, bytes: usize) -> TcpProvider {
        self.socket_buffer_bytes = Some(bytes);
        self
    }
}

impl Provider for TcpProvider {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    /// One device per interface that is up and has an address.
    fn discover(&self) -> Vec<Device> {
        let mut seen = BTreeSet::new();
        let mut devices = Vec::new();
        for interface in interfaces() {
            if seen.insert(interface.name.clone()) {
                devices.push(Device { kind: TransportKind::Tcp, name: interface.name, unavailable: None });
            }
        }
        devices
    }

    /// Also an address of this host: as good a name as its interface, but in no list.
    fn named(&self, name: &str) -> Option<Device> {
        let Ok(ip) = name.parse::<IpAddr>() else {
            return self.discover().into_iter().find(|device| device.name == name);
        };
        let unavailable = match TcpListener::bind((ip, 0)) {
            Ok(_) if ip.is_unspecified() => Some(UNSPECIFIED.to_owned()),
            Ok(_) => None,
            Err(error) => Some(format!("this host does not listen on it: {error}")),
        };
        Some(Device { kind: TransportKind::Tcp, name: name.to_owned(), unavailable })
    }

    /// Opens an interface by name (its first address, IPv4 before IPv6), or an address of this host.
    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let unavailable = |reason: String| OpenError::Unavailable { device: device.name.clone(), reason };
        if device.kind != TransportKind::Tcp {
            return Err(unavailable(format!("it is a {} device; open it with that provider", device.kind)));
        }
        let interfaces = interfaces();
        let (ip, interface) = match device.name.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => {
                return Err(unavailable(UNSPECIFIED.to_owned()));
            }
            Ok(ip) => {
                let of = interfaces.iter().find(|interface| interface.ip == ip);
                (ip, of.map_or_else(String::new, |interface| interface.name.clone()))
            }
            Err(_) => match interfaces.iter().find(|interface| interface.name == device.name) {
                Some(interface) => (interface.ip, interface.name.clone()),
                None => {
                    let names: BTreeSet<_> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
                    let names = names.into_iter().collect::<Vec<_>>().join(", ");
                    return Err(unavailable(format!(
                        "no interface of that name is up with an address; there are {names}"
                    )));
                }
            },
        };
        let info = NicInfo {
            kind: TransportKind::Tcp,
            device: device.name.clone(),
            host: String::new(),
            library: None,
            bits_per_second: bits_per_second(&interface),
        };
        let transport = TcpTransport::open(info, ip, options.clone(), self.socket_buffer_bytes)
            .map_err(|(context, source)| OpenError::Io { device: device.name.clone(), context, source })?;
        Ok(Box::new(transport))
    }
}

struct Interface {
    name: String,
    ip: IpAddr,
}

/// Interfaces that are up, with the addresses that peers can reach, IPv4 first.
fn interfaces() -> Vec<Interface> {
    let mut list = std::ptr::null_mut();
    // SAFETY: getifaddrs fills the pointer in, or fails and leaves it alone.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next: *const libc::ifaddrs = list;
    while !next.is_null() {
        // SAFETY: `next` is a live entry of the list, which is freed below.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        if entry.ifa_flags & libc::IFF_UP as libc::c_uint == 0 || entry.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: a non-null address begins with its family.
        let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
        let ip = match family {
            libc::AF_INET => {
                // SAFETY: an address of this family is a sockaddr_in; it may be less aligned than the type.
                let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)))
            }
            libc::AF_INET6 => {
                // SAFETY: an address of this family is a sockaddr_in6; it may be less aligned than the type.
                let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
                // A link-local address means nothing without this host's interface number.
                if ip.is_unicast_link_local() {
                    continue;
                }
                IpAddr::V6(ip)
            }
            _ => continue,
        };
        // SAFETY: the name is a C string that lives as long as the list.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        found.push(Interface { name, ip });
    }
    // SAFETY: the list came from getifaddrs and is not used again.
    unsafe { libc::freeifaddrs(list) };
    found.sort_by_key(|interface| interface.ip.is_ipv6());
    found
}

/// What the driver says; virtual devices say nothing or -1.
fn bits_per_second(interface: &str) -> Option<u64> {
    if interface.is_empty() || interface.contains('/') {
        return None;
    }
    let text = std::fs::read_to_string(format!("/sys/class/net/{interface}/speed")).ok()?;
    let megabits: u64 = text.trim().parse().ok()?;
    Some(megabits.saturating_mul(1_000_000))
}
