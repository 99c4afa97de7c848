//! What a bench measures: one of kvferry's transports, or NIXL's protocol.

use kvferry::TransportKind;
use kvferry::transport::providers;

/// The word for NIXL's protocol, which is no transport of kvferry's nodes.
const NIXL: &str = "nixl";

/// How the bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// One of kvferry's transports.
    Transport(TransportKind),
    /// Reads and writes by NIXL's protocol over UCX.
    Nixl,
}

impl Way {
    /// Every word that names one.
    pub(crate) fn words() -> Vec<&'static str> {
        providers().iter().map(|provider| provider.kind().name()).chain([NIXL]).collect()
    }

    pub(crate) fn parse(word: &str) -> Result<Way, String> {
        match word {
            NIXL => Ok(Way::Nixl),
            _ => word.parse().map(Way::Transport),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Transport(kind) => kind.name(),
            Way::Nixl => NIXL,
        }
    }

    pub(crate) fn is(self, kind: TransportKind) -> bool {
        self == Way::Transport(kind)
    }
}
