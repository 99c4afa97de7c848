//! The planner: intersects what a source rank holds with what a destination rank needs.

mod pair;
mod peers;
mod tables;

pub use pair::{PairPlan, PlanError, PlanRequest};
pub use peers::{destinations, sources};
pub use tables::{BlockTable, TableBlocks, Tables};
