//! What a check says.

use std::borrow::Cow;

use serde::Serialize;

use crate::plain::plain;

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be, or of no concern here; the evidence says which.
    Ok,
    /// Probably not what was meant.
    Warn,
    /// Does not work, or is not what was expected.
    Fail,
}

impl Status {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

/// One check's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Which; stable, for scripts.
    pub id: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was seen, as a file, variable or line says it.
    pub evidence: Vec<String>,
    /// What to do, exactly; empty when it is ok.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Check {
    pub(crate) fn ok(id: &'static str, evidence: impl Into<String>) -> Check {
        Check { id, status: Status::Ok, evidence: vec![evidence.into()], fix: String::new() }
    }

    pub(crate) fn warn(id: &'static str, evidence: impl Into<String>, fix: impl Into<String>) -> Check {
        Check { id, status: Status::Warn, evidence: vec![evidence.into()], fix: fix.into() }
    }

    pub(crate) fn fail(id: &'static str, evidence: impl Into<String>, fix: impl Into<String>) -> Check {
        Check { id, status: Status::Fail, evidence: vec![evidence.into()], fix: fix.into() }
    }

    /// With more evidence.
    pub(crate) fn and(mut self, evidence: impl IntoIterator<Item = String>) -> Check {
        self.evidence.extend(evidence);
        self
    }
}

/// All checks, in a fixed order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst of them.
    pub status: Status,
    /// Every check.
    pub checks: Vec<Check>,
}

impl Report {
    /// With more checks behind these.
    pub fn with(self, more: impl IntoIterator<Item = Check>) -> Report {
        Report::of(self.checks.into_iter().chain(more).collect())
    }

    pub(crate) fn of(mut checks: Vec<Check>) -> Report {
        // Names of devices, files and objects are not ours.
        for said in checks.iter_mut().flat_map(|check| check.evidence.iter_mut().chain([&mut check.fix])) {
            if let Cow::Owned(plain) = plain(said) {
                *said = plain;
            }
        }
        let status = checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok);
        Report { status, checks }
    }
}
