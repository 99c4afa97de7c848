//! What is done to ranks on purpose.

use kvferry::Role;

use crate::error::UsageError;

/// A signal for one rank once enough transfers have started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) action: Action,
    pub(crate) role: Role,
    /// Counted over all groups of its side.
    pub(crate) rank: u64,
    /// Which start of a transfer is the moment, counted from 1.
    pub(crate) at: u64,
}

/// How a rank is hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Kill,
    Stop,
}

impl Fault {
    /// Reads `prefill:1@3`; `ranks` are those of the prefill and the decode side.
    pub(crate) fn parse(action: Action, value: &str, ranks: (u64, u64), in_process: bool) -> Result<Fault, UsageError> {
        let option = match action {
            Action::Kill => "kill",
            Action::Stop => "stop",
        };
        let wrong = || UsageError::Fault { option, value: value.to_owned() };
        let (role, rest) = value.split_once(':').ok_or_else(wrong)?;
        let (rank, at) = rest.split_once('@').ok_or_else(wrong)?;
        let (role, count) = match role {
            "prefill" => (Role::Prefill, ranks.0),
            "decode" => (Role::Decode, ranks.1),
            _ => return Err(wrong()),
        };
        let (rank, at): (u64, u64) = (rank.parse().map_err(|_| wrong())?, at.parse().map_err(|_| wrong())?);
        if at == 0 {
            return Err(wrong());
        }
        if rank >= count {
            return Err(UsageError::FaultRank { option, value: value.to_owned(), role, last: count.saturating_sub(1) });
        }
        if in_process {
            return Err(UsageError::FaultInProcess { option, value: value.to_owned() });
        }
        Ok(Fault { action, role, rank, at })
    }
}
