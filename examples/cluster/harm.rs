//! Faults, when their time comes, and what comes back after them.

use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::fault::{Action, Fault, Target, When};
use crate::launch::{LaunchError, Launched};
use crate::record::{Departure, RankRecord};

/// What is done when its time comes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deed {
    Hurt(Fault),
    Continue(Target),
    /// Who was stopped is killed, though perhaps nobody could say that it was lost.
    Fence(Target),
}

impl Cluster<'_> {
    /// From now on, faults by time are counted.
    pub(crate) fn begin(&mut self) {
        let now = Instant::now();
        for fault in &self.setup.faults {
            if let When::After(after) = fault.at {
                self.timers.push((now + after, Deed::Hurt(*fault)));
            }
        }
    }

    /// Faults that have not happened do not any more.
    pub(crate) fn calm(&mut self) {
        let late = self.timers.extract_if(.., |(_, deed)| matches!(deed, Deed::Hurt(_))).count() + self.faults.len();
        self.faults.clear();
        if late > 0 {
            self.record.notes.push(format!(
                "{late} of {} faults did not happen: only {} transfers started before all requests were over",
                self.setup.faults.len(),
                self.started
            ));
        }
    }

    pub(crate) fn hurt(&mut self, fault: Fault) {
        let target = fault.target;
        match self.index(target) {
            Some(index) => match self.record.ranks.get_mut(index) {
                // It is not there any more.
                None | Some(RankRecord { gone: true, .. }) => return,
                Some(rank) => rank.hurt = true,
            },
            None => self.record.scheduler_hurt = true,
        }
        let lost_after = self.setup.terms.lost_after();
        match fault.action {
            Action::Kill => self.fence(target),
            // It ends by itself.
            Action::Drain => {
                if let Some(index) = self.index(target) {
                    self.record.ranks.get_mut(index).into_iter().for_each(|rank| rank.leaving = true);
                    self.ranks.get_mut(index).into_iter().for_each(Launched::terminate);
                }
            }
            Action::Stop => {
                self.stop(target);
                if let Some(index) = self.index(target) {
                    self.set_gone(index);
                }
                // The scheduler tells of a rank before; nobody tells of the scheduler.
                let at = if target == Target::Scheduler { lost_after } else { lost_after * 3 };
                self.timers.push((Instant::now() + at, Deed::Fence(target)));
            }
            Action::Pause(length) => {
                self.stop(target);
                let length = length.unwrap_or(lost_after * 2);
                self.timers.push((Instant::now() + length, Deed::Continue(target)));
            }
        }
    }

    fn stop(&mut self, target: Target) {
        match self.index(target) {
            Some(index) => self.ranks.get_mut(index).into_iter().for_each(Launched::stop),
            None => self.scheduler.iter_mut().for_each(Launched::stop),
        }
    }

    pub(crate) fn go_on(&mut self, target: Target) {
        match self.index(target) {
            Some(index) => self.ranks.get_mut(index).into_iter().for_each(Launched::go_on),
            None => self.scheduler.iter_mut().for_each(Launched::go_on),
        }
    }

    /// Nothing of it writes anywhere after this. What is to come back is started again.
    pub(crate) fn fence(&mut self, target: Target) {
        // It is killed once, however many say that it is lost.
        self.timers.retain(|(_, deed)| !matches!(deed, Deed::Fence(other) if *other == target));
        let again = match self.index(target) {
            Some(index) => self.replace_rank(index),
            None => self.replace_scheduler(),
        };
        if let Err(error) = again {
            self.record.complaints.push(error.to_string());
        }
    }

    fn replace_rank(&mut self, index: usize) -> Result<(), LaunchError> {
        let (Some(launched), Some(rank)) = (self.ranks.get_mut(index), self.record.ranks.get_mut(index)) else {
            return Ok(());
        };
        if rank.ended && rank.gone {
            return Ok(());
        }
        launched.kill();
        rank.ended = true;
        rank.gone = true;
        if self.setup.restart {
            let life = rank.life + 1;
            let launched = self.launch_rank(index, life)?;
            if let (Some(slot), Some(rank)) = (self.ranks.get_mut(index), self.record.ranks.get_mut(index)) {
                *slot = launched;
                let RankRecord { report, mut before, baseline, paths, .. } = std::mem::take(rank);
                before.push(report);
                *rank = RankRecord { hurt: true, before, baseline, life, paths, ..RankRecord::default() };
            }
        }
        Ok(())
    }

    fn replace_scheduler(&mut self) -> Result<(), LaunchError> {
        self.scheduler.iter_mut().for_each(Launched::kill);
        self.scheduler_life += 1;
        self.standing.clear();
        self.scheduler_census = None;
        match self.launch_scheduler() {
            Ok(launched) => self.scheduler = Some(launched),
            Err(error) => {
                self.scheduler_failed = Some(error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }

    /// A rank that was told to leave has left.
    pub(crate) fn has_left(&mut self, index: usize) {
        let exit_status = self.ranks.get_mut(index).and_then(Launched::exit_status);
        let name = self.name(index);
        match self.record.ranks.get(index).and_then(|rank| rank.left) {
            Some((left, seconds)) => {
                self.record.departures.push(Departure { rank: name.clone(), left, seconds, exit_status });
            }
            None => self.record.complaints.push(format!("{name} was told to leave and ended before it had")),
        }
        if exit_status != Some(0) {
            let how = exit_status.map_or("a signal".to_owned(), |status| format!("exit status {status}"));
            let why = self.why_ended(index);
            self.record.complaints.push(format!("{name} was told to leave and ended with {how}: {why}"));
        }
        if let Err(error) = self.replace_rank(index) {
            self.record.complaints.push(error.to_string());
        }
    }

    /// Which rank is meant; `None` for the scheduler.
    fn index(&self, target: Target) -> Option<usize> {
        let Target::Rank { role, rank } = target else { return None };
        self.setup.ranks.iter().position(|config| config.role == role && config.number == rank)
    }

    pub(crate) fn target(&self, index: usize) -> Target {
        let config = self.setup.ranks.get(index);
        config.map_or(Target::Scheduler, |config| Target::Rank { role: config.role, rank: config.number })
    }
}
