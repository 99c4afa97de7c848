//! The checks of one host, by what they are about.

mod efa;
mod fabric;
mod gpu;
mod libraries;
mod process;
pub(crate) mod variables;

use crate::host::Host;
use crate::question::Question;
use crate::report::{Check, Report};
use crate::root::SysRoot;

/// What every check may look at.
pub(crate) struct Subject<'a> {
    pub(crate) root: &'a SysRoot,
    pub(crate) host: &'a Host,
    pub(crate) question: &'a Question,
}

impl Subject<'_> {
    /// Whether EFA is there; otherwise nothing more about it is of concern than that it is missing, where it is expected.
    fn efa_matters(&self) -> bool {
        self.host.efa_on_pci().next().is_some()
    }
}

/// Reads the host below `root` and judges it.
pub fn examine(root: &SysRoot, question: &Question) -> Report {
    let host = Host::read(root);
    let subject = Subject { root, host: &host, question };
    let mut checks: Vec<Check> = Vec::new();
    checks.extend(efa::checks(&subject));
    checks.extend(process::checks(&subject));
    checks.extend(gpu::checks(&subject));
    checks.extend(fabric::checks(&subject));
    checks.extend(libraries::checks(&subject));
    checks.extend(variables::checks(&subject));
    Report::of(checks)
}
