//! Everything about a run that its seed decides.

use std::collections::BTreeSet;
use std::time::Duration;

use kvferry_actors::SESSIONS_EAGER_MAX;
use kvferry_core::protocol::{DeadlineTerms, LeaseTerms, QuarantineTerms, RailTerms, SchedulerTerms, SessionTerms};
use kvferry_core::{Direction, Order};
use kvferry_fabric_sim::{Delivery, FabricOptions, FenceBy};
use thiserror::Error;

use crate::cluster::{ClusterOptions, GroupOptions};
use crate::desk::RoomTrouble;
use crate::dice::Dice;
use crate::faults::{FaultKind, FaultSet, Planned};
use crate::plant::Plant;
use crate::storm;
use crate::world::WorldOptions;

/// Sessions of decode ranks with prefill ranks that are made in one run before any is needed.
const SESSIONS_MAX: usize = 1 << 16;

/// What a run's user decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Prefill ranks, each a node.
    pub prefill: u32,
    /// Decode ranks, each a node.
    pub decode: u32,
    /// Ranks of a prefill group; `None` for 4, 2 or 1, whichever divides.
    pub prefill_tp: Option<u32>,
    /// Ranks of a decode group; `None` for 4, 2 or 1, whichever divides.
    pub decode_tp: Option<u32>,
    /// NICs of every node.
    pub nics: u32,
    /// NICs that share what one rank reads from another, at most; `None` leaves it to the seed.
    pub rails: Option<u32>,
    /// Requests of the first wave.
    pub requests: u64,
    /// Faults that the run may have.
    pub faults: FaultSet,
    /// A bug, to see that it is found.
    pub plant: Option<Plant>,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            prefill: 8,
            decode: 8,
            prefill_tp: None,
            decode_tp: None,
            nics: 2,
            rails: None,
            requests: 200,
            faults: FaultSet::all(),
            plant: None,
        }
    }
}

impl Shape {
    /// Requests that follow once all is mended.
    pub fn second_wave(&self) -> u64 {
        (self.requests / 4).clamp(1, 64)
    }
}

/// Why there is no such run.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// There is nothing to simulate.
    #[error("there are no {0}: give at least one")]
    Nothing(&'static str),
    /// Ranks cannot be cut into groups.
    #[error("{ranks} {side} ranks make no whole groups of {tp}; give a multiple of {tp}, or another --{side}-tp")]
    Uneven {
        /// Which side.
        side: &'static str,
        /// Ranks.
        ranks: u32,
        /// Ranks of a group.
        tp: u32,
    },
    /// Groups are too wide for the simulated model.
    #[error(
        "--{side}-tp {tp}: the simulated model has 4 heads, which {tp} ranks cannot share evenly; give 1, 2, 4 or 8"
    )]
    TooWide {
        /// Which side.
        side: &'static str,
        /// Ranks of a group.
        tp: u32,
    },
}

/// One run, derived from its seed.
#[derive(Clone, Debug)]
pub struct Config {
    /// The seed.
    pub seed: u64,
    /// What the user decided.
    pub shape: Shape,
    /// The faults that this run has: those that the user allows, less some that the seed switches off.
    pub faults: FaultSet,
    /// The cluster.
    pub cluster: ClusterOptions,
    /// Over which time the first wave is submitted.
    pub spread: Duration,
    /// When the first phase ends and everything is mended.
    pub heal_at: Duration,
    /// Of a million requests, so many are cancelled.
    pub cancelled_ppm: u32,
    /// At most so long after they were submitted.
    pub cancelled_within: Duration,
    /// What goes wrong, and when.
    pub plan: Vec<Planned>,
    /// How long everything may take to end once all is mended, and how long to be back after that.
    pub bound: Duration,
}

impl Config {
    /// What a seed makes of a shape.
    pub fn from_seed(seed: u64, shape: &Shape) -> Result<Config, ShapeError> {
        let (prefill_tp, decode_tp) = (
            group_size("prefill", shape.prefill, shape.prefill_tp)?,
            group_size("decode", shape.decode, shape.decode_tp)?,
        );
        if shape.nics == 0 {
            return Err(ShapeError::Nothing("NICs"));
        }
        let mut swarm = Dice::new(seed, "swarm", 0);
        // Half of the kinds, on average; a run in eight has all of them.
        let everything = swarm.below(8) == 0;
        let faults = shape.faults.filter(|_| swarm.below(2) == 0 || everything);
        let mut dice = Dice::new(seed, "config", 0);
        let mut cluster = ClusterOptions::tiny(seed);
        let block = |dice: &mut Dice| [4, 8, 16, 32, 48][dice.below(5) as usize];
        let order = |dice: &mut Dice| if dice.below(2) == 0 { Order::Nhd } else { Order::Hnd };
        let tokens_max = dice.within(16..200);
        let side = |dice: &mut Dice, ranks: u32, tp: u32| {
            let block_tokens = block(dice);
            let per_request = (tokens_max as u32).div_ceil(block_tokens);
            let blocks = per_request * dice.within(3..20) as u32;
            GroupOptions { groups: ranks / tp, tp, block_tokens, order: order(dice), blocks }
        };
        cluster.prefill = side(&mut dice, shape.prefill, prefill_tp);
        cluster.decode = side(&mut dice, shape.decode, decode_tp);
        cluster.tokens = 1..tokens_max + 1;
        cluster.direction = [None, Some(Direction::Pull), Some(Direction::Push)][dice.below(3) as usize];
        cluster.layers_per_step = [None, Some(1)][dice.below(2) as usize];
        cluster.nics = shape.nics;
        cluster.rails = rails(seed, shape);
        cluster.handovers_max = dice.within(2..12) as u32;
        if dice.below(3) == 0 {
            cluster.sessions_eager_max = dice.below(6) as usize;
        }
        let beat = dice.within(200..1000);
        cluster.session = SessionTerms {
            handshake_within: millis(dice.within(1000..4000)),
            beat_every: millis(beat),
            silence_max: millis(beat * dice.within(3..7)),
            resume_within: millis(dice.within(300..2000)),
        };
        // In a run in four nearly all sessions are made when they are needed; thousands of ranks do not all meet in one process.
        let mut sessions = Dice::new(seed, "sessions", 0);
        let most = (SESSIONS_MAX / shape.decode.max(1) as usize).min(SESSIONS_EAGER_MAX);
        cluster.sessions_eager_max = if sessions.below(4) == 0 { sessions.below(4) as usize } else { most };
        let short = faults.has(FaultKind::ShortLeases);
        let duration = millis(if short { dice.within(150..1500) } else { dice.within(4_000..20_000) });
        cluster.leases = LeaseTerms { duration, ..LeaseTerms::default() };
        cluster.deadlines = DeadlineTerms {
            floor: millis(dice.within(1_000..4_000)),
            cap: millis(dice.within(5_000..12_000)),
            prefill: millis(dice.within(8_000..20_000)),
            ..DeadlineTerms::default()
        };
        cluster.quarantine =
            QuarantineTerms { fence_after: millis(dice.within(50..2_000)), share_max: dice.within(250..900) as u32 };
        cluster.scheduler = SchedulerTerms {
            queue_within: millis(60_000),
            prefill_within: millis(dice.within(10_000..30_000)),
            pair_within: millis(60_000),
            outcome_within: cluster.deadlines.backstop() + millis(10_000),
            attempts_max: dice.within(2..5) as u32,
            leases: cluster.leases,
            regroup_within: regroup(seed),
            ..SchedulerTerms::default()
        };
        cluster.world = WorldOptions {
            link_latency: micros(dice.within(5..100)),
            link_jitter: micros(dice.within(1..100)),
            fabric: FabricOptions {
                bytes_per_second: 1_000_000_000 * dice.within(1..50),
                latency: micros(dice.within(1..20)),
                jitter: micros(dice.below(20)),
                delivery: if dice.below(2) == 0 { Delivery::Ordered } else { Delivery::Unordered },
                slice_bytes: 256 << dice.below(9),
                window: dice.within(1..8) as u32,
                depth: dice.within(4..128) as usize,
                retry_for: millis(dice.within(1..60)),
                fence_by: if dice.below(2) == 0 { FenceBy::Endpoint } else { FenceBy::Rekeying },
                ..FabricOptions::default()
            },
            // Any two clocks then differ by less than the leases' margin.
            clock_drift_ppm: if faults.has(FaultKind::ClockDrift) { cluster.leases.drift_ppm / 2 - 1 } else { 0 },
            plant: shape.plant,
            ..cluster.world
        };
        if faults.has(FaultKind::NoRoom) {
            cluster.room = RoomTrouble { refused_ppm: 10_000, slow_ppm: dice.within(10_000..300_000) as u32 };
        }
        if faults.has(FaultKind::OldPeers) {
            let nodes = u64::from(shape.prefill + shape.decode) + 1;
            let count = 1 + dice.below(1 + nodes / 8);
            cluster.old_peers = (0..count).map(|_| dice.below(nodes) as usize).collect::<BTreeSet<usize>>();
        }
        if faults.has(FaultKind::LateAlarms) {
            cluster.world.alarms_late_by = millis(1 << Dice::new(seed, "alarms", 0).below(9));
        }
        let spread = Duration::from_micros(shape.requests.saturating_mul(dice.within(500..8_000)));
        let heal_at = millis(50) + spread + millis(dice.within(10..1_500));
        let mut config = Config {
            seed,
            shape: shape.clone(),
            cancelled_ppm: if faults.has(FaultKind::Cancels) { dice.within(10_000..300_000) as u32 } else { 0 },
            cancelled_within: micros(10 << dice.below(14)),
            bound: bound(&cluster),
            faults,
            cluster,
            spread,
            heal_at,
            plan: Vec::new(),
        };
        config.plan = storm::plan(&config);
        Ok(config)
    }

    /// All nodes, the scheduler's included.
    pub fn nodes(&self) -> usize {
        (self.shape.prefill + self.shape.decode) as usize + 1
    }
}

/// In a run in two all NICs of a rank share what it reads or pushes. Shares are small, and so is the patience with them: programs are, too.
fn rails(seed: u64, shape: &Shape) -> RailTerms {
    let mut dice = Dice::new(seed, "rails", 0);
    let drawn = if dice.below(2) == 0 { 1 } else { shape.nics };
    RailTerms {
        rails_max: shape.rails.unwrap_or(drawn),
        share_bytes_min: 64 << dice.below(8),
        silent_after: micros(50 << dice.below(12)),
        slack: dice.within(1..8) as u32,
        initial_bytes_per_second: 100_000_000 << dice.below(6),
        rest: micros(500 << dice.below(10)),
        rest_max: millis(dice.within(500..5_000)),
        wired_within: micros(dice.below(2) * (50 << dice.below(12))),
    }
}

/// In half of all runs requests wait for groups that lost a rank.
fn regroup(seed: u64) -> Duration {
    let mut dice = Dice::new(seed, "regroup", 0);
    millis(dice.below(2) * dice.within(1..10_000))
}

/// The longest that anything may wait by its own terms, over all attempts.
fn bound(cluster: &ClusterOptions) -> Duration {
    let SchedulerTerms { queue_within, prefill_within, pair_within, outcome_within, attempts_max, .. } =
        cluster.scheduler;
    let attempt = prefill_within + pair_within + outcome_within + cluster.session.silence_max;
    // Groups that leave may give a request back four times, which costs no attempt.
    let given_back = (queue_within + prefill_within) * 4;
    queue_within
        + given_back
        + attempt * attempts_max
        + cluster.leases.duration * 2
        + cluster.quarantine.fence_after * 4
}

fn group_size(side: &'static str, ranks: u32, tp: Option<u32>) -> Result<u32, ShapeError> {
    if ranks == 0 {
        return Err(ShapeError::Nothing(if side == "prefill" { "prefill ranks" } else { "decode ranks" }));
    }
    let fitting = || [4, 2, 1].into_iter().find(|tp| ranks.is_multiple_of(*tp)).unwrap_or(1);
    let tp = tp.unwrap_or_else(fitting);
    if ![1, 2, 4, 8].contains(&tp) {
        return Err(ShapeError::TooWide { side, tp });
    }
    if !ranks.is_multiple_of(tp) {
        return Err(ShapeError::Uneven { side, ranks, tp });
    }
    Ok(tp)
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}
