//! Seeds that once broke an invariant, each named by what was wrong.
#![allow(clippy::unwrap_used, reason = "tests")]

use kvferry_sim::{Config, Run, Shape};

fn holds(seed: u64, shape: &Shape) {
    // They were found when one NIC read from each peer.
    let shape = Shape { rails: Some(1), ..shape.clone() };
    let report = Run::new(Config::from_seed(seed, &shape).unwrap()).unwrap().to_end(|_| {});
    assert_eq!(report.broken, [], "seed {seed}");
}

/// A scheduler that had started again took credits for handovers whose blocks had come back while there was no scheduler, and kept them.
#[test]
fn credits_that_came_back_unheard_are_not_taken_again() {
    for seed in [46, 127, 297] {
        holds(seed, &Shape::default());
    }
}

/// News of an earlier incarnation's loss, come late: ranks failed a handover that their leader had decided to be delivered.
#[test]
fn only_the_leader_decides_when_another_rank_is_lost() {
    for seed in [122, 202, 243] {
        holds(seed, &Shape::default());
    }
}

/// News of an earlier incarnation's loss, come late: leaders struck the later one off their roll, and took no work any more.
#[test]
fn late_news_of_a_loss_strikes_nobody_off() {
    holds(175, &Shape::default());
}

/// A scheduler that had started again took a node in that a predecessor had declared lost, while other nodes refused it: they never met again.
#[test]
fn a_node_that_somebody_was_told_to_be_lost_is_lost() {
    for seed in [1882, 2115] {
        holds(seed, &Shape::default());
    }
}

/// A scheduler that had started again, and had met no decode group yet, gave up a request whose offer lapsed; then the decode leader came and said
/// that it was delivered.
#[test]
fn a_request_is_not_given_up_before_its_groups_were_met() {
    holds(2876, &Shape::default());
}

/// A leader that was about to hear that a rank was lost gave it work, which the rank's next incarnation got: it held blocks that nobody had counted.
#[test]
fn what_was_meant_for_a_lost_rank_is_not_said_to_its_next_incarnation() {
    for seed in [858, 1611, 1810, 3489, 3943, 31_612, 32_254, 229_472_139] {
        holds(seed, &Shape::default());
    }
}

/// No fault of the runtime: a node that had stood still for longer than the observer allows found the welcome of an incarnation that was over.
#[test]
fn last_words_wait_for_whoever_stands_still() {
    holds(32159, &Shape::default());
}

/// A scheduler that had started again took a cancel at its word before it had met the leader that had delivered the request meanwhile: an answer
/// that contradicts what all engines were told.
#[test]
fn a_cancel_is_not_answered_before_leaders_were_heard() {
    for seed in [53, 116] {
        holds(seed, &Shape::default());
    }
}

/// A fence that gave a NIC's pools new keys did not let those in again who were meant no harm: they were refused from then on.
#[test]
fn new_keys_reach_those_that_a_fence_did_not_mean() {
    for seed in [2466, 115_903_740] {
        holds(seed, &Shape::default());
    }
}
