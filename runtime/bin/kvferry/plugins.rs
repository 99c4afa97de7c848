//! `kvferry plugins`: whether NIXL's plugins fit the NIXL that loads them.

mod probe;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use kvferry_doctor::{Environment, plain};
use kvferry_nixl_plugins::{Inspector, PluginReport, Probe, Verdict, find_core, plugins_in};
use serde::Serialize;

use crate::env_file;

pub(crate) use probe::Child;

/// Tell whether NIXL's plugins fit the NIXL that loads them, from their files and from a process that loads each.
///
/// NIXL's own check cannot: its number is 1 in every release, and what the loader refuses is logged below its default level. Looked at are the
/// libraries and symbols that a plugin needs, against those that come with the core; the vtable through which the core calls it, against the
/// core's own plugins; and the interface version, which a process of its own reads: a plugin may crash. No backend is created.
///
/// Exits with 0 when every plugin is compatible, with 1 when something cannot be seen, with 2 when a plugin is incompatible or the options make
/// no sense.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Plugins, or folders of them. By default what NIXL_PLUGIN_DIR names, else the core's own.
    #[arg(value_name = "PATH")]
    plugins: Vec<PathBuf>,

    /// NIXL's libnixl.so, or a folder that holds it (site-packages, …/tensorrt_llm/libs/nixl). By default what the loader finds.
    #[arg(long, value_name = "PATH")]
    core: Option<PathBuf>,

    /// Only plugins of these names: UCX,LIBFABRIC.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    only: Vec<String>,

    /// Load nothing; the interface version then stays unknown.
    #[arg(long)]
    no_load: bool,

    /// The environment as NAME=value lines, instead of this process's own.
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    core: &'a std::path::Path,
    core_lacks: Vec<String>,
    verdict: Verdict,
    plugins: Vec<PluginReport>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> ExitCode {
    let printed = options.report().and_then(|(text, verdict)| {
        write!(std::io::stdout(), "{text}").map_err(|error| format!("the result cannot be written: {error}"))?;
        Ok(verdict)
    });
    match printed {
        Ok(Verdict::Compatible) => ExitCode::SUCCESS,
        Ok(Verdict::Unknown) => ExitCode::from(1),
        Ok(Verdict::Incompatible) => ExitCode::from(2),
        Err(error) => {
            eprintln!("kvferry plugins: {error}");
            ExitCode::from(2)
        }
    }
}

impl Options {
    fn report(&self) -> Result<(String, Verdict), String> {
        let environment = env_file::environment(self.env_file.as_deref()).map_err(|error| error.to_string())?;
        let core = find_core(self.core.as_deref(), &environment).map_err(|error| error.to_string())?;
        let mut inspector = Inspector::new(&core, environment.clone()).map_err(|error| error.to_string())?;
        let files = self.files(&inspector, &environment)?;
        let inspect = |file: &PathBuf| {
            let probe = if self.no_load {
                Probe::NotRun("--no-load".to_owned())
            } else {
                probe::probe(inspector.core(), file, &environment)
            };
            inspector.inspect(file, probe)
        };
        let plugins: Vec<PluginReport> = files.iter().map(inspect).collect();
        let verdict = plugins.iter().map(|plugin| plugin.verdict).max().unwrap_or(Verdict::Unknown);
        let report = Report { core: inspector.core(), core_lacks: inspector.core_lacks(), verdict, plugins };
        let text = if self.json {
            serde_json::to_string_pretty(&report).map_err(|error| error.to_string())? + "\n"
        } else {
            // Names of files and what is in them are not ours.
            table(&report).lines().flat_map(|line| [plain(line), "\n".into()]).collect()
        };
        Ok((text, verdict))
    }

    fn files(&self, inspector: &Inspector, environment: &Environment) -> Result<Vec<PathBuf>, String> {
        let named = match (&self.plugins[..], environment.get("NIXL_PLUGIN_DIR")) {
            ([], Some(folder)) => vec![PathBuf::from(folder)],
            ([], None) => vec![inspector.own_plugins().to_owned()],
            (named, _) => named.to_vec(),
        };
        let mut files = Vec::new();
        for path in &named {
            if path.is_dir() {
                files.extend(plugins_in(path));
            } else {
                files.push(path.clone());
            }
        }
        let wanted = |file: &PathBuf| {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            self.only.is_empty() || self.only.iter().any(|only| name == format!("libplugin_{only}.so"))
        };
        files.retain(wanted);
        if files.is_empty() {
            let folders: Vec<String> = named.iter().map(|path| path.display().to_string()).collect();
            let folders = folders.join(", ");
            return Err(match &self.only[..] {
                [] => format!("no plugin in {folders}; name a folder with libplugin_*.so"),
                only => format!(
                    "no libplugin_{}.so in {folders}; --only takes the name as it stands in the file's, such as UCX",
                    only.join(".so or libplugin_")
                ),
            });
        }
        Ok(files)
    }
}

fn table(report: &Report<'_>) -> String {
    let mut text = format!("core {}\n", report.core.display());
    for lack in &report.core_lacks {
        text.push_str(&format!("  {lack}\n"));
    }
    for plugin in &report.plugins {
        let mut reasons = plugin.reasons.iter();
        let first = reasons.next().map(String::as_str).unwrap_or_default();
        text.push_str(&format!("{:<13} {:<16} {first}\n", plugin.verdict.name(), plugin.name));
        for more in reasons {
            text.push_str(&format!("{:31}{more}\n", ""));
        }
        if let Some(remedy) = &plugin.remedy {
            text.push_str(&format!("{:31}do: {remedy}\n", ""));
        }
    }
    let count = |verdict| report.plugins.iter().filter(|plugin| plugin.verdict == verdict).count();
    text.push_str(&format!(
        "{} compatible, {} unknown, {} incompatible\n",
        count(Verdict::Compatible),
        count(Verdict::Unknown),
        count(Verdict::Incompatible)
    ));
    text
}
