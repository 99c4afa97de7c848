//! UCX's line about the lanes of an endpoint configuration (`ucp_worker_print_used_tls`, at `UCX_LOG_LEVEL=info`).

use std::fmt;

use crate::Lane;

/// Lanes of one line that are kept.
const LANES_MAX: usize = 1024;
/// Bytes of a message after which UCX cuts it.
const MESSAGE_BYTES_MAX: usize = 255;

/// Where UCX thinks that the peer is. It tells that from device addresses: two devices of one host are `inter-node`, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locality {
    /// The same worker.
    Own,
    /// This host.
    IntraNode,
    /// Another device, mostly of another host.
    InterNode,
    /// Older releases do not say.
    Unsaid,
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Locality::Own => "self",
            Locality::IntraNode => "intra-node",
            Locality::InterNode => "inter-node",
            Locality::Unsaid => "peer",
        })
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneLine {
    /// The context's name, which older releases do not print.
    pub context: Option<String>,
    /// Where the peer is.
    pub locality: Locality,
    /// The number of the configuration in its worker.
    pub configuration: u32,
    /// Per use, in UCX's words and order, the lanes.
    pub uses: Vec<(String, Vec<Lane>)>,
    /// The list is not complete: UCX's buffer was full, or somebody wrote `...`.
    pub cut: bool,
}

impl LaneLine {
    /// Reads a line of a log, with or without what UCX puts before its messages; `None` for any other line.
    pub fn parse(line: &str) -> Option<LaneLine> {
        let message = line.split_once(" UCX  INFO ").map_or(line, |(_, message)| message).trim_start();
        let (context, locality, configuration, rest) = head(message)?;
        let (mut uses, mut kept) = (Vec::new(), 0);
        let mut cut = message.trim_end().len() >= MESSAGE_BYTES_MAX;
        let mut rest = rest.trim_start();
        while let Some((used, inside)) = rest.split_once('(') {
            let used = used.trim();
            if used.is_empty() || !used.bytes().all(|letter| letter.is_ascii_lowercase() || letter == b'_') {
                break;
            }
            let (list, after, whole) = match inside.split_once(')') {
                Some((list, after)) => (list, after, true),
                None => (inside, "", false),
            };
            let mut words: Vec<&str> = list.split_whitespace().collect();
            if !whole {
                // The last word may be half a name.
                words.pop();
                cut = true;
            }
            let mut lanes = Vec::new();
            for word in words {
                match Lane::parse(word) {
                    Some(lane) if kept < LANES_MAX => {
                        kept += 1;
                        lanes.push(lane);
                    }
                    _ => cut = true,
                }
            }
            uses.push((used.to_owned(), lanes));
            rest = after.trim_start().trim_start_matches(';').trim_start();
        }
        (!uses.is_empty()).then_some(LaneLine { context, locality, configuration, uses, cut })
    }

    /// Its lanes, as often as they are used.
    pub fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.uses.iter().flat_map(|(_, lanes)| lanes)
    }
}

impl fmt::Display for LaneLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} cfg#{}", self.context.as_deref().unwrap_or("ucx"), self.locality, self.configuration)?;
        for (used, lanes) in &self.uses {
            let lanes: Vec<String> = lanes.iter().map(Lane::to_string).collect();
            write!(f, " {used}({})", lanes.join(" "))?;
        }
        f.write_str(if self.cut { " (cut short)" } else { "" })
    }
}

/// The context's name, where the peer is, the number in `cfg#N` (`ep_cfg[N]:` in older releases), and what follows.
fn head(message: &str) -> Option<(Option<String>, Locality, u32, &str)> {
    if let Some((before, after)) = message.split_once("cfg#") {
        let mut words = before.split_whitespace().rev();
        let locality = match words.next()? {
            "self" => Locality::Own,
            "intra-node" => Locality::IntraNode,
            "inter-node" => Locality::InterNode,
            _ => return None,
        };
        let context = words.next().map(str::to_owned);
        let rest = after.trim_start_matches(|digit: char| digit.is_ascii_digit());
        let digits = after.get(..after.len() - rest.len())?;
        return Some((context, locality, digits.parse().ok()?, rest));
    }
    let (number, rest) = message.split_once("ep_cfg[")?.1.split_once("]:")?;
    Some((None, Locality::Unsaid, number.parse().ok()?, rest))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "this is test code")]
mod tests {
    use super::*;

    fn parse(line: &str) -> LaneLine {
        LaneLine::parse(line).unwrap()
    }

    #[test]
    fn older_folded_and_shortened_forms() {
        // UCX 1.13.1, as Debian 12 has it.
        let line = parse(
            "[1795765665.718005] [vm:7861 :0]      ucp_worker.c:1763 UCX  INFO    ep_cfg[2]: tag(tcp/eth0); rma_am(tcp/lo)",
        );
        assert_eq!(line.to_string(), "ucx peer cfg#2 tag(tcp/eth0) rma_am(tcp/lo)");
        assert_eq!((line.context.as_ref(), line.locality, line.configuration), (None, Locality::Unsaid, 2));
        // As in documentation: spaces folded, nothing before the message, a list that somebody shortened.
        let line = parse("ucp_context_2 self cfg#1 rma_am(srd/rdmap40s0:1) am(srd/rdmap40s0:1 srd/rdmap62s0:1 ...)");
        assert_eq!(
            line.to_string(),
            "ucp_context_2 self cfg#1 rma_am(srd/rdmap40s0:1) am(srd/rdmap40s0:1 srd/rdmap62s0:1) (cut short)"
        );
        let line = parse("UCX  INFO  self cfg#1 am(srd/rdmap14:1 srd/rdma");
        assert_eq!((line.lanes().count(), line.cut), (1, true));
    }

    #[test]
    fn a_message_as_long_as_ucx_s_buffer_is_not_believed_to_be_whole() {
        let lanes = |count: usize| vec!["srd/rdmap0:1"; count].join(" ");
        let line = format!("ctx inter-node cfg#0 am({})  ka", lanes(17));
        let padded = format!("{line}{}", "x".repeat(MESSAGE_BYTES_MAX - line.len()));
        assert_eq!((parse(&padded).lanes().count(), parse(&padded).cut), (17, true), "cut in a use's name");
        assert!(!parse(&line).cut);
    }

    #[test]
    fn other_lines_are_none() {
        for other in [
            "",
            "cfg#",
            "UCX  INFO ",
            "x UCX  INFO  cfg#",
            "x UCX  INFO  a intra-node cfg#1 ",
            "| ctxA intra-node cfg#0       |",
            "x self cfg#0 (",
            "x somewhere cfg#0 am(tcp/lo)",
            "ep_cfg[x]: am(tcp/lo)",
            "self cfg#99999999999 am(tcp/lo)",
        ] {
            assert_eq!(LaneLine::parse(other), None, "{other:?}");
        }
    }
}
