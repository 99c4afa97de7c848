//! How long KV is held for others.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Moment;

/// How leases are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTerms {
    /// From one renewal to the next expiry.
    pub duration: Duration,
    /// How far two nodes' clocks may drift apart, in parts per million of elapsed time.
    pub drift_ppm: u32,
}

impl Default for LeaseTerms {
    fn default() -> Self {
        LeaseTerms { duration: Duration::from_secs(30), drift_ppm: 1_000 }
    }
}

impl LeaseTerms {
    /// How often a holder renews: three chances before expiry.
    pub fn renewal(&self) -> Duration {
        self.duration / 3
    }

    /// What a holder may rely on: the duration less the drift margin.
    pub fn reliable(&self) -> Duration {
        let margin = self.duration.as_nanos() * u128::from(self.drift_ppm) / 1_000_000;
        self.duration.saturating_sub(Duration::from_nanos(u64::try_from(margin).unwrap_or(u64::MAX)))
    }
}

/// One lease. The owner counts from *receiving* a renewal, a holder from *sending* it, so the holder's view always ends first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    expires: Moment,
    duration: Duration,
}

impl Lease {
    /// The owner's lease, granted now.
    pub fn granted(now: Moment, terms: &LeaseTerms) -> Self {
        Lease { expires: now + terms.duration, duration: terms.duration }
    }

    /// A holder's view of it: `sent` is when the request that it rests on left.
    pub fn held(sent: Moment, terms: &LeaseTerms) -> Self {
        Lease { expires: sent + terms.reliable(), duration: terms.reliable() }
    }

    /// Renews it, unless it has expired already: an expired lease stays expired. Says whether it is alive.
    pub fn renew(&mut self, now: Moment) -> bool {
        let alive = self.is_alive(now);
        if alive {
            self.expires = self.expires.max(now + self.duration);
        }
        alive
    }

    /// Whether it holds.
    pub fn is_alive(&self, now: Moment) -> bool {
        now < self.expires
    }

    /// When it ends unless renewed.
    pub fn expires(&self) -> Moment {
        self.expires
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_stops_before_the_owner() {
        let terms = LeaseTerms::default();
        let (sent, received) = (Moment(1_000), Moment(5_000));
        assert!(Lease::held(sent, &terms).expires() < Lease::granted(received, &terms).expires());
    }

    #[test]
    fn an_expired_lease_is_not_revived() {
        let terms = LeaseTerms { duration: Duration::from_nanos(100), drift_ppm: 0 };
        let mut lease = Lease::granted(Moment(0), &terms);
        assert!(lease.renew(Moment(50)));
        assert_eq!(lease.expires(), Moment(150));
        assert!(!lease.renew(Moment(150)));
        assert!(!lease.is_alive(Moment(150)));
    }
}
