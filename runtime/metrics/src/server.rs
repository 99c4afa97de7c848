//! `/metrics`, `/healthz` and `/readyz` over HTTP.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};

use crate::Metrics;

/// Connections that are served at once; others wait.
const CONNECTIONS_MAX: usize = 32;
/// A request's head must have come by then, and be no longer than that.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Longest time that one connection is kept: those that take nothing must not keep probes away.
const CONNECTION_WITHIN: Duration = Duration::from_secs(15);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves a process's metrics and probes until it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Why nothing is served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// It is no address.
    #[error(
        "metrics cannot be served at {address:?}: {reason}; give an address such as 127.0.0.1:9464 (port 0 takes any)"
    )]
    BadAddress {
        /// What was given.
        address: String,
        /// Why it is none.
        reason: String,
    },
    /// It cannot be listened on.
    #[error("metrics cannot be served at {address}: {source}; free the port or choose another (0 takes any)")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No thread or runtime.
    #[error("the thread that serves metrics did not start: {0}")]
    Thread(#[source] std::io::Error),
}

impl MetricsServer {
    /// Listens at `address`, such as `127.0.0.1:9464`, on a thread of its own.
    pub fn start(metrics: Metrics, address: &str) -> Result<Self, ServeError> {
        let wanted: SocketAddr = address.parse().map_err(|error: std::net::AddrParseError| ServeError::BadAddress {
            address: address.to_owned(),
            reason: error.to_string(),
        })?;
        let listen = |source| ServeError::Listen { address: wanted, source };
        let listener = TcpListener::bind(wanted).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Thread)?;
        let body = move || {
            runtime.block_on(async move {
                let listener = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => listener,
                    Err(error) => {
                        tracing::error!(%error, "metrics cannot be served");
                        return;
                    }
                };
                tokio::select! {
                    biased;
                    // Also when whoever could say so is gone.
                    _ = stopped => {}
                    () = serve(listener, metrics) => {}
                }
            });
        };
        let thread =
            std::thread::Builder::new().name("kvferry-metrics".to_owned()).spawn(body).map_err(ServeError::Thread)?;
        Ok(MetricsServer { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread that serves metrics panicked");
        }
    }
}

async fn serve(listener: tokio::net::TcpListener, metrics: Metrics) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Of descriptors there may be too few for a while.
                tracing::warn!(%error, "a connection for metrics was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let metrics = metrics.clone();
        tokio::spawn(async move {
            let answers = service_fn(|request| answer(metrics.clone(), request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), answers);
            // Whoever breaks off is not answered.
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_WITHIN, connection).await {
                tracing::debug!(%error, "a connection for metrics ended");
            }
            drop(permit);
        });
    }
}

async fn answer(metrics: Metrics, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered");
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return Ok(response);
    }
    Ok(match request.uri().path() {
        "/metrics" => match metrics.text().await {
            Ok(text) => typed(StatusCode::OK, OPENMETRICS, text),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("metrics cannot be written: {error}")),
        },
        "/healthz" => probe(metrics.unhealthy().await),
        "/readyz" => probe(metrics.unready()),
        _ => plain(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz"),
    })
}

fn probe(trouble: Option<String>) -> Response<Full<Bytes>> {
    match trouble {
        None => plain(StatusCode::OK, "ok"),
        Some(trouble) => plain(StatusCode::SERVICE_UNAVAILABLE, &trouble),
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", format!("{text}\n"))
}

fn typed(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
