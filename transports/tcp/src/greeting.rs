//! How a stream begins: a fixed hello with the session key, answered by a fixed verdict.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use kvferry_transport::PeerId;

use crate::address::KEY_BYTES;
use crate::frame::STREAMS_MAX;
use kvferry_transport::codec::same_secret;

const MAGIC: [u8; 8] = *b"kvfTCP\x00\x01";
const HELLO_BYTES: usize = 8 + KEY_BYTES + KEY_BYTES + 8 + 2 + 2;
const VERDICT_BYTES: usize = 9;

/// The verdicts of an acceptor.
const ACCEPTED: u8 = 1;
const WRONG_KEY: u8 = 2;
const REFUSED: u8 = 3;

/// What an initiator says of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) key: [u8; KEY_BYTES],
    /// The initiator's instance.
    pub(crate) instance: [u8; KEY_BYTES],
    /// Which of its connections; streams with the same number belong together.
    pub(crate) connection: u64,
    /// Which stream of that connection, and of how many.
    pub(crate) index: u16,
    pub(crate) count: u16,
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HELLO_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.key);
        out.extend_from_slice(&self.instance);
        out.extend_from_slice(&self.connection.to_le_bytes());
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out
    }

    fn decode(mut bytes: &[u8]) -> Option<Hello> {
        fn next<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
            let (first, rest) = bytes.split_first_chunk::<N>()?;
            *bytes = rest;
            Some(*first)
        }
        if next::<8>(&mut bytes)? != MAGIC {
            return None;
        }
        let hello = Hello {
            key: next(&mut bytes)?,
            instance: next(&mut bytes)?,
            connection: u64::from_le_bytes(next(&mut bytes)?),
            index: u16::from_le_bytes(next(&mut bytes)?),
            count: u16::from_le_bytes(next(&mut bytes)?),
        };
        (usize::from(hello.count) <= STREAMS_MAX && hello.index < hello.count).then_some(hello)
    }
}

/// Which end of the greeting this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Waits for a hello.
    Acceptor,
    /// Said hello for a stream of this peer and waits for the verdict.
    Initiator(PeerId, u16),
}

/// How far a greeting got.
pub(crate) enum Progress {
    /// It needs more bytes.
    Waiting,
    /// The acceptor has read a hello with the right key; it was not answered yet.
    Heard(Hello),
    /// The initiator was let in.
    Admitted,
}

/// A socket before it is a stream.
pub(crate) struct Greeting {
    pub(crate) socket: TcpStream,
    pub(crate) role: Role,
    pub(crate) deadline: Instant,
    output: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
}

impl Greeting {
    /// An accepted socket.
    pub(crate) fn acceptor(socket: TcpStream, deadline: Instant) -> Greeting {
        Greeting { socket, role: Role::Acceptor, deadline, output: Vec::new(), sent: 0, input: Vec::new() }
    }

    /// A socket that is being connected.
    pub(crate) fn initiator(socket: TcpStream, peer: PeerId, hello: &Hello, deadline: Instant) -> Greeting {
        let role = Role::Initiator(peer, hello.index);
        Greeting { socket, role, deadline, output: hello.encode(), sent: 0, input: Vec::new() }
    }

    /// Goes on as far as the socket lets it. An error ends the socket.
    pub(crate) fn advance(&mut self, key: &[u8; KEY_BYTES]) -> Result<Progress, String> {
        if let Some(error) = self.socket.take_error().map_err(|error| error.to_string())? {
            return Err(format!("connecting: {error}"));
        }
        while self.sent < self.output.len() {
            match self.socket.write(self.output.get(self.sent..).unwrap_or_default()) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if is_early(&error) => return Ok(Progress::Waiting),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("connecting: {error}")),
            }
        }
        let wanted = if self.role == Role::Acceptor { HELLO_BYTES } else { VERDICT_BYTES };
        while self.input.len() < wanted {
            let mut space = [0; HELLO_BYTES];
            let part = space.get_mut(..wanted - self.input.len()).unwrap_or_default();
            match self.socket.read(part) {
                Ok(0) => return Err("it closed the connection during the greeting".to_owned()),
                Ok(bytes) => self.input.extend_from_slice(part.get(..bytes).unwrap_or_default()),
                Err(error) if is_early(&error) => return Ok(Progress::Waiting),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("connecting: {error}")),
            }
        }
        match self.role {
            Role::Acceptor => {
                let hello = Hello::decode(&self.input).ok_or("not a hello of this version")?;
                if !same_secret(&hello.key, key) {
                    self.answer(WRONG_KEY)?;
                    return Err("a wrong session key".to_owned());
                }
                Ok(Progress::Heard(hello))
            }
            Role::Initiator(..) => match self.input.split_first_chunk::<8>() {
                Some((&MAGIC, [ACCEPTED])) => Ok(Progress::Admitted),
                Some((&MAGIC, [WRONG_KEY])) => Err("it refused the session key; its address is out of date".to_owned()),
                Some((&MAGIC, [REFUSED])) => Err("it refused the stream; it holds too many connections".to_owned()),
                _ => Err("what listens there is not kvferry's tcp transport of this version".to_owned()),
            },
        }
    }

    /// Lets the peer in.
    pub(crate) fn admit(&mut self) -> Result<(), String> {
        self.answer(ACCEPTED)
    }

    /// Sends the peer away.
    pub(crate) fn refuse(&mut self) {
        // The socket is closed next in any case.
        let _ = self.answer(REFUSED);
    }

    /// A verdict always fits in the empty buffer of a fresh socket.
    fn answer(&mut self, verdict: u8) -> Result<(), String> {
        let mut out = MAGIC.to_vec();
        out.push(verdict);
        match self.socket.write(&out) {
            Ok(bytes) if bytes == out.len() => Ok(()),
            Ok(_) => Err("the answer to a hello was cut".to_owned()),
            Err(error) => Err(format!("answering a hello: {error}")),
        }
    }
}

fn is_early(error: &std::io::Error) -> bool {
    // A socket that is not connected yet says ENOTCONN to reads on some kernels.
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
}
