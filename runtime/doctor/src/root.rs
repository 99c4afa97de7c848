//! Where the host is read: live, or from a captured tree.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kvferry_topology::sysfs::text_up_to;
pub(crate) use kvferry_topology::sysfs::{bytes_up_to, names};

/// Files of /sys and /proc are small; whatever is longer is cut.
const TEXT_MAX: u64 = 4 << 20;

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

    /// The absolute path of a file below the root, for messages.
    pub(crate) fn shown(&self, path: &Path) -> String {
        match path.strip_prefix(&self.files) {
            Ok(inside) => format!("/{}", inside.display()),
            Err(_) => path.display().to_string(),
        }
    }

    pub(crate) fn device_node(&self, name: &str) -> DeviceNode {
        let path = self.dev.join(name);
        let Ok(metadata) = fs::metadata(&path) else { return DeviceNode::Missing };
        if !metadata.file_type().is_char_device() && !self.captured {
            return DeviceNode::NotDevice;
        }
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(_) => DeviceNode::Usable,
            Err(error) if error.kind() == ErrorKind::NotFound => DeviceNode::Missing,
            Err(error) => DeviceNode::Refused(error.to_string()),
        }
    }
}

/// A file's text without the blanks around it; what is not UTF-8 in it is replaced.
pub(crate) fn text(path: &Path) -> Option<String> {
    text_up_to(path, TEXT_MAX)
}
