//! Which process a peer is, so that nobody is called who is known to be gone.
//!
//! An endpoint to a process that has ended costs a descriptor for good where its lanes need the process, as `cma` does: `ucp_ep_create` fails at that lane,
//! and `ucp_ep_create_to_worker_addr` (UCX's `ucp_ep.c`, `err_delete`, up to 1.22 at least) lets the endpoint go without closing the lanes that
//! were made before, so that tcp's socket stays.

use rustix::io::Errno;
use rustix::process::{Pid, getpid, test_kill_process};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Bytes of a name of a host and PID namespace.
const PLACE_BYTES: usize = 16;

/// A process, and where its number means it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Of the host since its last boot, and of the PID namespace.
    place: [u8; PLACE_BYTES],
    pid: i32,
}

impl Process {
    /// This one; `None` where the system does not say where it is.
    pub(crate) fn own() -> Option<Process> {
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
        let name = Sha256::new().chain_update(boot).chain_update(namespace.as_os_str().as_encoded_bytes()).finalize();
        let place = *name.first_chunk::<PLACE_BYTES>()?;
        Some(Process { place, pid: getpid().as_raw_nonzero().get() })
    }

    /// Whether it is certain, seen from `here`, that it has ended.
    pub(crate) fn is_gone(&self, here: &Process) -> bool {
        // Groups, too, have numbers there.
        if self.place != here.place || self.pid <= 0 {
            return false;
        }
        Pid::from_raw(self.pid).is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_ended_is_gone_where_its_number_means_it() {
        let here = Process::own().unwrap();
        assert!(!here.is_gone(&here));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = Process { pid: i32::try_from(child.id()).unwrap(), ..here };
        assert!(!other.is_gone(&here));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(other.is_gone(&here));
        let elsewhere = Process { place: [0; PLACE_BYTES], ..other };
        assert!(!elsewhere.is_gone(&here), "nobody here knows");
        for pid in [0, -1, i32::MIN] {
            assert!(!Process { pid, ..here }.is_gone(&here), "{pid} is no process's");
        }
    }
}
