//! The second process: it holds the other side, and does what it is told.

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use kvferry::{HandoverId, PoolId, Program, Rank, Tables, TransportKind};
use kvferry_core::TransferId;
use kvferry_transport::{Event, Expected};
use rustix::time::{ClockId, clock_gettime};

use super::caches;
use super::error::{BenchError, explain};
use super::kv::{Cache, Shape};
use super::nic::{Nic, gpu_nanoseconds};
use super::nixl;
use super::way::Way;
use super::words::{FromPeer, Spent, ToPeer, Words, WordsError};
use super::{Deadline, Op, Options};

pub(crate) const SEED: u64 = 2;

/// Runs until it is told to leave, or until stdin closes.
pub(crate) fn run(options: &Options) -> ExitCode {
    let deadline = Deadline::of(options);
    let pipes = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|from| Ok((from, io::stdout().as_fd().try_clone_to_owned()?)));
    let words = pipes.map_err(WordsError::Io).and_then(|(from, to)| Words::new(from, to));
    let mut words = match words {
        Ok(words) => words,
        Err(error) => {
            eprintln!("kvferry bench: {}", explain(&error));
            return ExitCode::FAILURE;
        }
    };
    let served = options.check().and_then(|()| match options.transport {
        Way::Transport(kind) => serve(options, kind, deadline, &mut words),
        Way::Nixl => nixl::serve(options, deadline, &mut words),
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without the initiator there is nobody to tell.
            let _unheard = words.say(&FromPeer::Failed { reason: explain(&error) }, deadline);
            ExitCode::FAILURE
        }
    }
}

/// The name of what one rail moves in an iteration, at both ends.
pub(crate) fn transfer_id(handover: u64, rail: usize) -> TransferId {
    let chunk = u16::try_from(rail).unwrap_or(u16::MAX);
    TransferId::of(HandoverId(handover), Rank(0), Rank(0), 0).with_chunk(chunk)
}

/// What this process has used so far.
pub(crate) fn spent() -> Spent {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = time.tv_sec.cast_unsigned().saturating_mul(1_000_000_000);
    Spent { processor: seconds.saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0)), gpu: gpu_nanoseconds() }
}

fn serve(options: &Options, kind: TransportKind, deadline: Deadline, words: &mut Words) -> Result<(), BenchError> {
    let shape = Shape::of(options)?;
    let holds = options.op.there();
    let cache = Cache::allocate(options, &shape, holds, SEED)?;
    let mut nic = Nic::open(options, kind, holds)?;
    for (rail, transport) in nic.transports.iter_mut().enumerate() {
        let keys = transport.bind(cache.pool())?.0.to_vec();
        let address = transport.address().to_vec();
        let (layout, table) = (cache.pool().layout().clone(), cache.table().to_vec());
        let word = match rail {
            0 => FromPeer::Hello { address, keys, layout, table },
            _ => FromPeer::Rail { address, keys },
        };
        words.say(&word, deadline)?;
    }
    let source = cache.tables().shapes();
    let mut peer = Peer { shape, cache, nic, source, op: options.op, arrived: Arrived::default(), ending: None };
    let mut events = Vec::new();
    loop {
        if peer.nic.turn(words.readable(), deadline, "waiting for the initiator", &mut events)? {
            while let Some(word) = words.take()? {
                if matches!(word, ToPeer::Leave) {
                    return Ok(());
                }
                if let Some(answer) = peer.handle(word)? {
                    words.say(&answer, deadline)?;
                }
            }
        }
        for event in events.drain(..) {
            peer.note(event)?;
        }
        if let Some(answer) = peer.ended() {
            words.say(&answer, deadline)?;
        }
    }
}

/// The answer to [`ToPeer::Verify`].
pub(crate) fn compared(cache: &Cache) -> Result<FromPeer, BenchError> {
    Ok(FromPeer::Compared { mismatch: cache.verify()?.map(|mismatch| mismatch.to_string()) })
}

struct Peer {
    shape: Shape,
    cache: Cache,
    nic: Nic,
    /// The other side's table as far as this one needs it: both have as many blocks.
    source: Tables,
    op: Op,
    /// What is here of the present iteration's push.
    arrived: Arrived,
    /// The iteration whose end the initiator waits for.
    ending: Option<u64>,
}

/// Shares of a push that are here, and their bytes.
#[derive(Default)]
struct Arrived {
    handover: u64,
    shares: usize,
    bytes: u64,
}

impl Peer {
    fn handle(&mut self, word: ToPeer) -> Result<Option<FromPeer>, BenchError> {
        Ok(match word {
            ToPeer::Begin { handover } => {
                let program = self.shape.program(&self.source, self.cache.tables())?;
                Some(self.begin(handover, &program)?)
            }
            ToPeer::BeginContiguous { handover } => {
                let program = self.shape.contiguous();
                Some(self.begin(handover, &program)?)
            }
            ToPeer::End { handover } => {
                self.ending = Some(handover);
                None
            }
            ToPeer::Verify => Some(compared(&self.cache)?),
            ToPeer::Tell => Some(FromPeer::Knows(self.nic.evidence.clone())),
            ToPeer::Write => {
                self.cache.write()?;
                Some(FromPeer::Spent(spent()))
            }
            ToPeer::Rest { bytes } => {
                caches::fill(bytes);
                Some(FromPeer::Spent(spent()))
            }
            ToPeer::Leave => None,
        })
    }

    /// Expects what is pushed, by every rail its share.
    fn begin(&mut self, handover: u64, program: &Arc<Program>) -> Result<FromPeer, BenchError> {
        if self.op == Op::Push {
            self.arrived = Arrived { handover, ..Arrived::default() };
            let shares = program.split(self.nic.transports.len() as u32);
            for (rail, (transport, range)) in self.nic.transports.iter_mut().zip(shares).enumerate() {
                let (id, program) = (transfer_id(handover, rail), Arc::clone(program));
                transport.expect(Expected { from: None, id, pool: PoolId(0), program, range })?;
            }
        }
        Ok(FromPeer::Spent(spent()))
    }

    fn note(&mut self, event: Event) -> Result<(), BenchError> {
        match event {
            Event::Arrived { bytes, .. } => {
                let (arrived, due) = (&mut self.arrived, self.shape.bytes());
                (arrived.shares, arrived.bytes) = (arrived.shares + 1, arrived.bytes + bytes);
                let is_all = arrived.shares == self.nic.transports.len();
                match arrived.bytes {
                    moved if moved > due || (is_all && moved < due) => Err(BenchError::Short { moved, due }),
                    _ => Ok(()),
                }
            }
            Event::Failed { error, .. } => Err(error.into()),
            // When the initiator leaves, stdin says so too.
            _ => Ok(()),
        }
    }

    /// The answer to [`ToPeer::End`], once all of a push has arrived: its completion may be known there a little earlier than here.
    fn ended(&mut self) -> Option<FromPeer> {
        let ending = self.ending?;
        if self.op == Op::Push && (self.arrived.handover != ending || self.arrived.bytes < self.shape.bytes()) {
            return None;
        }
        self.ending = None;
        Some(FromPeer::Spent(spent()))
    }
}
