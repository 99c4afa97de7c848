//! What agents tell, read and written; what is none of it, refused.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use bytes::Bytes;
use kvferry_nixl::{AgentMetadata, Connection, Frame, MemoryKind, Notification, Range, Section, WireError};
use proptest::prelude::*;

/// What an agent of NIXL 1.5.1 gave: tcp, two ranges of memory that were registered in the other order.
const CAPTURED: &[u8] = include_bytes!("captured/agent-1.5.1.bin");

fn range(address: u64, bytes: u64) -> Range {
    Range { device: 0, address, bytes, key: Bytes::from_static(b"key") }
}

fn agent() -> AgentMetadata {
    AgentMetadata {
        name: "decode-0#7".into(),
        connections: vec![Connection { backend: "UCX".into(), address: Bytes::from_static(b"\0address|") }],
        sections: vec![
            Section::new("UCX", MemoryKind::Dram, vec![range(8192, 4096), range(0, 4096)]).unwrap(),
            Section::new("UCX", MemoryKind::Vram, vec![Range { device: 3, ..range(1 << 40, 64) }]).unwrap(),
        ],
    }
}

fn decode(bytes: impl Into<Bytes>) -> Result<AgentMetadata, WireError> {
    AgentMetadata::decode(bytes.into())
}

#[test]
fn a_real_agent_is_understood_and_written_back_byte_by_byte() {
    let read = decode(CAPTURED).unwrap();
    assert_eq!(read.name, "agentA");
    assert_eq!(read.connections.len(), 1);
    assert_eq!((read.connection("UCX").unwrap().address.len(), read.connection("LIBFABRIC")), (106, None));
    let [section] = &read.sections[..] else { panic!("{:?}", read.sections) };
    assert_eq!((section.backend.as_str(), section.kind), ("UCX", MemoryKind::Dram));
    let base = 139_627_844_337_664;
    let places: Vec<(u64, u64, u64)> = section.ranges.iter().map(|r| (r.device, r.address, r.bytes)).collect();
    assert_eq!(places, [(0, base, 4096), (0, base + (1 << 20), 65536)]);
    assert!(section.ranges.iter().all(|range| range.key.len() == 11));
    assert_eq!(read.encode().unwrap(), CAPTURED);
}

#[test]
fn what_is_written_is_read() {
    let agent = agent();
    assert_eq!(decode(agent.encode().unwrap()), Ok(agent.clone()));
    let part = AgentMetadata { connections: Vec::new(), ..agent.clone() };
    assert_eq!(decode(part.encode().unwrap()), Ok(part));
    let bare = AgentMetadata { sections: Vec::new(), ..agent.clone() };
    assert_eq!(decode(bare.encode().unwrap()), Ok(bare));
    let extended = [agent.encode().unwrap(), b"whatever others keep here".to_vec()].concat();
    assert_eq!(decode(extended), Ok(agent));
}

#[test]
fn a_range_is_found_by_what_lies_in_it() {
    let found = |device, address, bytes| {
        let agent = agent();
        let section = &agent.sections[usize::from(device > 0)];
        section.find(device, address, bytes).map(|range| range.address)
    };
    assert_eq!(found(0, 0, 4096), Some(0));
    assert_eq!(found(0, 4095, 1), Some(0));
    assert_eq!(found(0, 8192 + 4096, 0), Some(8192), "nothing, at its end");
    assert_eq!(found(0, 4095, 2), None, "it ends first");
    assert_eq!(found(0, 4096, 1), None, "between two");
    assert_eq!(found(0, u64::MAX, u64::MAX), None);
    assert_eq!((found(3, 1 << 40, 64), found(2, 1 << 40, 64)), (Some(1 << 40), None));
}

#[test]
fn sections_that_a_nixl_agent_refuses_are_not_made() {
    let section = |ranges| Section::new("UCX", MemoryKind::Dram, ranges).unwrap_err().to_string();
    assert!(section(vec![]).contains("leave it out"));
    assert!(section(vec![range(1, 2), range(1, 2)]).contains("twice"));
    assert!(section(vec![range(u64::MAX, 2)]).contains("address space"));
    let mut agent = agent();
    agent.sections[0].ranges.reverse();
    assert!(agent.encode().unwrap_err().to_string().contains("order"));
    let swapped = {
        let mut bytes = CAPTURED.to_vec();
        let first = bytes.len() - 44;
        let (one, other) = bytes.split_at_mut(first);
        one[first - 44..].swap_with_slice(other);
        bytes
    };
    assert!(decode(swapped).unwrap_err().to_string().contains("order"));
}

#[test]
fn whatever_is_cut_or_claims_too_much_says_where() {
    for end in 0..CAPTURED.len() {
        let error = decode(&CAPTURED[..end]).unwrap_err();
        assert!(matches!(error, WireError::Cut { at, .. } if at <= end), "{end}: {error}");
    }
    assert_eq!(decode(&b"nothing of nixl at all"[..]), Err(WireError::NotNixl));
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = CAPTURED.to_vec();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        decode(changed).unwrap_err()
    };
    let huge = u64::MAX.to_le_bytes();
    assert!(matches!(with(16, &huge), WireError::TooLong { field: "Agent", .. }), "a name without end");
    assert!(matches!(with(44, &huge), WireError::TooMany { field: "Conns", .. }), "connections without end");
    assert!(matches!(with(24, b"\xff"), WireError::NotText { .. }));
    assert!(matches!(with(11, b"a"), WireError::Tag { at: 11, .. }));
    let kind = CAPTURED.windows(12).position(|part| part == b"nixlSDList|t").unwrap() + 20;
    assert!(matches!(with(kind, &9u32.to_le_bytes()), WireError::MemoryKind { kind: 9, .. }));
    let count = kind + 4 + 1 + 1 + 8;
    assert!(matches!(with(count, &huge), WireError::TooMany { field: "n", .. }));
    assert!(matches!(with(count, &3u64.to_le_bytes()), WireError::Cut { .. }), "more ranges than there are");
}

#[test]
fn notifications_are_as_nixl_writes_them() {
    let sent = Notification { from: "a".into(), message: Bytes::from_static(b"done|\0") };
    let bytes = sent.encode();
    assert_eq!(bytes, b"nixlSerDes|name\x01\0\0\0\0\0\0\0a|msg\x06\0\0\0\0\0\0\0done|\0|");
    assert_eq!(Notification::decode(bytes.clone().into()), Ok(sent.clone()));
    assert_eq!(Notification::decode([bytes.clone(), b"more".to_vec()].concat().into()), Ok(sent));
    let empty = Notification { from: String::new(), message: Bytes::new() };
    assert_eq!(Notification::decode(empty.encode().into()), Ok(empty));
    for end in 0..bytes.len() {
        assert!(Notification::decode(bytes[..end].to_vec().into()).is_err());
    }
}

#[test]
fn frames_are_as_nixl_writes_them() {
    let load = Frame::Load(Bytes::from_static(CAPTURED));
    for (frame, text) in [(Frame::Send, &b"NIXLCOMM:SEND"[..]), (Frame::Invalidate("a".into()), b"NIXLCOMM:INVLa")] {
        let bytes = frame.encode().unwrap();
        assert_eq!(&bytes[8..], text);
        assert_eq!(Frame::length(bytes[..8].try_into().unwrap()), Ok(text.len()));
        assert_eq!(Frame::decode(bytes.slice(8..)), Ok(frame));
    }
    assert_eq!(Frame::decode(load.encode().unwrap().slice(8..)), Ok(load));
    let unlucky = Frame::Load(Bytes::from_static(b"key NIXLCOMM: in it"));
    assert!(unlucky.encode().unwrap_err().to_string().contains("anew"));
    assert!(Frame::length(u64::MAX.to_le_bytes()).is_err());
    for wrong in [&b""[..], b"NIXLCOMM", b"NIXLCOMM:", b"NIXLCOMM:SEN", b"NIXLCOMM:WHAT", b"NIXLCOMM:INVL\xff"] {
        assert!(Frame::decode(Bytes::copy_from_slice(wrong)).is_err(), "{wrong:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Changed anywhere, it is read as something else that is whole, or refused.
    #[test]
    fn a_changed_byte_never_panics(at in 0..CAPTURED.len(), byte: u8) {
        let mut bytes = CAPTURED.to_vec();
        bytes[at] = byte;
        if let Ok(read) = decode(bytes) {
            prop_assert!(decode(read.encode().unwrap()) == Ok(read));
        }
    }

    #[test]
    fn ranges_are_found_as_one_by_one(
        starts in prop::collection::btree_set(0u64..64, 1..8),
        address in 0u64..600,
        bytes in 0u64..40,
    ) {
        let ranges: Vec<Range> = starts.iter().map(|start| range(start * 8, 8)).collect();
        let section = Section::new("UCX", MemoryKind::Dram, ranges.clone()).unwrap();
        let found = section.find(0, address, bytes).is_some();
        prop_assert_eq!(found, ranges.iter().any(|range| range.holds(0, address, bytes)));
    }
}
