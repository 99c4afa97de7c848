//! The fuzz target of the log reader over its corpus, and over any text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "this is test code")]

use proptest::prelude::*;

include!("../../../fuzz/checks/corpus.rs");
include!("../../../fuzz/checks/log.rs");

#[test]
fn the_corpus_is_survived() {
    survive("log", log);
}

/// One line of many megabytes, and as many lines: both end soon, in a verdict of bounded length.
#[test]
fn huge_logs_end_in_a_verdict() {
    let lane = "ucp_context_2 self cfg#1 rma_am(srd/rdmap40s0:1) ";
    log(lane.repeat(100_000).as_bytes());
    log(format!("{lane}\n").repeat(100_000).as_bytes());
    log(&[b'('; 1 << 22]);
}

proptest! {
    #[test]
    fn any_text_ends_in_a_verdict(text in "(ucp_context_[0-9] |self |cfg#[0-9]|rma_am\\(|am\\(|srd/|rdmap[0-9]s0|:1|\\)|\\.\\.\\.|NixlTransferAgent |mAddress: |\n|\\PC){0,60}") {
        log(text.as_bytes());
    }
}
