//! How a world goes on: who is polled, what happens next, and what comes of it.

use std::time::Duration;

use kvferry_fabric_sim::NicId;

use super::World;
use crate::chronicle::What;
use crate::plant::{self, Plant};
use crate::timeline::{Happening, Life};
use crate::trace::{Tag, hash_bytes};

/// After how long a dial is given up that nobody answers.
const NO_ANSWER: Duration = Duration::from_millis(500);

/// Rounds of polling at one instant after which it is taken for a loop that never ends.
const ROUNDS_MAX: u32 = 100_000;

impl World {
    /// Polls whoever was woken, in any order, until nobody is.
    pub(super) fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            let mut woken = self.woken.take();
            match self.options.plant {
                Some(Plant::RandomOrder) => plant::random_order(&mut woken),
                Some(Plant::ProcessOrder) => plant::process_order(&mut woken),
                _ => self.schedule.shuffle(&mut woken),
            }
            for index in &woken {
                if let Some(node) = self.nodes.get_mut(*index) {
                    node.poll();
                }
                self.send();
                if self.nodes.get_mut(*index).is_some_and(|node| !node.paused && node.hand_over_calls()) {
                    self.engage(*index);
                }
                if let Some(node) = self.nodes.get(*index).filter(|node| node.has_drained()) {
                    self.ended.borrow_mut().push((node.life, "it has left".to_owned()));
                }
            }
            self.bury();
            let ready = self.fabric.take_ready();
            if woken.is_empty() && ready.is_empty() {
                self.arm_nics();
                return self.arm_fabric();
            }
            for nic in ready {
                self.pump(nic);
            }
        }
        self.stuck = true;
    }

    /// Crashes the nodes whose incarnation is over.
    pub(super) fn bury(&mut self) {
        let ended = std::mem::take(&mut *self.ended.borrow_mut());
        for (life, why) in ended {
            if self.lives(life) {
                self.chronicle.put(self.timeline.now(), life, What::Ended(why));
                self.crash(life.node);
                if let Some(on_end) = self.on_end.clone() {
                    on_end(self, life.node);
                }
            }
        }
    }

    pub(super) fn happen(&mut self, happening: Happening) {
        let now = self.timeline.now();
        self.fabric.advance(now);
        match happening {
            Happening::Tick { life, to } => {
                if self.lives(life) {
                    self.put(Tag::Tick, [life.node as u64, 0, 0]);
                    to.do_send(kvferry_actors::Tick);
                }
            }
            Happening::Dialed { dialer, address, answer } => {
                self.put(Tag::Dial, [dialer.node as u64, hash_bytes(address.as_bytes()), 0]);
                let found = self.listeners.at(&address);
                let passes = |(to, _): &(Life, _)| {
                    !self.skies.is_cut(dialer.node, to.node) && !self.skies.is_cut(to.node, dialer.node)
                };
                if !found.as_ref().is_none_or(passes) {
                    let result = Err(format!("{address}: no answer"));
                    let wait = u64::try_from(NO_ANSWER.as_nanos()).unwrap_or(u64::MAX);
                    self.timeline.after(wait, Happening::Answered { dialer, result, answer });
                    return;
                }
                let result = match found {
                    Some((acceptor, accept)) => {
                        let (near, far) = self.wires.join(dialer, acceptor);
                        accept(far);
                        Ok(near)
                    }
                    None => Err(format!("{address}: nobody listens there")),
                };
                self.timeline.after(self.latency.draw(), Happening::Answered { dialer, result, answer });
            }
            Happening::Answered { dialer, result, answer } => {
                if self.lives(dialer) {
                    answer(result);
                } else {
                    // Its end of the link was made after it had died.
                    self.wires.cut(dialer);
                    self.send();
                }
            }
            Happening::Frame { link, to, frame } => {
                self.put(Tag::Frame, [link.0 << 1 | to as u64, frame.len() as u64, hash_bytes(&frame)]);
                self.wires.deliver(link, to, &frame);
            }
            Happening::Closed { link, to } => {
                self.put(Tag::Closed, [link.0 << 1 | to as u64, 0, 0]);
                self.wires.break_off(link, to);
            }
            Happening::Fabric => {
                self.fabric_due = None;
                let (hash, happened) = self.fabric.digest();
                self.put(Tag::Fabric, [hash, happened, 0]);
            }
            Happening::Nic(nic) => {
                self.nics_due.remove(&nic);
                self.pump(nic);
            }
            Happening::Engine { life } => self.work(life),
            Happening::Script(script) => script(self),
        }
    }

    /// Puts what was said on the links on its way.
    pub(super) fn send(&mut self) {
        for said in self.wires.take_said() {
            let (link, to) = (said.link, said.from.other());
            let way = match self.wires.ends(link, said.from) {
                Some((from, to)) => self.skies.way(from, to),
                None => self.skies.way(usize::MAX, usize::MAX),
            };
            let Some(way) = way else { continue };
            let at = self.timeline.now().saturating_add(self.latency.draw()).saturating_add(way.late);
            let at = if way.overtaken { at } else { self.wires.arrival(link, said.from, at) };
            match said.frame {
                Some(frame) => {
                    if let Some(later) = way.again {
                        let frame = frame.clone();
                        self.timeline.at(at.saturating_add(later), Happening::Frame { link, to, frame });
                    }
                    self.timeline.at(at, Happening::Frame { link, to, frame });
                }
                None => self.timeline.at(at, Happening::Closed { link, to }),
            }
        }
    }

    pub(super) fn pump(&mut self, nic: NicId) {
        let Some((life, found)) = self.nics.find(nic) else { return };
        let Some(node) = self.nodes.get_mut(life.node) else { return };
        if node.paused {
            node.unheard.insert(nic);
            return;
        }
        self.put(Tag::Pump, [life.node as u64, 0, 0]);
        found.borrow_mut().pump();
    }

    fn arm_nics(&mut self) {
        for (nic, life, due) in self.nics.dues() {
            if self.nodes.get(life.node).is_none_or(|node| node.paused) {
                continue;
            }
            let at = due.0.max(self.timeline.now());
            if self.nics_due.get(&nic).is_none_or(|scheduled| at < *scheduled) {
                self.nics_due.insert(nic, at);
                self.timeline.at(at, Happening::Nic(nic));
            }
        }
    }

    pub(super) fn arm_fabric(&mut self) {
        if let Some(at) = self.fabric.next_event_at()
            && self.fabric_due.is_none_or(|due| at < due)
        {
            self.fabric_due = Some(at);
            self.timeline.at(at, Happening::Fabric);
        }
    }

    /// Schedules the next slice of an engine's work, unless one is scheduled.
    pub(super) fn engage(&mut self, index: usize) {
        let (least, most) = self.options.engine_slice;
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(node) = self.nodes.get_mut(index).filter(|node| !node.engine_busy) {
            node.engine_busy = true;
            let takes = self.compute.within(nanos(least)..nanos(most).saturating_add(1));
            self.timeline.after(takes, Happening::Engine { life: node.life });
        }
    }

    pub(super) fn work(&mut self, life: Life) {
        if !self.lives(life) {
            return;
        }
        self.put(Tag::Engine, [life.node as u64, 0, 0]);
        let Some(node) = self.nodes.get_mut(life.node) else { return };
        node.engine_busy = false;
        if node.paused {
            node.engine_stalled = true;
        } else if node.work() {
            self.engage(life.node);
        }
    }

    pub(super) fn lives(&self, life: Life) -> bool {
        self.nodes.get(life.node).is_some_and(|node| node.local.is_some() && node.life == life)
    }

    pub(super) fn put(&self, tag: Tag, words: [u64; 3]) {
        self.chronicle.trace().borrow_mut().put(self.timeline.now(), tag, words);
    }
}
