//! Which way a transfer's bytes come, and how long the lone ones took.

use std::time::Instant;

use kvferry_core::TransferId;
use kvferry_transport::{Event, PeerId};

use crate::cost::{Costs, Manner};
use crate::transport::UcxTransport;

/// A transfer that has this transport for itself: what others cost does not come into its time.
pub(crate) struct Watched {
    id: TransferId,
    link: u64,
    manner: Manner,
    piece_bytes: u64,
    bytes: u64,
    since: Instant,
}

impl UcxTransport {
    pub(crate) fn costs(&mut self, link: u64) -> Option<&mut Costs> {
        let is_read_together = self.links.get(&link)?.supply.is_some();
        let (rule, told) = (self.lanes(link)?.rule(is_read_together), self.options.packed_below_bytes);
        Some(self.links.get_mut(&link)?.costs.get_or_insert_with(|| Costs::new(rule, told)))
    }

    /// The way of a transfer that can be read, of so many bytes in pieces that are so long on average. Its time is taken if it is alone.
    pub(crate) fn choose(&mut self, link: u64, id: TransferId, piece_bytes: u64, bytes: u64) -> Manner {
        let is_alone = self.fetches.is_empty()
            && !self.worker.inbox.has_sinks()
            && self.links.values().all(|link| link.outgoing.is_idle() && link.outgoing.in_flight == 0);
        let Some(costs) = self.costs(link) else { return Manner::Read };
        let manner = costs.choose(piece_bytes, bytes, is_alone);
        let since = Instant::now();
        self.watched = is_alone.then_some(Watched { id, link, manner, piece_bytes, bytes, since });
        manner
    }

    /// Every byte of a transfer is here. What that took counts if no other has begun since.
    pub(crate) fn note_taken(&mut self, id: TransferId) {
        let Some(watched) = self.watched.take().filter(|watched| watched.id == id) else { return };
        let Watched { link, manner, piece_bytes, bytes, since, .. } = watched;
        let Some(costs) = self.costs(link) else { return };
        if !costs.note(manner, piece_bytes, bytes, since.elapsed()) {
            return;
        }
        let Some(evidence) = self.evidence(link) else { return };
        let peers: Vec<PeerId> =
            self.links.get(&link).map_or_else(Vec::new, |link| link.sessions.iter().copied().collect());
        let shown = peers.into_iter().map(|peer| Event::Shown { peer, evidence: Box::new(evidence.clone()) });
        self.events.extend(shown);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvferry_core::{Direction, Evidence, PoolId};
    use kvferry_topology::Way;
    use kvferry_transport::conformance::{block_planes, whole_blocks};
    use kvferry_transport::{Pool, RemotePool, Transfer, Transport};

    use super::*;
    use crate::proof::tests::open;

    const BLOCKS: u32 = 64;
    const BLOCK_BYTES: u64 = 8 << 10;

    struct Pair {
        here: UcxTransport,
        there: UcxTransport,
        peer: PeerId,
        remote: RemotePool,
        source: Pool,
        destination: Pool,
        next: u128,
    }

    impl Pair {
        fn connect(mut here: UcxTransport, mut there: UcxTransport) -> Pair {
            let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
            let make = |id| Pool::allocate(PoolId(id), layout.clone(), "choice").unwrap();
            let (source, destination) = (make(1), make(2));
            let keys = there.bind(&source).unwrap();
            here.bind(&destination).unwrap();
            let peer = here.connect(&there.address()).unwrap();
            let remote = here.import(peer, &keys, &layout).unwrap();
            let mut pair = Pair { here, there, peer, remote, source, destination, next: 1 };
            pair.until(|event| matches!(event, Event::Connected { .. }));
            pair
        }

        fn until(&mut self, is_it: impl Fn(&Event) -> bool) -> Vec<Event> {
            let (mut events, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
            while !events.iter().any(&is_it) && Instant::now() < deadline {
                self.here.poll(&mut events);
                self.there.poll(&mut Vec::new());
            }
            assert!(events.iter().any(&is_it), "{events:?}");
            events
        }

        /// One pull of every block, checked; whether it was read, and what was shown.
        fn pull(&mut self, salt: u8) -> (bool, Vec<Evidence>) {
            (0..BLOCKS).for_each(|block| self.source.fill(0, block, salt.wrapping_add(block as u8)).unwrap());
            let link = self.link();
            self.here.links.get_mut(&link).unwrap().moved = None;
            let program = std::sync::Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev()));
            let id = TransferId(self.next);
            self.next += 1;
            let (local, direction) = (PoolId(2), Direction::Pull);
            let (peer, remote, range) = (self.peer, self.remote, program.whole());
            self.here.post(Transfer { id, peer, direction, local, remote, range, program, notice: None }).unwrap();
            let events = self.until(|event| matches!(event, Event::Completed { .. } | Event::Failed { .. }));
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            for block in 0..BLOCKS {
                self.destination.read(0, block, 0, &mut bytes).unwrap();
                let wanted = salt.wrapping_add((BLOCKS - 1 - block) as u8);
                assert!(bytes.iter().all(|byte| *byte == wanted), "block {block}");
            }
            let shown = events.into_iter().filter_map(|event| match event {
                Event::Shown { evidence, .. } => Some(*evidence),
                _ => None,
            });
            (self.here.links.get(&link).unwrap().moved == Some(Way::Read), shown.collect())
        }

        fn link(&self) -> u64 {
            self.here.sessions.get(&self.peer).unwrap().link
        }

        /// Transfers that were not, and what each way is said to have taken.
        fn inject(&mut self, read: Duration, packed: Duration) {
            let link = self.link();
            let costs = self.here.costs(link).unwrap();
            for _ in 0..9 {
                costs.note(Manner::Read, BLOCK_BYTES, 1 << 20, read);
                costs.note(Manner::Packed, BLOCK_BYTES, 1 << 20, packed);
            }
        }
    }

    #[test]
    fn what_transfers_took_decides_which_way_the_next_ones_come() {
        let (Some(here), Some(there)) = (open(), open()) else { return };
        let mut pair = Pair::connect(here, there);
        let link = pair.link();
        if !pair.here.reads_memory(link) {
            return;
        }
        assert!(!pair.pull(1).0, "8 KiB are packed by the rule");
        pair.inject(Duration::from_micros(10), Duration::from_millis(10));
        assert!(pair.pull(2).0, "reads are said to be faster");
        let words = pair.here.evidence(link).unwrap().to_string();
        assert!(words.contains("measured: reads"), "{words}");
        pair.inject(Duration::from_millis(10), Duration::from_micros(10));
        assert!(!pair.pull(3).0, "packing is said to be faster");
    }

    #[test]
    fn the_other_way_is_tried_until_both_are_known_and_that_is_shown() {
        let (Some(here), Some(there)) = (open(), open()) else { return };
        let mut pair = Pair::connect(here, there);
        let link = pair.link();
        if !pair.here.reads_memory(link) {
            return;
        }
        let mut shown = Vec::new();
        let read = (0..13).filter(|salt| {
            let (read, evidence) = pair.pull(*salt);
            shown.extend(evidence);
            read
        });
        assert!(read.count() >= 3);
        assert!(shown.iter().any(|evidence| evidence.to_string().contains("measured: reads")), "{shown:?}");
    }

    #[test]
    fn a_users_word_wins() {
        let (Some(mut here), Some(there)) = (open(), open()) else { return };
        here.options.packed_below_bytes = Some(BLOCK_BYTES);
        let mut pair = Pair::connect(here, there);
        let link = pair.link();
        if !pair.here.reads_memory(link) {
            return;
        }
        pair.inject(Duration::from_millis(10), Duration::from_micros(10));
        assert!((0..5).all(|salt| pair.pull(salt).0));
        assert!(pair.here.evidence(link).unwrap().to_string().contains("8192 bytes on are read"));
    }
}
