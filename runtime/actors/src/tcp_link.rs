//! Control links over TCP, on tokio.
#![allow(clippy::disallowed_methods, reason = "the production side of a seam")]

use core::time::Duration;
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use actix::prelude::*;
use bytes::Bytes;
use kvferry_core::wire::FrameReader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;

use crate::seams::{Link, LinkInput, LinkUp, ListenError, Network};

/// Bytes that one read asks for.
const READ_BYTES: usize = 64 << 10;

/// How long one frame may take to leave.
const WRITE_WITHIN: Duration = Duration::from_secs(30);
/// How long a closed link is kept for the peer to read why.
const LINGER: Duration = Duration::from_secs(1);

/// The network of real hosts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TcpNetwork;

impl Network for TcpNetwork {
    fn dial(&self, address: &str, within: Duration, answer: Box<dyn FnOnce(Result<LinkUp, String>)>) {
        let address = address.to_owned();
        spawn_local(async move {
            // By itself the system goes on for minutes, with pauses that double.
            let stream = tokio::time::timeout(within, TcpStream::connect(&address)).await;
            let stream = stream.unwrap_or_else(|_| {
                let why = format!("it did not answer within {within:?}");
                Err(std::io::Error::new(std::io::ErrorKind::TimedOut, why))
            });
            answer(stream.and_then(link_up).map_err(|error| format!("{address}: {error}")));
        });
    }

    fn listen(&self, address: &str, accept: Box<dyn Fn(LinkUp)>) -> Result<String, ListenError> {
        let parsed: SocketAddr = address.parse().map_err(|error: std::net::AddrParseError| {
            ListenError::BadAddress { address: address.to_owned(), reason: error.to_string() }
        })?;
        let io = |source| ListenError::Io { address: address.to_owned(), source };
        let listener = std::net::TcpListener::bind(parsed).map_err(io)?;
        listener.set_nonblocking(true).map_err(io)?;
        let bound = listener.local_addr().map_err(io)?;
        let listener = TcpListener::from_std(listener).map_err(io)?;
        spawn_local(async move {
            loop {
                match listener.accept().await.and_then(|(stream, _)| link_up(stream)) {
                    Ok(link) => accept(link),
                    Err(error) => {
                        // Out of descriptors, or a peer that left at once: neither may spin.
                        tracing::warn!(%error, "a link could not be accepted");
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        });
        Ok(bound.to_string())
    }
}

fn link_up(stream: TcpStream) -> std::io::Result<LinkUp> {
    stream.set_nodelay(true)?;
    let is_local = |address: IpAddr| address.is_loopback();
    let loopback = is_local(stream.peer_addr()?.ip()) && is_local(stream.local_addr()?.ip());
    Ok(LinkUp { loopback, attach: Box::new(move |inputs| Box::new(TcpLink::start(stream, inputs))) })
}

struct TcpLink {
    outgoing: Option<mpsc::UnboundedSender<Bytes>>,
    trusted: Rc<Cell<bool>>,
    closed: Rc<Notify>,
}

impl TcpLink {
    fn start(stream: TcpStream, inputs: Recipient<LinkInput>) -> Self {
        let (read, mut write) = stream.into_split();
        let (outgoing, mut frames) = mpsc::unbounded_channel::<Bytes>();
        let trusted = Rc::new(Cell::new(false));
        let failed = inputs.clone();
        spawn_local(async move {
            while let Some(frame) = frames.recv().await {
                let written = tokio::time::timeout(WRITE_WITHIN, write.write_all(&frame)).await;
                let error = match written {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => format!("the peer took nothing for {WRITE_WITHIN:?}"),
                };
                failed.do_send(LinkInput::Closed(error));
                return;
            }
            // A peer that reads slowly still gets the last frame, the reason of a rejection; a broken link cannot.
            let _ = write.shutdown().await;
        });
        let closed = Rc::new(Notify::new());
        spawn_local(read_frames(read, inputs, Rc::clone(&trusted), Rc::clone(&closed)));
        TcpLink { outgoing: Some(outgoing), trusted, closed }
    }
}

impl Link for TcpLink {
    fn send(&mut self, frame: Bytes) {
        if let Some(outgoing) = &self.outgoing {
            // A writer that has ended has reported why.
            let _ = outgoing.send(frame);
        }
    }

    fn trust(&mut self) {
        self.trusted.set(true);
    }

    fn close(&mut self) {
        self.outgoing = None;
        self.closed.notify_one();
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.closed.notify_one();
    }
}

async fn read_frames(
    mut read: tokio::net::tcp::OwnedReadHalf,
    inputs: Recipient<LinkInput>,
    trusted: Rc<Cell<bool>>,
    closed: Rc<Notify>,
) {
    let mut reader = FrameReader::default();
    let reason = loop {
        let mut frames = Vec::new();
        if trusted.get() {
            reader.trust();
        }
        let garbage = loop {
            match reader.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        if !frames.is_empty() {
            inputs.do_send(LinkInput::Frames(frames));
            // The session may have become trusted by these; the reader must know before it judges the next length.
            tokio::task::yield_now().await;
            if garbage.is_none() || (trusted.get() && !reader.is_trusted()) {
                continue;
            }
        }
        if let Some(error) = garbage {
            inputs.do_send(LinkInput::Garbage(error));
            return linger(read, &closed).await;
        }
        reader.buffer().reserve(READ_BYTES);
        let count = tokio::select! {
            biased;
            () = closed.notified() => {
                closed.notify_one();
                return linger(read, &closed).await;
            }
            count = read.read_buf(reader.buffer()) => count,
        };
        match count {
            Ok(0) => break "the peer closed it".to_owned(),
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    inputs.do_send(LinkInput::Closed(reason));
}

/// Reads on for a moment after this side has closed: bytes that nobody has read would turn the end of the link into a reset, which
/// can overtake the reason that was sent.
async fn linger(mut read: tokio::net::tcp::OwnedReadHalf, closed: &Notify) {
    closed.notified().await;
    let mut scratch = [0; 4096];
    let drained = async { while read.read(&mut scratch).await.is_ok_and(|count| count > 0) {} };
    // Whoever has not closed by then gets the reset.
    let _ = tokio::time::timeout(LINGER, drained).await;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_does_not_answer_is_not_waited_for() {
        // A listener that accepts nothing: once its queue is full, further dials are not even refused.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let within = Duration::from_millis(100);
        let local = tokio::task::LocalSet::new();
        let failure = local.run_until(async {
            let mut links = Vec::new();
            loop {
                let (told, answer) = tokio::sync::oneshot::channel();
                TcpNetwork.dial(&address, within, Box::new(move |link| drop(told.send(link))));
                match answer.await.unwrap() {
                    Ok(link) => links.push(link),
                    Err(reason) => break reason,
                }
            }
        });
        let failure = tokio::time::timeout(Duration::from_secs(30), failure).await.unwrap();
        assert!(failure.contains("did not answer within 100ms") && failure.contains(&address), "{failure}");
    }
}
