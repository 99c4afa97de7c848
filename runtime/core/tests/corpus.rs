//! The fuzz targets over their checked-in corpus, so that every build runs it.
//!
//! `KVFERRY_WRITE_CORPUS=1 cargo test -p kvferry-core --test corpus` writes the corpus anew from real encodings.

use std::path::{Path, PathBuf};

use kvferry_core::protocol::Message;

#[allow(dead_code, reason = "random messages are for the wire tests")]
mod messages;

mod control_frame {
    include!("../../../fuzz/checks/control_frame.rs");

    pub(crate) fn check(bytes: &[u8]) {
        control_frame(bytes);
    }

    pub(crate) fn stream(messages: &[super::Message]) -> Vec<u8> {
        let frame = |(message, sequence)| Frame::Sealed {
            sequence,
            mac: [0; 16],
            body: encode_for(message, PROTOCOL_MAX).expect("encodes"),
        };
        messages.iter().zip(0..).flat_map(|pair| frame(pair).encode().expect("encodes")).collect()
    }

    pub(crate) fn handshake() -> Vec<Frame> {
        use kvferry_core::wire::{Hello, Welcome};
        use kvferry_core::{Epoch, NodeId};
        let (node, epoch) = (NodeId(1), Epoch(1));
        let hello = Hello {
            protocol_min: 1,
            protocol_max: 1,
            capabilities: 0,
            node,
            epoch,
            expects: NodeId(2),
            nonce: [7; 16],
            secured: true,
        };
        let welcome = Welcome { protocol: 1, capabilities: 0, node, epoch, nonce: [8; 16], mac: [9; 16] };
        vec![Frame::Hello(hello), Frame::Welcome(welcome), Frame::Proof([1; 16]), Frame::Reject("no".to_owned())]
    }
}

mod program {
    include!("../../../fuzz/checks/program.rs");

    pub(crate) fn check(bytes: &[u8]) {
        program(bytes);
    }

    /// A pull between two ranks of the tiny model, at several lengths, with and without the source's tables.
    pub(crate) fn real() -> Vec<(String, Vec<u8>)> {
        use kvferry_core::{
            BlockTable, Format, GroupGeometry, Model, Order, PairPlan, Parallel, PlanRequest, Rank, Tables,
        };
        let model = || Model::preset("tiny").expect("a preset");
        let geometry = |tp, block_tokens, order| GroupGeometry {
            model: model(),
            format: Format { block_tokens, order, ..Format::default() },
            parallel: Parallel { tp, ..Parallel::default() },
        };
        let (from, to) = (geometry(2, 16, Order::Nhd), geometry(4, 8, Order::Hnd));
        let plan = PairPlan::new(&from, Rank(0), &to, Rank(1)).expect("they fit");
        let mut files = Vec::new();
        for tokens in [0u64, 1, 40, 100] {
            let table = |geometry: &GroupGeometry, rank| {
                let shape = geometry.blocks_for(0, tokens, Rank(rank));
                Tables { groups: vec![BlockTable::known(0, (0..shape.blocks).rev().collect::<Vec<_>>())] }
            };
            let (source, destination) = (table(&from, 0), table(&to, 1));
            let request = PlanRequest { tokens, have: 0, layers: 0..2, source: &source, destination: &destination };
            let program = plan.program(&request).expect("the tables fit");
            for (name, program) in [("whole", program.clone()), ("sourceless", program.without(End::Source))] {
                let mut bytes = Vec::new();
                program.encode(&mut bytes);
                files.push((format!("{name}-{tokens}"), bytes));
            }
        }
        files
    }
}

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

include!("../../../fuzz/checks/corpus.rs");

fn write(target: &str, name: &str, bytes: &[u8]) {
    std::fs::write(corpus(target).join(name), bytes).expect("writable");
}

#[test]
fn the_corpus_is_survived() {
    if std::env::var_os("KVFERRY_WRITE_CORPUS").is_some() {
        for frame in control_frame::handshake() {
            let name = format!("{frame:?}").split(['(', ' ']).next().unwrap_or_default().to_lowercase();
            write("control_frame", &name, &frame.encode().expect("encodes"));
        }
        // One file for each variant: its longest message that is still small, framed.
        let mut files = std::collections::BTreeMap::<String, Vec<u8>>::new();
        for message in messages::every_variant() {
            let tag = format!("{message:?}").split(['(', ' ', '{']).next().unwrap_or_default().to_lowercase();
            let (bytes, file) = (control_frame::stream(std::slice::from_ref(&message)), files.entry(tag).or_default());
            if bytes.len() > file.len() && (file.is_empty() || bytes.len() < 400) {
                *file = bytes;
            }
        }
        for (tag, bytes) in files {
            write("control_frame", &tag, &bytes);
        }
        for (name, bytes) in program::real() {
            write("program", &name, &bytes);
        }
    }
    survive("control_frame", control_frame::check);
    survive("program", program::check);
}
