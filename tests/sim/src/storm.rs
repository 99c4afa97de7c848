//! When what goes wrong, and how it is done and undone.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use kvferry_fabric_sim::{NicDeath, OnTheWire};

use crate::chronicle::What;
use crate::config::Config;
use crate::dice::Dice;
use crate::faults::{Fault, FaultKind, Planned};
use crate::weather::Weather;
use crate::world::{WithNode, World};
use crate::yard::{SCHEDULER, Yard};

/// What goes wrong in a run's first phase: each kind of fault from a stream of its own.
pub(crate) fn plan(config: &Config) -> Vec<Planned> {
    let mut plan = Vec::new();
    for kind in FaultKind::ALL {
        if config.faults.has(*kind) {
            let mut dice = Dice::new(config.seed, "fault", *kind as u64);
            plan_kind(config, *kind, &mut dice, &mut plan);
        }
    }
    plan.sort_by_key(|planned| planned.at);
    plan
}

fn plan_kind(config: &Config, kind: FaultKind, dice: &mut Dice, plan: &mut Vec<Planned>) {
    let workers = config.nodes() as u64 - 1;
    // More of them in larger and longer runs.
    let seconds = 1 + config.heal_at.as_secs() / 4;
    let times = 1 + dice.below(6 + workers / 8 + seconds.min(8));
    let (prefill_tp, decode_tp) = (config.cluster.prefill.tp, config.cluster.decode.tp);
    let leaders: Vec<usize> = (0..config.cluster.prefill.groups)
        .map(|group| 1 + (group * prefill_tp) as usize)
        .chain((0..config.cluster.decode.groups).map(|group| 1 + (config.shape.prefill + group * decode_tp) as usize))
        .collect();
    for _ in 0..times {
        let worker = 1 + dice.below(workers) as usize;
        let nic = dice.below(u64::from(config.shape.nics)) as usize;
        let (fault, longest_ms) = match kind {
            FaultKind::Loss => {
                let lost_ppm = dice.within(100..20_000) as u32;
                (Fault::Weather(Weather { lost_ppm, ..Weather::default() }), 2_000)
            }
            FaultKind::Duplication => {
                let (doubled_ppm, late_by) = (dice.within(100..20_000) as u32, late(dice));
                (Fault::Weather(Weather { doubled_ppm, late_by, ..Weather::default() }), 2_000)
            }
            FaultKind::Delay => {
                let (late_ppm, late_by) = (dice.within(1_000..200_000) as u32, late(dice));
                (Fault::Weather(Weather { late_ppm, late_by, ..Weather::default() }), 2_000)
            }
            FaultKind::Reordering => {
                let (overtaken_ppm, late_by) = (dice.within(100..20_000) as u32, late(dice));
                (Fault::Weather(Weather { overtaken_ppm, late_by, ..Weather::default() }), 2_000)
            }
            FaultKind::Partitions => {
                let others: Vec<usize> = (0..config.nodes()).filter(|node| *node != worker).collect();
                let to = match dice.below(3) {
                    0 => others,
                    1 => vec![others[dice.below(others.len() as u64) as usize]],
                    _ => others.into_iter().filter(|_| dice.below(2) == 0).collect(),
                };
                (Fault::Partition { from: vec![worker], to, both_ways: dice.below(2) == 0 }, 8_000)
            }
            FaultKind::DirectoryOutage => {
                let to = (1..config.nodes()).collect();
                (Fault::Partition { from: vec![SCHEDULER], to, both_ways: dice.below(2) == 0 }, 8_000)
            }
            FaultKind::Crashes => (Fault::Down { node: worker, late_writes: dice.below(2) == 0 }, 4_000),
            FaultKind::LeaderLoss => {
                let node = leaders[dice.below(leaders.len() as u64) as usize];
                (Fault::Down { node, late_writes: dice.below(2) == 0 }, 4_000)
            }
            FaultKind::SchedulerCrash => (Fault::Down { node: SCHEDULER, late_writes: false }, 4_000),
            // The scheduler's among them.
            FaultKind::Pauses => (Fault::Pause { node: dice.below(workers + 1) as usize }, 10_000),
            FaultKind::NicDeath => (Fault::NicDead { node: worker, nic, silent: dice.below(2) == 0 }, 4_000),
            FaultKind::SlowNics => (Fault::NicSlow { node: worker, nic, factor: 2 << dice.below(12) }, 4_000),
            FaultKind::CompletionErrors => (Fault::CompletionErrors(dice.within(1_000..100_000) as u32), 1_000),
            FaultKind::DataCuts => {
                // Bytes go between the two sides only.
                let prefill = u64::from(config.shape.prefill);
                let from = 1 + dice.below(prefill) as usize;
                let to = 1 + (prefill + dice.below(workers - prefill)) as usize;
                (Fault::DataCut { from, to }, 4_000)
            }
            FaultKind::Drains => {
                let node = 1 + dice.below(u64::from(config.shape.prefill)) as usize;
                (Fault::Drain { node, within: log_uniform(dice, 2_000) }, 1)
            }
            FaultKind::ClockDrift
            | FaultKind::Cancels
            | FaultKind::NoRoom
            | FaultKind::ShortLeases
            | FaultKind::OldPeers
            | FaultKind::LateAlarms => return,
        };
        let at = dice.below(u64::try_from(config.heal_at.as_nanos()).unwrap_or(u64::MAX));
        plan.push(Planned { at, lasts: log_uniform(dice, longest_ms), fault });
    }
}

/// From 100 microseconds to `longest_ms`, every magnitude alike.
fn log_uniform(dice: &mut Dice, longest_ms: u64) -> Duration {
    let magnitudes = (longest_ms * 10).max(1).ilog2();
    let magnitude = 100u64 << dice.below(u64::from(magnitudes) + 1);
    Duration::from_micros(magnitude + dice.below(magnitude)).min(Duration::from_millis(longest_ms))
}

fn late(dice: &mut Dice) -> Duration {
    log_uniform(dice, 500)
}

/// Lets a cluster's plan happen, until it is healed at `heal_at`. `back` brings a node back.
pub(crate) fn brew(world: &mut World, yard: &Rc<Yard>, plan: &[Planned], heal_at: Duration, back: &WithNode) {
    let heal_at = u64::try_from(heal_at.as_nanos()).unwrap_or(u64::MAX);
    let ongoing: Rc<RefCell<BTreeMap<usize, Fault>>> = Rc::default();
    for (number, planned) in plan.iter().enumerate() {
        let (fault, of, on) = (planned.fault.clone(), Rc::clone(yard), Rc::clone(&ongoing));
        world.at(planned.at, move |world| {
            world.note(What::Fault(fault.clone(), true));
            begin(world, &of, &fault);
            on.borrow_mut().insert(number, fault.clone());
            blend(world, &on.borrow());
        });
        let until = planned.at.saturating_add(u64::try_from(planned.lasts.as_nanos()).unwrap_or(u64::MAX));
        let (fault, back, on) = (planned.fault.clone(), Rc::clone(back), Rc::clone(&ongoing));
        if until < heal_at {
            world.at(until, move |world| {
                world.note(What::Fault(fault.clone(), false));
                on.borrow_mut().remove(&number);
                let others: Vec<Fault> = on.borrow().values().cloned().collect();
                if !others.iter().any(|other| covers(other, &fault)) {
                    mend(world, &fault, &*back);
                }
                // What it had in common with others goes on.
                for other in &others {
                    if let Fault::Partition { from, to, both_ways } = other {
                        cut(world, from, to, *both_ways, true);
                    }
                }
                blend(world, &on.borrow());
            });
        }
    }
}

/// Whether all that `other` does is done as long as `fault` lasts.
fn covers(fault: &Fault, other: &Fault) -> bool {
    match (fault, other) {
        (Fault::Down { node, .. }, Fault::Down { node: same, .. }) => node == same,
        (Fault::Pause { node }, Fault::Pause { node: same }) => node == same,
        (Fault::NicDead { node, nic, .. }, Fault::NicDead { node: same, nic: one, .. }) => (node, nic) == (same, one),
        (Fault::DataCut { from, to }, Fault::DataCut { from: same, to: one }) => (from, to) == (same, one),
        _ => false,
    }
}

/// Where faults of one kind meet in one place, the worst of them counts.
fn blend(world: &mut World, ongoing: &BTreeMap<usize, Fault>) {
    let (mut weather, mut errors_ppm) = (Weather::default(), 0);
    let mut slow_nics: BTreeMap<(usize, usize), u32> = BTreeMap::new();
    for fault in ongoing.values() {
        match fault {
            Fault::Weather(one) => weather = weather.and(*one),
            Fault::CompletionErrors(ppm) => errors_ppm = errors_ppm.max(*ppm),
            Fault::NicSlow { node, nic, factor } => {
                let slowest = slow_nics.entry((*node, *nic)).or_default();
                *slowest = (*slowest).max(*factor);
            }
            _ => {}
        }
    }
    world.change_weather(weather);
    world.fabric().fail_completions(errors_ppm);
    for ((node, nic), factor) in slow_nics {
        slow(world, node, nic, factor);
    }
}

/// Ends every fault of a plan.
pub(crate) fn heal(world: &mut World, plan: &[Planned], back: &dyn Fn(&mut World, usize)) {
    world.note(What::Healed);
    for planned in plan.iter().filter(|planned| planned.at <= world.now()).collect::<Vec<_>>() {
        mend(world, &planned.fault, back);
    }
    world.clear_skies();
    for node in 0..world.nodes() {
        back(world, node);
    }
}

fn begin(world: &mut World, yard: &Yard, fault: &Fault) {
    match fault {
        Fault::Down { node, late_writes } => {
            yard.note_down(*node);
            world.kill(*node, if *late_writes { OnTheWire::Lands } else { OnTheWire::Lost });
        }
        Fault::Pause { node } => world.pause(*node),
        Fault::Partition { from, to, both_ways } => cut(world, from, to, *both_ways, true),
        // All that there is of these counts together: `blend`.
        Fault::Weather(_) | Fault::CompletionErrors(_) => {}
        Fault::NicDead { node, nic, silent } => {
            let death = if *silent { NicDeath::BlackHole } else { NicDeath::Error };
            each_nic(world, *node, |index, id| {
                if index == *nic {
                    world.fabric().kill(id, death);
                }
            });
        }
        Fault::NicSlow { node, nic, factor } => slow(world, *node, *nic, *factor),
        Fault::DataCut { from, to } => cut_data(world, *from, *to, true),
        Fault::Drain { node, within } => world.drain(*node, *within),
    }
}

fn mend(world: &mut World, fault: &Fault, back: &dyn Fn(&mut World, usize)) {
    match fault {
        Fault::Down { node, .. } => back(world, *node),
        Fault::Pause { node } => world.resume(*node),
        Fault::Partition { from, to, both_ways } => cut(world, from, to, *both_ways, false),
        Fault::Weather(_) => world.change_weather(Weather::default()),
        Fault::NicDead { node, nic, .. } => {
            each_nic(world, *node, |index, id| {
                if index == *nic {
                    world.fabric().revive(id);
                }
            });
        }
        Fault::NicSlow { node, nic, .. } => slow(world, *node, *nic, 1),
        Fault::DataCut { from, to } => cut_data(world, *from, *to, false),
        Fault::CompletionErrors(_) => world.fabric().fail_completions(0),
        // It comes back by itself.
        Fault::Drain { .. } => {}
    }
}

fn cut(world: &mut World, from: &[usize], to: &[usize], both_ways: bool, on: bool) {
    for from in from {
        for to in to {
            world.cut(*from, *to, on);
            if both_ways {
                world.cut(*to, *from, on);
            }
        }
    }
}

fn slow(world: &World, node: usize, nic: usize, factor: u32) {
    each_nic(world, node, |index, id| {
        if index == nic {
            world.fabric().slow(id, factor);
        }
    });
}

fn cut_data(world: &World, from: usize, to: usize, on: bool) {
    each_nic(world, from, |_, here| each_nic(world, to, |_, there| world.fabric().cut(here, there, on)));
}

fn each_nic(world: &World, node: usize, mut each: impl FnMut(usize, kvferry_fabric_sim::NicId)) {
    for (index, id) in world.nics_of(node) {
        each(index, id);
    }
}
