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

/// The folders that stand for `/sys`, `/dev`, `/proc` and `/`.
#[derive(Clone, Debug)]
pub struct SysRoot {
    pub(crate) sys: PathBuf,
    pub(crate) dev: PathBuf,
    pub(crate) proc: PathBuf,
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
        let at = |path: &str| PathBuf::from(path);
        SysRoot {
            sys: at("/sys"),
            dev: at("/dev"),
            proc: at("/proc"),
            files: at("/"),
            process: "self".to_owned(),
            captured: false,
        }
    }

    /// A copy of a host's `/sys`, `/dev`, `/proc` and libraries below `folder`.
    pub fn captured(folder: &Path) -> SysRoot {
        let at = |name: &str| folder.join(name);
        let process = "self".to_owned();
        SysRoot { sys: at("sys"), dev: at("dev"), proc: at("proc"), files: folder.to_owned(), process, captured: true }
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
        self.proc.join(&self.process).join(file)
    }

    /// Where an absolute path lies.
    pub(crate) fn file(&self, absolute: &str) -> PathBuf {
        self.files.join(absolute.trim_start_matches('/'))
    }

    /// The file behind links, if there is one. In a captured tree an absolute link is one of that tree's: this host's files are none of it.
    pub(crate) fn real(&self, path: &Path) -> Option<PathBuf> {
        if !self.captured {
            return fs::canonicalize(path).ok();
        }
        let mut left: VecDeque<OsString> = parts(path.strip_prefix(&self.files).ok()?);
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
                return None;
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
        real.exists().then_some(real)
    }

    /// The absolute path of a file below the root, for messages.
    pub(crate) fn shown(&self, path: &Path) -> String {
        match path.strip_prefix(&self.files) {
            Ok(inside) => format!("/{}", inside.display()),
            Err(_) => path.display().to_string(),
        }
    }

    pub(crate) fn device_node(&self, name: &str) -> DeviceNode {
        let Some(path) = self.real(&self.dev.join(name)) else { return DeviceNode::Missing };
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
