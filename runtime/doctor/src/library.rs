//! Which shared library the loader would take, without loading it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::question::Environment;
use crate::root::{SysRoot, bytes_up_to, names, text};

const DEFAULT_FOLDERS: [&str; 8] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];
/// Bytes of a library that are searched for what it says of itself.
const SEARCHED_MAX: u64 = 64 << 20;

/// A library as the loader finds it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The path by which it is found.
    pub path: PathBuf,
    /// The file behind the links.
    pub real: PathBuf,
    /// Who named the folder.
    pub by: String,
}

/// Where the loader finds `soname`: first what it would take, then what that shadows. `named_by` is a variable that names the file itself.
pub fn find(root: &SysRoot, environment: &Environment, soname: &str, named_by: &str) -> Vec<Found> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut consider = |path: PathBuf, by: String| {
        let Some(real) = root.real(&path).filter(|real| real.is_file()) else { return };
        if seen.insert(real.clone()) {
            found.push(Found { path, real, by });
        }
    };
    if let Some(named) = environment.get(named_by).filter(|path| path.starts_with('/')) {
        consider(root.at(named), named_by.to_owned());
    }
    let folders = environment.get("LD_LIBRARY_PATH").map(String::as_str).unwrap_or_default();
    for (index, folder) in folders.split([':', ';']).enumerate().filter(|(_, folder)| folder.starts_with('/')) {
        consider(root.at(folder).join(soname), format!("LD_LIBRARY_PATH, entry {}", index + 1));
    }
    for folder in configured(root) {
        consider(root.at(&folder).join(soname), "ld.so.conf".to_owned());
    }
    for folder in DEFAULT_FOLDERS {
        consider(root.at(folder).join(soname), "the loader's default folders".to_owned());
    }
    found
}

/// The folders that /etc/ld.so.conf and its conf.d name; the cache is made from them.
fn configured(root: &SysRoot) -> Vec<String> {
    let mut files = vec![root.file("/etc/ld.so.conf")];
    let more = root.file("/etc/ld.so.conf.d");
    files.extend(names(&more).iter().filter(|name| name.ends_with(".conf")).map(|name| root.inside(&more.join(name))));
    let lines = files.iter().filter_map(|file| text(file)).collect::<Vec<_>>().join("\n");
    lines.lines().map(str::trim).filter(|line| line.starts_with('/')).map(str::to_owned).collect()
}

/// What a libfabric says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Libfabric {
    /// The newest `FABRIC_1.N` that it defines.
    pub(crate) abi: u32,
    /// Whether it has the `efa` provider, inside or beside it.
    pub(crate) efa: bool,
}

impl Libfabric {
    pub(crate) fn read(root: &SysRoot, file: &Path) -> Option<Libfabric> {
        let bytes = bytes_up_to(file, SEARCHED_MAX)?;
        const VERSION: &[u8] = b"FABRIC_1.";
        let mut abi = 0;
        let mut efa = false;
        for (at, window) in bytes.windows(VERSION.len()).enumerate() {
            if window == VERSION {
                let digits = bytes.iter().skip(at + VERSION.len()).take(3).take_while(|byte| byte.is_ascii_digit());
                abi = abi.max(digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0')));
            }
            efa |= window.starts_with(b"efa_rdm_");
        }
        let beside = file.parent().map(|folder| names(&root.inside(&folder.join("libfabric")))).unwrap_or_default();
        Some(Libfabric { abi, efa: efa || beside.iter().any(|name| name.starts_with("libefa-fi.so")) })
    }

    /// The releases that define no newer version.
    pub(crate) fn releases(self) -> &'static str {
        match self.abi {
            0..=5 => "before 1.14",
            6 => "1.14 to 1.18",
            7 => "1.20 to 1.22",
            8 => "2.0 to 2.4",
            9 => "2.5 or 2.6",
            _ => "2.7 or newer",
        }
    }
}

/// Which generation of providers a libibverbs loads: `N` of the `-rdmavN.so` with which it completes their names.
pub(crate) fn verbs_generation(file: &Path) -> Option<u32> {
    const SUFFIX: &[u8] = b"-rdmav";
    let bytes = bytes_up_to(file, SEARCHED_MAX)?;
    let at = bytes.windows(SUFFIX.len()).position(|window| window == SUFFIX)?;
    let digits = bytes.iter().skip(at + SUFFIX.len()).take(4).take_while(|byte| byte.is_ascii_digit());
    let number = digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
    (number > 0).then_some(number)
}

/// The version that `<folder>/pkgconfig/<name>.pc` gives, as major and minor.
pub(crate) fn packaged_version(root: &SysRoot, library: &Path, name: &str) -> Option<(u32, u32)> {
    let file = text(&root.inside(&library.parent()?.join("pkgconfig").join(format!("{name}.pc"))))?;
    let version = file.lines().find_map(|line| line.strip_prefix("Version:"))?.trim();
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    Some((numbers.next()??, numbers.next()??))
}
