//! A user's word on which NICs serve which GPU.

use core::fmt;
use core::str::FromStr;
use std::collections::BTreeMap;

use crate::Port;

/// NICs of GPUs that are not left to the topology: `0=rdmap65s0+rdmap66s0,0000:55:00.0=rdmap81s0:1`.
///
/// A GPU is named by its number in the order of PCI addresses or by its address, a NIC by its device, by device and port, or by its network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(BTreeMap<String, Vec<String>>);

/// Not a list of overrides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadOverride {
    entry: String,
    why: &'static str,
}

impl fmt::Display for BadOverride {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}; write GPU=NIC+NIC, such as 0=rdmap65s0+rdmap66s0", self.entry, self.why)
    }
}

impl core::error::Error for BadOverride {}

impl Overrides {
    /// What is said of a GPU.
    pub(crate) fn of(&self, number: usize, address: &str) -> Option<&[String]> {
        self.0.get(address).or_else(|| self.0.get(&number.to_string())).map(Vec::as_slice)
    }

    /// Whether it names this port for any GPU.
    pub fn names(&self, port: &Port) -> bool {
        self.0.values().flatten().any(|word| port.is_called(word))
    }

    /// All GPUs that something is said of.
    pub(crate) fn gpus(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl FromStr for Overrides {
    type Err = BadOverride;

    fn from_str(text: &str) -> Result<Self, BadOverride> {
        let mut overrides = BTreeMap::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let bad = |why| BadOverride { entry: entry.to_owned(), why };
            let (gpu, nics) = entry.split_once('=').ok_or_else(|| bad("names no NIC"))?;
            let (gpu, nics) = (gpu.trim(), nics.split('+').map(|nic| nic.trim().to_owned()));
            let nics: Vec<String> = nics.filter(|nic| !nic.is_empty()).collect();
            if gpu.is_empty() || nics.is_empty() {
                return Err(bad("lacks a GPU or a NIC"));
            }
            // Numbers are as they are counted: 01 is 1.
            let gpu = gpu.parse::<usize>().map_or_else(|_| gpu.to_ascii_lowercase(), |number| number.to_string());
            if overrides.insert(gpu, nics).is_some() {
                return Err(bad("names a GPU for the second time"));
            }
        }
        Ok(Overrides(overrides))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_or_refused_with_the_entry() {
        let read: Overrides = " 0=a+b:1, 0000:5A:00.0 = c ,".parse().unwrap();
        assert_eq!(read.of(0, "0000:45:00.0"), Some(&["a".to_owned(), "b:1".to_owned()][..]));
        assert_eq!(read.of(7, "0000:5a:00.0"), Some(&["c".to_owned()][..]));
        assert_eq!((read.of(1, "x"), read.gpus().count()), (None, 2));
        assert_eq!("".parse(), Ok(Overrides::default()));
        for wrong in ["0", "0=", "=a", "0=+", "1=a,01=b"] {
            let refused = wrong.parse::<Overrides>().unwrap_err().to_string();
            assert!(refused.contains("write GPU=NIC+NIC"), "{refused}");
        }
    }
}
