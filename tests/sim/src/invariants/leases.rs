//! I10: an unexpired, renewed lease is never revoked.
//!
//! From the ranks' events, judged by the world's clock: a lease that runs out must have lasted its whole duration, less the stated drift,
//! since it was last granted or renewed.

use std::collections::BTreeMap;

use kvferry_core::RequestId;
use kvferry_core::protocol::{Event, LeaseTerms};

use super::Invariant;
use crate::chronicle::{Entry, What};
use crate::world::World;

pub(super) struct Leases {
    terms: LeaseTerms,
    /// By node and request: since when it is held.
    held: BTreeMap<(usize, RequestId), u64>,
}

impl Leases {
    pub(super) fn new(terms: LeaseTerms) -> Self {
        Leases { terms, held: BTreeMap::new() }
    }
}

impl Invariant for Leases {
    fn name(&self) -> &'static str {
        "I10"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Observed(Event::LeaseHeld { request, .. }) => {
                self.held.insert((entry.node, *request), entry.at);
            }
            What::Observed(Event::OfferClosed { request, .. }) => {
                self.held.remove(&(entry.node, *request));
            }
            What::Observed(Event::LeaseExpired { request }) => {
                let Some(since) = self.held.remove(&(entry.node, *request)) else { return };
                let (lasted, least) = (entry.at - since, self.terms.reliable().as_nanos());
                if u128::from(lasted) < least {
                    let node = entry.node;
                    broken.push(format!("the lease of {request} on n{node} ran out after {lasted} ns, not {least} ns"));
                }
            }
            _ => {}
        }
    }
}
