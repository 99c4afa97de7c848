//! Messages of every variant, fixed and random.

use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::protocol::{
    Awaited, FailReason, FetchJob, JoinError, Lost, Member, MemberList, Message, NicAdvert, OfferSummary, OpenFetch,
    OpenedFetch, Outcome, OutcomeReport, Pairing, PathReport, Place, PrefillJob, PrefillView, Profile, PushShare,
    PushShares, Refusal, RequestSpec, Role, ShareName, StandingHandovers, StandingOffer, WorkerProfile,
};
use kvferry_core::{
    BlockTable, Direction, Epoch, Format, GroupGeometry, GroupId, HandoverId, Model, Moment, NodeId, Parallel, Rank,
    RequestId, TableShape, Tables, TransportKind, UnitRange,
};
use proptest::prelude::*;

/// From what a random message is made: numbers, lists, text, choices.
#[derive(Clone, Debug)]
struct Parts {
    variant: usize,
    numbers: [u64; 4],
    small: [u32; 4],
    list: Vec<u64>,
    blocks: Vec<u32>,
    text: String,
    choice: u8,
}

/// How many variants [`build`] knows.
const VARIANTS: usize = 39;

/// One message of every variant, and of every kind of reason inside them.
pub(crate) fn every_variant() -> Vec<Message> {
    let mut messages = Vec::new();
    for variant in 0..VARIANTS {
        for choice in 0..16 {
            let parts = Parts {
                variant,
                numbers: [1, 300, u64::MAX, 0],
                small: [2, 70_000, u32::MAX, 5],
                list: vec![0, 1, u64::MAX],
                blocks: vec![3, 4, 200_000],
                text: "grün".to_owned(),
                choice,
            };
            let message = build(&parts);
            if !messages.contains(&message) {
                messages.push(message);
            }
        }
    }
    messages
}

/// Any message.
pub(crate) fn message() -> impl Strategy<Value = Message> {
    let numbers = (any::<[u64; 4]>(), any::<[u32; 4]>(), prop::collection::vec(any::<u64>(), 0..6));
    let others = (prop::collection::vec(any::<u32>(), 0..40), ".{0,20}", any::<u8>());
    (0..VARIANTS, numbers, others).prop_map(|(variant, (numbers, small, list), (blocks, text, choice))| {
        build(&Parts { variant, numbers, small, list, blocks, text, choice })
    })
}

fn build(parts: &Parts) -> Message {
    let [one, two, three, four] = parts.numbers;
    let (request, handover) = (RequestId(one), HandoverId(two));
    let (list, blocks) = (parts.list.clone(), parts.blocks.clone());
    match parts.variant {
        0 => Message::Profile(Box::new(Profile { worker: (!parts.choice.is_multiple_of(4)).then(|| parts.worker()) })),
        1 => Message::Join(Box::new(parts.member())),
        2 => Message::JoinRefused(parts.join_error()),
        3 => Message::Members(MemberList {
            whole: parts.choice.is_multiple_of(2),
            members: (0..parts.small[0] % 3).map(|_| Arc::new(parts.member())).collect(),
        }),
        4 => Message::Lost(Lost { node: NodeId(one), epoch: Epoch(two), cause: parts.text.clone() }),
        5 => Message::Prefill(PrefillJob { spec: parts.spec(), dp: parts.small[0], trace: None }),
        6 => Message::RankOpened { request, steps: blocks },
        7 => Message::RankReady { request, at: Moment(three) },
        8 => Message::RankFailed { request, reason: parts.reason() },
        9 => Message::Offered(OfferSummary { request, dp: parts.small[0], steps: blocks }),
        10 => Message::OfferReady { request, at: Moment(three) },
        11 => Message::OfferFailed { request, reason: parts.reason() },
        12 => Message::Renew { requests: list.into_iter().map(RequestId).collect() },
        13 => Message::Release { request, view: parts.view() },
        14 => Message::Pair(parts.pairing()),
        15 => Message::Abort { handover, reason: (!parts.choice.is_multiple_of(3)).then(|| parts.reason()) },
        16 => Message::Fetch(FetchJob { pairing: parts.pairing(), dp: parts.small[3] }),
        17 => Message::Started { handover },
        18 if parts.choice.is_multiple_of(2) => Message::RankDone { handover, result: Ok(parts.paths()) },
        18 => Message::RankDone { handover, result: Err(parts.reason()) },
        19 => Message::Settled { handover, outcome: parts.outcome() },
        20 => Message::Outcome(OutcomeReport {
            handover,
            outcome: parts.outcome(),
            at: Moment(four),
            paths: parts.paths(),
        }),
        21 => Message::Freed { handover },
        22 => Message::Holds { added: list.clone(), removed: list },
        23 => Message::Open(OpenFetch {
            handover,
            request,
            have: three,
            direction: parts.direction(),
            destination: parts.tables(),
        }),
        24 => Message::Opened(OpenedFetch { handover, source: parts.tables(), ready: parts.small[1] }),
        25 => Message::Expecting { handover },
        26 => Message::StepsReady { handover, ready: parts.small[2] },
        27 => Message::Refused { handover, refusal: parts.refusal() },
        28 => Message::Reading { handovers: list.into_iter().map(HandoverId).collect() },
        29 if parts.choice.is_multiple_of(3) => Message::Fetched { handover },
        29 if parts.choice % 3 == 1 => Message::Confirmed { handover },
        29 => Message::Abandon { handover },
        30 => Message::Resume { name: one, peer: two, heard: three },
        31 => Message::Heard { messages: four },
        32 => Message::OutcomesKnown { handovers: list.into_iter().map(HandoverId).collect() },
        33 => Message::Holding {
            handovers: list.into_iter().map(|id| (HandoverId(id), request, parts.tokens())).collect(),
        },
        34 => Message::Health { trouble: (!parts.choice.is_multiple_of(3)).then(|| parts.text.clone()) },
        35 => Message::StandingOffers(vec![parts.standing_offer(); usize::from(parts.choice) % 3]),
        36 => Message::StandingHandovers(Box::new(parts.standing_handovers())),
        37 => Message::Shares(PushShares {
            handover,
            step: parts.small[0],
            unit_bytes_max: parts.choice.is_multiple_of(2).then_some(three),
            shares: list.iter().zip(1..).map(|(start, chunk)| parts.share(*start, chunk)).collect(),
        }),
        _ => {
            let share = ShareName { handover, step: parts.small[1], chunk: u16::from(parts.choice) };
            match parts.choice % 3 {
                0 => Message::ShareStopped(share),
                choice => Message::ShareEnded { share, arrived: choice == 1 },
            }
        }
    }
}

impl Parts {
    fn share(&self, start: u64, chunk: u16) -> PushShare {
        PushShare { chunk, nic: self.small[2], range: UnitRange { start, end: self.numbers[2] } }
    }

    fn direction(&self) -> Direction {
        if self.choice.is_multiple_of(2) { Direction::Pull } else { Direction::Push }
    }

    fn role(&self) -> Role {
        if self.choice.is_multiple_of(2) { Role::Prefill } else { Role::Decode }
    }

    fn view(&self) -> PrefillView {
        [PrefillView::Confirmed, PrefillView::Ended, PrefillView::InDoubt][usize::from(self.choice) % 3]
    }

    fn geometry(&self) -> Arc<GroupGeometry> {
        // By name: a further preset changes no message.
        let preset = ["llama-3.1-8b", "llama-3.1-70b", "qwen3-235b", "tiny"][usize::from(self.choice) % 4];
        let mut parallel = Parallel { tp: self.small[0], ..Parallel::default() };
        if self.choice % 2 == 1 {
            parallel.stages = vec![vec![0..self.small[1]], Vec::new()];
        }
        let model = Model::preset(preset).expect("a preset");
        Arc::new(GroupGeometry { model, format: Format::default(), parallel })
    }

    fn worker(&self) -> WorkerProfile {
        let tiny = Model::preset("tiny").expect("a preset");
        let geometry = GroupGeometry { model: tiny, format: Format::default(), parallel: Parallel::default() };
        let layout = geometry.shard(Rank(0)).expect("a valid rank").layout(&self.blocks);
        let nic = NicAdvert {
            kind: [TransportKind::Shm, TransportKind::Tcp, TransportKind::Sim][usize::from(self.choice) % 3],
            device: self.text.clone(),
            host: self.text.clone(),
            address: Bytes::from(self.text.clone()),
            keys: Bytes::from(vec![self.choice; 9]),
            domain: None,
            gpu: None,
        };
        WorkerProfile {
            role: self.role(),
            group: GroupId(self.small[0]),
            rank: Rank(self.small[1]),
            geometry: self.geometry(),
            layout: Arc::new(layout),
            nics: vec![nic; usize::from(self.choice) % 3],
            direction: (!self.choice.is_multiple_of(3)).then(|| self.direction()),
            rails: 0,
        }
    }

    fn member(&self) -> Member {
        let place = Place {
            role: self.role(),
            group: GroupId(self.small[0]),
            rank: Rank(self.small[1]),
            geometry: self.geometry(),
            blocks: self.blocks.clone(),
            handovers_max: self.small[2],
        };
        let [node, epoch, ..] = self.numbers;
        Member {
            node: NodeId(node),
            epoch: Epoch(epoch),
            address: self.text.clone(),
            place: (!self.choice.is_multiple_of(5)).then_some(place),
        }
    }

    fn join_error(&self) -> JoinError {
        let (node, text) = (NodeId(self.numbers[0]), self.text.clone());
        match self.choice % 5 {
            0 => JoinError::StaleEpoch { node, epoch: Epoch(self.numbers[1]), newest: Epoch(self.numbers[2]) },
            1 => JoinError::PlaceTaken { node, holder: NodeId(self.numbers[1]) },
            2 => JoinError::GeometryDiffers { node, fields: text },
            3 => JoinError::BadPlace { node, why: text },
            _ => JoinError::Full { node, what: text, most: self.numbers[2] },
        }
    }

    fn tokens(&self) -> u64 {
        self.numbers[1] % (kvferry_core::limits::TOKENS_MAX + 1)
    }

    fn spec(&self) -> RequestSpec {
        let request = self.numbers[0];
        RequestSpec {
            request: RequestId(request),
            tokens: self.tokens(),
            prefix: Arc::new(self.list.clone()),
            prefix_tokens: self.small[3],
        }
    }

    fn pairing(&self) -> Pairing {
        Pairing {
            handover: HandoverId(self.numbers[3]),
            spec: self.spec(),
            source: GroupId(self.small[1]),
            source_dp: self.small[2],
            steps: self.blocks.clone(),
            trace: None,
        }
    }

    fn standing_offer(&self) -> StandingOffer {
        StandingOffer {
            spec: self.spec(),
            dp: self.small[1],
            steps: (!self.choice.is_multiple_of(2)).then(|| self.blocks.clone()),
            ready_at: (!self.choice.is_multiple_of(4)).then_some(Moment(self.numbers[3])),
        }
    }

    fn standing_handovers(&self) -> StandingHandovers {
        let (handover, outcome) = (HandoverId(self.numbers[3]), self.outcome());
        let report = OutcomeReport { handover, outcome, at: Moment(self.numbers[1]), paths: self.paths() };
        StandingHandovers {
            under_way: vec![self.pairing(); usize::from(self.choice) % 3],
            decided: vec![(self.pairing(), report); usize::from(self.choice) % 2],
            held: vec![(handover, self.spec(), self.choice.is_multiple_of(2)); usize::from(self.choice) % 4],
        }
    }

    fn tables(&self) -> Tables {
        let known = BlockTable::known(self.numbers[0], self.blocks.clone());
        let absent = BlockTable::from(TableShape {
            first_token: self.numbers[1],
            blocks: self.small[0],
            ring: self.choice.is_multiple_of(2),
        });
        let empty = BlockTable::known(0, Vec::new());
        Tables { groups: vec![known, absent, empty].into_iter().cycle().take(usize::from(self.choice) % 5).collect() }
    }

    fn refusal(&self) -> Refusal {
        let (request, text) = (RequestId(self.numbers[0]), self.text.clone());
        match self.choice % 10 {
            0 => Refusal::UnknownRequest(request),
            1 => Refusal::UnknownHandover(HandoverId(self.numbers[1])),
            2 => Refusal::LeaseExpired(request),
            3 => Refusal::Superseded { request, newer: HandoverId(self.numbers[2]) },
            4 => Refusal::Duplicate(request),
            5 => Refusal::NotAParty { request, group: GroupId(self.small[0]), rank: Rank(self.small[1]), why: text },
            6 => Refusal::Mismatch(text),
            7 => Refusal::Transport(text),
            8 => Refusal::TooLarge { request, tokens: self.numbers[1], hashes: self.small[0] as usize },
            _ => Refusal::BadTables(text),
        }
    }

    fn reason(&self) -> FailReason {
        let (text, node) = (self.text.clone(), NodeId(self.numbers[2]));
        match self.choice % 14 {
            0 => FailReason::RankLost {
                role: self.role(),
                group: GroupId(self.small[0]),
                rank: Rank(self.small[1]),
                node,
                cause: text,
            },
            1 => FailReason::Deadline {
                awaited: [
                    Awaited::Offer,
                    Awaited::Layers,
                    Awaited::Pairing,
                    Awaited::Placement,
                    Awaited::Transfer,
                    Awaited::Outcome,
                ][self.small[0] as usize % 6],
                waited_ms: self.numbers[0],
            },
            2 => FailReason::Transport { kind: TransportKind::Tcp, peer: node, message: text },
            3 => FailReason::Mismatch(text),
            4 => FailReason::Engine(text),
            5 => FailReason::NoGroup(self.role()),
            6 => FailReason::Unhealthy(text),
            _ => FailReason::Refused(self.refusal()),
        }
    }

    fn outcome(&self) -> Outcome {
        match self.choice % 5 {
            0 => Outcome::Delivered,
            1 => Outcome::Cancelled,
            _ => Outcome::Failed { reason: self.reason() },
        }
    }

    fn paths(&self) -> Vec<PathReport> {
        let path = PathReport {
            source_group: GroupId(self.small[0]),
            source: Rank(self.small[1]),
            destination_group: GroupId(self.small[2]),
            destination: Rank(self.small[3]),
            kind: TransportKind::Shm,
            device: self.text.clone(),
            direction: self.direction(),
            bytes: self.numbers[0],
            pieces: self.numbers[1],
        };
        vec![path; usize::from(self.choice) % 3]
    }
}
