//! What the two ways of a transfer cost: pieces that are read one by one, and pieces that their source packs and sends. Pure: time comes in.
//!
//! Either way, a transfer of `pieces` and `bytes` takes about `pieces × piece + bytes × byte`; packed bytes take a round to their source, too.
//! Each way's line goes through the medians of what lone transfers took, by their pieces' length. The ways meet at the length from which
//! pieces are read. Until both are measured a rule of thumb stands.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Transfers of one class that are remembered; their median counts.
const REMEMBERED: usize = 5;
/// So many make a class count.
const SAMPLES_MIN: usize = 3;
/// Transfers in a row that must ask for another length, by more than a quarter, before it is taken.
const AGREED: u32 = 3;
const BAND: f64 = 1.25;
/// The length stays within these multiples of the rule, and with the rule not further than [`NEAR`] from what was measured: lines that are almost
/// parallel meet anywhere.
const LEAST: f64 = 1.0 / 8.0;
const GREATEST: f64 = 64.0;
/// Transfers that are long enough to show what bytes cost, and no longer than may be tried the other way.
const LINE_BYTES_MIN: u64 = 256 << 10;
const TRIAL_BYTES_MAX: u64 = 64 << 20;
/// Packed transfers that show what the round costs.
const ROUND_BYTES_MAX: u64 = 128 << 10;
/// Pieces within this factor of the length are tried the other way now and then: so often until that is measured, then so often, and so
/// often where it takes more than twice as long.
const NEAR: f64 = 4.0;
const TRIAL_UNKNOWN: u32 = 4;
const TRIAL_KNOWN: u32 = 64;
const TRIAL_POOR: u32 = 512;

/// How a transfer's bytes come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Piece by piece, from the peer's memory.
    Read,
    /// Packed by the peer, unpacked here.
    Packed,
}

/// What a way costs: nanoseconds a piece and a byte.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) piece: f64,
    pub(crate) byte: f64,
}

impl Line {
    /// Nanoseconds a byte where pieces are so long.
    fn at(self, piece_bytes: f64) -> f64 {
        self.byte + self.piece / piece_bytes
    }

    fn gigabytes_per_second(self) -> f64 {
        1.0 / self.byte
    }
}

/// What is taken to be so before anything is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rule {
    /// Pieces are read from this length on.
    pub(crate) piece_bytes_min: u64,
    /// What reads cost.
    pub(crate) read: Line,
    /// What a packed piece costs beside its bytes.
    pub(crate) packed_piece: f64,
    /// Nanoseconds that packed transfers take beside their pieces and bytes, where that is known to matter.
    pub(crate) round: Option<f64>,
}

impl Rule {
    /// The line of packed pieces that meets that of reads at the rule's length.
    fn packed(self) -> Line {
        let byte = self.read.byte + (self.read.piece - self.packed_piece) / self.piece_bytes_min.max(1) as f64;
        Line { piece: self.packed_piece, byte }
    }
}

/// What is known of the ways to one peer.
#[derive(Clone, Debug)]
pub(crate) struct Costs {
    rule: Rule,
    /// A user's word, which stands.
    told: Option<u64>,
    /// From which length on pieces are read.
    length: f64,
    read: Samples,
    packed: Samples,
    /// Nanoseconds that packed transfers took beside their pieces and bytes.
    rounds: VecDeque<f64>,
    /// For how many transfers in a row another length was better; negative for a shorter one.
    leaning: i32,
    /// Transfers so far, by class, that could be tried the other way.
    near: BTreeMap<u32, u32>,
    /// Transfers so far that were too short to be worth a round.
    spared: u32,
}

impl Costs {
    pub(crate) fn new(rule: Rule, told: Option<u64>) -> Costs {
        Costs {
            rule,
            told,
            length: told.unwrap_or(rule.piece_bytes_min) as f64,
            read: Samples::default(),
            packed: Samples::default(),
            rounds: VecDeque::new(),
            leaning: 0,
            near: BTreeMap::new(),
            spared: 0,
        }
    }

    /// The way of the next transfer, of so many bytes in pieces that are so long on average. The slower one only where something can be learned
    /// of it: `is_alone` says whether the transfer's time would count.
    pub(crate) fn choose(&mut self, piece_bytes: u64, bytes: u64, is_alone: bool) -> Manner {
        let piece = piece_bytes.max(1) as f64;
        let better =
            if piece >= self.length || self.is_not_worth_a_round(piece, bytes) { Manner::Read } else { Manner::Packed };
        if self.told.is_some() || !is_alone {
            return better;
        }
        // What is too short to be worth a round shows whether that is still so.
        if piece < self.length && bytes <= ROUND_BYTES_MAX && better == Manner::Read {
            self.spared = self.spared.wrapping_add(1);
            return if self.spared.is_multiple_of(TRIAL_KNOWN) { Manner::Packed } else { Manner::Read };
        }
        let near = (self.length / NEAR..=self.length * NEAR).contains(&piece);
        if !near || !(LINE_BYTES_MIN..=TRIAL_BYTES_MAX).contains(&bytes) {
            return better;
        }
        let (other, samples) = match better {
            Manner::Read => (Manner::Packed, &self.packed),
            Manner::Packed => (Manner::Read, &self.read),
        };
        let every = if !samples.know(piece_bytes) {
            TRIAL_UNKNOWN
        } else if self.is_poor(other, piece) {
            TRIAL_POOR
        } else {
            TRIAL_KNOWN
        };
        let count = self.near.entry(class(piece_bytes)).or_default();
        *count = count.wrapping_add(1);
        if count.is_multiple_of(every) { other } else { better }
    }

    /// A lone transfer is over. Says whether the peer's path is to be shown anew: another length was taken, or both ways are known now.
    pub(crate) fn note(&mut self, manner: Manner, piece_bytes: u64, bytes: u64, took: Duration) -> bool {
        let (nanoseconds, before) = (took.as_nanos() as f64, self.lines().is_some());
        if bytes >= LINE_BYTES_MIN {
            let (samples, beside) = match manner {
                Manner::Read => (&mut self.read, 0.0),
                Manner::Packed => {
                    let round = self.round().unwrap_or(0.0);
                    (&mut self.packed, round)
                }
            };
            let per_byte = (nanoseconds - beside).max(nanoseconds / 2.0) / bytes as f64;
            samples.add(piece_bytes, per_byte);
        } else if manner == Manner::Packed
            && bytes <= ROUND_BYTES_MAX
            && let Some(line) = self.packed.line(self.rule.packed())
        {
            let beside = (nanoseconds - line.at(piece_bytes.max(1) as f64) * bytes as f64).max(0.0);
            remember(&mut self.rounds, beside);
        }
        // A transfer that says nothing of the lines is no further reason for another length.
        let moved = bytes >= LINE_BYTES_MIN && self.told.is_none() && self.follow();
        moved || before != self.lines().is_some()
    }

    /// From which length on pieces are read, and why.
    pub(crate) fn words(&self) -> String {
        let (read, packed) = (self.read.count(), self.packed.count());
        let why = match (self.told, self.lines()) {
            (Some(_), _) => "as it was told".to_owned(),
            (None, Some((reads, packs))) => {
                let round = self.round().map_or(String::new(), |ns| format!(", {:.0} us a round", ns / 1e3));
                format!(
                    "measured: reads {:.0} ns a piece and {:.1} GB/s, packing {:.0} ns and {:.1} GB/s{round}; {read} and {packed} transfers",
                    reads.piece,
                    reads.gigabytes_per_second(),
                    packs.piece,
                    packs.gigabytes_per_second()
                )
            }
            (None, None) => "a rule of thumb until both ways are measured".to_owned(),
        };
        format!("pieces from {:.0} bytes on are read, shorter ones packed ({why})", self.length)
    }

    /// What both ways cost, once both are measured.
    fn lines(&self) -> Option<(Line, Line)> {
        Some((self.read.line(self.rule.read)?, self.packed.line(self.rule.packed())?))
    }

    /// What packing costs beside pieces and bytes, by the rule until it is measured: one slow transfer must not stand for it.
    fn round(&self) -> Option<f64> {
        let measured = (self.rounds.len() >= SAMPLES_MIN).then(|| median(self.rounds.iter().copied())).flatten();
        measured.or(self.rule.round)
    }

    fn is_poor(&self, other: Manner, piece: f64) -> bool {
        self.lines().is_some_and(|(read, packed)| match other {
            Manner::Read => read.at(piece) > 2.0 * packed.at(piece),
            Manner::Packed => packed.at(piece) > 2.0 * read.at(piece),
        })
    }

    /// Whether what packing saves is less than the round that it takes, as far as that is known.
    fn is_not_worth_a_round(&self, piece: f64, bytes: u64) -> bool {
        let (Some(round), None) = (self.round(), self.told) else { return false };
        let ruled = self.rule.round.map(|_| (self.rule.read, self.rule.packed()));
        let known = self.lines().or(ruled);
        known.is_some_and(|(read, packed)| (read.at(piece) - packed.at(piece)) * (bytes as f64) < round)
    }

    /// Takes another length once it has been better for a while.
    fn follow(&mut self) -> bool {
        let rule = self.rule.piece_bytes_min as f64;
        let Some(meet) = self.lines().and_then(|(read, packed)| crossing(read, packed)) else {
            self.leaning = 0;
            return false;
        };
        let (shortest, longest) = self
            .read
            .span()
            .zip(self.packed.span())
            .map_or((rule, rule), |(read, packed)| (read.0.min(packed.0), read.1.max(packed.1)));
        let meet = meet.clamp(rule.min(shortest / NEAR), rule.max(longest * NEAR)).clamp(rule * LEAST, rule * GREATEST);
        let way = if meet > self.length * BAND {
            1
        } else if meet * BAND < self.length {
            -1
        } else {
            0
        };
        self.leaning = if way == 0 || self.leaning.signum() != way { way } else { self.leaning + way };
        if self.leaning.unsigned_abs() < AGREED {
            return false;
        }
        self.leaning = 0;
        self.length = meet;
        true
    }
}

/// The length from which reading costs no more; none where reads pay for short pieces only, which no device does.
fn crossing(read: Line, packed: Line) -> Option<f64> {
    let (pieces, bytes) = (read.piece - packed.piece, packed.byte - read.byte);
    match (pieces > 0.0, bytes > 0.0) {
        (true, true) => Some(pieces / bytes),
        (true, false) => Some(f64::INFINITY),
        (false, true) => Some(0.0),
        (false, false) => None,
    }
}

/// Lengths of the same power of two.
fn class(piece_bytes: u64) -> u32 {
    piece_bytes.max(1).ilog2()
}

/// What lone transfers took one way: bytes a piece and nanoseconds a byte, by class.
#[derive(Clone, Debug, Default)]
struct Samples {
    classes: BTreeMap<u32, VecDeque<(f64, f64)>>,
}

impl Samples {
    fn add(&mut self, piece_bytes: u64, per_byte: f64) {
        remember(self.classes.entry(class(piece_bytes)).or_default(), (piece_bytes.max(1) as f64, per_byte));
    }

    fn count(&self) -> usize {
        self.classes.values().map(VecDeque::len).sum()
    }

    fn know(&self, piece_bytes: u64) -> bool {
        self.classes.get(&class(piece_bytes)).is_some_and(|known| known.len() >= SAMPLES_MIN)
    }

    /// The shortest and the longest pieces that are known.
    fn span(&self) -> Option<(f64, f64)> {
        let known = self.classes.values().filter(|known| known.len() >= SAMPLES_MIN);
        known.filter_map(|known| median(known.iter().map(|sample| sample.0))).fold(None, |span, piece| {
            Some(span.map_or((piece, piece), |(least, most): (f64, f64)| (least.min(piece), most.max(piece))))
        })
    }

    /// The line through the classes' medians; with one class only, of the shape that is given.
    fn line(&self, shape: Line) -> Option<Line> {
        let known = self.classes.values().filter(|known| known.len() >= SAMPLES_MIN);
        let points: Vec<(f64, f64)> = known
            .filter_map(|known| {
                let piece = median(known.iter().map(|sample| sample.0))?;
                Some((1.0 / piece, median(known.iter().map(|sample| sample.1))?))
            })
            .collect();
        let count = points.len() as f64;
        let (xs, ys) = points.iter().fold((0.0, 0.0), |(xs, ys), (x, y)| (xs + x, ys + y));
        if points.is_empty() {
            return None;
        }
        let (x, y) = (xs / count, ys / count);
        let (up, over) = points
            .iter()
            .fold((0.0, 0.0), |(up, over), (px, py)| (up + (px - x) * (py - y), over + (px - x) * (px - x)));
        if points.len() >= 2 && over > 0.0 {
            let piece = (up / over).max(0.0);
            let byte = y - piece * x;
            if byte > 0.0 {
                return Some(Line { piece, byte });
            }
        }
        let scale = y / (shape.byte + shape.piece * x);
        Some(Line { piece: shape.piece * scale, byte: shape.byte * scale })
    }
}

fn remember<T>(kept: &mut VecDeque<T>, value: T) {
    if kept.len() >= REMEMBERED {
        kept.pop_front();
    }
    kept.push_back(value);
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule =
        Rule { piece_bytes_min: 12 << 10, read: Line { piece: 1750.0, byte: 0.28 }, packed_piece: 100.0, round: None };
    const BYTES: u64 = 16 << 20;

    fn took(line: Line, piece: u64, bytes: u64) -> Duration {
        Duration::from_nanos((line.at(piece as f64) * bytes as f64) as u64)
    }

    /// So many transfers of either way at these costs; how often that moved or showed something.
    fn feed(costs: &mut Costs, read: Line, packed: Line, pieces: &[u64], times: usize) -> usize {
        let mut shown = 0;
        for _ in 0..times {
            for piece in pieces {
                shown += usize::from(costs.note(Manner::Read, *piece, BYTES, took(read, *piece, BYTES)));
                shown += usize::from(costs.note(Manner::Packed, *piece, BYTES, took(packed, *piece, BYTES)));
            }
        }
        shown
    }

    #[test]
    fn the_rule_stands_while_nothing_is_measured_and_its_lines_meet_there() {
        let mut costs = Costs::new(RULE, None);
        assert_eq!(costs.choose(12 << 10, 1000, true), Manner::Read);
        assert_eq!(costs.choose((12 << 10) - 1, 1000, true), Manner::Packed);
        assert!((crossing(RULE.read, RULE.packed()).unwrap() - 12288.0).abs() < 1e-6);
        // One way alone decides nothing, however fast it is.
        for _ in 0..20 {
            assert!(!costs.note(Manner::Read, 8192, BYTES, Duration::from_micros(1)));
        }
        assert_eq!(costs.choose(8192, 1000, true), Manner::Packed);
        assert!(costs.words().contains("12288 bytes") && costs.words().contains("rule of thumb"), "{}", costs.words());
    }

    #[test]
    fn it_converges_to_where_the_ways_meet() {
        let mut costs = Costs::new(RULE, None);
        let (read, packed) = (Line { piece: 500.0, byte: 0.1 }, Line { piece: 100.0, byte: 0.3 });
        feed(&mut costs, read, packed, &[1024, 4096, 65536], 8);
        assert!((costs.length - 2000.0).abs() < 40.0, "{}", costs.words());
        assert_eq!(costs.choose(2100, 1 << 30, true), Manner::Read);
        assert_eq!(costs.choose(1900, 1 << 30, true), Manner::Packed);
        let words = costs.words();
        for part in ["measured", "500 ns a piece", "10.0 GB/s", "100 ns", "3.3 GB/s", "15 and 15 transfers"] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }

    #[test]
    fn one_length_of_pieces_is_enough_for_their_own_choice() {
        let mut costs = Costs::new(RULE, None);
        // Twice as fast a machine, in both ways: the same length.
        let half = |line: Line| Line { piece: line.piece / 2.0, byte: line.byte / 2.0 };
        feed(&mut costs, half(RULE.read), half(RULE.packed()), &[8192], 8);
        assert!((costs.length - 12288.0).abs() < 1.0, "{}", costs.words());
        // Reads alone became much faster.
        let mut costs = Costs::new(RULE, None);
        feed(&mut costs, half(RULE.read), RULE.packed(), &[8192], 8);
        assert!(costs.length < 8192.0, "{}", costs.words());
    }

    #[test]
    fn a_noisy_transfer_moves_nothing() {
        let mut costs = Costs::new(RULE, None);
        feed(&mut costs, RULE.read, RULE.packed(), &[4096, 65536], 3);
        let before = costs.length;
        for (manner, took) in [(Manner::Read, 1), (Manner::Packed, 100_000_000_000), (Manner::Read, 100_000_000_000)] {
            assert!(!costs.note(manner, 4096, BYTES, Duration::from_nanos(took)));
            feed(&mut costs, RULE.read, RULE.packed(), &[4096, 65536], 3);
            assert_eq!(costs.length, before);
        }
    }

    #[test]
    fn it_does_not_flap() {
        let mut costs = Costs::new(RULE, None);
        feed(&mut costs, RULE.read, RULE.packed(), &[4096, 65536], 5);
        let before = costs.length;
        // Costs that swing by a tenth, to and fro.
        for swing in (0..40).map(|i| if i % 2 == 0 { 1.1 } else { 0.9 }) {
            let read = Line { piece: RULE.read.piece * swing, byte: RULE.read.byte };
            feed(&mut costs, read, RULE.packed(), &[4096, 65536], 1);
            assert_eq!(costs.length, before, "{swing}");
        }
        // A change that stays is followed, once for each class that shows it, and then stays.
        let read = Line { piece: RULE.read.piece * 4.0, byte: RULE.read.byte };
        assert!((1..=2).contains(&feed(&mut costs, read, RULE.packed(), &[4096, 65536], 10)), "{}", costs.words());
        assert_eq!(feed(&mut costs, read, RULE.packed(), &[4096, 65536], 40), 0);
        assert!(costs.length > 2.0 * before, "{}", costs.words());
    }

    #[test]
    fn the_length_grows_with_what_a_read_costs() {
        let meets = |piece: f64| {
            let mut costs = Costs::new(RULE, None);
            feed(&mut costs, Line { piece, ..RULE.read }, RULE.packed(), &[4096, 65536], 8);
            costs.length
        };
        let lengths: Vec<f64> = [200.0, 500.0, 1000.0, 3000.0, 9000.0, 1e6].map(meets).into();
        assert!(lengths.is_sorted(), "{lengths:?}");
        let rule = RULE.piece_bytes_min as f64;
        assert!(lengths.iter().all(|length| (rule * LEAST..=rule * GREATEST).contains(length)), "{lengths:?}");
        assert!(lengths.first() < lengths.last(), "{lengths:?}");
    }

    #[test]
    fn short_pieces_say_little_of_long_ones() {
        let mut costs = Costs::new(RULE, None);
        let (read, packed) = (Line { piece: 2730.0, byte: 0.435 }, Line { piece: 109.0, byte: 0.45 });
        feed(&mut costs, read, packed, &[4096], 9);
        assert!((12288.0..=16384.0).contains(&costs.length), "{}", costs.words());
    }

    #[test]
    fn the_other_way_is_tried_seldom_and_only_where_it_is_close() {
        let trials = |costs: &mut Costs, piece: u64, bytes: u64, usual: Manner| {
            (0..64).filter(|_| costs.choose(piece, bytes, true) != usual).count()
        };
        let mut costs = Costs::new(RULE, None);
        assert_eq!(trials(&mut costs, 1024, BYTES, Manner::Packed), 0, "far shorter");
        assert_eq!(trials(&mut costs, 1 << 20, BYTES, Manner::Read), 0, "far longer");
        assert_eq!(trials(&mut costs, 8192, 1 << 30, Manner::Packed), 0, "too long to try");
        assert_eq!(trials(&mut costs, 8192, BYTES, Manner::Packed), 16, "not known yet");
        feed(&mut costs, RULE.read, RULE.packed(), &[8192], 3);
        assert_eq!(trials(&mut costs, 8192, BYTES, Manner::Packed), 1);
        assert_eq!(trials(&mut Costs::new(RULE, Some(16384)), 8192, BYTES, Manner::Packed), 0, "told");
    }

    #[test]
    fn few_pieces_are_not_worth_a_round() {
        let mut costs = Costs::new(RULE, None);
        feed(&mut costs, RULE.read, RULE.packed(), &[4096, 65536], 3);
        let small = 16 * 4096;
        assert_eq!(costs.choose(4096, small, true), Manner::Packed);
        for _ in 0..3 {
            costs.note(Manner::Packed, 4096, small, took(RULE.packed(), 4096, small) + Duration::from_micros(50));
        }
        assert_eq!(costs.choose(4096, small, true), Manner::Read, "{}", costs.words());
        assert_eq!(costs.choose(4096, 1 << 30, true), Manner::Packed);
    }

    #[test]
    fn one_slow_round_decides_nothing_and_several_not_for_ever() {
        let mut costs = Costs::new(RULE, None);
        feed(&mut costs, RULE.read, RULE.packed(), &[4096, 65536], 3);
        let small = 16 * 4096;
        let slow = took(RULE.packed(), 4096, small) + Duration::from_millis(100);
        costs.note(Manner::Packed, 4096, small, slow);
        assert_eq!(costs.choose(4096, small, true), Manner::Packed, "{}", costs.words());
        for _ in 0..2 {
            costs.note(Manner::Packed, 4096, small, slow);
        }
        let tried = (0..64).filter(|_| costs.choose(4096, small, true) == Manner::Packed).count();
        assert_eq!(tried, 1, "{}", costs.words());
    }

    #[test]
    fn nothing_is_tried_of_which_nothing_is_learned() {
        let mut costs = Costs::new(RULE, None);
        assert!((0..64).all(|_| costs.choose(8192, BYTES, false) == Manner::Packed));
        // A transfer that says nothing of bytes does not speak for another length either.
        feed(&mut costs, Line { piece: 175.0, byte: 0.28 }, RULE.packed(), &[4096, 65536], 3);
        let (length, leaning) = (costs.length, costs.leaning);
        for _ in 0..9 {
            costs.note(Manner::Read, 4096, 4096, Duration::from_micros(1));
        }
        assert_eq!((costs.length, costs.leaning), (length, leaning));
    }

    #[test]
    fn a_users_word_stands() {
        let mut costs = Costs::new(RULE, Some(4096));
        feed(&mut costs, Line { piece: 1e6, byte: 1.0 }, RULE.packed(), &[4096, 65536], 9);
        assert_eq!((costs.choose(4096, BYTES, true), costs.choose(4095, BYTES, true)), (Manner::Read, Manner::Packed));
        assert!(costs.words().contains("4096 bytes") && costs.words().contains("as it was told"), "{}", costs.words());
    }
}
