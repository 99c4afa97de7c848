//! Loading a plugin in a process of its own.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kvferry_doctor::Environment;
use kvferry_nixl_plugins::Probe;
use kvferry_transport::native::is_no_file;

use crate::child::{self, Answer, SECONDS_MAX};

/// Load one plugin and say what it is; started by `kvferry plugins`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Child {
    core: PathBuf,
    plugin: PathBuf,
}

impl Child {
    /// Runs it; never returns once a library is loaded.
    pub(crate) fn run(&self) -> ExitCode {
        child::begin();
        child::tell(&kvferry_plugin::read(&self.core, &self.plugin))
    }
}

/// Starts this program again to load `plugin` beside `core`.
pub(crate) fn probe(core: &Path, plugin: &Path, environment: &Environment) -> Probe {
    if is_no_file(plugin) {
        return Probe::NotRun("it is no file".to_owned());
    }
    let answer = std::path::absolute(plugin)
        .and_then(|plugin| child::ask(&["load-plugin".as_ref(), core.as_ref(), plugin.as_ref()], environment));
    match answer {
        Ok(Answer::Told(loaded)) => Probe::Told(loaded),
        Ok(Answer::Died(how)) => Probe::Died(how),
        Ok(Answer::Hung) => Probe::Hung(SECONDS_MAX),
        Err(error) => Probe::NotRun(format!("no process could be started for it: {error}")),
    }
}
