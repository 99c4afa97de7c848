//! How long a scheduler waits, and for what.

use crate::protocol::LeaseTerms;

/// What a scheduler may wait for, and how often it tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerTerms {
    /// From a request's arrival to a prefill group that takes it.
    pub queue_within: core::time::Duration,
    /// From there to the group's offer.
    pub prefill_within: core::time::Duration,
    /// From the offer to a decode group that takes it.
    pub pair_within: core::time::Duration,
    /// From the pairing to its outcome; a backstop behind the decode side's own deadlines.
    pub outcome_within: core::time::Duration,
    /// Handovers tried per request before it fails for good.
    pub attempts_max: u32,
    /// Requests that one prefill group works on at once, their offers included.
    pub prefill_jobs_max: u64,
    /// Leases of offers; the scheduler renews what it still wants.
    pub leases: LeaseTerms,
    /// How long an offer that a leader announced rests before it is paired: a decode leader may be about to announce that it has it. Longer than
    /// nodes take to find a scheduler that has started again.
    pub adopt_after: core::time::Duration,
    /// How long requests wait for a whole group of a role once the last one has lost a rank, before they fail. Zero: they fail at once, for whoever
    /// can send them elsewhere. Where ranks are started again, somewhat longer than that takes.
    pub regroup_within: core::time::Duration,
}

impl Default for SchedulerTerms {
    fn default() -> Self {
        let minutes = |minutes: u64| core::time::Duration::from_secs(60 * minutes);
        SchedulerTerms {
            queue_within: minutes(30),
            prefill_within: minutes(10),
            pair_within: minutes(10),
            outcome_within: minutes(20),
            attempts_max: 3,
            prefill_jobs_max: 16,
            leases: LeaseTerms::default(),
            adopt_after: core::time::Duration::from_secs(3),
            regroup_within: core::time::Duration::ZERO,
        }
    }
}
