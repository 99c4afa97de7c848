//! What is shown of the way to each peer: its lanes (E3), whether reads over them are zero-copy (E4), and that the device counted them (E5).

use std::time::Instant;

use kvferry_topology::Way;
use kvferry_transport::{Event, Evidence, Grade, LibraryName, PeerId};

use crate::device::Access;
use crate::transport::UcxTransport;

impl UcxTransport {
    /// Tells what is known of the link behind a session that has just come up.
    pub(crate) fn show(&mut self, peer: PeerId) {
        let Some(link) = self.sessions.get(&peer).map(|session| session.link) else { return };
        if let Some(evidence) = self.evidence(link) {
            self.events.push(Event::Shown { peer, evidence: Box::new(evidence) });
        }
    }

    /// Bytes went over a link without passing a processor at the end that holds them.
    pub(crate) fn note_moved(&mut self, link: u64, way: Way, bytes: u64) {
        let Some(link) = self.links.get_mut(&link).filter(|link| link.proven.is_none() && bytes > 0) else { return };
        link.moved = Some(way);
        self.counters.note(way, bytes, Instant::now());
        if let Some(due) = self.counters.due() {
            self.note_deadline(due);
        }
    }

    /// Looks at the device's counters, if that is due, and tells of every link that they prove.
    pub(crate) fn prove(&mut self, now: Instant) {
        if !self.counters.look(now) {
            if let Some(due) = self.counters.due() {
                self.note_deadline(due);
            }
            return;
        }
        let mut proven = Vec::new();
        for (id, link) in &mut self.links {
            if let Some(way) = link.moved.filter(|way| link.proven.is_none() && self.counters.covers(*way)) {
                link.proven = Some(self.counters.words(way));
                proven.push((*id, link.sessions.iter().copied().collect::<Vec<_>>()));
            }
        }
        for (id, sessions) in proven {
            let Some(evidence) = self.evidence(id) else { continue };
            for peer in sessions {
                self.events.push(Event::Shown { peer, evidence: Box::new(evidence.clone()) });
            }
        }
    }

    pub(crate) fn evidence(&mut self, id: u64) -> Option<Evidence> {
        let (reads, is_staged) = (self.reads_memory(id), self.is_staged(id));
        let lanes = self.lanes(id)?.names();
        let link = self.links.get(&id)?;
        let library = self.context.library;
        let proven = link.proven.clone();
        let moved = link.moved;
        let (collects, lends) = (link.supply.is_some(), link.depot.is_some());
        let mut evidence = Evidence {
            library: Some(LibraryName { path: library.path.clone(), version: library.version.to_string() }),
            staged: is_staged,
            ..Evidence::connected(lanes)
        };
        let is_rdma = self.method.is_rdma();
        if reads {
            // What goes by way of a stage is copied on it, whatever the lanes could do, and all of it is packed.
            if !is_staged {
                evidence.grade = Grade::E4;
                evidence = evidence.seen("large reads are zero-copy (rma_bw#)").seen(self.costs(id)?.words());
            }
            let packed = |by_read| if by_read { "are read 1 MiB at a time (rma_bw#)" } else { "come as messages (am)" };
            evidence =
                evidence.seen(format!("packed chunks {} here, at the peer they {}", packed(collects), packed(lends)));
        } else if self.access == Access::TwoSided {
            evidence = evidence.unseen("remote access, which the two-sided method leaves to UCX's rendezvous");
        } else {
            evidence.emulated = is_rdma;
            evidence = evidence.unseen("zero-copy reads, which these lanes have not: bytes go in messages");
        }
        if is_staged {
            evidence = evidence.unseen(
                "a way of a device's memory without a copy between: these lanes are not given it, host memory and a processor are between",
            );
        }
        if !self.replaced.is_empty() {
            let replaced = self.replaced.join(" ");
            evidence = evidence.seen(format!("the environment replaces settings of kvferry's: {replaced}"));
        }
        let staging = self.staging.budget().taken();
        if staging > 0 {
            evidence =
                evidence.seen(format!("packed chunks go through {} KiB that were registered before", staging >> 10));
        }
        Some(match &proven {
            Some(counted) if reads && is_staged => evidence.seen(counted.clone()),
            Some(counted) if reads => Evidence { grade: Grade::E5, ..evidence }.seen(counted.clone()),
            _ if !is_rdma => evidence.unseen("counters of a device"),
            _ if reads => {
                evidence.unseen(format!("bytes on the device ({})", self.counters.words(moved.unwrap_or(Way::Read))))
            }
            _ => evidence,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use kvferry_topology::Counters;
    use kvferry_transport::{Options, Provider, Transport};

    use super::*;
    use crate::UcxProvider;
    use crate::device::MEMORY;

    pub(crate) fn open() -> Option<UcxTransport> {
        if let Some(reason) = UcxProvider::unavailable() {
            kvferry_transport::conformance::absent("ucx", &reason);
            return None;
        }
        let provider = UcxProvider::new();
        Some(provider.opened(&provider.named(MEMORY)?, &Options::default()).unwrap())
    }

    fn shown(transport: &mut UcxTransport) -> Vec<Evidence> {
        let mut events = Vec::new();
        transport.poll(&mut events);
        let one = |event| match event {
            Event::Shown { evidence, .. } => Some(*evidence),
            _ => None,
        };
        events.into_iter().filter_map(one).collect()
    }

    /// Counters of a device that is not there, above a connection that is.
    #[test]
    fn a_link_is_proven_by_counters_that_cover_its_bytes_and_is_told_of_once() {
        let (Some(mut here), Some(mut there)) = (open(), open()) else { return };
        let peer = here.connect(&there.address()).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        let mut first = Vec::new();
        while first.is_empty() && Instant::now() < until {
            first.extend(shown(&mut here));
            shown(&mut there);
        }
        let link = here.sessions.get(&peer).unwrap().link;
        let reads = here.reads_memory(link);
        let grade = if reads { Grade::E4 } else { Grade::E3 };
        assert_eq!(first.iter().map(|evidence| evidence.grade).collect::<Vec<_>>(), [grade]);
        assert!(!first.first().unwrap().lanes.is_empty() && !first.first().unwrap().emulated, "{first:?}");

        let root: PathBuf = std::env::temp_dir().join(format!("kvferry-proof-{}", std::process::id()));
        let counters = root.join("sys/class/infiniband/rdmap40s0/ports/1/hw_counters");
        std::fs::create_dir_all(&counters).unwrap();
        let count = |bytes: &str| std::fs::write(counters.join("rdma_read_bytes"), bytes).unwrap();
        count("7");
        here.counters = Counters::open(&root, "rdmap40s0:1");
        here.note_moved(link, Way::Read, 4096);
        assert_eq!(shown(&mut here), [], "the device has counted nothing");
        count("4103");
        let mut later = Vec::new();
        while later.is_empty() && Instant::now() < until {
            later.extend(shown(&mut here));
        }
        std::fs::remove_dir_all(&root).unwrap();
        // Counters do not make messages zero-copy.
        let wanted = if reads { Grade::E5 } else { grade };
        assert_eq!(later.iter().map(|evidence| evidence.grade).collect::<Vec<_>>(), [wanted]);
        if reads {
            assert!(
                later.iter().all(|evidence| evidence.to_string().contains("rdma_read_bytes +4096 for 4096")),
                "{later:?}"
            );
        }
        here.note_moved(link, Way::Read, 4096);
        assert_eq!((here.counters.due(), shown(&mut here)), (None, Vec::new()), "proven once");
    }
}
