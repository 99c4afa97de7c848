//! What a context is configured with: ours per context, a user's `UCX_*` variables before ours.

use crate::device::{Access, Method};
use crate::library::Version;

/// Bytes of one segment of UCX's tcp: a whole chunk of ours and its headers fit.
const TCP_SEGMENT: &str = "256k";

/// How long the kernel keeps bytes for a peer that takes none, as UCX reads it: much longer than peers are waited for.
const TCP_SILENCE: &str = "60s";

/// A setting of a context, as `UCX_<key>` would say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) key: &'static str,
    pub(crate) value: &'static str,
}

/// What UCX is told beside the device, by method and version; a version is not given a key that it does not know.
pub(crate) fn settings(method: Method, access: Access, version: Version) -> Vec<Setting> {
    let one_sided = access == Access::OneSided;
    let mut list = vec![
        ("TLS", method.transports(), Version(0, 0, 0)),
        ("ADDRESS_VERSION", "v2", Version(1, 13, 0)),
        // A dead peer behind shared memory is noticed by asking only; the default is 20 s.
        ("KEEPALIVE_INTERVAL", "2s", Version(0, 0, 0)),
    ];
    if one_sided {
        // With peer failure handling UCX takes only lanes for RMA whose keys it can revoke, unless there is no rendezvous: it would then
        // emulate RMA over messages without a word.
        list.push(("RNDV_THRESH", "inf", Version(0, 0, 0)));
    }
    match method {
        // Messages of `memory` go over tcp, too: shared memory has no way to notice a dead peer.
        Method::Tcp | Method::Memory => {
            // A send without copies that fails is ended twice by UCX's tcp, up to 1.22 at least: builds with assertions, as Debian's, end the
            // process, so that a peer that dies would take this one with it. Copying costs no processor time that could be measured.
            list.push(("ZCOPY_THRESH", "inf", Version(0, 0, 0)));
            // Otherwise UCX waits inside the call for a host to answer, minutes where it is silent, and everything of this device with it; and
            // an endpoint that is refused there leaves its socket open (`uct_tcp_ep_create`, up to 1.22 at least).
            list.push(("TCP_CONN_NB", "y", Version(0, 0, 0)));
            list.push(("TCP_TX_SEG_SIZE", TCP_SEGMENT, Version(0, 0, 0)));
            list.push(("TCP_RX_SEG_SIZE", TCP_SEGMENT, Version(0, 0, 0)));
            // Who takes nothing is given up, and so is what waits to be sent there: no endpoint is kept for it for ever.
            list.push(("TCP_USER_TIMEOUT", TCP_SILENCE, Version(1, 22, 0)));
        }
        // One device, one rail.
        Method::Verbs => list.push(("MAX_RMA_RAILS", "1", Version(1, 14, 0))),
        Method::Srd => {
            list.push(("MAX_RMA_RAILS", "1", Version(1, 14, 0)));
            if one_sided {
                // Losing zero-copy is then an error instead of a crawl.
                list.push(("PROTO_EMULATION_ENABLE", "n", Version(1, 22, 0)));
            }
        }
    }
    let known = list.into_iter().filter(|(_, _, since)| version >= *since);
    known.map(|(key, value, _)| Setting { key, value }).collect()
}

/// What `ucp_config_modify` calls a setting of a transport: before 1.17 it knew them without the transport's name.
pub(crate) fn name_of(key: &str, version: Version) -> &str {
    if version < Version(1, 17, 0) { key.strip_prefix("TCP_").unwrap_or(key) } else { key }
}

/// Whether the environment sets this key.
pub(crate) fn is_users(key: &str) -> bool {
    std::env::var_os(format!("UCX_{key}")).is_some()
}

/// What a key is set to: a user's value counts, else ours.
pub(crate) fn in_force(key: &str, ours: &str) -> String {
    std::env::var_os(format!("UCX_{key}")).map_or_else(|| ours.to_owned(), |value| value.to_string_lossy().into_owned())
}

/// The user's variables as the end of a sentence on what failed; nothing where there are none.
pub(crate) fn told() -> String {
    of_users(&users())
}

fn of_users(users: &[String]) -> String {
    if users.is_empty() { String::new() } else { format!("; the environment sets {}", users.join(" ")) }
}

/// Which of our settings a user's variables replace, and by what, for people.
pub(crate) fn replaced(method: Method, access: Access, version: Version) -> Vec<String> {
    replaced_by(&settings(method, access, version), &users())
}

fn replaced_by(ours: &[Setting], users: &[String]) -> Vec<String> {
    let is_ours = |user: &&String| {
        let key = user.strip_prefix("UCX_").and_then(|user| user.split_once('=')).map(|(key, _)| key);
        key == Some("NET_DEVICES") || ours.iter().any(|setting| key == Some(setting.key))
    };
    users.iter().filter(is_ours).cloned().collect()
}

/// The `UCX_*` variables of this process, sorted, for people.
pub(crate) fn users() -> Vec<String> {
    let mut found: Vec<String> = std::env::vars_os()
        .filter_map(|(key, value)| {
            let key = key.to_str()?.to_owned();
            key.starts_with("UCX_").then(|| format!("{key}={}", value.to_string_lossy()))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(method: Method, version: Version) -> Vec<&'static str> {
        settings(method, Access::OneSided, version).into_iter().map(|setting| setting.key).collect()
    }

    #[test]
    fn a_key_is_called_as_the_version_calls_it() {
        let names = [Version(1, 13, 1), Version(1, 17, 0)].map(|version| name_of("TCP_CONN_NB", version));
        assert_eq!(names, ["CONN_NB", "TCP_CONN_NB"]);
        assert_eq!(name_of("ZCOPY_THRESH", Version(1, 13, 1)), "ZCOPY_THRESH");
    }

    #[test]
    fn no_version_is_given_a_key_that_it_does_not_know() {
        let old = Version(1, 13, 1);
        let of_old = ["TLS", "ADDRESS_VERSION", "KEEPALIVE_INTERVAL", "RNDV_THRESH", "ZCOPY_THRESH", "TCP_CONN_NB"];
        assert_eq!(keys(Method::Tcp, old), [&of_old[..], &["TCP_TX_SEG_SIZE", "TCP_RX_SEG_SIZE"]].concat());
        for method in [Method::Tcp, Method::Memory] {
            assert!(!keys(method, Version(1, 21, 0)).contains(&"TCP_USER_TIMEOUT"));
            assert!(keys(method, Version(1, 22, 0)).contains(&"TCP_USER_TIMEOUT"));
        }
        assert!(!keys(Method::Srd, Version(1, 20, 0)).contains(&"PROTO_EMULATION_ENABLE"));
        assert!(keys(Method::Srd, Version(1, 20, 0)).contains(&"MAX_RMA_RAILS"));
    }

    #[test]
    fn nothing_is_sent_over_tcp_without_copies() {
        let inf = Setting { key: "ZCOPY_THRESH", value: "inf" };
        for access in [Access::OneSided, Access::TwoSided] {
            for version in [Version(1, 13, 1), Version(1, 22, 0)] {
                let copies = |method| settings(method, access, version).contains(&inf);
                assert_eq!(
                    [Method::Tcp, Method::Memory, Method::Srd, Method::Verbs].map(copies),
                    [true, true, false, false]
                );
            }
        }
    }

    #[test]
    fn what_a_user_replaces_is_told_from_what_he_adds() {
        let users =
            ["UCX_LOG_LEVEL=info", "UCX_NET_DEVICES=eth9", "UCX_RNDV_THRESH=8k", "UCX_TLS=tcp"].map(str::to_owned);
        let ours = settings(Method::Memory, Access::OneSided, Version(1, 22, 0));
        assert_eq!(replaced_by(&ours, &users), users[1..]);
        // Ours only where reads are one-sided.
        let ours = settings(Method::Memory, Access::TwoSided, Version(1, 22, 0));
        assert_eq!(replaced_by(&ours, &users), [users[1].clone(), users[3].clone()]);
        assert_eq!(of_users(&users[..1]), "; the environment sets UCX_LOG_LEVEL=info");
        assert_eq!(of_users(&[]), "");
    }

    #[test]
    fn both_sides_need_rendezvous() {
        for method in [Method::Memory, Method::Tcp, Method::Srd, Method::Verbs] {
            let list = settings(method, Access::TwoSided, Version(1, 22, 0));
            assert!(list.iter().all(|s| s.key != "RNDV_THRESH" && s.key != "PROTO_EMULATION_ENABLE"), "{list:?}");
        }
    }

    #[test]
    fn emulation_is_forbidden_for_srd_only() {
        for method in [Method::Memory, Method::Tcp, Method::Verbs] {
            assert!(!keys(method, Version(1, 22, 0)).contains(&"PROTO_EMULATION_ENABLE"), "{method:?}");
        }
        assert!(keys(Method::Srd, Version(1, 22, 0)).contains(&"PROTO_EMULATION_ENABLE"));
        let srd = settings(Method::Srd, Access::OneSided, Version(1, 22, 0));
        assert!(srd.contains(&Setting { key: "RNDV_THRESH", value: "inf" }), "{srd:?}");
        assert!(srd.contains(&Setting { key: "TLS", value: "srd" }), "{srd:?}");
    }
}
