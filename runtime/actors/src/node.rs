//! Nodes as a serving process holds them: handles that any thread may use, over actors on threads of their own.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Poller, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use actix::prelude::*;
use kvferry_core::protocol::{EngineCall, EngineEvent, Event, Finished, Policy, Refusal, RequestSpec, SchedulerTerms};
use kvferry_core::{HandoverId, NodeId, RequestId, Tables, TraceContext};
use kvferry_transport::Pool;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::assemble::{NodeConfig, NodeError, Surroundings, WorkerConfig, assemble_scheduler, assemble_worker};
use crate::scheduler::{CancelRequest, Scheduler, Submit};
use crate::seams::OpenNic;
use crate::shell::Observer;
use crate::spans::Spans;
use crate::threads::{NodeClock, ThreadOptions, environment, local_runtime};
use crate::watch::{Standing, Watch};
use crate::worker::Answer;

/// Requests that may be submitted and not finished at once.
const REQUESTS_MAX: usize = 65_536;
/// Events that are kept for whoever has not asked for them yet.
const EVENTS_KEPT_MAX: usize = 1024;

/// A scheduler's node.
pub struct SchedulerNode {
    scheduler: Addr<Scheduler>,
    address: String,
    events: EventTap,
    credits: Arc<Semaphore>,
    tickets: AtomicU64,
    thread: NodeThread,
}

impl SchedulerNode {
    /// Starts a scheduler on a thread of its own.
    pub async fn start(config: NodeConfig, terms: SchedulerTerms, policy: Box<dyn Policy>) -> Result<Self, NodeError> {
        let (parts, events, thread) = NodeThread::start(
            "kvferry-scheduler",
            config.watchers.clone(),
            config.identity.node,
            (ThreadOptions::default(), config.linger),
            move |around| async move {
                let (node, epoch) = (config.identity.node, config.identity.epoch);
                let parts = assemble_scheduler(&around, config, terms, policy)?;
                let actors = vec![parts.scheduler.clone().recipient()];
                let standing = Standing { node, epoch, role: None, scheduler: node, actors };
                Ok(((parts.scheduler, parts.address), standing, None))
            },
        )
        .await?;
        let (scheduler, address) = parts;
        Ok(SchedulerNode {
            scheduler,
            address,
            events,
            credits: Arc::new(Semaphore::new(REQUESTS_MAX)),
            tickets: AtomicU64::new(0),
            thread,
        })
    }

    /// The control address that workers are given.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What happens at the scheduler, from its start on; `None` the second time. Ask soon: what happens before is kept, but not for ever
    /// (1024 events). Afterwards everything is: keep reading.
    pub fn events(&self) -> Option<mpsc::UnboundedReceiver<Event>> {
        self.events.open()
    }

    /// Submits a request: a prefill group computes it, a decode group gets its KV. Waits for a credit, not for the handover.
    ///
    /// Dropping the returned [`Handover`] asks for cancellation; it frees nothing by itself.
    pub async fn submit(&self, spec: RequestSpec) -> Handover {
        self.submit_traced(spec, None).await
    }

    /// The same for a request that belongs to a span of a distributed trace, as its `traceparent` says ([`TraceContext`] is read from it): every node
    /// that works on it has `tracing` spans (target [`SPAN_TARGET`](crate::SPAN_TARGET)) below that one. Nodes of older builds do not learn of it.
    pub async fn submit_traced(&self, spec: RequestSpec, trace: Option<TraceContext>) -> Handover {
        let permit = Arc::clone(&self.credits).acquire_owned().await.ok();
        let (answer, finished) = oneshot::channel();
        let request = spec.request;
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        self.scheduler.do_send(Submit { spec, trace, ticket, answer });
        Handover { request, ticket, finished, scheduler: Some(self.scheduler.clone()), _permit: permit }
    }

    /// Stops the node and waits for its threads: afterwards nothing of it touches any memory.
    pub async fn shutdown(self) {
        self.thread.shutdown().await;
    }
}

/// A submitted request: resolves once it is finished.
#[must_use = "dropping a handover cancels it"]
pub struct Handover {
    request: RequestId,
    ticket: u64,
    finished: oneshot::Receiver<Result<Finished, Refusal>>,
    scheduler: Option<Addr<Scheduler>>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Why a handover has no outcome.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// The scheduler did not take it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The scheduler is gone.
    #[error("the scheduler of {0} is gone; what became of it is unknown")]
    SchedulerGone(RequestId),
}

impl Handover {
    /// Which request.
    pub fn request(&self) -> RequestId {
        self.request
    }
}

impl Future for Handover {
    type Output = Result<Finished, HandoverError>;

    fn poll(mut self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<Self::Output> {
        let Poll::Ready(answer) = Pin::new(&mut self.finished).poll(poller) else { return Poll::Pending };
        self.scheduler = None;
        Poll::Ready(match answer {
            Ok(Ok(finished)) => Ok(finished),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(HandoverError::SchedulerGone(self.request)),
        })
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        if let Some(scheduler) = &self.scheduler {
            scheduler.do_send(CancelRequest { request: self.request, ticket: self.ticket });
        }
    }
}

/// A prefill or decode rank's node.
pub struct WorkerNode {
    calls: mpsc::UnboundedReceiver<EngineCall>,
    port: EnginePort,
    address: String,
    events: EventTap,
    thread: NodeThread,
}

impl WorkerNode {
    /// Starts a rank: control actors on one thread, each NIC on another. `pool` must be laid out as
    /// [`Shard::layout`](kvferry_core::Shard::layout) says for this rank.
    pub async fn start(
        config: NodeConfig,
        worker: WorkerConfig,
        pool: Pool,
        nics: Vec<OpenNic>,
        threads: ThreadOptions,
    ) -> Result<Self, NodeError> {
        let name = format!("kvferry-{}-{}", worker.role, worker.rank.0);
        let node = config.identity.node;
        let (watchers, epoch) = (config.watchers.clone(), config.identity.epoch);
        let threads = (threads, config.linger);
        let (role, scheduler) = (Some(worker.role), worker.scheduler.0);
        let (parts, events, thread) = NodeThread::start(&name, watchers, node, threads, move |around| async move {
            let parts = assemble_worker(&around, config, worker, pool, nics).await?;
            let standing = Standing { node, epoch, role, scheduler, actors: parts.inspect };
            Ok(((parts.calls, parts.answers, parts.address), standing, Some(parts.keep)))
        })
        .await?;
        let (calls, answers, address) = parts;
        Ok(WorkerNode { calls, port: EnginePort { answers }, address, events, thread })
    }

    /// The control address that peers dial.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What happens at this rank, as [`SchedulerNode::events`] has it.
    pub fn events(&self) -> Option<mpsc::UnboundedReceiver<Event>> {
        self.events.open()
    }

    /// The next thing that the serving engine must do; `None` after the node has stopped and nothing of it touches the pool any more.
    pub async fn next_call(&mut self) -> Option<EngineCall> {
        self.calls.recv().await
    }

    /// The next thing, if there is one already.
    pub fn try_next_call(&mut self) -> Option<EngineCall> {
        self.calls.try_recv().ok()
    }

    /// Where the engine answers; cheap to clone, from any thread.
    pub fn port(&self) -> EnginePort {
        self.port.clone()
    }

    /// Stops the node and waits for its threads: afterwards nothing of it touches any memory. Dropping the node does the same, and blocks
    /// its thread meanwhile.
    pub async fn shutdown(self) {
        self.thread.shutdown().await;
    }
}

/// The engine's way back to its worker.
#[derive(Clone)]
pub struct EnginePort {
    answers: Recipient<Answer>,
}

impl EnginePort {
    /// Tells the worker anything that an engine can say. A worker that is gone does not hear it.
    pub fn tell(&self, event: EngineEvent) {
        self.answers.do_send(Answer(event));
    }

    /// Prefill: blocks are allocated; layers become ready in these steps (model-layer ends, the last is the layer count).
    pub fn opened(&self, request: RequestId, tables: Tables, steps: Vec<u32>) {
        self.tell(EngineEvent::Opened { request, tables, steps });
    }

    /// Prefill: the first `steps` steps are computed.
    pub fn ready(&self, request: RequestId, steps: u32) {
        self.tell(EngineEvent::Ready { request, steps });
    }

    /// Prefill: this rank is to leave. Its group takes no work from now on; once nothing is offered any more, or after so long, there is
    /// [`EngineCall::Drained`]. It ends with the incarnation: the next one has to be told again. A decode rank drains nothing, and answers at once
    /// with the fetches that are under way.
    pub fn drain(&self, within: Duration) {
        self.tell(EngineEvent::Drain { within });
    }

    /// Prefill: a release was taken.
    pub fn released(&self, request: RequestId) {
        self.tell(EngineEvent::Released { request });
    }

    /// Decode: here are blocks, of which those of the first `have` tokens hold their KV already.
    pub fn placed(&self, handover: HandoverId, tables: Tables, have: u64) {
        self.tell(EngineEvent::Placed { handover, tables, have });
    }

    /// Decode: the blocks of a delivered handover are free again.
    pub fn freed(&self, handover: HandoverId) {
        self.tell(EngineEvent::Freed { handover });
    }
}

/// Where a node's events go, once somebody wants them.
#[derive(Clone)]
struct EventTap(Arc<Mutex<Tap>>);

enum Tap {
    /// Nobody has asked yet: others may have joined before whoever starts a node gets to it.
    Early { kept: mpsc::UnboundedReceiver<Event>, sender: mpsc::UnboundedSender<Event> },
    /// Somebody has.
    Open(mpsc::UnboundedSender<Event>),
    /// Nobody did while the first events were kept.
    Unasked,
}

impl EventTap {
    fn new() -> EventTap {
        let (sender, kept) = mpsc::unbounded_channel();
        EventTap(Arc::new(Mutex::new(Tap::Early { kept, sender })))
    }

    fn open(&self) -> Option<mpsc::UnboundedReceiver<Event>> {
        let mut tap = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *tap, Tap::Unasked) {
            Tap::Early { kept, sender } => {
                *tap = Tap::Open(sender);
                Some(kept)
            }
            Tap::Open(sender) => {
                *tap = Tap::Open(sender);
                None
            }
            Tap::Unasked => {
                let (sender, events) = mpsc::unbounded_channel();
                *tap = Tap::Open(sender);
                Some(events)
            }
        }
    }

    fn pass(&self, event: Event) {
        let mut tap = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*tap {
            Tap::Early { kept, .. } if kept.len() >= EVENTS_KEPT_MAX => *tap = Tap::Unasked,
            // Whoever has stopped reading does not want it.
            Tap::Early { sender, .. } | Tap::Open(sender) => drop(sender.send(event)),
            Tap::Unasked => {}
        }
    }
}

/// The control thread of a node.
struct NodeThread {
    stop: Option<oneshot::Sender<()>>,
    ended: oneshot::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl NodeThread {
    /// Runs `assemble` on a new thread with a local runtime of its own, which then serves until it is told to stop, or its
    /// incarnation is over.
    async fn start<T, A, F>(
        name: &str,
        watchers: Vec<Arc<dyn Watch>>,
        node: NodeId,
        (threads, linger): (ThreadOptions, Duration),
        assemble: A,
    ) -> Result<(T, EventTap, Self), NodeError>
    where
        T: Send + 'static,
        A: FnOnce(Surroundings) -> F + Send + 'static,
        F: Future<Output = Result<(T, Standing, Option<mpsc::UnboundedSender<EngineCall>>), NodeError>>,
    {
        let events = EventTap::new();
        let tap = events.clone();
        let (started, assembled) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let body = move || {
            let (nic_failed, mut nic_failures) = mpsc::unbounded_channel();
            let clock = NodeClock::new(linger);
            let (environment, nic_threads) = environment(threads, clock.clone(), !watchers.is_empty(), nic_failed);
            let watching = watchers.clone();
            let runtime = match local_runtime() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = started.send(Err(NodeError::Thread(format!("has no runtime: {error}"))));
                    return;
                }
            };
            let keep = runtime.block_on(async move {
                tokio::task::spawn_local(clock.linger());
                let over = Rc::new(tokio::sync::Notify::new());
                let seen = watching.clone();
                let spans = Spans::new(node);
                let observer: Observer = Rc::new(move |event| {
                    spans.happened(&event);
                    seen.iter().for_each(|watcher| watcher.happened(&event));
                    tap.pass(event);
                });
                let around = Surroundings {
                    environment,
                    observer: Rc::clone(&observer),
                    on_end: {
                        let over = Rc::clone(&over);
                        Rc::new(move |_| over.notify_one())
                    },
                };
                let keep = match assemble(around).await {
                    Ok((parts, standing, keep)) => {
                        watching.iter().for_each(|watcher| watcher.stands(&standing));
                        started.send(Ok(parts)).is_ok().then_some(keep)?
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return None;
                    }
                };
                tokio::select! {
                    biased;
                    _ = stopped => {}
                    () = over.notified() => {}
                    Some(nic) = nic_failures.recv() => {
                        tracing::error!(nic, "a NIC thread panicked; its node's incarnation ends");
                        observer(Event::NodeLost { node, cause: format!("the thread of its NIC {nic} panicked") });
                    }
                }
                keep
            });
            // Dropping the runtime closes every session: peers see this incarnation end.
            drop(runtime);
            // Until its NICs have stopped, a transfer may still touch the pool.
            nic_threads.join();
            watchers.iter().for_each(|watcher| watcher.ended());
            // Only now does the engine see the end of its calls.
            drop(keep);
            let _ = end.send(());
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .map_err(|error| NodeError::Thread(format!("did not start: {error}")))?;
        let parts =
            assembled.await.unwrap_or_else(|_| Err(NodeError::Thread("ended before the node stood".to_owned())))?;
        Ok((parts, events, NodeThread { stop: Some(stop), ended, thread: Some(thread) }))
    }

    async fn shutdown(mut self) {
        if let Some(stop) = self.stop.take() {
            // A thread that has ended already needs no word.
            let _ = stop.send(());
        }
        let _ = (&mut self.ended).await;
    }
}

impl Drop for NodeThread {
    fn drop(&mut self) {
        // Whoever has asked it to end waits as long as it likes.
        if let Some(stop) = self.stop.take() {
            drop(stop);
            // An engine that panics drops its node without asking. Nothing may touch its pool after that either: the next incarnation's
            // blocks lie there.
            if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
                tracing::error!("a node's thread panicked");
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    fn pass(tap: &EventTap, from: u64, to: u64) {
        (from..to).for_each(|request| tap.pass(Event::Freed { request: RequestId(request) }));
    }

    fn first(events: &mut mpsc::UnboundedReceiver<Event>) -> Event {
        events.try_recv().unwrap()
    }

    #[test]
    fn the_first_events_wait_for_whoever_asks() {
        let tap = EventTap::new();
        pass(&tap, 0, EVENTS_KEPT_MAX as u64);
        let mut events = tap.open().unwrap();
        assert!(tap.open().is_none());
        assert_eq!(first(&mut events), Event::Freed { request: RequestId(0) });
        // Whoever reads gets all from then on.
        pass(&tap, 0, 2 * EVENTS_KEPT_MAX as u64);
        assert_eq!(events.len(), 3 * EVENTS_KEPT_MAX - 1);
    }

    #[test]
    fn nothing_is_kept_for_ever_for_nobody() {
        let tap = EventTap::new();
        pass(&tap, 0, EVENTS_KEPT_MAX as u64 + 1);
        let mut events = tap.open().unwrap();
        assert!(events.try_recv().is_err());
        pass(&tap, 7, 8);
        assert_eq!(first(&mut events), Event::Freed { request: RequestId(7) });
        assert!(tap.open().is_none());
    }
}
