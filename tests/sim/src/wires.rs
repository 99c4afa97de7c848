//! Control links between nodes: frames through the real frame reader, in order, late by the network's latency.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix::Recipient;
use bytes::Bytes;
use kvferry_actors::{Link, LinkInput, LinkUp};
use kvferry_core::wire::FrameReader;

use crate::timeline::Life;

/// One link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Dialer,
    Acceptor,
}

impl Side {
    pub(crate) fn other(self) -> Side {
        match self {
            Side::Dialer => Side::Acceptor,
            Side::Acceptor => Side::Dialer,
        }
    }
}

/// What an end has said since the kernel last looked.
pub(crate) struct Said {
    pub(crate) link: LinkId,
    pub(crate) from: Side,
    /// `None`: it is over.
    pub(crate) frame: Option<Bytes>,
}

/// All links of a world. Locked, because what goes through mailboxes must be `Send`; never contended.
#[derive(Clone, Default)]
pub(crate) struct Wires {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    links: BTreeMap<LinkId, [End; 2]>,
    said: Vec<Said>,
}

struct End {
    life: Life,
    inputs: Option<Recipient<LinkInput>>,
    /// What came before anybody listened.
    held: Vec<LinkInput>,
    reader: FrameReader,
    open: bool,
    /// When the last thing that this end said arrives: nothing overtakes it.
    arrives_at: u64,
}

impl Wires {
    /// A link between two nodes; what each is to be given.
    pub(crate) fn join(&self, dialer: Life, acceptor: Life) -> (LinkUp, LinkUp) {
        let id = {
            let mut inner = self.lock();
            let id = LinkId(inner.next);
            inner.next += 1;
            inner.links.insert(id, [End::new(dialer), End::new(acceptor)]);
            id
        };
        (self.end_of(id, Side::Dialer), self.end_of(id, Side::Acceptor))
    }

    /// Takes what was said.
    pub(crate) fn take_said(&self) -> Vec<Said> {
        std::mem::take(&mut self.lock().said)
    }

    /// The nodes that said and will hear what is said on a link.
    pub(crate) fn ends(&self, link: LinkId, from: Side) -> Option<(usize, usize)> {
        let mut inner = self.lock();
        let from_node = inner.end(link, from)?.life.node;
        Some((from_node, inner.end(link, from.other())?.life.node))
    }

    /// When something that is said now, and takes until `at`, arrives.
    pub(crate) fn arrival(&self, link: LinkId, from: Side, at: u64) -> u64 {
        let mut inner = self.lock();
        let Some(end) = inner.end(link, from) else { return at };
        end.arrives_at = at.max(end.arrives_at.saturating_add(1));
        end.arrives_at
    }

    /// A frame arrives.
    pub(crate) fn deliver(&self, link: LinkId, to: Side, frame: &Bytes) {
        let mut inner = self.lock();
        let Some(end) = inner.end(link, to).filter(|end| end.open) else { return };
        end.reader.buffer().extend_from_slice(frame);
        let mut frames = Vec::new();
        let garbage = loop {
            match end.reader.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        if !frames.is_empty() {
            end.give(LinkInput::Frames(frames));
        }
        if let Some(error) = garbage {
            end.give(LinkInput::Garbage(error));
        }
    }

    /// An end learns that the other is gone.
    pub(crate) fn break_off(&self, link: LinkId, to: Side) {
        let mut inner = self.lock();
        if let Some(end) = inner.end(link, to).filter(|end| end.open) {
            end.give(LinkInput::Closed("the peer closed it".to_owned()));
        }
        if inner.links.get(&link).is_some_and(|ends| ends.iter().all(|end| !end.open)) {
            inner.links.remove(&link);
        }
    }

    /// Ends everything that a node still has open.
    pub(crate) fn cut(&self, life: Life) {
        let mut inner = self.lock();
        let mut said = Vec::new();
        for (link, [dialer, acceptor]) in &mut inner.links {
            for (end, from) in [(dialer, Side::Dialer), (acceptor, Side::Acceptor)] {
                if end.life == life && end.open {
                    end.close();
                    said.push(Said { link: *link, from, frame: None });
                }
            }
        }
        inner.said.append(&mut said);
    }

    fn end_of(&self, id: LinkId, side: Side) -> LinkUp {
        let wires = self.clone();
        let attach = move |inputs: Recipient<LinkInput>| {
            if let Some(end) = wires.lock().end(id, side) {
                for held in end.held.drain(..) {
                    inputs.do_send(held);
                }
                end.inputs = Some(inputs);
            }
            Box::new(SimLink { wires: wires.clone(), id, side }) as Box<dyn Link>
        };
        // Simulated nodes are hosts of their own: sessions need the shared secret.
        LinkUp { loopback: false, attach: Box::new(attach) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn end(&mut self, link: LinkId, side: Side) -> Option<&mut End> {
        let [dialer, acceptor] = self.links.get_mut(&link)?;
        Some(match side {
            Side::Dialer => dialer,
            Side::Acceptor => acceptor,
        })
    }

    fn close(&mut self, link: LinkId, side: Side) {
        if let Some(end) = self.end(link, side).filter(|end| end.open) {
            end.close();
            self.said.push(Said { link, from: side, frame: None });
        }
    }
}

impl End {
    fn new(life: Life) -> Self {
        End { life, inputs: None, held: Vec::new(), reader: FrameReader::default(), open: true, arrives_at: 0 }
    }

    fn give(&mut self, input: LinkInput) {
        match &self.inputs {
            Some(inputs) => inputs.do_send(input),
            None => self.held.push(input),
        }
    }

    fn close(&mut self) {
        self.open = false;
        self.inputs = None;
        self.held.clear();
    }
}

/// One end as its session holds it.
struct SimLink {
    wires: Wires,
    id: LinkId,
    side: Side,
}

impl Link for SimLink {
    fn send(&mut self, frame: Bytes) {
        let mut inner = self.wires.lock();
        if inner.end(self.id, self.side).is_some_and(|end| end.open) {
            inner.said.push(Said { link: self.id, from: self.side, frame: Some(frame) });
        }
    }

    fn trust(&mut self) {
        if let Some(end) = self.wires.lock().end(self.id, self.side) {
            end.reader.trust();
        }
    }

    fn close(&mut self) {
        self.wires.lock().close(self.id, self.side);
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        self.close();
    }
}
