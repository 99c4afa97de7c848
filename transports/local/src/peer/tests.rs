//! Backends that speak to each other.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::{PoolId, PoolLayout, Program, TransportKind, UnitRange};
use kvferry_transport::{Evidence, NicInfo, Options, Pool, Transport, Wait};

use super::*;
use crate::backend::{Copying, Shared, Step};
use crate::carrier::Owner;
use crate::sockets::Sockets;
use crate::wire::MemoryKind;

/// What it is to say, and what it has heard. A word that begins with `!` breaks the rules.
#[derive(Default)]
struct Words {
    said: Vec<(PeerId, Bytes)>,
    heard: Vec<Bytes>,
}

struct Talker<const SPEAKS: bool>(Rc<RefCell<Words>>);

struct Nothing;

impl<const SPEAKS: bool> Backend for Talker<SPEAKS> {
    const KIND: TransportKind = TransportKind::Shm;
    const SPEAKS: bool = SPEAKS;
    type Carrier = Sockets;
    type Memory = ();
    type Copy = Nothing;

    fn bind(&mut self, _: &Pool) -> Result<(), String> {
        Ok(())
    }

    fn unbind(&mut self, _: PoolId) {}

    fn share(&mut self, _: &Pool, _: bool) -> Result<Shared, String> {
        Err("nothing is shared".to_owned())
    }

    fn open(&mut self, _: Owner<'_>, _: &PoolLayout, _: MemoryKind, _: Vec<OwnedFd>) -> Result<(), String> {
        Ok(())
    }

    fn reached(&self, (): &()) -> Evidence {
        Evidence::connected(Vec::new())
    }

    fn lent(&self, _: &MemoryKind) -> Evidence {
        Evidence::connected(Vec::new())
    }

    fn copy(
        &mut self,
        _: Arc<Program>,
        _: UnitRange,
        _: Arc<PoolLayout>,
        _: Rc<()>,
        _: Pool,
    ) -> Result<Nothing, TransferError> {
        Ok(Nothing)
    }

    fn hear(&mut self, _: PeerId, words: &[u8]) -> Result<(), String> {
        if words.starts_with(b"!") {
            return Err("it shouts".to_owned());
        }
        self.0.borrow_mut().heard.push(Bytes::copy_from_slice(words));
        Ok(())
    }

    fn say(&mut self) -> Vec<(PeerId, Bytes)> {
        std::mem::take(&mut self.0.borrow_mut().said)
    }

    fn wait(&self) -> Option<Wait> {
        None
    }
}

impl Copying for Nothing {
    fn step(&mut self, _: u64) -> Result<Step, TransferError> {
        Ok(Step::Done(0))
    }

    fn bytes(&self) -> u64 {
        0
    }

    fn pieces(&self) -> u64 {
        0
    }

    fn is_running(&mut self) -> bool {
        false
    }
}

fn open<const SPEAKS: bool>() -> (LocalTransport<Talker<SPEAKS>>, Rc<RefCell<Words>>) {
    let (kind, device, host) = (TransportKind::Shm, "memory".to_owned(), "here".to_owned());
    let info = NicInfo { kind, device, host, library: None, bits_per_second: None };
    let words: Rc<RefCell<Words>> = Rc::default();
    (crate::open(Talker(words.clone()), info, &Options::default()).unwrap(), words)
}

/// Polls both until the caller is connected, then so often that what is said arrives.
fn meet<A: Backend, B: Backend>(at: &mut LocalTransport<A>, other: &mut LocalTransport<B>) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..8 {
        at.poll(&mut Vec::new());
        other.poll(&mut events);
    }
    events
}

#[test]
fn backends_hear_each_other_in_order() {
    let ((mut at, words), (mut other, heard)) = (open::<true>(), open::<true>());
    let peer = at.connect(&other.address()).unwrap();
    meet(&mut at, &mut other);
    let all: Vec<Bytes> = (100..200u8).map(|word| Bytes::from(vec![word; 3])).collect();
    words.borrow_mut().said = all.iter().map(|word| (peer, word.clone())).collect();
    let unknown = PeerId(u32::MAX);
    words.borrow_mut().said.push((unknown, Bytes::from_static(b"to nobody")));
    meet(&mut at, &mut other);
    assert_eq!(heard.borrow().heard, all);
}

#[test]
fn what_is_said_between_polls_goes_out_before_the_thread_sleeps() {
    let ((mut at, words), (mut other, heard)) = (open::<true>(), open::<true>());
    let peer = at.connect(&other.address()).unwrap();
    meet(&mut at, &mut other);
    words.borrow_mut().said = vec![(peer, Bytes::from_static(b"a"))];
    at.arm();
    for _ in 0..8 {
        other.poll(&mut Vec::new());
    }
    assert_eq!(heard.borrow().heard, [&b"a"[..]]);
}

#[test]
fn a_backend_that_breaks_the_rules_is_lost() {
    let ((mut at, words), (mut other, heard)) = (open::<true>(), open::<true>());
    let peer = at.connect(&other.address()).unwrap();
    meet(&mut at, &mut other);
    words.borrow_mut().said = ["a", "!", "b"].map(|word| (peer, Bytes::from_static(word.as_bytes()))).into();
    let events = meet(&mut at, &mut other);
    let lost = |event: &Event| matches!(event, Event::PeerLost { reason, .. } if reason.contains("shouts"));
    assert!(events.iter().any(lost), "{events:?}");
    assert_eq!(heard.borrow().heard, [&b"a"[..]]);
}

#[test]
fn words_are_not_due_where_nobody_listens() {
    let ((mut at, words), (mut other, heard)) = (open::<true>(), open::<false>());
    let peer = at.connect(&other.address()).unwrap();
    meet(&mut at, &mut other);
    words.borrow_mut().said = vec![(peer, Bytes::from_static(b"a"))];
    let events = meet(&mut at, &mut other);
    let lost = |event: &Event| matches!(event, Event::PeerLost { reason, .. } if reason.contains("not due"));
    assert!(events.iter().any(lost) && heard.borrow().heard.is_empty(), "{events:?}");
}
