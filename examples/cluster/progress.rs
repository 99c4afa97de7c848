//! The live line on standard error.

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far the requests are; silent where nobody looks.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Of so many requests.
    pub(crate) fn new(requests: usize) -> Progress {
        let bar = ProgressBar::new(requests as u64);
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} requests, {msg}") {
            bar.set_style(style);
        }
        Progress { bar }
    }

    /// Shows the present state; rates are over the time since the first submission.
    pub(crate) fn show(&self, finished: usize, in_flight: usize, bytes: u64, seconds: f64) {
        let rate = if seconds > 0.0 { bytes as f64 / seconds / 1e9 } else { 0.0 };
        self.bar.set_message(format!("{rate:.2} GB/s, {in_flight} in flight"));
        self.bar.set_position(finished as u64);
    }

    /// Shows a phase instead.
    pub(crate) fn say(&self, phase: &'static str) {
        self.bar.set_message(phase);
    }

    /// Takes the line away.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
