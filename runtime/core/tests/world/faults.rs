//! What goes wrong in a world, and how it is mended.

use super::*;

impl World {
    pub(super) fn fault(&mut self) {
        match self.random.below(self.calm) {
            0 if self.crashes_left > 0 => {
                self.crashes_left -= 1;
                let victim = self.somebody();
                victim.into_iter().for_each(|victim| self.crash(victim));
            }
            1 | 2 => {
                let known: Vec<RequestId> = self.submitted.keys().copied().collect();
                if let Some(request) = known.get(self.random.below(known.len().max(1) as u64) as usize) {
                    self.scheduler.handle_cancel(self.now, *request);
                    self.drain_scheduler();
                }
            }
            // Long enough for leases to lapse, and not always with the timers in time.
            3 | 4 => {
                self.now = self.now + Duration::from_secs(self.random.between(1, 20));
                if self.random.one_in(2) {
                    self.fire();
                }
            }
            5..=7 => {
                if let (Some(one), Some(other)) = (self.somebody(), self.somebody())
                    && one != other
                {
                    self.part(one, other);
                }
            }
            8 if self.restarts_left > 0 => {
                self.restarts_left -= 1;
                self.restart_scheduler();
            }
            9 if self.crashes_left > 0 => {
                self.crashes_left -= 1;
                let victim = self.somebody();
                victim.into_iter().for_each(|victim| self.expel(victim));
            }
            10..=14 => {
                let expelled = self.expelled.first().copied();
                expelled.into_iter().for_each(|victim| self.crash(victim));
            }
            _ => {}
        }
    }

    /// No more faults, and nobody runs on who was declared lost.
    pub(super) fn heal(&mut self) {
        self.faulty = false;
        while let Some(victim) = self.expelled.first().copied() {
            self.crash(victim);
        }
    }

    fn somebody(&mut self) -> Option<NodeId> {
        let alive: Vec<NodeId> = self.nodes.keys().copied().filter(|node| !self.expelled.contains(node)).collect();
        alive.get(self.random.below(alive.len().max(1) as u64) as usize).copied()
    }

    /// The process ends: what it sent still arrives, then every peer notices in its own time.
    fn crash(&mut self, victim: NodeId) {
        self.nodes.remove(&victim);
        self.links.retain(|(_, to), _| *to != victim);
        self.apart.retain(|(one, other), _| *one != victim && *other != victim);
        self.expelled.remove(&victim);
        let peers: Vec<NodeId> = self.nodes.keys().copied().chain([SCHEDULER]).collect();
        for peer in peers {
            self.links.entry((victim, peer)).or_default().push_back(Item::Down);
        }
    }

    /// The scheduler cannot reach a node any more, which knows nothing of that: everybody else is told that it is lost.
    fn expel(&mut self, victim: NodeId) {
        self.expelled.insert(victim);
        self.lose_tail(victim, SCHEDULER);
        self.links.remove(&(SCHEDULER, victim));
        self.apart.insert(pair(victim, SCHEDULER), 0);
        self.links.entry((victim, SCHEDULER)).or_default().push_back(Item::Down);
    }

    /// A conversation between two living nodes is over; what was said last is lost. Both notice, and begin another.
    fn part(&mut self, one: NodeId, other: NodeId) {
        if self.apart.contains_key(&pair(one, other)) {
            return;
        }
        for (from, to) in [(one, other), (other, one)] {
            self.lose_tail(from, to);
            self.links.entry((from, to)).or_default().push_back(Item::Down);
        }
        // The next conversation may stand before anybody has noticed, or only some time after both have.
        if self.random.one_in(3) {
            self.introduce(one, other);
            self.introduce(other, one);
        } else {
            self.apart.insert(pair(one, other), 0);
        }
    }

    fn lose_tail(&mut self, from: NodeId, to: NodeId) {
        if let Some(link) = self.links.get_mut(&(from, to)) {
            let kept = self.random.below(link.len() as u64 + 1) as usize;
            // What ended earlier conversations is not lost with this one, nor is anything before it.
            let last = link.iter().rposition(|item| matches!(item, Item::Down)).map_or(0, |last| last + 1);
            link.truncate(kept.max(last));
        }
    }

    pub(super) fn notices(&mut self, from: NodeId, to: NodeId) {
        if let Some(known) = self.apart.get_mut(&pair(from, to)) {
            *known += 1;
        }
    }

    pub(super) fn meet(&mut self, one: NodeId, other: NodeId) {
        self.apart.remove(&pair(one, other));
        if other == SCHEDULER {
            self.introduce(one, SCHEDULER);
            if let Some(member) = self.members.get(&one).cloned() {
                self.push(one, SCHEDULER, Message::Join(Box::new(member)));
            }
            self.introduce(SCHEDULER, one);
            return;
        }
        self.introduce(one, other);
        self.introduce(other, one);
    }

    /// A new incarnation of the scheduler, which knows nothing; what the old one said last is lost.
    fn restart_scheduler(&mut self) {
        while let Some(victim) = self.expelled.first().copied() {
            self.crash(victim);
        }
        self.first_handover += 1_000_000;
        self.scheduler = Scheduler::new(self.terms, Box::new(Spy(Arc::clone(&self.views))), self.first_handover);
        self.directory = Directory::default();
        self.links.retain(|(_, to), _| *to != SCHEDULER);
        for node in self.nodes.keys().copied().collect::<Vec<_>>() {
            let waits = self.apart.contains_key(&pair(node, SCHEDULER));
            self.lose_tail(SCHEDULER, node);
            self.apart.insert(pair(node, SCHEDULER), 1);
            // One that has noticed an earlier end and has not met this scheduler has nothing more to notice.
            if waits && !self.is_noticing(node) {
                self.apart.insert(pair(node, SCHEDULER), 2);
            } else if !waits {
                self.links.entry((SCHEDULER, node)).or_default().push_back(Item::Down);
            }
        }
        self.unasked.append(&mut self.awaited);
        self.ended_unasked.clear();
        self.told.clear();
    }

    /// Whether the end of its conversation with a scheduler is on its way to a node.
    fn is_noticing(&self, node: NodeId) -> bool {
        self.links.get(&(SCHEDULER, node)).is_some_and(|link| link.iter().any(|item| matches!(item, Item::Down)))
    }

    pub(super) fn ask_again(&mut self, request: RequestId) {
        self.unasked.remove(&request);
        let Some(spec) = self.submitted.get(&request).cloned() else { return };
        if self.ended_unasked.get(&request).is_some_and(|at| self.now.since(*at) >= leases().duration * 2) {
            self.forgotten.insert(request);
        }
        self.ask(spec);
    }

    pub(super) fn pairs(&mut self, request: RequestId, handover: HandoverId, group: GroupId) {
        let mut leaders = self.nodes.values().filter(|node| node.rank == Rank(0));
        let untold = leaders.any(|node| !self.told.contains(&node.id));
        let unasked = self.finished.contains_key(&request) && !self.awaited.contains(&request);
        if untold || unasked || self.forgotten.contains(&request) {
            self.excused.insert(handover);
        }
        self.paired.insert(handover, (request, group));
    }

    pub(super) fn decided(&mut self, handover: HandoverId, delivered: bool) {
        *self.decided.entry(handover).or_default() += 1;
        if !delivered {
            return;
        }
        if self.tainted.contains(&handover) {
            self.violations.push(format!("I2: {handover} was delivered from blocks that were given away"));
        }
        let Some((request, group)) = self.paired.get(&handover).copied() else { return };
        // Its leader was declared lost and does not know it: another group has the request, and whatever this one decides is ended with it.
        let lost_leader = |node| self.places.get(node) == Some(&(group, Rank(0)));
        if self.expelled.iter().any(lost_leader) {
            return;
        }
        let earlier = self.delivered.entry(request).or_default();
        let lost = |group: &GroupId| {
            self.places.iter().any(|(node, (theirs, _))| {
                theirs == group && (!self.nodes.contains_key(node) || self.expelled.contains(node))
            })
        };
        let again = earlier.iter().find(|first| self.paired.get(first).is_some_and(|(_, group)| !lost(group)));
        if let Some(first) = again
            && !self.excused.contains(&handover)
        {
            self.violations.push(format!("{request} was delivered by {first} and again by {handover}"));
        }
        earlier.push(handover);
    }

    /// Whether nobody has anything in hand, and nobody is to meet or to ask.
    pub(super) fn is_quiet(&self) -> bool {
        self.unasked.is_empty() && self.apart.is_empty() && self.busy().is_empty()
    }

    /// Who has something in hand.
    pub(super) fn busy(&self) -> Vec<String> {
        let unmourned = self.unmourned();
        let scheduler = Some((SCHEDULER, self.scheduler.vitals())).filter(|_| unmourned.is_empty());
        let nodes = self.nodes.values().filter(|node| !unmourned.contains(&node.group));
        let nodes = nodes.flat_map(|node| node.vitals().map(|vitals| (node.id, vitals)));
        let busy = scheduler.into_iter().chain(nodes).filter(|(_, vitals)| !vitals.is_quiet());
        busy.map(|(id, vitals)| format!("{id}: {vitals:?}")).collect()
    }

    /// Groups of nodes that died when their scheduler did, or before it had met everybody again: some of the group have not been told that they
    /// are lost, and wait for their next incarnations.
    fn unmourned(&self) -> BTreeSet<GroupId> {
        let dead = self.places.iter().filter(|(node, _)| !self.nodes.contains_key(node));
        let untold =
            |dead: NodeId, group: GroupId| self.nodes.values().any(|node| node.group == group && !node.has_lost(dead));
        dead.filter(|(node, (group, _))| untold(**node, *group)).map(|(_, (group, _))| *group).collect()
    }
}
