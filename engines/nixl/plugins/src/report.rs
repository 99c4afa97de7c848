//! What is said of one plugin.

use std::path::PathBuf;

use kvferry_plugin::Loaded;
use serde::Serialize;

/// Whether it can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All that can be seen fits.
    Compatible,
    /// Nothing speaks against it, and something that matters cannot be seen.
    Unknown,
    /// It does not load, or the core would call it wrongly.
    Incompatible,
}

impl Verdict {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Compatible => "compatible",
            Verdict::Unknown => "unknown",
            Verdict::Incompatible => "incompatible",
        }
    }
}

/// A library that the plugin needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// Its name.
    pub soname: String,
    /// Which file it is, if one is found.
    pub path: Option<PathBuf>,
    /// Whether it comes with the core, and so wins over the plugin's own copy.
    pub from_core: bool,
}

/// The vtable of `nixlBackendEngine`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fingerprint {
    /// Its size.
    pub bytes: u64,
    /// Virtual functions, destructors included.
    pub slots: usize,
    /// Releases that have one of that size, where they are known.
    pub releases: Option<&'static str>,
    /// The core's plugin that it was compared with.
    pub compared_with: Option<PathBuf>,
}

/// What a process of its own saw on loading the plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// It told.
    Told(Loaded),
    /// It died first, with how.
    Died(String),
    /// It was ended after so many seconds.
    Hung(u64),
    /// There was none, and why.
    NotRun(String),
}

/// What is said of one plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PluginReport {
    /// The plugin.
    pub file: PathBuf,
    /// What NIXL calls it, from the file's name.
    pub name: String,
    /// Whether it can be used.
    pub verdict: Verdict,
    /// Why; the first is the one that decides.
    pub reasons: Vec<String>,
    /// What to do, unless it is compatible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// What it needs, in the loader's order.
    pub needs: Vec<Need>,
    /// Symbols that nobody defines, mangled; of many the first.
    pub undefined: Vec<String>,
    /// The init functions that it exports.
    pub init: Vec<&'static str>,
    /// Its vtable, if it has one.
    pub vtable: Option<Fingerprint>,
    /// What loading it showed.
    pub probe: Probe,
}
