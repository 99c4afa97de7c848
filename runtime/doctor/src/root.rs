//! Where the host is read: live, or from a captured tree.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use kvferry_topology::sysfs::text_up_to;
pub(crate) use kvferry_topology::sysfs::{bytes_up_to, names};

/// Files of /sys and /proc are small; whatever is longer is cut.
const TEXT_MAX: u64 = 4 << 20;
/// Links that one path may lead through, as the kernel has it.
const LINKS_MAX: u32 = 40;
/// Where a loop of links leads.
const NOWHERE: &str = ".nowhere";

/// The folder that stands for `/`.
#[derive(Clone, Debug)]
pub struct SysRoot {
    /// Under which absolute paths are looked up.
    pub(crate) files: PathBuf,
    /// Whose limits, capabilities and maps are read: a number, or `self`.
    pub(crate) process: String,
    /// Not the live host: device nodes may be plain files there.
    pub(crate) captured: bool,
}

/// Whether a device node can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceNode {
    Usable,
    Missing,
    /// It is there and is no character device.
    NotDevice,
    /// What opening it says.
    Refused(String),
}

impl SysRoot {
    /// This host.
    pub fn live() -> SysRoot {
        SysRoot { files: PathBuf::from("/"), process: "self".to_owned(), captured: false }
    }

    /// A copy of a host's `/sys`, `/dev`, `/proc` and libraries below `folder`.
    pub fn captured(folder: &Path) -> SysRoot {
        // However it is called: links may have been made for where it lies.
        let files = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
        SysRoot { files, process: "self".to_owned(), captured: true }
    }

    /// Why it is no copy of a host, if it is none: where there is nothing to look at, nothing would be found to be wrong.
    pub fn flaw(&self) -> Option<&'static str> {
        let is_plain = fs::symlink_metadata(self.at("/sys")).is_ok_and(|metadata| metadata.is_dir());
        if !is_plain || !["/sys/bus", "/sys/class"].iter().any(|folder| !names(&self.file(folder)).is_empty()) {
            return Some("it has no sys with buses and classes of devices");
        }
        names(&self.file("/proc")).is_empty().then_some("it has no proc")
    }

    /// Looks at another process's limits, capabilities and loaded libraries.
    pub fn of_process(mut self, pid: u32) -> SysRoot {
        self.process = pid.to_string();
        self
    }

    /// The environment of the process, as it was started.
    pub fn environment(&self) -> Option<crate::Environment> {
        let text = text(&self.own("environ"))?;
        let pairs = text.split('\0').filter_map(|entry| entry.split_once('='));
        Some(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    pub(crate) fn own(&self, file: &str) -> PathBuf {
        self.file(&format!("/proc/{}/{file}", self.process))
    }

    /// By which name an absolute path is known, its links not followed.
    pub(crate) fn at(&self, absolute: &str) -> PathBuf {
        self.files.join(absolute.trim_start_matches('/'))
    }

    /// Where an absolute path lies; what is read there is of this root.
    pub(crate) fn file(&self, absolute: &str) -> PathBuf {
        self.inside(&self.at(absolute))
    }

    /// The file behind links, if there is one.
    pub(crate) fn real(&self, path: &Path) -> Option<PathBuf> {
        if !self.captured {
            return fs::canonicalize(path).ok();
        }
        Some(self.inside(path)).filter(|path| path.exists())
    }

    /// A path below the root without links. In a captured tree an absolute link is one of that tree's: this host's files are none of it.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix(&self.files).ok().filter(|_| self.captured);
        let Some(below) = below else { return path.to_owned() };
        let mut left: VecDeque<OsString> = parts(below);
        let (mut real, mut links) = (self.files.clone(), 0);
        while let Some(part) = left.pop_front() {
            if part == ".." {
                if real != self.files {
                    real.pop();
                }
                continue;
            }
            let next = real.join(&part);
            let Ok(target) = fs::read_link(&next) else {
                real = next;
                continue;
            };
            links += 1;
            if links > LINKS_MAX {
                return self.files.join(NOWHERE);
            }
            let target = if target.is_absolute() {
                real = self.files.clone();
                // Whoever made the tree may have made its links for where it lies.
                target.strip_prefix(&self.files).unwrap_or(&target).to_owned()
            } else {
                target
            };
            let mut ahead = parts(&target);
            ahead.append(&mut left);
            left = ahead;
        }
        real
    }

    /// The absolute path of a file below the root, for messages.
    pub(crate) fn shown(&self, path: &Path) -> String {
        match path.strip_prefix(&self.files) {
            Ok(inside) => format!("/{}", inside.display()),
            Err(_) => path.display().to_string(),
        }
    }

    pub(crate) fn device_node(&self, name: &str) -> DeviceNode {
        let Some(path) = self.real(&self.at("/dev").join(name)) else { return DeviceNode::Missing };
        let Ok(metadata) = fs::metadata(&path) else { return DeviceNode::Missing };
        match (metadata.file_type().is_char_device(), self.captured) {
            // The tree's node may be this host's device: opening one has effects.
            (true, true) => return DeviceNode::Usable,
            (false, true) if metadata.is_file() => {}
            (false, _) => return DeviceNode::NotDevice,
            (true, false) => {}
        }
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(_) => DeviceNode::Usable,
            Err(error) if error.kind() == ErrorKind::NotFound => DeviceNode::Missing,
            Err(error) => DeviceNode::Refused(error.to_string()),
        }
    }
}

/// The names that a path goes by.
fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().filter_map(part).collect()
}

/// A file's text without the blanks around it; what is not UTF-8 in it is replaced.
pub(crate) fn text(path: &Path) -> Option<String> {
    text_up_to(path, TEXT_MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_a_captured_tree_stay_in_it() {
        let folder = std::env::temp_dir().join(format!("kvferry-root-{}", std::process::id()));
        let root = SysRoot::captured(&folder);
        fs::create_dir_all(folder.join("opt/lib")).unwrap();
        fs::write(folder.join("opt/lib/real.so"), "").unwrap();
        let link = |to: &str, name: &str| symlink(to, folder.join(name)).unwrap();
        link("/opt/lib/real.so", "opt/lib/absolute.so");
        link("real.so", "opt/lib/relative.so");
        link("../../../../opt/lib/absolute.so", "opt/lib/above.so");
        link("/etc/hostname", "opt/lib/out.so");
        link("loop.so", "opt/lib/loop.so");
        link("/opt", "usr");
        link(folder.join("opt/lib/real.so").to_str().unwrap(), "opt/lib/placed.so");
        let real = |name: &str| root.real(&folder.join(name)).map(|real| root.shown(&real));
        for name in ["absolute.so", "relative.so", "above.so", "placed.so", "real.so"] {
            assert_eq!(real(&format!("opt/lib/{name}")).as_deref(), Some("/opt/lib/real.so"), "{name}");
        }
        assert_eq!(real("usr/lib/absolute.so").as_deref(), Some("/opt/lib/real.so"));
        assert!(Path::new("/etc/hostname").exists(), "of the live host, which is not asked");
        for name in ["out.so", "loop.so", "none.so"] {
            assert_eq!(real(&format!("opt/lib/{name}")), None, "{name}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_captured_node_is_not_opened_where_that_has_effects() {
        let folder = std::env::temp_dir().join(format!("kvferry-nodes-{}", std::process::id()));
        let root = SysRoot::captured(&folder);
        fs::create_dir_all(folder.join("dev/folder")).unwrap();
        fs::write(folder.join("dev/copy"), "").unwrap();
        symlink("/dev/null", folder.join("dev/linked")).unwrap();
        let pipe = std::process::Command::new("mkfifo").arg(folder.join("dev/pipe")).status().unwrap();
        assert!(pipe.success() && Path::new("/dev/null").exists());
        for (name, node) in [
            ("copy", DeviceNode::Usable),
            ("linked", DeviceNode::Missing),
            ("pipe", DeviceNode::NotDevice),
            ("folder", DeviceNode::NotDevice),
        ] {
            assert_eq!(root.device_node(name), node, "{name}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
