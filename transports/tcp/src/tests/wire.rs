//! What stands on the wire survives a round trip, and nothing else is taken for it.

use kvferry_core::{PoolId, UnitRange};

use crate::address::{Address, KEY_BYTES, Keys};
use crate::frame::{DATA_BYTES_MAX, HEADER_BYTES, Header, Kind, Refusal, covered};
use kvferry_transport::codec::same_secret;

#[test]
fn headers_round_trip() {
    let header = Header { kind: Kind::PushData, bytes: 0x0001_2345, tag: 0x1122_3344_5566_7788 };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
}

#[test]
fn headers_with_oversized_lengths_or_unknown_kinds_are_refused() {
    for kind in [Kind::PullData, Kind::PushData, Kind::Go, Kind::Ack, Kind::Write, Kind::Refuse, Kind::Notice] {
        let header = Header { kind, bytes: DATA_BYTES_MAX + 1, tag: 1 };
        assert!(Header::decode(&header.encode()).is_err(), "{kind:?}");
    }
    for byte in (0..=u8::MAX).filter(|byte| !(1..=11).contains(byte)) {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = byte;
        assert!(Header::decode(&bytes).is_err(), "{byte}");
    }
    let mut bytes = Header { kind: Kind::Go, bytes: 0, tag: 1 }.encode();
    bytes[2] = 1;
    assert!(Header::decode(&bytes).is_err());
}

#[test]
fn parts_must_be_adjacent() {
    assert_eq!(covered(&[(1, 4), (4, 4), (4, 9)], 3), Ok(UnitRange { start: 1, end: 9 }));
    for parts in [&[][..], &[(3, 1)], &[(0, 2), (3, 4)], &[(0, 2), (1, 4)], &[(0, 1), (1, 2), (2, 3), (3, 4)]] {
        assert!(covered(parts, 3).is_err(), "{parts:?}");
    }
}

#[test]
fn addresses_and_keys_are_not_taken_for_each_other() {
    let address =
        Address { ip: std::net::Ipv6Addr::LOCALHOST.into(), port: 7, key: [1; KEY_BYTES], instance: [2; KEY_BYTES] };
    let keys = Keys { pool: PoolId(3), token: u64::MAX };
    assert_eq!(Address::open(&address.seal()), Ok(address));
    assert_eq!(Keys::open(&keys.seal()), Ok(keys));
    assert!(Address::open(&keys.seal()).is_err());
    assert!(Keys::open(&address.seal()).is_err());
}

#[test]
fn secrets_differ_in_any_byte() {
    let secret = [7; KEY_BYTES];
    assert!(same_secret(&secret, &secret));
    for at in 0..KEY_BYTES {
        let mut other = secret;
        other[at] ^= 0x80;
        assert!(!same_secret(&secret, &other));
    }
}

#[test]
fn a_refusal_is_cut_at_a_character() {
    let Refusal::Text(words) = Refusal::text("é".repeat(1000)) else { panic!("words") };
    assert!(words.len() <= 512 && words.chars().all(|letter| letter == 'é'));
}
