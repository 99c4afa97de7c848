// What is done with what comes from a NIXL agent's peer. Shared by the fuzz target and the corpus test, by `include!`.

use bytes::Bytes;
use kvferry_nixl::{AgentMetadata, Frame, Notification, PeerKind};
use kvferry_ucx::raw::{PackedKey, WorkerAddress};

/// Reads `bytes` as metadata, as a notification and as a frame of the socket exchange: what is read is bounded by them and comes back as it was.
fn nixl(bytes: &[u8]) {
    let whole = Bytes::copy_from_slice(bytes);
    metadata(&whole);
    if let Ok(notification) = Notification::decode(whole.clone()) {
        assert!(notification.from.len() + notification.message.len() < bytes.len());
        let again = Notification::decode(notification.encode().into());
        assert!(again.as_ref() == Ok(&notification), "{notification:?} became {again:?}");
    }
    if let Ok(frame) = Frame::decode(whole) {
        if let Frame::Load(within) = &frame {
            metadata(within);
        }
        // Metadata that a NIXL agent would cut is not written.
        if let Ok(written) = frame.encode() {
            let again = Frame::decode(written.slice(8..));
            assert!(again.as_ref() == Ok(&frame), "{frame:?} became {again:?}");
        }
    }
}

fn metadata(bytes: &Bytes) {
    let Ok(metadata) = AgentMetadata::decode(bytes.clone()) else { return };
    let written = metadata.encode().map(Bytes::from);
    assert!(written.as_ref().is_ok_and(|written| written.len() <= bytes.len()), "{metadata:?} became {written:?}");
    let again = written.and_then(AgentMetadata::decode);
    assert!(again.as_ref() == Ok(&metadata), "{metadata:?} became {again:?}");
    if let Ok(PeerKind::Kvferry(told)) = PeerKind::of(&metadata) {
        for pool in &told.pools {
            assert!(pool.layout.validate().is_ok() && pool.bases.len() == pool.layout.regions.len(), "{pool:?}");
        }
    }
    for connection in &metadata.connections {
        if let Ok(address) = WorkerAddress::check(&connection.address) {
            assert!(address.bytes() == connection.address && address.interfaces() <= bytes.len());
        }
    }
    for section in &metadata.sections {
        for range in &section.ranges {
            assert!(range.address.checked_add(range.bytes).is_some(), "{range:?} ends beyond the address space");
            let found = section.find(range.device, range.address, range.bytes);
            assert!(found.is_some_and(|found| found.holds(range.device, range.address, range.bytes)), "{range:?}");
            if let Ok(key) = PackedKey::check(&range.key) {
                assert!(key.bytes() == range.key);
            }
        }
    }
}
