//! Starts ranks, as processes or threads, and speaks with them.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::options::RANK_WORKER;
use crate::rank::{self, Order, RankConfig, Said};

/// Why a rank did not start.
#[derive(Debug, Error)]
#[error("{name} did not start: {reason}; check the limits on processes and memory of this machine, or use fewer ranks")]
pub(crate) struct LaunchError {
    name: String,
    reason: String,
}

/// What comes from a rank.
#[derive(Debug)]
pub(crate) enum FromRank {
    Said(Said),
    /// It says no more.
    Ended,
}

/// Where what ranks say is collected, with their index.
pub(crate) type Inbox = mpsc::UnboundedSender<(usize, FromRank)>;

/// A rank that was started.
pub(crate) struct Launched {
    way: Way,
}

enum Way {
    Process { child: Child, orders: Option<ChildStdin> },
    Thread { orders: mpsc::UnboundedSender<Order> },
}

impl Launched {
    /// Starts a rank in a process of its own.
    pub(crate) fn process(index: usize, config: &RankConfig, inbox: Inbox) -> Result<Launched, LaunchError> {
        let wrong = |reason: String| LaunchError { name: config.name(), reason };
        let program = std::env::current_exe().map_err(|error| wrong(error.to_string()))?;
        let mut command = Command::new(program);
        command.arg(RANK_WORKER).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| wrong(error.to_string()))?;
        let (orders, said) = (child.stdin.take(), child.stdout.take());
        let mut launched = Launched { way: Way::Process { child, orders } };
        let reader = std::thread::Builder::new().name(format!("from-{}", config.name())).spawn(move || {
            for line in said.into_iter().flat_map(|said| BufReader::new(said).lines()).map_while(Result::ok) {
                if let Ok(said) = serde_json::from_str(&line)
                    && inbox.send((index, FromRank::Said(said))).is_err()
                {
                    return;
                }
            }
            // Whoever collects may be done.
            let _ = inbox.send((index, FromRank::Ended));
        });
        let line = serde_json::to_string(config).map_err(|error| wrong(error.to_string()));
        let told = line.and_then(|line| launched.write(&line).map_err(|error| wrong(error.to_string())));
        match (reader, told) {
            (Ok(_), Ok(())) => Ok(launched),
            (Err(error), _) => {
                launched.kill();
                Err(wrong(error.to_string()))
            }
            (_, Err(error)) => {
                launched.kill();
                Err(error)
            }
        }
    }

    /// Starts a rank on a thread of this process.
    pub(crate) fn thread(index: usize, config: RankConfig, inbox: Inbox) -> Result<Launched, LaunchError> {
        let name = config.name();
        let (orders, given) = mpsc::unbounded_channel();
        let body = move || {
            // Whoever collects may be done.
            let mut say = |said| drop(inbox.send((index, FromRank::Said(said))));
            if let Err(error) = rank::run(config, given, &mut say) {
                say(Said::Failed(error.to_string()));
            }
            let _ = inbox.send((index, FromRank::Ended));
        };
        let spawned = std::thread::Builder::new().name(format!("rank-{name}")).spawn(body);
        spawned.map_err(|error| LaunchError { name, reason: error.to_string() })?;
        Ok(Launched { way: Way::Thread { orders } })
    }

    /// Tells it something. A rank that is gone does not hear it; its end is reported by itself.
    pub(crate) fn tell(&mut self, order: Order) {
        match &self.way {
            Way::Process { .. } => {
                if let Ok(line) = serde_json::to_string(&order) {
                    let _ = self.write(&line);
                }
            }
            Way::Thread { orders } => drop(orders.send(order)),
        }
    }

    fn write(&mut self, line: &str) -> std::io::Result<()> {
        match &mut self.way {
            Way::Process { orders: Some(orders), .. } => writeln!(orders, "{line}").and_then(|()| orders.flush()),
            _ => Ok(()),
        }
    }

    /// SIGSTOP. Threads cannot be stopped; options that would are refused.
    pub(crate) fn stop(&mut self) {
        if let Way::Process { child, .. } = &mut self.way
            && matches!(child.try_wait(), Ok(None))
        {
            // Nobody has waited for it, so the number is still its own.
            let _ = kill_process(Pid::from_child(child), Signal::STOP);
        }
    }

    /// SIGKILL, and waits for the end: after this nothing of it can touch memory. Nothing for a thread.
    pub(crate) fn kill(&mut self) {
        if let Way::Process { child, orders } = &mut self.way {
            *orders = None;
            // A rank that has ended by itself cannot be killed again.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// How its process ended, if it has.
    pub(crate) fn ending(&mut self) -> String {
        match &mut self.way {
            Way::Process { child, .. } => {
                child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
            }
            Way::Thread { .. } => "its thread ended".to_owned(),
        }
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.kill();
    }
}
