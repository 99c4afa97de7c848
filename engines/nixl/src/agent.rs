//! The agent as programs hold it: calls become commands to its thread, answers come back as futures.

use std::collections::VecDeque;
use std::fmt;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_transport::Pool;
use tokio::sync::oneshot;

use crate::driver::{self, Command};
use crate::wake::Wake;
use crate::{AgentConfig, AgentError, Notification, Piece, Transfer};

/// An agent that NIXL agents take for one of theirs. Cheap to clone; its thread ends when the last clone is dropped or at [`Agent::shutdown`].
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
        let _ended = self.commands.send(Command::Shutdown { done: None });
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
}

/// What transfers by NIXL's protocol lack beside those between kvferry's own nodes.
pub const LACKS: [&str; 4] = [
    "no program: UCX is asked for every piece, neighbours merged",
    "no lease: nobody confirms that what was read was still the request's",
    "no fence: whoever has a key may write until the memory is deregistered, and a write that was given up may still land",
    "no authentication: any peer may claim any name",
];

/// What a peer is. With either, an [`Agent`] speaks NIXL's protocol, without what [`LACKS`] lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// A NIXL agent, which has no better way.
    Nixl,
    /// One of ours: what it said in [`AgentConfig::extension`], by which its node may be found.
    Kvferry(Bytes),
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
        let wake =
            Arc::new(Wake::new().map_err(|error| AgentError::Config(format!("no descriptor to wake it: {error}")))?);
        let queue = Arc::new(Queue::new(config.notifications_max));
        let (commands, inbox) = mpsc::channel();
        let (ready, started) = oneshot::channel();
        let (for_thread, into) = (wake.clone(), queue.clone());
        std::thread::Builder::new()
            .name("kvferry-nixl".to_owned())
            .spawn(move || driver::run(config, inbox, &for_thread, into, ready))
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

    /// Ends that. Transfers of this agent that use it go on to their end and keep it alive; peers must have been told before: what they still
    /// read or write afterwards fails or, where UCX emulates one-sided access, touches memory that may be somebody else's.
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

    /// Sends a notification that follows no transfer.
    pub async fn notify(&self, peer: &str, message: Bytes, within: Option<Duration>) -> Result<(), AgentError> {
        let peer = peer.to_owned();
        self.ask(|reply| Command::Notify { peer, message, within, reply }).await?.map(|_| ())
    }

    /// Closes every connection and ends the thread; what was said last gets a second to arrive, transfers under way fail then. Registered memory is free afterwards, unless UCX does not let go of it within five seconds: then
    /// a warning says so.
    pub async fn shutdown(&self) {
        let _ended = self.ask(|done| Command::Shutdown { done: Some(done) }).await;
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
            notification: None,
            within: None,
        }
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
