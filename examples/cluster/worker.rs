//! What a rank and the scheduler have in common: told everything by lines on the standard input, and saying lines on the standard output.

use std::collections::BTreeSet;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use kvferry::{Metrics, MetricsServer, NodeConfig, Recorder, RecorderOptions, ServeError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// A part of the cluster that runs in a process of its own or on a thread.
pub(crate) trait Worker: 'static {
    /// Told at the start.
    type Config: Serialize + DeserializeOwned + Send + 'static;
    /// Told later.
    type Order: Serialize + DeserializeOwned + Send + 'static;
    /// Said.
    type Said: Serialize + DeserializeOwned + Send + 'static;
    /// Why it cannot be or go on.
    type Error: std::error::Error;

    /// The words for the end of it.
    fn failed(reason: String) -> Self::Said;

    /// Serves until the orders end. Blocks its thread.
    fn run(
        config: Self::Config,
        orders: mpsc::UnboundedReceiver<Self::Order>,
        say: &mut dyn FnMut(Self::Said),
    ) -> Result<(), Self::Error>;
}

/// Runs it as this process.
pub(crate) fn process<W: Worker>() -> ExitCode {
    // A parent that was killed leaves nobody behind; one that ends otherwise closes the standard input.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let mut say = |said: W::Said| {
        let mut out = std::io::stdout().lock();
        let line = serde_json::to_string(&said).unwrap_or_default();
        // Nobody listens any more: the end of the orders follows.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    };
    let mut first = String::new();
    let config = match std::io::stdin().lock().read_line(&mut first) {
        Ok(_) => serde_json::from_str(&first).map_err(|error| format!("its configuration cannot be read: {error}")),
        Err(error) => Err(format!("its configuration cannot be read: {error}")),
    };
    let (order, orders) = mpsc::unbounded_channel();
    let reader = std::thread::Builder::new().name("orders".to_owned()).spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(given) = serde_json::from_str::<W::Order>(&line)
                && order.send(given).is_err()
            {
                return;
            }
        }
    });
    let ended = match reader {
        Ok(_) => config.and_then(|config| W::run(config, orders, &mut say).map_err(|error| error.to_string())),
        Err(error) => Err(format!("it has no thread for its orders: {error}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            say(W::failed(reason));
            ExitCode::FAILURE
        }
    }
}

/// Has a node watched by metrics that are served there.
pub(crate) fn serve_metrics(node: &mut NodeConfig, address: &str) -> Result<MetricsServer, ServeError> {
    let metrics = Metrics::new();
    node.watchers.push(Arc::new(metrics.clone()));
    MetricsServer::start(metrics, address)
}

/// Has a node watched by a flight recorder. SIGUSR1 makes it write, in a process of its own.
pub(crate) fn record(node: &mut NodeConfig, file: &Path, has_signals: bool) -> std::io::Result<()> {
    let recorder = Recorder::start(RecorderOptions::new(file))?;
    node.watchers.push(Arc::new(recorder.clone()));
    if has_signals {
        tokio::spawn(recorder.dump_at_sigusr1());
    }
    Ok(())
}

/// What the kernel shows of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Census {
    /// Open descriptors.
    pub(crate) descriptors: u64,
    /// Foreign pools in its address space, each as often as it is there in different incarnations; none with the right to write.
    pub(crate) mapped: Vec<String>,
}

impl Census {
    /// Of this process, whose own pool is called `own`.
    pub(crate) fn take(own: &str) -> Census {
        // Reading the directory is one descriptor more, always.
        let descriptors = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
        Census { descriptors, mapped: mapped_pools(own) }
    }
}

/// A mapping that could be written is never ours to have, so it is not listed.
fn mapped_pools(own: &str) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    // One region is one file; the kernel may show it in several pieces.
    let mut pools: BTreeSet<(String, String)> = BTreeSet::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (rights, inode) = (words.nth(1), words.nth(2));
        let name = line.split_once("memfd:").and_then(|(_, name)| name.split_whitespace().next());
        if let (Some(rights), Some(inode), Some(name)) = (rights, inode, name)
            && rights.starts_with("r--")
            && name.starts_with("kv-")
            && name != own
        {
            pools.insert((name.to_owned(), inode.to_owned()));
        }
    }
    pools.into_iter().map(|(name, _)| name).collect()
}
