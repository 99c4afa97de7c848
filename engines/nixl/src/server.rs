//! Metadata over sockets, as NIXL agents with a listening thread exchange it: the listening side.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};

use crate::exchange::{ExchangeError, read_body, read_length, timely, write};
use crate::{Agent, FRAME_BYTES_MAX, Frame, Peer};

/// Bytes of frames that are being read, of all connections together.
const READING_BYTES_MAX: usize = 4 * FRAME_BYTES_MAX;
/// What was exchanged and nobody has asked for.
const MET_MAX: usize = 4096;
/// When no further descriptor can be had.
const BREATH: Duration = Duration::from_millis(100);
/// No connection that was used since then is given up for another.
const IDLE_AT_LEAST: Duration = Duration::from_secs(60);
/// Of a connection that is in the middle of something.
const BUSY: u64 = u64::MAX;

/// Where and how metadata is served.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    address: SocketAddr,
    connections_max: usize,
    within: Duration,
}

impl ServerConfig {
    /// For agents of this host; port 0 takes any, NIXL's own is [`EXCHANGE_PORT`](crate::EXCHANGE_PORT).
    pub fn loopback(port: u16) -> ServerConfig {
        ServerConfig::exposed((Ipv4Addr::LOCALHOST, port).into())
    }

    /// For whoever reaches this address. Everybody who does gets the keys of all registered memory, and may read and write it, add peers and have
    /// peers dropped: only for networks in which everybody is trusted. NIXL agents connect by IPv4 only.
    pub fn exposed(address: SocketAddr) -> ServerConfig {
        ServerConfig { address, connections_max: 256, within: Duration::from_secs(10) }
    }

    /// Connections at a time, at most; 256 by default, at least 1. NIXL agents keep theirs open. For one more, the one that is idle for the longest
    /// time, and for a minute at least, is given up; where there is none, the new one is.
    pub fn connections_max(mut self, connections: usize) -> ServerConfig {
        self.connections_max = connections.max(1);
        self
    }

    /// How long a frame may take from its length to its end, and an answer to be taken; 10 s by default.
    pub fn within(mut self, within: Duration) -> ServerConfig {
        self.within = within;
        self
    }
}

/// What somebody had this agent do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Met {
    /// A peer was added, or has more memory now.
    Added(Peer),
    /// The peer of this name was removed.
    Removed(String),
}

/// Serves an agent's metadata until it is dropped: answers whoever asks for it, adds agents whose metadata comes, removes those that say they leave.
#[derive(Debug)]
pub struct MetadataServer {
    address: SocketAddr,
    met: mpsc::Receiver<Met>,
    task: JoinHandle<()>,
}

impl MetadataServer {
    /// Listens, on the tokio runtime that this is called in.
    pub async fn start(agent: Agent, config: ServerConfig) -> Result<MetadataServer, ExchangeError> {
        let wanted = config.address;
        let listen = |source| ExchangeError::Listen { address: wanted, source };
        let listener = TcpListener::bind(wanted).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        if !address.ip().is_loopback() {
            tracing::warn!(
                %address,
                "whoever reaches this address gets the keys of all memory of agent {} and may read and write it",
                agent.name()
            );
        }
        let (told, met) = mpsc::channel(MET_MAX);
        let reading = Arc::new(Semaphore::new(READING_BYTES_MAX));
        let server = Server { agent, within: config.within, reading, told };
        let task = tokio::spawn(serve(listener, server, config.connections_max));
        Ok(MetadataServer { address, met, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What was done next at somebody's word, in order. Of what nobody asks for, 4,096 are kept.
    pub async fn met(&mut self) -> Option<Met> {
        self.met.recv().await
    }
}

impl Drop for MetadataServer {
    fn drop(&mut self) {
        // Its connections end with it.
        self.task.abort();
    }
}

/// A connection that is served.
struct Seat {
    /// Since when it is idle, in milliseconds of the server's life, or [`BUSY`].
    idle_since: Arc<AtomicU64>,
    abort: AbortHandle,
}

async fn serve(listener: TcpListener, server: Server, connections_max: usize) {
    let (began, mut tasks, mut seats) = (Instant::now(), JoinSet::new(), Vec::<Seat>::new());
    loop {
        let accepted = listener.accept().await;
        while tasks.try_join_next().is_some() {}
        seats.retain(|seat| !seat.abort.is_finished());
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Of descriptors there may be too few for a while.
                tracing::warn!(%error, "a connection for metadata was not accepted");
                tokio::time::sleep(BREATH).await;
                continue;
            }
        };
        if seats.len() >= connections_max && !give_up_one(&mut seats, began.elapsed()) {
            tracing::warn!(%from, connections_max, "a connection for metadata is one too many");
            continue;
        }
        let idle_since = Arc::new(AtomicU64::new(BUSY));
        let served = server.clone().converse(stream, from, began, idle_since.clone());
        seats.push(Seat { idle_since, abort: tasks.spawn(served) });
    }
}

/// Gives up the connection that is idle for the longest time, if one is for long enough.
fn give_up_one(seats: &mut Vec<Seat>, now: Duration) -> bool {
    let since = |seat: &Seat| seat.idle_since.load(Ordering::Relaxed);
    let longest = seats.iter().enumerate().min_by_key(|(_, seat)| since(seat));
    let Some((index, seat)) = longest else { return false };
    let long_ago = now.saturating_sub(IDLE_AT_LEAST).as_millis() as u64;
    if since(seat) == BUSY || now < IDLE_AT_LEAST || since(seat) > long_ago {
        return false;
    }
    seats.swap_remove(index).abort.abort();
    true
}

#[derive(Clone)]
struct Server {
    agent: Agent,
    within: Duration,
    reading: Arc<Semaphore>,
    told: mpsc::Sender<Met>,
}

impl Server {
    /// Does what one connection asks for, until it is closed or says something that makes no sense.
    async fn converse(self, mut stream: TcpStream, from: SocketAddr, began: Instant, idle_since: Arc<AtomicU64>) {
        let _slower = stream.set_nodelay(true);
        loop {
            idle_since.store(began.elapsed().as_millis() as u64, Ordering::Relaxed);
            // Between frames it may be silent for as long as it likes. What is there is looked at: `readable` still holds after a frame that was
            // read to its last byte, and no further.
            match stream.peek(&mut [0]).await {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => return tracing::debug!(%from, %error, "a connection for metadata ended"),
            }
            idle_since.store(BUSY, Ordering::Relaxed);
            match self.turn(&mut stream, from).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return tracing::warn!(%from, %error, "a connection for metadata is closed"),
            }
        }
    }

    /// Reads a frame and does what it says. False when there is none any more.
    async fn turn(&self, stream: &mut TcpStream, from: SocketAddr) -> Result<bool, ExchangeError> {
        let frame = timely(from, self.within, async {
            let Some(length) = read_length(stream, from).await? else { return Ok(None) };
            // Lengths that do not fit were refused. It is never closed.
            let room = self.reading.acquire_many(u32::try_from(length).unwrap_or(u32::MAX)).await;
            read_body(stream, from, length).await.map(|frame| Some((frame, room)))
        });
        let Some((frame, _room)) = frame.await?? else { return Ok(false) };
        // What came has its room until it is loaded.
        match frame {
            Frame::Send => {
                let answer = Frame::Load(self.agent.metadata().await?).encode()?;
                timely(from, self.within, write(stream, from, &answer)).await??;
            }
            // The connection goes on, as NIXL's does: what was wrong is this metadata.
            Frame::Load(metadata) => match self.agent.add_peer(metadata).await {
                Ok(peer) => self.tell(Met::Added(peer)),
                Err(error) => tracing::warn!(%from, %error, "metadata that came is not loaded"),
            },
            Frame::Invalidate(name) => match self.agent.remove_peer(&name).await {
                Ok(()) => self.tell(Met::Removed(name)),
                Err(error) => tracing::debug!(%from, %error, "an agent that leaves was not known"),
            },
        }
        Ok(true)
    }

    fn tell(&self, met: Met) {
        // Whoever does not ask does not wait for it.
        let _nobody_asks = self.told.try_send(met);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_idle_for_long_makes_room() {
        let seat = |idle_since| {
            let abort = tokio::spawn(std::future::pending::<()>()).abort_handle();
            Seat { idle_since: Arc::new(AtomicU64::new(idle_since)), abort }
        };
        let mut seats = vec![seat(BUSY), seat(5_000), seat(1_000), seat(70_000)];
        let second = seats[2].abort.clone();
        let at = Duration::from_secs;
        assert!(!give_up_one(&mut seats, at(10)), "none is old enough");
        assert!(!give_up_one(&mut seats, at(60)), "a second too early");
        assert!(give_up_one(&mut seats, at(61)));
        tokio::task::yield_now().await;
        assert!(second.is_finished() && seats.len() == 3, "the oldest went");
        assert!(give_up_one(&mut seats, at(100)));
        assert!(!give_up_one(&mut seats, at(100)), "one is too young, one is busy");
        assert!(give_up_one(&mut seats, at(200)));
        assert!(!give_up_one(&mut seats, at(1_000_000)), "what is busy stays");
        assert!(!give_up_one(&mut Vec::new(), at(1_000_000)));
    }
}
