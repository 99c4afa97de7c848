//! Endpoints of one process, which libfabric's shared memory does not survive.
//!
//! Seen with 1.17: they use each other's own mapping of their memory, also when its owner has closed and unmapped it. A message to such a one, or
//! the answer to its first, then ends the process. With 2.5.1: a region that is mapped already is not told to the endpoint, which then writes
//! through a null pointer.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libfabric_sys::version;

use crate::library::Version;

/// What names of shared memory's endpoints begin with.
const PREFIX: &[u8] = b"fi_shm://";
/// From this version on shared memory between endpoints of one process does not work at all.
const NEVER_FROM: Version = Version(version(2, 0));

/// Why an endpoint may not meet the one of that name, if it may not. `shares`: they may where the library survives that.
pub(crate) fn refusal(own: &[u8], name: &[u8], library: Version, shares: bool) -> Option<String> {
    if process(name).is_none_or(|pid| process(own) != Some(pid)) {
        return None;
    }
    if !shares || library >= NEVER_FROM {
        return Some(format!(
            "libfabric {library} does not survive shared memory inside one process; use shm, or a process for each rank"
        ));
    }
    // The library keeps where a closed one was.
    let is_closed = file(name).is_none_or(|file| !Path::new("/dev/shm").join(file).exists());
    is_closed.then(|| "an endpoint of this process that was closed".to_owned())
}

/// The process in a name of shared memory's, as text.
fn process(name: &[u8]) -> Option<&[u8]> {
    name.strip_prefix(PREFIX)?.split(|byte| *byte == b':').next()
}

/// What its memory is called, which goes with the endpoint.
fn file(name: &[u8]) -> Option<&OsStr> {
    let text = name.strip_prefix(PREFIX)?.strip_suffix(b"\0")?;
    (!text.contains(&b'/')).then(|| OsStr::from_bytes(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Version = Version(version(1, 17));
    const OWN: &[u8] = b"fi_shm://12:0:1\0";

    #[test]
    fn other_processes_and_other_providers_are_met() {
        let socket = [2, 0, 0x1f, 0x90, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        for shares in [false, true] {
            assert_eq!(refusal(OWN, b"fi_shm://4242:1:10\0", OLD, shares), None);
            assert_eq!(refusal(&socket, &socket, OLD, shares), None);
        }
    }

    #[test]
    fn the_own_process_is_met_only_where_that_is_asked_for_and_never_by_who_was_closed() {
        for (library, shares) in [(OLD, false), (NEVER_FROM, false), (NEVER_FROM, true)] {
            assert!(refusal(OWN, b"fi_shm://12:0:2\0", library, shares).unwrap().contains("use shm"));
        }
        // Process 12's, which are not there.
        for name in [&b"fi_shm://12:0:999999999\0"[..], b"fi_shm://12:/../../dev/null\0", b"fi_shm://12"] {
            assert!(refusal(OWN, name, OLD, true).unwrap().contains("was closed"), "{name:?}");
        }
    }
}
