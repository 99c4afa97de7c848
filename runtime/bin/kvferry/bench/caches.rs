//! The caches of this machine's processors, so that a transfer can be measured that finds nothing there because of those before it.

use std::fs;
use std::hint::black_box;
use std::path::Path;

const LINE_BYTES: usize = 64;
/// What is assumed where the kernel does not say.
const USUAL_BYTES: usize = 64 << 20;
/// Twice as much is written at most.
const BYTES_MAX: usize = 1 << 30;

/// Bytes of the first processor's largest cache, by `root/index*/size`: `32768K`, `32M` or a plain number.
fn largest(root: &Path) -> Option<usize> {
    let entries = fs::read_dir(root).ok()?;
    entries.flatten().filter_map(|entry| size(fs::read_to_string(entry.path().join("size")).ok()?.trim())).max()
}

fn size(text: &str) -> Option<usize> {
    let digits = text.trim_end_matches(['K', 'M']);
    let unit = match text.get(digits.len()..)? {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

/// Bytes after which nothing older is in a cache.
pub(crate) fn bytes_to_fill() -> usize {
    let largest = largest(Path::new("/sys/devices/system/cpu/cpu0/cache")).unwrap_or(USUAL_BYTES);
    2 * largest.clamp(1 << 20, BYTES_MAX)
}

/// Writes so many bytes of memory that is given back at once; no more than [`bytes_to_fill`] ever says.
pub(crate) fn fill(bytes: usize) {
    let mut memory = vec![0u8; bytes.min(2 * BYTES_MAX)];
    memory.iter_mut().step_by(LINE_BYTES).for_each(|byte| *byte = 1);
    black_box(&memory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_kernel_writes_them() {
        assert_eq!(size("32768K"), Some(32 << 20));
        assert_eq!(size("32M"), Some(32 << 20));
        assert_eq!(size("512"), Some(512));
        assert_eq!(size("12KM"), None);
        assert_eq!(size("K"), None);
        assert_eq!(size(""), None);
        assert_eq!(size("18446744073709551615K"), None);
    }

    #[test]
    fn the_largest_cache_counts() {
        let root = std::env::temp_dir().join(format!("kvferry-caches-{}", std::process::id()));
        for (index, text) in [("index0", "32K\n"), ("index3", "32768K\n"), ("index2", "1024K\n"), ("uevent", "none")] {
            fs::create_dir_all(root.join(index)).unwrap();
            fs::write(root.join(index).join("size"), text).unwrap();
        }
        assert_eq!(largest(&root), Some(32 << 20));
        assert_eq!(largest(&root.join("absent")), None);
        fs::remove_dir_all(&root).unwrap();
        assert!(bytes_to_fill() >= 2 << 20 && bytes_to_fill() <= 2 * BYTES_MAX);
    }
}
