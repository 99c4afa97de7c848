//! What the two ends of a transfer say of simulated hosts, and what is made of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod tree;

use kvferry_doctor::{Check, EfaKind, End, Environment, Status, SysRoot, Transferred, judge_transfer};
use tree::Tree;

fn end(tree: &Tree) -> End {
    let environment = Environment::from([("LD_LIBRARY_PATH".to_owned(), "/opt/amazon/efa/lib".to_owned())]);
    let end = End::read(&SysRoot::captured(tree.path()), &environment);
    // What a host says of itself, its peer believes.
    assert_eq!(end.clone().checked().as_ref(), Ok(&end));
    end
}

fn compared(here: &Tree, there: Option<&Tree>) -> Check {
    let transferred = Transferred { here: end(here), there: there.map(end), ..Transferred::default() };
    let report = judge_transfer(&transferred);
    report.checks.into_iter().find(|check| check.id == "verify.generations").unwrap()
}

#[test]
fn hosts_say_what_a_process_can_use() {
    let p5 = Tree::p5("ends-p5");
    let kind = EfaKind { device: 0xefa1, count: 32, gigabits: 3200, reads: Some(true), writes: Some(true) };
    assert_eq!(end(&p5), End { efa: vec![kind], libfabric: Some(8) });
    // A container that was given four of them, one of which is down.
    (4..32).for_each(|node| p5.remove(&format!("dev/infiniband/uverbs{node}")));
    p5.write("sys/class/infiniband/rdmap65s0/ports/1/state", "1: DOWN");
    p5.remove("opt/amazon/efa/lib/libfabric.so.1");
    assert_eq!(end(&p5), End { efa: vec![EfaKind { count: 3, gigabits: 300, ..kind }], libfabric: None });
    let p4d = end(&Tree::p4d("ends-p4d"));
    assert_eq!(p4d.efa, [EfaKind { device: 0xefa0, count: 4, gigabits: 400, reads: None, writes: Some(false) }]);
    let gb200 = end(&Tree::gb200("ends-gb200"));
    assert_eq!(gb200.efa, [EfaKind { device: 0xefa4, count: 4, gigabits: 1600, reads: None, writes: None }]);
    assert_eq!(end(&Tree::empty("ends-empty")), End::default());
}

#[test]
fn a_mixed_pair_is_a_warning_that_names_the_direction_and_the_fix() {
    let (p4d, p5, empty) = (Tree::p4d("mixed-p4d"), Tree::p5("mixed-p5"), Tree::empty("mixed-empty"));
    assert_eq!(compared(&p5, Some(&Tree::p5("mixed-p5-too"))).status, Status::Ok);
    assert_eq!(compared(&empty, Some(&empty)).status, Status::Ok);
    let check = compared(&p4d, Some(&p5));
    assert_eq!(check.status, Status::Warn);
    let said = check.evidence.join("\n");
    for word in [
        "different generations of EFA: the destination reads, whoever initiates",
        "RDMA write is not there (0xefa0 here)",
        "the pair carries 400 Gb/s at most, what there is here",
        "here: 4 x 0xefa0, 400 Gb/s together (RDMA read: not told by its number, RDMA write: no)",
        "there: 32 x 0xefa1, 3200 Gb/s together (RDMA read: yes, RDMA write: yes); libfabric with FABRIC_1.8",
    ] {
        assert!(said.contains(word), "no {word:?} in\n{said}");
    }
    assert!(check.fix.contains("instance-type") && check.fix.contains("never WRITE"), "{}", check.fix);
    let check = compared(&p5, Some(&empty));
    assert!(check.status == Status::Warn && check.fix.contains("vpc.amazonaws.com/efa"), "{check:?}");
    let check = compared(&p5, None);
    assert!(check.status == Status::Warn && check.evidence[0].contains("did not say"), "{check:?}");
}
