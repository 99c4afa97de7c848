//! What there is to say about a configuration, and where a value comes from.

use core::fmt;

use serde::{Serialize, Serializer};

use crate::contradiction::Contradiction;
use kvferry_yaml::Position;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A place in the file.
    File {
        /// As the caller named it.
        file: String,
        /// Where in it.
        at: Position,
    },
    /// A variable of the environment.
    Variable(String),
    /// Nobody said otherwise.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File { file, at } => write!(f, "{file}:{}", at.line),
            Source::Variable(name) => write!(f, "variable {name}"),
            Source::Default => f.write_str("default"),
        }
    }
}

impl Serialize for Source {
    /// As its text.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Probably not what was meant.
    Warning,
    /// There is no plan.
    Error,
}

impl Severity {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// One thing to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which rule; stable, for scripts.
    pub code: &'static str,
    /// What was found.
    pub message: String,
    /// What to do about it, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// What it is about.
    pub source: Source,
    /// Who says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contradiction: Option<Contradiction>,
}
