//! What both engines are to the worker that drives them.

use kvferry_core::protocol::{EngineCall, EngineEvent};

use crate::EngineReport;

/// A serving engine as its worker's runner sees it: single-threaded, without clock, and never blocking for long.
///
/// The runner passes every call to [`Engine::handle`] and calls [`Engine::work`] until it returns `false`, first of all once after
/// making the engine. Events come in the order in which they happened.
pub trait Engine: Send {
    /// Takes a call. Cheap: fills, checks and poisons nothing.
    fn handle(&mut self, call: EngineCall, emit: &mut dyn FnMut(EngineEvent));

    /// Does one bounded slice of the work that calls have caused, a few MiB of memory. Returns whether there is more to do now.
    fn work(&mut self, emit: &mut dyn FnMut(EngineEvent)) -> bool;

    /// Checks that nobody has written a block that holds nothing; what is found counts in [`Engine::report`]. Reads every free block: call
    /// it when there is nothing else to do, last of all at the end.
    fn audit(&mut self);

    /// What was checked so far and who has the blocks now. Walks over all blocks.
    fn report(&self) -> EngineReport;
}
