// What is done with an engine's configuration and an environment. Shared by the fuzz target and the corpus test, by `include!`.

use kvferry_trtllm::{Follow, Peers, Severity, TransceiverConfig, parse_environment, resolve};

/// Reads `bytes` as a configuration and, behind a line `%env`, an environment: there is a plan or an error, and what is wrong has its place and a remedy.
fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (yaml, variables) = text.split_once("\n%env\n").unwrap_or((&text, ""));
    let environment = match parse_environment(variables) {
        Ok(environment) => environment,
        Err(error) => {
            assert!((1..=variables.lines().count()).contains(&error.line), "{error}");
            return;
        }
    };
    let config = match TransceiverConfig::parse(yaml) {
        Ok(config) => config,
        Err(error) => {
            let error = error.to_string();
            let place = error.split(':').next().unwrap_or_default();
            assert!(place.parse::<usize>().is_ok() || error.starts_with("it has "), "no place: {error}");
            return;
        }
    };
    for follow in Follow::ALL {
        for peers in [Peers::Kvferry, Peers::Nixl] {
            let resolution = resolve(&config, "c.yaml", &environment, follow, peers);
            let refused = resolution.severity() == Some(Severity::Error);
            assert!(resolution.plan.is_some() != refused, "{resolution:?}");
            for finding in &resolution.findings {
                let needs = finding.severity != Severity::Note;
                assert!(!finding.message.is_empty() && (finding.remedy.is_some() || !needs), "{finding:?}");
            }
            let said: usize = resolution.findings.iter().map(|finding| finding.message.len()).sum();
            assert!(said <= 8 * bytes.len() + (64 << 10), "{said} bytes are said of {}", bytes.len());
            if let Some(plan) = &resolution.plan {
                assert!(plan.deadlines.cap_ms.value >= plan.deadlines.floor_ms.value, "{plan:?}");
            }
        }
    }
}
