//! Which lanes an endpoint has: their names as UCX answers, their uses as it prints them. 1.13 only prints, and no later one says the uses.

use ucx_text::{EndpointLane, Lane};

use crate::cost::{Line, Rule};

/// UCX's transports that read remote memory without the peer's help.
const READERS: [&str; 9] = ["cma", "knem", "xpmem", "rc_verbs", "rc_mlx5", "dc_mlx5", "dc_devx", "srd", "cuda_ipc"];

/// Those of them that are a system call of this side's kernel each time.
const KERNEL_READERS: [&str; 3] = ["cma", "knem", "xpmem"];
/// Those of them that are a network device's.
const DEVICE_READERS: [&str; 5] = ["rc_verbs", "rc_mlx5", "dc_mlx5", "dc_devx", "srd"];
/// Where a read is a system call, shorter pieces are sent packed until both ways are measured: through cma 4 KiB pieces came at 1.4 GB/s and 8 KiB ones at 2.0, packed at
/// 2.6 to 3.2; from 16 KiB on both are equal and reading takes half the processor time (UCX 1.22, one host of two cores).
const KERNEL: Rule =
    Rule { piece_bytes_min: 12 << 10, read: Line { piece: 1750.0, byte: 0.28 }, packed_piece: 100.0, round: None };
/// The hardware takes millions of reads a second, and each costs a descriptor here. Its figures are round ones of 25 GB/s.
const HARDWARE: Rule =
    Rule { piece_bytes_min: 1 << 10, read: Line { piece: 150.0, byte: 0.04 }, packed_piece: 50.0, round: None };
/// Packed bytes are copied at both ends, at 10 GB/s each, and read 1 MiB at a time between: 0.24 ns a byte, which meets single reads at 512 bytes.
/// A chunk is announced before it is read: a message's way, and a read's there and back.
const TOGETHER: Rule = Rule { piece_bytes_min: 512, read: HARDWARE.read, packed_piece: 50.0, round: Some(20_000.0) };

/// The lanes of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lanes {
    printed: Vec<EndpointLane>,
    /// Empty where UCX cannot be asked.
    answered: Vec<Lane>,
}

impl Lanes {
    /// From what `ucp_ep_print_info` wrote and `ucp_ep_query` answered.
    pub(crate) fn new(description: &str, answered: Vec<Lane>) -> Lanes {
        Lanes { printed: description.lines().filter_map(EndpointLane::parse).collect(), answered }
    }

    /// Whether reads of remote memory are the hardware's, or the kernel's, and not emulated over messages.
    pub(crate) fn read_remote_memory(&self) -> bool {
        self.printed.iter().any(|lane| lane.is_zero_copy() && READERS.contains(&lane.lane.transport.as_str()))
    }

    /// Whether those reads are a network device's own. It cuts messages up, so that packed bytes are better read by it than sent.
    pub(crate) fn read_by_device(&self) -> bool {
        self.printed.iter().any(|lane| lane.is_zero_copy() && DEVICE_READERS.contains(&lane.lane.transport.as_str()))
    }

    /// From which mean length on pieces are taken to be better read one by one than packed at their source and sent, or read from there
    /// together.
    pub(crate) fn rule(&self, is_read_together: bool) -> Rule {
        let kernel =
            |lane: &EndpointLane| lane.is_zero_copy() && KERNEL_READERS.contains(&lane.lane.transport.as_str());
        match (self.printed.iter().any(kernel), is_read_together) {
            (true, _) => KERNEL,
            (false, true) => TOGETHER,
            (false, false) => HARDWARE,
        }
    }

    /// Their names, each once, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        let printed = self.printed.iter().map(|lane| &lane.lane).filter(|_| self.answered.is_empty());
        let mut names: Vec<String> = Vec::new();
        for name in self.answered.iter().chain(printed).map(Lane::to_string) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(description: &str) -> Lanes {
        Lanes::new(description, Vec::new())
    }

    #[test]
    fn what_ucx_prints_is_read() {
        let text = "#\n# UCP endpoint\n#\n#               peer: <no debug data>\n\
            #                 lane[0]: 18:sysv/memory.0 md[4]              -> md[4]/sysv/sysdev[255] am am_bw#0\n\
            #                 lane[1]:  2:cma/memory.0 md[5]       -> md[5]/cma/sysdev[255] rma_bw#0\n\
            #\n#                tag_send: 0..<egr/short>..8185\n";
        let lanes = parse(text);
        assert_eq!(lanes.names(), ["sysv/memory", "cma/memory"]);
        assert!(lanes.read_remote_memory());
        assert!(
            [false, true].map(|together| lanes.rule(together).piece_bytes_min) == [12 << 10; 2],
            "a system call for each"
        );
        assert!(!lanes.read_by_device(), "the kernel's reads are no device's");
    }

    #[test]
    fn devices_with_ports_keep_their_names() {
        let lanes = parse("lane[0]:  0:srd/rdmap0:1.0 md[0] -> md[0]/ib/sysdev[255] seg 4096 rma_bw#0 am keepalive");
        assert_eq!(lanes.names(), ["srd/rdmap0:1"]);
        assert!(lanes.read_remote_memory() && lanes.read_by_device());
        assert_eq!([false, true].map(|together| lanes.rule(together).piece_bytes_min), [1024, 512]);
    }

    #[test]
    fn emulated_access_is_not_taken_for_the_real_thing() {
        // Over tcp the lane is there for writes; reads are emulated.
        for text in [
            "lane[0]:  0:tcp/lo.0 md[0] -> md[0]/tcp/sysdev[255] rma_bw#0 am am_bw#0",
            "lane[0]:  0:srd/rdmap0:1.0 md[0] -> md[0]/ib/sysdev[255] am keepalive",
            "",
        ] {
            assert!(!parse(text).read_remote_memory() && !parse(text).read_by_device(), "{text}");
        }
    }

    #[test]
    fn an_answer_names_the_lanes_and_what_is_printed_their_uses() {
        let lane = |word: &str| Lane::parse(word).unwrap();
        let printed = "lane[0]:  0:srd/rdmap0:1.0 md[0] -> md[0]/ib/sysdev[255] rma_bw#0 am";
        let lanes = Lanes::new(printed, vec![lane("srd/rdmap0:1"), lane("srd/rdmap1:1"), lane("srd/rdmap0:1")]);
        assert_eq!(lanes.names(), ["srd/rdmap0:1", "srd/rdmap1:1"]);
        assert!(lanes.read_remote_memory());
        assert!(!Lanes::new("", vec![lane("srd/rdmap0:1")]).read_remote_memory(), "a name is no proof");
    }
}
