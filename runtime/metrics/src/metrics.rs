//! All time series of a process, as a watcher of its node.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvferry_actors::{Standing, Watch};
use kvferry_core::Direction;
use kvferry_core::protocol::{Event, FetchCourse, Outcome, PathReport, PrefillView, RailTurn, Vitals};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::labels::{Carrier, Credited, Ending, InHand, Stage, Turn};
use crate::state::State;

/// Actors that do not answer for so long are taken for dead.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The first bucket ends here, each next one at twice as much: 10 µs to 84 s.
const FIRST_BUCKET_SECONDS: f64 = 1e-5;
const BUCKETS: u16 = 24;

/// Watches the node of a process, over all its incarnations. Cheap to clone; give one clone to
/// [`NodeConfig::watchers`](kvferry_actors::NodeConfig::watchers) and keep another.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    state: Mutex<State>,
    stages: Stages,
    requests: Family<Ending, Counter>,
    fetches: Family<Ending, Counter>,
    offers: Family<Ending, Counter>,
    bytes: Family<Carrier, Counter>,
    pieces: Family<Carrier, Counter>,
    rail_turns: Family<Turn, Counter>,
    restarts: Counter,
    leases_expired: Counter,
    quarantines: Counter,
    nodes_lost: Counter,
    at_scrape: AtScrape,
}

/// Times of handovers.
struct Stages {
    queue: Histogram,
    room: Histogram,
    plan: Histogram,
    post: Histogram,
    wire: Histogram,
    notice: Histogram,
}

/// What is asked of the actors when somebody scrapes.
#[derive(Default)]
struct AtScrape {
    leases: Gauge,
    quarantined_blocks: Gauge,
    credits: Family<Credited, Gauge>,
    in_hand: Family<InHand, Gauge>,
    up: Gauge,
    ready: Gauge,
    draining: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("state", &self.0.state).finish_non_exhaustive()
    }
}

impl Metrics {
    /// Time series of which none has a value yet.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("kvferry");
        let times: Family<Stage, Histogram, fn() -> Histogram> = Family::new_with_constructor(histogram);
        // The unit is in the name only: some parsers refuse a `# UNIT` of histograms, which OpenMetrics allows.
        registry.register(
            "handover_seconds",
            "Times of handovers by stage. queue: submission to pairing (scheduler). At decode ranks, room: asked to blocks found; plan: to the \
             last source's tables and plan; post: until NICs had taken its transfers (at prefill ranks, its pushes); wire: first transfer to \
             last byte; notice: last byte to the leader's decision",
            times.clone(),
        );
        let stage = |stage| times.get_or_create_owned(&Stage { stage });
        let stages = Stages {
            queue: stage("queue"),
            room: stage("room"),
            plan: stage("plan"),
            post: stage("post"),
            wire: stage("wire"),
            notice: stage("notice"),
        };
        let (bytes, pieces) = (Family::default(), Family::default());
        registry.register_with_unit(
            "transferred",
            "KV bytes that delivered handovers brought to this rank",
            Unit::Bytes,
            Family::clone(&bytes),
        );
        registry.register(
            "pieces",
            "Contiguous pieces of those bytes, as transports counted them",
            Family::clone(&pieces),
        );
        let rail_turns: Family<Turn, Counter> = Family::default();
        registry.register(
            "rail_turns",
            "How often a rail of several to one peer became something else, by the device here: down when it failed or fell silent, slow, or up \
             again",
            rail_turns.clone(),
        );
        let endings = |registry: &mut Registry, name: &str, help: &str| {
            let family: Family<Ending, Counter> = Family::default();
            registry.register(name, help, family.clone());
            family
        };
        let requests = endings(&mut registry, "requests", "Requests that are over at this scheduler");
        let fetches = endings(&mut registry, "fetches", "This decode rank's parts of handovers that are decided");
        let offers = endings(&mut registry, "offers", "This prefill rank's offers that are over");
        let count = |registry: &mut Registry, name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let restarts = count(&mut registry, "restarts", "Incarnations of this process's node after its first");
        let leases_expired = count(&mut registry, "leases_expired", "Leases that ran out before anybody released them");
        let quarantines =
            count(&mut registry, "quarantines", "Handovers that were over while their blocks could still be written");
        let nodes_lost = count(&mut registry, "nodes_lost", "Nodes that this node heard were lost");
        let at_scrape = AtScrape::register(&mut registry);
        Metrics(Arc::new(Inner {
            registry,
            state: Mutex::default(),
            stages,
            requests,
            fetches,
            offers,
            bytes,
            pieces,
            rail_turns,
            restarts,
            leases_expired,
            quarantines,
            nodes_lost,
            at_scrape,
        }))
    }

    /// All time series in the text format of OpenMetrics 1.0. What is in hand is asked of the actors first, for two seconds at most.
    pub async fn text(&self) -> Result<String, fmt::Error> {
        let vitals = self.vitals().await;
        let (ready, draining) = {
            let state = self.state();
            (state.unready().is_none(), state.draining)
        };
        self.0.at_scrape.set(vitals.as_deref(), ready, draining);
        let mut text = String::new();
        encode(&mut text, &self.0.registry)?;
        Ok(text)
    }

    /// Why the process should be restarted; `None` while its node starts or its actors answer.
    pub async fn unhealthy(&self) -> Option<String> {
        let (stands, lives) = {
            let state = self.state();
            (state.standing().is_some(), state.lives)
        };
        match stands {
            false if lives == 0 => None,
            false => Some("its incarnation is over".to_owned()),
            true => match self.vitals().await {
                Some(vitals) if vitals.is_empty() => Some("its actors have ended".to_owned()),
                Some(_) => None,
                None => Some(format!("its actors have not answered for {} s", ANSWER_WITHIN.as_secs())),
            },
        }
    }

    /// Why it should get no new work; `None` when it may.
    pub fn unready(&self) -> Option<String> {
        self.state().unready()
    }

    /// `None` when no node runs, or it does not answer; empty when it is about to end.
    async fn vitals(&self) -> Option<Vec<Vitals>> {
        let standing = self.state().standing()?;
        tokio::time::timeout(ANSWER_WITHIN, standing.vitals()).await.ok()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetched(&self, course: &FetchCourse) {
        let Stages { room, plan, post, wire, notice, .. } = &self.0.stages;
        self.0.fetches.get_or_create(&Ending { outcome: outcome(&course.outcome) }).inc();
        let times = [(room, course.room()), (plan, course.plan()), (wire, course.wire()), (notice, course.notice())];
        for (histogram, time) in times.into_iter().filter_map(|(histogram, time)| Some((histogram, time?))) {
            histogram.observe(time.as_secs_f64());
        }
        if course.posted.is_some() {
            post.observe(course.posting.as_secs_f64());
        }
        if course.outcome.is_delivered() {
            course.paths.iter().for_each(|path| self.carried(path));
        }
    }

    fn carried(&self, path: &PathReport) {
        let direction = match path.direction {
            Direction::Pull => "pull",
            Direction::Push => "push",
        };
        let carrier = Carrier { transport: path.kind.to_string(), device: path.device.clone(), direction };
        self.0.bytes.get_or_create(&carrier).inc_by(path.bytes);
        self.0.pieces.get_or_create(&carrier).inc_by(path.pieces);
    }

    fn turned(&self, turn: &RailTurn) {
        let RailTurn { kind, device, health, .. } = turn;
        let turn = Turn { transport: kind.to_string(), device: device.clone(), health: health.name() };
        self.0.rail_turns.get_or_create(&turn).inc();
    }
}

impl Watch for Metrics {
    fn stands(&self, node: &Standing) {
        let mut state = self.state();
        state.stands(node.clone());
        if state.lives > 1 {
            self.0.restarts.inc();
        }
    }

    fn happened(&self, event: &Event) {
        match event {
            Event::FetchEnded(course) => self.fetched(course),
            Event::OfferEnded(course) => {
                self.0.offers.get_or_create(&Ending { outcome: view(course.view) }).inc();
                if !course.posting.is_zero() {
                    self.0.stages.post.observe(course.posting.as_secs_f64());
                }
            }
            Event::RequestEnded(course) => {
                self.0.requests.get_or_create(&Ending { outcome: outcome(&course.outcome) }).inc();
                if let Some(queue) = course.queue() {
                    self.0.stages.queue.observe(queue.as_secs_f64());
                }
            }
            Event::RailTurned(turn) => self.turned(turn),
            Event::LeaseExpired { .. } => drop(self.0.leases_expired.inc()),
            Event::Quarantined { .. } => drop(self.0.quarantines.inc()),
            Event::NodeLost { .. } => drop(self.0.nodes_lost.inc()),
            Event::Met { .. } | Event::Parted { .. } | Event::Health { .. } | Event::Draining { .. } => {
                self.state().happened(event);
            }
            _ => {}
        }
    }

    fn ended(&self) {
        self.state().ended();
    }
}

impl AtScrape {
    fn register(registry: &mut Registry) -> Self {
        let all = AtScrape::default();
        registry.register("leases_held", "Offers of this prefill rank that are held under a lease", all.leases.clone());
        registry.register(
            "quarantined_blocks",
            "Blocks of this decode rank that something may still write although their handover is over",
            all.quarantined_blocks.clone(),
        );
        registry.register("credits_used", "Credits that are out, by what they are for", all.credits.clone());
        registry.register("in_hand", "What each actor has not finished", all.in_hand.clone());
        registry.register("up", "Whether the node runs and its actors answer", all.up.clone());
        registry.register("ready", "Whether new work is welcome", all.ready.clone());
        registry.register("draining", "Whether the node leaves", all.draining.clone());
        all
    }

    fn set(&self, vitals: Option<&[Vitals]>, ready: bool, draining: bool) {
        self.up.set(i64::from(vitals.is_some_and(|vitals| !vitals.is_empty())));
        self.ready.set(i64::from(ready));
        self.draining.set(i64::from(draining));
        // What an incarnation had in hand that is over is nobody's.
        self.in_hand.clear();
        self.credits.clear();
        let (mut leases, mut quarantined) = (0, 0);
        for vitals in vitals.unwrap_or_default() {
            for (what, count) in vitals.waiting.iter().chain(&vitals.engine) {
                let count = i64::try_from(*count).unwrap_or(i64::MAX);
                match (vitals.name, *what) {
                    ("prefill rank", "offers") => leases += count,
                    ("decode rank", "quarantined_blocks") => quarantined += count,
                    _ => {}
                }
                self.in_hand.get_or_create(&InHand { actor: vitals.name, what }).set(count);
            }
            for (of, count) in &vitals.credits {
                self.credits.get_or_create(&Credited { of }).set(i64::try_from(*count).unwrap_or(i64::MAX));
            }
        }
        self.leases.set(leases);
        self.quarantined_blocks.set(quarantined);
    }
}

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(FIRST_BUCKET_SECONDS, 2.0, BUCKETS))
}

fn outcome(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Delivered => "delivered",
        Outcome::Failed { .. } => "failed",
        Outcome::Cancelled => "cancelled",
    }
}

fn view(view: PrefillView) -> &'static str {
    match view {
        PrefillView::Confirmed => "delivered",
        PrefillView::InDoubt => "in_doubt",
        PrefillView::Ended => "ended",
    }
}
