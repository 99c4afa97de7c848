//! Those who ask for something, and want exactly one answer.

use std::collections::BTreeMap;

use kvferry_actors::{CancelRequest, Submit};
use kvferry_core::RequestId;
use kvferry_core::protocol::{Event, Finished, Refusal, RequestSpec};
use tokio::sync::oneshot;

use crate::chronicle::{Entry, What};
use crate::plant::{self, Plant};
use crate::world::World;
use crate::yard::Yard;

/// All requests of a run. Users whose scheduler dies before it has answered ask its next incarnation.
#[derive(Default)]
pub(crate) struct Users {
    requests: BTreeMap<RequestId, Asked>,
    /// Asked since answers were last looked for: refusals come at once.
    fresh: Vec<RequestId>,
    answered: u64,
    plant: Option<Plant>,
}

struct Asked {
    spec: RequestSpec,
    answer: Option<oneshot::Receiver<Result<Finished, Refusal>>>,
    ticket: u64,
    answered: bool,
    cancelled: bool,
}

impl Users {
    pub(crate) fn new(plant: Option<Plant>) -> Self {
        Users { plant, ..Users::default() }
    }

    /// Asks for a request.
    pub(crate) fn submit(&mut self, world: &World, yard: &Yard, spec: RequestSpec) {
        let asked = Asked { spec, answer: None, ticket: 0, answered: false, cancelled: false };
        let request = asked.spec.request;
        self.requests.insert(request, asked);
        self.ask(world, yard, request);
    }

    /// Says that a request is no longer wanted, if it is not answered.
    pub(crate) fn cancel(&mut self, world: &World, yard: &Yard, request: RequestId) {
        let Some(asked) = self.requests.get_mut(&request).filter(|asked| !asked.answered) else { return };
        asked.cancelled = true;
        world.note(What::CancelAsked(request));
        if let Some(scheduler) = yard.scheduler() {
            scheduler.do_send(CancelRequest { request, ticket: asked.ticket });
        }
    }

    /// A scheduler has started: whoever was not answered asks again.
    pub(crate) fn ask_again(&mut self, world: &World, yard: &Yard) {
        let open: Vec<RequestId> =
            self.requests.iter().filter(|(_, asked)| !asked.answered).map(|(request, _)| *request).collect();
        for request in open {
            self.ask(world, yard, request);
        }
    }

    /// Looks for answers after what has happened; says which came.
    pub(crate) fn listen(&mut self, entries: &[Entry]) -> Vec<What> {
        let finished = entries.iter().filter_map(|entry| match &entry.what {
            What::Observed(Event::Finished(finished)) => Some(finished.request),
            _ => None,
        });
        let mut look: Vec<RequestId> = std::mem::take(&mut self.fresh);
        look.extend(finished);
        let mut heard = Vec::new();
        for request in look {
            let Some(asked) = self.requests.get_mut(&request) else { continue };
            match asked.answer.as_mut().map(oneshot::Receiver::try_recv) {
                Some(Ok(answer)) => {
                    asked.answer = None;
                    asked.answered = true;
                    self.answered += 1;
                    let answer = match self.plant {
                        Some(Plant::FalseAnswers) => plant::other_answer(answer),
                        _ => answer,
                    };
                    heard.push(What::Answered(request, answer));
                }
                // It may come in the scheduler's next turn.
                Some(Err(oneshot::error::TryRecvError::Empty)) | None => {}
                Some(Err(oneshot::error::TryRecvError::Closed)) => asked.answer = None,
            }
        }
        heard
    }

    /// How many were answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered
    }

    /// Those that were not.
    pub(crate) fn waiting(&self) -> Vec<RequestId> {
        self.requests.iter().filter(|(_, asked)| !asked.answered).map(|(request, _)| *request).collect()
    }

    fn ask(&mut self, world: &World, yard: &Yard, request: RequestId) {
        let (Some(asked), Some(scheduler)) = (self.requests.get_mut(&request), yard.scheduler()) else { return };
        let (answer, finished) = oneshot::channel();
        let again = asked.ticket > 0;
        asked.answer = Some(finished);
        asked.ticket += 1;
        world.note(What::Submitted { request, tokens: asked.spec.tokens, again });
        scheduler.do_send(Submit { spec: asked.spec.clone(), trace: None, ticket: asked.ticket, answer });
        if asked.cancelled {
            scheduler.do_send(CancelRequest { request, ticket: asked.ticket });
        }
        self.fresh.push(request);
    }
}
