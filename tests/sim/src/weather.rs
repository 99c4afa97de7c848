//! What happens to control frames on their way.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::dice::Dice;

/// How often frames meet with what, of a million. All zero in good weather.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weather {
    /// Frames that are lost.
    pub lost_ppm: u32,
    /// Frames that come twice.
    pub doubled_ppm: u32,
    /// Frames that are late, and hold up what follows.
    pub late_ppm: u32,
    /// Frames that are late, and are overtaken.
    pub overtaken_ppm: u32,
    /// By how much they are late, at most.
    pub late_by: Duration,
}

impl Weather {
    /// Both at once.
    pub(crate) fn and(self, other: Weather) -> Weather {
        Weather {
            lost_ppm: self.lost_ppm.max(other.lost_ppm),
            doubled_ppm: self.doubled_ppm.max(other.doubled_ppm),
            late_ppm: self.late_ppm.max(other.late_ppm),
            overtaken_ppm: self.overtaken_ppm.max(other.overtaken_ppm),
            late_by: self.late_by.max(other.late_by),
        }
    }
}

/// The way of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// Nanoseconds added to its latency.
    pub(crate) late: u64,
    /// Whether what follows may overtake it.
    pub(crate) overtaken: bool,
    /// A second copy, so many nanoseconds behind the first.
    pub(crate) again: Option<u64>,
}

/// The state of all ways between nodes.
pub(crate) struct Skies {
    weather: Weather,
    dice: Dice,
    /// Directed pairs of nodes between which nothing passes.
    cuts: BTreeSet<(usize, usize)>,
}

impl Skies {
    pub(crate) fn new(dice: Dice) -> Self {
        Skies { weather: Weather::default(), dice, cuts: BTreeSet::new() }
    }

    pub(crate) fn change(&mut self, weather: Weather) {
        self.weather = weather;
    }

    pub(crate) fn cut(&mut self, from: usize, to: usize, on: bool) {
        if on {
            self.cuts.insert((from, to));
        } else {
            self.cuts.remove(&(from, to));
        }
    }

    pub(crate) fn clear(&mut self) {
        self.weather = Weather::default();
        self.cuts.clear();
    }

    pub(crate) fn is_cut(&self, from: usize, to: usize) -> bool {
        !self.cuts.is_empty() && self.cuts.contains(&(from, to))
    }

    /// What happens to a frame; `None` when it is lost.
    pub(crate) fn way(&mut self, from: usize, to: usize) -> Option<Way> {
        if self.is_cut(from, to) {
            return None;
        }
        let mut way = Way { late: 0, overtaken: false, again: None };
        if self.weather == Weather::default() {
            return Some(way);
        }
        let Weather { lost_ppm, doubled_ppm, late_ppm, overtaken_ppm, late_by } = self.weather;
        let late_by = u64::try_from(late_by.as_nanos()).unwrap_or(u64::MAX);
        if self.comes_true(lost_ppm) {
            return None;
        }
        if self.comes_true(late_ppm) {
            way.late = self.dice.below(late_by);
        }
        if self.comes_true(overtaken_ppm) {
            (way.late, way.overtaken) = (self.dice.below(late_by), true);
        }
        if self.comes_true(doubled_ppm) {
            way.again = Some(self.dice.below(late_by));
        }
        Some(way)
    }

    fn comes_true(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.dice.below(1_000_000) < u64::from(ppm)
    }
}
