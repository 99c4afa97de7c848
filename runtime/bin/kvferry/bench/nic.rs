//! An opened device, and how either process waits for it.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvferry::transport::{self, SelectError, Transport};
use kvferry::{ThreadOptions, TransportKind};
use kvferry_core::Evidence;
use kvferry_cuda::CudaProvider;
use kvferry_transport::{Device, Event, Provider, Wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::error::BenchError;
use super::kv::Holds;
use super::{Deadline, Options};

/// Between polls of a transport that announces nothing.
const MUST_POLL: Duration = Duration::from_micros(50);
/// The two processes have one each.
const NIC_THREADS: usize = 2;

/// What launches of this process took their GPU.
static GPU_NANOSECONDS: AtomicU64 = AtomicU64::new(0);

/// Time of transfers on the GPU that this process has seen the end of; zero unless it is taken.
pub(crate) fn gpu_nanoseconds() -> u64 {
    GPU_NANOSECONDS.load(Ordering::Relaxed)
}

/// The GPU of that name, or the first usable one, with its launches timed. [`transport::select`] has found it before.
fn open_timed(name: Option<&str>, how: &transport::Options) -> Result<Box<dyn Transport>, BenchError> {
    let provider = CudaProvider::default().timed(&GPU_NANOSECONDS);
    let is_it = |device: &Device| name.map_or(device.unavailable.is_none(), |name| name == device.name);
    let device = provider.discover().into_iter().find(is_it);
    let gone = SelectError::NoDevice { kind: TransportKind::Cuda, reason: "it is gone".to_owned() };
    Ok(provider.open(&device.ok_or(gone)?, how)?)
}

/// A transport with the waiting of a NIC thread.
pub(crate) struct Nic {
    pub(crate) transport: Box<dyn Transport>,
    spin: Duration,
    worked: Instant,
    /// What was shown last of the path to the other process.
    pub(crate) evidence: Option<Evidence>,
}

impl Nic {
    pub(crate) fn open(options: &Options, kind: TransportKind, holds: Holds) -> Result<Nic, BenchError> {
        let defaults = transport::Options::default();
        let how = transport::Options {
            streams_per_peer: options.streams.unwrap_or(defaults.streams_per_peer),
            thread_blocks: options.thread_blocks.unwrap_or(defaults.thread_blocks),
            two_sided: options.two_sided,
            packed_below_bytes: options.packed_below,
            staged_chunk_bytes: options.staged_chunk.map_or(defaults.staged_chunk_bytes, |bytes| bytes as usize),
            staged_chunks: options.staged_chunks.unwrap_or(defaults.staged_chunks),
            ..defaults
        };
        let device = options.device_of(holds);
        let open = transport::select(kind, device.as_deref(), &how)?;
        let transport = if options.gpu_times { open_timed(device.as_deref(), &how)? } else { open()? };
        let spin = ThreadOptions::for_nic_threads(NIC_THREADS).spin;
        Ok(Nic { transport, spin, worked: Instant::now(), evidence: None })
    }

    /// Polls once; waits when there was nothing to do, at most to the deadline. Says whether `words` can be read, as far as it looked:
    /// it does so whenever it waits.
    pub(crate) fn turn(
        &mut self,
        words: BorrowedFd<'_>,
        deadline: Deadline,
        during: &'static str,
        events: &mut Vec<Event>,
    ) -> Result<bool, BenchError> {
        let before = events.len();
        self.transport.poll(events);
        if events.len() > before {
            let shown = |event: &Event| match event {
                Event::Shown { evidence, .. } => Some(Evidence::clone(evidence)),
                _ => None,
            };
            if let Some(evidence) = events.iter().skip(before).filter_map(shown).next_back() {
                self.evidence = Some(evidence);
            }
            self.worked = Instant::now();
            return Ok(false);
        }
        let wait = self.transport.arm();
        let left = deadline.left(during)?;
        let readable = match &wait {
            Wait::Busy => false,
            _ if self.worked.elapsed() < self.spin => {
                std::hint::spin_loop();
                return Ok(false);
            }
            Wait::MustPoll => wait_for(&mut [PollFd::from_borrowed_fd(words, PollFlags::IN)], left.min(MUST_POLL))?,
            Wait::Ready(fd) => {
                let mut fds = [PollFd::from_borrowed_fd(words, PollFlags::IN), PollFd::new(fd, PollFlags::IN)];
                wait_for(&mut fds, left)?
            }
        };
        self.worked = Instant::now();
        Ok(readable)
    }
}

/// Waits for any of them; says whether it was the first. A closed pipe counts: reading it says so.
pub(crate) fn wait_for(fds: &mut [PollFd<'_>], at_most: Duration) -> Result<bool, BenchError> {
    let timeout = Timespec { tv_sec: at_most.as_secs().cast_signed(), tv_nsec: at_most.subsec_nanos().into() };
    match poll(fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty())),
        Err(error) => Err(BenchError::Wait(error.into())),
    }
}
