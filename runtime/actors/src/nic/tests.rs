//! What a NIC asks of its transport to fence a peer or to let it go, and what it makes of the answers.

use std::cell::Cell;
use std::time::Duration;

use kvferry_core::{Direction, FenceProof, Format, GroupGeometry, Model, Parallel, Rank, TransferId, TransportKind};
use kvferry_transport::{ConnectError, ImportError, NicInfo};

use super::*;

/// Notes what is asked of it, and answers only what a test says.
#[derive(Default)]
struct Script {
    asked: Vec<String>,
    events: Vec<Event>,
    connected: u32,
    unreachable: bool,
}

struct Scripted {
    script: Rc<RefCell<Script>>,
    info: NicInfo,
}

impl Scripted {
    fn ask(&self, what: String) {
        self.script.borrow_mut().asked.push(what);
    }
}

impl Transport for Scripted {
    fn info(&self) -> &NicInfo {
        &self.info
    }

    fn address(&self) -> Bytes {
        Bytes::from_static(b"here")
    }

    fn bind(&mut self, _: &Pool) -> Result<PoolKeys, BindError> {
        Ok(PoolKeys(Bytes::new()))
    }

    fn unbind(&mut self, _: PoolId) {}

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        self.ask(format!("connect {}", String::from_utf8_lossy(address)));
        let mut script = self.script.borrow_mut();
        if script.unreachable {
            return Err(ConnectError::BadAddress { kind: TransportKind::Sim, reason: "nobody".into() });
        }
        script.connected += 1;
        Ok(PeerId(script.connected))
    }

    fn import(&mut self, _: PeerId, _: &PoolKeys, _: &PoolLayout) -> Result<RemotePool, ImportError> {
        Ok(RemotePool(0))
    }

    fn expect(&mut self, _: Expected) -> Result<(), PostError> {
        Ok(())
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        self.ask(format!("post to {}", transfer.peer.0));
        Ok(())
    }

    fn cancel(&mut self, _: TransferId) {}

    fn fence(&mut self, peer: PeerId) {
        self.ask(format!("fence {}", peer.0));
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.ask(format!("disconnect {}", peer.0));
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.script.borrow_mut().events);
    }

    fn arm(&mut self) -> Wait {
        Wait::MustPoll
    }
}

struct Sink;

impl Actor for Sink {
    type Context = Context<Self>;
}

impl Handler<NicReport> for Sink {
    type Result = ();

    fn handle(&mut self, _: NicReport, _: &mut Context<Self>) {}
}

fn layout() -> PoolLayout {
    let model = Model::preset("tiny").expect("a preset");
    let geometry = GroupGeometry { model, format: Format::default(), parallel: Parallel::default() };
    geometry.shard(Rank(0)).expect("a valid rank").layout(&[2])
}

struct Fixture {
    nic: Nic,
    script: Rc<RefCell<Script>>,
    now: Rc<Cell<Moment>>,
}

impl Fixture {
    fn new() -> Self {
        let script = Rc::new(RefCell::new(Script::default()));
        let info = NicInfo {
            kind: TransportKind::Sim,
            device: "scripted".into(),
            host: String::new(),
            library: None,
            bits_per_second: None,
        };
        let transport = Box::new(Scripted { script: Rc::clone(&script), info });
        let pool = Pool::allocate(PoolId(1), layout(), "test").expect("memory");
        // Nobody runs it: what was to be reported is looked at before it leaves.
        let reports = Context::<Sink>::new().address().recipient();
        let now = Rc::new(Cell::new(Moment(0)));
        let clock = Rc::clone(&now);
        let (nic, _) = Nic::new(0, transport, &pool, reports, Rc::new(move || clock.get())).expect("a NIC");
        Fixture { nic, script, now }
    }

    fn command(&mut self, command: NicCommand) -> Vec<String> {
        self.nic.command(command);
        std::mem::take(&mut self.script.borrow_mut().asked)
    }

    fn connect(&mut self, node: u64) -> Vec<String> {
        let (node, address) = (NodeId(node), Bytes::from_static(b"there"));
        self.command(NicCommand::Connect { node, address, keys: Bytes::new(), layout: Arc::new(layout()) })
    }

    fn fence(&mut self, node: u64) -> Vec<String> {
        self.fence_at(node, "there", 1)
    }

    fn fence_at(&mut self, node: u64, address: &'static str, ticket: u64) -> Vec<String> {
        self.command(NicCommand::Fence { node: NodeId(node), address: address.into(), ticket })
    }

    fn post(&mut self, node: u64) -> Vec<String> {
        let program = Arc::new(kvferry_core::Program::default());
        let (id, node, direction, range) = (TransferId(7), NodeId(node), Direction::Pull, program.whole());
        self.command(NicCommand::Post { id, node, direction, program, range })
    }

    /// Time passes, and the NIC is pumped.
    fn passes(&mut self, millis: u64) -> Vec<String> {
        self.now.set(self.now.get() + Duration::from_millis(millis));
        self.nic.pump();
        std::mem::take(&mut self.script.borrow_mut().asked)
    }

    /// Something happens at the device: what it is asked next, and what the worker is told.
    fn happens(&mut self, event: Event) -> (Vec<String>, Vec<NicEvent>) {
        self.nic.note(event);
        (std::mem::take(&mut self.script.borrow_mut().asked), std::mem::take(&mut self.nic.outgoing))
    }
}

fn fenced(peer: u32) -> Event {
    Event::Fenced { peer: PeerId(peer), proof: FenceProof::OwnerCopies }
}

fn proved(node: u64) -> Vec<NicEvent> {
    proved_at(node, "there", 1)
}

fn proved_at(node: u64, address: &'static str, ticket: u64) -> Vec<NicEvent> {
    vec![NicEvent::Fenced { node: NodeId(node), address: address.into(), ticket, proof: FenceProof::OwnerCopies }]
}

#[test]
fn a_connected_peer_is_fenced_let_go_and_met_again() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.connect(5), ["connect there"]);
    assert_eq!(fixture.fence(5), ["fence 1"]);
    // The transport may name it lost before it proves the fence.
    let lost = Event::PeerLost { peer: PeerId(1), reason: "fenced here".into() };
    assert_eq!(fixture.happens(lost), (vec![], vec![]));
    assert_eq!(fixture.happens(fenced(1)), (vec!["disconnect 1".to_owned()], proved(5)));
    assert_eq!(fixture.happens(fenced(1)), (vec![], vec![]), "proved once");
    assert_eq!(fixture.post(5), ["connect there", "post to 2"], "its conversation lives on");
}

#[test]
fn a_peer_that_only_writes_here_is_connected_to_be_fenced() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.fence(5), ["connect there", "fence 1"]);
    assert_eq!(fixture.happens(fenced(1)), (vec!["disconnect 1".to_owned()], proved(5)));
    fixture.script.borrow_mut().unreachable = true;
    assert_eq!(fixture.fence(5), ["connect there"], "it is asked for again");
    fixture.script.borrow_mut().unreachable = false;
    assert_eq!(fixture.fence(5), ["connect there", "fence 2"]);
    assert_eq!(fixture.happens(fenced(2)).1, proved(5));
}

#[test]
fn a_fence_whose_proof_got_lost_is_asked_for_again() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    fixture.connect(6);
    assert_eq!(fixture.fence(5), ["fence 1"]);
    assert_eq!(fixture.fence(5), ["fence 1"], "the same peer, not another connection");
    assert_eq!(fixture.fence(6), ["fence 2"]);
    assert_eq!(fixture.happens(fenced(2)).1, proved(6));
    assert_eq!(fixture.happens(fenced(1)).1, proved(5));
    assert_eq!(fixture.happens(fenced(1)), (vec![], vec![]), "the answer to the second");
}

#[test]
fn what_is_posted_while_a_fence_is_awaited_waits_for_it() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    fixture.connect(6);
    assert_eq!(fixture.fence(5), ["fence 1"]);
    assert_eq!(fixture.post(5), Vec::<String>::new());
    assert_eq!(fixture.post(6), ["post to 2"], "another peer's");
    fixture.nic.pump();
    assert_eq!(std::mem::take(&mut fixture.script.borrow_mut().asked), Vec::<String>::new());
    assert_eq!(fixture.happens(fenced(1)).1, proved(5));
    fixture.nic.pump();
    assert_eq!(std::mem::take(&mut fixture.script.borrow_mut().asked), ["connect there", "post to 3"]);
}

#[test]
fn a_node_that_started_over_keeps_its_new_connection() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    assert_eq!(fixture.fence_at(5, "earlier", 1), ["connect earlier", "fence 2"]);
    assert_eq!(fixture.happens(fenced(2)), (vec!["disconnect 2".to_owned()], proved_at(5, "earlier", 1)));
    assert_eq!(fixture.post(5), ["post to 1"], "nothing was wrong with that one");
}

#[test]
fn a_proof_is_one_of_the_address_and_the_time_that_it_was_asked_for() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    assert_eq!(fixture.fence_at(5, "earlier", 1), ["connect earlier", "fence 2"]);
    assert_eq!(fixture.fence_at(5, "there", 2), ["fence 1"], "the one that was asked for, too");
    assert_eq!(fixture.fence_at(5, "earlier", 3), ["fence 2"]);
    assert_eq!(fixture.post(5), Vec::<String>::new());
    assert_eq!(fixture.happens(fenced(2)).1, proved_at(5, "earlier", 1));
    fixture.nic.pump();
    assert_eq!(std::mem::take(&mut fixture.script.borrow_mut().asked), Vec::<String>::new(), "the other is awaited");
    assert_eq!(fixture.happens(fenced(1)).1, proved_at(5, "there", 2));
    assert_eq!(fixture.happens(fenced(9)), (vec![], vec![]), "nobody has asked for that one");
}

#[test]
fn a_refused_peer_is_not_reached_again_until_it_is_connected_anew() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    let evidence = Box::new(kvferry_core::Evidence::connected(vec!["tcp/eth0".into()]));
    let shown = fixture.happens(Event::Shown { peer: PeerId(1), evidence: evidence.clone() });
    assert_eq!(shown, (vec![], vec![NicEvent::Shown { node: NodeId(5), evidence }]));
    let refuse = NicCommand::Refuse { node: NodeId(5), reason: "no RDMA".into() };
    assert_eq!(fixture.command(refuse), ["disconnect 1"]);
    let lost = NicEvent::PeerLost { node: NodeId(5), reason: "no RDMA".into() };
    assert_eq!(std::mem::take(&mut fixture.nic.outgoing), [lost]);
    assert_eq!(fixture.post(5), Vec::<String>::new());
    let failed = NicEvent::Failed { id: TransferId(7), reason: "no RDMA".into() };
    assert_eq!(std::mem::take(&mut fixture.nic.outgoing), [failed]);
    assert_eq!(fixture.connect(5), ["connect there"], "its next incarnation is judged anew");
    assert_eq!(fixture.post(5), ["post to 2"]);
}

#[test]
fn a_peer_that_is_not_reached_is_tried_again_after_a_while_and_posts_wait() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    fixture.happens(Event::Connected { peer: PeerId(1) });
    let lost = |peer| Event::PeerLost { peer: PeerId(peer), reason: "reset".into() };
    fixture.happens(lost(1));
    assert_eq!(fixture.post(5), ["connect there", "post to 2"], "the connection stood: at once");
    fixture.happens(lost(2));
    assert_eq!(fixture.post(5), Vec::<String>::new(), "it never did");
    assert_eq!(fixture.nic.due(), Some(Moment(50_000_000)));
    assert_eq!(fixture.passes(49), Vec::<String>::new());
    assert_eq!(fixture.passes(1), ["connect there", "post to 3"]);
    assert_eq!(fixture.nic.due(), None);
    fixture.happens(lost(3));
    fixture.post(5);
    assert_eq!(fixture.nic.due(), Some(Moment(150_000_000)), "twice as long");
    assert_eq!(fixture.command(NicCommand::Cancel { id: TransferId(7) }), Vec::<String>::new());
    assert_eq!(std::mem::take(&mut fixture.nic.outgoing).len(), 1, "what waits can be cancelled");
    assert_eq!(fixture.nic.due(), None);
    fixture.post(5);
    fixture.script.borrow_mut().unreachable = true;
    assert_eq!(fixture.passes(100), ["connect there"]);
    let failed = |event: &NicEvent| matches!(event, NicEvent::Failed { id: TransferId(7), .. });
    assert!(!fixture.nic.outgoing.iter().any(failed), "it was reported");
    fixture.post(5);
    assert_eq!(fixture.passes(199), Vec::<String>::new(), "and longer after the next");
    fixture.script.borrow_mut().unreachable = false;
    assert_eq!(fixture.connect(5), ["connect there"], "its next incarnation at once");
    assert_eq!(fixture.passes(0), ["post to 4"]);
}

#[test]
fn what_waits_for_a_peer_that_leaves_fails() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    fixture.happens(Event::PeerLost { peer: PeerId(1), reason: "nobody".into() });
    assert_eq!(fixture.post(5), Vec::<String>::new());
    fixture.command(NicCommand::Disconnect { node: NodeId(5) });
    fixture.nic.outgoing.clear();
    let command = fixture.nic.backlog.pop_front().expect("it waits");
    fixture.command(command);
    assert!(matches!(fixture.nic.outgoing.as_slice(), [NicEvent::Failed { id: TransferId(7), .. }]));
}

#[test]
fn a_fence_is_waited_for_and_not_the_time_of_the_next_try() {
    let mut fixture = Fixture::new();
    fixture.connect(5);
    fixture.happens(Event::PeerLost { peer: PeerId(1), reason: "nobody".into() });
    assert_eq!(fixture.post(5), Vec::<String>::new());
    assert_eq!(fixture.nic.due(), Some(Moment(50_000_000)));
    assert_eq!(fixture.fence(5), ["connect there", "fence 2"]);
    assert_eq!(fixture.passes(60), Vec::<String>::new());
    assert_eq!(fixture.nic.due(), None, "it would be pumped for nothing, again and again");
    assert_eq!(fixture.happens(fenced(2)).1, proved(5));
    assert_eq!(fixture.passes(0), ["connect there", "post to 3"]);
}
