//! How messages are written, pinned: peers of other builds that speak the same protocol rely on it.
//!
//! `KVFERRY_WRITE_ENCODING=1 cargo test -p kvferry-core --test encoding` writes the list anew, which only a new protocol may need (`wire.rs`).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use kvferry_core::protocol::{Awaited, FailReason, JoinError, Message, Outcome, PrefillView, Refusal, Role};
use kvferry_core::wire::{PROTOCOL_MAX, encode_for, encode_message};
use kvferry_core::{
    Direction, Epoch, GpuIdentity, GroupId, HandoverId, MemoryDomain, NodeId, Rank, RequestId, TransportKind,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

#[allow(dead_code, reason = "random messages are for the wire tests")]
mod messages;

/// The name of a variant.
fn name(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// One line for each message: its number, its name, and a digest of every example of it.
fn messages_as_written() -> Vec<String> {
    let mut written: BTreeMap<(u8, String), Sha256> = BTreeMap::new();
    for message in messages::every_variant() {
        let bytes = encode_message(&message).expect("encodes");
        written.entry((bytes[0], name(&message))).or_default().update(&bytes);
    }
    let lines = written.into_iter();
    lines.map(|((number, name), digest)| format!("{number} {name} {}", hex(&digest.finalize()[..8]))).collect()
}

fn line(of: &str, value: &(impl Serialize + std::fmt::Debug)) -> String {
    format!("{of} {} {}", name(value), hex(&postcard::to_allocvec(value).expect("encodes")))
}

/// One line for each variant of what messages are made of.
fn parts_as_written() -> Vec<String> {
    let (node, request, handover) = (NodeId(1), RequestId(2), HandoverId(3));
    let (group, rank, role) = (GroupId(4), Rank(5), Role::Decode);
    let text = || "x".to_owned();
    let mut lines = Vec::new();
    lines.extend([Role::Prefill, Role::Decode].map(|role| line("role", &role)));
    lines.extend([Direction::Pull, Direction::Push].map(|direction| line("direction", &direction)));
    lines.extend(
        [TransportKind::Shm, TransportKind::Tcp, TransportKind::Sim, TransportKind::Cuda, TransportKind::Ucx]
            .map(|kind| line("transport", &kind)),
    );
    lines.extend([PrefillView::Confirmed, PrefillView::Ended, PrefillView::InDoubt].map(|view| line("view", &view)));
    let awaited =
        [Awaited::Offer, Awaited::Pairing, Awaited::Placement, Awaited::Layers, Awaited::Transfer, Awaited::Outcome];
    lines.extend(awaited.map(|awaited| line("awaited", &awaited)));
    let failed = Outcome::Failed { reason: FailReason::NoGroup(role) };
    lines.extend([Outcome::Delivered, failed, Outcome::Cancelled].map(|outcome| line("outcome", &outcome)));
    let reasons = [
        FailReason::RankLost { role, group, rank, node, cause: text() },
        FailReason::Refused(Refusal::UnknownRequest(request)),
        FailReason::Deadline { awaited: Awaited::Offer, waited_ms: 7 },
        FailReason::Transport { kind: TransportKind::Tcp, peer: node, message: text() },
        FailReason::Mismatch(text()),
        FailReason::Engine(text()),
        FailReason::Unhealthy(text()),
        FailReason::NoGroup(role),
    ];
    lines.extend(reasons.map(|reason| line("reason", &reason)));
    let refusals = [
        Refusal::UnknownRequest(request),
        Refusal::UnknownHandover(handover),
        Refusal::LeaseExpired(request),
        Refusal::Superseded { request, newer: handover },
        Refusal::TooLarge { request, tokens: 8, hashes: 9 },
        Refusal::Duplicate(request),
        Refusal::NotAParty { request, group, rank, why: text() },
        Refusal::Mismatch(text()),
        Refusal::Transport(text()),
        Refusal::BadTables(text()),
    ];
    lines.extend(refusals.map(|refusal| line("refusal", &refusal)));
    let errors = [
        JoinError::StaleEpoch { node, epoch: Epoch(1), newest: Epoch(2) },
        JoinError::PlaceTaken { node, holder: NodeId(6) },
        JoinError::GeometryDiffers { node, fields: text() },
        JoinError::BadPlace { node, why: text() },
        JoinError::Full { node, what: text(), most: 10 },
    ];
    lines.extend(errors.map(|error| line("join error", &error)));
    lines
}

/// What follows a message that belongs to a span (protocol 3).
fn traces_as_written() -> Vec<String> {
    let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut lines = Vec::new();
    for mut message in messages::every_variant() {
        let bare = encode_message(&message).expect("encodes").len();
        let place = match &mut message {
            Message::Prefill(job) => &mut job.trace,
            Message::Pair(pairing) => &mut pairing.trace,
            Message::Fetch(job) => &mut job.pairing.trace,
            _ => continue,
        };
        *place = Some(text.parse().expect("parses"));
        let line =
            format!("trace {} {}", name(&message), hex(&encode_for(&message, PROTOCOL_MAX).expect("encodes")[bare..]));
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

/// What follows the profile of a worker with rails (protocol 4).
fn rails_as_written() -> Vec<String> {
    let with_worker = |message: &Message| matches!(message, Message::Profile(profile) if profile.worker.is_some());
    let Some(Message::Profile(mut profile)) = messages::every_variant().into_iter().find(with_worker) else {
        return Vec::new();
    };
    let bare = encode_message(&Message::Profile(profile.clone())).expect("encodes").len();
    profile.worker.iter_mut().for_each(|worker| worker.rails = 4);
    let long = encode_for(&Message::Profile(profile), PROTOCOL_MAX).expect("encodes");
    vec![format!("rails Profile {}", hex(&long[bare..]))]
}

/// What follows the profile of a worker whose NICs are reached from other hosts (protocol 5).
fn domains_as_written() -> Vec<String> {
    let with_nics = |message: &Message| matches!(message, Message::Profile(profile) if profile.worker.as_ref().is_some_and(|worker| !worker.nics.is_empty()));
    let Some(Message::Profile(mut profile)) = messages::every_variant().into_iter().find(with_nics) else {
        return Vec::new();
    };
    let bare = encode_message(&Message::Profile(profile.clone())).expect("encodes").len();
    let domain = MemoryDomain { name: "x".to_owned(), address: vec![1, 2].into() };
    let mut nics = profile.worker.iter_mut().flat_map(|worker| &mut worker.nics);
    nics.by_ref().take(1).for_each(|nic| nic.domain = Some(domain.clone()));
    drop(nics);
    let long = encode_for(&Message::Profile(profile), PROTOCOL_MAX).expect("encodes");
    vec![format!("domains Profile {}", hex(&long[bare..]))]
}

/// What follows the profile of a worker whose NICs are GPUs (protocol 6).
fn gpus_as_written() -> Vec<String> {
    let with_nics = |message: &Message| matches!(message, Message::Profile(profile) if profile.worker.as_ref().is_some_and(|worker| !worker.nics.is_empty()));
    let Some(Message::Profile(mut profile)) = messages::every_variant().into_iter().find(with_nics) else {
        return Vec::new();
    };
    let bare = encode_message(&Message::Profile(profile.clone())).expect("encodes").len();
    let gpu = GpuIdentity { uuid: [7; 16], is_instance: false, others: vec![([8; 16], true), ([9; 16], false)] };
    let nic = profile.worker.as_mut().and_then(|worker| worker.nics.first_mut());
    nic.expect("it has NICs").gpu = Some(gpu);
    let long = encode_for(&Message::Profile(profile), PROTOCOL_MAX).expect("encodes");
    vec![format!("gpus Profile {}", hex(&long[bare..]))]
}

#[test]
fn messages_are_written_as_they_always_were() {
    let lines = [
        messages_as_written(),
        parts_as_written(),
        traces_as_written(),
        rails_as_written(),
        domains_as_written(),
        gpus_as_written(),
    ]
    .concat();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/encoding.txt");
    if std::env::var_os("KVFERRY_WRITE_ENCODING").is_some() {
        std::fs::write(&path, lines.join("\n") + "\n").expect("writable");
    }
    let pinned = std::fs::read_to_string(&path).expect("the list is checked in");
    let changed: Vec<&str> = pinned.lines().filter(|line| !lines.iter().any(|now| now == line)).collect();
    assert!(changed.is_empty(), "peers of the same protocol would misunderstand {changed:#?}; see PROTOCOL_MAX");
    assert_eq!(pinned.lines().count(), lines.len(), "what is new is to be pinned, too");
}

#[test]
fn only_the_fourth_protocol_has_shares() {
    let is_new = |message: &Message| {
        matches!(message, Message::Shares(_) | Message::ShareStopped(_) | Message::ShareEnded { .. })
    };
    let (new, old): (Vec<Message>, Vec<Message>) = messages::every_variant().into_iter().partition(is_new);
    let numbers = |messages: &[Message]| -> Vec<u8> {
        messages.iter().map(|message| encode_message(message).expect("encodes")[0]).collect()
    };
    assert!(numbers(&new).into_iter().min() > numbers(&old).into_iter().max());
}

#[test]
fn only_the_second_protocol_has_resumption() {
    let resume = Message::Resume { name: 1, peer: 0, heard: 0 };
    let numbers = [resume, Message::Heard { messages: 1 }].map(|message| encode_message(&message).expect("encodes")[0]);
    let first: Vec<u8> = messages::every_variant()
        .iter()
        .filter(|message| !matches!(message, Message::Resume { .. } | Message::Heard { .. }))
        .filter(|message| {
            !matches!(message, Message::Shares(_) | Message::ShareStopped(_) | Message::ShareEnded { .. })
        })
        .map(|message| encode_message(message).expect("encodes")[0])
        .collect();
    // What a later protocol adds never moves what an earlier one has.
    assert!(first.iter().all(|number| numbers.iter().all(|later| number < later)));
}
