//! What NVIDIA's driver says of the GPUs, asked by a process of its own.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use kvferry_doctor::{DriverSaid, Environment};
use kvferry_nvml::{LIBRARY, NAMED_BY};
use kvferry_transport::native::check_file;

use crate::child::{self, Answer, SECONDS_MAX};

/// It is there where the driver is, in containers that got it, too.
const DRIVER: &str = "/proc/driver/nvidia/version";

/// Ask NVML of the GPUs' NVLink fabric; started by `kvferry doctor`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Child {
    library: OsString,
}

impl Child {
    /// Runs it; never returns once the library is loaded.
    pub(crate) fn run(&self) -> ExitCode {
        child::begin();
        child::tell(&kvferry_nvml::query(&self.library).map_err(|error| error.to_string()))
    }
}

/// Asks it, where there is one.
pub(super) fn ask(environment: &Environment) -> DriverSaid {
    let named = environment.get(NAMED_BY).filter(|path| !path.is_empty());
    if named.is_none() && !Path::new(DRIVER).exists() {
        return DriverSaid::Nothing;
    }
    let library = named.map_or(LIBRARY, String::as_str);
    if let Err(reason) = check_file(library, NAMED_BY) {
        return DriverSaid::Refused(reason);
    }
    match child::ask::<Result<String, String>>(&["load-nvml".as_ref(), library.as_ref()], environment) {
        Ok(Answer::Told(Ok(text))) => DriverSaid::Told(text),
        Ok(Answer::Told(Err(reason))) => DriverSaid::Refused(reason),
        Ok(Answer::Died(how)) => DriverSaid::Refused(format!("the process that asks {library} {how}")),
        Ok(Answer::Hung) => DriverSaid::Refused(format!("{library} does not answer within {SECONDS_MAX} s")),
        Err(error) => DriverSaid::Refused(format!("no process could be started for it: {error}")),
    }
}
