//! A node's clock and its way to other nodes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use actix::Recipient;
use kvferry_actors::{Clock, LinkUp, ListenError, Network, Tick};
use kvferry_core::Moment;

use crate::dice::Dice;
use crate::plant::{self, Plant};
use crate::timeline::{Answer, Happening, Life, Timeline};

/// A monotonic clock that began at a time of its own and goes at a rate of its own: nodes that compare moments get nonsense.
pub(crate) struct SimClock {
    pub(crate) timeline: Timeline,
    pub(crate) life: Life,
    pub(crate) rate: ClockRate,
    pub(crate) late: Late,
    pub(crate) plant: Option<Plant>,
}

/// How a node's clock relates to the world's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClockRate {
    /// What it shows when the world begins.
    pub(crate) offset: u64,
    /// How much faster than the world it goes, in parts per million.
    pub(crate) ppm: i64,
}

impl ClockRate {
    /// What it shows at a time of the world.
    pub(crate) fn shows(self, at: u64) -> u64 {
        let gained = i128::from(at) * i128::from(self.ppm) / 1_000_000;
        u64::try_from(i128::from(self.offset) + i128::from(at) + gained).unwrap_or(u64::MAX)
    }

    /// The first time of the world at which it shows that, or more.
    pub(crate) fn when(self, shown: u64) -> u64 {
        let scale = i128::from(1_000_000 + self.ppm);
        let elapsed = i128::from(shown.saturating_sub(self.offset));
        let mut at = u64::try_from(elapsed * 1_000_000 / scale).unwrap_or(u64::MAX);
        while self.shows(at) < shown && at < u64::MAX {
            at += 1;
        }
        at
    }
}

impl Clock for SimClock {
    fn now(&self) -> Moment {
        Moment(self.rate.shows(self.timeline.now()))
    }

    fn wake(&self, at: Moment, to: Recipient<Tick>) {
        if self.plant == Some(Plant::LostAlarms) && plant::is_lost(self.life.node, at.0) {
            return;
        }
        let due = self.rate.when(at.0).max(self.timeline.now());
        self.timeline.at(due.saturating_add(self.late.draw()), Happening::Tick { life: self.life, to });
    }
}

/// By how much alarms ring late.
pub(crate) struct Late {
    /// Nanoseconds; zero in a run whose alarms are in time.
    at_most: u64,
    dice: RefCell<Dice>,
}

impl Late {
    pub(crate) fn new(at_most: Duration, dice: Dice) -> Self {
        Late { at_most: u64::try_from(at_most.as_nanos()).unwrap_or(u64::MAX), dice: RefCell::new(dice) }
    }

    fn draw(&self) -> u64 {
        if self.at_most == 0 { 0 } else { self.dice.borrow_mut().below(self.at_most) }
    }
}

/// What takes links, and whose it is.
type Listener = (Life, Rc<dyn Fn(LinkUp)>);

/// Who accepts links, by address.
#[derive(Clone, Default)]
pub(crate) struct Listeners {
    inner: Rc<RefCell<BTreeMap<String, Listener>>>,
}

impl Listeners {
    pub(crate) fn at(&self, address: &str) -> Option<Listener> {
        self.inner.borrow().get(address).map(|(life, accept)| (*life, Rc::clone(accept)))
    }

    pub(crate) fn remove(&self, life: Life) {
        self.inner.borrow_mut().retain(|_, (of, _)| *of != life);
    }
}

/// How long things take between nodes.
#[derive(Clone)]
pub(crate) struct Latency {
    least: u64,
    jitter: u64,
    dice: Rc<RefCell<Dice>>,
}

impl Latency {
    pub(crate) fn new(least: Duration, jitter: Duration, dice: Dice) -> Self {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Latency { least: nanos(least), jitter: nanos(jitter), dice: Rc::new(RefCell::new(dice)) }
    }

    pub(crate) fn draw(&self) -> u64 {
        self.least.saturating_add(self.dice.borrow_mut().below(self.jitter.saturating_add(1)))
    }
}

/// The network as one node sees it.
pub(crate) struct SimNetwork {
    pub(crate) timeline: Timeline,
    pub(crate) listeners: Listeners,
    pub(crate) latency: Latency,
    pub(crate) life: Life,
}

impl Network for SimNetwork {
    fn dial(&self, address: &str, _within: Duration, answer: Answer) {
        let happening = Happening::Dialed { dialer: self.life, address: address.to_owned(), answer };
        self.timeline.after(self.latency.draw(), happening);
    }

    fn listen(&self, address: &str, accept: Box<dyn Fn(LinkUp)>) -> Result<String, ListenError> {
        let mut listeners = self.listeners.inner.borrow_mut();
        if listeners.contains_key(address) {
            return Err(ListenError::BadAddress {
                address: address.to_owned(),
                reason: "somebody listens there".to_owned(),
            });
        }
        listeners.insert(address.to_owned(), (self.life, Rc::from(accept)));
        Ok(address.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{ClockRate, Late};
    use crate::dice::Dice;

    #[test]
    fn late_alarms_are_late_within_bounds_and_others_are_not() {
        let drawn = |at_most| {
            let late = Late::new(at_most, Dice::new(1, "alarms", 0));
            (0..1000).map(|_| late.draw()).collect::<Vec<u64>>()
        };
        assert!(drawn(Duration::ZERO).iter().all(|late| *late == 0));
        let late = drawn(Duration::from_millis(8));
        assert!(late.iter().all(|late| *late < 8_000_000));
        assert!(late.iter().filter(|late| **late > 4_000_000).count() > 300, "half of them by more than half of it");
    }

    #[test]
    fn an_alarm_never_rings_early() {
        for ppm in [-500, -3, 0, 1, 499] {
            let rate = ClockRate { offset: 77, ppm };
            for shown in [0, 77, 78, 1_000_000_077, 987_654_321_987] {
                let at = rate.when(shown);
                assert!(rate.shows(at) >= shown);
                assert!(at == 0 || rate.shows(at - 1) < shown || ppm < 0, "{ppm} {shown}");
            }
        }
    }
}
