//! What is shown of the way that bytes take to a peer, and what is not.

use core::fmt;

use serde::{Deserialize, Serialize};

/// How far a path is proven; each grade includes those below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Grade {
    /// The device is there.
    E1,
    /// It was opened through its provider.
    E2,
    /// A connection stands, over these lanes.
    E3,
    /// Over them, bytes can move from where they lie to where they belong without a copy between.
    E4,
    /// The device's own counters moved by at least the bytes that were transferred.
    E5,
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Grade::E1 => "E1",
            Grade::E2 => "E2",
            Grade::E3 => "E3",
            Grade::E4 => "E4",
            Grade::E5 => "E5",
        })
    }
}

/// The native library behind a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryName {
    /// The file that it was loaded from.
    pub path: String,
    /// Its version.
    pub version: String,
}

/// What one end's transport shows of the path to one peer over one device. It holds for both directions, unless `seen` says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// How far it is proven.
    pub grade: Grade,
    /// What carries the bytes, as `transport/device`: `srd/rdmap40s0:1`, `tcp/192.0.2.1:4000`, `memfd/memory`.
    pub lanes: Vec<String>,
    /// The native library that moves them, if one does.
    pub library: Option<LibraryName>,
    /// What was seen besides.
    pub seen: Vec<String>,
    /// What was not shown, and why.
    pub unseen: Vec<String>,
    /// Remote memory is not read by the device though it could be: bytes go in messages that a processor unpacks.
    pub emulated: bool,
    /// A pool at either end is in a device's memory, which these lanes do not reach: bytes go by way of host memory, which a processor copies, too.
    pub staged: bool,
}

impl Evidence {
    /// A connection stands over these lanes, and nothing more is known of it.
    pub fn connected(lanes: Vec<String>) -> Evidence {
        Evidence {
            grade: Grade::E3,
            lanes,
            library: None,
            seen: Vec::new(),
            unseen: Vec::new(),
            emulated: false,
            staged: false,
        }
    }

    /// With something that was seen.
    pub fn seen(mut self, what: impl Into<String>) -> Evidence {
        self.seen.push(what.into());
        self
    }

    /// With something that was not shown.
    pub fn unseen(mut self, what: impl Into<String>) -> Evidence {
        self.unseen.push(what.into());
        self
    }
}

/// `E4 srd/rdmap40s0:1; what was seen; not shown: what was not`
impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lanes = if self.lanes.is_empty() { "no lane known".to_owned() } else { self.lanes.join(",") };
        write!(f, "{} {lanes}", self.grade)?;
        for seen in &self.seen {
            write!(f, "; {seen}")?;
        }
        if !self.unseen.is_empty() {
            write!(f, "; not shown: {}", self.unseen.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_order() {
        assert!(Grade::E3 < Grade::E4 && Grade::E4 < Grade::E5);
        let evidence = Evidence::connected(vec!["srd/a:1".into(), "srd/b:1".into()]).seen("x").unseen("y").unseen("z");
        assert_eq!(evidence.to_string(), "E3 srd/a:1,srd/b:1; x; not shown: y, z");
        assert_eq!(Evidence::connected(Vec::new()).to_string(), "E3 no lane known");
    }
}
