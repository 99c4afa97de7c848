//! Which NICs serve which GPU.

use core::fmt;
use std::collections::{BTreeMap, BTreeSet};

use crate::{Overrides, Pci, Port, Topology};

/// NICs by GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Every GPU, in the order of [`Topology::gpus`].
    pub gpus: Vec<GpuNics>,
    /// NICs that can be used and serve no GPU: those of an RDMA device away from all GPUs which have nearer ones, such as a storage network's.
    pub spare: Vec<String>,
    /// What is there and cannot be used, and what was named and is not there.
    pub warnings: Vec<String>,
}

/// The NICs of one GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuNics {
    /// Its PCI address.
    pub gpu: String,
    /// Their names with ports, in the order in which rails take them.
    pub nics: Vec<String>,
    /// How near they are.
    pub nearness: Nearness,
}

/// How near NICs are to a GPU, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Nearness {
    /// The user said so.
    Chosen,
    /// Below one switch or bridge.
    Switch,
    /// On one PCI root.
    Root,
    /// On one NUMA node.
    Numa,
    /// None of these: traffic crosses sockets, or the host does not say.
    Far,
    /// There is no NIC.
    None,
}

impl fmt::Display for Nearness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Nearness::Chosen => "as chosen",
            Nearness::Switch => "below one switch",
            Nearness::Root => "on one PCI root",
            Nearness::Numa => "on one NUMA node",
            Nearness::Far => "on another NUMA node",
            Nearness::None => "no NIC",
        })
    }
}

impl Topology {
    /// Gives every GPU its NICs among the ports that can be used, each by the least part of the PCI tree that holds both.
    ///
    /// GPUs climb to the first bridge or root that has a NIC below it, and NICs to the first that a GPU came to; those that meet share evenly,
    /// in the order of PCI addresses: none of those is left over, and where GPUs outnumber NICs each has all of them, beginning with different ones.
    /// A place where several NUMA nodes meet is divided by them. GPUs and NICs that met nobody meet on their NUMA nodes. A GPU that is still without has all
    /// NICs of the host.
    pub fn affinity(&self, overrides: &Overrides) -> Affinity {
        let nics: Vec<&Port> = self.ports.iter().filter(|port| port.unusable.is_none()).collect();
        let gpus: Vec<&Pci> = self.gpus().collect();
        let mut shares = Shares::new(gpus, nics);
        shares.by_tree();
        shares.by_numa();
        shares.by_force();
        let mut affinity = shares.affinity();
        let unusable = |port: &Port| Some(format!("{}: {}", port.name(), port.unusable.as_ref()?));
        affinity.warnings.extend(self.ports.iter().filter_map(unusable));
        self.apply(overrides, &mut affinity);
        affinity
    }

    fn apply(&self, overrides: &Overrides, affinity: &mut Affinity) {
        let known: BTreeSet<String> =
            affinity.gpus.iter().enumerate().flat_map(|(number, gpu)| [number.to_string(), gpu.gpu.clone()]).collect();
        for gpu in overrides.gpus().filter(|gpu| !known.contains(*gpu)) {
            affinity.warnings.push(format!("there is no GPU {gpu}, for which NICs were chosen"));
        }
        let mut chosen_for = BTreeSet::new();
        for (number, gpu) in affinity.gpus.iter_mut().enumerate() {
            let Some(chosen) = overrides.of(number, &gpu.gpu) else { continue };
            let mut nics = Vec::new();
            for wanted in chosen {
                let found: Vec<&Port> = self.ports.iter().filter(|port| port.is_called(wanted)).collect();
                if found.is_empty() {
                    affinity.warnings.push(format!("there is no NIC {wanted}, chosen for GPU {}", gpu.gpu));
                }
                nics.extend(found.into_iter().filter(|port| port.unusable.is_none()).map(Port::name));
            }
            // None of them is of use: better near ones than none.
            if !nics.is_empty() {
                chosen_for.extend(nics.iter().cloned());
                (gpu.nics, gpu.nearness) = (nics, Nearness::Chosen);
            }
        }
        affinity.spare.retain(|nic| !chosen_for.contains(nic));
    }
}

/// What has been shared out so far.
struct Shares<'a> {
    gpus: Vec<&'a Pci>,
    nics: Vec<&'a Port>,
    /// By GPU: indices of NICs.
    of: Vec<(Vec<usize>, Nearness)>,
    /// By NIC.
    taken: Vec<bool>,
}

/// GPUs and NICs that meet, by index.
#[derive(Default)]
struct Meeting {
    gpus: Vec<usize>,
    nics: Vec<usize>,
}

impl<'a> Shares<'a> {
    fn new(gpus: Vec<&'a Pci>, nics: Vec<&'a Port>) -> Self {
        let (of, taken) = (vec![(Vec::new(), Nearness::None); gpus.len()], vec![false; nics.len()]);
        Shares { gpus, nics, of, taken }
    }

    fn by_tree(&mut self) {
        let above = |path: &'a [String]| (1..=path.len()).rev().filter_map(|depth| path.get(..depth));
        let with_nic: BTreeSet<&[String]> =
            self.nics.iter().filter_map(|nic| nic.pci.as_ref()).flat_map(|pci| above(&pci.path)).collect();
        let mut meetings: BTreeMap<&[String], Meeting> = BTreeMap::new();
        for (index, gpu) in self.gpus.iter().enumerate() {
            if let Some(place) = above(&gpu.path).find(|place| with_nic.contains(place)) {
                meetings.entry(place).or_default().gpus.push(index);
            }
        }
        for (index, nic) in self.nics.iter().enumerate() {
            let Some(pci) = &nic.pci else { continue };
            if let Some(place) = above(&pci.path).find(|place| meetings.contains_key(place))
                && let Some(meeting) = meetings.get_mut(place)
            {
                meeting.nics.push(index);
            }
        }
        for (place, meeting) in meetings {
            let nearness = if place.len() > 1 { Nearness::Switch } else { Nearness::Root };
            for meeting in self.divided(meeting) {
                self.share(&meeting, nearness);
            }
        }
    }

    /// By NUMA nodes, if everybody has one and each with a GPU has a NIC.
    fn divided(&self, whole: Meeting) -> Vec<Meeting> {
        let mut parts: BTreeMap<u32, Meeting> = BTreeMap::new();
        let gpus = whole.gpus.iter().map(|gpu| self.gpus.get(*gpu).and_then(|pci| pci.numa));
        let nics = whole.nics.iter().map(|nic| self.numa(*nic));
        let (Some(gpus), Some(nics)) = (gpus.collect::<Option<Vec<_>>>(), nics.collect::<Option<Vec<_>>>()) else {
            return vec![whole];
        };
        for (gpu, numa) in whole.gpus.iter().zip(gpus) {
            parts.entry(numa).or_default().gpus.push(*gpu);
        }
        for (nic, numa) in whole.nics.iter().zip(nics) {
            parts.entry(numa).or_default().nics.push(*nic);
        }
        if parts.values().any(|part| part.nics.is_empty()) { vec![whole] } else { parts.into_values().collect() }
    }

    fn by_numa(&mut self) {
        let mut meetings: BTreeMap<u32, Meeting> = BTreeMap::new();
        for (index, gpu) in self.gpus.iter().enumerate() {
            if let Some(numa) = gpu.numa.filter(|_| self.is_without(index)) {
                meetings.entry(numa).or_default().gpus.push(index);
            }
        }
        for index in self.left() {
            if let Some(numa) = self.numa(index) {
                meetings.entry(numa).or_default().nics.push(index);
            }
        }
        for (numa, mut meeting) in meetings {
            if meeting.nics.is_empty() {
                // All of them serve others; better shared than far.
                meeting.nics = (0..self.nics.len()).filter(|nic| self.numa(*nic) == Some(numa)).collect();
                self.share_all(&meeting, Nearness::Numa);
            } else {
                self.share(&meeting, Nearness::Numa);
            }
        }
    }

    /// GPUs that no NIC is near.
    fn by_force(&mut self) {
        let gpus = (0..self.gpus.len()).filter(|gpu| self.is_without(*gpu)).collect();
        let all = Meeting { gpus, nics: (0..self.nics.len()).collect() };
        if !all.nics.is_empty() {
            self.share_all(&all, Nearness::Far);
        }
    }

    /// Every NIC to one GPU, as evenly as may be; where there are more GPUs, all to each.
    fn share(&mut self, meeting: &Meeting, nearness: Nearness) {
        let (gpus, nics) = (meeting.gpus.len(), meeting.nics.len());
        if gpus == 0 || nics == 0 {
            return;
        }
        if nics < gpus {
            self.share_all(meeting, nearness);
            return;
        }
        let mut rest = meeting.nics.iter();
        for (turn, gpu) in meeting.gpus.iter().enumerate() {
            let part = nics / gpus + usize::from(turn < nics % gpus);
            for nic in rest.by_ref().take(part) {
                self.give(*gpu, *nic, nearness);
            }
        }
    }

    /// Every NIC to every GPU, which begin with different ones.
    fn share_all(&mut self, meeting: &Meeting, nearness: Nearness) {
        let (gpus, nics) = (meeting.gpus.len(), meeting.nics.len());
        for (turn, gpu) in meeting.gpus.iter().enumerate() {
            let first = turn * nics / gpus;
            for nic in meeting.nics.iter().cycle().skip(first).take(nics) {
                self.give(*gpu, *nic, nearness);
            }
        }
    }

    fn give(&mut self, gpu: usize, nic: usize, nearness: Nearness) {
        if let (Some((nics, known)), Some(taken)) = (self.of.get_mut(gpu), self.taken.get_mut(nic)) {
            *known = nearness;
            nics.push(nic);
            *taken = true;
        }
    }

    fn is_without(&self, gpu: usize) -> bool {
        self.of.get(gpu).is_some_and(|(nics, _)| nics.is_empty())
    }

    fn left(&self) -> Vec<usize> {
        self.taken.iter().enumerate().filter(|(_, taken)| !**taken).map(|(nic, _)| nic).collect()
    }

    fn numa(&self, nic: usize) -> Option<u32> {
        self.nics.get(nic)?.pci.as_ref()?.numa
    }

    fn affinity(self) -> Affinity {
        let spare = self.left().into_iter().filter_map(|nic| self.nics.get(nic)).map(|nic| nic.name()).collect();
        let name = |nic: &usize| self.nics.get(*nic).map(|nic| nic.name());
        let gpus = self.gpus.iter().zip(&self.of).map(|(gpu, (nics, nearness))| GpuNics {
            gpu: gpu.address.clone(),
            nics: nics.iter().filter_map(name).collect(),
            nearness: *nearness,
        });
        Affinity { gpus: gpus.collect(), spare, warnings: Vec::new() }
    }
}
