//! UCX's line about the lanes of an endpoint configuration (`ucp_worker_print_used_tls`, UCX 1.13 to 1.23).

/// Lanes of one line that are kept.
const LANES_MAX: usize = 1024;

/// Where UCX thinks that the peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locality {
    /// The same worker.
    Own,
    IntraNode,
    InterNode,
    /// Releases before 1.18 do not say.
    Unsaid,
}

/// `srd/rdmap40s0:1`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    pub(super) transport: String,
    pub(super) device: String,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LaneLine {
    pub(super) line: usize,
    pub(super) context: String,
    pub(super) locality: Locality,
    pub(super) groups: Vec<(String, Vec<Lane>)>,
    /// The list is not complete: UCX's buffer was full, or somebody wrote `...`.
    pub(super) cut: bool,
}

impl LaneLine {
    /// `None` when it is another line.
    pub(super) fn parse(text: &str, line: usize) -> Option<LaneLine> {
        let (context, locality, rest) = head(text)?;
        let mut groups = Vec::new();
        let mut cut = false;
        let mut kept = 0;
        let mut rest = rest.trim_start();
        while let Some((feature, inside)) = rest.split_once('(') {
            let feature = feature.trim();
            if feature.is_empty() || !feature.bytes().all(|letter| letter.is_ascii_lowercase() || letter == b'_') {
                break;
            }
            let (list, after, whole) = match inside.split_once(')') {
                Some((list, after)) => (list, after, true),
                None => (inside, "", false),
            };
            let mut words: Vec<&str> = list.split_whitespace().collect();
            if !whole {
                // The last word may be cut in its middle.
                words.pop();
                cut = true;
            }
            let mut lanes = Vec::new();
            for word in words {
                match word.split_once('/').filter(|(transport, device)| !transport.is_empty() && !device.is_empty()) {
                    Some((transport, device)) if kept < LANES_MAX => {
                        kept += 1;
                        lanes.push(Lane { transport: transport.to_owned(), device: device.to_owned() });
                    }
                    _ => cut = true,
                }
            }
            groups.push((feature.to_owned(), lanes));
            rest = after.trim_start().trim_start_matches(';').trim_start();
        }
        (!groups.is_empty()).then_some(LaneLine { line, context, locality, groups, cut })
    }

    pub(super) fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.groups.iter().flat_map(|(_, lanes)| lanes)
    }

    pub(super) fn shown(&self) -> String {
        let groups = self.groups.iter().map(|(feature, lanes)| {
            let lanes: Vec<String> = lanes.iter().map(|lane| format!("{}/{}", lane.transport, lane.device)).collect();
            format!("{feature}({})", lanes.join(" "))
        });
        let locality = match self.locality {
            Locality::Own => "self",
            Locality::IntraNode => "intra-node",
            Locality::InterNode => "inter-node",
            Locality::Unsaid => "peer",
        };
        let groups: Vec<String> = groups.collect();
        let cut = if self.cut { " (cut short)" } else { "" };
        format!("line {}: {} {locality} {}{cut}", self.line, self.context, groups.join(" "))
    }
}

/// The context's name, where the peer is, and what follows `cfg#N` (`ep_cfg[N]:` before 1.14).
fn head(text: &str) -> Option<(String, Locality, &str)> {
    if let Some((before, after)) = text.split_once("cfg#") {
        let mut words = before.split_whitespace().rev();
        let locality = match words.next()? {
            "self" => Locality::Own,
            "intra-node" => Locality::IntraNode,
            "inter-node" => Locality::InterNode,
            _ => return None,
        };
        let context = words.next().filter(|word| *word != "INFO").unwrap_or("ucx").to_owned();
        let rest = after.trim_start_matches(|digit: char| digit.is_ascii_digit());
        return Some((context, locality, rest));
    }
    let (_, after) = text.split_once("ep_cfg[")?;
    let (number, rest) = after.split_once("]:")?;
    number.bytes().all(|digit| digit.is_ascii_digit()).then_some(("ucx".to_owned(), Locality::Unsaid, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> LaneLine {
        LaneLine::parse(text, 1).unwrap()
    }

    #[test]
    fn captured_lines() {
        let line = parse(
            "[1795330130.706526] [vm:23823:0]      ucp_worker.c:1997 UCX  INFO    ctxA intra-node cfg#0 rma_am(srd/rdmap0:1)  am(srd/rdmap0:1 srd/rdmap1:1)  ka(srd/rdmap0:1)",
        );
        assert_eq!((line.context.as_str(), line.locality, line.cut), ("ctxA", Locality::IntraNode, false));
        assert_eq!(
            line.groups.iter().map(|(name, lanes)| (name.as_str(), lanes.len())).collect::<Vec<_>>(),
            [("rma_am", 1), ("am", 2), ("ka", 1)]
        );
        assert_eq!(line.lanes().nth(2).map(|lane| lane.device.as_str()), Some("rdmap1:1"));
    }

    #[test]
    fn older_shorter_and_cut_forms() {
        let line = parse("ucp_worker.c:1855 UCX  INFO  ep_cfg[2]: tag(tcp/eth0);");
        assert_eq!((line.locality, line.lanes().count()), (Locality::Unsaid, 1));
        let line = parse("UCX  INFO  self cfg#1 am(srd/rdmap14:1 srd/rdma");
        assert_eq!((line.context.as_str(), line.lanes().count(), line.cut), ("ucx", 1, true));
        assert_eq!(LaneLine::parse("cfg#", 1), None);
        assert_eq!(LaneLine::parse("| ctxA intra-node cfg#0       |", 1), None);
        assert_eq!(LaneLine::parse("x self cfg#0 (", 1), None);
    }
}
