//! Foreign bytes: what was encoded comes back, anything else is an error, never a panic and never a large allocation.

use bytes::Bytes;
use kvferry_core::limits::FRAME_BYTES_MAX;
use kvferry_core::protocol::{Message, Profile};
use kvferry_core::wire::{
    DOMAINS_PROTOCOL, Frame, FrameReader, GPUS_PROTOCOL, Hello, RAILS_PROTOCOL, TRACING_PROTOCOL, Welcome, WireError,
    decode_from, decode_message, encode_for, encode_message,
};
use kvferry_core::{Epoch, GpuIdentity, MemoryDomain, NodeId, TraceContext};
use proptest::prelude::*;

mod messages;

use messages::{every_variant, message};

/// Bytes that were allocated at most, all together, while `work` ran.
fn most_allocated<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let mut result = None;
    let measured = allocation_counter::measure(|| result = Some(work()));
    (result.expect("it ran"), measured.bytes_max)
}

/// Everything that is done with bytes of a peer.
fn read_all(bytes: &[u8]) {
    let _ = decode_message(bytes);
    let _ = Frame::decode(Bytes::copy_from_slice(bytes));
    let mut reader = FrameReader::default();
    reader.trust();
    reader.buffer().extend_from_slice(bytes);
    while let Ok(Some(frame)) = reader.next_frame() {
        if let Ok(Frame::Sealed { body, .. }) = Frame::decode(frame) {
            let _ = decode_message(&body);
        }
    }
}

fn sealed(sequence: u64, message: &Message) -> Frame {
    Frame::Sealed { sequence, mac: [7; 16], body: encode_message(message).expect("encodes") }
}

fn frame() -> impl Strategy<Value = Frame> {
    let hello = (any::<[u16; 2]>(), any::<[u64; 4]>(), any::<[u8; 16]>(), any::<bool>()).prop_map(
        |(versions, ids, nonce, secured)| {
            Frame::Hello(Hello {
                protocol_min: versions[0],
                protocol_max: versions[1],
                capabilities: ids[0],
                node: NodeId(ids[1]),
                epoch: Epoch(ids[2]),
                expects: NodeId(ids[3]),
                nonce,
                secured,
            })
        },
    );
    let welcome = (any::<u16>(), any::<[u64; 3]>(), any::<[u8; 16]>(), any::<[u8; 16]>()).prop_map(
        |(protocol, ids, nonce, mac)| {
            Frame::Welcome(Welcome {
                protocol,
                capabilities: ids[0],
                node: NodeId(ids[1]),
                epoch: Epoch(ids[2]),
                nonce,
                mac,
            })
        },
    );
    let body = prop::collection::vec(any::<u8>(), 0..200);
    let sealed = (any::<u64>(), any::<[u8; 16]>(), body).prop_map(|(sequence, mac, body)| Frame::Sealed {
        sequence,
        mac,
        body: Bytes::from(body),
    });
    prop_oneof![hello, welcome, any::<[u8; 16]>().prop_map(Frame::Proof), ".{0,80}".prop_map(Frame::Reject), sealed]
}

#[test]
fn every_variant_comes_back() {
    for message in every_variant() {
        let bytes = encode_message(&message).expect("encodes");
        assert_eq!(decode_message(&bytes).as_ref(), Ok(&message));
    }
}

#[test]
fn no_variant_is_missing_here() {
    let tags: std::collections::BTreeSet<u8> =
        every_variant().iter().map(|message| encode_message(message).expect("encodes")[0]).collect();
    let next = tags.len() as u8;
    assert_eq!(tags, (0..next).collect(), "a message that `messages` does not build");
    // Zeros are numbers, empty lists and empty text: most messages can be made of them.
    let read = |tag: u8| (0..64).any(|zeros| decode_message(&[&[tag][..], &vec![0; zeros]].concat()).is_ok());
    assert!(tags.iter().filter(|tag| read(**tag)).count() > tags.len() / 2);
    assert!((next..next + 8).all(|tag| !read(tag)), "a message that `messages` does not build");
}

#[test]
fn nothing_short_or_long_is_taken_for_a_message() {
    for message in every_variant() {
        let bytes = encode_message(&message).expect("encodes");
        for length in 0..bytes.len() {
            let cut = decode_message(&bytes[..length]);
            assert!(matches!(cut, Err(WireError::Malformed { .. })), "{length} of {} bytes: {cut:?}", bytes.len());
        }
        let long = [&bytes[..], &[0]].concat();
        assert_eq!(decode_message(&long), Err(WireError::Trailing { what: "message", bytes: 1 }));
    }
}

/// What a peer of this protocol may say of a span, and nothing else, to nobody who does not speak it.
#[test]
fn a_trace_context_follows_what_may_have_one() {
    let trace: TraceContext = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().expect("parses");
    let mut traced = 0;
    for message in every_variant() {
        let bare = encode_message(&message).expect("encodes");
        let context = trace_bytes(trace);
        let long = [&bare[..], &context].concat();
        let mut message = message;
        let place = match &mut message {
            Message::Prefill(job) => Some(&mut job.trace),
            Message::Pair(pairing) => Some(&mut pairing.trace),
            Message::Fetch(job) => Some(&mut job.pairing.trace),
            _ => None,
        };
        let trailing = Err(WireError::Trailing { what: "message", bytes: context.len() });
        assert_eq!(decode_from(&long, TRACING_PROTOCOL - 1), trailing, "an older peer does not say that");
        let Some(place) = place else {
            assert_eq!(decode_from(&long, TRACING_PROTOCOL), trailing);
            continue;
        };
        *place = Some(trace);
        traced += 1;
        assert_eq!(encode_for(&message, TRACING_PROTOCOL).expect("encodes"), long);
        assert_eq!(encode_for(&message, TRACING_PROTOCOL - 1).expect("encodes"), bare, "nor is it told");
        assert_eq!(decode_from(&long, TRACING_PROTOCOL).as_ref(), Ok(&message));
        for length in bare.len() + 1..long.len() {
            assert!(decode_from(&long[..length], TRACING_PROTOCOL).is_err(), "{length} of {} bytes", long.len());
        }
        assert!(decode_from(&[&long[..], &[0]].concat(), TRACING_PROTOCOL).is_err());
        let zero = [&bare[..], &[0; 25]].concat();
        assert!(matches!(
            decode_from(&zero, TRACING_PROTOCOL),
            Err(WireError::Malformed { what: "trace context", .. })
        ));
    }
    assert!(traced >= 3, "{traced}");
}

/// Over how many rails a worker pushes is said to nobody who does not know of that.
#[test]
fn a_number_of_rails_follows_the_profile_of_a_worker() {
    let mut told = 0;
    for message in every_variant() {
        let bare = encode_message(&message).expect("encodes");
        let long = [&bare[..], &[4, 0, 0, 0]].concat();
        assert!(decode_from(&long, RAILS_PROTOCOL - 1).is_err(), "an older peer does not say that");
        let mut railed = message.clone();
        let worker = match &mut railed {
            Message::Profile(profile) => profile.worker.as_mut(),
            _ => None,
        };
        let Some(worker) = worker else {
            assert!(decode_from(&long, RAILS_PROTOCOL).is_err(), "{message:?}");
            continue;
        };
        worker.rails = 4;
        told += 1;
        assert_eq!(encode_for(&railed, RAILS_PROTOCOL).expect("encodes"), long);
        assert_eq!(encode_for(&railed, RAILS_PROTOCOL - 1).expect("encodes"), bare, "nor is it told");
        assert_eq!(encode_for(&message, RAILS_PROTOCOL).expect("encodes"), bare, "one rail is not worth a word");
        assert_eq!(decode_from(&long, RAILS_PROTOCOL).as_ref(), Ok(&railed));
        for cut in [1, 2, 3, 5] {
            let other = [&bare[..], &[4, 0, 0, 0, 0][..cut]].concat();
            assert!(decode_from(&other, RAILS_PROTOCOL).is_err());
        }
        let none = [&bare[..], &[0; 4]].concat();
        assert!(matches!(
            decode_from(&none, RAILS_PROTOCOL),
            Err(WireError::Malformed { what: "number of rails", .. })
        ));
    }
    assert!(told >= 3, "{told}");
}

/// From which other hosts a NIC is reached is said to nobody who does not know of that.
#[test]
fn domains_follow_the_profile_of_a_worker() {
    let domain = |name: &str| MemoryDomain { name: name.to_owned(), address: vec![9; 3].into() };
    let mut told = 0;
    for message in every_variant() {
        let Message::Profile(profile) = &message else { continue };
        let Some(worker) = &profile.worker else { continue };
        let with = |rails: u32, domains: &[Option<MemoryDomain>]| {
            let mut worker = worker.clone();
            worker.rails = rails;
            worker.nics.iter_mut().zip(domains).for_each(|(nic, domain)| nic.domain = domain.clone());
            Message::Profile(Box::new(Profile { worker: Some(worker) }))
        };
        for rails in [0, 4] {
            let plain = with(rails, &[]);
            for domains in [[Some(domain("rack/1")), Some(domain("rack/2"))], [None, Some(domain("rack/1"))]] {
                let message = with(rails, &domains);
                if message == plain {
                    continue;
                }
                told += 1;
                let older = encode_for(&message, DOMAINS_PROTOCOL - 1).expect("encodes");
                assert_eq!(older, encode_for(&plain, DOMAINS_PROTOCOL).expect("encodes"), "nobody else is told");
                let long = encode_for(&message, DOMAINS_PROTOCOL).expect("encodes");
                assert_eq!(decode_from(&long, DOMAINS_PROTOCOL).as_ref(), Ok(&message));
                assert!(decode_from(&long, DOMAINS_PROTOCOL - 1).is_err(), "an older peer does not say that");
                let bare = encode_message(&message).expect("encodes").len();
                for cut in (bare + 1..long.len()).filter(|cut| rails == 0 || *cut != bare + 4) {
                    assert!(decode_from(&long[..cut], DOMAINS_PROTOCOL).is_err(), "{cut} of {}", long.len());
                }
                assert!(decode_from(&[&long[..], &[0]].concat(), DOMAINS_PROTOCOL).is_err());
            }
            let bare = encode_message(&plain).expect("encodes");
            let said = |list: &[u8]| {
                decode_from(&[&bare[..], &rails.to_le_bytes(), list].concat(), DOMAINS_PROTOCOL)
                    .map_err(|e| e.to_string())
            };
            let length = worker.nics.len() as u8;
            // Nobody's NIC, none, one twice, no name, more than anybody has.
            for list in
                [&[1, length, 1, b'x', 0][..], &[0], &[2, 0, 1, b'x', 0, 0, 1, b'x', 0], &[1, 0, 0, 0], &[0xff; 5]]
            {
                assert!(said(list).is_err(), "{list:?}");
            }
        }
    }
    assert!(told >= 3, "{told}");
}

/// Which GPUs NICs are is said to nobody who does not know of that.
#[test]
fn gpus_follow_the_domains_of_a_profile() {
    let gpu = |number: u8, others: &[(u8, bool)]| GpuIdentity {
        uuid: [number; 16],
        is_instance: number == 2,
        others: others.iter().map(|(other, reached)| ([*other; 16], *reached)).collect(),
    };
    let domain = MemoryDomain { name: "rack/1".to_owned(), address: vec![9; 3].into() };
    let mut told = 0;
    for message in every_variant() {
        let Message::Profile(profile) = &message else { continue };
        let Some(worker) = profile.worker.as_ref().filter(|worker| !worker.nics.is_empty()) else { continue };
        for (rails, domain) in [(0, None), (4, None), (0, Some(&domain)), (4, Some(&domain))] {
            let with = |gpus: &[Option<GpuIdentity>]| {
                let mut worker = worker.clone();
                worker.rails = rails;
                worker.nics[0].domain = domain.cloned();
                worker.nics.iter_mut().zip(gpus).for_each(|(nic, gpu)| nic.gpu = gpu.clone());
                Message::Profile(Box::new(Profile { worker: Some(worker) }))
            };
            let plain = with(&[]);
            for gpus in [[Some(gpu(1, &[(2, true), (3, false)])), Some(gpu(2, &[]))], [Some(gpu(2, &[])), None]] {
                told += 1;
                let message = with(&gpus);
                for older in [GPUS_PROTOCOL - 1, 1] {
                    let encoded = [&message, &plain].map(|message| encode_for(message, older).expect("encodes"));
                    assert_eq!(encoded[0], encoded[1], "nobody else is told");
                }
                let long = encode_for(&message, GPUS_PROTOCOL).expect("encodes");
                assert_eq!(decode_from(&long, GPUS_PROTOCOL).as_ref(), Ok(&message));
                assert!(decode_from(&long, GPUS_PROTOCOL - 1).is_err(), "an older peer does not say that");
                let whole = [encode_message(&plain), encode_for(&plain, 4), encode_for(&plain, GPUS_PROTOCOL)]
                    .map(|bytes| bytes.expect("encodes").len());
                for cut in (whole[0]..long.len()).filter(|cut| !whole.contains(cut)) {
                    assert!(decode_from(&long[..cut], GPUS_PROTOCOL).is_err(), "{cut} of {}", long.len());
                }
                assert!(decode_from(&[&long[..], &[0]].concat(), GPUS_PROTOCOL).is_err());
            }
            let bare = encode_message(&plain).expect("encodes");
            let said = |list: &[u8]| {
                decode_from(&[&bare[..], &rails.to_le_bytes(), &[0], list].concat(), GPUS_PROTOCOL)
                    .map_err(|e| e.to_string())
            };
            let of = |index: u8, others: &[u8]| [&[index], &[7; 16][..], &[0], others].concat();
            assert!(said(&[&[1], &of(0, &[0])[..]].concat()).is_ok());
            // None, nobody's NIC, one twice, more GPUs than a host has, more NICs than anybody has.
            let crowd = [&[129, 1][..], &[1; 17 * 129]].concat();
            for list in [
                vec![0],
                [&[1], &of(worker.nics.len() as u8, &[0])[..]].concat(),
                [&[2], &of(0, &[0])[..], &of(0, &[0])].concat(),
                [&[1], &of(0, &crowd)[..]].concat(),
                vec![0xff; 5],
            ] {
                assert!(said(&list).is_err(), "{list:?}");
            }
        }
    }
    assert!(told >= 8, "{told}");
}

/// As it is written on the wire.
fn trace_bytes(trace: TraceContext) -> Vec<u8> {
    [&trace.trace().to_be_bytes()[..], &trace.span().to_be_bytes(), &[u8::from(trace.is_sampled())]].concat()
}

#[test]
fn every_flipped_byte_is_survived() {
    for message in every_variant() {
        let bytes = encode_message(&message).expect("encodes");
        let framed = sealed(3, &message).encode().expect("encodes");
        for place in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = bytes.to_vec();
                bad[place] ^= flip;
                let (_, most) = most_allocated(|| read_all(&bad));
                assert!(
                    most <= 4 << 20,
                    "{most} bytes for {} bytes, byte {place} ^ {flip:#x} of {message:?}",
                    bad.len()
                );
            }
        }
        for place in 0..framed.len() {
            let mut bad = framed.to_vec();
            bad[place] ^= 0xff;
            read_all(&bad);
        }
    }
}

#[test]
fn a_length_far_beyond_the_input_allocates_nothing() {
    // Every variant's tag, then counts that claim more than any memory holds.
    for tag in 0..64u8 {
        for claim in
            [&[0xff, 0xff, 0xff, 0xff, 0x0f][..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]]
        {
            for prefix in 0..6 {
                let mut bytes = vec![tag];
                bytes.extend(std::iter::repeat_n(1, prefix));
                for _ in 0..4 {
                    bytes.extend_from_slice(claim);
                }
                let (result, most) = most_allocated(|| decode_message(&bytes));
                assert!(most <= 4 << 20, "{most} bytes for {bytes:?}: {result:?}");
                assert!(result.is_err(), "{bytes:?} became {result:?}");
            }
        }
    }
}

#[test]
fn an_oversized_frame_is_refused_by_its_header() {
    let mut reader = FrameReader::default();
    reader.trust();
    reader.buffer().extend_from_slice(&u32::MAX.to_le_bytes());
    let (result, most) = most_allocated(|| reader.next_frame());
    assert_eq!(result, Err(WireError::Oversized { bytes: u64::from(u32::MAX), limit: FRAME_BYTES_MAX }));
    assert!(most < 4096, "{most}");
    let body = Bytes::from(vec![0; FRAME_BYTES_MAX]);
    let refused = Frame::Sealed { sequence: 0, mac: [0; 16], body }.encode();
    assert!(matches!(refused, Err(WireError::Oversized { .. })));
}

#[test]
fn before_the_handshake_only_small_frames_are_read() {
    let frame = Frame::Sealed { sequence: 0, mac: [0; 16], body: Bytes::from(vec![1; 5000]) };
    let bytes = frame.encode().expect("encodes");
    let mut reader = FrameReader::default();
    assert!(!reader.is_trusted());
    reader.buffer().extend_from_slice(&bytes[..4]);
    assert!(matches!(reader.next_frame(), Err(WireError::Oversized { .. })), "before its body is there");
    let mut reader = FrameReader::default();
    reader.trust();
    reader.buffer().extend_from_slice(&bytes);
    let read = reader.next_frame().expect("small enough").expect("whole");
    assert_eq!(Frame::decode(read), Ok(frame));
}

#[test]
fn bad_frames_are_named() {
    assert_eq!(Frame::decode(Bytes::new()), Err(WireError::Truncated { bytes: 0 }));
    assert_eq!(Frame::decode(Bytes::from_static(&[9, 1])), Err(WireError::UnknownKind(9)));
    for (kind, enough) in [(3u8, 17), (5, 25)] {
        for length in 1..enough {
            let mut bytes = vec![0; length];
            bytes[0] = kind;
            assert_eq!(Frame::decode(Bytes::from(bytes)), Err(WireError::Truncated { bytes: length }), "kind {kind}");
        }
    }
    for kind in [1u8, 2] {
        assert!(matches!(Frame::decode(Bytes::from(vec![kind, 0xff])), Err(WireError::Malformed { .. })));
        let mut long = vec![0; 200];
        long[0] = kind;
        assert!(matches!(Frame::decode(Bytes::from(long)), Err(WireError::Trailing { .. })));
    }
    assert_eq!(Frame::decode(Bytes::from_static(&[4, b'n', 0xff])), Ok(Frame::Reject("n\u{fffd}".to_owned())));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn messages_come_back(message in message()) {
        let bytes = encode_message(&message).expect("encodes");
        prop_assert_eq!(decode_message(&bytes), Ok(message));
    }

    #[test]
    fn frames_come_back(frame in frame()) {
        let bytes = frame.encode().expect("encodes");
        prop_assert_eq!(Frame::decode(bytes.slice(4..)), Ok(frame));
    }

    #[test]
    fn a_stream_is_cut_into_the_same_frames_however_it_arrives(
        messages in prop::collection::vec(message(), 1..6),
        cuts in prop::collection::vec(0usize..64, 1..200),
        bytewise in any::<bool>(),
    ) {
        let frames: Vec<Frame> = messages.iter().zip(0..).map(|(message, sequence)| sealed(sequence, message)).collect();
        let stream: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().expect("encodes")).collect();
        let mut reader = FrameReader::default();
        reader.trust();
        let (mut read, mut rest, mut cuts) = (Vec::new(), &stream[..], cuts.into_iter().cycle());
        while !rest.is_empty() {
            let step = if bytewise { 1 } else { cuts.next().unwrap_or(1).max(1) };
            let (now, later) = rest.split_at(step.min(rest.len()));
            reader.buffer().extend_from_slice(now);
            rest = later;
            while let Some(frame) = reader.next_frame().expect("whole frames") {
                read.push(Frame::decode(frame).expect("decodes"));
            }
        }
        prop_assert_eq!(read, frames);
        prop_assert!(reader.buffer().is_empty());
    }

    #[test]
    fn random_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (_, most) = most_allocated(|| read_all(&bytes));
        prop_assert!(most <= 4 << 20, "{} bytes", most);
    }

    #[test]
    fn damaged_messages_are_survived(message in message(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = encode_message(&message).expect("encodes").to_vec();
        for (place, value) in damage {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let (_, most) = most_allocated(|| read_all(&bytes));
        prop_assert!(most <= 4 << 20, "{} bytes", most);
    }
}

#[test]
fn more_than_anything_stands_for_is_refused() {
    use kvferry_core::limits::{NAMED_MAX, PREFIX_HASHES_MAX, STANDING_MAX, TOKENS_MAX};
    use kvferry_core::protocol::{RequestSpec, StandingOffer};
    use kvferry_core::{HandoverId, RequestId};
    let spec = |tokens, hashes| RequestSpec {
        request: RequestId(1),
        tokens,
        prefix: std::sync::Arc::new(vec![0; hashes]),
        prefix_tokens: 1,
    };
    let offers = |count, tokens, hashes| {
        let offer = StandingOffer { spec: spec(tokens, hashes), dp: 0, steps: None, ready_at: None };
        Message::StandingOffers(vec![offer; count])
    };
    let holding = |count, tokens| Message::Holding { handovers: vec![(HandoverId(1), RequestId(1), tokens); count] };
    let renew = |count| Message::Renew { requests: vec![RequestId(1); count] };
    let known = |count| Message::OutcomesKnown { handovers: vec![HandoverId(1); count] };
    let reading = |count| Message::Reading { handovers: vec![HandoverId(1); count] };
    let read = |message: &Message| decode_message(&encode_message(message).expect("encodes"));
    let most = [
        offers(1, TOKENS_MAX, PREFIX_HASHES_MAX),
        offers(STANDING_MAX, 1, 0),
        holding(NAMED_MAX, TOKENS_MAX),
        renew(NAMED_MAX),
        known(NAMED_MAX),
        reading(NAMED_MAX),
    ];
    for message in most {
        assert!(read(&message).is_ok_and(|read| read == message));
    }
    let more = [
        offers(1, TOKENS_MAX + 1, 0),
        offers(1, 1, PREFIX_HASHES_MAX + 1),
        offers(STANDING_MAX + 1, 1, 0),
        holding(1, TOKENS_MAX + 1),
        holding(NAMED_MAX + 1, 1),
        renew(NAMED_MAX + 1),
        known(NAMED_MAX + 1),
        reading(NAMED_MAX + 1),
    ];
    for message in more {
        assert!(matches!(read(&message), Err(WireError::Malformed { .. })));
    }
}
