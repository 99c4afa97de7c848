//! What a node does, for Prometheus (`/metrics`) and for probes (`/healthz`, `/readyz`).
//!
//! [`Metrics`] watches nodes: counters and histograms grow when something is over, one record per request and actor; what is in hand is asked of
//! the actors only when somebody scrapes. [`MetricsServer`] answers on a thread of its own. [`Recorder`] keeps the last that was said and happened, and
//! writes it when something goes wrong.

mod labels;
mod metrics;
mod recorder;
mod server;
mod state;

pub use metrics::Metrics;
pub use recorder::{Recorder, RecorderOptions};
pub use server::{MetricsServer, ServeError};
