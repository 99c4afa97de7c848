//! Several pairs of NICs that join two ranks: who carries how much, who is left alone, and who may try again.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Moment, Program, UnitRange};

mod pace;

use pace::{Pace, Speed};

/// A rail that is so many times slower than the best one is left alone, but for a trial now and then.
const SLOW: u64 = 4;
/// What differs less from the best is noise: such rails share evenly.
const ALIKE: u64 = 2;
/// A rail's first trial gets this part of what the others get together, and every one that is in time is followed by one of twice as much.
const TRIAL_PART: u64 = 16;
/// A unit larger than this part of a share is cut, or shares would differ by more.
const UNITS_PER_SHARE: u64 = 16;
/// Observations without which nothing is called slow, or gets less: the first have connections and registrations in them.
const SEEN_MIN: u32 = 3;
/// How many of those a rail has to show again that was slow: what brought it back was less than its share.
const SHOWN_AGAIN: u32 = 2;
/// How often a share is posted at most, for every rail that there is.
const TRIES_PER_RAIL: u32 = 2;
/// Weights are parts of this many.
const WHOLE: u128 = 1 << 16;

/// How the NICs that join two ranks share work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RailTerms {
    /// Pairs of NICs that serve one pair of ranks at once, at most; 1 leaves one NIC to every pair of ranks.
    pub rails_max: u32,
    /// Bytes below which there is no share of its own: programs of less than two of these stay on one rail, in turn.
    pub share_bytes_min: u64,
    /// How long a share may take longer than expected before its rail counts as silent and another one moves the same bytes.
    pub silent_after: Duration,
    /// How much longer, as long as the rail has moved nothing to that peer yet: libraries that connect late take a while for it.
    #[serde(default)]
    pub wired_within: Duration,
    /// How many times the expected time a share is given besides.
    pub slack: u32,
    /// Rate assumed before any was observed, in bytes per second.
    pub initial_bytes_per_second: u64,
    /// How long a rail rests that failed or is slow, before it may try again; doubled every time until it has carried its share well again.
    pub rest: Duration,
    /// The longest rest.
    pub rest_max: Duration,
}

impl Default for RailTerms {
    fn default() -> Self {
        RailTerms {
            rails_max: 1,
            share_bytes_min: 256 << 10,
            silent_after: Duration::from_millis(250),
            wired_within: Duration::from_secs(3),
            // Other peers share the NICs, and come in bursts: what only has to wait for them is not silent.
            slack: 8,
            initial_bytes_per_second: 100_000_000,
            rest: Duration::from_millis(500),
            rest_max: Duration::from_secs(30),
        }
    }
}

/// What is known of a rail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RailHealth {
    /// It carries its share.
    Up,
    /// It is much slower than the best: it carries nothing but trials.
    Slow,
    /// It failed, or fell silent: it carries nothing but trials.
    Down,
}

impl RailHealth {
    /// The word used in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            RailHealth::Up => "up",
            RailHealth::Slow => "slow",
            RailHealth::Down => "down",
        }
    }
}

/// The rails to one peer, each known by the NIC of this side that it ends at.
///
/// Time is an argument; nothing here waits: a rail that rests is found fit for a trial when work is shared out after its rest.
#[derive(Clone, Debug)]
pub struct Rails {
    terms: RailTerms,
    rails: Vec<Rail>,
    /// Whose turn it is among those that are alike.
    turn: usize,
}

/// A program, and who moves which part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedOut {
    /// With smaller units than it had, where its own were too large to be shared.
    pub program: Program,
    /// Then what [`Program::with_units_up_to`] was given, in bytes.
    pub unit_bytes_max: Option<u64>,
    /// A NIC of this side for each part, none of them empty unless the program is.
    pub shares: Vec<(usize, UnitRange)>,
}

#[derive(Clone, Debug)]
struct Rail {
    nic: usize,
    health: RailHealth,
    /// When it may try again; only of one that is not up.
    rests_until: Moment,
    on_trial: bool,
    /// Whether its way stands: it has moved something, or there was time enough for it.
    is_wired: bool,
    /// Which part of what the others get together its next trial is.
    part: u64,
    /// Rests since it carried its share for as long as it takes to know it.
    rests: u32,
    /// As observed.
    speed: Option<Speed>,
    /// How often.
    seen: u32,
    pace: Pace,
    /// Bytes that were posted and have not ended.
    outstanding: u64,
    /// Bytes that it got by turns, beyond who got the fewest.
    given: u64,
}

impl Rails {
    /// Rails that end at these NICs of this side, all of them up.
    pub fn new(nics: impl IntoIterator<Item = usize>, terms: RailTerms) -> Self {
        let rail = |nic| Rail {
            nic,
            health: RailHealth::Up,
            rests_until: Moment::default(),
            on_trial: false,
            is_wired: false,
            part: TRIAL_PART,
            rests: 0,
            speed: None,
            seen: 0,
            pace: Pace::default(),
            outstanding: 0,
            given: 0,
        };
        Rails { terms, rails: nics.into_iter().map(rail).collect(), turn: 0 }
    }

    /// Whether there is more than one.
    pub fn are_several(&self) -> bool {
        self.rails.len() > 1
    }

    /// How often a share is posted at most.
    pub fn tries_max(&self) -> u32 {
        TRIES_PER_RAIL.saturating_mul(u32::try_from(self.rails.len()).unwrap_or(u32::MAX))
    }

    /// What is known of the rail that ends at that NIC.
    pub fn health(&self, nic: usize) -> Option<RailHealth> {
        self.rails.iter().find(|rail| rail.nic == nic).map(|rail| rail.health)
    }

    /// Takes a rail out for good, unless it is the last.
    pub fn remove(&mut self, nic: usize) {
        if self.are_several() {
            self.rails.retain(|rail| rail.nic != nic);
        }
    }

    /// Whether the next post at that NIC tries what failed, with nothing else under way there: then its connection may as well be made anew.
    pub fn begins_anew(&self, nic: usize) -> bool {
        let is_idle = |rail: &Rail| rail.nic == nic && rail.health == RailHealth::Down && rail.is_idle();
        self.are_several() && self.rails.iter().any(is_idle)
    }

    /// Shares a program out: a range of it for each NIC that is to carry one. Together they are the whole program, in order, and none overlaps
    /// another.
    pub fn share_out(&mut self, now: Moment, program: Program) -> SharedOut {
        let bearers = self.bearers(now, program.bytes());
        let (nics, weights): (Vec<usize>, Vec<u32>) = bearers.into_iter().unzip();
        if nics.len() < 2 {
            let whole = program.whole();
            let shares = nics.into_iter().map(|nic| (nic, whole)).collect();
            return SharedOut { program, unit_bytes_max: None, shares };
        }
        let most = program.bytes() / nics.len() as u64 / UNITS_PER_SHARE;
        let are_large = program.unit_bytes_max() > most.max(self.terms.share_bytes_min / UNITS_PER_SHARE);
        let unit_bytes_max = are_large.then_some(most);
        let program = match unit_bytes_max {
            Some(most) => program.with_units_up_to(most),
            None => program,
        };
        let ranges = program.split_by(&weights);
        let shares = nics.into_iter().zip(ranges).filter(|(_, range)| !range.is_empty()).collect();
        SharedOut { program, unit_bytes_max, shares }
    }

    /// Another NIC than `nic` that is fit to carry what that one does not: one that is up, with the least under way; or else one that is slow,
    /// for that is better than nobody; or else, where `at_last`, one that has rested.
    pub fn another(&self, now: Moment, nic: usize, at_last: bool) -> Option<usize> {
        let others = || self.rails.iter().filter(|rail| rail.nic != nic);
        let moving = others().filter(|rail| rail.health != RailHealth::Down);
        let moving = moving.min_by_key(|rail| (rail.health, rail.outstanding));
        let rested = || others().filter(|rail| !rail.on_trial).min_by_key(|rail| rail.rests_until);
        moving.or_else(|| rested().filter(|rail| at_last && now >= rail.rests_until)).map(|rail| rail.nic)
    }

    /// Who carries what the rail at `nic` did not, where somebody has to: another one, else one that rests, else the same again.
    pub fn resort(&self, now: Moment, nic: usize) -> usize {
        let others = self.rails.iter().filter(|rail| rail.nic != nic);
        let resting = others.min_by_key(|rail| (rail.on_trial, rail.rests_until)).map(|rail| rail.nic);
        self.another(now, nic, true).or(resting).unwrap_or(nic)
    }

    /// Whether any other rail than that at `nic` moves bytes, however slowly.
    pub fn has_another(&self, nic: usize) -> bool {
        self.rails.iter().any(|rail| rail.nic != nic && rail.health != RailHealth::Down)
    }

    /// Bytes were posted to that NIC. Returns how long they may take before the rail counts as silent.
    pub fn posted(&mut self, now: Moment, nic: usize, bytes: u64) -> Duration {
        let terms = self.terms;
        let Some(rail) = self.rail(nic) else { return terms.silent_after };
        if rail.health == RailHealth::Slow && rail.is_idle() {
            // What it did before is no part of its trial.
            rail.pace.restart(now);
            rail.on_trial = true;
        }
        rail.on_trial |= rail.health == RailHealth::Down;
        rail.pace.began(now);
        rail.outstanding = rail.outstanding.saturating_add(bytes);
        rail.patience(&terms)
    }

    /// How long what is under way at that NIC may take from now on.
    pub fn patience(&self, nic: usize) -> Duration {
        let rail = self.rails.iter().find(|rail| rail.nic == nic);
        rail.map_or(self.terms.silent_after, |rail| rail.patience(&self.terms))
    }

    /// Bytes that were posted to that NIC have moved. Returns what the rail is from now on, where that is something else than before.
    pub fn moved(&mut self, now: Moment, nic: usize, bytes: u64) -> Option<RailHealth> {
        let terms = self.terms;
        let best = self.best_but(nic);
        let rail = self.rail(nic)?;
        rail.outstanding = rail.outstanding.saturating_sub(bytes);
        rail.is_wired = true;
        let (was, was_on_trial) = (rail.health, rail.on_trial);
        let is_tried = was_on_trial && was == RailHealth::Slow;
        let round = rail.pace.came(now, bytes, if is_tried { 0 } else { terms.share_bytes_min });
        rail.on_trial &= is_tried && round.is_none() && !rail.is_idle();
        match (was, round, best) {
            (RailHealth::Up, Some(round), _) => {
                rail.learn(round, &terms);
                rail.judge(now, &terms, best)
            }
            // Of a few bytes mostly the way there and back is seen: it is back, and how fast it is shows from now on.
            (RailHealth::Down, ..) if was_on_trial => rail.is_up(0),
            // There is nothing faster.
            (RailHealth::Slow, _, None) => rail.is_up(0),
            (RailHealth::Slow, Some(round), Some(best)) if is_tried => rail.tried(now, &terms, round, best),
            _ => None,
        }
    }

    /// What was posted to that NIC ended otherwise, and nobody can say that the rail is to blame for it.
    pub fn ended(&mut self, now: Moment, nic: usize, bytes: u64) {
        if let Some(rail) = self.rail(nic) {
            rail.ended(now, bytes);
        }
    }

    /// The rail at that NIC failed, or was silent for too long: it rests. Returns what it is from now on, where that is something else than
    /// before. What ends with it does not count again, and is to be told of afterwards: a trial that has ended is none any more.
    pub fn failed(&mut self, now: Moment, nic: usize) -> Option<RailHealth> {
        let terms = self.terms;
        let rail = self.rail(nic)?;
        if rail.health == RailHealth::Down && !rail.on_trial {
            return None;
        }
        let was = rail.health;
        // A trial costs what waits for it: it is not given that time again.
        rail.is_wired = true;
        rail.rest(now, &terms, RailHealth::Down);
        // What it did before says nothing of what it will do.
        (rail.speed, rail.seen) = (None, 0);
        rail.pace.restart(now);
        (was != RailHealth::Down).then_some(RailHealth::Down)
    }

    /// Which NICs carry something of a program of so many bytes, each with its weight, in the order of the rails.
    fn bearers(&mut self, now: Moment, bytes: u64) -> Vec<(usize, u32)> {
        let up: Vec<usize> = self.indices(|rail| rail.health == RailHealth::Up);
        let trial = self.indices(|rail| rail.may_be_tried(now)).first().copied();
        let least = self.terms.share_bytes_min.max(1);
        let shares = usize::try_from(bytes / least).unwrap_or(usize::MAX);
        if up.is_empty() {
            // Whoever rests is better than nobody, and whoever moves bytes than whoever may not.
            let first = self.rails.iter().min_by_key(|rail| (rail.health, rail.on_trial, rail.rests_until));
            return first.map(|rail| (rail.nic, 1)).into_iter().collect();
        }
        if shares < 2 {
            // A trial of a slow rail has to be something beside what the others carry.
            let usual = self.best(&up).map_or(0, |best| best.bytes);
            let tells = bytes >= least || bytes.saturating_mul(SLOW) >= usual;
            let is_down = |index: &usize| self.at(*index).is_some_and(|rail| rail.health == RailHealth::Down);
            let trial = trial.filter(|index| tells || is_down(index));
            let turn = self.take_turns(&up, 1, bytes);
            return trial
                .or_else(|| turn.first().copied())
                .and_then(|index| Some((self.at(index)?.nic, 1)))
                .into_iter()
                .collect();
        }
        let chosen = self.take_turns(&up, shares, bytes);
        let best = self.best(&chosen).map(|best| best.rate);
        let rate = |index: usize| self.at(index)?.speed_if_known().map(|speed| speed.rate);
        let weight = |index: usize| match (rate(index), best) {
            (Some(rate), Some(best)) if rate.saturating_mul(ALIKE) < best => {
                u32::try_from(u128::from(rate) * WHOLE / u128::from(best)).unwrap_or(1).max(1)
            }
            _ => WHOLE as u32,
        };
        let mut weights: Vec<(usize, u32)> = chosen.iter().map(|index| (*index, weight(*index))).collect();
        if let Some(trial) = trial {
            let together: u64 = weights.iter().map(|(_, weight)| u64::from(*weight)).sum();
            let part = self.at(trial).map_or(TRIAL_PART, |rail| rail.part).max(1);
            weights.push((trial, u32::try_from(together / part).unwrap_or(u32::MAX).max(1)));
        }
        weights.sort_unstable();
        weights.into_iter().filter_map(|(index, weight)| Some((self.at(index)?.nic, weight))).collect()
    }

    /// The next of `among` whose turn it is, at most `most`: who got the fewest bytes by turns so far, for steps of a model differ in size.
    fn take_turns(&mut self, among: &[usize], most: usize, bytes: u64) -> Vec<usize> {
        let first = among.iter().position(|index| *index >= self.turn).unwrap_or(0);
        let mut chosen: Vec<usize> = among.iter().cycle().skip(first).take(among.len()).copied().collect();
        if most >= among.len() {
            return chosen;
        }
        chosen.sort_by_key(|index| self.at(*index).map_or(u64::MAX, |rail| rail.given));
        chosen.truncate(most);
        let each = bytes / (chosen.len() as u64).max(1);
        for index in &chosen {
            if let Some(rail) = self.rails.get_mut(*index) {
                rail.given = rail.given.saturating_add(each);
            }
        }
        let least = among.iter().filter_map(|index| Some(self.at(*index)?.given)).min().unwrap_or(0);
        for index in among {
            if let Some(rail) = self.rails.get_mut(*index) {
                rail.given = rail.given.saturating_sub(least);
            }
        }
        self.turn = chosen.last().map_or(0, |last| last + 1);
        chosen
    }

    /// What the fastest of some rails has shown.
    fn best(&self, among: &[usize]) -> Option<Speed> {
        among.iter().filter_map(|index| self.at(*index)?.speed).max_by_key(|speed| speed.rate)
    }

    /// What the fastest of the others that are up has shown.
    fn best_but(&self, nic: usize) -> Option<Speed> {
        self.best(&self.indices(|rail| rail.nic != nic && rail.health == RailHealth::Up))
    }

    fn indices(&self, which: impl Fn(&Rail) -> bool) -> Vec<usize> {
        self.rails.iter().enumerate().filter(|(_, rail)| which(rail)).map(|(index, _)| index).collect()
    }

    fn at(&self, index: usize) -> Option<&Rail> {
        self.rails.get(index)
    }

    fn rail(&mut self, nic: usize) -> Option<&mut Rail> {
        self.rails.iter_mut().find(|rail| rail.nic == nic)
    }
}

impl Rail {
    fn is_idle(&self) -> bool {
        self.pace.under_way() == 0
    }

    /// Whether it has rested. What is left of when it was up would be a slow one's trial, and is over some day; a dead one's may never be.
    fn may_be_tried(&self, now: Moment) -> bool {
        let is_free = self.is_idle() || self.health == RailHealth::Down;
        self.health != RailHealth::Up && !self.on_trial && is_free && now >= self.rests_until
    }

    fn rest(&mut self, now: Moment, terms: &RailTerms, health: RailHealth) {
        let longer = terms.rest.saturating_mul(1 << self.rests.min(16)).min(terms.rest_max);
        self.rests = self.rests.saturating_add(1);
        self.rests_until = now + longer;
        (self.health, self.on_trial, self.part) = (health, false, TRIAL_PART);
    }

    /// It carries its share from now on, and has been seen so often. What it rested counts until it has shown itself.
    fn is_up(&mut self, seen: u32) -> Option<RailHealth> {
        (self.health, self.seen, self.on_trial) = (RailHealth::Up, seen, false);
        Some(RailHealth::Up)
    }

    fn ended(&mut self, now: Moment, bytes: u64) {
        self.pace.ended(now);
        self.outstanding = self.outstanding.saturating_sub(bytes);
        // However the trial ended: nothing tells of it any more, and the rail may be tried again.
        self.on_trial &= !self.is_idle();
    }

    fn speed_if_known(&self) -> Option<Speed> {
        self.speed.filter(|_| self.seen >= SEEN_MIN)
    }

    /// Takes in what a round has shown: halfway, for others share its NICs, and come in bursts; what took as long as a silence says by itself what
    /// is so now, so a cable that became slow is left alone after one handover that suffered from it.
    fn learn(&mut self, round: Speed, terms: &RailTerms) {
        let before = self.speed.filter(|_| round.busy < terms.silent_after);
        self.speed = Some(before.map_or(round, |before| before.towards(round)));
        self.seen = self.seen.saturating_add(1);
    }

    /// Compares it with the best of the others, now that more of it is known.
    fn judge(&mut self, now: Moment, terms: &RailTerms, best: Option<Speed>) -> Option<RailHealth> {
        let known = self.speed_if_known()?;
        if best.is_some_and(|best| known.is_slow_beside(&best)) {
            self.rest(now, terms, RailHealth::Slow);
            return Some(RailHealth::Slow);
        }
        self.rests = 0;
        None
    }

    /// Its trial is over. It is back if it is not slow even so, for latency weighs more in a trial than in a share; or once one that says as much
    /// as a share was in time for the others'. Until then every trial that was is followed by a larger one.
    fn tried(&mut self, now: Moment, terms: &RailTerms, round: Speed, best: Speed) -> Option<RailHealth> {
        self.speed = Some(round);
        let is_slow = round.is_slow_beside(&best);
        if is_slow && !round.is_in_time_for(&best) {
            self.rest(now, terms, RailHealth::Slow);
            return None;
        }
        let says_enough = self.part <= SLOW || round.bytes.saturating_mul(SLOW) >= best.bytes;
        if !is_slow || says_enough {
            return self.is_up(SEEN_MIN - SHOWN_AGAIN);
        }
        (self.part, self.rests_until) = (self.part / 2, now);
        None
    }

    fn patience(&self, terms: &RailTerms) -> Duration {
        let rate = self.speed.map_or(terms.initial_bytes_per_second, |speed| speed.rate).max(1);
        let nanos = u128::from(self.outstanding) * 1_000_000_000 / u128::from(rate) * u128::from(terms.slack);
        let wiring = if self.is_wired { Duration::ZERO } else { terms.wired_within };
        terms
            .silent_after
            .saturating_add(wiring)
            .saturating_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests;
