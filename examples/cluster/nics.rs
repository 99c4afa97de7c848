//! Which devices every rank opens.

use kvferry::transport::{self, Device, Options, Provider};
use kvferry::{OpenNic, TransportKind};
use serde::{Deserialize, Serialize};

use crate::error::UsageError;
use crate::near::{NEAR, Slot};

/// What `auto` opens, best first, as far as this host has it.
const AUTO: [(&str, &str); 2] = [("shm", "memory"), ("tcp", "lo")];
/// The device of each transport that surely reaches every rank of this machine.
const LOCAL: [(&str, &str); 4] = [("shm", "memory"), ("tcp", "lo"), ("ucx", "memory"), ("libfabric", "lo")];

/// What moves GPU memory beside the GPUs' own transport: by way of host memory, or with libfabric by the NIC.
const CARRIERS: [&str; 3] = ["tcp", "ucx", "libfabric"];

/// A device that every rank opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NicChoice {
    pub(crate) kind: TransportKind,
    pub(crate) device: String,
    /// Both sides move the bytes (ucx).
    pub(crate) two_sided: bool,
    /// It is to reach pools on GPUs.
    #[serde(default)]
    pub(crate) device_memory: bool,
}

impl NicChoice {
    pub(crate) fn of(kind: TransportKind, device: String) -> NicChoice {
        NicChoice { kind, device, two_sided: false, device_memory: false }
    }

    fn found(device: Device) -> NicChoice {
        NicChoice::of(device.kind, device.name)
    }

    /// How it is opened.
    pub(crate) fn select(&self) -> Result<OpenNic, transport::SelectError> {
        let NicChoice { two_sided, device_memory, .. } = *self;
        let options = Options { two_sided, device_memory, ..Options::default() };
        transport::select(self.kind, Some(&self.device), &options)
    }

    /// Whether there is such a device.
    fn check(&self, wanted: &str) -> Result<(), UsageError> {
        let found = self.select().map(drop);
        found.map_err(|source| UsageError::Transport { transport: wanted.to_owned(), source })
    }
}

/// The transport, and the devices that are named for it: `--transport` and `--devices`, or `--gpus` in their place. With tcp, ucx and libfabric,
/// GPUs only say where pools are ([`memories`]).
///
/// `auto` takes named GPUs where all ranks are on one host, and what it says of the way between them; else pools are in host memory, and it is said
/// why.
pub(crate) fn wanted<'a>(
    options: &'a crate::options::Options,
    transport: &'a str,
    hosts: u32,
) -> Result<Wanted<'a>, UsageError> {
    let plainly = |transport, devices| Ok(Wanted { transport, devices, has_carrier: false });
    let Some(gpus) = &options.gpus else { return plainly(transport, options.devices.clone()) };
    let names: Vec<String> = gpu_names(gpus).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    match transport {
        "cuda" => plainly("cuda", Some(names.join(","))),
        "auto" => match auto(hosts, &names, transport::cuda::joined) {
            Auto::Gpus { way, has_carrier } => {
                eprintln!("note: pools are on GPUs; {way}");
                Ok(Wanted { transport: "cuda", devices: Some(names.join(",")), has_carrier })
            }
            Auto::Host(reason) => {
                eprintln!("note: pools are in host memory, not on --gpus {gpus}: {reason}");
                plainly("auto", options.devices.clone())
            }
        },
        carrier if CARRIERS.contains(&carrier) => plainly(carrier, options.devices.clone()),
        _ => Err(UsageError::GpusWithoutCuda { value: gpus.clone(), transport: transport.to_owned() }),
    }
}

/// What is to be opened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wanted<'a> {
    pub(crate) transport: &'a str,
    pub(crate) devices: Option<String>,
    /// Every rank opens [`carriers`], too, for those whose GPUs do not reach each other.
    pub(crate) has_carrier: bool,
}

/// Where `auto` has pools.
#[derive(Debug, PartialEq, Eq)]
enum Auto {
    /// On the GPUs that are named, and how they are joined.
    Gpus { way: String, has_carrier: bool },
    /// Not there, and why.
    Host(String),
}

fn auto(hosts: u32, names: &[&str], joined: impl Fn(&[&str]) -> Result<String, String>) -> Auto {
    if hosts > 1 {
        return Auto::Host(format!(
            "ranks are on {hosts} hosts, and GPUs of several hosts read each other's memory only within an NVLink domain, which --transport cuda counts on"
        ));
    }
    match joined(names) {
        Ok(way) => Auto::Gpus { way, has_carrier: false },
        Err(reason) if names.iter().all(|name| joined(&[name]).is_ok()) => {
            let way = format!("where they do not reach each other, by way of host memory: {reason}");
            Auto::Gpus { way, has_carrier: true }
        }
        Err(reason) => Auto::Host(reason),
    }
}

/// What moves the memory of GPUs that do not reach each other: those devices that are named and can, else TCP.
pub(crate) fn carriers(options: &crate::options::Options) -> Result<Chosen, UsageError> {
    let Some(devices) = options.devices.as_deref() else { return choose(options, "tcp", None) };
    let mut chosen = choose(options, "auto", Some(devices))?;
    chosen.slots.retain(|slot| CARRIERS.contains(&slot.kind().name()));
    if chosen.slots.is_empty() {
        chosen.append(choose(options, "tcp", None)?);
        chosen.notes.push(format!("--devices {devices}: none of them moves GPU memory; tcp does"));
    }
    Ok(chosen)
}

/// The NICs of one rank, of which one is its GPU if they are GPUs.
pub(crate) fn of_rank(nics: &[NicChoice], rank: usize) -> Vec<NicChoice> {
    let is_gpu = |nic: &&NicChoice| nic.kind == TransportKind::Cuda;
    let gpus: Vec<&NicChoice> = nics.iter().filter(is_gpu).collect();
    let own = gpus.get(rank % gpus.len().max(1)).copied();
    own.into_iter().chain(nics.iter().filter(|nic| !is_gpu(nic))).cloned().collect()
}

/// The GPUs in whose memory pools are to be though another transport carries them, dealt to the ranks in turn.
pub(crate) fn memories(options: &crate::options::Options, transport: &str) -> Result<Vec<String>, UsageError> {
    let gpus = options.gpus.as_deref().filter(|_| CARRIERS.contains(&transport));
    let names: Vec<String> = gpus.into_iter().flat_map(gpu_names).collect();
    if !names.is_empty() {
        // Names are checked here, not in every rank.
        choose(options, TransportKind::Cuda.name(), Some(&names.join(",")))?;
    }
    Ok(names)
}

fn gpu_names(list: &str) -> impl Iterator<Item = String> {
    list.split(',').map(|gpu| format!("gpu{}", gpu.trim()))
}

/// What ranks open, and what of it is not as it was asked for.
#[derive(Default)]
pub(crate) struct Chosen {
    pub(crate) slots: Vec<Slot>,
    pub(crate) notes: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

impl Chosen {
    /// Whether both sides can move the bytes over all of these, which must be UCX's.
    pub(crate) fn check_two_sided(&self) -> Result<(), UsageError> {
        let other = self.slots.iter().map(Slot::kind).find(|kind| *kind != TransportKind::Ucx);
        other.map_or(Ok(()), |transport| Err(UsageError::TwoSidedWithoutUcx { transport }))
    }

    /// Those that every rank opens.
    pub(crate) fn every(&self) -> impl Iterator<Item = &NicChoice> {
        self.slots.iter().filter_map(|slot| if let Slot::Every(nic) = slot { Some(nic) } else { None })
    }

    /// Opens others, too.
    pub(crate) fn append(&mut self, other: Chosen) {
        self.slots.extend(other.slots);
        self.notes.extend(other.notes);
        self.warnings.extend(other.warnings);
    }

    fn push(&mut self, nic: NicChoice) {
        if !self.every().any(|known| *known == nic) {
            self.slots.push(Slot::Every(nic));
        }
    }
}

/// Refuses what would be ignored, and what is no host's root.
fn check_near(options: &crate::options::Options) -> Result<(), UsageError> {
    let entries = || options.devices.iter().flat_map(|list| list.split(','));
    let is_near = entries().any(|entry| near_of(entry).is_some());
    match (&options.root, &options.nic_map) {
        (Some(root), _) if !root.join("sys").is_dir() => Err(UsageError::Root { root: root.clone() }),
        (Some(_), _) if !is_near => Err(UsageError::WithoutNear { option: "root" }),
        (_, Some(_)) if !is_near => Err(UsageError::WithoutNear { option: "nic-map" }),
        _ => Ok(()),
    }
}

/// Whether an entry of `--devices` is `near`, and of which transport alone.
fn near_of(entry: &str) -> Option<Option<&str>> {
    match entry.trim().rsplit_once(':') {
        Some((kind, NEAR)) => Some(Some(kind)),
        None if entry.trim() == NEAR => Some(None),
        _ => None,
    }
}

/// The devices that `--transport` and `--devices` name, checked against those of this host. Of those that are named, one that is there is enough; but
/// a GPU is where a pool is to be, for which no other stands in.
pub(crate) fn choose(
    options: &crate::options::Options,
    wanted: &str,
    devices: Option<&str>,
) -> Result<Chosen, UsageError> {
    check_near(options)?;
    let providers = transport::providers();
    let names: Vec<&str> = providers.iter().map(|provider| provider.kind().name()).collect();
    if wanted != "auto" && !names.contains(&wanted) {
        return Err(UsageError::UnknownTransport {
            name: wanted.to_owned(),
            known: format!("auto, {}", names.join(", ")),
        });
    }
    let mut known: Vec<NicChoice> = Vec::new();
    // A library is loaded only for whoever asks for it.
    let asked = |kind: &str| {
        let named = |list: &str| list.split(',').any(|entry| entry.trim().split(':').next() == Some(kind));
        AUTO.iter().any(|(auto, _)| *auto == kind) || devices.is_some_and(named)
    };
    let wants = |kind: &str| kind == wanted || (wanted == "auto" && asked(kind));
    for provider in providers.iter().filter(|provider| wants(provider.kind().name())) {
        let found = provider.discover();
        known.extend(found.into_iter().map(NicChoice::found));
    }
    let asked: Vec<&dyn Provider> =
        providers.iter().map(AsRef::as_ref).filter(|provider| wants(provider.kind().name())).collect();
    let mut chosen = Chosen::default();
    let mut missing = Vec::new();
    match devices {
        Some(list) => {
            for entry in list.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
                match near_of(entry) {
                    Some(kind) => near(options, kind.unwrap_or(wanted), &asked, &known, &mut chosen)?,
                    None => match named(wanted, list, entry, &known, &asked) {
                        Ok(nic) => chosen.push(nic),
                        Err(error) => missing.push(error),
                    },
                }
            }
        }
        None => {
            let taken: Vec<NicChoice> = match wanted {
                "auto" => AUTO.iter().filter_map(|(kind, device)| find(&known, Some(kind), device)).collect(),
                kind => default(kind, &known).into_iter().collect(),
            };
            for nic in taken {
                nic.check(wanted)?;
                chosen.push(nic);
            }
        }
    }
    let is_none = chosen.slots.is_empty();
    match missing.first() {
        None if is_none => {
            let (value, entry) = (devices.unwrap_or_default().to_owned(), String::new());
            return Err(UsageError::UnknownDevice { value, entry, transport: wanted.to_owned(), known: list(&known) });
        }
        Some(_) if is_none || wanted == TransportKind::Cuda.name() => return Err(missing.swap_remove(0)),
        _ => {}
    }
    chosen.warnings.extend(missing.iter().map(|error| format!("{error}; the others are used")));
    Ok(chosen)
}

/// The device that is taken where none is named.
fn default(kind: &str, known: &[NicChoice]) -> Option<NicChoice> {
    let local = LOCAL.iter().find(|(local, _)| *local == kind);
    let local = local.and_then(|(kind, device)| find(known, Some(kind), device));
    local.or_else(|| known.iter().find(|nic| nic.kind.name() == kind).cloned())
}

/// `near`, or KIND:near: with `auto` of every transport that it opens.
fn near(
    options: &crate::options::Options,
    wanted: &str,
    providers: &[&dyn Provider],
    known: &[NicChoice],
    chosen: &mut Chosen,
) -> Result<(), UsageError> {
    let is_meant = |kind: TransportKind| match wanted {
        "auto" => AUTO.iter().any(|(auto, _)| *auto == kind.name()),
        wanted => wanted == kind.name(),
    };
    let mut kinds = providers.iter().map(|provider| provider.kind()).filter(|kind| is_meant(*kind)).peekable();
    if kinds.peek().is_none() {
        return Err(UsageError::UnknownDevice {
            value: options.devices.clone().unwrap_or_default(),
            entry: format!("{wanted}:{NEAR}"),
            transport: options.transport.clone(),
            known: list(known),
        });
    }
    for kind in kinds {
        if let Some(nearby) = crate::near::find(kind, options, &mut chosen.warnings) {
            chosen.slots.push(Slot::Near(kind, Box::new(nearby)));
            continue;
        }
        let Some(nic) = default(kind.name(), known) else { continue };
        nic.check(kind.name())?;
        let why = match kind {
            TransportKind::Shm | TransportKind::Cuda => "it moves bytes without NICs",
            _ => "sysfs shows no NIC that it can use",
        };
        chosen.notes.push(format!("--devices {NEAR}: every rank takes {kind}:{}; {why}", nic.device));
        chosen.push(nic);
    }
    Ok(())
}

/// A device that can be opened.
fn named(
    wanted: &str,
    value: &str,
    entry: &str,
    known: &[NicChoice],
    providers: &[&dyn Provider],
) -> Result<NicChoice, UsageError> {
    let exact = entry.split_once(':').and_then(|(kind, device)| find(known, Some(kind), device));
    let nic = match exact.or_else(|| find(known, None, entry)) {
        Some(nic) => nic,
        None => unlisted(providers, entry).map_err(|reason| UsageError::UnknownDevice {
            value: value.to_owned(),
            entry: format!("{entry}{reason}"),
            transport: wanted.to_owned(),
            known: list(known),
        })?,
    };
    nic.check(wanted)?;
    Ok(nic)
}

/// A device that no provider lists and one of them can open by its name; else why none can, as far as one knows.
fn unlisted(providers: &[&dyn Provider], entry: &str) -> Result<NicChoice, String> {
    let mut why = String::new();
    for provider in providers {
        let name = entry.strip_prefix(&format!("{}:", provider.kind())).unwrap_or(entry);
        let Some(device) = provider.named(name) else { continue };
        match &device.unavailable {
            None => return Ok(NicChoice::found(device)),
            Some(reason) => why = format!(" ({reason})"),
        }
    }
    Err(why)
}

fn find(known: &[NicChoice], kind: Option<&str>, device: &str) -> Option<NicChoice> {
    known.iter().find(|nic| nic.device == device && kind.is_none_or(|kind| nic.kind.name() == kind)).cloned()
}

fn list(known: &[NicChoice]) -> String {
    let describe = |nic: &NicChoice| match nic.select() {
        Ok(_) => format!("{}:{}", nic.kind, nic.device),
        Err(reason) => format!("{}:{} ({reason})", nic.kind, nic.device),
    };
    let names: Vec<String> = known.iter().map(describe).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The NIC in whose kind of memory a rank's pool is best: a GPU's own, or the first of several that map nobody's. None where somebody may map
/// it, and beside tcp, for which that was not measured.
pub(crate) fn who_allocates(nics: &[NicChoice]) -> Option<&NicChoice> {
    let maps_nothing = |nic: &NicChoice| matches!(nic.kind, TransportKind::Ucx | TransportKind::Libfabric);
    nics.first().filter(|first| first.kind == TransportKind::Cuda || nics.iter().all(maps_nothing))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn auto_takes_gpus_that_reach_each_other_on_one_host() {
        let nvlink = |_: &[&str]| Ok("joined by NVLink".to_owned());
        let on_gpus = |way: &str, has_carrier| Auto::Gpus { way: way.to_owned(), has_carrier };
        assert_eq!(auto(1, &["gpu0", "gpu1"], nvlink), on_gpus("joined by NVLink", false));
        assert!(matches!(auto(2, &["gpu0", "gpu1"], nvlink), Auto::Host(reason) if reason.contains("2 hosts")));
        let none = |_: &[&str]| Err("no driver".to_owned());
        assert_eq!(auto(1, &["gpu0", "gpu1"], none), Auto::Host("no driver".to_owned()));
        // Each is there, and they do not reach each other.
        let apart = |names: &[&str]| if names.len() > 1 { Err("no peer access".to_owned()) } else { Ok(String::new()) };
        let way = "where they do not reach each other, by way of host memory: no peer access";
        assert_eq!(auto(1, &["gpu0", "gpu1"], apart), on_gpus(way, true));
    }

    #[test]
    fn a_rank_has_one_gpu_and_every_network() {
        let nic =
            |kind, device: &str| NicChoice { kind, device: device.to_owned(), two_sided: false, device_memory: false };
        let (one, other) = (nic(TransportKind::Cuda, "gpu0"), nic(TransportKind::Cuda, "gpu1"));
        let (lo, eth) = (nic(TransportKind::Tcp, "lo"), nic(TransportKind::Tcp, "eth0"));
        let all = [one.clone(), other.clone(), lo.clone()];
        for (rank, gpu) in [&one, &other, &one, &other].into_iter().enumerate() {
            assert_eq!(of_rank(&all, rank), [gpu.clone(), lo.clone()]);
        }
        let networks = [lo, eth];
        assert_eq!(of_rank(&networks, 1), networks);
    }

    #[test]
    fn a_pool_that_nobody_maps_is_in_memory_of_its_networks() {
        let nic = |(kind, device): (TransportKind, &str)| NicChoice::of(kind, device.to_owned());
        let by = |nics: &[(TransportKind, &str)]| {
            let nics: Vec<NicChoice> = nics.iter().copied().map(nic).collect();
            who_allocates(&nics).map(|nic| nic.device.clone())
        };
        let (ucx, fabric) = ((TransportKind::Ucx, "memory"), (TransportKind::Libfabric, "lo"));
        assert_eq!(by(&[fabric, (TransportKind::Libfabric, "eth0")]).as_deref(), Some("lo"));
        assert_eq!(by(&[ucx, fabric]).as_deref(), Some("memory"));
        assert_eq!(by(&[(TransportKind::Cuda, "gpu0"), (TransportKind::Tcp, "lo")]).as_deref(), Some("gpu0"));
        for nics in [&[fabric, (TransportKind::Shm, "memory")][..], &[(TransportKind::Tcp, "lo")], &[]] {
            assert_eq!(by(nics), None, "{nics:?}");
        }
    }

    #[test]
    fn networks_move_the_memory_of_gpus_and_others_say_that_they_do_not() {
        let options = crate::options::Options::parse_from(["cluster", "--gpus", "0,1", "--devices", "lo"]);
        for transport in ["tcp", "ucx", "libfabric"] {
            let devices = Some("lo".to_owned());
            assert_eq!(wanted(&options, transport, 2).unwrap(), Wanted { transport, devices, has_carrier: false });
        }
        let refused = wanted(&options, "shm", 2).unwrap_err().to_string();
        assert!(refused.contains("tcp, ucx or libfabric"), "{refused}");
    }
}
