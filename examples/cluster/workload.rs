//! Which requests are made.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;

use kvferry::{RequestId, RequestSpec};
use serde::Deserialize;

use crate::error::UsageError;
use crate::options::Options;

/// Tokens that one hash of a Mooncake trace stands for.
const HASH_TOKENS: u32 = 512;
/// More than any model reads, and few enough to count blocks of.
const TOKENS_MAX: u64 = 1 << 24;
const REQUESTS_MAX: u64 = 1 << 20;

/// The requests that the options ask for, in order.
pub(crate) fn requests(options: &Options) -> Result<Vec<RequestSpec>, UsageError> {
    if let Some(file) = &options.trace {
        let limit = number("limit", options.limit, REQUESTS_MAX, 1, REQUESTS_MAX)?;
        return trace(file, limit);
    }
    let count = number("requests", options.requests, 16, 1, REQUESTS_MAX)?;
    let tokens = number("isl", options.isl, 1000, 1, TOKENS_MAX)?;
    let spec = |request| RequestSpec {
        request: RequestId(request),
        tokens,
        prefix: Arc::default(),
        prefix_tokens: HASH_TOKENS,
    };
    Ok((0..count).map(spec).collect())
}

/// An option's number, or its default, within its limits.
pub(crate) fn number(
    option: &'static str,
    given: Option<u64>,
    default: u64,
    least: u64,
    most: u64,
) -> Result<u64, UsageError> {
    let value = given.unwrap_or(default);
    let reason = if value < least { "it is too small" } else { "it is too large" };
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(UsageError::Number { option, value, reason, least, most })
    }
}

/// One line of a trace. Requests are made as fast as they are taken, so its times do not matter.
#[derive(Deserialize)]
struct Line {
    input_length: u64,
    hash_ids: Vec<u64>,
}

fn trace(file: &Path, limit: u64) -> Result<Vec<RequestSpec>, UsageError> {
    let unreadable = |source| UsageError::TraceFile { file: file.to_owned(), source };
    let lines = std::io::BufReader::new(std::fs::File::open(file).map_err(unreadable)?).lines();
    let mut requests = Vec::new();
    for (line, text) in (1..).zip(lines) {
        if requests.len() as u64 >= limit {
            break;
        }
        let text = text.map_err(unreadable)?;
        if text.trim().is_empty() {
            continue;
        }
        let before = requests.len();
        let wrong = |reason: String| UsageError::TraceLine { file: file.to_owned(), line, reason, before };
        let Line { input_length: tokens, hash_ids } =
            serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if !(1..=TOKENS_MAX).contains(&tokens) {
            return Err(wrong(format!("input_length is {tokens}, allowed is 1 to {TOKENS_MAX}")));
        }
        let most = tokens.div_ceil(u64::from(HASH_TOKENS));
        if hash_ids.len() as u64 > most {
            return Err(wrong(format!(
                "{} hash_ids for {tokens} tokens, which have {most} blocks of {HASH_TOKENS}",
                hash_ids.len()
            )));
        }
        let request = RequestId(requests.len() as u64);
        requests.push(RequestSpec { request, tokens, prefix: Arc::new(hash_ids), prefix_tokens: HASH_TOKENS });
    }
    if requests.is_empty() { Err(UsageError::TraceEmpty { file: file.to_owned() }) } else { Ok(requests) }
}
