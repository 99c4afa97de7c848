//! What the page says of some workers only: plugins on decode, and GB200 with its channel, its variables and its libfabric.

use kvferry_doctor::{Question, Role, Status, SysRoot, examine};

use crate::kit::{BUNDLED, page, page_of_gb200, set, wrong};
use crate::tree::Tree;

/// Decode workers of several nodes with the plugins that the page gives them, and without a role.
#[test]
fn page_plugins_on_decode_only() {
    let tree = Tree::p5("plugins");
    tree.write(&format!("{BUNDLED}/libplugin_UCX.so"), "");
    let mut question = Question { role: Some(Role::Decode), multinode: true, ..page() };
    set(&mut question, "NIXL_PLUGIN_DIR", BUNDLED);
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
    question.role = Some(Role::Prefill);
    question.environment.remove("NIXL_PLUGIN_DIR");
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
}

#[test]
fn page_gb200_with_a_channel_and_its_variables() {
    let tree = Tree::p5("gb200");
    tree.write("dev/nvidia-caps-imex-channels/channel0", "");
    let mut question = page();
    question.expect = "imex=1".parse().unwrap();
    page_of_gb200(&mut question);
    set(&mut question, "NVIDIA_GDRCOPY", "enabled");
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
}

/// 2.4 is what the EFA installer brought up to 1.48.
#[test]
fn gb200_needs_a_newer_libfabric_than_others() {
    for (abi, found) in [("FABRIC_1.8", &[("library.libfabric", Status::Fail)][..]), ("FABRIC_1.9", &[])] {
        let tree = Tree::gb200("gb200-libfabric");
        tree.write("opt/amazon/efa/lib/libfabric.so.1.30.0", &format!("\x7fELF {abi}\0efa_rdm_ep_ctrl\0"));
        let mut question = page();
        page_of_gb200(&mut question);
        let report = examine(&SysRoot::captured(tree.path()), &question);
        assert_eq!(wrong(&report), found, "{abi}");
        if let Some(check) = report.checks.iter().find(|check| check.status == Status::Fail) {
            assert!(check.evidence[0].contains("2.5") && check.fix.contains("1.48"), "{check:?}");
        }
    }
}
