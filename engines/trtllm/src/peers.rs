//! Who is on the other side, and what carries a method to them.

use serde::Serialize;

use crate::plan::{Carrier, Method, NixlBackend};

/// Who is on the other side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peers {
    /// kvferry's own nodes.
    #[default]
    Kvferry,
    /// NIXL agents of other programs.
    Nixl,
}

/// What carries a method, why, and what to know about it.
pub(crate) struct Carried {
    pub(crate) carrier: Carrier,
    pub(crate) reason: String,
    /// A finding's code, message and remedy.
    pub(crate) note: (&'static str, String, Option<String>),
}

/// A method that does not reach such peers: a finding's code, message and remedy.
pub(crate) struct Unreachable(pub(crate) &'static str, pub(crate) String, pub(crate) String);

impl Peers {
    pub(crate) fn carried(self, method: Method) -> Result<Carried, Unreachable> {
        match self {
            Peers::Kvferry => Ok(by_transport(method)),
            Peers::Nixl => by_nixl(method),
        }
    }
}

fn by_transport(method: Method) -> Carried {
    let (name, carrier) = (method.name(), method.carrier());
    let both = "run kvferry on both the prefill and the decode side";
    let (wire, remedy, reason) = match method {
        Method::Nixl(_) => (
            "these are kvferry's own agents and not wire-compatible with NIXL agents",
            format!("{both}; where the peer is a NIXL agent, --peers nixl tells what speaks to it"),
            format!("{name} is carried by kvferry's {} transport", carrier.name()),
        ),
        Method::Ucx => (
            "these are kvferry's own endpoints and not wire-compatible with TensorRT-LLM's",
            both.to_owned(),
            "UCX is carried by kvferry's ucx transport, by its two-sided method: messages by rendezvous, no remote keys"
                .to_owned(),
        ),
    };
    Carried { carrier, reason, note: ("own-wire", format!("{name}: {wire}"), Some(remedy)) }
}

fn by_nixl(method: Method) -> Result<Carried, Unreachable> {
    match method {
        Method::Nixl(NixlBackend::Ucx) => Ok(Carried {
            carrier: Carrier::Nixl,
            reason: "the peer is a NIXL agent: kvferry's NIXL engine speaks its protocol over UCX, without libnixl"
                .to_owned(),
            note: (
                "nixl-wire",
                "NIXL with UCX: reads, writes and notifications as NIXL's; no programs, leases, fences or authentication, \
                 and requests are agreed upon by the serving stacks themselves"
                    .to_owned(),
                Some("have UCX 1.22 or later, and embed `kvferry::nixl::Agent`; `kvferry bench --transport nixl` measures it".to_owned()),
            ),
        }),
        Method::Nixl(NixlBackend::Libfabric) => Err(Unreachable(
            "nixl-over-libfabric",
            "NIXL agents with LIBFABRIC speak a protocol of their own there, which kvferry does not speak".to_owned(),
            "set TRTLLM_NIXL_KVCACHE_BACKEND=UCX on both sides, or run kvferry on both".to_owned(),
        )),
        Method::Ucx => Err(Unreachable(
            "no-nixl",
            "`backend: UCX` is TensorRT-LLM's own protocol over UCX, which no NIXL agent speaks".to_owned(),
            "set `backend: NIXL`".to_owned(),
        )),
    }
}
