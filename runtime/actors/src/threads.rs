//! The production host: threads with tokio's `LocalRuntime`, one per node and one per NIC.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "the production side of the seams")]

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::prelude::*;
use kvferry_core::Moment;
use kvferry_transport::{Pool, Wait};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::nic::{Nic, NicActor, NicOpened, NicReport, NicStartError};
use crate::seams::{Clock, Environment, Host, OpenNic, Tick};
use crate::supervise::{self, OnEnd};
use crate::tcp_link::TcpNetwork;

/// How NIC threads use their processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadOptions {
    /// How long a NIC thread polls on after work before it sleeps. Wake-ups cost more than short waits, but only with cores to spare.
    pub spin: Duration,
}

impl Default for ThreadOptions {
    fn default() -> Self {
        ThreadOptions { spin: Duration::from_micros(20) }
    }
}

impl ThreadOptions {
    /// The default for a host on which `nic_threads` run: no spinning when they exceed half the cores.
    pub fn for_nic_threads(nic_threads: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if nic_threads * 2 > cores { ThreadOptions { spin: Duration::ZERO } } else { ThreadOptions::default() }
    }
}

/// The NIC threads of one node.
#[derive(Clone, Default)]
pub struct NicThreads(Rc<RefCell<Vec<JoinHandle<()>>>>);

impl NicThreads {
    /// Waits until all have ended, as they do soon after the last port to them is dropped.
    pub fn join(self) {
        for thread in self.0.take() {
            if thread.join().is_err() {
                tracing::error!("a NIC thread panicked");
            }
        }
    }
}

/// The seams of a production node, for the thread that calls, and the NIC threads that will be started through them.
///
/// `failed` is told the number of a NIC whose thread panicked.
pub fn environment(
    options: ThreadOptions,
    clock: NodeClock,
    timed: bool,
    failed: mpsc::UnboundedSender<usize>,
) -> (Environment, NicThreads) {
    let threads = NicThreads::default();
    let host = Rc::new(Threads { options, timed, threads: threads.clone(), failed });
    let environment = Environment {
        clock: Rc::new(clock),
        network: Rc::new(TcpNetwork),
        host,
        nonce: Rc::new(|| {
            let mut nonce = [0; 16];
            // Without the system's randomness there is no safe session; a zero nonce only weakens replay protection between restarts.
            if let Err(error) = getrandom::fill(&mut nonce) {
                tracing::error!(%error, "the system gives no random bytes");
            }
            nonce
        }),
    };
    (environment, threads)
}

/// A runtime for one thread of a node.
pub fn local_runtime() -> std::io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_all().build_local(LocalOptions::default())
}

/// `CLOCK_MONOTONIC`: processes of one host can compare it.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl MonotonicClock {
    /// Now.
    pub fn moment() -> Moment {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Moment(u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
    }
}

/// A node's clock, and when its thread had something to do last.
#[derive(Clone)]
pub struct NodeClock {
    linger: Duration,
    stirred: Rc<(Cell<Instant>, Notify)>,
}

impl NodeClock {
    /// For a node whose thread is to poll on for so long after every input.
    pub fn new(linger: Duration) -> NodeClock {
        NodeClock { linger, stirred: Rc::new((Cell::new(Instant::now()), Notify::new())) }
    }

    /// Keeps the thread from sleeping as long as it is to. Never ends, unless it is not to at all.
    pub async fn linger(self) {
        let (at, stirred) = &*self.stirred;
        while !self.linger.is_zero() {
            stirred.notified().await;
            while at.get().elapsed() < self.linger {
                tokio::task::yield_now().await;
            }
        }
    }
}

impl Clock for NodeClock {
    fn now(&self) -> Moment {
        MonotonicClock::moment()
    }

    fn wake(&self, at: Moment, to: Recipient<Tick>) {
        let wait = at.since(self.now());
        tokio::task::spawn_local(async move {
            tokio::time::sleep(wait).await;
            to.do_send(Tick);
        });
    }

    fn stir(&self) {
        if !self.linger.is_zero() {
            self.stirred.0.set(Instant::now());
            self.stirred.1.notify_one();
        }
    }
}

struct Threads {
    options: ThreadOptions,
    /// Whether NICs tell how long they take to take transfers.
    timed: bool,
    threads: NicThreads,
    failed: mpsc::UnboundedSender<usize>,
}

/// Tells of a panic while its thread unwinds.
struct Sentinel {
    nic: usize,
    failed: mpsc::UnboundedSender<usize>,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A node that has ended needs no word.
            let _ = self.failed.send(self.nic);
        }
    }
}

impl Host for Threads {
    fn start_nic(
        &self,
        nic: usize,
        open: OpenNic,
        pool: Pool,
        opened: oneshot::Sender<Result<NicOpened, NicStartError>>,
        reports: Recipient<NicReport>,
    ) {
        let (spin, timed) = (self.options.spin, self.timed);
        let (index, failed) = (nic, self.failed.clone());
        let sentinel = Sentinel { nic, failed: failed.clone() };
        let body = move || {
            let _sentinel = sentinel;
            let runtime = match local_runtime() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = opened.send(Err(NicStartError::Thread(error)));
                    return;
                }
            };
            runtime.block_on(async move {
                let clock = Rc::new(MonotonicClock::moment);
                let started = open()
                    .map_err(NicStartError::from)
                    .and_then(|transport| Nic::new(nic, transport, &pool, reports, clock));
                // Whoever started this has gone if it does not take the answer; then there is nothing to drive.
                match started {
                    Ok((nic, advert)) => {
                        let nic = if timed { nic.timed() } else { nic };
                        let (nic, wake) = (Rc::new(RefCell::new(nic)), Rc::new(Notify::new()));
                        // A panic in the actor must end the thread, not only its task.
                        let panicked = Rc::new(Cell::new(false));
                        let on_end: OnEnd = {
                            let panicked = Rc::clone(&panicked);
                            Rc::new(move |_| panicked.set(true))
                        };
                        let actor = NicActor::new(Rc::clone(&nic), Rc::clone(&wake));
                        let port = supervise::start("NIC", &on_end, actix::Context::new(), actor);
                        let alive = port.downgrade();
                        if opened.send(Ok(NicOpened { advert, port: port.recipient() })).is_ok() {
                            drive(&nic, &wake, spin, || alive.upgrade().is_some() && !panicked.get()).await;
                            if panicked.get() {
                                let _ = failed.send(index);
                            }
                        }
                    }
                    Err(error) => {
                        let _ = opened.send(Err(error));
                    }
                }
            });
        };
        let thread = std::thread::Builder::new().name(format!("kvferry-nic-{nic}"));
        match thread.spawn(body) {
            Ok(thread) => self.threads.0.borrow_mut().push(thread),
            Err(error) => tracing::error!(%error, nic, "a NIC thread did not start"),
        }
    }
}

/// Pumps a NIC for as long as somebody can command it.
async fn drive(nic: &Rc<RefCell<Nic>>, wake: &Rc<Notify>, spin: Duration, alive: impl Fn() -> bool) {
    /// Somebody who stopped commanding is noticed this often.
    const LIVENESS: Duration = Duration::from_millis(200);
    /// Between polls of a transport that announces nothing.
    const MUST_POLL: Duration = Duration::from_micros(50);
    /// A busy transport is polled so long before whoever commands it has a turn.
    const BUSY: Duration = Duration::from_micros(10);
    let mut ready: Option<AsyncFd<Arc<OwnedFd>>> = None;
    let mut worked = Instant::now();
    while alive() {
        if nic.borrow_mut().pump() {
            worked = Instant::now();
            tokio::task::yield_now().await;
            continue;
        }
        let mut wait = nic.borrow_mut().arm();
        match wait {
            Wait::Busy => {
                // A yield asks the kernel for news, which takes longer than a poll that finds nothing.
                let since = Instant::now();
                while since.elapsed() < BUSY && matches!(wait, Wait::Busy) {
                    if nic.borrow_mut().pump() {
                        worked = Instant::now();
                        break;
                    }
                    wait = nic.borrow_mut().arm();
                }
                tokio::task::yield_now().await;
            }
            _ if worked.elapsed() < spin => tokio::task::yield_now().await,
            Wait::MustPoll => {
                let _ = tokio::time::timeout(MUST_POLL, wake.notified()).await;
            }
            Wait::Ready(fd) => {
                if ready.as_ref().is_none_or(|ready| !Arc::ptr_eq(ready.get_ref(), &fd)) {
                    ready = watch(fd);
                }
                let Some(ready) = &ready else {
                    let _ = tokio::time::timeout(MUST_POLL, wake.notified()).await;
                    continue;
                };
                // tokio waits for edges; what is readable already gives none.
                if is_readable(ready) {
                    tokio::task::yield_now().await;
                    continue;
                }
                let due = nic.borrow().due().map(|due| due.since(MonotonicClock::moment()));
                let idle = due.map_or(LIVENESS, |due| due.min(LIVENESS));
                tokio::select! {
                    biased;
                    () = wake.notified() => {}
                    guard = ready.readable() => {
                        if let Ok(mut guard) = guard {
                            // Level-triggered underneath: the transport's own epoll stays readable while there is more.
                            guard.clear_ready();
                        }
                    }
                    () = tokio::time::sleep(idle) => {}
                }
            }
        }
    }
}

// The replacement is unsafe for the sake of types whose descriptor may change; that of an `OwnedFd` cannot.
#[expect(deprecated, reason = "safe for a shared, owned descriptor")]
fn watch(fd: Arc<OwnedFd>) -> Option<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
        .map_err(|error| tracing::error!(%error, "a NIC's descriptor cannot be waited for; it is polled"))
        .ok()
}

fn is_readable(fd: &AsyncFd<Arc<OwnedFd>>) -> bool {
    let mut fds = [PollFd::new(fd.get_ref(), PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake, Waker};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_thread_polls_on_after_an_input_and_not_before() {
        let clock = NodeClock::new(Duration::from_secs(3600));
        let woken = Arc::new(Woken::default());
        let (waker, count) = (Waker::from(Arc::clone(&woken)), || woken.0.load(Ordering::Relaxed));
        let mut context = Context::from_waker(&waker);
        let mut linger = pin!(clock.clone().linger());
        assert!(linger.as_mut().poll(&mut context).is_pending());
        assert_eq!(count(), 0, "nothing has come yet");
        clock.stir();
        assert_eq!(count(), 1);
        for turn in 2..5 {
            assert!(linger.as_mut().poll(&mut context).is_pending());
            assert_eq!(count(), turn, "it wants another turn at once");
        }
    }

    #[test]
    fn without_time_to_linger_nothing_is_polled() {
        let clock = NodeClock::new(Duration::ZERO);
        clock.stir();
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(clock.linger()).poll(&mut context).is_ready());
    }
}
