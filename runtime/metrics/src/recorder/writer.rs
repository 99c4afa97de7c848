//! The thread that writes dumps: files may be slow, nodes may not wait for them.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use kvferry_actors::MonotonicClock;
use serde_json::json;

use super::Entry;

/// Dumps that may wait for the file.
const WAITING_MAX: usize = 8;
const FILE_BYTES_MAX: u64 = 64 << 20;

/// All that was kept when something went wrong.
#[derive(Debug)]
pub(super) struct Dump {
    pub(super) dump: u64,
    pub(super) because: String,
    /// Number and epoch.
    pub(super) node: Option<(u64, u64)>,
    pub(super) entries: Vec<Entry>,
    /// Older ones that are kept and not in it.
    pub(super) left_out: usize,
}

enum Job {
    Write(Dump),
    Say(SyncSender<()>),
}

/// Ends when it is dropped, after what was given to it.
#[derive(Debug)]
pub(super) struct Writer {
    jobs: SyncSender<Job>,
}

impl Writer {
    pub(super) fn start(path: PathBuf) -> std::io::Result<Writer> {
        let file = open(&path)?;
        let (jobs, given) = sync_channel(WAITING_MAX);
        let body = move || write_all(&path, file, &given);
        std::thread::Builder::new().name("kvferry-recorder".to_owned()).spawn(body)?;
        Ok(Writer { jobs })
    }

    /// Says whether there was room.
    pub(super) fn write(&self, dump: Dump) -> bool {
        self.jobs.try_send(Job::Write(dump)).is_ok()
    }

    pub(super) fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.jobs.send(Job::Say(done)).is_ok() {
            // A thread that has ended has written what it could.
            let _ = written.recv();
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

fn write_all(path: &Path, mut file: File, given: &Receiver<Job>) {
    while let Ok(job) = given.recv() {
        match job {
            Job::Write(dump) => {
                if let Err(error) = rotate(path, &mut file).and_then(|()| write(&mut file, &dump)) {
                    tracing::warn!(path = %path.display(), %error, "the flight recorder cannot write");
                }
            }
            // Whoever waited may have gone.
            Job::Say(done) => drop(done.send(())),
        }
    }
}

fn rotate(path: &Path, file: &mut File) -> std::io::Result<()> {
    if file.metadata()?.len() >= FILE_BYTES_MAX {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        std::fs::rename(path, old)?;
        *file = open(path)?;
    }
    Ok(())
}

/// A line that says why, then one for each entry.
fn write(file: &mut File, dump: &Dump) -> std::io::Result<()> {
    let mut out = BufWriter::new(file);
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let head = json!({
        "dump": dump.dump,
        "because": dump.because,
        "node": dump.node.map(|(node, _)| node),
        "epoch": dump.node.map(|(_, epoch)| epoch),
        "entries": dump.entries.len(),
        "left_out": dump.left_out,
        // One instant on both clocks.
        "monotonic_ns": MonotonicClock::moment().0,
        "unix_ns": u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX),
    });
    serde_json::to_writer(&mut out, &head)?;
    out.write_all(b"\n")?;
    for entry in &dump.entries {
        serde_json::to_writer(&mut out, entry)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
