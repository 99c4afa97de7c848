//! The first process: it starts the second one, initiates the transfers, and takes the time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry::{BlockTable, Moment, PoolId, Program, RailTerms, Tables, TransportKind};
use kvferry_core::Evidence;
use kvferry_core::protocol::{Rails, SharedOut};
use kvferry_transport::{Event, PeerId, PoolKeys, RemotePool, Transfer};

use super::caches;
use super::error::BenchError;
use super::kv::{Cache, Holds, Shape};
use super::nic::Nic;
use super::peer::{spent, transfer_id};
use super::process::PeerProcess;
use super::report::Report;
use super::words::{FromPeer, Spent, ToPeer, Words};
use super::{Deadline, Op, Options};

pub(crate) const SEED: u64 = 1;

/// Runs everything.
pub(crate) fn measure(options: &Options, kind: TransportKind) -> Result<Report, BenchError> {
    let deadline = Deadline::of(options);
    let shape = Shape::of(options)?;
    let nic = Nic::open(options, kind, options.op.here())?;
    let (device, library) = (nic.devices(), nic.library());
    let mut peer = PeerProcess::start(options, Some(&device))?;
    let there = options.device_of(options.op.there()).filter(|_| options.rails == 1).unwrap_or_else(|| device.clone());
    let device = if there == device {
        device
    } else {
        let (from, to) = if options.op.here() == Holds::Source { (device, there) } else { (there, device) };
        format!("{from} to {to}")
    };
    let device = options.beside().map_or(device.clone(), |way| format!("{device}, {way}"));
    let session = Session::open(options, &shape, nic, &mut peer.words, deadline);
    match session.and_then(|session| compare(options, session)) {
        Ok(measured) => {
            peer.finish(deadline)?;
            Ok(Report::new(options, (device, library), &shape, measured))
        }
        Err(error) => Err(peer.explain(error)),
    }
}

/// What one iteration took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) plan: Duration,
    /// From the post to the completion.
    pub(crate) moved: Duration,
    /// Of both processes.
    pub(crate) processor: Duration,
    /// Of the destination's GPU, where its time is taken.
    pub(crate) gpu: Duration,
}

/// What came out of all iterations.
#[derive(Debug)]
pub(crate) struct Measured {
    /// The first after the connection stood.
    pub(crate) first: Sample,
    /// The timed ones.
    pub(crate) samples: Vec<Sample>,
    /// As many bytes in as few pieces as can be, between them.
    pub(crate) contiguous: Vec<Sample>,
    /// One more, after everything was compared, the destination overwritten and all caches filled with other memory: a connection in use, and memory
    /// as cold as at the first. `None` where the comparison found a difference.
    pub(crate) rested: Option<Sample>,
    /// Bytes that each device here has carried in the timed ones.
    pub(crate) carried: Vec<(String, u64)>,
    /// What is known of the path after them.
    pub(crate) evidence: Option<Evidence>,
    /// The first wrong byte.
    pub(crate) mismatch: Option<String>,
}

/// Two sides that hold a request and can move it.
pub(crate) trait Sides {
    /// Plans the request and moves it once.
    fn iterate(&mut self, handover: u64) -> Result<Sample, BenchError>;
    /// Bytes that each device here has carried in all iterations but the first.
    fn carried(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
    /// Moves as many bytes in as few pieces as there can be, and not the request's. `None` where that cannot be.
    fn contiguous(&mut self, handover: u64) -> Result<Option<Sample>, BenchError> {
        let _nobody_asked = handover;
        Ok(None)
    }
    /// What is known of the path, by whoever knows most.
    fn evidence(&mut self) -> Result<Option<Evidence>, BenchError>;
    /// Compares the destination, wherever it is: the first difference, if any.
    fn verify(&mut self) -> Result<Option<String>, BenchError>;
    /// Overwrites the destination.
    fn write(&mut self) -> Result<(), BenchError>;
    /// Fills the caches of the peer's processor with so many bytes of other memory.
    fn rest_there(&mut self, bytes: usize) -> Result<(), BenchError>;
}

/// Moves the request as often as it is wanted, then compares.
pub(crate) fn compare(options: &Options, mut session: impl Sides) -> Result<Measured, BenchError> {
    let first = session.iterate(0)?;
    let iters = u64::from(options.iters);
    let (mut samples, mut contiguous) = (Vec::with_capacity(options.iters as usize), Vec::new());
    for handover in 1..=iters {
        samples.push(session.iterate(handover)?);
        if options.contiguous {
            contiguous.extend(session.contiguous(iters + 2 + handover)?);
        }
    }
    let carried = session.carried();
    let evidence = session.evidence()?;
    if options.contiguous {
        // It has overwritten what is compared.
        session.write()?;
        session.iterate(iters + 2)?;
    }
    let mut mismatch = session.verify()?;
    let mut rested = None;
    if mismatch.is_none() {
        session.write()?;
        let bytes = caches::bytes_to_fill();
        session.rest_there(bytes)?;
        caches::fill(bytes);
        rested = Some(session.iterate(iters + 1)?);
        mismatch = session.verify()?;
    }
    Ok(Measured { first, samples, contiguous, rested, carried, evidence, mismatch })
}

/// Both sides connected, with their pools filled.
struct Session<'a> {
    op: Op,
    shape: &'a Shape,
    cache: Cache,
    /// The peer's table: its blocks where this side touches them, else its shape.
    there: Tables,
    nic: Nic,
    /// The peer and its pool, by rail.
    peers: Vec<(PeerId, RemotePool)>,
    /// Who carries how much of a pull.
    rails: Rails,
    /// Bytes so far, by rail.
    carried: Vec<u64>,
    began: Instant,
    words: &'a mut Words,
    deadline: Deadline,
    events: Vec<Event>,
}

impl<'a> Session<'a> {
    fn open(
        options: &Options,
        shape: &'a Shape,
        mut nic: Nic,
        words: &'a mut Words,
        deadline: Deadline,
    ) -> Result<Session<'a>, BenchError> {
        let during = "connecting";
        let op = options.op;
        let cache = Cache::allocate(options, shape, op.here(), SEED)?;
        for transport in &mut nic.transports {
            transport.bind(cache.pool())?;
        }
        let mut events = Vec::new();
        let hello = hear(&mut nic, words, deadline, "the peer's start", &mut events)?;
        let FromPeer::Hello { address, keys, layout, table } = hello else {
            return Err(unexpected(&hello, during));
        };
        let mut rails = vec![(address, keys)];
        while rails.len() < nic.transports.len() {
            match hear(&mut nic, words, deadline, "the peer's rails", &mut events)? {
                FromPeer::Rail { address, keys } => rails.push((address, keys)),
                other => return Err(unexpected(&other, during)),
            }
        }
        let mut peers = Vec::new();
        for (transport, (address, keys)) in nic.transports.iter_mut().zip(rails) {
            let peer = transport.connect(&address)?;
            peers.push((peer, transport.import(peer, &PoolKeys(keys.into()), &layout)?));
        }
        let mut there = Tables { groups: vec![BlockTable::known(0, table)] };
        if op == Op::Push {
            there = there.shapes();
        }
        let count = peers.len();
        let rails = Rails::new(0..count, RailTerms { rails_max: options.rails, ..RailTerms::default() });
        let carried = vec![0; count];
        let mut session = Session {
            op,
            shape,
            cache,
            there,
            nic,
            peers,
            rails,
            carried,
            began: Instant::now(),
            words,
            deadline,
            events,
        };
        let mut connected = 0;
        while connected < count {
            connected += session.turn(during)?.filter(|event| matches!(event, Event::Connected { .. })).count();
        }
        Ok(session)
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
        let plan = start.elapsed();
        let counts = handover > 0;
        Ok(Sample { plan, ..self.move_it(handover, program, there_before, counts)? })
    }

    fn contiguous(&mut self, handover: u64) -> Result<Option<Sample>, BenchError> {
        let there_before = self.spent_there(&ToPeer::BeginContiguous { handover }, "the start of a large transfer")?;
        self.move_it(handover, self.shape.contiguous(), there_before, false).map(Some)
    }

    fn carried(&self) -> Vec<(String, u64)> {
        let names = self.nic.transports.iter().map(|transport| transport.info().device.clone());
        names.zip(self.carried.iter().copied()).collect()
    }

    /// What the destination knows of the path, since it chooses how bytes come; else what is known here.
    fn evidence(&mut self) -> Result<Option<Evidence>, BenchError> {
        if self.op == Op::Pull {
            return Ok(self.nic.evidence.clone());
        }
        let during = "what it knows of the path";
        match self.ask(&ToPeer::Tell, during)? {
            FromPeer::Knows(there) => Ok(there.or_else(|| self.nic.evidence.clone())),
            other => Err(unexpected(&other, during)),
        }
    }

    fn verify(&mut self) -> Result<Option<String>, BenchError> {
        if self.op == Op::Pull {
            return Ok(self.cache.verify()?.map(|mismatch| mismatch.to_string()));
        }
        match self.ask(&ToPeer::Verify, "the comparison")? {
            FromPeer::Compared { mismatch } => Ok(mismatch),
            other => Err(unexpected(&other, "the comparison")),
        }
    }

    fn write(&mut self) -> Result<(), BenchError> {
        match self.op {
            Op::Pull => self.cache.write()?,
            Op::Push => drop(self.spent_there(&ToPeer::Write, "overwriting")?),
        }
        Ok(())
    }

    fn rest_there(&mut self, bytes: usize) -> Result<(), BenchError> {
        self.spent_there(&ToPeer::Rest { bytes }, "filling caches").map(drop)
    }
}

impl Session<'_> {
    /// Moves what a program says. Says what that took, without the planning.
    fn move_it(
        &mut self,
        handover: u64,
        program: Arc<Program>,
        there_before: Spent,
        counts: bool,
    ) -> Result<Sample, BenchError> {
        let during = "a transfer";
        let here_before = spent();
        let start = Instant::now();
        let mut under_way = self.post(handover, program)?;
        let mut moved = 0;
        while under_way > 0 {
            let ended = self.turn(during)?.filter_map(|event| match event {
                Event::Completed { id, bytes, .. } => Some((usize::from(id.chunk()), bytes)),
                _ => None,
            });
            for (rail, bytes) in ended.collect::<Vec<_>>() {
                (under_way, moved) = (under_way - 1, moved + bytes);
                let now = self.now();
                self.rails.moved(now, rail, bytes);
                if let Some(carried) = self.carried.get_mut(rail).filter(|_| counts) {
                    *carried += bytes;
                }
            }
        }
        let elapsed = start.elapsed();
        let here = spent().since(here_before, Spent::default());

        let there_after = self.spent_there(&ToPeer::End { handover }, "the end of a transfer")?;
        let due = self.shape.bytes();
        if moved != due {
            return Err(BenchError::Short { moved, due });
        }
        let Spent { processor, gpu } = there_after.since(there_before, here);
        let (processor, gpu) = (Duration::from_nanos(processor), Duration::from_nanos(gpu));
        Ok(Sample { plan: Duration::ZERO, moved: elapsed, processor, gpu })
    }

    /// Posts an iteration's shares. Says how many there are.
    fn post(&mut self, handover: u64, program: Arc<Program>) -> Result<usize, BenchError> {
        let now = self.now();
        let (program, shares) = match self.op {
            // The peer expects them so.
            Op::Push => {
                let ranges = program.split(self.peers.len() as u32);
                (program, ranges.into_iter().enumerate().collect())
            }
            Op::Pull if self.peers.len() > 1 => {
                let SharedOut { program, shares, .. } = self.rails.share_out(now, Program::clone(&program));
                (Arc::new(program), shares)
            }
            Op::Pull => {
                let whole = program.whole();
                (program, vec![(0, whole)])
            }
        };
        let mut posted = 0;
        for (rail, range) in shares {
            let (Some((peer, remote)), Some(transport)) = (self.peers.get(rail), self.nic.transports.get_mut(rail))
            else {
                continue;
            };
            self.rails.posted(now, rail, program.bytes_in(range));
            transport.post(Transfer {
                id: transfer_id(handover, rail),
                peer: *peer,
                direction: self.op.direction(),
                local: PoolId(0),
                remote: *remote,
                range,
                program: Arc::clone(&program),
                notice: None,
            })?;
            posted += 1;
        }
        Ok(posted)
    }

    fn now(&self) -> Moment {
        Moment(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn spent_there(&mut self, word: &ToPeer, during: &'static str) -> Result<Spent, BenchError> {
        match self.ask(word, during)? {
            FromPeer::Spent(spent) => Ok(spent),
            other => Err(unexpected(&other, during)),
        }
    }

    fn ask(&mut self, word: &ToPeer, during: &'static str) -> Result<FromPeer, BenchError> {
        self.words.say(word, self.deadline)?;
        hear(&mut self.nic, self.words, self.deadline, during, &mut self.events)
    }

    /// One turn of the transport, while the peer has nothing to say.
    fn turn(&mut self, during: &'static str) -> Result<std::vec::Drain<'_, Event>, BenchError> {
        let Session { nic, words, deadline, events, .. } = self;
        if nic.turn(words.readable(), *deadline, during, events)?
            && let Some(word) = words.take::<FromPeer>()?
        {
            return Err(unexpected(&word, during));
        }
        check(events)?;
        Ok(events.drain(..))
    }
}

/// The peer's next word; the transport goes on in the meantime.
fn hear(
    nic: &mut Nic,
    words: &mut Words,
    deadline: Deadline,
    during: &'static str,
    events: &mut Vec<Event>,
) -> Result<FromPeer, BenchError> {
    loop {
        match words.take()? {
            Some(FromPeer::Failed { reason }) => return Err(BenchError::PeerFailed(reason)),
            Some(word) => return Ok(word),
            None => {}
        }
        nic.turn(words.readable(), deadline, during, events)?;
        check(events)?;
    }
}

fn check(events: &[Event]) -> Result<(), BenchError> {
    for event in events {
        match event {
            Event::Failed { error, .. } => return Err(error.clone().into()),
            Event::PeerLost { reason, .. } => return Err(BenchError::PeerLost(reason.clone())),
            _ => {}
        }
    }
    Ok(())
}

pub(crate) fn unexpected(word: &FromPeer, during: &'static str) -> BenchError {
    match word {
        FromPeer::Failed { reason } => BenchError::PeerFailed(reason.clone()),
        other => BenchError::Unexpected { said: format!("{other:?}"), during },
    }
}
