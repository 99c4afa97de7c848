//! Starts ranks and the scheduler, as processes or threads, and speaks with them.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::worker::Worker;

/// Why something did not start.
#[derive(Debug, Error)]
#[error("{name} did not start: {reason}; check the limits on processes and memory of this machine, or use fewer ranks")]
pub(crate) struct LaunchError {
    name: String,
    reason: String,
}

/// What comes from it.
#[derive(Debug)]
pub(crate) enum Word<S> {
    Said(S),
    /// It says no more.
    Ended,
}

/// How many receive buffers libfabric's layer for datagrams has for an endpoint.
const RXM_BUFFERS: (&str, &str) = ("FI_OFI_RXM_MSG_RX_SIZE", "256");

/// A rank or a scheduler that was started.
pub(crate) struct Launched<O> {
    child: Option<Child>,
    orders: Option<mpsc::UnboundedSender<O>>,
}

impl<O: Serialize + Send + 'static> Launched<O> {
    /// Starts it in a process of its own, with `argument`. `hear` is called on another thread.
    pub(crate) fn process<W: Worker<Order = O>>(
        name: &str,
        argument: &str,
        config: &W::Config,
        hear: impl Fn(Word<W::Said>) + Send + 'static,
    ) -> Result<Launched<O>, LaunchError> {
        let wrong = |reason: String| LaunchError { name: name.to_owned(), reason };
        let first = serde_json::to_string(config).map_err(|error| wrong(error.to_string()))?;
        let program = std::env::current_exe().map_err(|error| wrong(error.to_string()))?;
        let mut command = Command::new(program);
        // libfabric 1.17 would allot 64 MiB to each endpoint of tcp;ofi_rxm, which takes seconds where many ranks share few cores.
        if std::env::var_os(RXM_BUFFERS.0).is_none() {
            command.env(RXM_BUFFERS.0, RXM_BUFFERS.1);
        }
        command.arg(argument).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| wrong(error.to_string()))?;
        let (input, said) = (child.stdin.take(), child.stdout.take());
        let (orders, mut given) = mpsc::unbounded_channel();
        let launched = Launched { child: Some(child), orders: Some(orders) };
        let reader = std::thread::Builder::new().name(format!("from-{name}")).spawn(move || {
            for line in said.into_iter().flat_map(|said| BufReader::new(said).lines()).map_while(Result::ok) {
                if let Ok(said) = serde_json::from_str(&line) {
                    hear(Word::Said(said));
                }
            }
            hear(Word::Ended);
        });
        reader.map_err(|error| wrong(error.to_string()))?;
        // A process that is stopped takes nothing; whoever gives it orders must not stop with it.
        let writer = std::thread::Builder::new().name(format!("to-{name}")).spawn(move || {
            let Some(mut input) = input else { return };
            let mut line = Ok(first);
            // Whatever cannot be written any more, its reader's end tells.
            while line.as_ref().is_ok_and(|line| writeln!(input, "{line}").and_then(|()| input.flush()).is_ok()) {
                let Some(order) = given.blocking_recv() else { return };
                line = serde_json::to_string(&order);
            }
        });
        writer.map_err(|error| wrong(error.to_string()))?;
        Ok(launched)
    }

    /// Starts it on a thread of this process.
    pub(crate) fn thread<W: Worker<Order = O>>(
        name: &str,
        config: W::Config,
        hear: impl Fn(Word<W::Said>) + Send + 'static,
    ) -> Result<Launched<O>, LaunchError> {
        let (orders, given) = mpsc::unbounded_channel();
        let body = move || {
            if let Err(error) = W::run(config, given, &mut |said| hear(Word::Said(said))) {
                hear(Word::Said(W::failed(error.to_string())));
            }
            hear(Word::Ended);
        };
        let spawned = std::thread::Builder::new().name(format!("in-{name}")).spawn(body);
        spawned.map_err(|error| LaunchError { name: name.to_owned(), reason: error.to_string() })?;
        Ok(Launched { child: None, orders: Some(orders) })
    }

    /// In the place of a rank that no setup names.
    pub(crate) fn nothing() -> Launched<O> {
        Launched { child: None, orders: None }
    }

    /// Tells it something. One that is gone does not hear it; its end is reported by itself.
    pub(crate) fn tell(&self, order: O) {
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }

    /// SIGTERM.
    pub(crate) fn terminate(&mut self) {
        self.signal(Signal::TERM);
    }

    /// SIGSTOP. Threads cannot be stopped; options that would are refused.
    pub(crate) fn stop(&mut self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub(crate) fn go_on(&mut self) {
        self.signal(Signal::CONT);
    }

    fn signal(&mut self, signal: Signal) {
        if let Some(child) = &mut self.child
            && matches!(child.try_wait(), Ok(None))
        {
            // Nobody has waited for it, so the number is still its own.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// SIGKILL, and waits for the end: after this nothing of it can touch memory. Nothing for a thread.
    pub(crate) fn kill(&mut self) {
        self.orders = None;
        if let Some(child) = &mut self.child {
            // One that has ended by itself cannot be killed again.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The status with which its process ended, if no signal ended it. Waits for that.
    pub(crate) fn exit_status(&mut self) -> Option<i32> {
        self.child.as_mut()?.wait().ok()?.code()
    }

    /// How its process ended. Waits for that.
    pub(crate) fn ending(&mut self) -> String {
        match &mut self.child {
            Some(child) => child.wait().map_or_else(|error| error.to_string(), |status| status.to_string()),
            None => "its thread ended".to_owned(),
        }
    }
}

impl<O> Drop for Launched<O> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // As in `kill`.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
