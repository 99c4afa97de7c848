//! What peers send, cut and damaged everywhere: refused, or read as what it then says.
#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "this is test code")]

include!("../../../fuzz/checks/corpus.rs");
include!("../../../fuzz/checks/nixl.rs");

#[test]
fn the_corpus_is_survived() {
    survive("nixl", nixl);
}

#[test]
fn the_corpus_is_what_its_names_say() {
    let read = |name: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/nixl");
        Bytes::from(std::fs::read(folder.join(name)).expect("the corpus is checked in"))
    };
    for name in ["agent", "part", "extended", "ours", "others", "bare", "edge", "overlapping"] {
        assert!(AgentMetadata::decode(read(name)).is_ok(), "{name}");
    }
    let Ok(PeerKind::Kvferry(told)) = PeerKind::of(&AgentMetadata::decode(read("ours")).expect("metadata")) else {
        unreachable!("it has our entry");
    };
    assert_eq!((told.pools.len(), told.extension.as_ref()), (2, &b"control=10.0.0.1:7000"[..]));
    assert!(Notification::decode(read("notification")).is_ok() && Notification::decode(read("silence")).is_ok());
    let frames = ["send", "load", "leave"].map(|name| Frame::decode(read(name)).is_ok());
    assert_eq!(frames, [true; 3]);
}
