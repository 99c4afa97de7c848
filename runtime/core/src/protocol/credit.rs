//! Counted permission: nothing is queued that was not granted.

use thiserror::Error;

/// A number of permits, of which some are out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    limit: u64,
    used: u64,
}

/// There are not enough permits left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{wanted} permits wanted, {left} of {limit} left")]
pub struct CreditError {
    /// Asked for.
    pub wanted: u64,
    /// Not out.
    pub left: u64,
    /// In all.
    pub limit: u64,
}

impl Credit {
    /// `limit` permits, none out.
    pub fn new(limit: u64) -> Self {
        Credit { limit, used: 0 }
    }

    /// Takes `wanted` permits, all or none.
    pub fn take(&mut self, wanted: u64) -> Result<(), CreditError> {
        if wanted > self.left() {
            return Err(CreditError { wanted, left: self.left(), limit: self.limit });
        }
        self.used += wanted;
        Ok(())
    }

    /// Takes permits that somebody has in use already, beyond the limit if need be: then none are left until enough came back.
    pub fn force(&mut self, used: u64) {
        self.used = self.used.saturating_add(used);
    }

    /// Gives permits back. Giving back more than are out gives back all of them.
    pub fn give(&mut self, returned: u64) {
        debug_assert!(returned <= self.used, "{returned} permits returned, {} out", self.used);
        self.used = self.used.saturating_sub(returned);
    }

    /// Permits that are out.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Permits that can be taken.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    /// Permits in all.
    pub fn limit(&self) -> u64 {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_none() {
        let mut credit = Credit::new(3);
        assert_eq!(credit.take(2), Ok(()));
        assert_eq!(credit.take(2), Err(CreditError { wanted: 2, left: 1, limit: 3 }));
        credit.give(2);
        assert_eq!((credit.used(), credit.left(), credit.limit()), (0, 3, 3));
        credit.force(5);
        assert_eq!((credit.used(), credit.left()), (5, 0));
        credit.give(3);
        assert_eq!((credit.used(), credit.left()), (2, 1));
    }
}
