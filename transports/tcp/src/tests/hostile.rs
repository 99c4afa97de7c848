//! Raw sockets against a transport: each costs itself, and a well-behaved peer notices nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kvferry_core::{End, PoolId};
use kvferry_transport::Options;

use super::{DEADLINE, Party, id, program, until};
use crate::TcpProvider;
use crate::address::{Address, Keys};
use crate::frame::{DATA_BYTES_MAX, HEADER_BYTES, Header, Kind, ReadRequest, Refusal, WriteRequest, frame};
use crate::greeting::Hello;
use kvferry_transport::codec::{decode, encode};

/// A transport under attack.
fn victim() -> Party {
    let party = Party::new(&TcpProvider::new(), 1, 1, &Options { unexpected_wait_ms: 50, ..Options::default() });
    party.fill();
    party
}

fn dial(victim: &Party) -> TcpStream {
    let address = Address::open(&victim.transport.address()).unwrap();
    let socket = TcpStream::connect(address.socket()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    // What is written in pieces is not held back for acknowledgements, which the kernel delays by up to 40 ms.
    socket.set_nodelay(true).unwrap();
    socket
}

fn hello(victim: &Party) -> Hello {
    let address = Address::open(&victim.transport.address()).unwrap();
    Hello { key: address.key, instance: [9; 16], connection: 1, index: 0, count: 1 }
}

/// A raw stream that was let in.
fn intrude(victim: &mut Party) -> TcpStream {
    let mut socket = dial(victim);
    socket.write_all(&hello(victim).encode()).unwrap();
    assert_eq!(read(victim, &mut socket, 9)[8], 1);
    socket
}

/// Reads exactly `bytes`, or fewer when the victim closes, while the victim polls.
fn read(victim: &mut Party, socket: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let start = Instant::now();
    let mut got = Vec::new();
    while got.len() < bytes {
        assert!(start.elapsed() < DEADLINE, "nothing came");
        victim.poll();
        let mut space = vec![0; bytes - got.len()];
        match socket.read(&mut space) {
            Ok(0) => break,
            Ok(count) => got.extend_from_slice(&space[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    got
}

fn read_frame(victim: &mut Party, socket: &mut TcpStream) -> (Header, Vec<u8>) {
    let header = read(victim, socket, HEADER_BYTES);
    let header = Header::decode(header.as_slice().try_into().unwrap()).unwrap();
    let payload = read(victim, socket, header.bytes as usize);
    (header, payload)
}

/// The victim closes the socket without another word.
fn assert_closed(victim: &mut Party, socket: &mut TcpStream) {
    assert!(read(victim, socket, 1).is_empty());
}

/// A decent peer pulls everything from the victim.
fn assert_well(victim: &mut Party) {
    let mut peer = Party::new(&TcpProvider::new(), 2, 1, &Options::default());
    let to = peer.reach(victim);
    let transfer = peer.pull(77, to);
    until(&mut [victim, &mut peer], "a decent pull", |parties| parties[1].completed(transfer));
    peer.verify();
}

fn keys(victim: &Party) -> Keys {
    Keys::open(&victim.keys.0).unwrap()
}

fn refusal(victim: &mut Party, socket: &mut TcpStream, tag: u64) -> Refusal {
    let (header, payload) = read_frame(victim, socket);
    assert_eq!((header.kind, header.tag), (Kind::Refuse, tag));
    decode(&payload).unwrap()
}

fn read_payload(request: &ReadRequest, program: &kvferry_core::Program) -> Vec<u8> {
    let mut payload = encode(request);
    program.encode_for(End::Source, &mut payload);
    payload
}

#[test]
fn garbage_instead_of_a_hello_is_closed() {
    let mut victim = victim();
    let mut socket = dial(&victim);
    socket.write_all(&[0x5a; 4096]).unwrap();
    assert_closed(&mut victim, &mut socket);
    assert_well(&mut victim);
}

#[test]
fn a_wrong_key_is_refused_and_named() {
    let mut victim = victim();
    let mut socket = dial(&victim);
    let mut hello = hello(&victim);
    hello.key[3] ^= 1;
    socket.write_all(&hello.encode()).unwrap();
    assert_eq!(read(&mut victim, &mut socket, 10)[8..], [2]);
    assert_well(&mut victim);
}

#[test]
fn hellos_with_impossible_streams_are_closed() {
    let mut victim = victim();
    for (index, count) in [(0, 0), (1, 1), (0, 65), (u16::MAX, u16::MAX)] {
        let mut socket = dial(&victim);
        socket.write_all(&Hello { index, count, ..hello(&victim) }.encode()).unwrap();
        assert_closed(&mut victim, &mut socket);
    }
    assert_well(&mut victim);
}

#[test]
fn a_stream_that_joins_twice_is_refused() {
    let mut victim = victim();
    let _first = intrude(&mut victim);
    let mut second = dial(&victim);
    second.write_all(&hello(&victim).encode()).unwrap();
    assert_eq!(read(&mut victim, &mut second, 10)[8..], [3]);
    assert_well(&mut victim);
}

#[test]
fn truncated_hellos_and_silent_clients_cost_nothing() {
    let mut victim = victim();
    let words = hello(&victim).encode();
    let mut silent = Vec::new();
    for number in 0..400 {
        let mut socket = dial(&victim);
        // Those that were replaced by newer ones may be closed already.
        let _ = socket.write_all(&words[..number % words.len()]);
        silent.push(socket);
        victim.poll();
    }
    drop(silent.split_off(200));
    assert_well(&mut victim);
}

#[test]
fn a_client_that_drips_its_hello_is_closed_at_the_deadline() {
    let mut victim = victim();
    let mut socket = dial(&victim);
    let words = hello(&victim).encode();
    let start = Instant::now();
    // One byte every 200 ms would take ten seconds.
    for byte in words {
        if socket.write_all(&[byte]).is_err() || start.elapsed() > DEADLINE {
            break;
        }
        if read(&mut victim, &mut socket, 0).is_empty() && !drip(&mut victim, &mut socket) {
            break;
        }
    }
    assert!(start.elapsed() < Duration::from_secs(9), "it was never closed");
    assert_well(&mut victim);
}

/// Polls for 200 ms; false once the victim has closed the socket.
fn drip(victim: &mut Party, socket: &mut TcpStream) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        victim.poll();
        if let Ok(0) = socket.read(&mut [0]) {
            return false;
        }
    }
    true
}

#[test]
fn garbage_after_the_hello_ends_that_connection_only() {
    let mut victim = victim();
    let mut socket = intrude(&mut victim);
    socket.write_all(&[0xa5; 64]).unwrap();
    assert_closed(&mut victim, &mut socket);
    assert_eq!(victim.lost().len(), 1);
    assert_well(&mut victim);
}

#[test]
fn oversized_lengths_end_the_connection_before_anything_is_held() {
    let mut victim = victim();
    for kind in [Kind::Write, Kind::PushData, Kind::Refuse, Kind::Notice, Kind::Go, Kind::Cancel] {
        let mut socket = intrude(&mut victim);
        socket.write_all(&Header { kind, bytes: DATA_BYTES_MAX + 1, tag: 1 }.encode()).unwrap();
        assert_closed(&mut victim, &mut socket);
    }
    let mut socket = intrude(&mut victim);
    socket.write_all(&Header { kind: Kind::Read, bytes: u32::MAX, tag: 1 }.encode()).unwrap();
    assert_closed(&mut victim, &mut socket);
    assert_well(&mut victim);
}

#[test]
fn malformed_requests_end_the_connection() {
    let mut victim = victim();
    for kind in [Kind::Read, Kind::Write, Kind::Notice, Kind::Refuse] {
        let mut socket = intrude(&mut victim);
        socket.write_all(&frame(kind, 1, &[0xff; 48])).unwrap();
        assert_closed(&mut victim, &mut socket);
    }
    assert_well(&mut victim);
}

#[test]
fn reads_that_are_not_allowed_are_refused_and_the_stream_goes_on() {
    let mut victim = victim();
    let mut socket = intrude(&mut victim);
    let good = program(&victim.pool);
    let Keys { pool, token } = keys(&victim);
    let fingerprint = good.fingerprint();
    let whole = vec![(0, good.units())];
    let request = ReadRequest { pool, token, fingerprint, parts: whole };
    let mut far = good.clone();
    far.sources = vec![Some((1000..1064).collect())];
    let mut deep = good.clone();
    deep.segments[0].source.offset = 1;
    let mut absent = good.clone();
    absent.sources = vec![None];
    let cases = [
        (ReadRequest { token: token ^ 1, ..request.clone() }, &good),
        (ReadRequest { pool: PoolId(99), ..request.clone() }, &good),
        (ReadRequest { fingerprint: 1, ..request.clone() }, &good),
        (ReadRequest { parts: vec![(0, u64::MAX)], ..request.clone() }, &good),
        (ReadRequest { fingerprint: far.fingerprint(), ..request.clone() }, &far),
        (ReadRequest { fingerprint: deep.fingerprint(), ..request.clone() }, &deep),
        (ReadRequest { fingerprint: absent.fingerprint(), ..request.clone() }, &absent),
    ];
    for (tag, (request, program)) in (1..).zip(&cases) {
        socket.write_all(&frame(Kind::Read, tag, &read_payload(request, program))).unwrap();
        refusal(&mut victim, &mut socket, tag);
    }
    socket.write_all(&frame(Kind::Read, 50, &read_payload(&request, &good))).unwrap();
    let (header, payload) = read_frame(&mut victim, &mut socket);
    assert_eq!((header.kind, header.tag), (Kind::PullData, 50));
    assert_eq!(payload[..4096], super::pattern(0, 0));
    assert!(victim.lost().is_empty());
    assert_well(&mut victim);
}

/// The announcement of a push of one unit.
fn unexpected(victim: &Party, number: u64) -> WriteRequest {
    let token = keys(victim).token;
    WriteRequest { id: id(number), pool: PoolId(1), token, fingerprint: 0, parts: vec![(0, 1)], notice: None }
}

#[test]
fn a_tag_that_is_used_twice_ends_the_connection() {
    let mut victim = victim();
    let mut socket = intrude(&mut victim);
    let request = unexpected(&victim, 5);
    let other = unexpected(&victim, 6);
    // In one piece: a push that nobody expects within 50 ms is refused, and its tag is free again then.
    let both = [frame(Kind::Write, 4, &encode(&request)), frame(Kind::Write, 4, &encode(&other))].concat();
    socket.write_all(&both).unwrap();
    assert_closed(&mut victim, &mut socket);
    assert_well(&mut victim);
}

#[test]
fn the_tag_of_a_push_that_was_refused_is_free_again() {
    let mut victim = victim();
    let mut socket = intrude(&mut victim);
    let request = unexpected(&victim, 5);
    for _ in 0..2 {
        socket.write_all(&frame(Kind::Write, 4, &encode(&request))).unwrap();
        assert!(matches!(refusal(&mut victim, &mut socket, 4), Refusal::Text(_)));
    }
    assert!(victim.lost().is_empty());
    assert_well(&mut victim);
}

#[test]
fn the_tag_of_a_push_that_arrives_is_not_given_away() {
    let mut victim = victim();
    // Past the go no deadline frees its tag.
    let mut socket = pushing(&mut victim);
    let request = unexpected(&victim, 6);
    socket.write_all(&frame(Kind::Write, 1, &encode(&request))).unwrap();
    assert_closed(&mut victim, &mut socket);
    assert!(victim.failed(id(5)));
    assert_well_after_writes(&mut victim);
}

#[test]
fn writes_for_unknown_ids_are_refused_and_their_data_goes_nowhere() {
    let mut victim = victim();
    let before = victim.snapshot();
    let mut socket = intrude(&mut victim);
    let good = program(&victim.pool);
    let request = WriteRequest {
        id: id(5),
        pool: PoolId(1),
        token: keys(&victim).token,
        fingerprint: good.fingerprint(),
        parts: vec![(0, good.units())],
        notice: None,
    };
    // It does not wait for the go.
    socket.write_all(&frame(Kind::Write, 4, &encode(&request))).unwrap();
    socket.write_all(&frame(Kind::PushData, 4, &[0x77; 100_000])).unwrap();
    socket.write_all(&frame(Kind::PushEnd, 4, &[])).unwrap();
    assert!(matches!(refusal(&mut victim, &mut socket, 4), Refusal::Text(_)));
    assert!(victim.snapshot() == before);
    assert!(victim.lost().is_empty());
    assert_well(&mut victim);
}

#[test]
fn a_push_into_another_pool_or_under_a_wrong_token_is_refused() {
    let mut victim = victim();
    let expected = victim.expect(5);
    let before = victim.snapshot();
    let mut socket = intrude(&mut victim);
    let good = program(&victim.pool);
    let request = WriteRequest {
        id: expected,
        pool: PoolId(1),
        token: keys(&victim).token ^ 1,
        fingerprint: good.fingerprint(),
        parts: vec![(0, good.units())],
        notice: None,
    };
    socket.write_all(&frame(Kind::Write, 1, &encode(&request))).unwrap();
    refusal(&mut victim, &mut socket, 1);
    let request = WriteRequest { pool: PoolId(2), token: keys(&victim).token, ..request };
    socket.write_all(&frame(Kind::Write, 2, &encode(&request))).unwrap();
    refusal(&mut victim, &mut socket, 2);
    assert!(victim.snapshot() == before && !victim.failed(expected));
}

/// Starts a push that the victim expects and returns its stream, past the go.
fn pushing(victim: &mut Party) -> TcpStream {
    let expected = victim.expect(5);
    let mut socket = intrude(victim);
    let good = program(&victim.pool);
    let request = WriteRequest {
        id: expected,
        pool: PoolId(1),
        token: keys(victim).token,
        fingerprint: good.fingerprint(),
        parts: vec![(0, good.units())],
        notice: None,
    };
    socket.write_all(&frame(Kind::Write, 1, &encode(&request))).unwrap();
    let (header, _) = read_frame(victim, &mut socket);
    assert_eq!((header.kind, header.tag), (Kind::Go, 1));
    socket
}

#[test]
fn more_data_than_announced_ends_the_connection() {
    let mut victim = victim();
    let mut socket = pushing(&mut victim);
    for _ in 0..2 {
        // The second of these is longer than what is left. The victim may have closed before all of it is sent.
        let _ = socket.write_all(&frame(Kind::PushData, 1, &vec![1; 200 << 10]));
    }
    assert_closed(&mut victim, &mut socket);
    assert!(victim.failed(id(5)));
    assert_well_after_writes(&mut victim);
}

#[test]
fn an_early_end_ends_the_connection() {
    let mut victim = victim();
    let mut socket = pushing(&mut victim);
    socket.write_all(&frame(Kind::PushData, 1, &[1; 5000])).unwrap();
    socket.write_all(&frame(Kind::PushEnd, 1, &[])).unwrap();
    assert_closed(&mut victim, &mut socket);
    assert!(victim.failed(id(5)));
    assert_well_after_writes(&mut victim);
}

#[test]
fn a_close_in_the_middle_of_a_frame_fails_that_transfer_only() {
    let mut victim = victim();
    let mut socket = pushing(&mut victim);
    let bytes = frame(Kind::PushData, 1, &[1; 9000]);
    socket.write_all(&bytes[..5003]).unwrap();
    drop(socket);
    until(&mut [&mut victim], "the push fails", |parties| parties[0].failed(id(5)));
    assert_eq!(victim.lost().len(), 1);
    assert_well_after_writes(&mut victim);
}

/// The victim's pool was written to by a peer that had the right; put it back first.
fn assert_well_after_writes(victim: &mut Party) {
    victim.fill();
    assert_well(victim);
}

#[test]
fn acknowledgements_and_goes_out_of_turn_end_the_connection() {
    // A listener that answers the greeting, then breaks the order of a push.
    for reply in [Kind::Ack, Kind::Go] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let address = Address { ip: local.ip(), port: local.port(), key: [1; 16], instance: [2; 16] };
        let options = Options { streams_per_peer: 1, ..Options::default() };
        let mut victim = Party::new(&TcpProvider::new(), 1, 1, &options);
        let peer = victim.transport.connect(&address.seal()).unwrap();
        let keys = kvferry_transport::PoolKeys(Keys { pool: PoolId(3), token: 4 }.seal());
        let remote = victim.transport.import(peer, &keys, victim.pool.layout()).unwrap();
        let pushed = victim.post(1, kvferry_transport::Direction::Push, (peer, remote));
        let (mut socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let length = hello(&victim).encode().len();
        let words = read(&mut victim, &mut socket, length);
        socket.write_all(&[&words[..8], &[1]].concat()).unwrap();
        let (header, _) = read_frame(&mut victim, &mut socket);
        assert_eq!(header.kind, Kind::Write);
        for _ in 0..2 {
            socket.write_all(&frame(reply, header.tag, &[])).unwrap();
        }
        until(&mut [&mut victim], "the push fails", |parties| parties[0].failed(pushed));
        assert_eq!(victim.lost().len(), 1);
    }
}

#[test]
fn a_peer_that_asks_and_never_listens_is_bounded() {
    let mut victim = victim();
    let mut socket = intrude(&mut victim);
    socket.set_nonblocking(true).unwrap();
    let request = ReadRequest { pool: PoolId(99), token: 0, fingerprint: 0, parts: vec![(0, 0)] };
    let payload = read_payload(&request, &program(&victim.pool));
    let mut sent = 0_usize;
    let mut stuck = 0;
    // The victim stops reading once enough answers wait; then the socket fills and stays so.
    for tag in 1..2_000_000 {
        let bytes = frame(Kind::Read, tag, &payload);
        match socket.write(&bytes) {
            Ok(count) if count == bytes.len() => stuck = 0,
            _ => break,
        }
        sent += bytes.len();
        victim.poll();
    }
    while stuck < 100 {
        victim.poll();
        stuck += 1;
    }
    assert!(sent > 0);
    assert_well(&mut victim);
}
