//! Whose rule is followed where documents and code of the field differ.

use core::fmt;
use core::str::FromStr;

use serde::Serialize;
use thiserror::Error;

/// Whose rule decides what `backend: DEFAULT` means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Follow {
    /// TensorRT-LLM's code: variables choose.
    Trtllm,
    /// Dynamo's page: variables choose nothing.
    #[default]
    Dynamo,
}

/// That is nobody's name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("nobody's rule; use trtllm or dynamo")]
pub struct UnknownRule;

impl Follow {
    /// All of them.
    pub const ALL: [Follow; 2] = [Follow::Trtllm, Follow::Dynamo];

    /// As command lines call it.
    pub fn name(self) -> &'static str {
        match self {
            Follow::Trtllm => "trtllm",
            Follow::Dynamo => "dynamo",
        }
    }
}

impl fmt::Display for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Follow {
    type Err = UnknownRule;

    fn from_str(text: &str) -> Result<Follow, UnknownRule> {
        Follow::ALL.into_iter().find(|follow| follow.name() == text).ok_or(UnknownRule)
    }
}
