//! What must always hold, one rule per file; each watches everything that happens, and looks around once more when all is quiet.

mod back;
mod bytes;
mod consumers;
mod credits;
mod epochs;
mod fences;
mod leases;
mod outcomes;
mod progress;

use std::fmt;

use kvferry_core::GroupId;
use kvferry_core::protocol::{Role, Vitals};

use crate::chronicle::Entry;
use crate::report::RankReport;
use crate::world::World;
use crate::yard::Yard;

/// Something that an invariant does not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which invariant.
    pub invariant: &'static str,
    /// When it was seen, in nanoseconds of the world.
    pub at: u64,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}.{:09}: {}", self.invariant, self.at / 1_000_000_000, self.at % 1_000_000_000, self.what)
    }
}

/// One rule.
pub(crate) trait Invariant {
    /// Its number.
    fn name(&self) -> &'static str;

    /// Something happened. Cheap: it is asked of everything.
    fn see(&mut self, world: &World, entry: &Entry, broken: &mut Vec<String>);

    /// What the actors of all nodes have in hand just now.
    fn look_in(&mut self, _vitals: &[(usize, Vitals)], _broken: &mut Vec<String>) {}

    /// Everything has ended, or should have.
    fn look_around(&mut self, _scene: &Scene<'_>, _broken: &mut Vec<String>) {}
}

/// A cluster in which everything has ended, or should have.
pub(crate) struct Scene<'a> {
    pub(crate) world: &'a World,
    pub(crate) ranks: &'a [RankReport],
    /// What the actors have in hand.
    pub(crate) vitals: &'a [(usize, Vitals)],
    /// What was to end within its bound, and did not, in words.
    pub(crate) unmet: Vec<String>,
}

/// All rules, and what broke them.
pub(crate) struct Judge {
    rules: Vec<Box<dyn Invariant>>,
    broken: Vec<Broken>,
    found: Vec<String>,
}

/// After so many findings of one run, nothing new is learnt.
const BROKEN_MAX: usize = 50;

impl Judge {
    pub(crate) fn new(yard: &Yard) -> Self {
        let groups = Groups::of(yard);
        // Whatever its clock's drift.
        let listens = yard.options.scheduler.adopt_after.mul_f64(0.99);
        let rules: Vec<Box<dyn Invariant>> = vec![
            Box::new(fences::Fences),
            Box::new(bytes::Bytes::new(groups.clone())),
            Box::new(outcomes::Outcomes::new(groups.clone(), listens)),
            Box::new(back::Back),
            Box::new(progress::Progress::default()),
            Box::new(epochs::Epochs::default()),
            Box::new(credits::Credits::new(yard)),
            Box::new(consumers::Consumers::new(groups)),
            Box::new(leases::Leases::new(yard.options.leases)),
        ];
        Judge { rules, broken: Vec::new(), found: Vec::new() }
    }

    pub(crate) fn see(&mut self, world: &World, entry: &Entry) {
        self.ask_all(entry.at, |rule, found| rule.see(world, entry, found));
    }

    pub(crate) fn look_in(&mut self, at: u64, vitals: &[(usize, Vitals)]) {
        self.ask_all(at, |rule, found| rule.look_in(vitals, found));
    }

    pub(crate) fn look_around(&mut self, scene: &Scene<'_>) {
        self.ask_all(scene.world.now(), |rule, found| rule.look_around(scene, found));
    }

    fn ask_all(&mut self, at: u64, mut ask: impl FnMut(&mut dyn Invariant, &mut Vec<String>)) {
        for rule in &mut self.rules {
            ask(&mut **rule, &mut self.found);
            for what in self.found.drain(..) {
                if self.broken.len() < BROKEN_MAX {
                    self.broken.push(Broken { invariant: rule.name(), at, what });
                }
            }
        }
    }

    pub(crate) fn broken(&self) -> &[Broken] {
        &self.broken
    }
}

/// Which nodes are which groups.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    /// By node, without the scheduler.
    places: Vec<(Role, GroupId, u32)>,
}

impl Groups {
    fn of(yard: &Yard) -> Self {
        Groups { places: yard.workers.iter().map(|worker| (worker.role, worker.group, worker.rank.0)).collect() }
    }

    /// The group of a node.
    pub(crate) fn group(&self, node: usize) -> Option<GroupId> {
        self.places.get(node.checked_sub(1)?).map(|(_, group, _)| *group)
    }

    /// The nodes of a group, by rank.
    pub(crate) fn nodes(&self, group: GroupId) -> impl Iterator<Item = usize> + '_ {
        self.places.iter().enumerate().filter(move |(_, (_, of, _))| *of == group).map(|(index, _)| index + 1)
    }
}
