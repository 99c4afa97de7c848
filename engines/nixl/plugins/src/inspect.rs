//! The verdict on a plugin.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use kvferry_doctor::{Environment, SysRoot, find_library};
use kvferry_plugin::Loaded;
use thiserror::Error;

use crate::elf::{Elf, ElfError, Vtable};
use crate::linker::{Gap, Linker, Object, name, unresolved};
use crate::report::{Fingerprint, Need, PluginReport, Probe, Verdict};
use crate::vtable::{difference, releases};

/// NIXL's library.
const CORE: &str = "libnixl.so";
/// `NIXL_PLUGIN_API_VERSION` of every release up to 1.5.1.
const API_VERSION: i32 = 1;
/// The init functions, the backends' first.
const INITS: [&str; 3] = ["nixl_plugin_init", "nixl_telemetry_plugin_init", "nixl_trace_plugin_init"];
/// File names that NIXL takes for plugins begin with one of these.
const PREFIXES: [&str; 3] = ["libplugin_", "libtelemetry_exporter_", "libtrace_backend_"];
/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 4096;
/// Folders below a named one in which the core is looked for.
const DEPTH_MAX: usize = 4;
/// Undefined symbols that are named.
const NAMED_MAX: usize = 32;
/// Who provides what wheels leave to the host.
const PROVIDERS: [(&str, &str); 7] = [
    ("libcuda.so", "NVIDIA's driver"),
    ("libcudart.so", "the CUDA runtime"),
    ("libcufile.so", "CUDA's libcufile"),
    ("libfabric.so", "libfabric (the EFA installer has it; put /opt/amazon/efa/lib into LD_LIBRARY_PATH)"),
    ("libhwloc.so", "hwloc"),
    ("libdoca", "NVIDIA DOCA"),
    ("libred_", "Infinia's client"),
];

/// Why there is no core to compare with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CoreError {
    /// It is not where it was named.
    #[error("{}: there is no {CORE} in it; name NIXL's {CORE}, or a folder that holds it", path.display())]
    Missing {
        /// What was named.
        path: PathBuf,
    },
    /// Nobody named one, and the loader finds none.
    #[error("the loader finds no {CORE}; name it, or a folder that holds it (site-packages), with --core")]
    Unfound,
    /// It cannot be understood.
    #[error("{}: {source}", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ElfError,
    },
}

/// NIXL's library: the named file, the one in the named folder or a few below it, or what the loader finds.
pub fn find_core(named: Option<&Path>, environment: &Environment) -> Result<PathBuf, CoreError> {
    let Some(named) = named else {
        let mut found = find_library(&SysRoot::live(), environment, CORE, "").into_iter();
        return found.next().map(|found| found.path).ok_or(CoreError::Unfound);
    };
    if named.is_file() {
        return Ok(named.to_owned());
    }
    below(named, DEPTH_MAX).ok_or_else(|| CoreError::Missing { path: named.to_owned() })
}

fn below(folder: &Path, depth: usize) -> Option<PathBuf> {
    let here = folder.join(CORE);
    if here.is_file() {
        return Some(here);
    }
    let inner = entries(folder).into_iter().filter(|path| path.is_dir() && !path.is_symlink());
    inner.take_while(|_| depth > 0).find_map(|path| below(&path, depth - 1))
}

/// The plugins of a folder, by name.
pub fn plugins_in(folder: &Path) -> Vec<PathBuf> {
    let is_plugin = |path: &PathBuf| {
        let name = name(path);
        PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && name.ends_with(".so")
    };
    entries(folder).into_iter().filter(is_plugin).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().take(ENTRIES_MAX).map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// One core, and what it has loaded when it looks for plugins.
#[derive(Debug)]
pub struct Inspector {
    linker: Linker,
    core: PathBuf,
    elf: Rc<Elf>,
    present: Vec<Object>,
    /// What the core lacks itself on this host.
    lacks: Vec<Gap>,
    /// The core's own plugins.
    own: PathBuf,
}

impl Inspector {
    /// Reads the core and all that comes with it, as a process with this environment would load it.
    pub fn new(core: &Path, environment: Environment) -> Result<Inspector, CoreError> {
        let wrong = |source| CoreError::Elf { path: core.to_owned(), source };
        let unreadable = |error: std::io::Error| wrong(ElfError::Unreadable { reason: error.to_string() });
        let core = std::path::absolute(core).map_err(unreadable)?;
        let mut linker = Linker::new(environment);
        let (present, lacks) = linker.load(&core, &[]).map_err(wrong)?;
        let elf = linker.read(&core).map_err(wrong)?;
        let own = core.parent().unwrap_or(Path::new("/")).join("plugins");
        Ok(Inspector { linker, core, elf, present, lacks, own })
    }

    /// The core.
    pub fn core(&self) -> &Path {
        &self.core
    }

    /// The plugins that came with the core: what it loads without `NIXL_PLUGIN_DIR`.
    pub fn own_plugins(&self) -> &Path {
        &self.own
    }

    /// Judges a plugin; `probe` is what a process of its own saw.
    pub fn inspect(&mut self, plugin: &Path, probe: Probe) -> PluginReport {
        let mut findings = Findings::default();
        let mut report = PluginReport {
            file: plugin.to_owned(),
            name: name_of(plugin),
            verdict: Verdict::Unknown,
            reasons: Vec::new(),
            remedy: None,
            needs: Vec::new(),
            undefined: Vec::new(),
            init: Vec::new(),
            vtable: None,
            probe,
        };
        let path = std::path::absolute(plugin).unwrap_or_else(|_| plugin.to_owned());
        match self.linker.load(&path, &self.present) {
            Err(error) => findings.against(format!("the file: {error}")),
            Ok((objects, gaps)) => self.judge(&objects, gaps, &mut report, &mut findings),
        }
        told(&report.probe, findings.against.is_empty(), &mut findings);
        if let Probe::Told(Loaded::Plugin { name: Some(called), .. }) = &report.probe
            && *called != report.name
        {
            findings.unsure(format!("its file is that of {}, and it calls itself {called}", report.name));
        }
        report.verdict = findings.verdict();
        report.remedy = match report.verdict {
            Verdict::Compatible => None,
            // It came with the core: there is no other to take.
            Verdict::Unknown if self.is_own(&path) => None,
            Verdict::Unknown | Verdict::Incompatible => Some(self.remedy(&path, &findings)),
        };
        report.reasons = findings.reasons();
        report
    }

    fn judge(&mut self, objects: &[Object], gaps: Vec<Gap>, report: &mut PluginReport, findings: &mut Findings) {
        let Some(plugin) = objects.first() else { return };
        let elf = &plugin.elf;
        report.init = INITS.into_iter().filter(|init| elf.defined.contains_key(*init)).collect();
        report.needs = self.needs(elf, objects);
        if elf.machine != self.elf.machine {
            let (of_plugin, of_core) = (elf.machine, self.elf.machine);
            return findings
                .against(format!("it is for another processor (ELF machine {of_plugin}) than the core ({of_core})"));
        }
        for gap in &gaps {
            findings.gap(gap);
        }
        let unresolved = unresolved(objects, &self.present);
        let names = |gap: &Gap| match gap {
            Gap::Symbol { name, .. } => Some(name.clone()),
            _ => None,
        };
        report.undefined = unresolved.iter().filter_map(names).take(NAMED_MAX).collect();
        // A missing library's symbols are missing, too, and say nothing more.
        if gaps.is_empty() {
            let (symbols, versions): (Vec<_>, Vec<_>) =
                unresolved.into_iter().partition(|gap| matches!(gap, Gap::Symbol { .. }));
            versions.iter().for_each(|gap| findings.gap(gap));
            if let Some(first) = symbols.first() {
                findings.gap(first);
                findings.more_symbols(symbols.len() - 1);
            }
        }
        match report.init.first() {
            None => findings.against(format!("it exports none of {}", INITS.join(", "))),
            Some(&"nixl_plugin_init") => report.vtable = self.fingerprint(plugin, findings),
            // Those that came with the core need none.
            Some(_) if self.is_own(&plugin.path) => {}
            Some(_) => findings.unsure(
                "telemetry and trace plugins have no fingerprint by which releases can be told apart".to_owned(),
            ),
        }
    }

    fn needs(&self, elf: &Elf, objects: &[Object]) -> Vec<Need> {
        let need = |soname: &String| {
            let file = Path::new(soname);
            let is = |object: &&Object| {
                object.elf.soname.as_deref() == Some(soname) || object.path.file_name() == file.file_name()
            };
            let path = objects.iter().skip(1).find(is).map(|object| object.path.clone());
            let from_core = path.as_ref().is_some_and(|path| self.present.iter().any(|other| other.path == *path));
            Need { soname: soname.clone(), path, from_core }
        };
        elf.needed.iter().map(need).collect()
    }

    /// Compares the vtable with one of the core's own plugins: the core itself does not export it.
    fn fingerprint(&mut self, plugin: &Object, findings: &mut Findings) -> Option<Fingerprint> {
        let Some(found) = &plugin.elf.vtable else {
            findings.unsure(
                "it does not export the vtable of nixlBackendEngine, by which releases can be told apart".to_owned(),
            );
            return None;
        };
        let reference = self.reference(&plugin.path);
        match &reference {
            Some((_, meant)) => {
                if let Some(difference) = difference(meant, found) {
                    let loads = if findings.against.is_empty() {
                        "it loads, and crashes"
                    } else {
                        "if it did load, it would crash"
                    };
                    findings.against(format!("{loads} when it is used: {difference}"));
                }
            }
            None => findings.unsure(format!(
                "the core has no plugin of its own in {} to compare the vtable with; this one is {}",
                self.own.display(),
                releases(found.bytes)
                    .map_or("of no release that is known".to_owned(), |releases| format!("NIXL {releases}'s"))
            )),
        }
        let compared_with = reference.map(|(path, _)| path);
        Some(Fingerprint {
            bytes: found.bytes,
            slots: found.slots.len(),
            releases: releases(found.bytes),
            compared_with,
        })
    }

    /// The core's plugin of the same name, else its first one that has the vtable.
    fn reference(&mut self, plugin: &Path) -> Option<(PathBuf, Vtable)> {
        let same = self.own.join(plugin.file_name()?);
        let candidates = [vec![same], plugins_in(&self.own)].concat();
        candidates.into_iter().find_map(|path| {
            let vtable = self.linker.read(&path).ok()?.vtable.clone()?;
            Some((path, vtable))
        })
    }

    /// Whether it came with the core.
    fn is_own(&self, plugin: &Path) -> bool {
        let folder = plugin.parent().and_then(|folder| std::fs::canonicalize(folder).ok());
        folder.is_some() && folder == std::fs::canonicalize(&self.own).ok()
    }

    fn remedy(&self, plugin: &Path, findings: &Findings) -> String {
        if findings.only_libraries && !findings.libraries.is_empty() {
            return format!("install {}, or do without this plugin", providers(&findings.libraries));
        }
        let own = self.own.display();
        if self.is_own(plugin) {
            return "install NIXL again: its own plugin does not fit it".to_owned();
        }
        if !self.own.is_dir() {
            return "use plugins of the same release as the core".to_owned();
        }
        if self.core.components().any(|part| part.as_os_str() == "tensorrt_llm") {
            return format!(
                "set NIXL_PLUGIN_DIR={own} on the decode service only: its workers of several nodes load this core, prefill loads the system's"
            );
        }
        format!(
            "unset NIXL_PLUGIN_DIR where this core is loaded (it then takes its own plugins), or set NIXL_PLUGIN_DIR={own}"
        )
    }

    /// What this host lacks for the core itself, for messages.
    pub fn core_lacks(&self) -> Vec<String> {
        self.lacks.iter().map(say).collect()
    }
}

/// Who has these libraries, each once.
fn providers(libraries: &[String]) -> String {
    let mut names: Vec<String> = Vec::new();
    for soname in libraries {
        let known = PROVIDERS.iter().find(|(prefix, _)| soname.starts_with(prefix));
        let name =
            known.map_or_else(|| format!("the package that has {soname}"), |(_, provider)| (*provider).to_owned());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" and ")
}

/// What speaks against a plugin, and what cannot be seen.
#[derive(Debug, Default)]
struct Findings {
    against: Vec<String>,
    unsure: Vec<String>,
    /// Those that are missing.
    libraries: Vec<String>,
    /// Nothing but missing libraries speaks against it.
    only_libraries: bool,
}

impl Findings {
    fn against(&mut self, reason: String) {
        self.only_libraries = false;
        self.against.push(reason);
    }

    fn unsure(&mut self, reason: String) {
        self.unsure.push(reason);
    }

    fn gap(&mut self, gap: &Gap) {
        let alone = self.against.is_empty() || self.only_libraries;
        self.against(say(gap));
        if let Gap::Library { soname, .. } = gap {
            self.only_libraries = alone;
            self.libraries.push(soname.clone());
        }
    }

    fn more_symbols(&mut self, count: usize) {
        if let (Some(last), true) = (self.against.last_mut(), count > 0) {
            last.push_str(&format!(", and {count} more"));
        }
    }

    fn verdict(&self) -> Verdict {
        match (self.against.is_empty(), self.unsure.is_empty()) {
            (false, _) => Verdict::Incompatible,
            (true, false) => Verdict::Unknown,
            (true, true) => Verdict::Compatible,
        }
    }

    fn reasons(self) -> Vec<String> {
        match self.verdict() {
            Verdict::Compatible => vec!["needs, symbols, vtable and interface version fit".to_owned()],
            _ => [self.against, self.unsure].concat(),
        }
    }
}

/// What the probe adds; the loader's refusal only where its reason is not known already.
fn told(probe: &Probe, nothing_against: bool, findings: &mut Findings) {
    match probe {
        Probe::Told(Loaded::Plugin { api_version: API_VERSION, .. }) => {}
        Probe::Told(Loaded::Plugin { api_version, .. }) => findings.against(format!(
            "its interface has version {api_version}, every NIXL up to 1.5.1 takes {API_VERSION} only and then says `unsupported backend`"
        )),
        Probe::Told(Loaded::Refused(words)) if nothing_against => findings.against(format!("the loader refuses it: {words}")),
        Probe::Told(Loaded::Refused(_) | Loaded::NoInit(_)) => {}
        Probe::Told(Loaded::NoPlugin) => findings.against("its init function returns nothing".to_owned()),
        Probe::Told(Loaded::CoreRefused(words)) => findings.unsure(format!("it cannot be tried: the core does not load here: {words}")),
        Probe::Died(how) => findings.against(format!("a process that loads it {how}")),
        Probe::Hung(seconds) => findings.against(format!("a process that loads it does not come back within {seconds} s")),
        Probe::NotRun(why) => findings.unsure(format!("its interface version was not read: {why}")),
    }
}

fn say(gap: &Gap) -> String {
    match gap {
        Gap::Library { soname, needed_by } => format!("{needed_by} needs {soname}, which is not found"),
        Gap::Version { library, version, needed_by } => {
            format!(
                "{needed_by} needs version {version}, which {library} does not have: it was built on a newer system"
            )
        }
        Gap::Symbol { name, needed_by } => {
            format!("{needed_by} needs the symbol {name}, which nobody defines{}", hint(name))
        }
    }
}

fn hint(symbol: &str) -> &'static str {
    if symbol.contains("4absl") {
        " (it was built with another Abseil)"
    } else if symbol.contains("nixl") {
        " (it belongs to another release of NIXL)"
    } else if symbol.starts_with("_ZNSt") || symbol.starts_with("_ZNKSt") || symbol.starts_with("_ZSt") {
        " (it was built with a newer C++ compiler than the core)"
    } else {
        ""
    }
}

/// `UCX` of `libplugin_UCX.so`.
fn name_of(plugin: &Path) -> String {
    let file = name(plugin);
    let stem = file.strip_suffix(".so").unwrap_or(&file);
    PREFIXES.iter().find_map(|prefix| stem.strip_prefix(prefix)).unwrap_or(stem).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_who_has_what_is_missing_is_named_once() {
        let said =
            providers(&["libcudart.so.12", "libcufile.so.0", "libcudart.so.13", "libodd.so.1"].map(str::to_owned));
        assert_eq!(said, "the CUDA runtime and CUDA's libcufile and the package that has libodd.so.1");
    }
}
