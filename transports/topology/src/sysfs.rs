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
    Some(String::from_utf8_lossy(&bytes_up_to(path, bytes_max)?).trim().to_owned())
}

/// A file's first bytes. What is no plain file, as a pipe in a tree that somebody captured, is as good as absent: it might never end, or begin.
pub fn bytes_up_to(path: &Path, bytes_max: u64) -> Option<Vec<u8>> {
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(bytes_max).read_to_end(&mut bytes).ok()?;
    Some(bytes)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_are_read_and_no_more_of_them_than_is_asked_for() {
        let folder = std::env::temp_dir().join(format!("kvferry-sysfs-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (file, pipe) = (folder.join("file"), folder.join("pipe"));
        fs::write(&file, "twelve bytes").unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(bytes_up_to(&file, 6).as_deref(), Some(&b"twelve"[..]));
        assert_eq!(text_up_to(&file, 7).as_deref(), Some("twelve"));
        for other in [&pipe, &folder, &folder.join("nothing")] {
            assert_eq!(bytes_up_to(other, 6), None, "{}", other.display());
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
