//! Whether other hosts reach a GPU's memory, and where their processes find this one.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use kvferry_nvml::{LIBRARY, NAMED_BY};
use kvferry_transport::native::check_file;

use crate::driver::HandleKind;
use crate::gpu::Gpu;

/// Networks of examples: nobody is there, so that the way to them is the way to whoever is no neighbour.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// The NVLink domain in which a GPU's pools can be read, cluster and clique; else why there is none.
pub(crate) fn of(gpu: &Gpu) -> Result<String, String> {
    let physical = gpu.physical.as_ref().map_err(Clone::clone)?;
    if physical.kind != HandleKind::Fabric {
        let reason = physical.no_fabric.as_deref().unwrap_or("not tried");
        return Err(format!("no fabric handles: {reason}"));
    }
    let named = std::env::var_os(NAMED_BY).filter(|name| !name.is_empty());
    let library = named.unwrap_or_else(|| OsString::from(LIBRARY));
    check_file(&library.to_string_lossy(), NAMED_BY)?;
    let place = kvferry_nvml::place(&library, &gpu.uuid).map_err(|error| error.to_string())?;
    Ok(place.to_string())
}

/// The address of this host from which others are reached. Nothing is sent to find it.
pub(crate) fn own_address() -> Result<IpAddr, String> {
    let from = |to: IpAddr| {
        let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((to, 9)).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_unspecified() && !ip.is_loopback()).then_some(ip)
    };
    let found = ELSEWHERE.into_iter().find_map(from);
    found.ok_or_else(|| "this host has no route to others; name an address of it, as in gpu0@10.0.0.3".to_owned())
}
