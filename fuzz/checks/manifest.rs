// What is done with somebody's Kubernetes manifests. Shared by the fuzz target and the corpus test, by `include!`.

use kvferry_doctor::{Expectations, Status, read_manifest};

/// Reads `bytes` as manifests: whatever is YAML gets a verdict with its evidence and a fix wherever something is wrong; the rest an error with its place.
fn manifest(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let report = match read_manifest(&text, "m.yaml", &Expectations::default()) {
        Ok(report) => report,
        Err(error) => {
            let error = error.to_string();
            let place = error.split(':').next().unwrap_or_default();
            assert!(place.parse::<usize>().is_ok() || error.starts_with("it has "), "no place: {error}");
            return;
        }
    };
    let worst = report.checks.iter().map(|check| check.status).max();
    assert!(worst == Some(report.status), "{worst:?} became {:?}", report.status);
    for check in &report.checks {
        assert!(check.evidence.iter().any(|line| !line.is_empty()), "{} has no evidence", check.id);
        assert!(check.fix.is_empty() == (check.status == Status::Ok), "{check:?}");
    }
    // What aliases repeat is not said as often as it stands there.
    let said: usize = report.checks.iter().flat_map(|check| &check.evidence).map(String::len).sum();
    assert!(said <= 64 * bytes.len() + (256 << 10), "{said} bytes are said of {}", bytes.len());
}
