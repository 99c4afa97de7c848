//! A prefill and a decode group without actors or transports: programs are copied naively.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;

use kvferry_core::protocol::{EngineCall, EngineEvent, Outcome, PrefillJob, PrefillView, RequestSpec};
use kvferry_core::{
    FenceProof, Format, GroupGeometry, HandoverId, Location, Model, PairPlan, Parallel, PlanRequest, PoolId,
    PoolLayout, Rank, RequestId, Tables, sources,
};
use kvferry_synthetic::{DecodeEngine, Engine, EngineConfig, EngineReport, PrefillEngine};
use kvferry_transport::conformance::apart;
use kvferry_transport::{Pool, PoolOptions};

pub(crate) struct Node<E> {
    pub(crate) rank: Rank,
    pub(crate) engine: E,
    pub(crate) pool: Pool,
    pub(crate) events: Vec<EngineEvent>,
}

pub(crate) struct Bench {
    pub(crate) source: Arc<GroupGeometry>,
    pub(crate) destination: Arc<GroupGeometry>,
    pub(crate) prefill: Vec<Node<PrefillEngine>>,
    pub(crate) decode: Vec<Node<DecodeEngine>>,
    source_dp: u32,
}

/// What differs from bench to bench.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) source: GroupGeometry,
    pub(crate) destination: GroupGeometry,
    pub(crate) source_dp: u32,
    pub(crate) destination_dp: u32,
    pub(crate) blocks: u32,
    pub(crate) layers_per_step: Option<u32>,
    pub(crate) reuse_prefix: bool,
}

impl Setup {
    pub(crate) fn new(model: Model, source: (Parallel, Format), destination: (Parallel, Format)) -> Setup {
        let geometry = |(parallel, format)| GroupGeometry { model: model.clone(), format, parallel };
        Setup {
            source: geometry(source),
            destination: geometry(destination),
            source_dp: 0,
            destination_dp: 0,
            blocks: 24,
            layers_per_step: None,
            reuse_prefix: false,
        }
    }

    pub(crate) fn tiny() -> Setup {
        let model = Model::preset("tiny").unwrap();
        Setup::new(model, Default::default(), Default::default())
    }
}

pub(crate) fn spec(request: u64, tokens: u64, prefix_tokens: u32, prefix: &[u64]) -> RequestSpec {
    RequestSpec { request: RequestId(request), tokens, prefix: Arc::new(prefix.to_vec()), prefix_tokens }
}

impl<E: Engine> Node<E> {
    fn new(
        setup: &Setup,
        geometry: &Arc<GroupGeometry>,
        rank: Rank,
        make: impl Fn(EngineConfig, Pool) -> E,
    ) -> Node<E> {
        let blocks = vec![setup.blocks; geometry.model.groups.len()];
        let layout = geometry.shard(rank).unwrap().layout(&blocks);
        let id = PoolId(rank.0);
        let pool = if env!("CARGO_CRATE_NAME") == "on_device" {
            apart(id, layout)
        } else {
            let options = PoolOptions { populate: false, huge_pages: false };
            Pool::allocate_with(id, layout, "test", &options).unwrap()
        };
        let config = EngineConfig {
            geometry: geometry.clone(),
            rank,
            blocks,
            layers_per_step: setup.layers_per_step,
            reuse_prefix: setup.reuse_prefix,
            seed: 7 + u64::from(rank.0),
        };
        let mut node = Node { rank, engine: make(config, pool.clone()), pool, events: Vec::new() };
        node.settle();
        node
    }

    /// A call, and all the work that it causes.
    pub(crate) fn call(&mut self, call: EngineCall) {
        self.engine.handle(call, &mut |event| self.events.push(event));
        self.settle();
    }

    pub(crate) fn settle(&mut self) {
        for _ in 0..1_000_000 {
            if !self.engine.work(&mut |event| self.events.push(event)) {
                return;
            }
        }
        panic!("the engine never ends its work");
    }
}

impl Bench {
    pub(crate) fn new(setup: &Setup) -> Bench {
        let source = Arc::new(setup.source.clone());
        let destination = Arc::new(setup.destination.clone());
        let prefill = source
            .owners(setup.source_dp)
            .into_iter()
            .map(|rank| Node::new(setup, &source, rank, |c, p| PrefillEngine::new(c, p).unwrap()));
        let decode = destination
            .owners(setup.destination_dp)
            .into_iter()
            .map(|rank| Node::new(setup, &destination, rank, |c, p| DecodeEngine::new(c, p).unwrap()));
        Bench { prefill: prefill.collect(), decode: decode.collect(), source_dp: setup.source_dp, source, destination }
    }

    pub(crate) fn prefill(&mut self, spec: &RequestSpec) {
        let job = PrefillJob { spec: spec.clone(), dp: self.source_dp, trace: None };
        self.prefill.iter_mut().for_each(|node| node.call(EngineCall::Prefill(job.clone())));
    }

    pub(crate) fn release(&mut self, spec: &RequestSpec) {
        let call = EngineCall::Release { request: spec.request, view: PrefillView::Confirmed };
        self.prefill.iter_mut().for_each(|node| node.call(call.clone()));
    }

    pub(crate) fn place(&mut self, handover: u64, spec: &RequestSpec) {
        let call = EngineCall::Place { handover: HandoverId(handover), spec: spec.clone() };
        self.decode.iter_mut().for_each(|node| node.call(call.clone()));
    }

    pub(crate) fn settled(&mut self, handover: u64, spec: &RequestSpec, outcome: Outcome, quarantined: bool) {
        let handover = HandoverId(handover);
        let call = EngineCall::Settled { handover, request: spec.request, outcome, quarantined };
        self.decode.iter_mut().for_each(|node| node.call(call.clone()));
    }

    pub(crate) fn returned(&mut self, handover: u64) {
        let call = EngineCall::Returned { handover: HandoverId(handover), proof: FenceProof::OwnerCopies };
        self.decode.iter_mut().for_each(|node| node.call(call.clone()));
    }

    /// Copies everything that a placed handover needs. Returns the bytes that moved.
    pub(crate) fn copy(&mut self, handover: u64, spec: &RequestSpec) -> u64 {
        let mut moved = 0;
        for to in &self.decode {
            let (destination, have) = placed(&to.events, handover).unwrap();
            for rank in sources(&self.source, self.source_dp, &self.destination, to.rank).unwrap() {
                let from = self.prefill.iter().find(|node| node.rank == rank).unwrap();
                let (source, steps) = opened(&from.events, spec.request).unwrap();
                let plan = PairPlan::new(&self.source, rank, &self.destination, to.rank).unwrap();
                let mut start = 0;
                for end in steps {
                    let (tokens, layers) = (spec.tokens, start..end);
                    start = end;
                    let request = PlanRequest { tokens, have, layers, source, destination };
                    let program = plan.program(&request).unwrap();
                    let (here, there) = (from.pool.layout(), to.pool.layout());
                    for copy in program.copies(program.whole(), here, there) {
                        copy_bytes(&from.pool, copy.source, &to.pool, copy.destination, copy.bytes);
                        moved += copy.bytes;
                    }
                }
            }
        }
        moved
    }

    /// Everything from prefill to release. Returns the bytes that moved.
    pub(crate) fn hand_over(&mut self, handover: u64, spec: &RequestSpec) -> u64 {
        self.prefill(spec);
        self.place(handover, spec);
        let moved = self.copy(handover, spec);
        self.release(spec);
        self.settled(handover, spec, Outcome::Delivered, false);
        moved
    }

    /// All ranks of the decode side together.
    pub(crate) fn report(&self) -> EngineReport {
        let mut sum = EngineReport::default();
        self.decode.iter().for_each(|node| sum.merge(&node.engine.report()));
        sum
    }

    /// What is left when nothing goes on any more.
    pub(crate) fn assert_quiet(&self) {
        let prefill = self.prefill.iter().map(|node| node.engine.report());
        for report in prefill.chain(self.decode.iter().map(|node| node.engine.report())) {
            assert_eq!(report.first_mismatch, None);
            assert_eq!((report.mismatched_bytes, report.stray_bytes), (0, 0));
            assert_eq!((report.leaked_blocks, report.quarantined_blocks), (0, 0));
            assert_eq!((report.held_requests, report.held_blocks, report.queued_requests), (0, 0, 0));
            assert_eq!(report.free_blocks + report.cached_blocks, report.blocks);
        }
    }

    /// The hashes that a decode rank says it holds.
    pub(crate) fn held_hashes(&self, node: usize) -> Vec<u64> {
        let mut held = BTreeMap::new();
        for event in &self.decode[node].events {
            if let EngineEvent::Holds { added, removed } = event {
                for hash in added {
                    assert!(held.insert(*hash, ()).is_none(), "{hash} was added twice");
                }
                for hash in removed {
                    assert!(held.remove(hash).is_some(), "{hash} was removed twice");
                }
            }
        }
        held.into_keys().collect()
    }
}

pub(crate) fn placed(events: &[EngineEvent], handover: u64) -> Option<(&Tables, u64)> {
    events.iter().find_map(|event| match event {
        EngineEvent::Placed { handover: of, tables, have } if *of == HandoverId(handover) => Some((tables, *have)),
        _ => None,
    })
}

/// The latest offer of a request.
pub(crate) fn opened(events: &[EngineEvent], request: RequestId) -> Option<(&Tables, Vec<u32>)> {
    events.iter().rev().find_map(|event| match event {
        EngineEvent::Opened { request: of, tables, steps } if *of == request => Some((tables, steps.clone())),
        _ => None,
    })
}

pub(crate) fn freed(events: &[EngineEvent], handover: u64) -> bool {
    let freed = EngineEvent::Freed { handover: HandoverId(handover) };
    events.contains(&freed)
}

fn copy_bytes(from: &Pool, source: Location, to: &Pool, destination: Location, bytes: u64) {
    let mut done = 0;
    while done < bytes {
        let (plane, block, offset, room) = find(from.layout(), source, done);
        let (to_plane, to_block, to_offset, to_room) = find(to.layout(), destination, done);
        let mut buffer = vec![0; (bytes - done).min(room).min(to_room) as usize];
        from.read(plane, block, offset, &mut buffer).unwrap();
        to.write(to_plane, to_block, to_offset, &buffer).unwrap();
        done += buffer.len() as u64;
    }
}

/// Plane, block, byte in the block, and bytes to the block's end.
fn find(layout: &PoolLayout, at: Location, skip: u64) -> (u32, u32, u64, u64) {
    let offset = at.offset + skip;
    for (number, plane) in layout.planes.iter().enumerate() {
        let end = plane.offset + u64::from(plane.blocks) * plane.block_stride;
        if plane.region == at.region && (plane.offset..end).contains(&offset) {
            let inner = (offset - plane.offset) % plane.block_stride;
            let block = (offset - plane.offset) / plane.block_stride;
            return (number as u32, block as u32, inner, plane.block_bytes - inner);
        }
    }
    panic!("{at:?} + {skip} is in no plane");
}
