//! How sessions begin and end.

use std::time::{Duration, Instant};

use kvferry_transport::codec::{decode, encode, random};
use kvferry_transport::{ConnectError, Event, PeerId, TransferError, TransportKind};

use crate::device::Access;
use crate::endpoint::Endpoint;
use crate::link::{ANSWER_BYTES_MAX, CREDITS, ENDED_MAX, Link, Message, Session};
use crate::process::Process;
use crate::transport::UcxTransport;
use crate::wire::{Address, BODY_BYTES_MAX, Header, Hello, KEY_BYTES, Kind, Welcome, cut, message};

/// How long a peer may take to answer.
pub(crate) const GREETING_WAIT: Duration = Duration::from_secs(5);
/// How long a link without sessions is kept for the next one.
const IDLE_WAIT: Duration = Duration::from_secs(60);
/// Why sessions of an earlier endpoint are over.
const ANEW: &str = "the peer has connected anew";
/// Sessions that peers may have open here.
const SESSIONS_MAX: usize = 4096;

impl UcxTransport {
    /// Opens a session, over the link to that transport if there is one.
    pub(crate) fn dial(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        let bad = |reason: String| ConnectError::BadAddress { kind: TransportKind::Ucx, reason };
        let address = Address::open(address).map_err(bad)?;
        if self.method.differs_in_access(self.access, address.method) {
            let reason = match self.access {
                Access::OneSided => "it sends by two-sided messages and this side reads memory",
                Access::TwoSided => "it reads memory and this side sends by two-sided messages",
            };
            return Err(bad(format!("{reason}; give both sides the same UCX method")));
        }
        if address.method != self.method.number(self.access) {
            let reason = format!(
                "its device is reached another way than {}; open devices of one kind on both sides",
                self.info.device
            );
            return Err(bad(reason));
        }
        let drawn = |source| ConnectError::Io { context: "drawing a number", source };
        let here = u64::from_le_bytes(random::<8>().map_err(drawn)?);
        let link = match self.link_to(&address.instance) {
            Some(link) => link,
            None => self.new_link(address.instance, &address.worker, address.process).map_err(|reason| {
                ConnectError::Io { context: "creating an endpoint", source: std::io::Error::other(reason) }
            })?,
        };
        let peer = self.new_session(link, here);
        let number = self.links.get(&link).map_or(0, |link| link.number);
        let hello = Hello {
            to: address.instance,
            from: self.own.instance,
            link: number,
            session: here,
            worker: self.own.worker.clone(),
            process: self.own.process,
        };
        let deadline = Instant::now() + GREETING_WAIT;
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.secret = Some(address.secret);
            session.deadline = Some(deadline);
        }
        self.note_deadline(deadline);
        let header = Header { kind: Kind::Hello, number: 0, session: 0, tag: 0 };
        self.send(link, header, &hello.seal(&address.secret), false);
        Ok(peer)
    }

    /// The link to a transport that sessions can be opened over.
    fn link_to(&self, instance: &[u8; KEY_BYTES]) -> Option<u64> {
        self.links.iter().find(|(_, link)| link.instance == *instance).map(|(id, _)| *id)
    }

    fn new_link(&mut self, instance: [u8; KEY_BYTES], worker: &[u8], process: Option<Process>) -> Result<u64, String> {
        if process.zip(self.own.process).is_some_and(|(process, own)| process.is_gone(&own)) {
            return Err("its process has ended".to_owned());
        }
        // UCX counts those that it refuses, too.
        let (links, closing) = (&self.links, &self.closing);
        let near = || links.values().map(|link| link.instance).chain(closing.values().map(|c| c.instance)).collect();
        let number = self.made.count(instance, near);
        let id = self.new_number();
        let endpoint = Endpoint::new(&self.worker, id, worker)?;
        self.links.insert(id, Link::new((instance, process), worker.to_vec(), endpoint, number));
        Ok(id)
    }

    fn new_session(&mut self, link: u64, here: u64) -> PeerId {
        let peer = PeerId(self.new_number() as u32);
        self.sessions.insert(peer, Session::new(link, here));
        self.numbers.insert(here, (Some(peer), link));
        if let Some(link) = self.links.get_mut(&link) {
            link.sessions.insert(peer);
            link.idle_until = None;
        }
        peer
    }

    /// A peer opens a session. What is wrong with it is not answered: who cannot seal a hello is nobody.
    pub(crate) fn on_hello(&mut self, body: &[u8]) -> Result<(), String> {
        let hello = Hello::open(body, &self.own.secret)?;
        if hello.to != self.own.instance {
            return Err("a hello for an earlier transport".to_owned());
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Err("more sessions than are allowed".to_owned());
        }
        let mut link = self.link_to(&hello.from);
        if let Some(id) = link {
            let (theirs, ours) = self.links.get(&id).map_or((None, 0), |link| (link.theirs, link.number));
            if theirs.is_some_and(|theirs| theirs != hello.link) {
                if hello.link > ours {
                    // The peer has given up the one that ours is paired with. What is said of that goes over a new one, which does for this, too.
                    self.lose_link(id, ANEW);
                    link = self.link_to(&hello.from);
                } else {
                    // Ours is paired with this one, or a later one: closing it would reset that, and so on for ever.
                    self.begin_anew(id, None);
                }
            }
        }
        let link = match link {
            Some(link) => link,
            None => self.new_link(hello.from, &hello.worker, hello.process)?,
        };
        let here = random::<8>().map_err(|error| format!("no random bytes: {error}"))?;
        let here = u64::from_le_bytes(here);
        let peer = self.new_session(link, here);
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.there = Some(hello.session);
        }
        let Some(found) = self.links.get_mut(&link) else { return Ok(()) };
        found.theirs = Some(hello.link);
        let welcome = Welcome { link: found.number, session: here };
        // Before what may already lose it again.
        self.events.push(Event::Connected { peer });
        self.say(peer, Kind::Welcome, 0, 0, &encode(&welcome));
        self.warm_up(peer);
        Ok(())
    }

    pub(crate) fn on_welcome(&mut self, peer: PeerId, body: &[u8]) -> Result<(), String> {
        let welcome: Welcome = decode(body).map_err(|error| format!("a welcome: {error}"))?;
        let Some(session) = self.sessions.get_mut(&peer) else { return Ok(()) };
        if session.there.is_some() {
            return Err("a second welcome".to_owned());
        }
        let id = session.link;
        session.there = Some(welcome.session);
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        if link.theirs.replace(welcome.link).is_some_and(|theirs| theirs != welcome.link) {
            // The peer has lost its end of this link, and the sessions that were over it.
            self.begin_anew(id, Some(peer));
        }
        self.warm_up(peer);
        self.join(id);
        Ok(())
    }

    /// Queues a message of a session that is up.
    pub(crate) fn say(&mut self, peer: PeerId, kind: Kind, number: u32, tag: u64, body: &[u8]) {
        let Some(session) = self.sessions.get(&peer) else { return };
        let Some(there) = session.there else { return };
        let link = session.link;
        let mut header = Header { kind: Kind::Part, number: 0, session: there, tag };
        let mut rest = body;
        if kind.may_be_long() {
            while rest.len() > BODY_BYTES_MAX {
                let (part, behind) = rest.split_at(BODY_BYTES_MAX);
                self.send(link, header, part, kind.is_answer());
                header.number += 1;
                rest = behind;
            }
        }
        // A long message says how many parts came before its last bytes.
        let number = if kind.may_be_long() { header.number } else { number };
        self.send(link, Header { kind, number, ..header }, rest, kind.is_answer());
    }

    fn send(&mut self, link: u64, header: Header, body: &[u8], is_answer: bool) {
        let Some(found) = self.links.get_mut(&link) else { return };
        found.outgoing.message(Message { bytes: message(header, body), is_answer });
        if found.outgoing.answer_bytes > ANSWER_BYTES_MAX {
            self.lose_link(link, "it takes nothing off the wire and asks for ever more");
            return;
        }
        self.send_messages(link);
    }

    /// Ends a session here and tells the peer.
    pub(crate) fn hang_up(&mut self, peer: PeerId, reason: &str) {
        self.say(peer, Kind::Bye, 0, 0, cut(reason.to_owned()).as_bytes());
        self.lose_session(peer, reason);
    }

    pub(crate) fn on_bye(&mut self, peer: PeerId, body: &[u8]) {
        let words = String::from_utf8_lossy(body).into_owned();
        let reason = format!("the peer ended the connection: {}", cut(words));
        self.lose_session(peer, &reason);
        self.events.push(Event::PeerLost { peer, reason });
    }

    /// Takes a session down; its transfers fail. A link without sessions is kept for a while.
    pub(crate) fn lose_session(&mut self, peer: PeerId, reason: &str) {
        let Some(session) = self.sessions.remove(&peer) else { return };
        tracing::debug!(peer = peer.0, reason, "session ended");
        self.numbers.insert(session.here, (None, session.link));
        self.worker.inbox.remove_session(session.here);
        if let Some(link) = self.links.get_mut(&session.link) {
            link.outgoing.remove_sources_of(peer);
            link.sessions.remove(&peer);
            link.ended.push_back(session.here);
            if link.ended.len() > ENDED_MAX
                && let Some(oldest) = link.ended.pop_front()
            {
                self.numbers.remove(&oldest);
            }
            if link.sessions.is_empty() {
                let deadline = Instant::now() + IDLE_WAIT;
                link.idle_until = Some(deadline);
                self.note_deadline(deadline);
            }
        }
        let error = TransferError::PeerLost(reason.to_owned());
        self.fail_transfers_of(peer, &error);
        self.remotes.retain(|_, remote| remote.peer != peer);
        self.withdrawing.retain(|withdrawing| withdrawing.peer != peer);
        self.held.retain(|_, held| held.peer != peer);
        for bound in self.pools.values_mut() {
            if let Some(leaving) = &mut bound.leaving {
                leaving.readers.remove(&peer);
            }
        }
    }

    /// The peer begins anew over a link of ours: sessions, and what was counted with its earlier end, are void.
    fn begin_anew(&mut self, id: u64, but: Option<PeerId>) {
        self.lose_sessions(id, but);
        if let Some(link) = self.links.get_mut(&id) {
            (link.outgoing.credits, link.consumed, link.warmth) = (CREDITS, 0, link.warmth.anew());
            // What its earlier end was told of may be read still, and is withdrawn.
            (link.depot, link.supply, link.owes_staging) = (None, None, false);
            for number in std::mem::take(&mut link.ended) {
                self.numbers.remove(&number);
            }
        }
    }

    /// Takes the sessions of a link down, but one, whose peer has lost its end of them.
    fn lose_sessions(&mut self, link: u64, but: Option<PeerId>) {
        let of = self.links.get(&link).map(|link| link.sessions.clone()).unwrap_or_default();
        for peer in of.into_iter().filter(|peer| Some(*peer) != but) {
            self.lose_session(peer, ANEW);
            self.events.push(Event::PeerLost { peer, reason: ANEW.to_owned() });
        }
    }

    /// Takes a link down that failed or broke the rules, with all its sessions.
    pub(crate) fn lose_link(&mut self, id: u64, reason: &str) {
        let Some(link) = self.links.get(&id) else { return };
        let peers: Vec<PeerId> = link.sessions.iter().copied().collect();
        self.drop_link(id, reason);
        let lost = peers.into_iter().map(|peer| Event::PeerLost { peer, reason: reason.to_owned() });
        self.events.extend(lost);
    }

    /// Ends a link's sessions, closes its endpoint, and tells the peer over another one. UCX pairs endpoints by how many each side has made,
    /// so the peer's endpoint need not be the one that fails with ours: untold, it might wait for ever.
    pub(crate) fn drop_link(&mut self, id: u64, reason: &str) {
        let Some(link) = self.links.get(&id) else { return };
        let (instance, worker, process) = (link.instance, link.worker.clone(), link.process);
        let peers: Vec<PeerId> = link.sessions.iter().copied().collect();
        let numbers: Vec<u64> =
            peers.iter().filter_map(|peer| self.sessions.get(peer)).filter_map(|session| session.there).collect();
        for peer in peers {
            self.lose_session(peer, reason);
        }
        self.close_link(id);
        if numbers.is_empty() {
            return;
        }
        match self.new_link(instance, &worker, process) {
            Ok(other) => {
                let deadline = Instant::now() + GREETING_WAIT;
                if let Some(link) = self.links.get_mut(&other) {
                    link.idle_until = Some(deadline);
                }
                self.note_deadline(deadline);
                let words = cut(reason.to_owned());
                for session in numbers {
                    let header = Header { kind: Kind::Bye, number: 0, session, tag: 0 };
                    self.send(other, header, words.as_bytes(), false);
                }
            }
            Err(reason) => tracing::debug!(reason, "a peer is not told that its sessions are over"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvferry_core::{Direction, PoolId, TransferId};
    use kvferry_transport::codec::encode;
    use kvferry_transport::conformance::{absent, block_planes, whole_blocks};
    use kvferry_transport::{Expected, Options, PackedBy, Pool, PoolKeys, PoolOptions, Provider, Transfer, Transport};

    use super::*;
    use crate::UcxProvider;
    use crate::lanes::Lanes;
    use crate::remote::{AHEAD_MAX, LENT_AHEAD, Remote};
    use crate::wire::{Lend, Named};

    const BLOCKS: u32 = 16;
    const BLOCK_BYTES: u64 = 64 << 10;

    /// What a transfer would have to wait for if it were not there.
    #[derive(Debug, PartialEq, Eq)]
    struct Wired {
        /// Endpoints made so far.
        endpoints: u64,
        /// Those that stand, and their lanes as UCX has them now.
        lanes: Vec<(u64, Lanes)>,
        /// Pools that are registered.
        registered: usize,
        /// Bytes of staging.
        staged: u64,
        /// Sessions that are up.
        sessions: usize,
        /// Whether a chunk went out over every link and was taken.
        warm: bool,
    }

    impl Wired {
        fn of(transport: &UcxTransport) -> Wired {
            let lanes = |link: &Link| Lanes::new(&link.endpoint.description(), link.endpoint.lanes());
            Wired {
                endpoints: transport.made.total(),
                lanes: transport.links.iter().map(|(id, link)| (*id, lanes(link))).collect(),
                registered: transport.pools.values().filter(|bound| bound.mapped.is_some()).count(),
                staged: transport.staging.budget().taken(),
                sessions: transport.sessions.values().filter(|session| session.there.is_some()).count(),
                warm: transport.links.values().all(|link| link.warmth.is_whole() && link.outgoing.credits == CREDITS),
            }
        }
    }

    fn open(device: &str, options: &Options) -> UcxTransport {
        let provider = UcxProvider::new();
        provider.opened(&provider.named(device).unwrap(), options).unwrap()
    }

    fn are_connected(events: &[Vec<Event>; 2]) -> bool {
        events.iter().all(|events| events.iter().any(|event| matches!(event, Event::Connected { .. })))
    }

    fn until(parties: [&mut UcxTransport; 2], done: impl Fn(&[Vec<Event>; 2], [&UcxTransport; 2]) -> bool) {
        let mut events = [Vec::new(), Vec::new()];
        let [a, b] = parties;
        let until = Instant::now() + Duration::from_secs(30);
        while !done(&events, [a, b]) {
            assert!(Instant::now() < until, "{events:?} {:?} {:?}", Wired::of(a), Wired::of(b));
            a.poll(&mut events[0]);
            b.poll(&mut events[1]);
        }
    }

    #[test]
    fn nothing_is_wired_by_the_first_transfer() {
        if let Some(reason) = UcxProvider::unavailable() {
            return absent("ucx", &reason);
        }
        let (auto, read) = ((PackedBy::Auto, None), (PackedBy::Read, Some(u64::MAX)));
        let ways = [
            ("memory", false, auto),
            ("lo", false, auto),
            ("memory", true, auto),
            ("lo", true, auto),
            ("memory", false, read),
        ];
        for (device, two_sided, (packed_by, packed_below_bytes)) in ways {
            for direction in [Direction::Pull, Direction::Push] {
                let options = Options { two_sided, packed_by, packed_below_bytes, ..Options::default() };
                let pool = |id| {
                    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
                    Pool::allocate_with(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "wired", &options).unwrap()
                };
                let open = || open(device, &options);
                let (mut a, mut b, ours, theirs) = (open(), open(), pool(1), pool(2));
                a.bind(&ours).unwrap();
                let PoolKeys(keys) = b.bind(&theirs).unwrap();
                let peer = a.connect(&b.address()).unwrap();
                let remote = a.import(peer, &PoolKeys(keys), theirs.layout()).unwrap();
                until([&mut a, &mut b], |events, parties| {
                    are_connected(events) && parties.iter().all(|party| Wired::of(party).warm)
                });
                let joined = [Wired::of(&a), Wired::of(&b)];
                assert!(joined.iter().all(|wired| wired.endpoints == 1 && wired.sessions == 1), "{joined:?}");
                assert!(joined.iter().flat_map(|wired| &wired.lanes).all(|(_, lanes)| !lanes.names().is_empty()));
                let (id, local) = (TransferId(1), ours.id());
                let program = Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, 0..BLOCKS));
                let range = program.whole();
                if direction == Direction::Push {
                    b.expect(Expected { from: None, id, pool: theirs.id(), program: program.clone(), range }).unwrap();
                }
                a.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
                until([&mut a, &mut b], |[events, _], parties| {
                    events.iter().any(|event| matches!(event, Event::Completed { .. }))
                        && parties.iter().all(|party| Wired::of(party).warm)
                });
                assert_eq!(
                    [Wired::of(&a), Wired::of(&b)],
                    joined,
                    "{device}, two-sided {two_sided}, {packed_by}, {direction:?}"
                );
            }
        }
    }

    #[test]
    fn keys_come_ahead_of_a_push_that_nobody_expects_and_not_without_bound() {
        if let Some(reason) = UcxProvider::unavailable() {
            return absent("ucx", &reason);
        }
        let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
        let pool =
            |id| Pool::allocate_with(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "ahead", &options).unwrap();
        let open = || open("memory", &Options::default());
        let (mut a, mut b, ours, theirs) = (open(), open(), pool(1), pool(2));
        a.bind(&ours).unwrap();
        let PoolKeys(keys) = b.bind(&theirs).unwrap();
        let peer = a.connect(&b.address()).unwrap();
        let remote = a.import(peer, &PoolKeys(keys), theirs.layout()).unwrap();
        until([&mut a, &mut b], |events, parties| {
            are_connected(events) && parties.iter().all(|party| Wired::of(party).warm)
        });
        let links: Vec<u64> = b.links.keys().copied().collect();
        if !links.into_iter().all(|link| b.reads_memory(link)) {
            // The source sends: there are no keys to give.
            return;
        }
        let program = Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, 0..BLOCKS));
        let (direction, range) = (Direction::Push, program.whole());
        let id = TransferId(1);
        a.post(Transfer { id, peer, direction, local: ours.id(), remote, program, range, notice: None }).unwrap();
        until([&mut a, &mut b], |_, [_, b]| b.remotes.values().any(|remote| remote.unpacked.is_some()));

        let Remote { peer, named, lent: pool, .. } = b.remotes.pop_first().unwrap().1;
        let lend = encode(&Lend { named, pool });
        for token in 0..AHEAD_MAX as u64 {
            b.remote(peer, Named { token, ..named });
        }
        b.on_lend(peer, LENT_AHEAD, &lend).unwrap();
        assert_eq!(b.remotes.len(), AHEAD_MAX);
        b.remotes.pop_first();
        b.on_lend(peer, LENT_AHEAD, &lend).unwrap();
        assert!(b.remotes.values().any(|remote| remote.named == named && remote.unpacked.is_some()));
    }

    /// The peer was stopped, has given its end up since, and calls again: its old sessions are told of over the endpoint that its call needs.
    #[test]
    fn a_peer_that_begins_anew_costs_one_endpoint() {
        if let Some(reason) = UcxProvider::unavailable() {
            return absent("ucx", &reason);
        }
        let (mut a, mut b) = (open("lo", &Options::default()), open("lo", &Options::default()));
        b.connect(&a.address()).unwrap();
        until([&mut a, &mut b], |events, _| are_connected(events));
        assert_eq!(a.made.total(), 1);
        let hello = Hello {
            to: a.own.instance,
            from: b.own.instance,
            link: 1,
            session: 99,
            worker: b.own.worker.clone(),
            process: None,
        };
        a.on_hello(&hello.seal(&a.own.secret)).unwrap();
        assert_eq!(a.made.total(), 2);
        let links: Vec<&Link> = a.links.values().collect();
        assert_eq!(links.iter().map(|link| (link.theirs, link.sessions.len())).collect::<Vec<_>>(), [(Some(1), 1)]);
        let lost = a.events.iter().filter(|event| matches!(event, Event::PeerLost { .. })).count();
        assert_eq!(lost, 1, "{:?}", a.events);
    }
}
