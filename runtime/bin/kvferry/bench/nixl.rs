//! `--transport nixl`: the request moves by NIXL's protocol, between an agent here and one in the second process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry::nixl::{
    Agent, AgentConfig, AgentError, AgentMetadata, End, Expect, Fetch, Moved, Notifications, Operation, PeerKind, Push,
    Transfer, pieces,
};
use kvferry::{BlockTable, Evidence, PoolId, PoolLayout, Program, Tables, TransportKind, transport};
use kvferry_core::TransferId;
use rustix::event::{PollFd, PollFlags};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::caches;
use super::error::BenchError;
use super::initiator::{self, Sample, Sides, unexpected};
use super::kv::{Cache, Holds, Shape};
use super::nic::wait_for;
use super::peer::{self, compared, spent, transfer_id};
use super::process::PeerProcess;
use super::report::Report;
use super::words::{FromPeer, Spent, ToPeer, Words};
use super::{Deadline, Op, Options};

/// Either side's only one.
const POOL: PoolId = PoolId(0);
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
            let programs = options.programs.as_ref().map(|nic| format!("{device}, programs by {nic}"));
            let device = programs.unwrap_or(device);
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
        let (agent, notifications) = match options.programs.as_deref() {
            None => runtime.block_on(Agent::start(config))?,
            Some(device) => {
                let open = transport::select(TransportKind::Ucx, Some(device), &transport::Options::default())?;
                runtime.block_on(Agent::start_with(config, open))?
            }
        };
        runtime.block_on(agent.register(cache.pool().clone()))?;
        Ok(Side { runtime, agent, notifications, cache })
    }

    /// Lets the push of an iteration in: the agent has been told when this returns.
    fn expect(
        &self,
        shape: &Shape,
        handover: u64,
        deadline: Deadline,
    ) -> Result<JoinHandle<Result<Moved, AgentError>>, BenchError> {
        // Of the other side's table both know the shape only: it has as many blocks.
        let program = shape.program(&self.cache.tables().shapes(), self.cache.tables())?;
        let expect = Expect::new(transfer_id(handover), POOL, program).within(deadline.left("a transfer")?);
        let agent = self.agent.clone();
        let expected = self.runtime.spawn(async move { agent.expect(expect).await });
        self.runtime.block_on(tokio::task::yield_now());
        Ok(expected)
    }
}

/// Both sides, and how to reach the other one's memory.
struct Session<'a> {
    op: Op,
    /// As programs, instead of piece by piece.
    programs: bool,
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
        let programs = options.programs.is_some();
        // Whoever takes a push has its own blocks.
        let there = if programs && op == Op::Push { there.shapes() } else { there };
        Ok(Session {
            op,
            programs,
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

/// What is asked of the agent.
enum Request {
    Whole(Arc<Program>),
    Pieces(Transfer),
}

impl Session<'_> {
    fn lowered(&self, program: &Program) -> Result<Request, BenchError> {
        let (local, remote) = (self.cache.pool().layout(), &self.layout);
        let (operation, end, layouts) = match self.op {
            Op::Pull => (Operation::Read, End::Destination, (remote, local)),
            Op::Push => (Operation::Write, End::Source, (local, remote)),
        };
        let pieces = pieces(program, end, layouts, &self.bases)?;
        Ok(Request::Pieces(Transfer { operation, ..Transfer::read(&self.peer, POOL, pieces) }))
    }

    async fn moved(&self, request: Request, id: TransferId, within: Duration) -> Result<Moved, AgentError> {
        match (request, self.op) {
            (Request::Pieces(transfer), _) => self.agent.transfer(transfer.then_notify(DONE).within(within)).await,
            (Request::Whole(program), Op::Pull) => {
                let fetch = Fetch::new(&self.peer, POOL, POOL, program);
                self.agent.fetch(fetch.then_notify(DONE).within(within)).await
            }
            (Request::Whole(program), Op::Push) => {
                let push = Push::new(&self.peer, id, POOL, POOL, program);
                self.agent.push(push.then_notify(DONE).within(within)).await
            }
        }
    }
}

impl Sides for Session<'_> {
    fn iterate(&mut self, handover: u64) -> Result<Sample, BenchError> {
        let there_before = self.spent_there(&ToPeer::Begin { handover }, "the start of a transfer")?;

        let start = Instant::now();
        let (source, destination) = match self.op {
            Op::Pull => (&self.there, self.cache.tables()),
            Op::Push => (self.cache.tables(), &self.there),
        };
        let program = self.shape.program(source, destination)?;
        let due = program.bytes();
        let request = if self.programs { Request::Whole(program) } else { self.lowered(&program)? };
        let plan = start.elapsed();

        let left = self.deadline.left("a transfer")?;
        let here_before = spent();
        let start = Instant::now();
        let moved = self.runtime.block_on(self.moved(request, transfer_id(handover), left))?;
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
    let takes = options.programs.is_some() && options.op == Op::Push;
    let mut expected = None;
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
            ToPeer::Begin { handover } => {
                if takes {
                    expected = Some(side.expect(&shape, handover, deadline)?);
                }
                FromPeer::Spent(spent())
            }
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
                if let Some(expected) = expected.take() {
                    let moved = side.runtime.block_on(expected).map_err(|_| AgentError::Gone)??;
                    if moved.bytes != shape.bytes() {
                        return Err(BenchError::Short { moved: moved.bytes, due: shape.bytes() });
                    }
                }
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
