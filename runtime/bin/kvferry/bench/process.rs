//! The second process, as the first one sees it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::BenchError;
use super::words::{FromPeer, ToPeer, Words, WordsError};
use super::{Deadline, Options};

/// How long a process that fell silent may take to say why, or to end.
const GRACE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(2);

/// A running peer process. It is killed and reaped when this is dropped.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    child: Child,
    pub(crate) words: Words,
}

impl PeerProcess {
    /// Starts this program again, on the devices that were opened here.
    pub(crate) fn start(options: &Options, device: Option<&str>) -> Result<PeerProcess, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::Spawn)?;
        PeerProcess::run(PeerProcess::again(Command::new(program), options, device))
    }

    /// Starts NIXL's agent.
    pub(crate) fn nixl(options: &Options, python: &Path) -> Result<PeerProcess, BenchError> {
        let mut command = Command::new(python);
        let sizes = [options.layers, options.blocks, options.block_bytes].map(|size| size.to_string());
        command.args(["-c", include_str!("nixl_peer.py"), options.op.name()]).args(sizes);
        let default = |name: &str, value: &str| (std::env::var_os(name).is_none(), name.to_owned(), value.to_owned());
        let tls = options.tls.iter().map(|tls| default("UCX_TLS", tls));
        let devices = options.device.iter().map(|devices| default("UCX_NET_DEVICES", devices));
        // Its UCX logs to stdout by default, where it speaks to this process.
        let logs = [default("NIXL_LOG_LEVEL", "ERROR"), default("UCX_LOG_FILE", "stderr")];
        for (unset, name, value) in tls.chain(devices).chain(logs) {
            if unset {
                command.env(name, value);
            }
        }
        PeerProcess::run(command)
    }

    fn again(mut command: Command, options: &Options, device: Option<&str>) -> Command {
        command.args(["bench", "--peer", "--transport", options.transport.name(), "--op", options.op.name()]);
        let programs = ("--programs", options.programs.as_deref());
        for (name, text) in [("--device", device), ("--tls", options.tls.as_deref()), programs] {
            if let Some(text) = text {
                command.args([name, text]);
            }
        }
        let numbers = [
            ("--layers", u64::from(options.layers)),
            ("--blocks", u64::from(options.blocks)),
            ("--block-bytes", u64::from(options.block_bytes)),
            ("--deadline", options.deadline),
            ("--rails", u64::from(options.rails)),
        ];
        for (name, number) in numbers {
            command.arg(name).arg(number.to_string());
        }
        for (name, number) in [
            ("--from-gpu", options.from_gpu),
            ("--to-gpu", options.to_gpu),
            ("--thread-blocks", options.thread_blocks),
            ("--standby-us", options.standby_us),
            ("--staged-chunk", options.staged_chunk),
            ("--staged-chunks", options.staged_chunks),
        ] {
            if let Some(number) = number {
                command.arg(name).arg(number.to_string());
            }
        }
        if options.gpu_times {
            command.arg("--gpu-times");
        }
        if let Some(streams) = options.streams {
            command.arg("--streams").arg(streams.to_string());
        }
        if let Some(bytes) = options.packed_below {
            command.arg("--packed-below").arg(bytes.to_string());
        }
        if options.two_sided {
            command.arg("--two-sided");
        }
        command
    }

    fn run(mut command: Command) -> Result<PeerProcess, BenchError> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(BenchError::Spawn)?;
        let pipes = child.stdout.take().zip(child.stdin.take());
        let words =
            pipes.ok_or(WordsError::Closed).and_then(|(from, to)| Words::new(OwnedFd::from(from), OwnedFd::from(to)));
        match words {
            Ok(words) => Ok(PeerProcess { child, words }),
            Err(error) => {
                end(&mut child);
                Err(error.into())
            }
        }
    }

    /// Lets it go and waits for it.
    pub(crate) fn finish(mut self, deadline: Deadline) -> Result<(), BenchError> {
        self.words.say(&ToPeer::Leave, deadline)?;
        loop {
            if let Some(status) = self.child.try_wait().map_err(BenchError::Wait)? {
                return if status.success() { Ok(()) } else { Err(BenchError::PeerEnded { status }) };
            }
            deadline.left("the peer's end")?;
            std::thread::sleep(LOOK);
        }
    }

    /// What really happened, when the peer knows it; then it is over.
    pub(crate) fn explain(mut self, error: BenchError) -> BenchError {
        if !error.may_be_the_peer() {
            return error;
        }
        let until = Instant::now() + GRACE;
        while Instant::now() < until {
            match self.words.take() {
                Ok(Some(FromPeer::Failed { reason })) => return BenchError::PeerFailed(reason),
                Ok(Some(_)) => {}
                Ok(None) => {
                    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
                    // Only a nap: what there is to read is looked for either way.
                    let _woken = poll(&mut [PollFd::new(&self.words.readable(), PollFlags::IN)], Some(&timeout));
                }
                Err(_) => return self.ended_until(until).map_or(error, |status| BenchError::PeerEnded { status }),
            }
        }
        error
    }

    fn ended_until(&mut self, until: Instant) -> Option<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < until => std::thread::sleep(LOOK),
                Ok(None) | Err(_) => return None,
            }
        }
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // Both fail only for a child that has been reaped.
    let _killed = child.kill();
    let _reaped = child.wait();
}
