//! Which ranks exchange anything.

use super::{PairPlan, PlanError};
use crate::{GroupGeometry, Rank};

/// The ranks of part `source_dp` of the source from which `destination_rank` receives something, ascending.
pub fn sources(
    source: &GroupGeometry,
    source_dp: u32,
    destination: &GroupGeometry,
    destination_rank: Rank,
) -> Result<Vec<Rank>, PlanError> {
    check(source, destination)?;
    let to = destination.shard_of_valid(destination_rank)?;
    let mut ranks = source.owners(source_dp);
    for rank in std::mem::take(&mut ranks) {
        if !PairPlan::between(source, &source.shard_of_valid(rank)?, &to).is_empty() {
            ranks.push(rank);
        }
    }
    Ok(ranks)
}

/// The ranks of part `destination_dp` of the destination to which `source_rank` gives something, ascending.
pub fn destinations(
    source: &GroupGeometry,
    source_rank: Rank,
    destination: &GroupGeometry,
    destination_dp: u32,
) -> Result<Vec<Rank>, PlanError> {
    check(source, destination)?;
    let from = source.shard_of_valid(source_rank)?;
    let mut ranks = destination.owners(destination_dp);
    for rank in std::mem::take(&mut ranks) {
        if !PairPlan::between(source, &from, &destination.shard_of_valid(rank)?).is_empty() {
            ranks.push(rank);
        }
    }
    Ok(ranks)
}

/// What every plan between two groups presupposes.
pub(super) fn check(source: &GroupGeometry, destination: &GroupGeometry) -> Result<(), PlanError> {
    source.validate()?;
    destination.validate()?;
    source.model.mismatch(&destination.model)?;
    Ok(())
}
