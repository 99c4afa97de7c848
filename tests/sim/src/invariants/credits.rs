//! I7: bytes in flight and queue depths stay within credits.
//!
//! From the desks, which know what each decode engine is asked for and when it has really let it go: what is out of the credits of a rank at any
//! time is never more than the handovers that its group takes at once, nor more blocks than its pool has. Only a handover that is out of them
//! pulls or expects anything, and the bytes of all that a rank pulls and expects at once fit into the blocks that are out; what a second rail moves
//! because the first was silent goes to the same place, and counts once. The queue's depth is the transport's to keep: what is checked of it is the
//! simulated fabric.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvferry_core::protocol::{EngineCall, Role};
use kvferry_core::{Direction, GroupGeometry, HandoverId, Rank, TransferId};

use super::{Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;
use crate::yard::Yard;

pub(super) struct Credits {
    handovers_max: usize,
    depth: usize,
    /// By node.
    ranks: BTreeMap<usize, DecodeRank>,
}

struct DecodeRank {
    geometry: Arc<GroupGeometry>,
    rank: Rank,
    /// Blocks of its pool, per layer group.
    blocks: Vec<u64>,
    /// Bytes of one, over all of its planes.
    block_bytes: Vec<u64>,
    /// What each handover takes of them.
    out: BTreeMap<HandoverId, Vec<u64>>,
    /// Of the transfers that it has posted or expects and that have not ended: bytes, and where in their step they begin.
    coming: BTreeMap<TransferId, (u64, u64)>,
}

impl DecodeRank {
    fn blocks_out(&self) -> Vec<u64> {
        (0..self.blocks.len()).map(|group| self.out.values().filter_map(|costs| costs.get(group)).sum()).collect()
    }

    fn bytes_coming(&self) -> u64 {
        let places = self.coming.iter().map(|(id, (bytes, first))| ((id.with_chunk(0), *first), *bytes));
        places.collect::<BTreeMap<_, _>>().values().sum()
    }

    /// Says what is wrong with what comes now.
    fn comes(&mut self, node: usize, id: TransferId, bytes: u64, first: u64, broken: &mut Vec<String>) {
        if !self.out.contains_key(&id.handover()) {
            broken.push(format!("n{node} pulls or expects {id}, for which it has no credit"));
        }
        self.coming.insert(id, (bytes, first));
        let coming = self.bytes_coming();
        let room: u64 = self.blocks_out().iter().zip(&self.block_bytes).map(|(blocks, bytes)| blocks * bytes).sum();
        if coming > room {
            broken.push(format!("n{node} has {coming} bytes in flight, and its credits cover {room}"));
        }
    }
}

impl Credits {
    pub(super) fn new(yard: &Yard) -> Self {
        let decode = yard.workers.iter().filter(|worker| worker.role == Role::Decode).map(|worker| {
            let shard = worker.geometry.shard(worker.rank).map(|shard| shard.groups).unwrap_or_default();
            let block_bytes =
                shard.iter().map(|group| group.layers.len() as u64 * group.plane_bytes.iter().sum::<u64>()).collect();
            let rank = DecodeRank {
                geometry: Arc::clone(&worker.geometry),
                rank: worker.rank,
                blocks: worker.blocks.iter().map(|blocks| u64::from(*blocks)).collect(),
                block_bytes,
                out: BTreeMap::new(),
                coming: BTreeMap::new(),
            };
            (worker.node, rank)
        });
        Credits {
            handovers_max: yard.options.handovers_max as usize,
            depth: yard.options.world.fabric.depth,
            ranks: decode.collect(),
        }
    }
}

impl Invariant for Credits {
    fn name(&self) -> &'static str {
        "I7"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        let node = entry.node;
        let Some(rank) = self.ranks.get_mut(&node) else { return };
        match &entry.what {
            What::Called(EngineCall::Place { handover, spec }) => {
                let cost = |group| u64::from(rank.geometry.blocks_for(group, spec.tokens, rank.rank).blocks);
                let costs = (0..rank.blocks.len()).map(cost).collect();
                rank.out.insert(*handover, costs);
                if rank.out.len() > self.handovers_max {
                    let (count, most) = (rank.out.len(), self.handovers_max);
                    broken.push(format!("n{node} has {count} handovers at once, where {most} are allowed"));
                }
                let out = rank.blocks_out();
                if out.iter().zip(&rank.blocks).any(|(out, blocks)| out > blocks) {
                    broken.push(format!("n{node} is to find {out:?} blocks at once, and has {:?}", rank.blocks));
                }
            }
            What::Called(EngineCall::Settled { handover, outcome, quarantined, .. })
                if !outcome.is_delivered() && !quarantined =>
            {
                rank.out.remove(handover);
            }
            What::Called(EngineCall::Returned { handover, .. }) | What::LetGo(handover) => {
                rank.out.remove(handover);
            }
            What::Posted { id, direction: Direction::Pull, bytes, first } => {
                rank.comes(node, *id, *bytes, *first, broken);
            }
            What::Expected { id, bytes, first } => rank.comes(node, *id, *bytes, *first, broken),
            What::Landed { id, .. } => {
                rank.coming.remove(id);
            }
            What::Crashed => {
                rank.out.clear();
                rank.coming.clear();
            }
            _ => {}
        }
    }

    fn look_around(&mut self, scene: &Scene<'_>, broken: &mut Vec<String>) {
        for node in 0..scene.world.nodes() {
            for (index, nic) in scene.world.nics_of(node) {
                let stats = scene.world.fabric().stats(nic);
                if stats.posted_max > self.depth as u64 {
                    broken.push(format!(
                        "NIC {index} of n{node} had {} transfers posted, where its queue takes {}",
                        stats.posted_max, self.depth
                    ));
                }
                if stats.in_flight_out + stats.in_flight_in > 0 {
                    broken.push(format!("NIC {index} of n{node} has bytes on their way: {stats:?}"));
                }
            }
        }
    }
}
