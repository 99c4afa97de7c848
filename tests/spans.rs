//! Spans of real nodes: a request that brings a traceparent is continued by every node that works on it, over the control links.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[allow(dead_code, reason = "of its nodes little is needed here")]
mod support;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvferry::{Outcome, RequestId, RequestSpec, Role, SPAN_TARGET, TraceContext};
use support::{PATIENCE, Rig, rank, scheduler};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

const SPEC: &str = "layers=2,kv_heads=2,head_dim=16,dtype=bf16";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// What was recorded of each span by the time that it ended.
#[derive(Clone, Default)]
struct Ended(Arc<Mutex<Vec<Fields>>>);

#[derive(Clone, Debug, Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ended {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        if span.metadata().target() == SPAN_TARGET {
            let mut fields = Fields::default();
            fields.0.insert("name".to_owned(), span.name().to_owned());
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(fields) = context.span(id).unwrap().extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        if let Some(fields) = context.span(&id).unwrap().extensions_mut().remove::<Fields>() {
            self.0.lock().unwrap().push(fields);
        }
    }
}

impl Ended {
    /// The spans of one request, once all three have ended.
    fn of(&self, request: u64) -> BTreeMap<String, Fields> {
        let late = Instant::now() + PATIENCE;
        loop {
            let ended = self.0.lock().unwrap().clone();
            let request = request.to_string();
            let of = ended.into_iter().filter(|fields| fields.0.get("request") == Some(&request));
            let spans: BTreeMap<String, Fields> = of.map(|fields| (fields.0["name"].clone(), fields)).collect();
            if spans.len() == 3 {
                return spans;
            }
            assert!(Instant::now() < late, "of three spans there are {spans:#?}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn a_request_continues_the_trace_that_it_belongs_to() {
    let ended = Ended::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(ended.clone())).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let parent: TraceContext = PARENT.parse().unwrap();
    runtime.block_on(async {
        let scheduler = scheduler(&None).await;
        let mut ranks: Vec<Rig> = Vec::new();
        for (node, role) in [(1, Role::Prefill), (2, Role::Decode)] {
            ranks.push(rank(node, role, SPEC, scheduler.address(), &None).await);
        }
        for (request, trace) in [(7, Some(parent)), (8, None)] {
            let request = RequestId(request);
            let spec = RequestSpec { request, tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
            let handover = scheduler.submit_traced(spec, trace).await;
            let finished = tokio::time::timeout(PATIENCE, handover).await.unwrap().unwrap();
            assert_eq!(finished.outcome, Outcome::Delivered);
        }
    });
    let traced = ended.of(7);
    let field = |span: &str, field: &str| traced[span].0.get(field).cloned().unwrap_or_default();
    assert_eq!(field("request", "parent_id"), "b7ad6b7169203331");
    for part in ["request", "offer", "fetch"] {
        assert_eq!(field(part, "trace_id"), "0af7651916cd43dd8448eb211c80319c", "{part}");
        assert_eq!((field(part, "sampled"), field(part, "span_id").len()), ("true".into(), 16), "{part}");
    }
    for part in ["offer", "fetch"] {
        assert_eq!(field(part, "parent_id"), field("request", "span_id"), "it is a part of the request");
        assert_ne!(field(part, "span_id"), field("request", "span_id"));
    }
    assert_eq!(
        (field("request", "node"), field("offer", "node"), field("fetch", "node")),
        ("0".into(), "1".into(), "2".into())
    );
    assert_eq!((field("request", "outcome"), field("fetch", "outcome")), ("delivered".into(), "delivered".into()));
    assert_eq!(field("offer", "outcome"), "Confirmed");
    // K and V of 40 tokens, 2 layers, 2 heads of 16 elements of 2 bytes.
    assert_eq!(field("fetch", "bytes"), (2 * 40 * 2 * 2 * 16 * 2).to_string());
    for (part, time) in [("request", "queue_us"), ("offer", "open_us"), ("fetch", "room_us"), ("fetch", "wire_us")] {
        assert!(!field(part, time).is_empty(), "{part} {time}");
    }
    let own = ended.of(8);
    assert!(own.values().all(|span| !span.0.contains_key("trace_id")), "{own:#?}");
}
