//! Threads that are letting go of UCX when the process ends.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Threads that are.
static ENDING: AtomicUsize = AtomicUsize::new(0);
/// How long the process's end waits for them: a second for last words and five for UCX, and some more.
const LONGEST: Duration = Duration::from_millis(6500);
const NAP: Duration = Duration::from_millis(1);

/// Somebody is letting go of what UCX gave it, on a thread that nobody joins. Until this is dropped, the process does not end: UCX's own
/// clean-up, which comes then, takes tables away that such a thread still reads. After six and a half seconds it ends all the same.
#[derive(Debug)]
#[must_use = "the process waits for as long as this is held"]
pub struct Ending(());

impl Ending {
    /// From now on.
    pub fn begin() -> Ending {
        static WATCHED: Once = Once::new();
        // SAFETY: the function takes nothing, returns and does not unwind. UCX is loaded by now, so that this comes before its clean-up.
        WATCHED.call_once(|| unsafe {
            libc::atexit(wait);
        });
        ENDING.fetch_add(1, Ordering::SeqCst);
        Ending(())
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        ENDING.fetch_sub(1, Ordering::SeqCst);
    }
}

extern "C" fn wait() {
    let naps = LONGEST.as_millis() / NAP.as_millis();
    for _ in 0..naps {
        if ENDING.load(Ordering::SeqCst) == 0 {
            return;
        }
        std::thread::sleep(NAP);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_end_waits_for_whoever_is_letting_go() {
        wait();
        let ending = Ending::begin();
        let begun = Instant::now();
        let letting_go = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(ending);
        });
        wait();
        assert!(begun.elapsed() >= Duration::from_millis(50));
        letting_go.join().unwrap();
    }
}
