//! What either end of a transfer has of EFA, and whether the two fit: a pair of generations can do no more than the older one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::Host;
use crate::library::{self, Libfabric};
use crate::question::Environment;
use crate::report::Check;
use crate::root::{DeviceNode, SysRoot};

const ID: &str = "verify.generations";
/// Generations of devices in one host; there is one in those that exist.
const KINDS_MAX: usize = 8;
/// Devices of one generation in one host, and what they carry; both far beyond what exists.
const DEVICES_MAX: u32 = 256;
const GIGABITS_MAX: u32 = 1 << 20;

/// What one end has of EFA, as it tells the other: numbers only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Devices that a process there can use, by generation, the oldest first.
    pub efa: Vec<EfaKind>,
    /// The newest `FABRIC_1.N` of the libfabric that the loader takes there; `None` without one.
    pub libfabric: Option<u32>,
}

/// EFA devices of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EfaKind {
    /// Amazon's number of it: 0xefa0 is the first.
    pub device: u32,
    /// How many.
    pub count: u32,
    /// Gb/s of all of them together.
    pub gigabits: u32,
    /// Whether it reads a peer's memory (RDMA read); `None` where its number does not say.
    pub reads: Option<bool>,
    /// Whether it writes a peer's memory (RDMA write); `None` where its number does not say.
    pub writes: Option<bool>,
}

/// Why that is nothing that an end says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EndError {
    /// More generations than a host has.
    #[error("{0} generations of EFA; a host has one, at most {KINDS_MAX} are heard")]
    Kinds(usize),
    /// A number that is not an EFA device's, or not behind those before it.
    #[error("device {0:#06x} is no EFA device, or not in order; they are 0xefa0 to 0xefaf, the oldest first")]
    Device(u32),
    /// No host has so many, or they carry more than any does.
    #[error("{count} devices {device:#06x} with {gigabits} Gb/s; a host has 1 to {DEVICES_MAX} of them")]
    Amount {
        /// Amazon's number.
        device: u32,
        /// How many.
        count: u32,
        /// Of all of them.
        gigabits: u32,
    },
}

impl End {
    /// Of the host below `root`, for processes with that environment.
    pub fn read(root: &SysRoot, environment: &Environment) -> End {
        let mut kinds: BTreeMap<u32, EfaKind> = BTreeMap::new();
        for efa in Host::read(root).efa {
            if efa.state != "4: ACTIVE" || efa.node != DeviceNode::Usable {
                continue;
            }
            let kind = kinds.entry(efa.pci.device).or_insert_with(|| EfaKind::of(efa.pci.device));
            kind.count += 1;
            let gigabits = efa.rate.split_whitespace().next().and_then(|number| number.parse::<f64>().ok());
            kind.gigabits = kind.gigabits.saturating_add(gigabits.unwrap_or(0.0) as u32);
        }
        let found = library::find(root, environment, "libfabric.so.1", "KVFERRY_LIBFABRIC_LIBRARY");
        let libfabric = found.first().and_then(|found| Libfabric::read(root, &found.real)).map(|library| library.abi);
        End { efa: kinds.into_values().take(KINDS_MAX).collect(), libfabric }
    }

    /// What a peer said, if it is what an end can say.
    pub fn checked(self) -> Result<End, EndError> {
        if self.efa.len() > KINDS_MAX {
            return Err(EndError::Kinds(self.efa.len()));
        }
        let mut before = 0;
        for EfaKind { device, count, gigabits, .. } in self.efa.iter().copied() {
            if device & !0xf != 0xefa0 || device <= before {
                return Err(EndError::Device(device));
            }
            if !(1..=DEVICES_MAX).contains(&count) || gigabits > GIGABITS_MAX {
                return Err(EndError::Amount { device, count, gigabits });
            }
            before = device;
        }
        Ok(self)
    }

    fn generations(&self) -> Vec<u32> {
        self.efa.iter().map(|kind| kind.device).collect()
    }

    fn gigabits(&self) -> u32 {
        self.efa.iter().map(|kind| kind.gigabits).fold(0, u32::saturating_add)
    }

    /// Which of its devices are said not to have it.
    fn without(&self, has: impl Fn(&EfaKind) -> Option<bool>) -> Option<u32> {
        self.efa.iter().find(|kind| has(kind) == Some(false)).map(|kind| kind.device)
    }

    /// In words, behind `here` or `there`.
    fn words(&self) -> String {
        if self.efa.is_empty() {
            return "no EFA device that a process can use".to_owned();
        }
        let word = |has: Option<bool>| match has {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not told by its number",
        };
        let kinds = self.efa.iter().map(|kind| {
            let EfaKind { device, count, gigabits, .. } = kind;
            let (reads, writes) = (word(kind.reads), word(kind.writes));
            format!("{count} x {device:#06x}, {gigabits} Gb/s together (RDMA read: {reads}, RDMA write: {writes})")
        });
        let libfabric = match self.libfabric {
            Some(abi) => {
                format!("libfabric with FABRIC_1.{abi} (releases {})", Libfabric { abi, efa: true }.releases())
            }
            None => "no libfabric on the loader's path".to_owned(),
        };
        kinds.chain([libfabric]).collect::<Vec<_>>().join("; ")
    }
}

impl EfaKind {
    /// What a generation can, by its number. Of the first one p4d reads and older instances do not, and none writes; of those that are newer than 0xefa3
    /// only the device itself can tell.
    fn of(device: u32) -> EfaKind {
        let (reads, writes) = match device {
            0xefa0 => (None, Some(false)),
            0xefa1..=0xefa3 => (Some(true), Some(true)),
            _ => (None, None),
        };
        EfaKind { device, count: 0, gigabits: 0, reads, writes }
    }
}

/// Compares the two ends; `None` is a peer that did not say, or said what no end can say.
pub(crate) fn generations(here: &End, there: Option<&End>) -> Check {
    let Some(there) = there else {
        if here.efa.is_empty() {
            return Check::ok(ID, "no EFA device here; the peer did not say what it has");
        }
        let fix = "run the same build of kvferry on both hosts and open the peer's port for UDP, too; or compare efa.devices of kvferry doctor on both";
        return Check::warn(ID, "the peer did not say which EFA devices it has: not compared", fix)
            .and([format!("here: {}", here.words())]);
    };
    let both = [format!("here: {}", here.words()), format!("there: {}", there.words())];
    match (here.efa.is_empty(), there.efa.is_empty()) {
        (true, true) => Check::ok(ID, "no EFA device at either end"),
        (false, false) => compared(here, there).and(both),
        (lacking, _) => {
            let (with, without) = if lacking { ("there", "here") } else { ("here", "there") };
            let fix = format!(
                "run kvferry doctor on the host {without} (efa.devices, efa.nodes) and let it have its devices: \"vpc.amazonaws.com/efa\" in requests and \
                 limits"
            );
            Check::warn(ID, format!("EFA {with} and none {without}: nothing between the two goes over it"), fix)
                .and(both)
        }
    }
}

/// Both have devices.
fn compared(here: &End, there: &End) -> Check {
    let place = |of: fn(&EfaKind) -> Option<bool>| {
        let lacks = |end: &End, name: &str| end.without(of).map(|device| format!("{device:#06x} {name}"));
        let lacking: Vec<String> = [lacks(here, "here"), lacks(there, "there")].into_iter().flatten().collect();
        (!lacking.is_empty()).then(|| lacking.join(" and "))
    };
    if let Some(lacking) = place(|kind| kind.reads) {
        let fix = "use instances whose devices read (p4d and newer), or take --transport tcp: messages that processors unpack gain nothing over it";
        return Check::warn(
            ID,
            format!("no direction by RDMA: {lacking} cannot read, and kvferry needs no more than that"),
            fix,
        );
    }
    let used = "the destination reads, whoever initiates: pull and push go by RDMA read";
    let writes = place(|kind| kind.writes);
    let no_write = writes.as_ref().map(|lacking| {
        format!("RDMA write is not there ({lacking}): what NIXL agents and TensorRT-LLM write between these two, libraries emulate by messages")
    });
    let slower = match here.gigabits().cmp(&there.gigabits()) {
        std::cmp::Ordering::Equal => None,
        less => {
            let end = if less.is_lt() { "here" } else { "there" };
            let least = here.gigabits().min(there.gigabits());
            Some(format!("the pair carries {least} Gb/s at most, what there is {end}"))
        }
    };
    let notes = no_write.into_iter().chain(slower);
    if here.generations() == there.generations() {
        return Check::ok(ID, format!("one generation of EFA at both ends: {used}")).and(notes);
    }
    let fix = match writes {
        Some(_) => {
            "put prefill and decode on instances of one type (nodeSelector node.kubernetes.io/instance-type); with these two use kvferry, or READ in NIXL, \
             never WRITE"
        }
        None => {
            "put prefill and decode on instances of one type (nodeSelector node.kubernetes.io/instance-type), or size both by the older ones"
        }
    };
    Check::warn(ID, format!("different generations of EFA: {used}"), fix).and(notes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    fn end(device: u32, count: u32, gigabits: u32) -> End {
        End { efa: vec![EfaKind { count, gigabits, ..EfaKind::of(device) }], libfabric: Some(9) }
    }

    #[test]
    fn pairs_are_judged_by_what_both_can() {
        let (p4d, p5, newest) = (end(0xefa0, 4, 400), end(0xefa1, 32, 3200), end(0xefa4, 4, 1600));
        let mut no_reads = p4d.clone();
        no_reads.efa.iter_mut().for_each(|kind| kind.reads = Some(false));
        for (here, there, status, words) in [
            (End::default(), Some(End::default()), Status::Ok, &["no EFA device at either end"][..]),
            (End::default(), None, Status::Ok, &["did not say"]),
            (p5.clone(), None, Status::Warn, &["did not say", "here: 32 x 0xefa1, 3200 Gb/s"]),
            (p5.clone(), Some(End::default()), Status::Warn, &["EFA here and none there", "on the host there"]),
            (End::default(), Some(p5.clone()), Status::Warn, &["EFA there and none here", "on the host here"]),
            (p5.clone(), Some(p5.clone()), Status::Ok, &["one generation", "go by RDMA read"]),
            (p5.clone(), Some(end(0xefa1, 1, 100)), Status::Ok, &["100 Gb/s at most, what there is there"]),
            (p4d.clone(), Some(p4d.clone()), Status::Ok, &["(0xefa0 here and 0xefa0 there)", "emulate"]),
            (p4d.clone(), Some(p5.clone()), Status::Warn, &["different generations", "(0xefa0 here)", "never WRITE"]),
            (p5.clone(), Some(p4d.clone()), Status::Warn, &["(0xefa0 there)", "400 Gb/s at most, what there is there"]),
            (p5.clone(), Some(newest), Status::Warn, &["different generations", "size both by the older", "not told"]),
            (p5, Some(no_reads), Status::Warn, &["no direction", "0xefa0 there cannot read", "--transport tcp"]),
        ] {
            let check = generations(&here, there.as_ref());
            assert_eq!(check.status, status, "{check:?}");
            let said = format!("{} {}", check.evidence.join(" "), check.fix);
            assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
            assert_eq!(check.fix.is_empty(), status == Status::Ok, "{check:?}");
        }
    }

    #[test]
    fn what_no_end_can_say_is_not_believed() {
        let wrong = |break_it: fn(&mut End)| {
            let mut said = end(0xefa1, 32, 3200);
            break_it(&mut said);
            said.checked().unwrap_err()
        };
        let good = end(0xefa1, 32, 3200);
        assert_eq!(good.clone().checked(), Ok(good));
        assert_eq!(wrong(|end| end.efa = vec![EfaKind::of(0xefa0); 9]), EndError::Kinds(9));
        assert_eq!(wrong(|end| end.efa.extend(end.efa.clone())), EndError::Device(0xefa1));
        assert_eq!(wrong(|end| end.efa[0].device = 0x1_efa0), EndError::Device(0x1_efa0));
        for break_it in [
            (|end| end.efa[0].count = 0) as fn(&mut End),
            |end| end.efa[0].count = 257,
            |end| end.efa[0].gigabits = u32::MAX,
        ] {
            assert!(matches!(wrong(break_it), EndError::Amount { device: 0xefa1, .. }));
        }
    }
}
