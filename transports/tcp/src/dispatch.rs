//! What frames mean. An `Err` is a breach of the protocol: it ends that connection and nothing else.

use kvferry_transport::{Event, Notice, PeerId};

use crate::frame::{Kind, Refusal};
use crate::receiver::Signal;
use crate::stream::{Flow, Source};
use crate::transport::TcpTransport;
use kvferry_transport::codec::{decode, encode};

impl TcpTransport {
    pub(crate) fn dispatch(&mut self, peer: PeerId, index: usize, signal: Signal) -> Result<(), String> {
        match signal {
            Signal::Placed { key: (Flow::Pull, tag), pieces } => self.pull_placed(peer, tag, pieces),
            Signal::Placed { key: (Flow::Push, tag), pieces } => self.push_placed(peer, tag, pieces),
            Signal::Sent { key, pieces } => self.sent(peer, key, pieces),
            Signal::Broken { key, is_outgoing, reason } => self.broken(peer, key, is_outgoing, reason),
            Signal::Control { kind, tag, payload } => match kind {
                Kind::Read => return self.on_read(peer, index, tag, &payload),
                Kind::Write => return self.on_write(peer, index, tag, &payload),
                Kind::Go => return self.on_go(peer, tag),
                Kind::Ack => return self.on_ack(peer, tag),
                Kind::Refuse => return self.on_refuse(peer, tag, &payload),
                Kind::Cancel => self.on_cancel(peer, tag),
                Kind::Notice => {
                    let notice: Notice = decode(&payload).map_err(|error| format!("a notice: {error}"))?;
                    self.events.push(Event::Notice { notice });
                }
                Kind::PullData | Kind::PullEnd | Kind::PushData | Kind::PushEnd => {}
            },
        }
        Ok(())
    }

    pub(crate) fn control(&mut self, peer: PeerId, index: usize, kind: Kind, tag: u64, payload: &[u8]) {
        if let Some(stream) = self.stream(peer, index) {
            stream.control(kind, tag, payload);
            self.schedule(peer, index);
        }
    }

    pub(crate) fn refuse(&mut self, peer: PeerId, index: usize, tag: u64, refusal: &Refusal) {
        self.control(peer, index, Kind::Refuse, tag, &encode(refusal));
    }

    pub(crate) fn send_part(&mut self, peer: PeerId, index: usize, source: Source) {
        if let Some(stream) = self.stream(peer, index) {
            stream.add_source(source);
            self.schedule(peer, index);
        }
    }
}
