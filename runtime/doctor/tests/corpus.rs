//! The fuzz targets of logs and manifests over their corpora, and over any text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "this is test code")]

use proptest::prelude::*;

include!("../../../fuzz/checks/corpus.rs");
include!("../../../fuzz/checks/manifest.rs");

mod of_logs {
    include!("../../../fuzz/checks/log.rs");

    pub(super) fn check(bytes: &[u8]) {
        log(bytes);
    }
}
use of_logs::check as log;

#[test]
fn the_corpus_is_survived() {
    survive("log", log);
    survive("manifest", manifest);
}

/// One line of many megabytes, and as many lines: both end soon, in a verdict of bounded length.
#[test]
fn huge_logs_end_in_a_verdict() {
    let lane = "ucp_context_2 self cfg#1 rma_am(srd/rdmap40s0:1) ";
    log(lane.repeat(100_000).as_bytes());
    log(format!("{lane}\n").repeat(100_000).as_bytes());
    log(&[b'('; 1 << 22]);
}

/// A value of many kilobytes that aliases repeat in every variable: what is said of it stays short.
#[test]
fn manifests_that_repeat_themselves_end_in_a_short_verdict() {
    let value = "x".repeat(60_000);
    let service = "{subComponentType: prefill, envs: [{name: NIXL_PLUGIN_DIR, value: *v}, {name: FI_EFA_ENABLE_SHM_TRANSFER, value: *v}]}";
    let services: String = (0..60).map(|index| format!("    s{index}: {service}\n")).collect();
    let text = format!("kind: DynamoGraphDeployment\nnote: &v {value}\nspec:\n  services:\n{services}");
    let report = read_manifest(&text, "-", &Expectations::default()).unwrap();
    assert_eq!(report.status, Status::Fail);
    let said: usize = report.checks.iter().flat_map(|check| &check.evidence).map(String::len).sum();
    assert!(said < 200_000, "{said} bytes are said");
    let more = text.replace("spec:", &format!("more: [{}]\nspec:", "*v, ".repeat(100)));
    assert!(read_manifest(&more, "-", &Expectations::default()).is_err());
}

proptest! {
    #[test]
    fn any_yaml_is_judged_or_refused(text in "(kind: (DynamoGraphDeployment|Pod|List|ComputeDomain)\n|spec:\n|  services: \\{|  containers: \\[|  components: \\[|items: \\[|\\{name: a, env: |envs: \\[|\\{|\\}|\\[|\\]|, |value: 1|resources: |claims: |a: &a |\\*a|---\n|\\PC){0,40}") {
        manifest(text.as_bytes());
    }

    #[test]
    fn any_text_ends_in_a_verdict(text in "(ucp_context_[0-9] |self |cfg#[0-9]|rma_am\\(|am\\(|srd/|rdmap[0-9]s0|:1|\\)|\\.\\.\\.|NixlTransferAgent |mAddress: |\n|\\PC){0,60}") {
        log(text.as_bytes());
    }
}
