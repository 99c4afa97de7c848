// What is done with a worker's log. Shared by the fuzz target and the corpus test, by `include!`.

use kvferry_doctor::{Expectations, read_log};

/// Reads `bytes` as a log: whatever it says, there is a verdict with its evidence, and advice wherever something is wrong.
fn log(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let report = read_log(&text, &Expectations::default(), 4096);
    assert!(!report.checks.is_empty(), "nothing is said");
    let worst = report.checks.iter().map(|check| check.status).max();
    assert!(worst == Some(report.status), "{worst:?} became {:?}", report.status);
    let evidence: usize = report.checks.iter().flat_map(|check| &check.evidence).map(String::len).sum();
    // What is said of a log is not longer than the log, but for the words around it.
    assert!(evidence <= 64 * bytes.len() + (64 << 10), "{evidence} bytes of evidence of {}", bytes.len());
    for check in report.checks {
        assert!(check.evidence.iter().any(|line| !line.is_empty()), "{} has no evidence", check.id);
    }
}
