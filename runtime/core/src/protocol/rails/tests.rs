use core::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{Segment, Side};

const MIB: u64 = 1 << 20;

fn terms() -> RailTerms {
    let millis = Duration::from_millis;
    RailTerms {
        rails_max: 4,
        share_bytes_min: MIB,
        wired_within: Duration::ZERO,
        rest: millis(100),
        rest_max: millis(1_000),
        ..RailTerms::default()
    }
}

fn at(millis: u64) -> Moment {
    Moment(millis * 1_000_000)
}

/// One plane of that many tokens of `run_bytes`.
fn program(tokens: u64, run_bytes: u32) -> Program {
    let side = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        block_tokens: 1,
        cp: 1,
        cp_rank: 0,
        token_pitch: u64::from(run_bytes),
        head_pitch: 0,
        offset: 0,
    };
    let segment = Segment { source: side, destination: side, planes: 1, start: 0, end: tokens, heads: 1, run_bytes };
    Program { segments: vec![segment], sources: vec![None], destinations: vec![None] }
}

/// Bytes for each NIC, of one that is shared out.
fn shares(rails: &mut Rails, now: Moment, bytes: u64) -> Vec<(usize, u64)> {
    let SharedOut { program, shares, .. } = rails.share_out(now, program(bytes / 4096, 4096));
    shares.into_iter().map(|(nic, range)| (nic, program.bytes_in(range))).collect()
}

/// Moves a large program, each rail at its rate in bytes per millisecond, and returns what is said of rails.
fn move_all(rails: &mut Rails, now: &mut u64, rates: &[u64]) -> Vec<(usize, RailHealth)> {
    let all = shares(rails, at(*now), 64 * MIB);
    let mut ends: Vec<(u64, usize, u64)> = Vec::new();
    for (nic, bytes) in all {
        rails.posted(at(*now), nic, bytes);
        ends.push((*now + bytes / rates[nic], nic, bytes));
    }
    ends.sort_unstable();
    let said = ends.iter().filter_map(|(end, nic, bytes)| Some((*nic, rails.moved(at(*end), *nic, *bytes)?))).collect();
    *now = ends.last().map_or(*now, |(end, ..)| *end);
    said
}

#[test]
fn rails_that_are_alike_share_evenly() {
    let mut rails = Rails::new([4, 5, 6, 7], terms());
    let mut now = 0;
    // 1.8 times is noise.
    for _ in 0..8 {
        assert_eq!(move_all(&mut rails, &mut now, &[0, 0, 0, 0, 10_000, 18_000, 12_000, 10_000]), []);
        let all = shares(&mut rails, at(now), 64 * MIB);
        assert_eq!(all.iter().map(|(nic, _)| *nic).collect::<Vec<_>>(), [4, 5, 6, 7]);
        assert!(all.iter().all(|(_, bytes)| bytes.abs_diff(16 * MIB) < MIB), "{all:?}");
    }
}

#[test]
fn small_programs_stay_on_one_rail_in_turn() {
    let mut rails = Rails::new([0, 1, 2], terms());
    let turns: Vec<_> = (0..6).map(|_| shares(&mut rails, at(0), MIB)).collect();
    assert_eq!(turns.iter().map(|one| one.len()).collect::<Vec<_>>(), [1; 6]);
    assert_eq!(turns.iter().map(|one| one[0].0).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
    // Two shares take two of three rails, the next two the others.
    let pairs: Vec<Vec<usize>> =
        (0..3).map(|_| shares(&mut rails, at(0), 2 * MIB).iter().map(|(nic, _)| *nic).collect()).collect();
    assert_eq!(pairs, [[0, 1], [0, 2], [1, 2]]);
    // Large and small steps in turn: neither rail gets all that are large.
    let mut rails = Rails::new([0, 1], terms());
    let mut got = [0, 0];
    for bytes in [MIB, 64 << 10].repeat(32) {
        shares(&mut rails, at(0), bytes).into_iter().for_each(|(nic, bytes)| got[nic] += bytes);
    }
    assert!(got[0].abs_diff(got[1]) <= MIB, "{got:?}");
    let nothing = rails.share_out(at(0), Program::default());
    assert!(nothing.shares.iter().all(|(_, range)| range.is_empty()), "{nothing:?}");
}

#[test]
fn a_rail_of_a_third_of_the_rate_gets_a_third_of_a_share() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    for _ in 0..4 {
        move_all(&mut rails, &mut now, &[30_000, 10_000]);
    }
    let all = shares(&mut rails, at(now), 64 * MIB);
    let [(0, most), (1, least)] = all[..] else { panic!("{all:?}") };
    assert!((most * 10 / least).abs_diff(30) <= 2, "{all:?}");
}

#[test]
fn a_rail_of_a_tenth_is_left_alone_until_a_trial_shows_that_it_is_back() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    let mut said = Vec::new();
    let mut rounds = 0;
    while said.is_empty() {
        rounds += 1;
        said = move_all(&mut rails, &mut now, &[10_000, 1_000]);
    }
    assert_eq!(said, [(1, RailHealth::Slow)]);
    assert!(rounds <= 4, "{rounds}");
    assert_eq!(shares(&mut rails, at(now), 64 * MIB), [(0, 64 * MIB)]);
    now += 100;
    let trial = shares(&mut rails, at(now), 64 * MIB);
    assert!(matches!(trial[..], [(0, most), (1, least)] if most > 14 * least && least >= MIB), "{trial:?}");
    // Where there are only programs for one rail, one that says something is its trial, and smaller ones are not.
    assert_eq!((shares(&mut rails, at(now), MIB)[0].0, shares(&mut rails, at(now), MIB / 2)[0].0), (1, 0));
    assert_eq!(move_all(&mut rails, &mut now, &[10_000, 500]), [], "still slow");
    now += 150;
    assert_eq!(shares(&mut rails, at(now), 64 * MIB), [(0, 64 * MIB)], "the rest is twice as long");
    now += 100;
    assert_eq!(move_all(&mut rails, &mut now, &[10_000, 9_000]), [(1, RailHealth::Up)]);
    let all = shares(&mut rails, at(now), 64 * MIB);
    assert!(all.len() == 2 && all.iter().all(|(_, bytes)| bytes.abs_diff(32 * MIB) < MIB), "{all:?}");
}

#[test]
fn few_bytes_bring_a_rail_back_and_say_nothing_of_its_rate() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    for _ in 0..4 {
        move_all(&mut rails, &mut now, &[100_000, 100_000]);
    }
    rails.posted(at(now), 1, 4096);
    rails.failed(at(now), 1);
    rails.ended(at(now), 1, 4096);
    now += 200;
    assert_eq!(shares(&mut rails, at(now), 8192), [(1, 8192)]);
    rails.posted(at(now), 1, 8192);
    assert_eq!(rails.moved(at(now + 10), 1, 8192), Some(RailHealth::Up), "at a tenth of the other's rate");
    let all = shares(&mut rails, at(now + 10), 64 * MIB);
    assert!(all.len() == 2 && all.iter().all(|(_, bytes)| bytes.abs_diff(32 * MIB) < MIB), "{all:?}");
}

#[test]
fn a_rail_that_becomes_slow_costs_one_long_handover() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    for _ in 0..3 {
        assert_eq!(move_all(&mut rails, &mut now, &[100_000, 100_000]), []);
    }
    // What takes as long as a silence is none of the bursts that an average is for.
    assert_eq!(move_all(&mut rails, &mut now, &[100_000, 10_000]), [(1, RailHealth::Slow)]);
    assert_eq!(shares(&mut rails, at(now), 64 * MIB), [(0, 64 * MIB)]);
    // A short one is averaged with what was before.
    let mut rails = Rails::new([0, 1], terms());
    for _ in 0..3 {
        move_all(&mut rails, &mut now, &[10_000_000, 10_000_000]);
    }
    assert_eq!(move_all(&mut rails, &mut now, &[10_000_000, 1_000_000]), []);
}

/// Moves a program of so many bytes, each rail at its rate in bytes per millisecond after so many milliseconds. Returns how long it took.
fn hand_over(rails: &mut Rails, now: &mut u64, bytes: u64, latency: u64, rates: &[u64]) -> u64 {
    let mut ends: Vec<(u64, usize, u64)> = Vec::new();
    for (nic, bytes) in shares(rails, at(*now), bytes) {
        rails.posted(at(*now), nic, bytes);
        ends.push((*now + latency + bytes / rates[nic], nic, bytes));
    }
    ends.sort_unstable();
    for (end, nic, bytes) in &ends {
        rails.moved(at(*end), *nic, *bytes);
    }
    let last = ends.last().map_or(*now, |(end, ..)| *end);
    let took = last - *now;
    *now = last;
    took
}

#[test]
fn a_mended_rail_has_its_share_again_after_three_trials_even_where_latency_is_most_of_them() {
    for (latency, bytes) in [(50, 4 * MIB), (5, 64 * MIB), (0, 64 * MIB)] {
        let mut rails = Rails::new([0, 1], terms());
        let mut now = 0;
        while rails.health(1) != Some(RailHealth::Slow) {
            hand_over(&mut rails, &mut now, bytes, latency, &[100_000, 2_000]);
            assert!(now < 60_000, "it is never found slow");
        }
        now += 1_000;
        let mut trials = 0;
        while rails.health(1) == Some(RailHealth::Slow) {
            trials += 1;
            assert!(trials <= 3, "latency {latency}: {rails:?}");
            hand_over(&mut rails, &mut now, bytes, latency, &[100_000, 100_000]);
        }
        for _ in 0..8 {
            let all = shares(&mut rails, at(now), bytes);
            assert!(all.len() == 2 && all[0].1.abs_diff(all[1].1) * 8 <= bytes, "latency {latency}: {all:?}");
            hand_over(&mut rails, &mut now, bytes, latency, &[100_000, 100_000]);
        }
    }
}

#[test]
fn a_rail_that_stays_slow_is_left_alone_and_its_trials_cost_little() {
    for latency in [0, 5, 100] {
        let mut rails = Rails::new([0, 1, 2], terms());
        let mut now = 0;
        let rates = [100_000, 10_000, 100_000];
        while rails.health(1) != Some(RailHealth::Slow) {
            hand_over(&mut rails, &mut now, 64 * MIB, latency, &rates);
            assert!(now < 60_000, "it is never found slow");
        }
        let usual = hand_over(&mut rails, &mut now, 64 * MIB, latency, &rates);
        for _ in 0..100 {
            let took = hand_over(&mut rails, &mut now, 64 * MIB, latency, &rates);
            assert!(took * 10 <= usual * 17, "latency {latency}: {took} ms instead of {usual}: {rails:?}");
            assert_eq!(rails.health(1), Some(RailHealth::Slow), "latency {latency}");
            now += 20;
        }
        assert_eq!(rails.rails[1].rests_until.0.min(at(now + 1_000).0), rails.rails[1].rests_until.0);
        assert!(rails.rails[1].rests >= 5, "every trial that costs time doubles its rest: {rails:?}");
    }
}

#[test]
fn what_ends_together_is_no_faster_than_what_ends_in_turn() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    for _ in 0..8 {
        for (nic, bytes) in (0..8).flat_map(|_| [(0, MIB), (1, MIB)]) {
            rails.posted(at(now), nic, bytes);
        }
        // As much in the same time: one after the other, or all at once in its last moment.
        for which in 1..=8 {
            assert_eq!(rails.moved(at(now + which * 10), 1, MIB), None);
        }
        for _ in 0..8 {
            assert_eq!(rails.moved(at(now + 80), 0, MIB), None, "{rails:?}");
        }
        now += 100;
        let all = shares(&mut rails, at(now), 64 * MIB);
        assert!(all.len() == 2 && all.iter().all(|(_, bytes)| bytes.abs_diff(32 * MIB) < MIB), "{all:?}");
    }
}

#[test]
fn what_is_left_of_before_is_no_trial() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    rails.posted(at(now), 1, MIB);
    while rails.health(1) != Some(RailHealth::Slow) {
        move_all(&mut rails, &mut now, &[100_000, 5_000]);
        assert!(now < 600_000, "it is never found slow");
    }
    now += 1_000;
    assert_eq!(shares(&mut rails, at(now), 64 * MIB), [(0, 64 * MIB)], "something of it is still under way");
    assert_eq!(rails.moved(at(now), 1, MIB), None);
    assert_eq!(shares(&mut rails, at(now), 64 * MIB).len(), 2, "now its trial is all there is");
}

#[test]
fn a_rail_that_is_back_has_to_show_itself_before_its_rests_are_forgotten() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    for rests in 1..4 {
        rails.posted(at(now), 1, MIB);
        rails.failed(at(now), 1);
        rails.ended(at(now), 1, MIB);
        assert_eq!(rails.rails[1].rests, rests, "it failed again as soon as it was back");
        now += 2_000;
        rails.posted(at(now), 1, MIB);
        assert_eq!(rails.moved(at(now + 1), 1, MIB), Some(RailHealth::Up));
    }
    for _ in 0..SEEN_MIN {
        now += 1;
        move_all(&mut rails, &mut now, &[100_000, 100_000]);
    }
    assert_eq!(rails.rails[1].rests, 0);
}

#[test]
fn a_rail_that_failed_rests_longer_every_time_and_comes_back_by_a_trial() {
    let mut rails = Rails::new([0, 1], terms());
    rails.posted(at(0), 0, MIB);
    assert_eq!(rails.failed(at(0), 0), Some(RailHealth::Down));
    assert_eq!(rails.failed(at(0), 0), None, "what ends with it says nothing new");
    rails.ended(at(0), 0, MIB);
    assert_eq!((rails.health(0), rails.health(1)), (Some(RailHealth::Down), Some(RailHealth::Up)));
    for rest in [100, 200, 400] {
        let now = rest * 10;
        rails.rails[0].rests_until = at(now + rest);
        assert_eq!(shares(&mut rails, at(now + rest - 1), MIB), [(1, MIB)]);
        assert_eq!(shares(&mut rails, at(now + rest), MIB), [(0, MIB)], "any program is a trial");
        rails.posted(at(now + rest), 0, MIB);
        assert_eq!(shares(&mut rails, at(now + rest), MIB), [(1, MIB)], "one at a time");
        let before = rails.rails[0].rests;
        assert_eq!(rails.failed(at(now + rest), 0), None);
        rails.ended(at(now + rest), 0, MIB);
        assert_eq!(rails.rails[0].rests, before + 1);
        assert!(rails.rails[0].rests_until >= at(now + rest * 2));
    }
    let until = rails.rails[0].rests_until;
    assert_eq!(shares(&mut rails, until, MIB), [(0, MIB)]);
    rails.posted(until, 0, MIB);
    assert_eq!(rails.moved(until + Duration::from_millis(1), 0, MIB), Some(RailHealth::Up));
    assert_eq!(shares(&mut rails, until, 64 * MIB).len(), 2, "with all that it carried before");
}

#[test]
fn somebody_carries_it_even_when_nobody_is_up() {
    let mut rails = Rails::new([3, 9], terms());
    rails.failed(at(0), 3);
    rails.failed(at(5), 9);
    assert_eq!(shares(&mut rails, at(6), 64 * MIB), [(3, 64 * MIB)]);
    assert_eq!(rails.another(at(6), 3, false), None);
    assert_eq!(rails.another(at(6), 3, true), None, "it rests");
    assert_eq!(rails.another(at(105), 3, true), Some(9));
    let mut alone = Rails::new([3], terms());
    alone.failed(at(0), 3);
    assert_eq!(shares(&mut alone, at(1), 64 * MIB), [(3, 64 * MIB)]);
    assert_eq!(alone.another(at(900), 3, true), None);
}

#[test]
fn a_trial_that_ends_without_a_word_does_not_bar_the_next() {
    let mut rails = Rails::new([0, 1], terms());
    rails.failed(at(0), 0);
    rails.posted(at(100), 0, MIB);
    assert_eq!(rails.another(at(100), 1, true), None, "one trial at a time");
    rails.ended(at(101), 0, MIB);
    assert_eq!(shares(&mut rails, at(101), MIB), [(0, MIB)], "it has rested, and nothing says that it failed again");
    rails.failed(at(101), 1);
    assert_eq!(rails.another(at(101), 1, true), Some(0));
}

#[test]
fn a_slow_rail_is_better_than_a_dead_one() {
    let mut rails = Rails::new([0, 1], terms());
    let mut now = 0;
    while rails.health(1) != Some(RailHealth::Slow) {
        move_all(&mut rails, &mut now, &[10_000, 1_000]);
    }
    assert!(rails.has_another(0) && at(now) < rails.rails[1].rests_until);
    assert_eq!(rails.another(at(now), 0, false), Some(1), "though it rests");
    rails.posted(at(now), 1, MIB);
    assert_eq!(rails.another(at(now), 0, false), Some(1), "though it is on trial");
    rails.failed(at(now), 0);
    assert_eq!(shares(&mut rails, at(now + 5), 64 * MIB), [(1, 64 * MIB)], "and not the one that rests for less long");
    assert!(rails.has_another(0) && !rails.has_another(1));
    assert_eq!(rails.moved(at(now + 100), 1, MIB), Some(RailHealth::Up), "there is nothing faster");
}

/// Connections may still be made when the first bytes are posted: that is no silence. Once the rail has moved something, or has failed, it is.
#[test]
fn a_rail_whose_way_is_not_wired_yet_is_not_silent() {
    let wired_within = Duration::from_secs(3);
    let mut rails = Rails::new([0, 1], RailTerms { wired_within, ..terms() });
    let silent_after = terms().silent_after;
    for nic in [0, 1] {
        assert!(rails.posted(at(0), nic, 0) >= silent_after + wired_within);
    }
    assert_eq!(rails.moved(at(2_900), 0, 0), None);
    assert_eq!((rails.patience(0), rails.patience(1)), (silent_after, silent_after + wired_within));
    assert_eq!(rails.failed(at(3_500), 1), Some(RailHealth::Down));
    rails.ended(at(3_500), 1, 0);
    assert_eq!(rails.posted(at(10_000), 1, 0), silent_after, "a trial waits no longer");
}

#[test]
fn patience_grows_with_what_is_under_way() {
    let mut rails = Rails::new([0, 1], terms());
    let silent_after = terms().silent_after;
    let first = rails.posted(at(0), 0, 100 * MIB);
    assert!(first > silent_after + Duration::from_secs(8) && first < silent_after + Duration::from_secs(9));
    assert!(rails.posted(at(0), 0, 100 * MIB) > first * 19 / 10);
    assert_eq!(rails.patience(1), silent_after);
    rails.moved(at(10), 0, 100 * MIB);
    assert!(rails.patience(0) > silent_after * 9, "the other one may say something else");
    rails.moved(at(20), 0, 100 * MIB);
    rails.posted(at(30), 0, 100 * MIB);
    assert!(rails.patience(0) < silent_after + Duration::from_millis(100), "its rate is known");
}

#[test]
fn a_huge_piece_is_cut_for_several_rails_only() {
    let huge = program(1, u32::MAX);
    let same = Rails::new([0], terms()).share_out(at(0), huge.clone());
    assert_eq!((same.program, same.unit_bytes_max, same.shares.len()), (huge.clone(), None, 1));
    let SharedOut { program: cut, unit_bytes_max, shares } =
        Rails::new([0, 1, 2], terms()).share_out(at(0), huge.clone());
    assert_eq!(unit_bytes_max.map(|most| huge.with_units_up_to(most)), Some(cut.clone()), "a peer can do the same");
    let sizes: Vec<u64> = shares.iter().map(|(_, range)| cut.bytes_in(*range)).collect();
    assert_eq!(sizes.iter().sum::<u64>(), huge.bytes());
    assert!(
        sizes.len() == 3 && sizes.iter().all(|size| size.abs_diff(huge.bytes() / 3) < huge.bytes() / 12),
        "{sizes:?}"
    );
}

#[derive(Clone, Debug)]
enum Operation {
    Share(u64),
    Moved(usize),
    Ended(usize),
    Failed(usize),
    Wait(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let bytes = prop_oneof![Just(0), Just(1), 0..64 * MIB, (1u64 << 32)..(1 << 40)];
    prop_oneof![
        4 => bytes.prop_map(Operation::Share),
        6 => (0..32usize).prop_map(Operation::Moved),
        1 => (0..32usize).prop_map(Operation::Ended),
        1 => (0..6usize).prop_map(Operation::Failed),
        3 => (0..400u64).prop_map(Operation::Wait),
    ]
}

proptest! {
    #[test]
    fn whatever_becomes_of_rails_every_byte_has_one(
        count in 1..6usize,
        run_bytes in prop_oneof![Just(1u32), Just(4096), Just(u32::MAX), any::<u32>().prop_map(|bytes| bytes.max(1))],
        operations in prop::collection::vec(operation(), 1..120),
    ) {
        let mut rails = Rails::new(0..count, terms());
        let (mut now, mut flying): (u64, Vec<(usize, u64)>) = (0, Vec::new());
        for operation in operations {
            match operation {
                Operation::Share(bytes) => {
                    let whole = program(bytes / u64::from(run_bytes) + bytes % 2, run_bytes);
                    let health = rails.clone();
                    let SharedOut { program: cut, shares, .. } = rails.share_out(at(now), whole.clone());
                    prop_assert_eq!(cut.bytes(), whole.bytes());
                    let mut next = 0;
                    for (nic, range) in &shares {
                        prop_assert!(*nic < count && range.start == next && range.start <= range.end);
                        next = range.end;
                        let resting = health.rails[*nic].health != RailHealth::Up
                            && (health.rails[*nic].on_trial || at(now) < health.rails[*nic].rests_until);
                        let others = health.rails.iter().any(|rail| rail.health == RailHealth::Up);
                        prop_assert!(!resting || !others, "a rail that rests carries nothing while another is up");
                        let bytes = cut.bytes_in(*range);
                        prop_assert!(rails.posted(at(now), *nic, bytes) >= terms().silent_after);
                        flying.push((*nic, bytes));
                    }
                    prop_assert_eq!(next, cut.units());
                }
                Operation::Moved(which) if which < flying.len() => {
                    let (nic, bytes) = flying.swap_remove(which);
                    rails.moved(at(now), nic, bytes);
                }
                Operation::Ended(which) if which < flying.len() => {
                    let (nic, bytes) = flying.swap_remove(which);
                    rails.ended(at(now), nic, bytes);
                }
                Operation::Failed(nic) => {
                    rails.failed(at(now), nic);
                }
                Operation::Wait(millis) => now += millis,
                _ => {}
            }
            for (nic, rail) in rails.rails.iter().enumerate() {
                let under_way: Vec<u64> = flying.iter().filter(|(on, _)| *on == nic).map(|(_, bytes)| *bytes).collect();
                prop_assert_eq!(rail.pace.under_way() as usize, under_way.len());
                prop_assert!(!rail.on_trial || rail.pace.under_way() > 0, "nothing is under way that could end the trial");
                prop_assert_eq!(rail.outstanding, under_way.iter().sum::<u64>());
            }
        }
    }
}
