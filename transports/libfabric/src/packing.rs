//! Whether pieces are packed by their source, or read one by one. Pure, but for a look at a program.

use kvferry_core::{PoolLayout, Program, UnitRange};
use kvferry_transport::{Options, PackedBy};

/// Pieces that are looked at to judge a program.
const SAMPLE: usize = 64;
/// Transfers of fewer pieces are read: packing takes a round to the source more.
const PIECES_MIN: u64 = 64;
/// What a user's word means by [`PackedBy::Read`] where nothing else is known.
const BELOW_UNKNOWN: u64 = 16 << 10;

/// How short pieces come, as the options and the provider have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Pieces below this length are packed; zero: none are.
    below: u64,
    /// A user's word: transfers of any size.
    is_told: bool,
    /// Peers that ask for it have theirs packed.
    serves: bool,
    /// Bytes of staging for all peers.
    pub(crate) staging_bytes_max: u64,
    /// Bytes that are packed at one poll.
    pub(crate) poll_bytes_max: u64,
}

impl Packing {
    pub(crate) fn new(options: &Options, provider: &str) -> Packing {
        let (told, rule) = (options.packed_below_bytes, rule(provider));
        let below = match options.packed_by {
            PackedBy::Auto => told.unwrap_or(rule),
            PackedBy::Read => told.unwrap_or(rule.max(BELOW_UNKNOWN)),
            // Messages are not a way of this transport's.
            PackedBy::Message => 0,
        };
        Packing {
            below,
            is_told: told.is_some(),
            serves: options.packed_by != PackedBy::Message,
            staging_bytes_max: options.staging_bytes_max,
            poll_bytes_max: options.poll_bytes_max.max(1),
        }
    }

    /// Whether this side has anything packed.
    pub(crate) fn collects(self) -> bool {
        self.below > 0
    }

    /// Whether this side packs for peers.
    pub(crate) fn serves(self) -> bool {
        self.serves
    }

    /// Whether a transfer's pieces are better packed. The program is valid for both layouts.
    pub(crate) fn packs(
        self,
        program: &Program,
        range: UnitRange,
        source: &PoolLayout,
        destination: &PoolLayout,
    ) -> bool {
        let sample = program.copies(range, source, destination).take(SAMPLE);
        let (count, bytes) = sample.fold((0, 0), |(count, bytes), copy| (count + 1, bytes + copy.bytes));
        self.judges(bytes / u64::max(count, 1), program.bytes_in(range))
    }

    /// By pieces' length, on average, and all bytes.
    fn judges(self, piece_bytes: u64, bytes: u64) -> bool {
        let is_long_enough = self.is_told || bytes / piece_bytes.max(1) >= PIECES_MIN;
        bytes > 0 && piece_bytes < self.below && is_long_enough
    }

    /// For people: none where nothing is packed.
    pub(crate) fn words(self) -> Option<String> {
        (self.below > 0).then(|| match self.below {
            u64::MAX => "pieces are packed by their source and read in chunks".to_owned(),
            below => format!("pieces below {below} bytes are packed by their source and read in chunks"),
        })
    }
}

/// Below which length pieces are packed over a provider, if nobody says otherwise.
///
/// Measured between two processes of one host, with 1.17 and 2.5, by the processor time of both, which other work on the machine disturbs less: over
/// tcp packed pieces of 2 and 4 KiB take half of what reads by eights take, 8 KiB an eighth to a fifth less, 16 KiB as much or more. Over shared
/// memory packed pieces of 4 KiB take half with 1.17 and a sixth less with 2.5; of 8 KiB a third more, and as much.
/// EFA was not at hand: where a read costs the processor half a microsecond, and packing two copies at 10 GB/s, both meet at about 2 KiB.
fn rule(provider: &str) -> u64 {
    match provider {
        provider if provider.starts_with("tcp") => 12 << 10,
        "efa" => 2 << 10,
        "shm" => 6 << 10,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_provider_has_its_length() {
        let by = |provider| Packing::new(&Options::default(), provider);
        for provider in ["tcp", "tcp;ofi_rxm"] {
            let many = 1 << 20;
            assert!(by(provider).judges(8 << 10, many) && !by(provider).judges(12 << 10, many), "{provider}");
        }
        assert!(by("efa").collects() && !by("efa").judges(2 << 10, 1 << 30));
        assert!(by("shm").judges(4 << 10, 1 << 20) && !by("shm").judges(8 << 10, 1 << 20));
        assert!(!by("net").collects() && by("net").serves());
    }

    fn packing(by: PackedBy, below: Option<u64>) -> Packing {
        let options = Options { packed_by: by, packed_below_bytes: below, ..Options::default() };
        Packing::new(&options, "tcp")
    }

    #[test]
    fn a_users_word_wins_and_counts_for_transfers_of_any_size() {
        let told = packing(PackedBy::Auto, Some(8192));
        assert!(told.collects() && told.serves() && told.judges(8191, 8191) && !told.judges(8192, 1 << 30));
        assert!(!told.judges(0, 0), "there is nothing to pack");
        let none = packing(PackedBy::Auto, Some(0));
        assert!(!none.collects() && none.serves() && none.words().is_none());
        let never = packing(PackedBy::Message, Some(8192));
        assert!(!never.collects() && !never.serves());
    }

    #[test]
    fn few_pieces_are_not_worth_a_round() {
        let by = packing(PackedBy::Read, None);
        assert!(by.collects() && by.words().unwrap().contains("pieces below"));
        assert!(by.judges(4096, PIECES_MIN * 4096) && !by.judges(4096, PIECES_MIN * 4096 - 4096));
    }
}
