//! `--devices near`: each rank opens the NICs near its pool's memory.

use std::collections::BTreeMap;
use std::path::Path;

use kvferry::TransportKind;
use kvferry::topology::Topology;
use kvferry::transport::{self, Memory, Nearby};

use crate::nics::NicChoice;
use crate::options::Options;

/// What stands in `--devices` for them.
pub(crate) const NEAR: &str = "near";

/// NICs that ranks open, in order.
pub(crate) enum Slot {
    /// Every rank this one.
    Every(NicChoice),
    /// Each rank those of a transport that are near it.
    Near(TransportKind, Box<Nearby>),
}

impl Slot {
    pub(crate) fn kind(&self) -> TransportKind {
        match self {
            Slot::Every(nic) => nic.kind,
            Slot::Near(kind, _) => *kind,
        }
    }
}

/// A transport's NICs as they are near to memory; `None` where it has none here.
pub(crate) fn find(kind: TransportKind, options: &Options, warnings: &mut Vec<String>) -> Option<Nearby> {
    let host = Topology::read(options.root.as_deref().unwrap_or(Path::new("/")));
    let nearby = Nearby::find(kind, host, &options.nic_map.clone().unwrap_or_default());
    warnings.extend(nearby.warnings().iter().map(|warning| format!("--devices {NEAR}: {kind}: {warning}")));
    (!nearby.nics(&Memory::Host, 1, 0).devices.is_empty()).then_some(nearby)
}

/// The NICs that were given to ranks, and what is worth saying of it.
#[derive(Default)]
pub(crate) struct Given {
    /// By rank.
    pub(crate) nics: Vec<Vec<NicChoice>>,
    /// NICs of one transport that a rank has near it, at most.
    pub(crate) near_max: usize,
    pub(crate) notes: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

/// Gives every rank its NICs; `names` are the ranks', and `gpus` are dealt to them in turn.
pub(crate) fn give(slots: &[Slot], names: &[String], gpus: &[String], rails: usize) -> Given {
    let mut given = Given::default();
    // How many ranks of each place there were.
    let mut turns: BTreeMap<Option<String>, usize> = BTreeMap::new();
    // Ranks by what they got.
    let mut said: Vec<(String, Vec<&str>)> = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let gpu =
            gpus.get(index % gpus.len().max(1)).filter(|_| slots.iter().any(|slot| matches!(slot, Slot::Near(..))));
        let address = gpu.and_then(|gpu| match transport::cuda::pci_address(gpu) {
            Ok(address) => Some(address),
            Err(why) => {
                let why =
                    format!("--devices {NEAR}: it is not known where {gpu} is, and all NICs count as near: {why}");
                given.warn(why);
                None
            }
        });
        let place = address.as_ref().map_or_else(|| "host memory".to_owned(), |address| format!("GPU {address}"));
        let turn = turns.entry(address.clone()).or_default();
        let memory = address.map_or(Memory::Host, Memory::Gpu);
        let mut nics: Vec<NicChoice> = Vec::new();
        for slot in slots {
            match slot {
                Slot::Every(nic) => nics.push(nic.clone()),
                Slot::Near(kind, nearby) => {
                    let near = nearby.nics(&memory, rails, *turn);
                    if let Some(why) = near.warning {
                        given.warn(format!("--devices {NEAR}: {why}"));
                    }
                    given.near_max = given.near_max.max(near.devices.len());
                    let nearness = near.nearness.map_or_else(String::new, |nearness| format!(", {nearness}"));
                    let words = format!("{kind}:{} ({place}{nearness})", near.devices.join(&format!(",{kind}:")));
                    match said.iter_mut().find(|(known, _)| *known == words) {
                        Some((_, ranks)) => ranks.push(name),
                        None => said.push((words, vec![name])),
                    }
                    nics.extend(near.devices.into_iter().map(|device| NicChoice::of(*kind, device)));
                }
            }
        }
        // Whoever names one beside those that are near has it once.
        let mut once: Vec<NicChoice> = Vec::with_capacity(nics.len());
        for nic in nics {
            if !once.contains(&nic) {
                once.push(nic);
            }
        }
        *turn += 1;
        given.nics.push(once);
    }
    given.notes =
        said.into_iter().map(|(words, ranks)| format!("--devices {NEAR}: {} {words}", ranks.join(","))).collect();
    given
}

impl Given {
    /// What holds for several ranks is said once.
    fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}
