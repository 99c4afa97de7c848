//! A lane as `ucp_ep_print_info` describes it; UCX 1.13 has no other way to ask, and no later one says more.

use crate::Lane;

/// A line such as `lane[1]:  5:cma/memory.0 md[3] -> md[3]/cma/sysdev[255] rma_bw#0 am`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointLane {
    /// Its place among the endpoint's lanes.
    pub number: u32,
    /// What it is.
    pub lane: Lane,
    /// What UCX uses it for, in its words: `am`, `rma_bw#0`, `keepalive`, …
    pub uses: Vec<String>,
}

impl EndpointLane {
    /// Reads a line; `None` for any other line.
    pub fn parse(line: &str) -> Option<EndpointLane> {
        // UCX's comment lines begin with `#`.
        let rest = line.trim_start_matches(['#', ' ', '\t']).strip_prefix("lane[")?;
        let (number, rest) = rest.split_once("]:")?;
        let mut words = rest.split_whitespace();
        // `0:srd/rdmap0:1.0`: a number of UCX's, the lane, and which path of the device.
        let resource = words.next()?.split_once(':')?.1;
        let name = resource.rsplit_once('.').map_or(resource, |(name, _)| name);
        // Memory domains and the size of a segment come before the uses.
        let used = |word: &&str| !word.contains("md[") && *word != "->" && *word != "seg" && !is_number(word);
        Some(EndpointLane {
            number: number.parse().ok()?,
            lane: Lane::parse(name)?,
            uses: words.filter(used).map(str::to_owned).collect(),
        })
    }

    /// Whether large remote reads and writes use it, without copies.
    pub fn is_zero_copy(&self) -> bool {
        self.uses.iter().any(|used| used.starts_with("rma_bw#"))
    }
}

fn is_number(word: &str) -> bool {
    word.bytes().all(|digit| digit.is_ascii_digit())
}
