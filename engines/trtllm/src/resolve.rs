//! What a configuration and an environment mean together.

use serde::Serialize;

use crate::config::{Backend, Located, TransceiverConfig};
use crate::contradiction::Contradiction;
use crate::environment::Environment;
use crate::finding::{Finding, Severity, Source};
use crate::follow::Follow;
use crate::peers::{Carried, Peers, Unreachable};
use crate::plan::{Carrier, Credits, Deadlines, Method, NixlBackend, Plan, Resolved};

/// A plan, if there can be one, and everything there is to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Resolution {
    /// `None` when a finding is an error.
    pub plan: Option<Plan>,
    /// In the order in which things are decided.
    pub findings: Vec<Finding>,
}

impl Resolution {
    /// The worst of the findings.
    pub fn severity(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}

/// Resolves `config`, which was read from `file` (a name for messages), in `environment`, for such peers.
pub fn resolve(
    config: &TransceiverConfig,
    file: &str,
    environment: &Environment,
    follow: Follow,
    peers: Peers,
) -> Resolution {
    let mut resolver = Resolver { config, file, environment, follow, peers, findings: Vec::new() };
    resolver.keys();
    let plan = resolver.method().and_then(|method| resolver.plan(method));
    Resolution { plan, findings: resolver.findings }
}

/// TensorRT-LLM asks these in this order when the backend is DEFAULT; only "1" counts.
const CHOOSERS: [(&str, Backend); 4] = [
    ("TRTLLM_USE_NIXL_KVCACHE", Backend::Nixl),
    ("TRTLLM_USE_UCX_KVCACHE", Backend::Ucx),
    ("TRTLLM_USE_MOONCAKE_KVCACHE", Backend::Mooncake),
    ("TRTLLM_USE_MPI_KVCACHE", Backend::Mpi),
];
const MISSPELT: &str = "TRTLLM_USE_UCX_KV_CACHE";
const NIXL_BACKEND: &str = "TRTLLM_NIXL_KVCACHE_BACKEND";
const TIMEOUT_MS: u64 = 60_000;
const FLOOR_MS: u64 = 10_000;

pub(crate) struct Resolver<'a> {
    pub(crate) config: &'a TransceiverConfig,
    file: &'a str,
    pub(crate) environment: &'a Environment,
    follow: Follow,
    peers: Peers,
    findings: Vec<Finding>,
}

impl Resolver<'_> {
    pub(crate) fn say(
        &mut self,
        severity: Severity,
        code: &'static str,
        source: Source,
        message: String,
        remedy: Option<String>,
    ) {
        self.findings.push(Finding { severity, code, message, remedy, source, contradiction: None });
    }

    /// Names who contradicts the finding that was said last.
    pub(crate) fn but(&mut self, contradiction: Contradiction) {
        if let Some(last) = self.findings.last_mut() {
            last.contradiction = Some(contradiction);
        }
    }

    pub(crate) fn source<T>(&self, located: &Located<T>) -> Source {
        Source::File { file: self.file.to_owned(), at: located.at }
    }

    /// The file's value of a field that is not null, and where from.
    pub(crate) fn given<T: Copy>(&self, field: Option<Located<Option<T>>>) -> Option<(T, Source)> {
        let located = field?;
        Some((located.value?, self.source(&located)))
    }

    pub(crate) fn variable(&self, name: &str) -> Option<(&str, Source)> {
        let value = self.environment.get(name)?;
        Some((value.as_str(), Source::Variable(name.to_owned())))
    }

    fn keys(&mut self) {
        let config = self.config;
        for unknown in &config.unknown {
            let remedy = match unknown.meant {
                Some(meant) => format!("write `{meant}`"),
                None => "remove it, or check that your TensorRT-LLM knows it; nothing here follows from it".to_owned(),
            };
            let message = format!("`{}: {}` is not a field of the known schema", unknown.key.value, unknown.value);
            let source = self.source(&unknown.key);
            self.say(Severity::Warning, "unknown-key", source, message, Some(remedy));
        }
        for repeated in &config.repeated {
            let (source, message) = (
                self.source(repeated),
                format!("`{}` stands there more than once; the last one counts", repeated.value),
            );
            self.say(Severity::Warning, "repeated-key", source, message, Some("keep one".to_owned()));
        }
    }

    fn method(&mut self) -> Option<Resolved<Method>> {
        if let Some((value, source)) = self.variable(MISSPELT) {
            let message = format!("{MISSPELT}={value} is read by nobody; older texts misspell the variable so");
            self.say(
                Severity::Warning,
                "misspelt-variable",
                source,
                message,
                Some("set `backend: UCX` in the file".to_owned()),
            );
        }
        let config = self.config;
        let Some(backend) = config.backend else {
            let source = match config.at {
                Some(at) => Source::File { file: self.file.to_owned(), at },
                None => Source::Default,
            };
            self.off(source, if config.at.is_some() { "has no backend" } else { "is not in the file" });
            return None;
        };
        let source = self.source(&backend);
        let written = match backend.value {
            None => {
                self.off(source, "has the backend null");
                return None;
            }
            Some(written) => written,
        };
        if written == Backend::Default {
            return self.default_method(source);
        }
        for (name, chosen) in CHOOSERS {
            let Some((value, variable)) = self.variable(name).filter(|(value, _)| !value.is_empty()) else { continue };
            if chosen != written {
                let message = format!("{name}={value} has no effect: the file says `backend: {}`", written.name());
                self.say(Severity::Warning, "ignored-variable", variable, message, Some("unset it".to_owned()));
            }
        }
        self.chosen(written, "the file names it", source)
    }

    fn off(&mut self, source: Source, why: &str) {
        let message =
            format!("cache_transceiver_config {why}: TensorRT-LLM transfers no KV cache, so there is nothing to run");
        let remedy = "set `cache_transceiver_config: {backend: DEFAULT}`, or NIXL or UCX".to_owned();
        self.say(Severity::Error, "disaggregation-off", source, message, Some(remedy));
    }

    /// What DEFAULT means.
    fn default_method(&mut self, source: Source) -> Option<Resolved<Method>> {
        let set: Vec<(&'static str, Backend)> = CHOOSERS
            .into_iter()
            .filter(|(name, _)| self.environment.get(*name).is_some_and(|value| value == "1"))
            .collect();
        let first = set.first().copied();
        match (self.follow, first) {
            (_, None) => self.chosen(Backend::Nixl, "DEFAULT means NIXL", source),
            (Follow::Trtllm, Some((name, backend))) => {
                let variable = Source::Variable(name.to_owned());
                if backend != Backend::Nixl {
                    let message = format!(
                        "{name}=1 makes DEFAULT mean {} by TensorRT-LLM's rule; by Dynamo's it stays NIXL",
                        backend.name()
                    );
                    let remedy = match backend {
                        Backend::Ucx => "set `backend: UCX` in the file, which means the same everywhere".to_owned(),
                        other => format!("unset it: kvferry takes the place of {}", other.name()),
                    };
                    self.say(Severity::Warning, "default-by-variable", variable.clone(), message, Some(remedy));
                    self.but(Contradiction::DEFAULT_AND_VARIABLES);
                }
                let reason = format!("DEFAULT, and {name}=1 is the first variable that TensorRT-LLM asks");
                self.chosen(backend, &reason, variable)
            }
            (Follow::Dynamo, Some(_)) => {
                for (name, backend) in set.iter().filter(|(_, backend)| *backend != Backend::Nixl) {
                    let message = format!("{name}=1 with `backend: DEFAULT` does not enable {}", backend.name());
                    let remedy = match backend {
                        Backend::Ucx => {
                            "set `backend: UCX` in the file; --follow trtllm applies TensorRT-LLM's own rule".to_owned()
                        }
                        _ => "unset it; kvferry takes the place of that backend".to_owned(),
                    };
                    self.say(
                        Severity::Warning,
                        "ignored-variable",
                        Source::Variable((*name).to_owned()),
                        message,
                        Some(remedy),
                    );
                    self.but(Contradiction::DEFAULT_AND_VARIABLES);
                }
                self.chosen(
                    Backend::Nixl,
                    "DEFAULT means NIXL, whatever the TRTLLM_USE_*_KVCACHE variables say",
                    source,
                )
            }
        }
    }

    fn chosen(&mut self, backend: Backend, reason: &str, source: Source) -> Option<Resolved<Method>> {
        match backend {
            Backend::Nixl | Backend::Default => Some(self.nixl(reason, source)),
            Backend::Ucx => {
                if let Some((value, variable)) = self.variable(NIXL_BACKEND) {
                    let message = format!("{NIXL_BACKEND}={value} has no effect: the method is UCX, not NIXL");
                    self.say(
                        Severity::Warning,
                        "ignored-variable",
                        variable,
                        message,
                        Some("unset it, or set `backend: NIXL`".to_owned()),
                    );
                }
                Some(Resolved { value: Method::Ucx, reason: reason.to_owned(), source })
            }
            Backend::Mpi => {
                let message =
                    "the MPI backend is deprecated and ties all ranks to one MPI world; kvferry has no such transport"
                        .to_owned();
                self.say(
                    Severity::Error,
                    "refused-backend",
                    source,
                    message,
                    Some("use `backend: UCX`, or DEFAULT".to_owned()),
                );
                None
            }
            Backend::Mooncake => {
                let message = "kvferry does not speak Mooncake's transfer engine".to_owned();
                self.say(
                    Severity::Error,
                    "refused-backend",
                    source,
                    message,
                    Some("use `backend: NIXL`, or DEFAULT".to_owned()),
                );
                None
            }
        }
    }

    /// The library under NIXL; the words are case-sensitive, and TensorRT-LLM takes any other silently for UCX.
    fn nixl(&mut self, reason: &str, source: Source) -> Resolved<Method> {
        let Some((value, variable)) = self.variable(NIXL_BACKEND).map(|(value, source)| (value.to_owned(), source))
        else {
            let reason = format!("{reason}; {NIXL_BACKEND} is not set, so NIXL uses UCX");
            return Resolved { value: Method::Nixl(NixlBackend::Ucx), reason, source };
        };
        let backend = match value.as_str() {
            "UCX" => NixlBackend::Ucx,
            "LIBFABRIC" => NixlBackend::Libfabric,
            other => {
                let message = format!(
                    "{NIXL_BACKEND}={other} is neither UCX nor LIBFABRIC, in capitals; TensorRT-LLM silently uses UCX"
                );
                let upper = other.to_uppercase();
                let meant = if upper == "LIBFABRIC" { upper.as_str() } else { "UCX" };
                self.say(
                    Severity::Warning,
                    "unknown-nixl-backend",
                    variable,
                    message,
                    Some(format!("set {NIXL_BACKEND}={meant}")),
                );
                let reason = format!("{reason}; {NIXL_BACKEND} is no known word, so NIXL uses UCX");
                return Resolved { value: Method::Nixl(NixlBackend::Ucx), reason, source };
            }
        };
        Resolved { value: Method::Nixl(backend), reason: format!("{reason}; {NIXL_BACKEND}={value}"), source: variable }
    }

    fn plan(&mut self, method: Resolved<Method>) -> Option<Plan> {
        let source = method.source.clone();
        let Carried { carrier, reason, note: (code, message, remedy) } = match self.peers.carried(method.value) {
            Ok(carried) => carried,
            Err(Unreachable(code, message, remedy)) => {
                self.say(Severity::Error, code, source, message, Some(remedy));
                return None;
            }
        };
        self.say(Severity::Note, code, source.clone(), message, remedy);
        let transport = Resolved { value: carrier, reason, source };
        let (library_transports, devices) = match carrier {
            Carrier::Ucx | Carrier::Nixl => {
                (self.list("UCX_TLS", "UCX chooses"), self.list("UCX_NET_DEVICES", "every device that UCX finds"))
            }
            Carrier::Libfabric => (
                self.list("FI_PROVIDER", "libfabric chooses"),
                self.list("FI_EFA_IFACE", "every device that libfabric finds"),
            ),
        };
        self.fabric(carrier);
        let deadlines = self.deadlines();
        let credits = self.credits();
        self.combinations(method.value);
        self.without_effect();
        self.elsewhere();
        Some(Plan { method, transport, library_transports, devices, deadlines, credits })
    }

    /// A list from a variable, where `all` and nothing mean everything.
    fn list(&self, name: &str, otherwise: &str) -> Resolved<Vec<String>> {
        let everything = |source| Resolved { value: Vec::new(), reason: otherwise.to_owned(), source };
        let Some((value, source)) = self.variable(name) else { return everything(Source::Default) };
        let words: Vec<String> =
            value.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect();
        if words.is_empty() || words.iter().any(|word| word == "all") {
            return everything(source);
        }
        Resolved { value: words, reason: format!("{name}={value}"), source }
    }

    /// What the environment says about EFA and the other library.
    fn fabric(&mut self, carrier: Carrier) {
        let efa = self.environment.iter().any(|(name, value)| match name.as_str() {
            "FI_PROVIDER" => value == "efa",
            "UCX_TLS" => value.split(',').any(|word| word.trim() == "srd"),
            "UCX_NET_DEVICES" => value.contains("rdmap"),
            name => name.starts_with("FI_EFA_"),
        });
        if efa {
            let library = if carrier == Carrier::Libfabric { "libfabric" } else { "ucx" };
            let message = format!("the environment is one for AWS EFA, and {library} carries the bytes");
            let remedy = "measure both: `kvferry doctor` says what the host is fit for".to_owned();
            self.say(Severity::Note, "efa-backend", Source::Default, message, Some(remedy));
            self.but(Contradiction::EFA_BACKEND);
        }
        if carrier != Carrier::Libfabric {
            let names: Vec<&str> =
                self.environment.keys().map(String::as_str).filter(|name| name.starts_with("FI_")).collect();
            if let Some(first) = names.first() {
                let source = Source::Variable((*first).to_owned());
                let message = format!("{}: without effect here, UCX never loads libfabric", names.join(", "));
                self.say(Severity::Note, "without-effect", source, message, None);
            }
        }
        if carrier == Carrier::Libfabric {
            let names: Vec<&str> =
                self.environment.keys().map(String::as_str).filter(|name| name.starts_with("UCX_")).collect();
            if let Some(first) = names.first() {
                let source = Source::Variable((*first).to_owned());
                let message = format!("{}: without effect here, libfabric never loads UCX", names.join(", "));
                self.say(Severity::Note, "without-effect", source, message, None);
            }
        }
    }

    fn deadlines(&mut self) -> Deadlines {
        let cap_ms = match (self.config.kv_transfer_timeout_ms, self.given(self.config.kv_transfer_timeout_ms)) {
            (_, Some((value, source))) => Resolved { value, reason: "kv_transfer_timeout_ms".to_owned(), source },
            (Some(null), None) => {
                let source = self.source(&null);
                let message = "kv_transfer_timeout_ms is null: TensorRT-LLM would wait for ever; kvferry waits for nothing without a deadline";
                let remedy = format!("give milliseconds; {TIMEOUT_MS} are used");
                self.say(Severity::Warning, "no-timeout", source.clone(), message.to_owned(), Some(remedy));
                Resolved { value: TIMEOUT_MS, reason: "null, and every wait has a deadline".to_owned(), source }
            }
            (None, None) => {
                let message = format!("kv_transfer_timeout_ms is not given: {TIMEOUT_MS}");
                self.say(Severity::Note, "timeout-default", Source::Default, message, None);
                self.but(Contradiction::TIMEOUT_DEFAULT);
                Resolved { value: TIMEOUT_MS, reason: "TensorRT-LLM's default".to_owned(), source: Source::Default }
            }
        };
        let floor_ms = if cap_ms.value < FLOOR_MS {
            let reason = "no longer than the cap".to_owned();
            Resolved { value: cap_ms.value, reason, source: cap_ms.source.clone() }
        } else {
            let reason = "kvferry's allowance for scheduling noise".to_owned();
            Resolved { value: FLOOR_MS, reason, source: Source::Default }
        };
        Deadlines { cap_ms, floor_ms }
    }

    /// A count from a variable; what is no count is said and left to TensorRT-LLM's default.
    fn count(&mut self, name: &str) -> Option<(u32, Source)> {
        let (value, source) = self.variable(name).map(|(value, source)| (value.to_owned(), source))?;
        match value.parse::<u32>() {
            Ok(count) if (1..=4096).contains(&count) => Some((count, source)),
            _ => {
                let message = format!("{name}={value} is not a count");
                let remedy = "use a whole number from 1 to 4096, or unset it".to_owned();
                self.say(Severity::Warning, "bad-count", source, message, Some(remedy));
                None
            }
        }
    }

    fn credits(&mut self) -> Credits {
        let unlimited = || Resolved {
            value: None,
            reason: "kvferry needs no buffers per transfer; the node's own limit holds".to_owned(),
            source: Source::Default,
        };
        let concurrent = self.variable("TRTLLM_REQUEST_KV_CACHE_CONCURRENT").is_some_and(|(value, _)| value == "1");
        let receive = self.count("TRTLLM_KVCACHE_RECV_BUFFER_COUNT");
        let decode_handovers = match receive {
            Some((count, source)) if concurrent => {
                Resolved { value: Some(count), reason: "as many receive buffers were asked for".to_owned(), source }
            }
            Some((count, source)) => {
                let message = format!(
                    "TRTLLM_KVCACHE_RECV_BUFFER_COUNT={count} counts only with TRTLLM_REQUEST_KV_CACHE_CONCURRENT=1"
                );
                self.say(Severity::Note, "ignored-variable", source, message, None);
                unlimited()
            }
            None => unlimited(),
        };
        let prefill_handovers = match self.count("TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM") {
            Some((count, source)) => {
                Resolved { value: Some(count), reason: "as many sends at once were asked for".to_owned(), source }
            }
            None => unlimited(),
        };
        if let Some((tokens, source)) = self.given(self.config.max_tokens_in_buffer) {
            let message = format!(
                "max_tokens_in_buffer: {tokens} sizes TensorRT-LLM's buffers; kvferry has none: blocks go from pool to pool, those of longer \
                 prompts, too, and what is under way is bounded by the node's credits for handovers and blocks"
            );
            self.say(Severity::Note, "no-buffer", source, message, None);
        }
        Credits { decode_handovers, prefill_handovers }
    }
}
