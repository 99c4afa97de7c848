//! What is left when all is over and quiet.

use kvferry::GroupId;

use crate::cluster::Cluster;

impl Cluster<'_> {
    /// Notes how many descriptors everybody has before anything is done to anybody. Says whether that is what was noted last.
    pub(crate) fn take_baseline(&mut self) -> bool {
        let now = self.scheduler_census.as_ref().map(|census| census.descriptors);
        let mut same = self.scheduler_baseline == now;
        self.scheduler_baseline = now;
        for rank in &mut self.record.ranks {
            let now = rank.census.as_ref().map(|census| census.descriptors);
            same &= rank.baseline == now;
            rank.baseline = now;
        }
        same
    }

    /// Everything that is not as it has to be when all is over and quiet.
    pub(crate) fn rest(&self) -> Vec<String> {
        let mut rest: Vec<String> = self.survivors().filter_map(|index| self.holds(index)).collect();
        let missing = self.groups_missing();
        if missing > 0 {
            rest.push(format!("{missing} groups whose ranks all live are not complete"));
        }
        if !self.setup.faults.is_empty() {
            rest.extend(self.survivors().filter_map(|index| self.traces(index)));
            let census = self.scheduler_census.as_ref().map(|census| census.descriptors);
            rest.extend(grown("the scheduler", census, self.scheduler_baseline));
        }
        rest
    }

    /// Groups that could be complete, and are not.
    pub(crate) fn groups_missing(&self) -> usize {
        let gone = |group: GroupId| {
            let ranks = self.setup.ranks.iter().zip(&self.record.ranks);
            ranks.filter(|(config, _)| config.group == group).any(|(_, rank)| rank.gone)
        };
        let groups = (0..self.setup.groups()).map(|group| GroupId(group as u32));
        groups.filter(|group| !self.standing.contains(group) && !gone(*group)).count()
    }

    /// What a rank still has, in words.
    fn holds(&self, index: usize) -> Option<String> {
        let report = &self.record.ranks.get(index)?.report;
        let engine = &report.engine;
        if engine.blocks == 0 {
            return Some(format!("{} has not reported", self.name(index)));
        }
        let rest = engine.held_requests + engine.queued_requests + engine.held_blocks + engine.quarantined_blocks;
        if report.idle && rest == 0 {
            return None;
        }
        let busy = if report.idle { "is idle" } else { "is at work" };
        Some(format!(
            "{} {busy} with {} requests in {} blocks, {} quarantined blocks and {} requests that wait for blocks",
            self.name(index),
            engine.held_requests,
            engine.held_blocks,
            engine.quarantined_blocks,
            engine.queued_requests
        ))
    }

    /// What the kernel shows of a rank that it should not have (any more): descriptors, and pools of others that are gone.
    fn traces(&self, index: usize) -> Option<String> {
        let rank = self.record.ranks.get(index)?;
        let census = rank.census.as_ref()?;
        if let Some(grown) = grown(&self.name(index), Some(census.descriptors), rank.baseline) {
            return Some(grown);
        }
        for (config, other) in self.setup.ranks.iter().zip(&self.record.ranks) {
            let pool = config.pool_name();
            let there = census.mapped.iter().filter(|mapped| **mapped == pool).count();
            let most = if other.gone { 0 } else { config.regions() };
            if there > most {
                let name = self.name(index);
                return Some(format!("{name} has {there} regions of {pool} mapped, of which {most} can be alive"));
            }
        }
        None
    }
}

/// Whether somebody has more descriptors than at first, in words.
fn grown(name: &str, now: Option<u64>, before: Option<u64>) -> Option<String> {
    let (now, before) = (now?, before?);
    (now > before).then(|| format!("{name} has {now} descriptors, {before} before the first fault"))
}
