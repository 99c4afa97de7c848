//! What `--config` means, as `kvferry config check` resolves it.

use std::path::Path;

use kvferry_trtllm::{Environment, FILE_BYTES_MAX, Follow, Peers, Plan, Severity, TransceiverConfig, resolve};

use crate::environment::text;
use crate::error::UsageError;

/// The plan of a TensorRT-LLM YAML in this process's environment, which `--env-file` has made. What is doubtful about it goes to standard error.
pub(crate) fn plan(file: &Path, follow: Follow) -> Result<Plan, UsageError> {
    let unreadable = |source| UsageError::ConfigFile { file: file.to_owned(), source };
    let text = text(file, FILE_BYTES_MAX as u64).map_err(unreadable)?;
    let config =
        TransceiverConfig::parse(&text).map_err(|source| UsageError::Config { file: file.to_owned(), source })?;
    let environment: Environment = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .collect();
    let resolution = resolve(&config, &file.display().to_string(), &environment, follow, Peers::Kvferry);
    for finding in resolution.findings.iter().filter(|finding| finding.severity == Severity::Warning) {
        let remedy = finding.remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default();
        eprintln!("warning: {}{remedy} ({})", finding.message, finding.source);
    }
    resolution.plan.ok_or_else(|| {
        let error = resolution.findings.into_iter().find(|finding| finding.severity == Severity::Error);
        let (reason, remedy) = error.map(|error| (error.message, error.remedy.unwrap_or_default())).unwrap_or_default();
        UsageError::NoPlan { file: file.to_owned(), reason, remedy }
    })
}
