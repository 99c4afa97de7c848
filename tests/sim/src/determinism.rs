//! Whether a seed gives the same run again (I8).

use std::fmt;

use crate::cluster::SimError;
use crate::config::Config;
use crate::run::{Run, RunReport};
use crate::trace::{CHECKPOINT_EVERY, Record};

/// Where two runs of one seed part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// The number of the first record that differs, as far as it was found.
    pub record: u64,
    /// It, in either run; `None` when that run had ended, or when the runs did not differ when they were looked at more closely.
    pub records: [Option<Record>; 2],
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "two runs differ from record {} on:", self.record)?;
        for record in &self.records {
            match record {
                Some(record) => write!(f, " [{record}]")?,
                None => write!(f, " [nothing]")?,
            }
        }
        Ok(())
    }
}

/// Runs a configuration again; says where that run parts from `first`, if it does.
pub fn rerun(config: &Config, first: &RunReport) -> Result<Option<Divergence>, SimError> {
    let second = Run::new(config.clone())?.to_end(|_| {});
    if (second.trace_hash, second.events) == (first.trace_hash, first.events) {
        return Ok(None);
    }
    let same = first.checkpoints.iter().zip(&second.checkpoints).take_while(|(one, other)| one == other).count() as u64;
    let part = same * CHECKPOINT_EVERY..(same + 1) * CHECKPOINT_EVERY;
    let text = || -> Result<Vec<Record>, SimError> {
        let mut run = Run::new(config.clone())?;
        run.keep(part.clone());
        Ok(run.to_end(|_| {}).text)
    };
    let (one, other) = (text()?, text()?);
    let alike = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
    let records = [one.get(alike).copied(), other.get(alike).copied()];
    Ok(Some(Divergence { record: part.start + alike as u64, records }))
}
