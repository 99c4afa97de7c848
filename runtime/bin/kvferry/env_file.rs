//! Text and environments from files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use kvferry_trtllm::{Environment, EnvironmentError, parse_environment};
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
    #[error("{}: it is not UTF-8 text; name another file", file.display())]
    NotText { file: PathBuf },
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
    String::from_utf8(bytes(file, limit)?).map_err(|_| FileError::NotText { file: file.to_owned() })
}

/// The same for text of any encoding: what is not UTF-8 is replaced.
pub(crate) fn read_lossy(file: &Path, limit: u64) -> Result<String, FileError> {
    Ok(String::from_utf8_lossy(&bytes(file, limit)?).into_owned())
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
