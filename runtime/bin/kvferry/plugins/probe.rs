//! Loading a plugin in a process of its own, whose death is an answer.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;

use clap::Args;
use kvferry_doctor::Environment;
use kvferry_nixl_plugins::{Loaded, Probe};

/// How long a process may take to load a plugin; some look for devices as they are loaded.
const SECONDS_MAX: u64 = 20;
const LOOK: Duration = Duration::from_millis(5);
/// Bytes of its output that are read; a pipe holds as much.
const OUTPUT_MAX: u64 = 64 << 10;
/// Begins the line that is meant for us: plugins may print, too.
const MARK: &str = "kvferry-plugin ";

/// Load one plugin and say what it is; started by `kvferry plugins`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Child {
    core: PathBuf,
    plugin: PathBuf,
}

impl Child {
    /// Runs it; never returns once a library is loaded.
    pub(crate) fn run(&self) -> ExitCode {
        let loaded = kvferry_plugin::read(&self.core, &self.plugin);
        let line = serde_json::to_string(&loaded).unwrap_or_default();
        let written = writeln!(std::io::stdout(), "\n{MARK}{line}").and_then(|()| std::io::stdout().flush());
        kvferry_plugin::leave(u8::from(written.is_err()))
    }
}

/// Starts this program again to load `plugin` beside `core`.
pub(crate) fn probe(core: &Path, plugin: &Path, environment: &Environment) -> Probe {
    match run(core, plugin, environment) {
        Ok(probe) => probe,
        Err(error) => Probe::NotRun(format!("no process could be started for it: {error}")),
    }
}

fn run(core: &Path, plugin: &Path, environment: &Environment) -> std::io::Result<Probe> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("load-plugin").arg(core).arg(std::path::absolute(plugin)?);
    command.env_clear().envs(environment);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let looks = SECONDS_MAX * 1000 / LOOK.as_millis() as u64;
    let mut ended = None;
    for _ in 0..looks {
        ended = child.try_wait()?;
        if ended.is_some() {
            break;
        }
        sleep(LOOK);
    }
    if ended.is_none() {
        child.kill()?;
        child.wait()?;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // Somebody whom the plugin started may hold the pipe open: what is there now is all there is.
        rustix::io::ioctl_fionbio(&stdout, true)?;
        match stdout.take(OUTPUT_MAX).read_to_end(&mut output) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
    let output = String::from_utf8_lossy(&output);
    let line = output.lines().rev().find_map(|line| line.strip_prefix(MARK));
    Ok(match (line.and_then(|line| serde_json::from_str::<Loaded>(line).ok()), ended) {
        (Some(loaded), _) => Probe::Told(loaded),
        (None, Some(status)) => Probe::Died(how(status)),
        (None, None) => Probe::Hung(SECONDS_MAX),
    })
}

fn how(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("is ended by signal {signal}"),
        (None, code) => format!("ends itself with code {}", code.unwrap_or_default()),
    }
}
