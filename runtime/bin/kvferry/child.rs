//! This program once more, for what may end a process or hang in it: its death is an answer.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;

use kvferry_doctor::Environment;
use rustix::process::{Pid, Signal, getppid, kill_process_group, set_parent_process_death_signal};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long it may take; some libraries look for devices as they are loaded.
pub(crate) const SECONDS_MAX: u64 = 20;
const LOOK: Duration = Duration::from_millis(5);
/// Bytes of its output that are read; a pipe holds as much.
const OUTPUT_MAX: u64 = 64 << 10;
/// Begins the line that is meant for us: libraries may print, too.
const MARK: &str = "kvferry-child ";
/// Tells the child who asks.
const ASKED_BY: &str = "KVFERRY_ASKED_BY";

/// What came of it.
pub(crate) enum Answer<T> {
    /// It said this.
    Told(T),
    /// It ended without a word.
    Died(String),
    /// It was ended after [`SECONDS_MAX`].
    Hung,
}

/// Starts it with these arguments and this environment.
pub(crate) fn ask<T: DeserializeOwned>(arguments: &[&OsStr], environment: &Environment) -> std::io::Result<Answer<T>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env_clear().envs(environment).env(ASKED_BY, std::process::id().to_string());
    // Whom it starts in turn belongs to its group, and ends with it.
    command.process_group(0);
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
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        // If nobody of it is left, that is well, too; numbers are given out in turn, so it is nobody else's yet.
        let _ = kill_process_group(group, Signal::KILL);
    }
    if ended.is_none() {
        child.wait()?;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // Somebody whom the library started may hold the pipe open: what is there now is all there is.
        rustix::io::ioctl_fionbio(&stdout, true)?;
        match stdout.take(OUTPUT_MAX).read_to_end(&mut output) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
    let output = String::from_utf8_lossy(&output);
    let line = output.lines().rev().find_map(|line| line.strip_prefix(MARK));
    Ok(match (line.and_then(|line| serde_json::from_str(line).ok()), ended) {
        (Some(told), _) => Answer::Told(told),
        (None, Some(status)) => Answer::Died(how(status)),
        (None, None) => Answer::Hung,
    })
}

/// The other end, before anything is loaded: it ends with whoever waits for its answer, whatever keeps it.
pub(crate) fn begin() {
    // Where the kernel does not know that, it is ended after [`SECONDS_MAX`] all the same, if somebody is there to do that.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    // Who asked may have ended before that.
    let asked_by = std::env::var(ASKED_BY).ok().and_then(|number| number.parse().ok());
    if asked_by.is_some_and(|number: i32| Pid::as_raw(getppid()) != number) {
        kvferry_plugin::leave(1);
    }
}

/// The other end: says it and ends the process, without the libraries' farewells.
pub(crate) fn tell(answer: &impl Serialize) -> ExitCode {
    let line = serde_json::to_string(answer).unwrap_or_default();
    let written = writeln!(std::io::stdout(), "\n{MARK}{line}").and_then(|()| std::io::stdout().flush());
    kvferry_plugin::leave(u8::from(written.is_err()))
}

fn how(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("is ended by signal {signal}"),
        (None, code) => format!("ends itself with code {}", code.unwrap_or_default()),
    }
}
