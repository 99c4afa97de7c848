//! Opened devices, and how either process waits for them.

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

/// Transports, one for each rail, with the waiting of a NIC thread.
pub(crate) struct Nic {
    pub(crate) transports: Vec<Box<dyn Transport>>,
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
            standby_us: options.standby_us.unwrap_or(defaults.standby_us),
            two_sided: options.two_sided,
            packed_below_bytes: options.packed_below,
            staged_chunk_bytes: options.staged_chunk.map_or(defaults.staged_chunk_bytes, |bytes| bytes as usize),
            staged_chunks: options.staged_chunks.unwrap_or(defaults.staged_chunks),
            // Both sides alike: libfabric's shared memory wants that.
            device_memory: options.beside().is_some(),
            ..defaults
        };
        let mut transports = Vec::new();
        for device in options.devices_of(kind, holds)? {
            let open = transport::select(kind, device.as_deref(), &how)?;
            transports.push(if options.gpu_times { open_timed(device.as_deref(), &how)? } else { open()? });
        }
        let spin = ThreadOptions::for_nic_threads(NIC_THREADS).spin;
        Ok(Nic { transports, spin, worked: Instant::now(), evidence: None })
    }

    /// The names of its devices, separated by commas.
    pub(crate) fn devices(&self) -> String {
        let names: Vec<&str> = self.transports.iter().map(|transport| transport.info().device.as_str()).collect();
        names.join(",")
    }

    /// The native library of its first device.
    pub(crate) fn library(&self) -> Option<String> {
        self.transports.first().and_then(|transport| transport.info().library.clone())
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
        self.transports.iter_mut().for_each(|transport| transport.poll(events));
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
        let waits: Vec<Wait> = self.transports.iter_mut().map(|transport| transport.arm()).collect();
        let mut left = deadline.left(during)?;
        let readable = if waits.iter().any(|wait| matches!(wait, Wait::Busy)) {
            false
        } else if self.worked.elapsed() < self.spin {
            std::hint::spin_loop();
            return Ok(false);
        } else {
            let mut fds = vec![PollFd::from_borrowed_fd(words, PollFlags::IN)];
            for wait in &waits {
                match wait {
                    Wait::Ready(fd) => fds.push(PollFd::new(fd, PollFlags::IN)),
                    _ => left = left.min(MUST_POLL),
                }
            }
            wait_for(&mut fds, left)?
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
