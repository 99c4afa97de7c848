//! `nixlSerDes`: a sequence of fields, each a tag, a length of eight bytes (little-endian), so many bytes and a bar.
//!
//! There is no count, version, escape or checksum; order is fixed, and a reader knows which tag comes next
//! (`src/utils/serdes/serdes.cpp` of NIXL 1.5.1).

use bytes::Bytes;

use crate::WireError;

/// What every sequence begins with.
const MAGIC: &[u8] = b"nixlSerDes|";
const BAR: u8 = b'|';

/// Writes fields.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new() -> Writer {
        Writer(MAGIC.to_vec())
    }

    pub(crate) fn field(&mut self, tag: &str, data: &[u8]) {
        self.parts(tag, &[data]);
    }

    /// One field of several parts.
    pub(crate) fn parts(&mut self, tag: &str, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        self.0.extend_from_slice(tag.as_bytes());
        self.0.extend_from_slice(&(bytes as u64).to_le_bytes());
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
        self.0.push(BAR);
    }

    pub(crate) fn number(&mut self, tag: &str, number: u64) {
        self.field(tag, &number.to_le_bytes());
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads fields whose tags are known beforehand. What it gives shares the input's memory.
pub(crate) struct Reader {
    bytes: Bytes,
    at: usize,
}

impl Reader {
    pub(crate) fn new(bytes: Bytes) -> Result<Reader, WireError> {
        match bytes.get(..MAGIC.len()) {
            Some(MAGIC) => Ok(Reader { bytes, at: MAGIC.len() }),
            Some(_) => Err(WireError::NotNixl),
            None => Err(WireError::Cut { at: bytes.len(), what: "nixlSerDes|" }),
        }
    }

    /// Where the next field begins.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// The next field, of at most so many bytes.
    pub(crate) fn field(&mut self, tag: &'static str, bytes_max: usize) -> Result<Bytes, WireError> {
        let start = self.at;
        let cut = WireError::Cut { at: start, what: tag };
        let after_tag = start + tag.len();
        match self.bytes.get(start..after_tag) {
            Some(found) if found == tag.as_bytes() => {}
            Some(_) => return Err(WireError::Tag { at: start, expected: tag }),
            None => return Err(cut),
        }
        let after_length = after_tag + 8;
        let length = self.bytes.get(after_tag..after_length).and_then(|bytes| bytes.try_into().ok());
        let length = u64::from_le_bytes(length.ok_or_else(|| cut.clone())?);
        let known = usize::try_from(length).ok().filter(|length| *length <= bytes_max);
        let length = known.ok_or(WireError::TooLong { at: start, field: tag, bytes: length, max: bytes_max })?;
        let end = after_length + length;
        match self.bytes.get(end) {
            Some(&BAR) => {
                self.at = end + 1;
                Ok(self.bytes.slice(after_length..end))
            }
            Some(_) => Err(WireError::Bar { at: end, field: tag }),
            None => Err(cut),
        }
    }

    pub(crate) fn number(&mut self, tag: &'static str) -> Result<u64, WireError> {
        let at = self.at;
        let field = self.field(tag, 8)?;
        let bytes = field.as_ref().try_into();
        Ok(u64::from_le_bytes(bytes.map_err(|_| WireError::Size { at, field: tag, bytes: field.len(), needed: 8 })?))
    }

    /// A number that counts what follows.
    pub(crate) fn count(&mut self, tag: &'static str, max: usize) -> Result<usize, WireError> {
        let at = self.at;
        let number = self.number(tag)?;
        let count = usize::try_from(number).ok().filter(|count| *count <= max);
        count.ok_or(WireError::TooMany { at, field: tag, number, max })
    }

    pub(crate) fn text(&mut self, tag: &'static str, bytes_max: usize) -> Result<String, WireError> {
        let at = self.at;
        let bytes = self.field(tag, bytes_max)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| WireError::NotText { at, field: tag })
    }

    /// A field that always says the same.
    pub(crate) fn constant(&mut self, tag: &'static str, value: &'static str) -> Result<(), WireError> {
        let at = self.at;
        match self.field(tag, value.len())?.as_ref() == value.as_bytes() {
            true => Ok(()),
            false => Err(WireError::Value { at, expected: value }),
        }
    }
}
