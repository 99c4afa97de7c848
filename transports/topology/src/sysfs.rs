//! Small files and folders, as of /sys and /proc.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// Files of /sys are a page at most.
const TEXT_MAX: u64 = 1 << 16;
/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 8192;

/// A file of /sys as text.
pub(crate) fn text(path: &Path) -> Option<String> {
    text_up_to(path, TEXT_MAX)
}

/// A file's text without the blanks around it; what is not UTF-8 in it is replaced, and what is longer is cut.
pub fn text_up_to(path: &Path, bytes_max: u64) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(bytes_max).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// What a folder holds, in order; of a very long one not all.
pub fn names(folder: &Path) -> Vec<String> {
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
