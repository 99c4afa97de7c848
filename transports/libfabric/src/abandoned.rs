//! Endpoints that are left open until the process ends, because closing them would end it: how many.

use std::sync::atomic::{AtomicUsize, Ordering};

/// So many, and no other endpoint is opened: what leaks is bounded.
const ABANDONED_MAX: usize = 64;

/// Of this process.
pub(crate) static ABANDONED: Abandoned = Abandoned(AtomicUsize::new(0));

/// How many there are.
pub(crate) struct Abandoned(AtomicUsize);

impl Abandoned {
    /// One more; how many that are.
    pub(crate) fn count(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }

    #[cfg(test)]
    pub(crate) fn so_far(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether another endpoint may be opened, or why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let abandoned = self.0.load(Ordering::Relaxed);
        if abandoned < ABANDONED_MAX {
            return Ok(());
        }
        Err(format!(
            "{abandoned} endpoints of this process could not be closed and stay open with their memory, at most {ABANDONED_MAX} may: start it \
             anew, with libfabric 1.18 or later"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_limit_nothing_is_opened() {
        let abandoned = Abandoned(AtomicUsize::new(0));
        for count in 1..ABANDONED_MAX {
            assert_eq!(abandoned.count(), count);
            assert_eq!(abandoned.check(), Ok(()));
        }
        abandoned.count();
        assert!(abandoned.check().unwrap_err().contains("64 endpoints"));
    }
}
