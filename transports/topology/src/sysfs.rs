//! Small files and folders of /sys.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// Files of /sys are a page at most; whatever is longer is cut.
const TEXT_MAX: u64 = 1 << 16;
/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 8192;

/// A file's text without the blanks around it; what is not UTF-8 in it is replaced.
pub(crate) fn text(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(TEXT_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// What a folder holds, in order.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let entries = entries.flatten().take(ENTRIES_MAX);
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A number such as `0x1d0f`.
pub(crate) fn hexadecimal(path: &Path) -> Option<u32> {
    u32::from_str_radix(text(path)?.trim_start_matches("0x"), 16).ok()
}
