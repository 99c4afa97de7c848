//! `--env-file`: this program once more, in the environment that a file holds.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use kvferry_trtllm::{parse_environment, text_of};

use crate::error::UsageError;

const OPTION: &str = "--env-file";
/// More than any environment has.
const BYTES_MAX: u64 = 1 << 20;

/// Becomes this program with the same arguments but that one, in that environment and no other: every rank inherits it. Returns only errors.
pub(crate) fn enter(file: &Path) -> Result<Infallible, UsageError> {
    let unreadable = |source| UsageError::EnvironmentFile { file: file.to_owned(), source };
    let text = text(file, BYTES_MAX).map_err(unreadable)?;
    if text.len() as u64 > BYTES_MAX {
        return Err(unreadable(std::io::Error::other(format!("it has more than {BYTES_MAX} bytes"))));
    }
    let environment =
        parse_environment(&text).map_err(|source| UsageError::Environment { file: file.to_owned(), source })?;
    let program = std::env::current_exe().map_err(unreadable)?;
    let mut command = Command::new(program);
    command.args(without(std::env::args_os().skip(1))).env_clear().envs(environment);
    Err(unreadable(command.exec()))
}

/// A text file of the user's; of one that is longer than so many bytes, one byte more, so that whoever takes it sees that.
pub(crate) fn text(file: &Path, bytes_max: u64) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    File::open(file)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    text_of(bytes).map_err(|error| std::io::Error::other(format!("line {}: {error}", error.line)))
}

/// The arguments without `--env-file FILE` and `--env-file=FILE`.
fn without(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut left = Vec::new();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        if text == OPTION {
            arguments.next();
        } else if !text.strip_prefix(OPTION).is_some_and(|rest| rest.starts_with('=')) {
            left.push(argument);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_gone_in_either_form_and_nothing_else() {
        for (given, left) in [
            ("--config a --env-file b --json", "--config a --json"),
            ("--env-file=b --json", "--json"),
            ("--config --env-files --env-file", "--config --env-files"),
        ] {
            let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
            assert_eq!(without(words(given).into_iter()), words(left), "{given}");
        }
    }
}
