//! Environments, and files that hold one, as `docker run --env-file` and shells write them.

use std::collections::BTreeMap;

use kvferry_yaml::{shorten, unmarked};
use thiserror::Error;

/// Variables by name.
pub type Environment = BTreeMap<String, String>;

/// A line of such a file that is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{line}: `{found}` is not NAME=value; correct the line")]
pub struct EnvironmentError {
    /// Counted from 1.
    pub line: usize,
    /// The beginning of what stands there.
    pub found: String,
}

/// `NAME=value` per line; `export `, comments, blank lines and one pair of quotes around a value are allowed. Of a name that stands there twice, the
/// last counts.
pub fn parse_environment(text: &str) -> Result<Environment, EnvironmentError> {
    let mut environment = Environment::new();
    for (index, line) in unmarked(text).lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let assignment = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let name_and_value = assignment.split_once('=').filter(|(name, _)| is_name(name));
        let Some((name, value)) = name_and_value.filter(|(_, value)| !value.contains('\0')) else {
            let found = shorten(line);
            return Err(EnvironmentError { line: index + 1, found });
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
    #![allow(clippy::unwrap_used, reason = "this is test code")]

    use super::*;

    #[test]
    fn what_env_files_hold_is_read_and_what_they_cannot_is_named_with_its_line() {
        let text = "# EFA\n\nFI_PROVIDER=efa\nexport A=\"b c\"\nB='d'\nC=\nD=x=y\n";
        let read = parse_environment(text).unwrap();
        let pairs: Vec<(&str, &str)> = read.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("A", "b c"), ("B", "d"), ("C", ""), ("D", "x=y"), ("FI_PROVIDER", "efa")]);
        assert_eq!(parse_environment(&format!("\u{feff}{text}")), Ok(read), "an editor's mark");
        for wrong in ["FI_PROVIDER", "=x", "9A=x", "A B=x", "- name: FI_PROVIDER", "A=b\0c"] {
            let error = parse_environment(&format!("X=1\n{wrong}\n")).unwrap_err();
            assert!(error.to_string().starts_with("2: `"), "{error}");
            assert_eq!((error.line, error.found), (2, shorten(wrong)));
        }
    }
}
