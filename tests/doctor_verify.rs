//! `kvferry doctor --verify` with a real peer, `kvferry doctor --serve`, both as processes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
    command.arg("doctor").args(arguments);
    command
}

/// A peer that serves, and is killed at the end.
struct Peer {
    child: Child,
    address: String,
}

impl Peer {
    fn serve(arguments: &[&str]) -> Peer {
        let mut command = doctor(&[&["--serve", "127.0.0.1:0"], arguments].concat());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.split("serves at ").nth(1).unwrap_or_else(|| panic!("{line}"));
        Peer { address: address.split(' ').next().unwrap().to_owned(), child }
    }

    fn verify(&self, arguments: &[&str]) -> Output {
        doctor(&[&["--verify", &self.address, "--json"], arguments].concat()).output().unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A file with a secret, removed at the end.
struct Secret(PathBuf);

impl Secret {
    fn new(name: &str, secret: &str) -> Secret {
        let file = std::env::temp_dir().join(format!("kvferry-verify-{}-{name}", std::process::id()));
        std::fs::write(&file, secret).unwrap();
        Secret(file)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn read(output: &Output, code: i32) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap()
}

/// All that a check says.
fn said(report: &Value, id: &str) -> String {
    let check = report["checks"].as_array().unwrap().iter().find(|check| check["id"] == id);
    check.unwrap_or_else(|| panic!("no {id} in {report:#}")).to_string()
}

#[test]
fn memory_and_tcp_are_graded_by_what_they_can_show() {
    let peer = Peer::serve(&[]);
    let report = read(&peer.verify(&[]), 0);
    for (id, word) in [
        ("verify.transfer", "5 of 5 handovers, 167772160 bytes"),
        ("verify.transfer", "every one of 167772160 bytes was compared"),
        ("verify.path", "shm from memory to memory"),
        ("verify.device", "E1"),
        ("verify.provider", "E2"),
        ("verify.lanes", "E3: a connection stands over memfd/memory"),
        ("verify.zero-copy", "E4: bytes move"),
        ("verify.counters", "memory has no counters"),
        ("verify.clock", "of 16 answers"),
        ("verify.generations", "EFA"),
    ] {
        assert!(said(&report, id).contains(word), "{id} {word}: {report:#}");
    }
    // Whoever comes next is served, too.
    let report = read(&peer.verify(&["--transport", "tcp"]), 0);
    assert!(said(&report, "verify.path").contains("passed over: shm (only the prefill side has opened it)"));
    assert!(said(&report, "verify.lanes").contains("tcp/127.0.0.1:"), "{report:#}");
    assert!(said(&report, "verify.zero-copy").contains("not to be had over TCP"), "{report:#}");
    let report = read(&peer.verify(&["--transport", "tcp", "--require-rdma"]), 2);
    assert!(said(&report, "verify.transfer").contains("RDMA"), "{report:#}");
    let of = |check: &&serde_json::Value| check["id"] == "verify.transfer";
    let fix = report["checks"].as_array().unwrap().iter().find(of).unwrap()["fix"].to_string();
    assert!(fix.contains("do without --require-rdma") && !fix.contains("secret"), "{fix}");
}

/// Whoever has nothing in common with the peer is told that, RDMA or not.
#[test]
fn ends_without_a_common_transport_are_told_so() {
    let peer = Peer::serve(&["--transport", "shm"]);
    for more in [&[][..], &["--require-rdma"]] {
        let report = read(&peer.verify(&[&["--transport", "tcp"], more].concat()), 2);
        let of = |check: &&serde_json::Value| check["id"] == "verify.transfer";
        let fix = report["checks"].as_array().unwrap().iter().find(of).unwrap()["fix"].to_string();
        assert!(fix.contains("the same --transport on both sides") && !fix.contains("secret"), "{report:#}");
    }
}

/// A captured host with one EFA device, of which a process can use the node.
struct Captured(PathBuf);

impl Captured {
    fn new(name: &str, device: &str) -> Captured {
        let root = std::env::temp_dir().join(format!("kvferry-verify-host-{}-{name}", std::process::id()));
        let pci = "sys/devices/pci0000:40/0000:41:00.0";
        let rdma = format!("{pci}/infiniband/rdmap65s0");
        for (file, text) in [
            (format!("{pci}/vendor"), "0x1d0f"),
            (format!("{pci}/device"), device),
            (format!("{rdma}/ports/1/state"), "4: ACTIVE"),
            (format!("{rdma}/ports/1/rate"), "100 Gb/sec (4X EDR)"),
            ("sys/class/infiniband_verbs/uverbs0/ibdev".to_owned(), "rdmap65s0"),
            ("dev/infiniband/uverbs0".to_owned(), ""),
            ("proc/meminfo".to_owned(), ""),
        ] {
            let file = root.join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        for (link, to) in [
            ("sys/bus/pci/devices/0000:41:00.0", pci),
            ("sys/class/infiniband/rdmap65s0", &rdma),
            (&format!("{rdma}/device"), pci),
        ] {
            let link = root.join(link);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(root.join(to), link).unwrap();
        }
        Captured(root)
    }

    /// No device of it is left.
    fn without(&self) {
        std::fs::remove_dir_all(self.0.join("sys")).unwrap();
        std::fs::create_dir_all(self.0.join("sys/class/net")).unwrap();
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn generations_of_efa_at_both_ends_are_compared() {
    let (old, new) = (Captured::new("old", "0xefa0"), Captured::new("new", "0xefa1"));
    let peer = Peer::serve(&["--root", old.path(), "--transport", "tcp"]);
    let verify = |root: &str, code| read(&peer.verify(&["--root", root, "--transport", "tcp"]), code);
    let report = verify(new.path(), 1);
    for word in [
        "different generations of EFA: the destination reads",
        "RDMA write is not there (0xefa0 there)",
        "here: 1 x 0xefa1, 100 Gb/s",
        "never WRITE",
    ] {
        assert!(said(&report, "verify.generations").contains(word), "{word}: {report:#}");
    }
    // All else is well.
    assert!(said(&report, "verify.transfer").contains("5 of 5 handovers"), "{report:#}");
    assert!(said(&verify(old.path(), 0), "verify.generations").contains("one generation of EFA"));
    // And with a host that has none.
    new.without();
    assert!(said(&verify(new.path(), 1), "verify.generations").contains("EFA there and none here"));
}

#[test]
fn native_libraries_are_named_with_what_they_show() {
    let mut peers = Vec::new();
    if let Some(reason) = kvferry_ucx::UcxProvider::unavailable() {
        kvferry_transport::conformance::absent("ucx", &reason);
    } else {
        peers.push(("ucx", "libucp"));
    }
    if let Some(reason) = kvferry_libfabric::LibfabricProvider::unavailable() {
        kvferry_transport::conformance::absent("libfabric", &reason);
    } else {
        peers.push(("libfabric", "libfabric"));
    }
    for (transport, library) in peers {
        let how = ["--transport", transport, "--device", "lo"];
        let peer = Peer::serve(&how);
        let report = read(&peer.verify(&how), 0);
        assert!(said(&report, "verify.provider").contains(library), "{report:#}");
        assert!(said(&report, "verify.lanes").contains("(TCP)"), "{report:#}");
    }
}

#[test]
fn only_who_has_the_secret_is_served() {
    let (secret, other) = (Secret::new("right", "a shared secret\n"), Secret::new("wrong", "another secret"));
    let peer = Peer::serve(&["--secret-file", secret.path()]);
    read(&peer.verify(&["--secret-file", secret.path()]), 0);
    for wrong in [&["--secret-file", other.path(), "--within", "2"][..], &["--within", "2"]] {
        let report = read(&peer.verify(wrong), 2);
        assert!(said(&report, "verify.transfer").contains("its secret differs"), "{report:#}");
    }
    read(&peer.verify(&["--secret-file", secret.path()]), 0);
}

#[test]
fn nobody_and_somebody_else_are_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let verify = |within: &str| doctor(&["--verify", &address, "--json", "--within", within]).output().unwrap();
    let report = read(&verify("1"), 2);
    assert!(said(&report, "verify.transfer").contains("something else listens"), "{report:#}");
    assert!(said(&report, "verify.clock").contains("no question"), "{report:#}");
    drop(listener);
    let report = read(&verify("60"), 2);
    assert!(said(&report, "verify.transfer").contains("refused"), "{report:#}");
}

#[test]
fn wrong_options_say_what_to_do() {
    let short = Secret::new("short", "abc");
    for (arguments, words) in [
        (&["--verify", "192.0.2.1:4000"][..], ["off loopback", "--secret-file"]),
        (&["--serve", "0.0.0.0:4000"], ["0.0.0.0:4000", "reaches this host"]),
        (&["--verify", "nowhere"], ["nowhere", "HOST:PORT"]),
        (&["--verify", "127.0.0.1:1", "--serve", "127.0.0.1:1"], ["--verify", "--serve"]),
        (&["--verify", "127.0.0.1:1", "--log", "x"], ["--verify", "--log"]),
        (&["--transport", "tcp"], ["--verify", "--serve"]),
        (&["--serve", "127.0.0.1:0", "--device", "lo"], ["--device lo", "--transport"]),
        (&["--serve", "127.0.0.1:0", "--require-rdma"], ["--serve", "--require-rdma"]),
        (&["--serve", "127.0.0.1:0", "--transport", "tcp", "--device", "nic9"], ["nic9", "tcp"]),
        (&["--serve", "127.0.0.1:0", "--secret-file", short.path()], ["less than 8 bytes", short.path()]),
    ] {
        let output = doctor(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
    }
}
