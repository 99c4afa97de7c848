//! Events that say that memory is no longer touched, where a device may still copy: they follow its last copy.

use std::collections::VecDeque;

use kvferry_core::TransferId;

use crate::{Event, Stage};

/// The events of one transport that wait for a device, in order.
#[derive(Debug, Default)]
pub struct StagedEvents {
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    /// The copies that it follows.
    marks: Vec<(Stage, u64)>,
    event: Event,
}

impl StagedEvents {
    /// Tells an event in `events` once everything that these stages have under way has ended, and behind those that wait already.
    pub fn report(&mut self, stages: &[Stage], event: Event, events: &mut Vec<Event>) {
        let marks = stages.iter().map(|stage| (stage.clone(), stage.mark()));
        let marks: Vec<_> = marks.filter(|(stage, mark)| !stage.is_past(*mark)).collect();
        if marks.is_empty() && self.waiting.is_empty() {
            events.push(event);
        } else {
            self.waiting.push_back(Waiting { marks, event });
        }
    }

    /// Whether a transfer's end is still to be told.
    pub fn is_ending(&self, id: TransferId) -> bool {
        let of = |event: &Event| matches!(event, Event::Failed { id: ended, .. } if *ended == id);
        self.waiting.iter().any(|waiting| of(&waiting.event))
    }

    /// Tells those whose copies have ended.
    pub fn settle(&mut self, events: &mut Vec<Event>) {
        while let Some(first) = self.waiting.front() {
            let is_past = |(stage, mark): &(Stage, u64)| {
                stage.poll();
                stage.is_past(*mark)
            };
            if !first.marks.iter().all(is_past) {
                break;
            }
            events.extend(self.waiting.pop_front().map(|waiting| waiting.event));
        }
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The stages that they wait for.
    pub fn stages(&self) -> impl Iterator<Item = &Stage> {
        self.waiting.iter().flat_map(|waiting| waiting.marks.iter().map(|(stage, _)| stage))
    }
}
