//! What is shown of the way to each peer: its lanes (E3), whether reads over them are zero-copy (E4), and that the device counted them (E5).

use std::time::Instant;

use kvferry_transport::{Event, Evidence, Grade, LibraryName, PeerId};

use crate::counters::Way;
use crate::device::Method;
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

    fn evidence(&mut self, id: u64) -> Option<Evidence> {
        let reads = self.reads_memory(id);
        let lanes = self.lanes(id)?.names();
        let link = self.links.get(&id)?;
        let library = self.context.library;
        let mut evidence = Evidence {
            library: Some(LibraryName { path: library.path.clone(), version: library.version.to_string() }),
            ..Evidence::connected(lanes)
        };
        let is_rdma = matches!(self.method, Method::Srd | Method::Verbs);
        if reads {
            evidence.grade = Grade::E4;
            evidence = evidence.seen("large reads are zero-copy (rma_bw#)");
        } else {
            evidence.emulated = is_rdma;
            evidence = evidence.unseen("zero-copy reads, which these lanes have not: bytes go in messages");
        }
        Some(match &link.proven {
            Some(counted) if reads => Evidence { grade: Grade::E5, ..evidence }.seen(counted.clone()),
            _ if !is_rdma => evidence.unseen("counters of a device"),
            _ if reads => evidence
                .unseen(format!("bytes on the device ({})", self.counters.words(link.moved.unwrap_or(Way::Read)))),
            _ => evidence,
        })
    }
}
