//! Memory of GPUs, which this transport does not take: why, as precisely as the provider tells.
//!
//! A provider that offers `FI_HMEM` may reach the GPU by the NIC or copy through its driver on the NIC's thread; EFA's offers it either way. And
//! that bytes which a NIC has read into GPU memory are seen by the kernels behind its completion depends on GPU, NIC and driver. No promise
//! here stands on an offer alone, so a pool in such memory is refused, and goes by cuda, or staged by tcp or ucx.

use crate::info::Info;
use crate::library::{Library, Version};

/// What was found when the provider was asked for device memory.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Offer {
    No,
    Yes,
    Failed(String),
}

/// Why a pool on `device` is not taken by a provider's `domain`.
pub(crate) fn refusal(library: &'static Library, provider: &str, domain: &str, device: &str) -> String {
    let offer = match Info::query_device_memory(library, provider) {
        Ok(offers) if offers.iter().any(|info| info.domain() == domain) => Offer::Yes,
        Ok(_) => Offer::No,
        Err(reason) => Offer::Failed(reason),
    };
    words(&offer, library.version, provider, domain, device)
}

fn words(offer: &Offer, version: Version, provider: &str, domain: &str, device: &str) -> String {
    let why = match offer {
        Offer::No => format!("libfabric {version} offers no device memory (FI_HMEM) for {domain} by {provider}"),
        Offer::Yes => format!(
            "libfabric {version} offers device memory (FI_HMEM) for {domain} by {provider}, but not that the NIC reaches it without copies, nor \
             when a GPU sees what was read; no hardware has shown that to kvferry yet"
        ),
        Offer::Failed(reason) => format!("whether {provider} offers device memory (FI_HMEM) is not known: {reason}"),
    };
    format!(
        "its memory is on {device}: {why}; use the cuda transport, or tcp or ucx, which stage it through host memory"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use libfabric_sys::version;

    #[test]
    fn a_refusal_says_what_the_provider_offers_and_what_to_use() {
        let of = |offer| words(&offer, Version(version(2, 5)), "efa", "rdmap40s0-rdm", "cuda:1");
        for (offer, why) in [
            (Offer::No, "offers no device memory (FI_HMEM) for rdmap40s0-rdm by efa"),
            (Offer::Yes, "no hardware has shown that"),
            (Offer::Failed("fi_getinfo: why".to_owned()), "is not known: fi_getinfo: why"),
        ] {
            let said = of(offer);
            assert!(said.contains(why) && said.contains("cuda:1") && said.ends_with("through host memory"), "{said}");
        }
    }

    /// Of the library that is here: tcp of no version offers it.
    #[test]
    fn tcp_offers_no_device_memory() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
        };
        assert!(refusal(library, "tcp", "lo", "cuda:0").contains("offers no device memory"));
    }
}
