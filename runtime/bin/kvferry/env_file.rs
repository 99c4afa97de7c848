//! Text and environments from files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use kvferry_trtllm::{Environment, EnvironmentError, NotText, parse_environment, text_of};
use thiserror::Error;

/// More than any environment has.
const BYTES_MAX: u64 = 1 << 20;

/// Why a file could not be taken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum FileError {
    #[error("{}: it cannot be read: {source}; name a readable file", file.display())]
    Read { file: PathBuf, source: std::io::Error },
    #[error("{}: it has more than {limit} bytes; name another file", file.display())]
    TooLong { file: PathBuf, limit: u64 },
    #[error("{}: it has more than {limit} bytes; give its beginning: head -c {limit} {} | kvferry doctor --log -", file.display(), file.display())]
    LongLog { file: PathBuf, limit: u64 },
    #[error("{}:{}: {source}; name another file", file.display(), source.line)]
    NotText { file: PathBuf, source: NotText },
    #[error("{}:{source}", file.display())]
    Line { file: PathBuf, source: EnvironmentError },
}

/// The environment that is judged: a file's, or this process's own.
pub(crate) fn environment(file: Option<&Path>) -> Result<Environment, FileError> {
    match file {
        Some(file) => parse_environment(&read(file, BYTES_MAX)?)
            .map_err(|source| FileError::Line { file: file.to_owned(), source }),
        None => Ok(std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
            .collect()),
    }
}

/// A whole text file of at most `limit` bytes; `-` is standard input.
pub(crate) fn read(file: &Path, limit: u64) -> Result<String, FileError> {
    text_of(bytes(file, limit)?).map_err(|source| FileError::NotText { file: file.to_owned(), source })
}

/// The same for a log, of any encoding: what is not UTF-8 is replaced.
pub(crate) fn read_log(file: &Path, limit: u64) -> Result<String, FileError> {
    let bytes = bytes(file, limit).map_err(|error| match error {
        FileError::TooLong { file, limit } => FileError::LongLog { file, limit },
        error => error,
    })?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

fn bytes(file: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read { file: file.to_owned(), source };
    let mut bytes = Vec::new();
    if file.as_os_str() == "-" {
        std::io::stdin().take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        File::open(file).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    }
    if bytes.len() as u64 > limit {
        return Err(FileError::TooLong { file: file.to_owned(), limit });
    }
    Ok(bytes)
}
