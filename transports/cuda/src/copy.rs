//! A program on its way into a pool of ours, by kernels of the destination's own GPU.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{Program, UnitRange};
use kvferry_local::{Copying, Step};
use kvferry_transport::{Pool, TransferError, first_part};

use crate::even::lower_even;
use crate::event::GpuEvent;
use crate::launch::Launcher;
use crate::planes::Planes;
use crate::rectangle::{LowerError, lower};
use crate::shared::Reached;
use crate::slot::Launch;

/// What one launch moves at most: it bounds how long a cancelled transfer goes on.
const LAUNCH_BYTES_MAX: u64 = 1 << 30;
/// Launches of one transfer in its stream: the next one waits there when one ends.
const AHEAD: usize = 2;
/// What a launch costs the processor, in bytes that it could copy in that time.
const LAUNCH_COST: u64 = 64 << 10;

/// How much a launch moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As much as it can.
    Whole,
    /// What one turn of the transport may copy.
    Turn,
}

/// A transfer. Its launches hold everything that they touch, and are waited for when it is dropped.
pub(crate) struct Kernels {
    launches: VecDeque<Launch>,
    launcher: Rc<RefCell<Launcher>>,
    stream: usize,
    owns_stream: bool,
    pace: Pace,
    program: Arc<Program>,
    range: UnitRange,
    source: Rc<Reached>,
    destination: Rc<Planes>,
    _pool: Pool,
    bytes: u64,
    left: u64,
    pieces: u64,
    /// Why it could not begin.
    failed: Option<TransferError>,
}

impl Kernels {
    /// The caller has validated the program against both layouts.
    pub(crate) fn new(
        launcher: &Rc<RefCell<Launcher>>,
        pace: Pace,
        (program, range): (Arc<Program>, UnitRange),
        source: Rc<Reached>,
        (pool, destination): (Pool, Rc<Planes>),
    ) -> Kernels {
        let units = program.units();
        let range = UnitRange { start: range.start.min(units), end: range.end.min(units) };
        let bytes = program.bytes_in(range);
        let stream = launcher.borrow_mut().stream();
        Kernels {
            launches: VecDeque::new(),
            launcher: Rc::clone(launcher),
            stream,
            owns_stream: false,
            pace,
            program,
            range,
            source,
            destination,
            _pool: pool,
            bytes,
            left: bytes,
            pieces: 0,
            failed: None,
        }
    }

    /// Has its launches come after an event, in a stream of their own: others would wait, too.
    pub(crate) fn hold_back(&mut self, event: &GpuEvent) -> Result<(), TransferError> {
        let failed = |message| TransferError::Io { context: "ordering the GPU's copy after an event", message };
        self.stream = self.launcher.borrow_mut().own_stream().map_err(failed)?;
        self.owns_stream = true;
        self.launcher.borrow().hold_back(self.stream, event).map_err(failed)
    }

    /// Lets go of what has ended.
    fn reap(&mut self) -> Result<(), TransferError> {
        let mut launcher = self.launcher.borrow_mut();
        while let Some(launch) = self.launches.front_mut() {
            match launcher.is_done(launch) {
                Ok(false) => break,
                Ok(true) => {
                    if let Some(launch) = self.launches.pop_front() {
                        launcher.recycle(launch);
                    }
                }
                Err(message) => return Err(TransferError::Io { context: "copying on the GPU", message }),
            }
        }
        Ok(())
    }

    /// Starts the next part, and returns its bytes.
    fn start(&mut self, budget: u64) -> Result<u64, TransferError> {
        let planes = [&self.source.planes, &*self.destination];
        let (mut part, mut bytes) = first_part(&self.program, self.range, self.left, budget);
        let payload = loop {
            if let Some(payload) = lower_even(&self.program, part, planes.map(Planes::table)) {
                break payload;
            }
            match lower(&self.program, part, planes.map(Planes::address)) {
                Ok(payload) => break payload,
                Err(LowerError::TooMany) if part.units() > 1 => {
                    part.end = part.start + part.units() / 2;
                    bytes = self.program.bytes_in(part);
                }
                Err(error) => return Err(TransferError::Refused(error.to_string())),
            }
        };
        if payload.items > 0 {
            let is_all = self.left == self.bytes && part.end == self.range.end;
            // SAFETY: the program was validated against both layouts before this was made; the launch is kept in `launches`, which is dropped
            // before what the fields below it hold.
            let launch = unsafe { self.launcher.borrow_mut().launch(&payload, self.stream, is_all) };
            let failed = |message| TransferError::Io { context: "starting the GPU's copy", message };
            self.launches.push_back(launch.map_err(failed)?);
        }
        self.pieces = self.pieces.saturating_add(payload.pieces);
        self.range.start = part.end;
        self.left = self.left.saturating_sub(bytes);
        Ok(bytes)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // Waits for them: afterwards nothing is in the stream.
        self.launches.clear();
        if self.owns_stream
            && let Ok(mut launcher) = self.launcher.try_borrow_mut()
        {
            launcher.give_back(self.stream);
        }
    }
}

impl Copying for Kernels {
    fn begin(&mut self) {
        if self.pace == Pace::Whole && !self.range.is_empty() {
            self.failed = self.start(LAUNCH_BYTES_MAX).err();
        }
    }

    fn step(&mut self, budget: u64) -> Result<Step, TransferError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.reap()?;
        if self.range.is_empty() && self.launches.is_empty() {
            return Ok(Step::Done(0));
        }
        if self.range.is_empty() || self.launches.len() >= AHEAD {
            return Ok(Step::Waiting);
        }
        match self.pace {
            Pace::Whole => {
                self.start(LAUNCH_BYTES_MAX)?;
                Ok(Step::More(LAUNCH_COST))
            }
            Pace::Turn => Ok(Step::More(self.start(budget.max(1))?.max(4096))),
        }
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn pieces(&self) -> u64 {
        self.pieces
    }

    fn is_running(&mut self) -> bool {
        // What has not begun is not begun any more.
        self.launches.iter_mut().for_each(Launch::abandon);
        // In a damaged context nothing runs any more.
        if self.reap().is_err() {
            self.launches.clear();
        }
        !self.launches.is_empty()
    }
}
