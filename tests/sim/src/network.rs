//! A node's clock and its way to other nodes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use actix::Recipient;
use kvferry_actors::{Clock, LinkUp, ListenError, Network, Tick};
use kvferry_core::Moment;

use crate::dice::Dice;
use crate::timeline::{Answer, Happening, Life, Timeline};

/// A monotonic clock that began at a time of its own: nodes that compare moments get nonsense.
pub(crate) struct SimClock {
    pub(crate) timeline: Timeline,
    pub(crate) life: Life,
    pub(crate) offset: u64,
}

impl Clock for SimClock {
    fn now(&self) -> Moment {
        Moment(self.timeline.now().saturating_add(self.offset))
    }

    fn wake(&self, at: Moment, to: Recipient<Tick>) {
        let at = at.0.saturating_sub(self.offset);
        self.timeline.at(at, Happening::Tick { life: self.life, to });
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
    fn dial(&self, address: &str, answer: Answer) {
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
