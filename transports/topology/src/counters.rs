//! What an RDMA device has counted: the only proof that bytes crossed it (E5).
//!
//! Counters are the port's, shared by every process that uses it: they show that at least so much went over it. Which of them a device has depends
//! on its driver and that driver's age, so each is optional. They are read when the device is opened and after transfers, not after each.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::sysfs;

/// Between two readings, at first. On EFA a reading asks the device.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two readings that showed too little again and again.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Where the bytes that a device reads from remote memory are counted, the best first: name, folder below the device's, bytes per unit.
const READ: [(&str, &str, u64); 3] = [
    ("rdma_read_bytes", "ports/{}/hw_counters", 1),
    ("rdma_read_bytes", "hw_counters", 1),
    ("port_rcv_data", "ports/{}/counters", 4),
];
/// The same for bytes that others read from memory here.
const LENT: [(&str, &str, u64); 3] = [
    ("rdma_read_resp_bytes", "ports/{}/hw_counters", 1),
    ("rdma_read_resp_bytes", "hw_counters", 1),
    ("port_xmit_data", "ports/{}/counters", 4),
];

/// Which way bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Read from a peer's memory.
    Read,
    /// Read by a peer from memory here.
    Lent,
}

/// The counters of one device, and what this transport knows to have moved over it.
#[derive(Debug, Default)]
pub struct Counters {
    read: Option<Counter>,
    lent: Option<Counter>,
    moved: [u64; 2],
    due: Option<Instant>,
    pause: Duration,
}

/// One counter since the device was opened.
#[derive(Debug)]
struct Counter {
    name: &'static str,
    file: PathBuf,
    unit: u64,
    last: u64,
    counted: u64,
}

impl Counters {
    /// The counters of `rdmap40s0:1`, a device and its port, below a root as of sysfs (`/`), read for the first time; none of a device without.
    pub fn open(root: &Path, device: &str) -> Counters {
        let Some((name, port)) = device.rsplit_once(':') else { return Counters::default() };
        let folder = root.join("sys/class/infiniband").join(name);
        let find = |places: [(&'static str, &str, u64); 3]| {
            places.into_iter().find_map(|(name, place, unit)| {
                let file = folder.join(place.replace("{}", port)).join(name);
                let last = number(&file)?;
                Some(Counter { name, file, unit, last, counted: 0 })
            })
        };
        Counters { read: find(READ), lent: find(LENT), pause: PAUSE, ..Counters::default() }
    }

    /// Bytes have moved that are not proven yet: the counters are worth a look.
    pub fn note(&mut self, way: Way, bytes: u64, now: Instant) {
        let [read, lent] = &mut self.moved;
        let (moved, counter) = match way {
            Way::Read => (read, &self.read),
            Way::Lent => (lent, &self.lent),
        };
        *moved = moved.saturating_add(bytes);
        if counter.is_some() && self.due.is_none() {
            // The first look is at once: whoever ends after one transfer is to know.
            self.due = Some(now);
        }
    }

    /// When the next look is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Looks, if it is time to; says whether it did.
    pub fn look(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| now < due) {
            return false;
        }
        for counter in [&mut self.read, &mut self.lent].into_iter().flatten() {
            counter.look();
        }
        let needless = |way| self.counter(way).is_none() || self.moved(way) == 0;
        let covered = [Way::Read, Way::Lent].into_iter().all(|way| needless(way) || self.covers(way));
        self.pause = if covered { PAUSE } else { (self.pause * 2).min(PAUSE_MAX) };
        // The device may count late.
        self.due = (!covered).then(|| now + self.pause);
        true
    }

    /// Whether the device has counted at least what went this way.
    pub fn covers(&self, way: Way) -> bool {
        self.counter(way).is_some_and(|counter| counter.counted >= self.moved(way)) && self.moved(way) > 0
    }

    /// What was counted this way, in words.
    pub fn words(&self, way: Way) -> String {
        match self.counter(way) {
            Some(Counter { name, counted, .. }) => format!("{name} +{counted} for {} bytes moved", self.moved(way)),
            None => "sysfs has no counters of this device's reads".to_owned(),
        }
    }

    fn counter(&self, way: Way) -> Option<&Counter> {
        match way {
            Way::Read => self.read.as_ref(),
            Way::Lent => self.lent.as_ref(),
        }
    }

    fn moved(&self, way: Way) -> u64 {
        let [read, lent] = self.moved;
        match way {
            Way::Read => read,
            Way::Lent => lent,
        }
    }
}

impl Counter {
    fn look(&mut self) {
        // What cannot be read now may be later.
        let Some(now) = number(&self.file) else { return };
        // It began anew: what it lost meanwhile is not known.
        let more = now.checked_sub(self.last).unwrap_or(now);
        self.counted = self.counted.saturating_add(more.saturating_mul(self.unit));
        self.last = now;
    }
}

fn number(file: &Path) -> Option<u64> {
    sysfs::text(file)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Tree {
            Tree(std::env::temp_dir().join(format!("kvferry-counters-{}-{name}", std::process::id())))
        }

        fn set(&self, file: &str, value: &str) {
            let file = self.0.join("sys/class/infiniband/rdmap40s0").join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, value).unwrap();
        }

        fn open(&self) -> Counters {
            Counters::open(&self.0, "rdmap40s0:1")
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const PORT: &str = "ports/1/hw_counters/rdma_read_bytes";

    #[test]
    fn only_what_covers_the_bytes_proves_them() {
        let tree = Tree::new("covers");
        tree.set(PORT, "1000\n");
        let (mut counters, now) = (tree.open(), Instant::now());
        assert!(!counters.look(now), "nothing has moved");
        counters.note(Way::Read, 4096, now);
        tree.set(PORT, "5000\n");
        assert!(counters.look(now) && !counters.covers(Way::Read), "{}", counters.words(Way::Read));
        assert!(!counters.look(now), "not so soon again");
        let later = counters.due().unwrap();
        tree.set(PORT, "5096\n");
        assert!(counters.look(later) && counters.covers(Way::Read));
        assert_eq!(counters.words(Way::Read), "rdma_read_bytes +4096 for 4096 bytes moved");
        assert_eq!(counters.due(), None, "nothing is left to prove");
        assert!(!counters.covers(Way::Lent), "nothing went that way");
    }

    #[test]
    fn looks_that_show_nothing_become_rare() {
        let tree = Tree::new("rare");
        tree.set(PORT, "0");
        let (mut counters, start) = (tree.open(), Instant::now());
        counters.note(Way::Read, 1, start);
        let (mut now, mut looks) = (start, 0);
        while now < start + Duration::from_secs(60) {
            looks += u32::from(counters.look(now));
            counters.note(Way::Read, 1, now);
            now += Duration::from_millis(5);
        }
        assert!((60..80).contains(&looks), "{looks}");
    }

    #[test]
    fn a_counter_that_begins_anew_goes_on_counting() {
        let tree = Tree::new("anew");
        tree.set(PORT, "18446744073709551000");
        let (mut counters, now) = (tree.open(), Instant::now());
        counters.note(Way::Read, 700, now);
        tree.set(PORT, "18446744073709551600");
        counters.look(now);
        assert!(!counters.covers(Way::Read));
        tree.set(PORT, "100");
        let due = counters.due().unwrap();
        assert!(counters.look(due) && counters.covers(Way::Read), "{}", counters.words(Way::Read));
        // Neither rubbish nor a file that went away counts.
        counters.note(Way::Read, 1, now);
        tree.set(PORT, "n/a");
        assert!(counters.look(now) && !counters.covers(Way::Read));
    }

    #[test]
    fn older_drivers_count_elsewhere_and_others_in_words() {
        let tree = Tree::new("elsewhere");
        tree.set("hw_counters/rdma_read_bytes", "0");
        tree.set("ports/1/counters/port_xmit_data", "0");
        let (mut counters, now) = (tree.open(), Instant::now());
        counters.note(Way::Read, 100, now);
        counters.note(Way::Lent, 4096, now);
        tree.set("hw_counters/rdma_read_bytes", "100");
        tree.set("ports/1/counters/port_xmit_data", "1024");
        counters.look(now);
        assert!(counters.covers(Way::Read) && counters.covers(Way::Lent), "{counters:?}");
    }

    #[test]
    fn a_way_without_a_counter_keeps_nobody_looking() {
        let tree = Tree::new("half");
        tree.set(PORT, "0");
        let (mut counters, now) = (tree.open(), Instant::now());
        counters.note(Way::Lent, 1, now);
        assert_eq!(counters.due(), None);
        counters.note(Way::Read, 1, now);
        tree.set(PORT, "1");
        assert!(counters.look(now));
        assert_eq!(counters.due(), None);
    }

    #[test]
    fn what_has_no_counters_is_never_looked_at() {
        let mut counters = Tree::new("none").open();
        let now = Instant::now();
        counters.note(Way::Read, 100, now);
        assert!(!counters.look(now) && !counters.covers(Way::Read));
        assert!(counters.words(Way::Read).contains("no counters"));
        assert!(Counters::open(Path::new("/"), "memory").counter(Way::Read).is_none());
    }
}
