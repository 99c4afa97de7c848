//! Workloads from traces of Mooncake's form: one JSON object per line.

use std::sync::Arc;
use std::time::Duration;

use kvferry_core::limits::TOKENS_MAX;
use serde::Deserialize;
use thiserror::Error;

use super::{CapacityRequest, HASH_TOKENS};

/// A line that is no request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line}: {reason}; expected timestamp (ms), input_length, output_length and hash_ids, one per 512 tokens")]
pub struct TraceError {
    /// Which line, from 1.
    pub line: usize,
    /// Why not.
    pub reason: String,
}

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

/// The first `limit` requests of a trace, which arrive `speed` times as fast as it says. Empty lines count for nothing.
pub fn parse_trace(text: &str, limit: usize, speed: f64) -> Result<Vec<CapacityRequest>, TraceError> {
    let mut requests = Vec::new();
    let mut first = None;
    for (index, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()).take(limit) {
        let wrong = |reason: String| TraceError { line: index + 1, reason };
        let line: Line = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        if !(1..=TOKENS_MAX).contains(&line.input_length) {
            return Err(wrong(format!("input_length is {}, allowed is 1 to {TOKENS_MAX}", line.input_length)));
        }
        if line.output_length > TOKENS_MAX {
            return Err(wrong(format!("output_length is {}, allowed is 0 to {TOKENS_MAX}", line.output_length)));
        }
        let most = line.input_length.div_ceil(u64::from(HASH_TOKENS));
        if line.hash_ids.len() as u64 > most {
            return Err(wrong(format!("{} hash_ids, allowed are {most}", line.hash_ids.len())));
        }
        let first = *first.get_or_insert(line.timestamp);
        let Some(after_ms) = line.timestamp.checked_sub(first) else {
            return Err(wrong(format!("timestamp {} is before the first, {first}", line.timestamp)));
        };
        let after = Duration::try_from_secs_f64(after_ms as f64 / 1e3 / speed);
        requests.push(CapacityRequest {
            after: after.map_err(|error| wrong(format!("timestamp {after_ms} at speed {speed}: {error}")))?,
            input_tokens: line.input_length,
            output_tokens: line.output_length,
            prefix: Arc::new(line.hash_ids),
        });
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_requests() {
        let text = "{\"timestamp\": 1000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [1, 2]}\n\n\
                    {\"timestamp\": 3000, \"input_length\": 9, \"output_length\": 7, \"hash_ids\": []}\n";
        let requests = parse_trace(text, 9, 2.0).expect("a trace");
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[0].after, Duration::ZERO);
        assert_eq!((requests[1].after, requests[1].output_tokens), (Duration::from_secs(1), 7));
        assert_eq!(parse_trace(text, 1, 1.0).expect("a trace").len(), 1);
        for (bad, word) in [
            ("{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 5}", "hash_ids"),
            ("{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 5, \"hash_ids\": []}", "input_length is 0"),
            (
                "{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 99999999999, \"hash_ids\": []}",
                "output_length is 99999999999",
            ),
            ("{\"timestamp\": 0, \"input_length\": 512, \"output_length\": 5, \"hash_ids\": [1, 2]}", "2 hash_ids"),
        ] {
            let error = parse_trace(bad, 1, 1.0).expect_err("no request");
            assert!(error.line == 1 && error.reason.contains(word), "{error}");
        }
        let late =
            format!("{}{}", text, "{\"timestamp\": 0, \"input_length\": 9, \"output_length\": 7, \"hash_ids\": []}");
        assert!(parse_trace(&late, 9, 1.0).expect_err("time goes back").reason.contains("before the first"));
    }
}
