//! Why a bench did not end well.

use std::error::Error;
use std::process::ExitStatus;

use kvferry::nixl::AgentError;
use kvferry::transport::{AllocateError, OpenError, SelectError};
use kvferry::{GeometryError, PoolError};
use kvferry_core::PlanError;
use kvferry_transport::{BindError, ConnectError, ImportError, PostError, TransferError};
use thiserror::Error;

use super::words::WordsError;

/// Why a bench did not end well.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum BenchError {
    /// Streams are TCP's.
    #[error("--streams is for --transport tcp only; leave it out")]
    NoStreams,
    /// Launches are CUDA's.
    #[error("--thread-blocks, --standby-us and --gpu-times are for --transport cuda only; leave them out")]
    NoLaunches,
    /// Others do not reach GPUs.
    #[error("--from-gpu and --to-gpu are for --transport cuda, tcp, ucx and libfabric only; leave them out")]
    NoGpus,
    /// A GPU that is named is not there, or cannot be used.
    #[error("{option} {gpu}: {source}")]
    NoSuchGpu { option: &'static str, gpu: u32, source: SelectError },
    /// Stages are TCP's.
    #[error("--staged-chunk and --staged-chunks are for --transport tcp and ucx only; leave them out")]
    NoStages,
    /// The two-sided method is UCX's.
    #[error("--two-sided is for --transport ucx only; leave it out")]
    NoTwoSides,
    /// Others do not pack by choice.
    #[error("--packed-below is for --transport ucx and libfabric only; leave it out")]
    NoChoice,
    /// So are NIXL's.
    #[error("--tls, --nixl-python and --programs are for --transport nixl only; leave them out")]
    NoNixl,
    /// NIXL's protocol fails.
    #[error(transparent)]
    Nixl(#[from] AgentError),
    /// No thread or timer for futures.
    #[error("no runtime for futures: {0}")]
    Runtime(#[source] std::io::Error),
    /// So are rails, of networks.
    #[error("--rails is for transports that cross a network; leave it out with nixl and cuda")]
    NoRails,
    /// So is what pieces are compared with.
    #[error("--contiguous is for kvferry's transports; leave it out with nixl")]
    NoContiguous,
    /// Every rail is a device.
    #[error(
        "--rails {rails} needs so many devices, and there are {devices:?}; name them with --device, separated by commas"
    )]
    TooFewDevices { rails: u32, devices: String },
    /// There is no memory for a pool.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// A GPU cannot write or compare its blocks.
    #[error("the GPU cannot write or compare its blocks: {0}")]
    Gpu(String),
    #[error(transparent)]
    Select(#[from] SelectError),
    #[error("no request has this shape: {0}")]
    Geometry(#[from] GeometryError),
    #[error("no request has this shape: {0}")]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Post(#[from] PostError),
    /// It ended without success.
    #[error("the transfer failed: {0}")]
    Transfer(#[from] TransferError),
    /// A transfer said that it is done, and was not.
    #[error("the transport reports {moved} bytes moved where the request has {due}; this is a defect of the transport")]
    Short { moved: u64, due: u64 },
    /// The transport lost the other process.
    #[error("the connection to the peer process was lost: {0}")]
    PeerLost(String),
    /// The other process gave up, and said why.
    #[error("the peer process failed: {0}")]
    PeerFailed(String),
    /// The other process ended when it should not.
    #[error("the peer process ended early ({status}); its own message, if any, stands above")]
    PeerEnded { status: ExitStatus },
    #[error("the peer process cannot be started: {0}")]
    Spawn(#[source] std::io::Error),
    #[error("cannot wait for the transport: {0}")]
    Wait(#[source] std::io::Error),
    /// What the processes say to each other.
    #[error("the two processes cannot talk: {0}")]
    Words(#[from] WordsError),
    /// One said something at the wrong time.
    #[error("the other process said {said} during {during}; both must be the same build of kvferry")]
    Unexpected { said: String, during: &'static str },
    /// Time is up.
    #[error("not done after {seconds} s (during {during}); raise --deadline, or make the request smaller")]
    Late { seconds: u64, during: &'static str },
}

impl BenchError {
    /// Whether other options would have helped, and nothing was tried.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(
            self,
            BenchError::NoStreams
                | BenchError::NoLaunches
                | BenchError::NoGpus
                | BenchError::NoStages
                | BenchError::NoTwoSides
                | BenchError::NoChoice
                | BenchError::NoNixl
                | BenchError::NoRails
                | BenchError::NoContiguous
                | BenchError::TooFewDevices { .. }
                | BenchError::NoSuchGpu { source: SelectError::UnknownDevice { .. }, .. }
                | BenchError::Select(SelectError::UnknownDevice { .. })
                | BenchError::Geometry(_)
                | BenchError::Plan(_)
        )
    }

    /// Whether the other process may know better what happened.
    pub(crate) fn may_be_the_peer(&self) -> bool {
        matches!(
            self,
            BenchError::Transfer(_)
                | BenchError::PeerLost(_)
                | BenchError::Connect(_)
                | BenchError::Import(_)
                | BenchError::Post(_)
                | BenchError::Nixl(_)
                | BenchError::Words(_)
        )
    }
}

/// An error with its causes, each said once.
pub(crate) fn explain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
