//! kvferry's actors: thin actix shells around [`kvferry_core::protocol`], on four seams.

mod assemble;
mod group_leader;
mod mesh;
mod nic;
mod node;
mod paths;
mod peer_session;
mod router;
mod scheduler;
mod seams;
mod shell;
mod spans;
mod strangers;
mod supervise;
mod tcp_link;
mod threads;
mod watch;
mod worker;

pub use assemble::{
    NodeConfig, NodeError, SESSIONS_EAGER_MAX, SchedulerParts, Surroundings, WorkerConfig, WorkerParts,
    assemble_scheduler, assemble_worker,
};
pub use nic::{Nic, NicActor, NicOpened, NicReport, NicRequest, NicStartError};
pub use node::{EnginePort, Handover, HandoverError, SchedulerNode, WorkerNode};
pub use scheduler::{CancelRequest, Scheduler, Submit};
pub use seams::{Clock, Environment, Host, Link, LinkInput, LinkUp, ListenError, Network, NicPort, OpenNic, Tick};
pub use shell::{Inspect, Observer};
pub use spans::SPAN_TARGET;
pub use supervise::OnEnd;
pub use threads::{MonotonicClock, NicThreads, NodeClock, ThreadOptions, environment, local_runtime};
pub use watch::{Standing, Watch};
pub use worker::Answer;
