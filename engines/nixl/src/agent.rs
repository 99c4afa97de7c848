//! The agent as programs hold it: calls become commands to its thread, answers come back as futures.

use std::collections::VecDeque;
use std::fmt;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::{PoolId, PoolLayout};
use kvferry_transport::Pool;
use kvferry_ucx::raw::Ending;
use tokio::sync::oneshot;

use crate::driver::{self, Command};
use crate::wake::Wake;
use crate::{AgentConfig, AgentError, Expect, Fetch, Lease, Notification, OpenNic, Piece, Push, Ticket, Transfer};

/// An agent that NIXL agents take for one of theirs. Cheap to clone; its thread ends when the last clone is dropped or at [`Agent::shutdown`]; a process
/// that ends meanwhile waits for that, up to six and a half seconds.
#[derive(Clone, Debug)]
pub struct Agent {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    library: String,
    commands: mpsc::Sender<Command>,
    wake: Arc<Wake>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The thread finds the channel closed; should it be gone, nothing is lost.
        let _ended = self.commands.send(Command::Shutdown { done: None, ending: Ending::begin() });
        self.wake.wake();
    }
}

/// What a transfer moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Bytes, notification not counted.
    pub bytes: u64,
    /// Reads or writes that UCX was asked for: pieces that follow each other count once.
    pub operations: u64,
    /// From the call to the last byte's arrival; to the notification's leaving, where there was one.
    pub took: Duration,
    /// The owner confirmed, behind the last byte, that all that was read was registered by then, and lent, if that was under a lease. Never of writes and
    /// pushes, and never by NIXL agents.
    pub confirmed: bool,
}

/// What a peer is, and so what there is between it and an [`Agent`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// A NIXL agent: its protocol and nothing else.
    Nixl,
    /// One of ours: what is read is confirmed, leases are, and programs move where both have a device for them.
    Kvferry(Box<Kvferry>),
}

/// What a peer of ours told of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kvferry {
    /// Its incarnation: when it was set up, in nanoseconds since 1970 by its clock.
    pub incarnation: u64,
    /// What it said in [`AgentConfig::extension`].
    pub extension: Bytes,
    /// Its pools.
    pub pools: Vec<PeerPool>,
    /// By what programs move to and from it, or why none do.
    pub programs: Result<String, String>,
}

/// A pool of a peer of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerPool {
    /// Its number there.
    pub id: PoolId,
    /// Its planes.
    pub layout: PoolLayout,
    /// Where its regions begin, as the peer sees them: for [`pieces`](crate::pieces()).
    pub bases: Vec<u64>,
    /// What programs name it by.
    pub(crate) keys: Option<Bytes>,
}

const NO_PROGRAM: &str = "no program: UCX is asked for every piece, neighbours merged";
const NO_LEASE: &str = "no lease: nobody confirms that what was read was still the request's";
const NO_FENCE: &str = "no fence: whoever has a key may write until the memory is deregistered, and a write that was given up may still land";
const NO_AUTHENTICATION: &str = "no authentication: any peer may claim any name";

impl PeerKind {
    /// What transfers with such a peer lack beside those between kvferry's own nodes.
    pub fn lacks(&self) -> Vec<&'static str> {
        match self {
            PeerKind::Nixl => vec![NO_PROGRAM, NO_LEASE, NO_FENCE, NO_AUTHENTICATION],
            PeerKind::Kvferry(told) if told.programs.is_ok() => vec![NO_AUTHENTICATION],
            PeerKind::Kvferry(_) => vec![NO_PROGRAM, NO_FENCE, NO_AUTHENTICATION],
        }
    }
}

impl fmt::Display for PeerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PeerKind::Nixl => "a NIXL agent",
            PeerKind::Kvferry(_) => "an agent of kvferry's",
        })
    }
}

/// A peer that was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The name by which transfers name it.
    pub name: String,
    /// What it is.
    pub kind: PeerKind,
    /// Ranges of memory of it that are known now.
    pub ranges: usize,
}

impl Agent {
    /// Starts an agent on a thread of its own.
    pub async fn start(config: AgentConfig) -> Result<(Agent, Notifications), AgentError> {
        Agent::run(config, None).await
    }

    /// The same, with a device of one of kvferry's transports, by which programs move between it and other agents of ours that have one of that kind:
    /// [`Agent::fetch`], [`Agent::push`]. NIXL agents do not see it.
    pub async fn start_with(config: AgentConfig, nic: OpenNic) -> Result<(Agent, Notifications), AgentError> {
        Agent::run(config, Some(nic)).await
    }

    async fn run(config: AgentConfig, nic: Option<OpenNic>) -> Result<(Agent, Notifications), AgentError> {
        let wake =
            Arc::new(Wake::new().map_err(|error| AgentError::Config(format!("no descriptor to wake it: {error}")))?);
        let queue = Arc::new(Queue::new(config.notifications_max));
        let (commands, inbox) = mpsc::channel();
        let (ready, started) = oneshot::channel();
        let (for_thread, into) = (wake.clone(), queue.clone());
        std::thread::Builder::new()
            .name("kvferry-nixl".to_owned())
            .spawn(move || driver::run(config, nic, inbox, &for_thread, into, ready))
            .map_err(|error| AgentError::Config(format!("no thread for it: {error}")))?;
        let (name, library) = started.await.map_err(|_| AgentError::Gone)??;
        Ok((Agent { shared: Arc::new(Shared { name, library, commands, wake }) }, Notifications { queue }))
    }

    /// Its name, as peers know it.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The UCX library that carries it, and its version.
    pub fn library(&self) -> &str {
        &self.shared.library
    }

    /// Registers a pool's memory: peers that get the metadata may read and write it from then on. It stays allocated until it is deregistered.
    pub async fn register(&self, pool: Pool) -> Result<(), AgentError> {
        self.ask(|reply| Command::Register { pool, reply }).await?
    }

    /// Ends that. Transfers of pieces by this agent that use it go on to their end and keep it alive, programs fail. Peers of ours fail what they read: they
    /// find that it is withdrawn. NIXL agents must have been told before: what they still read or write afterwards fails or, where UCX emulates one-sided
    /// access, touches memory that may be somebody else's; so does what peers of ours still write.
    pub async fn deregister(&self, pool: PoolId) -> Result<(), AgentError> {
        self.ask(|reply| Command::Deregister { pool, reply }).await?
    }

    /// What other agents need to reach this one and all its memory: pass it to them by any means.
    pub async fn metadata(&self) -> Result<Bytes, AgentError> {
        self.ask(|reply| Command::Metadata { pools: None, reply }).await?
    }

    /// The part for some pools; with how to reach this agent, or for agents that know it already.
    pub async fn partial_metadata(&self, pools: Vec<PoolId>, connection: bool) -> Result<Bytes, AgentError> {
        self.ask(|reply| Command::Metadata { pools: Some((pools, connection)), reply }).await?
    }

    /// Adds a peer, or more memory of one that is known, by what its agent gave.
    pub async fn add_peer(&self, metadata: Bytes) -> Result<Peer, AgentError> {
        self.ask(|reply| Command::AddPeer { metadata, reply }).await?
    }

    /// Connects to a peer that was added, so that its first transfer need not; each one does where nobody has.
    pub async fn connect(&self, peer: &str, within: Option<Duration>) -> Result<(), AgentError> {
        let peer = peer.to_owned();
        self.ask(|reply| Command::Connect { peer, within, reply }).await?.map(|_| ())
    }

    /// Forgets a peer. Its transfers fail, and when this returns nothing of them touches local memory any more.
    pub async fn remove_peer(&self, name: &str) -> Result<(), AgentError> {
        let name = name.to_owned();
        self.ask(|reply| Command::RemovePeer { name, reply }).await?
    }

    /// Reads or writes. Whether it succeeds or not: once this returns, nothing of it touches local memory any more. Dropping the future stops what
    /// was not begun, sends no notification, and frees nothing that is in flight.
    pub async fn transfer(&self, transfer: Transfer) -> Result<Moved, AgentError> {
        self.ask(|reply| Command::Transfer { transfer, reply }).await?
    }

    /// Reads a program from a pool of a peer of ours. As with [`Agent::transfer`], nothing of it touches local memory any more once this returns, whether it
    /// succeeds or not; dropping the future stops it.
    pub async fn fetch(&self, fetch: Fetch) -> Result<Moved, AgentError> {
        self.ask(|reply| Command::Fetch { fetch, reply }).await?
    }

    /// Has a peer of ours take a program from a pool of this agent, into blocks that it has chosen: [`Agent::expect`]. Nobody but the peer writes its memory,
    /// so that none of it can be written late. It waits there some seconds to be expected.
    pub async fn push(&self, push: Push) -> Result<Moved, AgentError> {
        self.ask(|reply| Command::Push { push, reply }).await?
    }

    /// Lets a peer's push in; returns once all of it is here. If it fails, or its time is up, nothing of it touches local memory any more. A dropped future
    /// lets it in no more; whoever has to know when that is awaits it instead, with a limit.
    pub async fn expect(&self, expect: Expect) -> Result<Moved, AgentError> {
        self.ask(|reply| Command::Expect { expect, reply }).await?
    }

    /// A lease, of whatever this agent's program says it is of: its ticket is for peers of ours that read it.
    pub async fn lend(&self) -> Result<Lease, AgentError> {
        let ticket = self.ask(|reply| Command::Lend { reply }).await??;
        Ok(Lease::new(self.clone(), ticket))
    }

    pub(crate) async fn end_lease(&self, ticket: Ticket) -> Result<(), AgentError> {
        self.ask(|reply| Command::EndLease { ticket, reply: Some(reply) }).await?
    }

    pub(crate) fn forget_lease(&self, ticket: Ticket) {
        // Without its thread there is no lease any more.
        let _gone = self.shared.commands.send(Command::EndLease { ticket, reply: None });
        self.shared.wake.wake();
    }

    /// Sends a notification that follows no transfer.
    pub async fn notify(&self, peer: &str, message: Bytes, within: Option<Duration>) -> Result<(), AgentError> {
        let peer = peer.to_owned();
        self.ask(|reply| Command::Notify { peer, message, within, reply }).await?.map(|_| ())
    }

    /// Closes every connection and ends the thread; what was said last gets a second to arrive, transfers under way fail then. Registered memory is free afterwards, unless UCX does not let go of it within five seconds: then
    /// a warning says so.
    pub async fn shutdown(&self) {
        let _ended = self.ask(|done| Command::Shutdown { done: Some(done), ending: Ending::begin() }).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, AgentError> {
        let (reply, answer) = oneshot::channel();
        self.shared.commands.send(command(reply)).map_err(|_| AgentError::Gone)?;
        self.shared.wake.wake();
        answer.await.map_err(|_| AgentError::Gone)
    }
}

impl Transfer {
    /// A read of pieces of the host's memory, without a notification.
    pub fn read(peer: &str, pool: PoolId, pieces: Vec<Piece>) -> Transfer {
        Transfer {
            peer: peer.to_owned(),
            operation: crate::Operation::Read,
            pool,
            memory: (crate::MemoryKind::Dram, 0),
            pieces,
            lease: None,
            notification: None,
            within: None,
        }
    }

    /// A read that succeeds only if the lease was good until the last byte was here.
    pub fn under(self, ticket: Ticket) -> Transfer {
        Transfer { lease: Some(ticket), ..self }
    }

    /// A write of pieces of the host's memory, without a notification.
    pub fn write(peer: &str, pool: PoolId, pieces: Vec<Piece>) -> Transfer {
        Transfer { operation: crate::Operation::Write, ..Transfer::read(peer, pool, pieces) }
    }

    /// With a notification once everything has moved.
    pub fn then_notify(self, message: impl Into<Bytes>) -> Transfer {
        Transfer { notification: Some(message.into()), ..self }
    }

    /// With a limit of its own.
    pub fn within(self, within: Duration) -> Transfer {
        Transfer { within: Some(within), ..self }
    }
}

/// What peers say, in the order in which it came. One for each agent.
#[derive(Debug)]
pub struct Notifications {
    queue: Arc<Queue>,
}

impl Notifications {
    /// The next one; `None` once the agent is shut down and everything was taken.
    pub async fn next(&mut self) -> Option<Notification> {
        std::future::poll_fn(|context| self.queue.poll(context.waker())).await
    }

    /// What is there now.
    pub fn try_next(&mut self) -> Option<Notification> {
        self.queue.lock().take()
    }
}

/// Bytes of notifications that wait to be taken.
const WAITING_BYTES_MAX: usize = 256 << 20;

/// Notifications that nobody has taken.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<Waiting>,
    max: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    waiting: VecDeque<Notification>,
    bytes: usize,
    ended: bool,
    waker: Option<Waker>,
}

impl Waiting {
    fn take(&mut self) -> Option<Notification> {
        let next = self.waiting.pop_front()?;
        self.bytes = self.bytes.saturating_sub(next.message.len());
        Some(next)
    }
}

impl Queue {
    fn new(max: usize) -> Queue {
        Queue { state: Mutex::default(), max }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when there is no room.
    pub(crate) fn push(&self, notification: Notification) -> bool {
        let mut state = self.lock();
        let bytes = state.bytes.saturating_add(notification.message.len());
        if state.waiting.len() >= self.max || bytes > WAITING_BYTES_MAX {
            return false;
        }
        state.bytes = bytes;
        state.waiting.push_back(notification);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        true
    }

    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    fn poll(&self, waker: &Waker) -> Poll<Option<Notification>> {
        let mut state = self.lock();
        if let Some(next) = state.take() {
            return Poll::Ready(Some(next));
        }
        if state.ended {
            return Poll::Ready(None);
        }
        state.waker = Some(waker.clone());
        Poll::Pending
    }
}
