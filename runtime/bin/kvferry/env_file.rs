//! Environments from files, as `docker run --env-file` and shells write them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

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
    #[error("{}:{line}: `{found}` is not NAME=value; correct the line", file.display())]
    Line { file: PathBuf, line: usize, found: String },
}

/// The environment that is judged: a file's, or this process's own.
pub(crate) fn environment(file: Option<&Path>) -> Result<BTreeMap<String, String>, FileError> {
    match file {
        Some(file) => parse(&read(file, BYTES_MAX)?, file),
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

/// `NAME=value` per line; `export `, comments, blank lines and one pair of quotes around a value are allowed.
fn parse(text: &str, file: &Path) -> Result<BTreeMap<String, String>, FileError> {
    let mut environment = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let assignment = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let name_and_value = assignment.split_once('=').filter(|(name, _)| is_name(name));
        let Some((name, value)) = name_and_value else {
            let found = line.chars().take(60).collect();
            return Err(FileError::Line { file: file.to_owned(), line: index + 1, found });
        };
        let quoted = |quote: char| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
        environment.insert(name.to_owned(), value.to_owned());
    }
    Ok(environment)
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|first: char| first.is_ascii_digit())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_env_files_hold_is_read_and_what_they_cannot_is_named_with_its_line() {
        let text = "# EFA\n\nFI_PROVIDER=efa\nexport A=\"b c\"\nB='d'\nC=\nD=x=y\n";
        let read = parse(text, Path::new("worker.env")).unwrap();
        let pairs: Vec<(&str, &str)> = read.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("A", "b c"), ("B", "d"), ("C", ""), ("D", "x=y"), ("FI_PROVIDER", "efa")]);
        for wrong in ["FI_PROVIDER", "=x", "9A=x", "A B=x", "- name: FI_PROVIDER"] {
            let error = parse(&format!("X=1\n{wrong}\n"), Path::new("worker.env")).unwrap_err().to_string();
            assert!(error.starts_with("worker.env:2: ") && error.contains(wrong), "{error}");
        }
    }
}
