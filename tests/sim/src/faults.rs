//! What may go wrong in a simulated cluster.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use crate::weather::Weather;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $word:literal),+ $(,)?) => {
        /// Kinds of fault, each of which a run may have or not.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum FaultKind {
            $($(#[$doc])* $kind),+
        }

        impl FaultKind {
            /// All of them.
            pub const ALL: &[FaultKind] = &[$(FaultKind::$kind),+];

            /// The word used in command lines.
            pub fn name(self) -> &'static str {
                match self {
                    $(FaultKind::$kind => $word),+
                }
            }
        }
    };
}

kinds! {
    /// Control frames are lost.
    Loss = "loss",
    /// Control frames come twice.
    Duplication = "duplication",
    /// Control frames are late.
    Delay = "delay",
    /// Control frames overtake each other.
    Reordering = "reordering",
    /// Nodes cannot reach each other for a while, in one direction or both.
    Partitions = "partitions",
    /// Nobody reaches the scheduler and its directory for a while.
    DirectoryOutage = "directory-outage",
    /// Worker nodes crash and come back in their next epoch.
    Crashes = "crashes",
    /// Nodes that lead a group crash and come back.
    LeaderLoss = "leader-loss",
    /// The scheduler crashes and comes back.
    SchedulerCrash = "scheduler-crash",
    /// Nodes, the scheduler among them, stand still for a while; their NICs go on.
    Pauses = "pauses",
    /// NICs die, with errors or without a word, and come back.
    NicDeath = "nic-death",
    /// NICs are slow for a while.
    SlowNics = "slow-nics",
    /// Transfers end in errors although bytes have landed.
    CompletionErrors = "completion-errors",
    /// NICs cannot reach each other for a while.
    DataCuts = "data-cuts",
    /// Clocks go at different rates, within the stated margin.
    ClockDrift = "clock-drift",
    /// Users cancel requests at any time.
    Cancels = "cancels",
    /// Decode engines are slow to find blocks, or find none.
    NoRoom = "no-room",
    /// Leases are short, and run out at bad times.
    ShortLeases = "short-leases",
    /// Some nodes speak the protocol before this one.
    OldPeers = "old-peers",
    /// Alarms ring late, as on nodes that have too much to do: what ran out at its time is met before anybody has noticed.
    LateAlarms = "late-alarms",
    /// Prefill nodes are told to leave: they drain, end, and come back in their next epoch.
    Drains = "drains",
}

impl FaultKind {
    /// Whether it is how a run is, from its beginning to its end: nothing begins, and healing mends nothing.
    pub fn is_lasting(self) -> bool {
        matches!(
            self,
            FaultKind::ClockDrift
                | FaultKind::Cancels
                | FaultKind::NoRoom
                | FaultKind::ShortLeases
                | FaultKind::OldPeers
                | FaultKind::LateAlarms
        )
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that is no kind of fault.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no fault called {word:?}; there are all, none, or a list of {known}")]
pub struct UnknownFault {
    /// The word.
    pub word: String,
    /// All that there are.
    pub known: String,
}

/// Kinds of fault that a run may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultSet {
    kinds: Vec<FaultKind>,
}

impl FaultSet {
    /// Every kind.
    pub fn all() -> Self {
        FaultSet { kinds: FaultKind::ALL.to_vec() }
    }

    /// No kind.
    pub fn none() -> Self {
        FaultSet { kinds: Vec::new() }
    }

    /// Those of this set that `keep` keeps.
    pub fn filter(&self, mut keep: impl FnMut(FaultKind) -> bool) -> Self {
        FaultSet { kinds: self.kinds.iter().copied().filter(|kind| keep(*kind)).collect() }
    }

    /// Whether it has that kind.
    pub fn has(&self, kind: FaultKind) -> bool {
        self.kinds.contains(&kind)
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }
}

impl FromStr for FaultSet {
    type Err = UnknownFault;

    fn from_str(list: &str) -> Result<Self, UnknownFault> {
        match list {
            "all" => return Ok(FaultSet::all()),
            "none" => return Ok(FaultSet::none()),
            _ => {}
        }
        let known = || FaultKind::ALL.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(",");
        let kind = |word: &str| {
            let found = FaultKind::ALL.iter().copied().find(|kind| kind.name() == word);
            found.ok_or_else(|| UnknownFault { word: word.to_owned(), known: known() })
        };
        let mut kinds = list.split(',').map(kind).collect::<Result<Vec<_>, _>>()?;
        kinds.sort_unstable();
        kinds.dedup();
        Ok(FaultSet { kinds })
    }
}

impl fmt::Display for FaultSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kinds.len() == FaultKind::ALL.len() {
            return f.write_str("all");
        }
        if self.kinds.is_empty() {
            return f.write_str("none");
        }
        f.write_str(&self.kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(","))
    }
}

/// One fault. Nodes are numbered as in the world.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// A node is down; what had left its NICs lands or not.
    Down {
        /// Which node.
        node: usize,
        /// Whether its last slices land.
        late_writes: bool,
    },
    /// A node stands still.
    Pause {
        /// Which node.
        node: usize,
    },
    /// Control frames from some nodes to others vanish.
    Partition {
        /// From these.
        from: Vec<usize>,
        /// To these.
        to: Vec<usize>,
        /// And the other way.
        both_ways: bool,
    },
    /// Control frames have a hard time everywhere.
    Weather(Weather),
    /// A NIC is dead.
    NicDead {
        /// Whose.
        node: usize,
        /// Which of its NICs.
        nic: usize,
        /// Whether it says nothing instead of reporting errors.
        silent: bool,
    },
    /// A NIC is slow.
    NicSlow {
        /// Whose.
        node: usize,
        /// Which of its NICs.
        nic: usize,
        /// How many times slower.
        factor: u32,
    },
    /// No bytes pass from one node's NICs to another's.
    DataCut {
        /// From this node.
        from: usize,
        /// To this one.
        to: usize,
    },
    /// Of a million transfers, so many end in errors.
    CompletionErrors(u32),
    /// A prefill node leaves once nothing is offered there any more.
    Drain {
        /// Which node.
        node: usize,
        /// After that long, whatever is offered.
        within: Duration,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Down { node, late_writes: false } => write!(f, "n{node} is down"),
            Fault::Down { node, late_writes: true } => write!(f, "n{node} is down, its last writes land"),
            Fault::Pause { node } => write!(f, "n{node} stands still"),
            Fault::Partition { from, to, both_ways } => {
                let arrow = if *both_ways { "<-x->" } else { "-x->" };
                write!(f, "control {} {arrow} {}", Nodes(from), Nodes(to))
            }
            Fault::Weather(weather) => write!(f, "control frames: {weather:?}"),
            Fault::NicDead { node, nic, silent: true } => write!(f, "NIC {nic} of n{node} is a black hole"),
            Fault::NicDead { node, nic, silent: false } => write!(f, "NIC {nic} of n{node} is dead"),
            Fault::NicSlow { node, nic, factor } => write!(f, "NIC {nic} of n{node} is {factor} times slower"),
            Fault::DataCut { from, to } => write!(f, "data n{from} -x-> n{to}"),
            Fault::Drain { node, within } => write!(f, "n{node} leaves within {within:?}"),
            Fault::CompletionErrors(ppm) => write!(f, "{ppm} of a million transfers end in errors"),
        }
    }
}

struct Nodes<'a>(&'a [usize]);

impl fmt::Display for Nodes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [node] => write!(f, "n{node}"),
            [first, .., last] if last - first + 1 == self.0.len() => write!(f, "n{first}..n{last}"),
            nodes => write!(f, "{} nodes", nodes.len()),
        }
    }
}

/// A fault at a time of a run's first phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// When it begins, in nanoseconds of the world.
    pub at: u64,
    /// How long it lasts; healing ends it sooner.
    pub lasts: Duration,
    /// What.
    pub fault: Fault,
}
