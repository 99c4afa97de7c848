//! Standard output and standard error, which may be closed, or full.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use crate::options::SimulateError;

/// Prints a line. Whoever has read enough of them, as `head` has, misses no verdict: the exit status is that.
pub(crate) fn say(line: impl Display) -> Result<(), SimulateError> {
    match writeln!(std::io::stdout().lock(), "{line}") {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => {
            Err(SimulateError::Io { what: "writing to standard output".to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Prints a line beside the output. Where that cannot be written, there is nobody left to tell.
pub(crate) fn warn(line: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
