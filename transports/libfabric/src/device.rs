//! Which devices there are, and what they are called.
//!
//! A device is called as its domain: `eth0`, `rdmap40s0`, `shm`. `PROVIDER/DOMAIN` asks for a provider other than the best one:
//! `tcp;ofi_rxm/lo`.

use std::collections::BTreeSet;

use crate::info::Info;
use crate::library::Library;

/// What EFA's domains end with.
const EFA_SUFFIX: &str = "-rdm";
/// Providers that are listed, the best one of a device first. Others have to be asked for.
const LISTED: [&str; 3] = ["efa", "tcp", "shm"];
/// Providers that may be asked for.
const KNOWN: [&str; 4] = ["efa", "tcp", "tcp;ofi_rxm", "shm"];

/// A provider that is refused whoever asks for it.
const SOCKETS: &str = "sockets";
/// Why.
const NO_SOCKETS: &str = "libfabric's sockets provider is deprecated, and a transfer over it once waited for ever; tcp does the same and is faster";

/// A device, by its name: the providers that it may be opened with, in order, and its domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) providers: Vec<&'static str>,
    pub(crate) domain: String,
}

/// What a name means, or why there is no such device.
pub(crate) fn named(name: &str) -> Result<Named, String> {
    match name.split_once('/') {
        Some((provider, domain)) => {
            if provider == SOCKETS {
                return Err(format!("{name:?}: {NO_SOCKETS}; take {domain:?}"));
            }
            let known = KNOWN.iter().find(|known| **known == provider);
            let provider = known.ok_or_else(|| format!("no provider {provider:?}; there are {}", KNOWN.join(", ")))?;
            Ok(Named { providers: vec![provider], domain: domain.to_owned() })
        }
        None if name == "shm" => Ok(Named { providers: vec!["shm"], domain: name.to_owned() }),
        None => Ok(Named { providers: vec!["efa", "tcp"], domain: name.to_owned() }),
    }
}

/// The devices that the library offers here, as they are called, in order of preference.
pub(crate) fn discover(library: &'static Library) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    let mut seen = BTreeSet::new();
    for provider in LISTED {
        for info in Info::query(library, provider, None)? {
            let name = called(&info.provider(), &info.domain());
            if usable(&info) && seen.insert(name.clone()) {
                names.push(name);
            }
        }
    }
    Ok(names)
}

/// The way to open a device.
pub(crate) fn find(library: &'static Library, name: &str) -> Result<Info, String> {
    let Named { providers, domain } = named(name)?;
    for provider in providers {
        // Of the loopback some providers tell only when they are asked for its address.
        let sources: &[Option<&str>] = if domain == "lo" { &[None, Some("127.0.0.1")] } else { &[None] };
        for source in sources {
            let offered = Info::query(library, provider, *source)?;
            let found = offered
                .into_iter()
                .find(|info| usable(info) && called(&info.provider(), &info.domain()) == called(provider, &domain));
            if let Some(info) = found {
                return Ok(info);
            }
        }
    }
    let there = discover(library)?.join(", ");
    Err(format!("libfabric {} ({}) offers no such device; there are {there}", library.version, library.path))
}

/// Whether an offer can be opened at all. Of EFA's two fabrics `efa` serves reads of any size without conditions; `efa-direct` would be
/// first in the library's own order.
fn usable(info: &Info) -> bool {
    chosen(&info.provider(), &info.fabric(), info.is_ip4()) && info.memory_mode().is_ok()
}

fn chosen(provider: &str, fabric: &str, is_ip4: bool) -> bool {
    match provider {
        "efa" => fabric == "efa",
        "shm" => true,
        // An interface is offered once for each of its addresses.
        _ => is_ip4,
    }
}

/// What a device is called. A provider's own name for `tcp` may be that of the layer above it.
fn called(provider: &str, domain: &str) -> String {
    match provider {
        "efa" => domain.strip_suffix(EFA_SUFFIX).unwrap_or(domain).to_owned(),
        "shm" => "shm".to_owned(),
        _ => domain.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_provider_and_domain() {
        assert_eq!(named("eth0"), Ok(Named { providers: vec!["efa", "tcp"], domain: "eth0".to_owned() }));
        assert_eq!(named("shm"), Ok(Named { providers: vec!["shm"], domain: "shm".to_owned() }));
        let layered = Named { providers: vec!["tcp;ofi_rxm"], domain: "lo".to_owned() };
        assert_eq!(named("tcp;ofi_rxm/lo"), Ok(layered));
        assert!(named("verbs/mlx5_0").unwrap_err().contains("tcp;ofi_rxm"));
        let refused = named("sockets/eth0").unwrap_err();
        assert!(refused.contains("deprecated") && refused.ends_with("take \"eth0\""), "{refused}");
        assert_eq!(called("efa", "rdmap40s0-rdm"), "rdmap40s0");
        assert_eq!((called("tcp;ofi_rxm", "lo"), called("shm", "shm")), ("lo".to_owned(), "shm".to_owned()));
    }

    /// The library lists `efa-direct` first.
    #[test]
    fn of_two_fabrics_the_one_without_conditions_is_taken() {
        assert!(!chosen("efa", "efa-direct", false) && chosen("efa", "efa", false));
        assert!(chosen("tcp", "127.0.0.1/32", true) && !chosen("tcp", "::1/128", false) && chosen("shm", "shm", false));
    }
}
