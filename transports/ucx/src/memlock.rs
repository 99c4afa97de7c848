//! How much memory this process may lock: a device locks what is registered with it, and its own queues.

/// `CAP_IPC_LOCK`, which overrides the limit.
const IPC_LOCK: u32 = 14;

/// What the kernel lets this process lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lockable {
    /// In bytes, of all that is locked together; `None` without a limit, or where the process may go beyond it.
    limit: Option<u64>,
}

impl Lockable {
    /// As it is now.
    pub(crate) fn read() -> Lockable {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a structure to fill in.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let users = std::fs::read_to_string("/proc/thread-self/uid_map").unwrap_or_default();
        let free = !known || limit.rlim_cur == libc::RLIM_INFINITY || (may_lock_all(&status) && is_outermost(&users));
        Lockable { limit: (!free).then_some(limit.rlim_cur) }
    }

    /// What a refusal to lock `bytes` may be due to, and what to do: words to go behind it.
    pub(crate) fn explain(self, bytes: u64) -> String {
        match self.limit {
            None => " (locked memory is not limited here)".to_owned(),
            Some(limit) => format!(
                "; {bytes} bytes have to be locked for it, and {limit} may be here in all: raise that (`ulimit -l unlimited`; for a container \
                 --ulimit memlock=-1 or the capability IPC_LOCK)"
            ),
        }
    }

    /// Words behind a refusal of a device, whose queues are locked, too: none where there is no limit.
    pub(crate) fn doubt(self) -> String {
        self.limit.map_or_else(String::new, |limit| {
            format!(
                "; its queues have to be locked, and {limit} bytes may be here in all: if that is why, raise it (`ulimit -l unlimited`; for a \
                 container --ulimit memlock=-1 or the capability IPC_LOCK)"
            )
        })
    }
}

/// Whether a thread may go beyond the limit, from `/proc/…/status` of the thread that asks.
fn may_lock_all(status: &str) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_some_and(|bits| bits >> IPC_LOCK & 1 == 1)
}

/// Whether a user namespace is the machine's own, from its `uid_map`: the kernel counts the capability to lock only there, not what a rootless
/// container has inside.
fn is_outermost(users: &str) -> bool {
    users.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_need_and_remedy_are_named() {
        let words = Lockable { limit: Some(65536) }.explain(1 << 20);
        for part in ["1048576", "65536", "ulimit -l", "IPC_LOCK"] {
            assert!(words.contains(part), "{words}");
        }
        assert!(Lockable { limit: Some(65536) }.doubt().contains("65536"));
        assert!(Lockable { limit: None }.explain(1).contains("not limited"));
        assert_eq!(Lockable { limit: None }.doubt(), "");
    }

    #[test]
    fn the_capability_counts_where_it_is_effective() {
        let status =
            |bits: &str| format!("Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t{bits}\nCapBnd:\t000001ffffffffff\n");
        assert!(may_lock_all(&status("0000000000004000")) && may_lock_all(&status("000001ffffffffff")));
        assert!(is_outermost("         0          0 4294967295\n"));
        assert!(!is_outermost("0 1000 1\n1 100000 65536\n") && !is_outermost(""));
        assert!(!may_lock_all(&status("000001ffffffbfff")) && !may_lock_all(&status("0")) && !may_lock_all(""));
    }
}
