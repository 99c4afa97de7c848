//! Whether the NIXL plugin that this process would take fits the NIXL that takes it, from their files.

use std::path::{Path, PathBuf};

use kvferry_doctor::{Backend, Check, Question, Status};
use kvferry_nixl_plugins::{CoreError, Inspector, PluginReport, Probe, Verdict, find_core};

const ID: &str = "nixl.abi";

/// Judges the backend's plugin; `None` where nothing says that there is a NIXL.
pub(super) fn check(question: &Question) -> Option<Check> {
    let folder = question.environment.get("NIXL_PLUGIN_DIR").map(PathBuf::from);
    let core = match core(folder.as_deref(), question) {
        Ok(core) => core,
        // Nobody asks for it.
        Err(_) if folder.is_none() => return None,
        Err(error) => return Some(ok(format!("nothing to compare the plugins with: {error}"), Vec::new())),
    };
    let mut inspector = match Inspector::new(&core, question.environment.clone()) {
        Ok(inspector) => inspector,
        Err(error) => return Some(fail(error.to_string(), Vec::new(), "install NIXL again".to_owned())),
    };
    let name = match question.backend {
        Backend::Ucx => "libplugin_UCX.so",
        Backend::Libfabric => "libplugin_LIBFABRIC.so",
    };
    let plugin = folder.unwrap_or_else(|| inspector.own_plugins().to_owned()).join(name);
    if !plugin.exists() {
        // nixl.plugins has said so, where a folder is named.
        return Some(ok(format!("{} is not there: nothing to compare", plugin.display()), Vec::new()));
    }
    let probe = Probe::NotRun("kvferry doctor loads nothing, kvferry plugins does".to_owned());
    let PluginReport { verdict, reasons, remedy, .. } = inspector.inspect(&plugin, probe);
    let what = format!("{} under {}", plugin.display(), inspector.core().display());
    Some(match verdict {
        Verdict::Compatible | Verdict::Unknown => {
            ok(format!("{what}: nothing in the files speaks against it"), reasons)
        }
        Verdict::Incompatible => fail(format!("{what}: it does not fit"), reasons, remedy.unwrap_or_default()),
    })
}

/// The NIXL that the process loads: TensorRT-LLM's own where its plugins are named, or where decode workers of several nodes are started; else
/// what the loader finds.
fn core(folder: Option<&Path>, question: &Question) -> Result<PathBuf, CoreError> {
    let bundled = folder.filter(|folder| folder.components().any(|part| part.as_os_str() == "tensorrt_llm"));
    let beside = bundled.and_then(Path::parent).map(|parent| find_core(Some(parent), &question.environment));
    match beside {
        Some(Ok(core)) => Ok(core),
        _ => find_core(None, &question.environment),
    }
}

fn ok(evidence: String, more: Vec<String>) -> Check {
    Check { id: ID, status: Status::Ok, evidence: [vec![evidence], more].concat(), fix: String::new() }
}

fn fail(evidence: String, more: Vec<String>, fix: String) -> Check {
    Check { id: ID, status: Status::Fail, evidence: [vec![evidence], more].concat(), fix }
}
