//! What is done to ranks and to the scheduler on purpose.

use std::time::Duration;

use kvferry::Role;

use crate::error::UsageError;

/// Longest moment and pause: a typo must not hang the run.
const MILLISECONDS_MAX: u64 = 600_000;

/// A signal for one process, at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) action: Action,
    pub(crate) target: Target,
    pub(crate) at: When,
}

/// How a process is hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// SIGKILL.
    Kill,
    /// SIGTERM: a prefill rank drains and leaves.
    Drain,
    /// SIGSTOP, and SIGKILL once it is declared lost.
    Stop,
    /// SIGSTOP, and SIGCONT after so long; `None` for longer than peers put up with.
    Pause(Option<Duration>),
}

/// Who is hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Scheduler,
    /// Counted over all groups of its side.
    Rank {
        role: Role,
        rank: u64,
    },
}

/// The moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Which start of a transfer, counted from 1.
    Transfer(u64),
    /// Since the first submission.
    After(Duration),
}

impl Fault {
    /// Reads `prefill:1@3`, `scheduler@3` and, where the fault is by time, `prefill:1@250ms`; a pause may end in `+800`, its milliseconds.
    /// `ranks` are those of the prefill and the decode side.
    pub(crate) fn parse(action: Action, value: &str, ranks: (u64, u64), in_process: bool) -> Result<Fault, UsageError> {
        let option = action.option();
        let wrong = || UsageError::Fault { option, value: value.to_owned() };
        let (target, moment) = value.split_once('@').ok_or_else(wrong)?;
        let (moment, action) = match (action, moment.split_once('+')) {
            (Action::Pause(_), Some((moment, length))) => {
                (moment, Action::Pause(Some(milliseconds(length).ok_or_else(wrong)?)))
            }
            _ => (moment, action),
        };
        let at = match moment.strip_suffix("ms") {
            Some(after) => When::After(milliseconds(after).ok_or_else(wrong)?),
            None => When::Transfer(moment.parse().ok().filter(|at| *at > 0).ok_or_else(wrong)?),
        };
        let target = match target.split_once(':') {
            None if target == "scheduler" => Target::Scheduler,
            None => return Err(wrong()),
            Some((role, rank)) => {
                let (role, count) = match role {
                    "prefill" => (Role::Prefill, ranks.0),
                    "decode" => (Role::Decode, ranks.1),
                    _ => return Err(wrong()),
                };
                let rank = rank.parse().map_err(|_| wrong())?;
                if rank >= count {
                    let (value, last) = (value.to_owned(), count.saturating_sub(1));
                    return Err(UsageError::FaultRank { option, value, role, last });
                }
                Target::Rank { role, rank }
            }
        };
        if action == Action::Drain && !matches!(target, Target::Rank { role: Role::Prefill, .. }) {
            return Err(UsageError::DrainTarget { value: value.to_owned() });
        }
        if in_process {
            return Err(UsageError::FaultInProcess { option, value: value.to_owned() });
        }
        Ok(Fault { action, target, at })
    }

    /// Whether its moment is a start of a transfer that has come.
    pub(crate) fn is_due(&self, started: u64) -> bool {
        matches!(self.at, When::Transfer(at) if at <= started)
    }
}

impl Action {
    fn option(self) -> &'static str {
        match self {
            Action::Kill => "kill",
            Action::Drain => "drain",
            Action::Stop => "stop",
            Action::Pause(_) => "pause",
        }
    }
}

fn milliseconds(text: &str) -> Option<Duration> {
    text.parse().ok().filter(|count| *count <= MILLISECONDS_MAX).map(Duration::from_millis)
}
