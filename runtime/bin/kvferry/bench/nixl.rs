//! `--transport nixl`: the request moves by NIXL's protocol, between an agent here and one in the second process.

use std::time::{Duration, Instant};

use kvferry::nixl::{Agent, AgentConfig, AgentMetadata, End, Notifications, Operation, PeerKind, Transfer, pieces};
use kvferry::{BlockTable, Evidence, PoolId, PoolLayout, Tables};
use rustix::event::{PollFd, PollFlags};
use tokio::runtime::Runtime;

use super::caches;
use super::error::BenchError;
use super::initiator::{self, Sample, Sides, unexpected};
use super::kv::{Cache, Holds, Shape};
use super::nic::wait_for;
use super::peer::{self, compared, spent};
use super::process::PeerProcess;
use super::report::Report;
use super::words::{FromPeer, Spent, ToPeer, Words};
use super::{Deadline, Op, Options};

/// Says that a transfer is over.
const DONE: &[u8] = b"done";

/// Runs everything.
pub(crate) fn measure(options: &Options) -> Result<Report, BenchError> {
    let deadline = Deadline::of(options);
    let shape = Shape::of(options)?;
    let mut peer = match &options.nixl_python {
        Some(python) => PeerProcess::nixl(options, python)?,
        None => PeerProcess::start(options, options.device.as_deref())?,
    };
    let session = Session::open(options, &shape, &mut peer.words, deadline);
    let measured = session.and_then(|session| {
        let (library, kind) = (session.agent.library().to_owned(), session.kind.clone());
        Ok((library, kind, initiator::compare(options, session)?))
    });
    match measured {
        Ok((library, kind, measured)) => {
            peer.finish(deadline)?;
            let devices = options.device.as_deref().unwrap_or("all devices");
            let device = format!("{devices} by {}", options.tls.as_deref().unwrap_or("UCX's choice"));
            Ok(Report::new(options, (device, Some(library)), &shape, measured).beside(kind.to_string(), kind.lacks()))
        }
        Err(error) => Err(peer.explain(error)),
    }
}

/// An agent with this side's cache, as its peer sees it.
struct Side {
    runtime: Runtime,
    agent: Agent,
    notifications: Notifications,
    cache: Cache,
}

impl Side {
    fn start(options: &Options, shape: &Shape, holds: Holds, seed: u64) -> Result<Side, BenchError> {
        let cache = Cache::allocate(options, shape, holds, seed)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(BenchError::Runtime)?;
        let mut config = AgentConfig::new("kvferry-bench");
        if let Some(tls) = &options.tls {
            config = config.transports(tls);
        }
        if let Some(devices) = &options.device {
            config = config.devices(devices);
        }
        let (agent, notifications) = runtime.block_on(Agent::start(config))?;
        runtime.block_on(agent.register(cache.pool().clone()))?;
        Ok(Side { runtime, agent, notifications, cache })
    }
}

/// Both sides, and how to reach the other one's memory.
struct Session<'a> {
    op: Op,
    shape: &'a Shape,
    cache: Cache,
    runtime: Runtime,
    agent: Agent,
    /// The agent here hears nothing.
    _notifications: Notifications,
    peer: String,
    kind: PeerKind,
    there: Tables,
    layout: PoolLayout,
    bases: Vec<u64>,
    words: &'a mut Words,
    deadline: Deadline,
}

impl<'a> Session<'a> {
    fn open(
        options: &Options,
        shape: &'a Shape,
        words: &'a mut Words,
        deadline: Deadline,
    ) -> Result<Session<'a>, BenchError> {
        let op = options.op;
        let Side { runtime, agent, notifications, cache } = Side::start(options, shape, op.here(), initiator::SEED)?;
        let hello = hear(words, deadline, "the peer's start")?;
        let FromPeer::Hello { address, layout, table, .. } = hello else {
            return Err(unexpected(&hello, "connecting"));
        };
        let metadata = AgentMetadata::decode(address.clone().into()).map_err(kvferry::nixl::AgentError::from)?;
        let ranges = metadata.sections.iter().flat_map(|section| &section.ranges);
        // A pool of one region, so that there is no question of their order.
        let bases = ranges.map(|range| range.address).collect();
        let peer = runtime.block_on(agent.add_peer(address.into()))?;
        runtime.block_on(agent.connect(&peer.name, Some(deadline.left("connecting")?)))?;
        let there = Tables { groups: vec![BlockTable::known(0, table)] };
        Ok(Session {
            op,
            shape,
            cache,
            runtime,
            agent,
            _notifications: notifications,
            peer: peer.name,
            kind: peer.kind,
            there,
            layout,
            bases,
            words,
            deadline,
        })
    }

    fn ask(&mut self, word: &ToPeer, during: &'static str) -> Result<FromPeer, BenchError> {
        self.words.say(word, self.deadline)?;
        hear(self.words, self.deadline, during)
    }

    fn spent_there(&mut self, word: &ToPeer, during: &'static str) -> Result<Spent, BenchError> {
        match self.ask(word, during)? {
            FromPeer::Spent(spent) => Ok(spent),
            other => Err(unexpected(&other, during)),
        }
    }
}

impl Sides for Session<'_> {
    fn iterate(&mut self, handover: u64) -> Result<Sample, BenchError> {
        let there_before = self.spent_there(&ToPeer::Begin { handover }, "the start of a transfer")?;

        let start = Instant::now();
        let (here, there) = (self.cache.tables(), &self.there);
        let (local, remote) = (self.cache.pool().layout(), &self.layout);
        let (due, pieces) = match self.op {
            Op::Pull => {
                let program = self.shape.program(there, here)?;
                (program.bytes(), pieces(&program, End::Destination, (remote, local), &self.bases)?)
            }
            Op::Push => {
                let program = self.shape.program(here, there)?;
                (program.bytes(), pieces(&program, End::Source, (local, remote), &self.bases)?)
            }
        };
        let operation = match self.op {
            Op::Pull => Operation::Read,
            Op::Push => Operation::Write,
        };
        let plan = start.elapsed();

        let left = self.deadline.left("a transfer")?;
        let transfer = Transfer { operation, ..Transfer::read(&self.peer, PoolId(0), pieces) };
        let here_before = spent();
        let start = Instant::now();
        let moved = self.runtime.block_on(self.agent.transfer(transfer.then_notify(DONE).within(left)))?;
        let elapsed = start.elapsed();
        let here = spent().since(here_before, Spent::default());

        let there_after = self.spent_there(&ToPeer::End { handover }, "the end of a transfer")?;
        if moved.bytes != due {
            return Err(BenchError::Short { moved: moved.bytes, due });
        }
        let Spent { processor, gpu } = there_after.since(there_before, here);
        let (processor, gpu) = (Duration::from_nanos(processor), Duration::from_nanos(gpu));
        Ok(Sample { plan, moved: elapsed, processor, gpu })
    }

    fn evidence(&mut self) -> Result<Option<Evidence>, BenchError> {
        Ok(None)
    }

    fn verify(&mut self) -> Result<Option<String>, BenchError> {
        let answer = match self.op {
            Op::Pull => compared(&self.cache)?,
            Op::Push => self.ask(&ToPeer::Verify, "the comparison")?,
        };
        match answer {
            FromPeer::Compared { mismatch } => Ok(mismatch),
            other => Err(unexpected(&other, "the comparison")),
        }
    }

    fn write(&mut self) -> Result<(), BenchError> {
        match self.op {
            Op::Pull => self.cache.write(),
            Op::Push => self.spent_there(&ToPeer::Write, "overwriting").map(drop),
        }
    }

    fn rest_there(&mut self, bytes: usize) -> Result<(), BenchError> {
        self.spent_there(&ToPeer::Rest { bytes }, "filling caches").map(drop)
    }
}

/// The peer's next word. What moves in the meantime is the agent's thread's business.
fn hear(words: &mut Words, deadline: Deadline, during: &'static str) -> Result<FromPeer, BenchError> {
    loop {
        match words.take()? {
            Some(FromPeer::Failed { reason }) => return Err(BenchError::PeerFailed(reason)),
            Some(word) => return Ok(word),
            None => {}
        }
        wait_for(&mut [PollFd::from_borrowed_fd(words.readable(), PollFlags::IN)], deadline.left(during)?)?;
    }
}

/// Runs the second process, where that is ours.
pub(crate) fn serve(options: &Options, deadline: Deadline, words: &mut Words) -> Result<(), BenchError> {
    let shape = Shape::of(options)?;
    let mut side = Side::start(options, &shape, options.op.there(), peer::SEED)?;
    let address = side.runtime.block_on(side.agent.metadata())?.to_vec();
    let (layout, table) = (side.cache.pool().layout().clone(), side.cache.table().to_vec());
    words.say(&FromPeer::Hello { address, keys: Vec::new(), layout, table }, deadline)?;
    loop {
        let Some(word) = words.take()? else {
            let left = deadline.left("waiting for the initiator")?;
            wait_for(&mut [PollFd::from_borrowed_fd(words.readable(), PollFlags::IN)], left)?;
            continue;
        };
        let answer = match word {
            ToPeer::Leave => return Ok(()),
            ToPeer::Verify => compared(&side.cache)?,
            ToPeer::Tell => FromPeer::Knows(None),
            ToPeer::Begin { .. } | ToPeer::BeginContiguous { .. } => FromPeer::Spent(spent()),
            ToPeer::Write => {
                side.cache.write()?;
                FromPeer::Spent(spent())
            }
            ToPeer::Rest { bytes } => {
                caches::fill(bytes);
                FromPeer::Spent(spent())
            }
            // Over here, too, once the initiator's agent has said so.
            ToPeer::End { .. } => {
                let during = "the notification after a transfer";
                let left = deadline.left(during)?;
                let heard =
                    side.runtime.block_on(async { tokio::time::timeout(left, side.notifications.next()).await });
                match heard.map_err(|_| deadline.late(during))? {
                    Some(heard) if heard.message[..] == *DONE => FromPeer::Spent(spent()),
                    _ => FromPeer::Failed {
                        reason: "another notification than the transfer's came, or none ever will".to_owned(),
                    },
                }
            }
        };
        words.say(&answer, deadline)?;
    }
}
