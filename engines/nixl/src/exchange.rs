//! Metadata over sockets, as NIXL agents with a listening thread exchange it: the asking side.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{AgentError, Frame, WireError};

/// The port on which NIXL agents listen unless they are told another.
pub const EXCHANGE_PORT: u16 = 8888;
/// Memory that is set aside for a frame ahead of its bytes: what is claimed is not yet there.
const AHEAD_BYTES: usize = 64 << 10;

/// A connection to an agent that listens for metadata: a NIXL agent with a listening thread, or a [`MetadataServer`](crate::MetadataServer).
///
/// Nothing is authenticated or encrypted. A NIXL agent keeps a descriptor for every connection that was ever made to it, also for those that are
/// closed: keep this for as long as the agent may be spoken to, instead of one for every call.
#[derive(Debug)]
pub struct Exchange {
    stream: TcpStream,
    address: SocketAddr,
    within: Duration,
    /// A call ended in the middle of a frame.
    broken: bool,
}

/// Why metadata was not exchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The other side cannot be reached, or the connection failed.
    #[error(
        "no metadata was exchanged with {address}: {source}; the agent there must listen (NIXL: nixl_agent_config(enable_listen_thread=True, listen_port=..))"
    )]
    Io {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing can be listened on.
    #[error("metadata cannot be served at {address}: {source}; free the port or choose another (0 takes any)")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Time is up.
    #[error("{address} did not answer within {waited_ms} ms; look whether its agent still runs, or give it more time")]
    Deadline {
        /// Where.
        address: SocketAddr,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// It closed the connection instead of answering.
    #[error("{address} closed the connection; it serves too many, or what listens there is no NIXL agent")]
    Closed {
        /// Where.
        address: SocketAddr,
    },
    /// An earlier call was dropped or failed in the middle of a frame.
    #[error("the connection to {address} stopped in the middle of a frame; connect again")]
    Broken {
        /// Where.
        address: SocketAddr,
    },
    /// It sent something else than was asked for.
    #[error("{address} answered with another command than LOAD; what listens there is no NIXL agent")]
    Unexpected {
        /// Where.
        address: SocketAddr,
    },
    /// What came, or should go, is no frame.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The agent here cannot say what it has.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl Exchange {
    /// Connects. `within` is for this and for each later call, from its beginning to its end.
    pub async fn connect(address: SocketAddr, within: Duration) -> Result<Exchange, ExchangeError> {
        let connected = timely(address, within, TcpStream::connect(address)).await?;
        let stream = connected.map_err(|source| ExchangeError::Io { address, source })?;
        // Frames are whole messages. Without it they are only slower.
        let _slower = stream.set_nodelay(true);
        Ok(Exchange { stream, address, within, broken: false })
    }

    /// Where it is connected to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the agent there tells of itself: for [`Agent::add_peer`](crate::Agent::add_peer).
    pub async fn fetch(&mut self) -> Result<Bytes, ExchangeError> {
        let send = Frame::Send.encode()?;
        let (address, within) = (self.address, self.within);
        self.whole(async |stream| {
            timely(address, within, async {
                write(stream, address, &send).await?;
                match read(stream, address).await? {
                    Some(Frame::Load(metadata)) => Ok(metadata),
                    Some(_) => Err(ExchangeError::Unexpected { address }),
                    None => Err(ExchangeError::Closed { address }),
                }
            })
            .await?
        })
        .await
    }

    /// Has the agent there load metadata, whole or in part: [`Agent::metadata`](crate::Agent::metadata). It does not say whether it did.
    pub async fn send(&mut self, metadata: Bytes) -> Result<(), ExchangeError> {
        self.tell(&Frame::Load(metadata)).await
    }

    /// Has the agent there forget the agent of this name. It does not say whether it did.
    pub async fn invalidate(&mut self, name: &str) -> Result<(), ExchangeError> {
        self.tell(&Frame::Invalidate(name.to_owned())).await
    }

    async fn tell(&mut self, frame: &Frame) -> Result<(), ExchangeError> {
        let bytes = frame.encode()?;
        let (address, within) = (self.address, self.within);
        self.whole(async |stream| timely(address, within, write(stream, address, &bytes)).await?).await
    }

    /// Runs a call; the connection is of no use any more if it does not come to its end.
    async fn whole<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut TcpStream) -> Result<T, ExchangeError>,
    ) -> Result<T, ExchangeError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(ExchangeError::Broken { address: self.address });
        }
        let answer = call(&mut self.stream).await?;
        self.broken = false;
        Ok(answer)
    }
}

/// The next frame; none when the other side has closed the connection between two.
pub(crate) async fn read(stream: &mut TcpStream, address: SocketAddr) -> Result<Option<Frame>, ExchangeError> {
    match read_length(stream, address).await? {
        None => Ok(None),
        Some(length) => read_body(stream, address, length).await.map(Some),
    }
}

/// The length of the next frame, which was found acceptable.
pub(crate) async fn read_length(stream: &mut TcpStream, address: SocketAddr) -> Result<Option<usize>, ExchangeError> {
    let failed = |source| ExchangeError::Io { address, source };
    let mut length = [0; 8];
    let mut got = 0;
    while let Some(rest) = length.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest).await.map_err(failed)? {
            0 if got == 0 => return Ok(None),
            0 => return Err(ExchangeError::Closed { address }),
            bytes => got += bytes,
        }
    }
    Ok(Some(Frame::length(length)?))
}

/// A frame of so many bytes.
pub(crate) async fn read_body(
    stream: &mut TcpStream,
    address: SocketAddr,
    length: usize,
) -> Result<Frame, ExchangeError> {
    let failed = |source| ExchangeError::Io { address, source };
    let mut body = BytesMut::with_capacity(length.min(AHEAD_BYTES));
    let mut rest = stream.take(length as u64);
    while body.len() < length {
        if rest.read_buf(&mut body).await.map_err(failed)? == 0 {
            return Err(ExchangeError::Closed { address });
        }
    }
    Ok(Frame::decode(body.freeze())?)
}

pub(crate) async fn write(stream: &mut TcpStream, address: SocketAddr, bytes: &[u8]) -> Result<(), ExchangeError> {
    stream.write_all(bytes).await.map_err(|source| ExchangeError::Io { address, source })
}

/// What comes of it in time.
pub(crate) async fn timely<T>(
    address: SocketAddr,
    within: Duration,
    what: impl Future<Output = T>,
) -> Result<T, ExchangeError> {
    let began = Instant::now();
    let late = |_| ExchangeError::Deadline { address, waited_ms: began.elapsed().as_millis() as u64 };
    tokio::time::timeout(within, what).await.map_err(late)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    const SOON: Duration = Duration::from_millis(200);
    const LATE: Duration = Duration::from_secs(30);

    /// What a client gets from something that answers SEND with these bytes, and then closes the connection or waits.
    async fn fetched(answer: &'static [u8], close: bool, within: Duration) -> Result<Bytes, ExchangeError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = Exchange::connect(listener.local_addr().unwrap(), within).await.unwrap();
        let (mut server, address) = listener.accept().await.unwrap();
        let serve = async {
            assert_eq!(read(&mut server, address).await.unwrap(), Some(Frame::Send));
            server.write_all(answer).await.unwrap();
            if close {
                drop(server);
            } else {
                std::future::pending::<()>().await;
            }
            std::future::pending().await
        };
        let got = tokio::select! {
            () = serve => unreachable!("it never ends"),
            got = client.fetch() => got,
        };
        if got.is_err() {
            assert!(matches!(client.fetch().await, Err(ExchangeError::Broken { .. })), "it is used no more");
        }
        got
    }

    #[tokio::test]
    async fn what_is_no_answer_in_time_says_what_it_is() {
        let load = fetched(b"\x10\0\0\0\0\0\0\0NIXLCOMM:LOADabc", false, LATE).await;
        assert_eq!(load.unwrap(), "abc");
        for answer in [&b""[..], b"\x10\0\0\0", b"\x10\0\0\0\0\0\0\0NIXLCOMM:"] {
            let error = fetched(answer, false, SOON).await.unwrap_err();
            assert!(matches!(error, ExchangeError::Deadline { .. }), "{answer:?}: {error}");
            let error = fetched(answer, true, LATE).await.unwrap_err();
            // A reset where bytes were not read.
            assert!(matches!(error, ExchangeError::Closed { .. } | ExchangeError::Io { .. }), "{answer:?}: {error}");
        }
        let error = fetched(b"\x0d\0\0\0\0\0\0\0NIXLCOMM:SEND", false, LATE).await.unwrap_err();
        assert!(matches!(error, ExchangeError::Unexpected { .. }), "{error}");
        let error = fetched(&[0xff; 8], false, LATE).await.unwrap_err();
        assert!(matches!(error, ExchangeError::Wire(WireError::TooLong { .. })), "{error}");
        let error = fetched(b"\x04\0\0\0\0\0\0\0HTTP", false, LATE).await.unwrap_err();
        assert!(matches!(error, ExchangeError::Wire(WireError::Frame(_))), "{error}");
    }

    #[tokio::test]
    async fn where_nobody_listens_it_says_how_to_listen() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = Exchange::connect(free, LATE).await.unwrap_err().to_string();
        assert!(error.contains(&free.to_string()) && error.contains("enable_listen_thread"), "{error}");
    }
}
