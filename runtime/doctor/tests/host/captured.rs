//! What is read of a captured host: its own files only, of one worker where that is asked, and nothing of what is no copy.

use std::fs;

use kvferry_doctor::{Status, SysRoot, examine};

use crate::kit::{page, set, wrong};
use crate::tree::Tree;

/// A captured tree's absolute links are its own: what they name on this host is not looked at.
#[test]
fn a_tree_with_absolute_links_is_read_within_itself() {
    let tree = Tree::p5("linked");
    for (from, to) in [
        ("usr/local/lib/ucx", "opt/hpc/ucx"),
        ("usr/local/lib/pkgconfig", "opt/hpc/pkgconfig"),
        ("opt/amazon/ofi-nccl", "opt/amazon/ofi-nccl-1.2"),
        ("usr/lib/x86_64-linux-gnu/libibverbs", "opt/ibv"),
        ("etc/ld.so.conf.d/ofi.conf", "etc/alternatives/ofi"),
        ("etc", "data/etc"),
        ("proc/meminfo", "data/meminfo"),
        ("proc/self", "proc/42"),
        ("dev", "data/dev"),
    ] {
        let to = tree.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::rename(tree.path().join(from), &to).unwrap();
        let absolute = std::path::Path::new("/").join(to.strip_prefix(tree.path()).unwrap());
        std::os::unix::fs::symlink(absolute, tree.path().join(from)).unwrap();
    }
    let report = examine(&SysRoot::captured(tree.path()), &page());
    assert_eq!(wrong(&report), [], "{report:#?}");
    // A folder that only this host has.
    let elsewhere = std::env::temp_dir().join(format!("kvferry-live-plugins-{}", std::process::id()));
    fs::create_dir_all(&elsewhere).unwrap();
    fs::write(elsewhere.join("libplugin_UCX.so"), "").unwrap();
    std::os::unix::fs::symlink(&elsewhere, tree.path().join("opt/leak")).unwrap();
    for folder in ["/opt/leak".to_owned(), format!("/../../../../../..{}", elsewhere.display())] {
        let mut question = page();
        set(&mut question, "NIXL_PLUGIN_DIR", &folder);
        let report = examine(&SysRoot::captured(tree.path()), &question);
        assert_eq!(wrong(&report), [("nixl.plugins", Status::Fail)], "{folder}: {report:#?}");
    }
    fs::remove_dir_all(&elsewhere).unwrap();
}

#[test]
fn what_is_no_copy_of_a_host_is_told() {
    let tree = Tree::p5("copy");
    let flaw = || SysRoot::captured(tree.path()).flaw();
    assert_eq!(flaw(), None);
    fs::rename(tree.path().join("proc"), tree.path().join("was-proc")).unwrap();
    assert_eq!(flaw(), Some("it has no proc"));
    fs::create_dir(tree.path().join("proc")).unwrap();
    assert_eq!(flaw(), Some("it has no proc"));
    fs::write(tree.path().join("proc/meminfo"), "").unwrap();
    assert_eq!(flaw(), None);
    fs::rename(tree.path().join("sys"), tree.path().join("was-sys")).unwrap();
    let no_sys = Some("it has no sys with buses and classes of devices");
    assert_eq!(flaw(), no_sys);
    fs::create_dir(tree.path().join("sys")).unwrap();
    assert_eq!(flaw(), no_sys);
    fs::remove_dir(tree.path().join("sys")).unwrap();
    std::os::unix::fs::symlink("/sys", tree.path().join("sys")).unwrap();
    assert_eq!(flaw(), no_sys, "this host's");
}

#[test]
fn copies_of_a_library_in_a_worker_are_found() {
    let tree = Tree::p5("maps");
    let own = tree.path().join("proc/self");
    fs::rename(own, tree.path().join("proc/77")).unwrap();
    let line = |path: &str| format!("7f00-7f01 r-xp 00000000 08:01 5  {path}\n");
    let one = line("/usr/local/lib/libucp.so.0.0.0") + &line("/opt/amazon/efa/lib/libfabric.so.1.30.0");
    tree.write("proc/77/maps", &one);
    let root = SysRoot::captured(tree.path()).of_process(77);
    assert_eq!(wrong(&examine(&root, &page())), []);
    tree.write("proc/77/maps", &(one + &line("/wheel/nixl_cu12.libs/libucp-b39b3ed9.so.0.0.0")));
    let report = examine(&root, &page());
    assert_eq!(wrong(&report), [("library.copies", Status::Warn)]);
    tree.write("proc/77/environ", "A=b\0C=d=e\0");
    assert_eq!(root.environment().unwrap().get("C").map(String::as_str), Some("d=e"));
}
