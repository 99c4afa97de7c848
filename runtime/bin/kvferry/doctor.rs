//! `kvferry doctor`: checks of this host, of a worker's log, or of Kubernetes manifests; and a real transfer with a peer.

mod clock;
mod driver;
mod ends;
mod meeting;
mod nixl;
mod questions;
mod serve;
mod verify;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use kvferry::topology::Overrides;
use kvferry_doctor::{
    Backend, DriverSaid, Environment, Expectations, MANIFEST_BYTES_MAX, Question, Report, Role, Status, SysRoot,
    examine, read_log, read_manifest,
};

use crate::env_file;
pub(crate) use driver::Child;
use meeting::Meeting;

/// Bytes of a log that is read; of a longer one, its beginning is what matters.
const LOG_BYTES_MAX: u64 = 256 << 20;

/// Check one host, a worker's log or Kubernetes manifests for KV transfers over EFA, UCX, libfabric and NVLink; or transfer and see.
///
/// Each check is ok, warn or fail, with what was seen and the exact fix. Nothing is sent or changed, and nothing loaded but NVIDIA's NVML, where there
/// is a driver: a process of its own asks it of the GPUs' NVLink fabric (KVFERRY_NVML_LIBRARY names another). What only a transfer can prove is said to be so. That is what --verify is for: it moves KV from a peer that runs --serve, and grades what proves the way that it took. What a host does not have (EFA, GPUs, IMEX channels) is of no concern unless --expect says so.
///
/// Exits with 0 when all is ok, with 1 when something is a warning, with 2 when something fails or the options make no sense.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Which side the process is on: NIXL's plugins belong to one side only.
    #[arg(long, value_enum)]
    role: Option<Side>,

    /// The group spans several nodes: its decode workers are started through mpirun and load TensorRT-LLM's own NIXL.
    #[arg(long)]
    multinode: bool,

    /// Which library carries the KV cache. By default what TRTLLM_NIXL_KVCACHE_BACKEND selects.
    #[arg(long, value_enum)]
    backend: Option<Library>,

    /// What the host must have: efa=N EFA devices, gpu=N GPUs, imex=N IMEX channels, gbps=N gigabits a second of all active EFA ports, separated by
    /// commas.
    #[arg(long, value_name = "LIST", value_parser = |text: &str| text.parse::<Expectations>())]
    expect: Option<Expectations>,

    /// The environment as NAME=value lines, instead of this process's (or, with --pid, that process's) own.
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,

    /// Look below this folder for sys, dev, proc, etc and libraries instead of on the live host. nvidia-smi-q.txt in it, with what `nvidia-smi -q`
    /// printed, stands for the driver. With --verify or --serve only what is told of EFA devices comes from there.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// NICs of GPUs that are not left to PCI distance, as for `cluster`: 0=mlx5_0+mlx5_1,0000:45:00.0=mlx5_2. What is not there is a warning.
    #[arg(long, value_name = "GPU=NIC+NIC", value_parser = |text: &str| text.parse::<Overrides>())]
    nic_map: Option<Overrides>,

    /// The worker whose limits, capabilities, loaded libraries and environment are judged, instead of this process.
    #[arg(long)]
    pid: Option<u32>,

    /// Judge a worker's log instead of the host; `-` for standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["role", "multinode", "backend", "env_file", "root", "nic_map", "pid"])]
    log: Option<PathBuf>,

    /// Judge Kubernetes manifests instead of the host; `-` for standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["role", "multinode", "backend", "env_file", "root", "nic_map", "pid", "log"])]
    manifest: Option<PathBuf>,

    /// With --log: bytes of a KV piece, whose protocol must be zero-copy.
    #[arg(long, value_name = "N", default_value_t = 4096, requires = "log")]
    block_bytes: u64,

    #[command(flatten)]
    meeting: Meeting,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Side {
    Prefill,
    Decode,
}

/// Which library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Library {
    Ucx,
    Libfabric,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> ExitCode {
    if let Some(address) = &options.meeting.serve {
        return match options.root().and_then(|root| serve::run(&options.meeting, address, &root)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("kvferry doctor: {error}");
                ExitCode::from(2)
            }
        };
    }
    let printed = options.report().and_then(|report| {
        let text = if options.json {
            serde_json::to_string_pretty(&report).map_err(|error| error.to_string())? + "\n"
        } else {
            table(&report)
        };
        write!(std::io::stdout(), "{text}").map_err(|error| format!("the result cannot be written: {error}"))?;
        Ok(report.status)
    });
    match printed {
        Ok(Status::Ok) => ExitCode::SUCCESS,
        Ok(Status::Warn) => ExitCode::from(1),
        Ok(Status::Fail) => ExitCode::from(2),
        Err(error) => {
            eprintln!("kvferry doctor: {error}");
            ExitCode::from(2)
        }
    }
}

impl Options {
    fn report(&self) -> Result<Report, String> {
        if let Some(peer) = &self.meeting.verify {
            return verify::run(&self.meeting, peer, &self.root()?);
        }
        let expect = self.expect.unwrap_or_default();
        if let Some(log) = &self.log {
            let text = env_file::read_log(log, LOG_BYTES_MAX).map_err(|error| error.to_string())?;
            return Ok(read_log(&text, &expect, self.block_bytes));
        }
        if let Some(file) = &self.manifest {
            let name = file.display().to_string();
            let text = env_file::read(file, MANIFEST_BYTES_MAX as u64).map_err(|error| error.to_string())?;
            return read_manifest(&text, &name, &expect).map_err(|error| format!("{name}: {error}"));
        }
        let mut root = self.root()?;
        if let Some(pid) = self.pid {
            root = root.of_process(pid);
        }
        let environment = self.environment(&root)?;
        let backend = match self.backend {
            Some(Library::Ucx) => Backend::Ucx,
            Some(Library::Libfabric) => Backend::Libfabric,
            None => Backend::of(&environment),
        };
        let role = self.role.map(|side| match side {
            Side::Prefill => Role::Prefill,
            Side::Decode => Role::Decode,
        });
        let nic_map = self.nic_map.clone().unwrap_or_default();
        let driver = if self.root.is_none() { driver::ask(&environment) } else { DriverSaid::Nothing };
        let question = Question { environment, backend, role, multinode: self.multinode, expect, driver, nic_map };
        let report = examine(&root, &question);
        // Libraries are looked for on the live host only.
        let abi = if self.root.is_none() { nixl::check(&question) } else { None };
        Ok(report.with(abi))
    }

    /// Where the host is looked at.
    fn root(&self) -> Result<SysRoot, String> {
        match &self.root {
            Some(folder) if !folder.is_dir() => {
                Err(format!("--root {}: it is no folder; name one with sys, dev and proc in it", folder.display()))
            }
            Some(folder) => {
                let root = SysRoot::captured(folder);
                match root.flaw() {
                    Some(flaw) => Err(format!(
                        "--root {}: {flaw}: it is no host's; name a folder with a host's sys, dev and proc in it",
                        folder.display()
                    )),
                    None => Ok(root),
                }
            }
            None => Ok(SysRoot::live()),
        }
    }

    /// A file's, a process's, or this one's; a captured host without a file has none.
    fn environment(&self, root: &SysRoot) -> Result<Environment, String> {
        match (&self.env_file, self.pid) {
            (None, Some(pid)) => root.environment().ok_or_else(|| {
                format!("--pid {pid}: its environment cannot be read; run as its user, or give --env-file")
            }),
            (None, None) if self.root.is_some() => Ok(Environment::new()),
            (file, _) => env_file::environment(file.as_deref()).map_err(|error| error.to_string()),
        }
    }
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let mut evidence = check.evidence.iter();
        let first = evidence.next().map(String::as_str).unwrap_or_default();
        text.push_str(&format!("{:<5} {:<24} {first}\n", check.status.name(), check.id));
        for more in evidence {
            text.push_str(&format!("{:31}{more}\n", ""));
        }
        if !check.fix.is_empty() {
            text.push_str(&format!("{:31}do: {}\n", "", check.fix));
        }
    }
    let count = |status: Status| report.checks.iter().filter(|check| check.status == status).count();
    text.push_str(&format!("{} ok, {} warn, {} fail\n", count(Status::Ok), count(Status::Warn), count(Status::Fail)));
    text
}
