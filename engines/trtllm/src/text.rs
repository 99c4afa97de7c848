//! Files that should be text.

use thiserror::Error;

/// What is no UTF-8, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("byte {at} is not UTF-8 text")]
#[non_exhaustive]
pub struct NotText {
    /// Counted from 1.
    pub line: usize,
    /// The first byte that is none, counted from 0 from the beginning of the file.
    pub at: usize,
}

/// A file's bytes as text.
///
/// # Errors
/// Where they are not UTF-8.
pub fn text_of(bytes: Vec<u8>) -> Result<String, NotText> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count();
        NotText { line, at }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_told_with_its_place() {
        assert_eq!(text_of("a: ü\n".into()).as_deref(), Ok("a: ü\n"));
        assert_eq!(text_of(b"a: 1\nb: \xff".into()), Err(NotText { line: 2, at: 8 }));
    }
}
