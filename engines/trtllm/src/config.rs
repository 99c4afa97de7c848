//! `cache_transceiver_config` as it is written.

use std::collections::BTreeMap;
use std::rc::Rc;

use thiserror::Error;

use kvferry_yaml::{Entry, Node, NodeValue as Value, Position, YamlError, shorten};

const SECTION: &str = "cache_transceiver_config";
/// Where an orchestrator's file keeps the configurations of its servers.
const SERVERS: [&str; 2] = ["context_servers", "generation_servers"];

/// A value and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where.
    pub at: Position,
}

/// What `backend` may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Whatever TensorRT-LLM thinks best.
    Default,
    /// UCX itself.
    Ucx,
    /// NIXL agents.
    Nixl,
    /// Mooncake's transfer engine.
    Mooncake,
    /// MPI, deprecated.
    Mpi,
}

impl Backend {
    const ALL: [(&'static str, Backend); 5] = [
        ("DEFAULT", Backend::Default),
        ("UCX", Backend::Ucx),
        ("NIXL", Backend::Nixl),
        ("MOONCAKE", Backend::Mooncake),
        ("MPI", Backend::Mpi),
    ];

    /// Its word in the file.
    pub fn name(self) -> &'static str {
        Backend::ALL.iter().find(|(_, backend)| *backend == self).map_or("", |(name, _)| *name)
    }
}

/// What `transceiver_runtime` may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransceiverRuntime {
    /// The C++ runtime.
    Cpp,
    /// The Python runtime.
    Python,
    /// Each server decides for itself.
    Auto,
}

/// A key that no known schema has, with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    /// The key.
    pub key: Located<String>,
    /// What it says, shortened.
    pub value: String,
    /// The known key that was perhaps meant.
    pub meant: Option<&'static str>,
}

/// The section. A field that is absent is `None`; one that is null is there, with `None` as its value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransceiverConfig {
    /// Where the section begins; `None` when the file has none.
    pub at: Option<Position>,
    /// The transfer method; null turns disaggregation off.
    pub backend: Option<Located<Option<Backend>>>,
    /// The implementation.
    pub transceiver_runtime: Option<Located<Option<TransceiverRuntime>>>,
    /// Tokens that a pre-allocated transfer buffer holds.
    pub max_tokens_in_buffer: Option<Located<Option<u64>>>,
    /// The deadline of a request's transfer.
    pub kv_transfer_timeout_ms: Option<Located<Option<u64>>>,
    /// A slice of the sender's waiting.
    pub kv_transfer_sender_future_timeout_ms: Option<Located<Option<u64>>>,
    /// The Python runtime's poll interval.
    pub kv_transfer_poll_interval_ms: Option<Located<Option<u64>>>,
    /// MiB of a bounce buffer per region.
    pub kv_cache_bounce_size_mb: Option<Located<Option<u64>>>,
    /// Whether finished prefill chunks are sent while later ones compute.
    pub enable_pipelined_transfer: Option<Located<Option<bool>>>,
    /// MiB of the C++ agent's buffer.
    pub agent_buffer_size_mb: Option<Located<Option<u64>>>,
    /// Parameters of the C++ bounce path, as written; they have no counterpart here.
    pub agent_bounce_params: Option<Located<String>>,
    /// Keys that are not known, in the file's order.
    pub unknown: Vec<UnknownKey>,
    /// Keys that stand there more than once; the last one counts, as in PyYAML.
    pub repeated: Vec<Located<String>>,
}

/// Why there is no configuration.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No tree.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// The file is a list or a single value.
    #[error("{at}: the file is {found}, not a mapping: name a TensorRT-LLM engine configuration")]
    NotMapping {
        /// Where.
        at: Position,
        /// What it is.
        found: String,
    },
    /// The section is no mapping.
    #[error("{at}: {SECTION} is {found}, not a mapping: write for example `backend: DEFAULT` below it")]
    NotSection {
        /// Where.
        at: Position,
        /// What it is.
        found: String,
    },
    /// The section belongs to a server in an orchestrator's file.
    #[error("{at}: {SECTION} stands below `{below}`: put that server's section into a file of its own and check each")]
    Orchestrator {
        /// Where.
        at: Position,
        /// Which server.
        below: String,
    },
    /// A key that is a list or a mapping.
    #[error("{at}: a key of {SECTION} is {found}: keys are words")]
    Key {
        /// Where.
        at: Position,
        /// What it is.
        found: String,
    },
    /// A value that the field cannot have.
    #[error("{at}: {field} is {found}: use {allowed}")]
    Value {
        /// Where.
        at: Position,
        /// Which field.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        allowed: String,
    },
}

impl ConfigError {
    /// Where it is, if at one place.
    pub fn at(&self) -> Option<Position> {
        match self {
            ConfigError::Yaml(error) => error.at(),
            ConfigError::NotMapping { at, .. }
            | ConfigError::NotSection { at, .. }
            | ConfigError::Orchestrator { at, .. }
            | ConfigError::Key { at, .. }
            | ConfigError::Value { at, .. } => Some(*at),
        }
    }
}

impl TransceiverConfig {
    /// Reads the section of a TensorRT-LLM YAML. A file without it is a configuration without fields.
    pub fn parse(text: &str) -> Result<TransceiverConfig, ConfigError> {
        let Some(root) = kvferry_yaml::parse(text)?.filter(|root| !root.is_null()) else {
            return Ok(TransceiverConfig::default());
        };
        if !matches!(root.value, Value::Mapping(_)) {
            return Err(ConfigError::NotMapping { at: root.at, found: root.describe() });
        }
        let Some((key, section)) = root.entry(SECTION) else {
            return match orchestrator(&root) {
                Some(error) => Err(error),
                None => Ok(TransceiverConfig::default()),
            };
        };
        if section.is_null() {
            return Ok(TransceiverConfig { at: Some(key.at), ..TransceiverConfig::default() });
        }
        let mut config = TransceiverConfig { at: Some(key.at), ..TransceiverConfig::default() };
        config.repeated.extend(repeats(&root, |name| name == SECTION));
        config.read(section)?;
        Ok(config)
    }

    fn read(&mut self, section: &Rc<Node>) -> Result<(), ConfigError> {
        self.repeated.extend(repeats(section, |name| name != "<<"));
        for (key, node) in entries(section)? {
            let name = key.text().unwrap_or_default();
            match name {
                "backend" => self.backend = Some(backend(&node)?),
                "transceiver_runtime" => self.transceiver_runtime = Some(runtime(&node)?),
                "max_tokens_in_buffer" => self.max_tokens_in_buffer = Some(number(&node, "max_tokens_in_buffer", 1)?),
                "kv_transfer_timeout_ms" => {
                    self.kv_transfer_timeout_ms = Some(number(&node, "kv_transfer_timeout_ms", 1)?);
                }
                "kv_transfer_sender_future_timeout_ms" => {
                    let value = number(&node, "kv_transfer_sender_future_timeout_ms", 1)?;
                    self.kv_transfer_sender_future_timeout_ms = Some(value);
                }
                "kv_transfer_poll_interval_ms" => {
                    self.kv_transfer_poll_interval_ms = Some(number(&node, "kv_transfer_poll_interval_ms", 1)?);
                }
                "kv_cache_bounce_size_mb" => {
                    self.kv_cache_bounce_size_mb = Some(number(&node, "kv_cache_bounce_size_mb", 0)?);
                }
                "enable_pipelined_transfer" => self.enable_pipelined_transfer = Some(flag(&node)?),
                "agent_buffer_size_mb" => {
                    self.agent_buffer_size_mb = Some(number(&node, "agent_buffer_size_mb", 0)?);
                }
                "agent_bounce_params" => {
                    self.agent_bounce_params = Some(Located { value: node.describe(), at: node.at });
                }
                _ => self.unknown.push(UnknownKey {
                    key: Located { value: shorten(name), at: key.at },
                    value: node.describe().replace('`', ""),
                    meant: meant(name),
                }),
            }
        }
        Ok(())
    }
}

const FIELDS: [&str; 10] = [
    "backend",
    "transceiver_runtime",
    "max_tokens_in_buffer",
    "kv_transfer_timeout_ms",
    "kv_transfer_sender_future_timeout_ms",
    "kv_transfer_poll_interval_ms",
    "kv_cache_bounce_size_mb",
    "enable_pipelined_transfer",
    "agent_buffer_size_mb",
    "agent_bounce_params",
];

/// The section's entries, the last of each key, then what merge keys (`<<`) add.
fn entries(section: &Rc<Node>) -> Result<Vec<Entry>, ConfigError> {
    let Value::Mapping(_) = &section.value else {
        return Err(ConfigError::NotSection { at: section.at, found: section.describe() });
    };
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    let mut all: Vec<Entry> = Vec::new();
    let mut merged: Vec<Rc<Node>> = vec![Rc::clone(section)];
    // Merges of merges: each mapping is finished before it can be an alias, so there is no circle; the file's size bounds the list.
    const MERGES_MAX: usize = 256;
    for index in 0..MERGES_MAX {
        let Some(node) = merged.get(index).cloned() else { break };
        let Value::Mapping(entries) = &node.value else {
            return Err(ConfigError::NotSection { at: node.at, found: node.describe() });
        };
        let mut own: BTreeMap<String, usize> = BTreeMap::new();
        for (key, value) in entries {
            let Some(name) = key.text() else {
                return Err(ConfigError::Key { at: key.at, found: key.describe() });
            };
            if name == "<<" {
                match &value.value {
                    Value::Sequence(items) => merged.extend(items.iter().cloned()),
                    _ => merged.push(Rc::clone(value)),
                }
                continue;
            }
            let known = own.get(name).copied();
            match (known.and_then(|at| all.get_mut(at)), found.contains_key(name)) {
                (Some(slot), _) => *slot = (Rc::clone(key), Rc::clone(value)),
                (None, true) => {}
                (None, false) => {
                    own.insert(name.to_owned(), all.len());
                    all.push((Rc::clone(key), Rc::clone(value)));
                }
            }
        }
        found.extend(own);
    }
    Ok(all)
}

fn repeats(node: &Node, counts: impl Fn(&str) -> bool) -> Vec<Located<String>> {
    let Value::Mapping(entries) = &node.value else { return Vec::new() };
    let mut seen = std::collections::BTreeSet::new();
    let names = entries.iter().filter_map(|(key, _)| key.text().map(|name| (name, key.at)));
    let again = names.filter(|(name, _)| counts(name) && !seen.insert(*name));
    again.map(|(name, at)| Located { value: shorten(name), at }).collect()
}

fn orchestrator(root: &Node) -> Option<ConfigError> {
    SERVERS.iter().find_map(|below| {
        let (key, _) = root.entry(below)?.1.entry(SECTION)?;
        Some(ConfigError::Orchestrator { at: key.at, below: (*below).to_owned() })
    })
}

fn wrong(node: &Node, field: &'static str, allowed: &str) -> ConfigError {
    ConfigError::Value { at: node.at, field, found: node.describe(), allowed: allowed.to_owned() }
}

fn backend(node: &Node) -> Result<Located<Option<Backend>>, ConfigError> {
    if node.is_null() {
        return Ok(Located { value: None, at: node.at });
    }
    let known = |text: &str| Backend::ALL.iter().find(|(name, _)| *name == text).map(|(_, backend)| *backend);
    match node.text().and_then(known) {
        Some(backend) => Ok(Located { value: Some(backend), at: node.at }),
        None => Err(wrong(node, "backend", "DEFAULT, NIXL or UCX, in capitals, or null")),
    }
}

fn runtime(node: &Node) -> Result<Located<Option<TransceiverRuntime>>, ConfigError> {
    let value = match node.text() {
        _ if node.is_null() => None,
        Some("CPP") => Some(TransceiverRuntime::Cpp),
        Some("PYTHON") => Some(TransceiverRuntime::Python),
        Some("auto") => Some(TransceiverRuntime::Auto),
        _ => return Err(wrong(node, "transceiver_runtime", "CPP, PYTHON or auto")),
    };
    Ok(Located { value, at: node.at })
}

fn number(node: &Node, field: &'static str, least: u64) -> Result<Located<Option<u64>>, ConfigError> {
    if node.is_null() {
        return Ok(Located { value: None, at: node.at });
    }
    // An i64 is what the other side can hold.
    let value = node.text().and_then(|text| text.parse::<i64>().ok()).and_then(|value| u64::try_from(value).ok());
    match value.filter(|value| *value >= least) {
        Some(value) => Ok(Located { value: Some(value), at: node.at }),
        None => Err(wrong(node, field, &format!("a whole number from {least} on, or null"))),
    }
}

fn flag(node: &Node) -> Result<Located<Option<bool>>, ConfigError> {
    let value = match node.text() {
        _ if node.is_null() => None,
        Some("true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON") => Some(true),
        Some("false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF") => Some(false),
        _ => return Err(wrong(node, "enable_pipelined_transfer", "true or false")),
    };
    Ok(Located { value, at: node.at })
}

/// The field that a misspelt key is at most two letters away from, or whose unit it leaves out, whatever its case and dashes.
fn meant(key: &str) -> Option<&'static str> {
    if key.len() > 64 {
        return None;
    }
    let key: Vec<char> = key.to_lowercase().replace('-', "_").chars().collect();
    let near = |field: &&str| {
        let field: Vec<char> = field.chars().collect();
        distance(&key, &field) <= 2 || (field.starts_with(&key) && field.get(key.len()) == Some(&'_') && key.len() > 8)
    };
    FIELDS.into_iter().find(near)
}

/// Letters to change, add or leave out.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (index, left) in a.iter().enumerate() {
        let mut next = vec![index + 1];
        let mut before = index + 1;
        for ((above, diagonal), right) in row.iter().skip(1).zip(&row).zip(b) {
            before = (above + 1).min(before + 1).min(diagonal + usize::from(left != right));
            next.push(before);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}
