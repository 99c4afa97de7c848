//! `kvferry config check`: what a TensorRT-LLM configuration means here.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use kvferry_trtllm::{
    Contradiction, FILE_BYTES_MAX, Finding, Follow, Peers, Plan, Resolution, Resolved, Severity, TransceiverConfig,
    resolve,
};
use serde::Serialize;

use crate::env_file;

/// Configurations of serving engines.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    Check(Check),
    Contradictions(Contradictions),
}

/// Where documents and code of the field contradict each other about what `config check` resolves, and what kvferry does.
#[derive(Clone, Debug, Args)]
struct Contradictions {
    /// Print one JSON list.
    #[arg(long)]
    json: bool,
}

/// Resolve `cache_transceiver_config` of a TensorRT-LLM YAML, and print what it means and why.
///
/// Method, transport, devices, deadlines and credits are printed with the reason and the source (file:line, variable or default) of each;
/// then what is ignored, misspelt, contradicted by another document, or refused, with a remedy.
///
/// Exits with 0 when there is a plan, with 1 when there is one and something is probably not what was meant, with 2 when there is none.
#[derive(Clone, Debug, Args)]
struct Check {
    /// The engine's configuration; `-` for standard input.
    file: PathBuf,

    /// The environment as NAME=value lines, instead of this process's own.
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,

    /// Whose rule says what `backend: DEFAULT` means: trtllm, its code, where the first TRTLLM_USE_*_KVCACHE=1 chooses, or dynamo, its page, where
    /// DEFAULT is NIXL whatever variables say.
    #[arg(long, value_name = "NAME", default_value_t = Follow::default(), value_parser = PossibleValuesParser::new(Follow::ALL.map(Follow::name)).try_map(|name| name.parse::<Follow>()))]
    follow: Follow,

    /// Who is on the other side.
    #[arg(long, value_enum, default_value_t = OtherSide::Kvferry)]
    peers: OtherSide,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Who is on the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OtherSide {
    /// kvferry's own nodes.
    Kvferry,
    /// NIXL agents of other programs.
    Nixl,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    file: String,
    follow: Follow,
    peers: Peers,
    status: &'static str,
    #[serde(flatten)]
    resolution: &'a Resolution,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> ExitCode {
    let (name, resolved) = match &options.command {
        Command::Check(check) => ("check", check.resolve()),
        Command::Contradictions(list) => ("contradictions", list.text().map(|text| (text, ExitCode::SUCCESS))),
    };
    let (text, code) = match resolved {
        Ok(resolved) => resolved,
        Err(error) => {
            eprintln!("kvferry config {name}: {error}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = write!(std::io::stdout(), "{text}") {
        eprintln!("kvferry config {name}: the result cannot be written: {error}");
        return ExitCode::from(2);
    }
    code
}

impl Contradictions {
    fn text(&self) -> Result<String, String> {
        if self.json {
            let json = serde_json::to_string_pretty(&Contradiction::ALL).map_err(|error| error.to_string())?;
            return Ok(format!("{json}\n"));
        }
        let mut text = String::new();
        for Contradiction { about, claims, here } in Contradiction::ALL {
            text.push_str(&format!("{about}\n"));
            for claim in claims {
                text.push_str(&format!("  {}: {}\n", claim.by, claim.says));
            }
            text.push_str(&format!("  here: {here}\n"));
        }
        Ok(text)
    }
}

impl Check {
    fn resolve(&self) -> Result<(String, ExitCode), String> {
        let name = self.file.display().to_string();
        let text = env_file::read(&self.file, FILE_BYTES_MAX as u64).map_err(|error| error.to_string())?;
        let environment = env_file::environment(self.env_file.as_deref()).map_err(|error| error.to_string())?;
        let config = TransceiverConfig::parse(&text).map_err(|error| format!("{name}:{error}"))?;
        let peers = match self.peers {
            OtherSide::Kvferry => Peers::Kvferry,
            OtherSide::Nixl => Peers::Nixl,
        };
        let resolution = resolve(&config, &name, &environment, self.follow, peers);
        let (status, code) = match resolution.severity() {
            Some(Severity::Error) => ("error", 2),
            Some(Severity::Warning) => ("warning", 1),
            _ => ("ok", 0),
        };
        let printed = if self.json {
            let report = Report { file: name, follow: self.follow, peers, status, resolution: &resolution };
            let json = serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?;
            format!("{json}\n")
        } else {
            table(&resolution)
        };
        Ok((printed, ExitCode::from(code)))
    }
}

fn table(resolution: &Resolution) -> String {
    let mut text = String::new();
    if let Some(plan) = &resolution.plan {
        for [name, value, source, reason] in rows(plan) {
            text.push_str(&format!("{name:<20} {value:<28} {source}: {reason}\n"));
        }
        text.push('\n');
    }
    for finding in &resolution.findings {
        text.push_str(&lines(finding));
    }
    text
}

fn rows(plan: &Plan) -> Vec<[String; 4]> {
    fn row<T>(name: &str, resolved: &Resolved<T>, value: impl FnOnce(&T) -> String) -> [String; 4] {
        [name.to_owned(), value(&resolved.value), resolved.source.to_string(), resolved.reason.clone()]
    }
    let list = |words: &Vec<String>| if words.is_empty() { "all".to_owned() } else { words.join(",") };
    let limit = |count: &Option<u32>| count.map_or("the node's limit".to_owned(), |count| count.to_string());
    let milliseconds = |ms: &u64| format!("{ms} ms");
    vec![
        row("method", &plan.method, |method| method.name().to_owned()),
        row("transport", &plan.transport, |carrier| carrier.name().to_owned()),
        row("library transports", &plan.library_transports, list),
        row("devices", &plan.devices, list),
        row("deadline at most", &plan.deadlines.cap_ms, milliseconds),
        row("deadline at least", &plan.deadlines.floor_ms, milliseconds),
        row("decode handovers", &plan.credits.decode_handovers, limit),
        row("prefill handovers", &plan.credits.prefill_handovers, limit),
    ]
}

fn lines(finding: &Finding) -> String {
    let mut text = format!("{}: {} ({})\n", finding.severity.name(), finding.message, finding.source);
    if let Some(remedy) = &finding.remedy {
        text.push_str(&format!("  do: {remedy}\n"));
    }
    if let Some(contradiction) = &finding.contradiction {
        for claim in contradiction.claims {
            text.push_str(&format!("  {}: {}\n", claim.by, claim.says));
        }
    }
    text
}
