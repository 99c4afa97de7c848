//! `kvferry manifest`: Kubernetes YAML of a deployment.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use kvferry_manifest::{Architecture, Form, Library, Settings, generate, text};

use crate::env_file;

/// More than any settings have.
const SETTINGS_BYTES_MAX: u64 = 1 << 20;

/// Print Kubernetes YAML for prefill and decode workers with EFA or GB200, and say in it why it is as it is.
///
/// The settings come from a TOML file, from flags, or both; flags win. The file has the flags' names without their dashes (`gpus = 8`), and
/// `[prefill]` and `[decode]` with `replicas`, `nodes`, `command` and `args`. What it prints is judged by `kvferry doctor --manifest -`.
///
/// Exits with 0, or with 2 when the settings make no sense.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// A TOML file with settings; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,

    /// Begins the names of all objects [default: kvferry].
    #[arg(long)]
    name: Option<String>,

    /// Where the objects live; by default that of whoever applies them.
    #[arg(long)]
    namespace: Option<String>,

    /// Which objects run the workers [default: dynamo].
    #[arg(long, value_enum)]
    form: Option<FormName>,

    /// The workers' image; by default Dynamo's for the processor.
    #[arg(long)]
    image: Option<String>,

    /// The nodes' processor; with arm64 the EFA SDK is mounted from the host [default: amd64, with --gb200 arm64].
    #[arg(long, value_enum)]
    architecture: Option<ArchitectureName>,

    /// What carries the KV cache below NIXL [default: ucx].
    #[arg(long, value_enum)]
    library: Option<LibraryName>,

    /// EFA devices per pod; 0 for none [default: 4].
    #[arg(long, value_name = "N")]
    efa: Option<u32>,

    /// GPUs per pod [default: 4].
    #[arg(long, value_name = "N")]
    gpus: Option<u32>,

    /// The nodes are GB200's: a ComputeDomain, its claims and NCCL's variables.
    #[arg(long)]
    gb200: bool,

    /// `numNodes` of the ComputeDomain: all workers' nodes, for drivers whose gate IMEXDaemonsWithDNSNames is off [default: 0].
    #[arg(long, value_name = "N")]
    compute_domain_nodes: Option<u32>,

    /// NIXL's plugins for decode workers of several nodes; by default TensorRT-LLM's own in Dynamo's image.
    #[arg(long, value_name = "DIR")]
    plugin_dir: Option<String>,

    /// The image of a program that runs kvferry's scheduler: its Deployment, Service and ServiceMonitor.
    #[arg(long, value_name = "IMAGE")]
    scheduler_image: Option<String>,

    /// Groups of prefill workers [default: 1].
    #[arg(long, value_name = "N")]
    prefill_replicas: Option<u32>,

    /// Nodes of each prefill group [default: 1].
    #[arg(long, value_name = "N")]
    prefill_nodes: Option<u32>,

    /// Groups of decode workers [default: 1].
    #[arg(long, value_name = "N")]
    decode_replicas: Option<u32>,

    /// Nodes of each decode group [default: 1].
    #[arg(long, value_name = "N")]
    decode_nodes: Option<u32>,
}

/// Which objects.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormName {
    /// Dynamo's operator (DynamoGraphDeployment v1alpha1).
    Dynamo,
    /// A LeaderWorkerSet per side.
    Lws,
    /// A StatefulSet per side.
    Statefulset,
}

/// Which processor.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ArchitectureName {
    Amd64,
    Arm64,
}

/// Which library.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LibraryName {
    Ucx,
    Libfabric,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> ExitCode {
    let printed = options.text().and_then(|text| {
        write!(std::io::stdout(), "{text}").map_err(|error| format!("the result cannot be written: {error}"))
    });
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvferry manifest: {error}");
            ExitCode::from(2)
        }
    }
}

impl Options {
    fn text(&self) -> Result<String, String> {
        let documents = generate(&self.merged()?).map_err(|error| error.to_string())?;
        text(&documents).map_err(|error| error.to_string())
    }

    /// The file's settings, with what the flags say.
    fn merged(&self) -> Result<Settings, String> {
        let mut settings = match &self.settings {
            Some(file) => {
                let text = env_file::read(file, SETTINGS_BYTES_MAX).map_err(|error| error.to_string())?;
                Settings::parse(&text).map_err(|error| format!("{}: {error}", file.display()))?
            }
            None => Settings::default(),
        };
        fn set<T>(field: &mut T, flag: Option<T>) {
            if let Some(flag) = flag {
                *field = flag;
            }
        }
        set(&mut settings.name, self.name.clone());
        set(&mut settings.efa, self.efa);
        set(&mut settings.gpus, self.gpus);
        set(&mut settings.compute_domain_nodes, self.compute_domain_nodes);
        set(&mut settings.plugin_dir, self.plugin_dir.clone());
        set(&mut settings.prefill.replicas, self.prefill_replicas);
        set(&mut settings.prefill.nodes, self.prefill_nodes);
        set(&mut settings.decode.replicas, self.decode_replicas);
        set(&mut settings.decode.nodes, self.decode_nodes);
        settings.gb200 |= self.gb200;
        settings.namespace = self.namespace.clone().or(settings.namespace);
        settings.image = self.image.clone().or(settings.image);
        settings.scheduler_image = self.scheduler_image.clone().or(settings.scheduler_image);
        let form = self.form.map(|form| match form {
            FormName::Dynamo => Form::Dynamo,
            FormName::Lws => Form::Lws,
            FormName::Statefulset => Form::Statefulset,
        });
        set(&mut settings.form, form);
        let library = self.library.map(|library| match library {
            LibraryName::Ucx => Library::Ucx,
            LibraryName::Libfabric => Library::Libfabric,
        });
        set(&mut settings.library, library);
        let architecture = self.architecture.map(|architecture| match architecture {
            ArchitectureName::Amd64 => Architecture::Amd64,
            ArchitectureName::Arm64 => Architecture::Arm64,
        });
        settings.architecture = architecture.or(settings.architecture);
        Ok(settings)
    }
}
