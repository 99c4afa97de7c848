//! The scheduler: its node, and the requests that the parent submits to it. The same code in a process of its own and on a thread.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use kvferry::{
    Epoch, Event, Finished, GroupId, Handover, HandoverError, LeastLoaded, LongestHeldPrefix, NodeConfig, NodeError,
    NodeId, Policy, Refusal, RequestId, RequestSpec, SchedulerNode, SchedulerTerms, ServeError,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::options::PolicyName;
use crate::terms::Terms;
use crate::timeline::Course;
use crate::worker::{Census, Worker, record, serve_metrics};

/// Everything that the scheduler is told at its start: one line of JSON on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SchedulerConfig {
    pub(crate) epoch: Epoch,
    /// Where its control listener is: any port at first, afterwards the one that ranks know.
    pub(crate) listen: String,
    pub(crate) policy: PolicyName,
    /// The span that requests belong to, as a traceparent.
    pub(crate) traceparent: Option<String>,
    pub(crate) terms: Terms,
    /// Ranks that are lost are started again: requests wait for them.
    pub(crate) restart: bool,
    /// Where its metrics are served.
    pub(crate) metrics: Option<String>,
    /// Where its flight recorder writes; whether SIGUSR1 reaches it.
    pub(crate) recorder: Option<(PathBuf, bool)>,
    /// Whether it says when what happened to requests.
    pub(crate) timeline: bool,
}

/// What it is told later. The end of the orders means `Stop`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    Submit(RequestSpec),
    /// Say what you hold.
    Report,
    /// End.
    Stop,
}

/// What it says: one line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    /// It listens.
    Listening {
        address: String,
    },
    /// What happened, as far as the parent needs to know.
    GroupReady {
        group: GroupId,
    },
    Started,
    NodeLost {
        node: NodeId,
        cause: String,
    },
    /// It was asleep or cut off, and is to be started again.
    Away(String),
    /// A request is over.
    Finished {
        request: RequestId,
        end: Result<Finished, Refusal>,
    },
    /// Its metrics are served there.
    Serving(String),
    /// When what happened to a request.
    Course(Course),
    /// The answer to `Report`.
    Report {
        census: Census,
    },
    /// It cannot go on.
    Failed(String),
}

/// Why it cannot be or go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum SchedulerError {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Trace(#[from] kvferry::TraceError),
    #[error("its flight recorder cannot write to {}: {source}; name a folder that is there with --recorder", file.display())]
    Recorder { file: PathBuf, source: std::io::Error },
    #[error("it has no runtime: {0}")]
    Runtime(std::io::Error),
    #[error("its node has stopped: {0}")]
    NodeStopped(String),
}

/// What runs as `--scheduler-worker`.
pub(crate) struct SchedulerWorker;

impl Worker for SchedulerWorker {
    type Config = SchedulerConfig;
    type Order = Order;
    type Said = Said;
    type Error = SchedulerError;

    fn failed(reason: String) -> Said {
        Said::Failed(reason)
    }

    fn run(
        config: SchedulerConfig,
        orders: mpsc::UnboundedReceiver<Order>,
        say: &mut dyn FnMut(Said),
    ) -> Result<(), SchedulerError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(SchedulerError::Runtime)?;
        runtime.block_on(serve(config, orders, say))
    }
}

const SCHEDULER: NodeId = NodeId(0);

/// Longer than a rank takes to start on a busy machine and to open its devices.
const REGROUP_WITHIN: Duration = Duration::from_secs(20);

type Ended = (RequestId, Result<Finished, HandoverError>);

async fn serve(
    config: SchedulerConfig,
    mut orders: mpsc::UnboundedReceiver<Order>,
    say: &mut dyn FnMut(Said),
) -> Result<(), SchedulerError> {
    let mut node = NodeConfig::new(SCHEDULER, config.epoch);
    node.listen = config.listen;
    config.terms.apply(&mut node);
    let serving = config.metrics.as_deref().map(|address| serve_metrics(&mut node, address)).transpose()?;
    if let Some(serving) = &serving {
        say(Said::Serving(serving.address().to_string()));
    }
    if let Some((file, has_signals)) = &config.recorder {
        record(&mut node, file, *has_signals)
            .map_err(|source| SchedulerError::Recorder { file: file.clone(), source })?;
    }
    let regroup_within = if config.restart { REGROUP_WITHIN } else { Duration::ZERO };
    let terms = SchedulerTerms { leases: node.leases, regroup_within, ..SchedulerTerms::default() };
    let scheduler = SchedulerNode::start(node, terms, policy(config.policy)).await?;
    let (_keep, nothing) = mpsc::unbounded_channel();
    let mut events = scheduler.events().unwrap_or(nothing);
    say(Said::Listening { address: scheduler.address().to_owned() });
    let trace = config.traceparent.as_deref().map(str::parse).transpose()?;
    let mut handovers: JoinSet<Ended> = JoinSet::new();
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Submit(spec)) => {
                    let handover: Handover = scheduler.submit_traced(spec, trace).await;
                    handovers.spawn(ended(handover));
                }
                Some(Order::Report) => say(Said::Report { census: Census::take("") }),
                Some(Order::Stop) | None => break,
            },
            Some(event) = events.recv() => match event {
                Event::GroupReady { group } => say(Said::GroupReady { group }),
                Event::Started { .. } => say(Said::Started),
                Event::RequestEnded(course) if config.timeline => say(Said::Course(Course::Request(*course))),
                Event::WasAway(away) => {
                    say(Said::Away(away.to_string()));
                    return Ok(());
                }
                Event::NodeLost { node: SCHEDULER, cause } => return Err(SchedulerError::NodeStopped(cause)),
                Event::NodeLost { node, cause } => say(Said::NodeLost { node, cause }),
                event => tracing::debug!(?event),
            },
            Some(Ok((request, end))) = handovers.join_next() => match end {
                Ok(finished) => say(Said::Finished { request, end: Ok(finished) }),
                Err(HandoverError::Refused(refusal)) => say(Said::Finished { request, end: Err(refusal) }),
                Err(error) => return Err(SchedulerError::NodeStopped(error.to_string())),
            },
        }
    }
    scheduler.shutdown().await;
    Ok(())
}

fn ended(handover: Handover) -> Pin<Box<dyn Future<Output = Ended> + Send>> {
    Box::pin(async move { (handover.request(), handover.await) })
}

fn policy(name: PolicyName) -> Box<dyn Policy> {
    match name {
        PolicyName::LeastLoaded => Box::new(LeastLoaded),
        PolicyName::LongestPrefix => Box::new(LongestHeldPrefix::default()),
    }
}
