//! What is expected of a host: read or refused, and missed where it is not there.

use kvferry_doctor::{Question, Status, SysRoot, examine};

use crate::kit::wrong;
use crate::tree::Tree;

#[test]
fn an_empty_host_has_nothing_wrong_until_something_is_expected() {
    let tree = Tree::empty("empty");
    let mut question = Question::default();
    let root = SysRoot::captured(tree.path());
    assert_eq!(wrong(&examine(&root, &question)), []);
    // A desktop's restriction is nobody's concern.
    tree.write("proc/sys/kernel/yama/ptrace_scope", "1");
    assert_eq!(wrong(&examine(&root, &question)), []);
    question.expect = "efa=4,gpu=1,imex=1".parse().unwrap();
    let ids: Vec<_> =
        wrong(&examine(&root, &question)).into_iter().filter(|(_, status)| *status == Status::Fail).collect();
    assert_eq!(ids.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ["efa.devices", "gpu.devices", "fabric.imex"]);
}

#[test]
fn expectations_are_read_or_refused() {
    use kvferry_doctor::Expectations;
    let read: Expectations = "efa=4, gpu=8,gbps=400".parse().unwrap();
    assert_eq!((read.efa, read.gpu, read.imex, read.gbps), (Some(4), Some(8), None, Some(400)));
    for wrong in ["", "efa", "efa=x", "nic=1", "efa=-1"] {
        let error = wrong.parse::<Expectations>().unwrap_err().to_string();
        assert!(error.contains("efa=4,gpu=8"), "{error}");
    }
}
