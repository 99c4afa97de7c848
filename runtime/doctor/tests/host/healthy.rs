//! Hosts that have what they need: nothing is found.

use kvferry_doctor::{Backend, Question, Status, SysRoot, examine};

use crate::kit::{page, wrong};
use crate::tree::Tree;

#[test]
fn a_healthy_p5_has_nothing_wrong() {
    let tree = Tree::p5("healthy");
    for backend in [Backend::Ucx, Backend::Libfabric] {
        let mut question = Question { backend, ..page() };
        question.expect = "efa=32,gpu=8,imex=0,gbps=3200".parse().unwrap();
        let report = examine(&SysRoot::captured(tree.path()), &question);
        assert_eq!(wrong(&report), [], "{report:#?}");
        let affinity = report.checks.iter().find(|check| check.id == "gpu.affinity").unwrap();
        assert!(
            affinity
                .evidence
                .iter()
                .any(|line| line
                    == "GPU 0000:45:00.0: rdmap65s0:1 rdmap66s0:1 rdmap67s0:1 rdmap68s0:1 (below one switch)")
        );
        // A user's map is shown, and what it names in vain said.
        question.nic_map = "0=rdmap177s0+rdmap65s0".parse().unwrap();
        let chosen = |question: &Question| {
            let report = examine(&SysRoot::captured(tree.path()), question);
            let check = report.checks.iter().find(|check| check.id == "gpu.affinity").unwrap();
            (check.status, check.evidence.join("\n"))
        };
        let (status, lines) = chosen(&question);
        assert_eq!(status, Status::Ok, "{lines}");
        assert!(lines.contains("GPU 0000:45:00.0: rdmap177s0:1 rdmap65s0:1 (as chosen)"), "{lines}");
        question.nic_map = "0=mlx5_0,9=rdmap65s0".parse().unwrap();
        let (status, lines) = chosen(&question);
        assert_eq!(status, Status::Warn, "{lines}");
        assert!(lines.contains("there is no GPU 9") && lines.contains("there is no NIC mlx5_0"), "{lines}");
        let libfabric = report.checks.iter().find(|check| check.id == "library.libfabric").unwrap();
        assert!(
            libfabric.evidence[1].contains("/opt/amazon/efa/lib/libfabric.so.1 -> ")
                && libfabric.evidence[1].contains("LD_LIBRARY_PATH, entry 1")
        );
    }
}

#[test]
fn a_healthy_p4d_has_nothing_wrong() {
    let tree = Tree::p4d("p4d");
    let mut question = page();
    question.expect = "efa=4,gpu=8,gbps=400".parse().unwrap();
    let report = examine(&SysRoot::captured(tree.path()), &question);
    assert_eq!(wrong(&report), [], "{report:#?}");
}
