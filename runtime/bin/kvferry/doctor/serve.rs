//! `doctor --serve`: a scheduler and a prefill rank, for whoever joins with a decode rank.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kvferry::{
    Event, GroupId, GroupView, Policy, Rank, RequestId, RequestSpec, Role, SchedulerNode, SchedulerTerms,
    ThreadOptions, WorkerConfig, WorkerNode,
};
use kvferry_doctor::{End, SysRoot};
use kvferry_synthetic::PrefillEngine;
use tokio::sync::mpsc;

use super::meeting::{self, BLOCKS, HANDOVERS, Meeting, PREFILL, SCHEDULER, TOKENS};
use super::questions;

/// Longest time that a handover to a verifying peer takes; whoever is gone by then gets no more.
const HANDOVER_WITHIN: Duration = Duration::from_secs(30);

/// Serves until it is ended, or for as long as it was told to.
pub(super) fn run(meeting: &Meeting, address: &str, root: &SysRoot) -> Result<(), String> {
    let address = meeting::address(address)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| format!("it has no runtime: {error}"))?;
    runtime.block_on(async {
        let own = meeting::end(root)?;
        let Some(within) = meeting.within() else { return serve(meeting, address, own).await };
        tokio::time::timeout(within, serve(meeting, address, own)).await.unwrap_or(Ok(()))
    })
}

async fn serve(meeting: &Meeting, address: SocketAddr, own: End) -> Result<(), String> {
    let secret = meeting.secret(address)?;
    let nics = meeting.nics(address.ip())?;
    let whom = Whom::default();
    let config = meeting::node(SCHEDULER, address, &secret);
    let scheduler = SchedulerNode::start(config, SchedulerTerms::default(), Box::new(whom.clone())).await;
    let scheduler = scheduler.map_err(|error| error.to_string())?;
    let bound = meeting::address(scheduler.address())?;
    let clock = UdpSocket::bind(bound).and_then(|socket| questions::answer(socket, own));
    // Known beforehand, so that it can be let through; any, where the first one is any, too.
    let second = SocketAddr::new(address.ip(), if address.port() == 0 { 0 } else { address.port().wrapping_add(1) });
    let geometry = meeting::geometry()?;
    let pool = meeting::pool(&geometry, &nics)?;
    let mut engine = PrefillEngine::new(meeting::engine(&geometry), pool.clone()).map_err(|error| error.to_string())?;
    let (scheduled, blocks) = ((SCHEDULER, bound.to_string()), vec![BLOCKS]);
    let rank = WorkerConfig::new(Role::Prefill, GroupId(0), Rank(0), geometry, blocks, scheduled);
    let node = meeting::node(PREFILL, second, &secret);
    let threads = ThreadOptions::for_nic_threads(nics.open.len());
    let worker = WorkerNode::start(node, rank, pool, nics.open, threads).await;
    let mut worker = worker.map_err(|error| error.to_string())?;
    let clock = clock.map_or_else(
        |error| format!("the clock over UDP does not: {error}"),
        |()| "UDP tells the clock and the EFA".into(),
    );
    say(&format!("serves at {bound} (rank at {}; {clock}); opened {}", worker.address(), nics.names.join(", ")))?;
    for left_out in &nics.left_out {
        say(&format!("left out: {left_out}"))?;
    }
    tokio::spawn(async move {
        meeting::work(&mut worker, &mut engine).await;
        while let Some(call) = worker.next_call().await {
            meeting::give(&worker, &mut engine, call);
            meeting::work(&mut worker, &mut engine).await;
        }
    });
    let events = scheduler.events().ok_or("its events are taken")?;
    give(&scheduler, events, &whom).await
}

/// Gives every decode group that comes what it came for, one after another.
async fn give(
    scheduler: &SchedulerNode,
    mut events: mpsc::UnboundedReceiver<Event>,
    whom: &Whom,
) -> Result<(), String> {
    let (mut groups, mut request) = (VecDeque::new(), 0);
    loop {
        let event = if groups.is_empty() { events.recv().await } else { events.try_recv().ok() };
        match event {
            Some(Event::GroupReady { group }) if group != GroupId(0) => groups.push_back(group),
            Some(Event::NodeLost { node, cause }) if node == SCHEDULER || node == PREFILL => {
                return Err(format!("its {node} has stopped: {cause}"));
            }
            Some(_) => {}
            None if groups.is_empty() => return Err("its scheduler has stopped".to_owned()),
            None => {
                let Some(group) = groups.pop_front() else { continue };
                whom.0.store(group.0, Ordering::Relaxed);
                let delivered = give_to(scheduler, &mut request).await;
                say(&format!("{group}: {delivered} of {HANDOVERS} handovers delivered"))?;
            }
        }
    }
}

async fn give_to(scheduler: &SchedulerNode, request: &mut u64) -> u32 {
    let mut delivered = 0;
    for _ in 0..HANDOVERS {
        *request += 1;
        let spec =
            RequestSpec { request: RequestId(*request), tokens: TOKENS, prefix: Arc::default(), prefix_tokens: 16 };
        let handover = scheduler.submit(spec).await;
        match tokio::time::timeout(HANDOVER_WITHIN, handover).await {
            Ok(Ok(finished)) if finished.outcome.is_delivered() => delivered += 1,
            // The peer knows why, or is gone.
            Ok(_) | Err(_) => break,
        }
    }
    delivered
}

fn say(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout();
    let said = writeln!(out, "kvferry doctor: {text}").and_then(|()| out.flush());
    said.map_err(|error| format!("what it does cannot be written: {error}"))
}

/// Gives everything to the group whose turn it is.
#[derive(Clone, Debug, Default)]
struct Whom(Arc<AtomicU32>);

impl Policy for Whom {
    fn prefill(&mut self, _: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        candidates.first().map(|view| view.group)
    }

    fn decode(&mut self, _: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        let whom = GroupId(self.0.load(Ordering::Relaxed));
        candidates.iter().map(|view| view.group).find(|group| *group == whom)
    }
}
