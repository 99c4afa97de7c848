//! Which devices there are, and what they are called.
//!
//! A device is called as its domain: `eth0`, `rdmap40s0`, `shm`. `PROVIDER/DOMAIN` asks for a provider other than the best one:
//! `tcp;ofi_rxm/lo`. Which of several offers is taken goes by what they are, never by their order.

use std::collections::BTreeSet;

use libfabric_sys::{FI_HMEM, FI_MSG, FI_RMA};

use crate::info::{Info, Offer};
use crate::library::Library;

/// What EFA's domains end with.
const EFA_SUFFIX: &str = "-rdm";
/// Providers that are listed, the best one of a device first. Others have to be asked for.
const LISTED: [&str; 3] = ["efa", "tcp", "shm"];
/// Providers that may be asked for.
const KNOWN: [&str; 4] = ["efa", "tcp", "tcp;ofi_rxm", "shm"];

/// Messages and remote reads: what every device has to have.
const NEEDED: u64 = (FI_MSG | FI_RMA) as u64;

/// A provider that is refused whoever asks for it.
const SOCKETS: &str = "sockets";
/// Why.
const NO_SOCKETS: &str = "libfabric's sockets provider is deprecated, and a transfer over it once waited for ever; tcp does the same and is faster";
/// The fabric of EFA's that serves reads of any size from whoever has the key.
const EFA: &str = "efa";
/// Its other fabric, which versions from 2.1 on list first.
const EFA_DIRECT: &str = "efa-direct";
/// Why that one is not taken.
const NO_DIRECT: &str = "fabric efa-direct lets an endpoint read only once the memory's owner has entered that endpoint's address, and \
                         this transport reads each peer through an endpoint that its owner is not told of";

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
            if provider == EFA_DIRECT {
                return Err(format!(
                    "{name:?}: {NO_DIRECT}; take {domain:?}, which is the same device by fabric {EFA}"
                ));
            }
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
        for info in Info::query(library, provider, None, false)? {
            let offer = info.offer();
            let name = called(&offer.provider, &offer.domain);
            if refusal(&offer, NEEDED).is_none() && seen.insert(name.clone()) {
                names.push(name);
            }
        }
    }
    Ok(names)
}

/// The way to open a device.
pub(crate) fn find(library: &'static Library, name: &str) -> Result<Info, String> {
    find_for(library, name, false)
}

/// The same, for pools in the memory of devices, too, if `device_memory` says so.
pub(crate) fn find_for(library: &'static Library, name: &str, device_memory: bool) -> Result<Info, String> {
    let Named { providers, domain } = named(name)?;
    let needed = if device_memory { NEEDED | FI_HMEM } else { NEEDED };
    let mut refused = BTreeSet::new();
    for provider in providers {
        // Of the loopback some providers tell only when they are asked for its address.
        let sources: &[Option<&str>] = if domain == "lo" { &[None, Some("127.0.0.1")] } else { &[None] };
        for source in sources {
            let mut offered = Info::query(library, provider, *source, device_memory)?;
            let offers: Vec<Offer> = offered.iter().map(Info::offer).collect();
            match choose(&offers, called(provider, &domain).as_str(), needed) {
                Ok(at) if at < offered.len() => return Ok(offered.swap_remove(at)),
                Ok(_) => {}
                Err(reasons) => refused.extend(reasons),
            }
        }
    }
    let library_words = format!("libfabric {} ({})", library.version, library.path);
    if !refused.is_empty() {
        let reasons: Vec<String> = refused.into_iter().collect();
        return Err(format!("{library_words} offers {name:?} only in ways that are not used: {}", reasons.join("; ")));
    }
    if device_memory {
        return Err(format!("{library_words} offers no device memory (FI_HMEM) for {name:?}"));
    }
    Err(format!("{library_words} offers no such device; there are {}", discover(library)?.join(", ")))
}

/// Which of a provider's offers a device is opened by: the first that can be used. Else why those of its name cannot.
fn choose(offers: &[Offer], name: &str, needed: u64) -> Result<usize, Vec<String>> {
    let mut reasons = Vec::new();
    for (at, offer) in offers.iter().enumerate().filter(|(_, offer)| called(&offer.provider, &offer.domain) == name) {
        match refusal(offer, needed) {
            None => return Ok(at),
            Some(reason) => reasons.push(reason),
        }
    }
    Err(reasons)
}

/// Why an offer is not used, if it is not.
fn refusal(offer: &Offer, needed: u64) -> Option<String> {
    if offer.capabilities & needed != needed {
        let Offer { provider, fabric, capabilities, .. } = offer;
        return Some(format!(
            "{provider} ({fabric}) lacks messages, remote reads or device memory (capabilities {capabilities:#x})"
        ));
    }
    let by_kind = match (offer.provider.as_str(), offer.fabric.as_str()) {
        ("efa", EFA) | ("shm", _) => None,
        ("efa", EFA_DIRECT) => Some(NO_DIRECT.to_owned()),
        ("efa", fabric) => Some(format!("EFA's fabric {fabric:?} is not known; {EFA} is")),
        // An interface is offered once for each of its addresses.
        (provider, fabric) => (!offer.is_ip4).then(|| format!("{provider} ({fabric}) has no IPv4 address")),
    };
    by_kind.or_else(|| offer.refusal.clone())
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

    fn offer(provider: &str, fabric: &str, domain: &str) -> Offer {
        let (provider, fabric, domain) = (provider.to_owned(), fabric.to_owned(), domain.to_owned());
        let capabilities = u64::from(FI_MSG | FI_RMA);
        Offer { provider, fabric, domain, capabilities, is_ip4: false, refusal: None }
    }

    /// Whatever the order: the library lists `efa-direct` first.
    #[test]
    fn of_two_fabrics_the_one_without_conditions_is_taken() {
        let mut offers: Vec<Offer> =
            [("efa-direct", "rdmap40s0-rdm"), ("efa", "rdmap40s0-rdm"), ("efa", "rdmap41s0-rdm")]
                .map(|(fabric, domain)| offer("efa", fabric, domain))
                .into();
        for _ in 0..2 {
            for (name, domain) in [("rdmap40s0", "rdmap40s0-rdm"), ("rdmap41s0", "rdmap41s0-rdm")] {
                let chosen = &offers[choose(&offers, name, NEEDED).unwrap()];
                assert_eq!((chosen.fabric.as_str(), chosen.domain.as_str()), ("efa", domain));
            }
            assert_eq!(choose(&offers, "rdmap42s0", NEEDED), Err(vec![]));
            offers.reverse();
        }
        let only = choose(&offers[..1], "rdmap40s0", NEEDED).unwrap_err();
        assert!(only.len() == 1 && only[0].contains("efa-direct"), "{only:?}");
        let strange = choose(&[offer("efa", "efa-next", "rdmap40s0-rdm")], "rdmap40s0", NEEDED).unwrap_err();
        assert!(strange[0].contains("efa-next"), "{strange:?}");
    }

    #[test]
    fn the_direct_fabric_is_refused_by_name_with_its_reason() {
        let refused = named("efa-direct/rdmap40s0").unwrap_err();
        assert!(refused.contains("owner") && refused.contains("take \"rdmap40s0\""), "{refused}");
        assert_eq!(named("efa/rdmap40s0").unwrap().providers, ["efa"]);
    }

    #[test]
    fn what_lacks_a_capability_or_an_address_is_not_chosen() {
        let mut offers = vec![offer("tcp", "::1/128", "eth0"), offer("tcp", "10.0.0.0/8", "eth0")];
        offers[1].is_ip4 = true;
        assert_eq!(choose(&offers, "eth0", NEEDED), Ok(1));
        offers[1].capabilities = u64::from(FI_MSG);
        let reasons = choose(&offers, "eth0", NEEDED).unwrap_err();
        assert!(
            reasons.len() == 2 && reasons[0].contains("IPv4") && reasons[1].contains("remote reads"),
            "{reasons:?}"
        );
        offers[1] = Offer { refusal: Some("mr_mode".to_owned()), is_ip4: true, ..offer("tcp", "10.0.0.0/8", "eth0") };
        assert!(choose(&offers, "eth0", NEEDED).unwrap_err().contains(&"mr_mode".to_owned()));
        assert_eq!(choose(&[offer("shm", "shm", "shm")], "shm", NEEDED), Ok(0));
    }

    /// Informations of the library's own making, with a fabric's name put in: that is where the choice finds it.
    #[test]
    fn a_fabrics_name_is_read_from_the_librarys_information() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
        };
        let mut made: Vec<Info> = ["efa-direct", "efa"]
            .iter()
            .map(|fabric| Info::made(library, "efa", fabric, "rdmap40s0-rdm", u64::from(FI_MSG | FI_RMA)).unwrap())
            .collect();
        for at in [1, 0] {
            let offers: Vec<Offer> = made.iter().map(Info::offer).collect();
            assert_eq!(choose(&offers, "rdmap40s0", NEEDED), Ok(at), "{offers:?}");
            made.reverse();
        }
    }
}
