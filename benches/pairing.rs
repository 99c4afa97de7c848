//! What the control plane costs: scheduler decisions, and control messages on the wire.

#![allow(missing_docs, reason = "criterion's macros define public items")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvferry_core::protocol::{
    Command, LeastLoaded, LongestHeldPrefix, Member, Message, OfferSummary, OpenFetch, OpenedFetch, Outcome,
    OutcomeReport, Pairing, Place, Policy, RequestSpec, Role, Scheduler, SchedulerTerms,
};
use kvferry_core::wire::{decode_message, encode_message};
use kvferry_core::{
    BlockTable, Direction, Epoch, Format, GroupGeometry, GroupId, HandoverId, Model, Moment, NodeId, Parallel, Rank,
    RequestId, Tables,
};

const PREFILL_GROUPS: u32 = 8;
const DECODE_GROUPS: u32 = 16;
const FIRST_DECODE: u32 = 100;
/// Requests that are under way while others are paired.
const UNDER_WAY: u64 = 200;

fn geometry(tp: u32) -> Arc<GroupGeometry> {
    let model = Model::preset("llama-3.1-70b").unwrap_or_else(|| unreachable!("a preset"));
    Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel { tp, ..Parallel::default() } })
}

/// Eight prefill groups of four ranks, sixteen decode groups of eight; every group's rank 0 is on the node of its group's number.
fn scheduler(policy: Box<dyn Policy>) -> Scheduler {
    let terms = SchedulerTerms { prefill_jobs_max: 64, ..SchedulerTerms::default() };
    let mut scheduler = Scheduler::new(terms, policy, 1);
    let groups = (0..PREFILL_GROUPS).map(|group| (Role::Prefill, group, geometry(4)));
    let groups = groups.chain((0..DECODE_GROUPS).map(|group| (Role::Decode, FIRST_DECODE + group, geometry(8))));
    for (role, group, geometry) in groups {
        for rank in 0..geometry.ranks() {
            let place = Place {
                role,
                group: GroupId(group),
                rank: Rank(rank),
                geometry: Arc::clone(&geometry),
                blocks: vec![1 << 20],
                handovers_max: 64,
            };
            let node = NodeId(u64::from(group) + u64::from(rank) * 10_000);
            let member = Member { node, epoch: Epoch(1), address: String::new(), place: Some(place) };
            scheduler.handle_member(Moment(0), &member);
        }
    }
    for group in 0..DECODE_GROUPS {
        let added = (0..1_000).map(|hash| hash * u64::from(DECODE_GROUPS) + u64::from(group)).collect();
        scheduler.handle_message(
            Moment(0),
            NodeId(u64::from(FIRST_DECODE + group)),
            Message::Holds { added, removed: vec![] },
        );
    }
    scheduler
}

/// A request is submitted, offered, paired, delivered and freed, while [`UNDER_WAY`] others are somewhere in between.
struct Flow {
    scheduler: Scheduler,
    next: u64,
    delivered: std::collections::VecDeque<(NodeId, HandoverId)>,
}

impl Flow {
    fn new(policy: Box<dyn Policy>) -> Self {
        let mut flow = Flow { scheduler: scheduler(policy), next: 0, delivered: std::collections::VecDeque::new() };
        for _ in 0..UNDER_WAY {
            flow.pair();
        }
        flow
    }

    /// One pairing, with everything that leads to it.
    fn pair(&mut self) {
        self.next += 1;
        let now = Moment(self.next * 1_000);
        let prefix = Arc::new((0..8).map(|hash| hash + self.next % 1_000).collect());
        let spec = RequestSpec { request: RequestId(self.next), tokens: 4096, prefix, prefix_tokens: 512 };
        let request = spec.request;
        if self.scheduler.handle_submit(now, spec).is_err() {
            unreachable!("every request is new");
        }
        while let Some(command) = self.scheduler.outbox().poll_command() {
            match command {
                Command::Send { to, message: Message::Prefill(_) } => {
                    let offer = OfferSummary { request, dp: 0, steps: vec![80] };
                    self.scheduler.handle_message(now, to, Message::Offered(offer));
                }
                Command::Send { to, message: Message::Pair(pairing) } => {
                    self.delivered.push_back((to, pairing.handover))
                }
                _ => {}
            }
        }
        self.drain();
    }

    /// The oldest pairing ends.
    fn end(&mut self) {
        let Some((leader, handover)) = self.delivered.pop_front() else { unreachable!("pairings are under way") };
        let now = Moment(self.next * 1_000);
        let report = OutcomeReport { handover, outcome: Outcome::Delivered, at: now, paths: vec![] };
        self.scheduler.handle_message(now, leader, Message::Outcome(report));
        self.scheduler.handle_message(now, leader, Message::Freed { handover });
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(command) = self.scheduler.outbox().poll_command() {
            black_box(command);
        }
        while let Some(event) = self.scheduler.outbox().poll_event() {
            black_box(event);
        }
        black_box(self.scheduler.poll_timeout());
    }
}

fn pairings(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pairings");
    group.throughput(Throughput::Elements(1));
    let policies: [(&str, Box<dyn Policy>); 2] =
        [("least-loaded", Box::new(LeastLoaded)), ("longest-held-prefix", Box::new(LongestHeldPrefix::default()))];
    for (name, policy) in policies {
        let mut flow = Flow::new(policy);
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| {
                flow.pair();
                flow.end();
            });
        });
        assert_eq!(flow.delivered.len() as u64, UNDER_WAY, "every request was paired");
    }
    group.finish();
}

fn tables(blocks: u32) -> Tables {
    Tables { groups: vec![BlockTable::known(0, (0..blocks).map(|block| block * 3).collect::<Vec<_>>())] }
}

fn wire(criterion: &mut Criterion) {
    let spec =
        RequestSpec { request: RequestId(1), tokens: 4096, prefix: Arc::new((0..8).collect()), prefix_tokens: 512 };
    let handover = HandoverId(1 << 40);
    let open = OpenFetch {
        handover,
        request: spec.request,
        have: 0,
        direction: Direction::Pull,
        destination: tables(256).shapes(),
    };
    let messages = [
        ("confirmed", Message::Confirmed { handover }, 1),
        (
            "pair",
            Message::Pair(Pairing { handover, spec, source: GroupId(1), source_dp: 0, steps: vec![80], trace: None }),
            1,
        ),
        ("open", Message::Open(open), 1),
        ("opened-256", Message::Opened(OpenedFetch { handover, source: tables(256), ready: 1 }), 256),
        ("opened-8192", Message::Opened(OpenedFetch { handover, source: tables(8192), ready: 1 }), 8192),
    ];
    for (what, decode) in [("encode", false), ("decode", true)] {
        let mut group = criterion.benchmark_group(what);
        for (name, message, elements) in &messages {
            group.throughput(Throughput::Elements(*elements));
            let Ok(bytes) = encode_message(message) else { unreachable!("{name} is encoded") };
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| match decode {
                true => bencher.iter_batched(|| bytes.clone(), |bytes| decode_message(&bytes), BatchSize::SmallInput),
                false => bencher.iter(|| encode_message(black_box(message))),
            });
        }
        group.finish();
    }
}

criterion_group!(benches, pairings, wire);
criterion_main!(benches);
