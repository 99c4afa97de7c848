//! Peers that are processes: killed and stopped in the middle, started again at the same address, and too poor to lock memory.
#![allow(clippy::unwrap_used, reason = "this is test code")]

mod support;

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvferry_core::{Direction, TransferId};
use kvferry_transport::conformance::{Party, until};
use kvferry_transport::{ConnectError, Event, Expected, Options, PeerId, Pool, PoolKeys, Transfer};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use support::{BLOCK_BYTES, WAYS, Way, blocks, descriptors, fill, pool, program, turn, verify};

/// Says what the other process is: the number of a way, and `poor` where it may lock no memory.
const ROLE: &str = "KVFERRY_UCX_TEST_ROLE";
/// More than both methods have under way at once, so that a transfer whose peer stands still does not end.
const BLOCKS: u32 = 512;
/// Of what a source holds.
const SALT: u8 = 3;
/// Of what a destination holds that was not written yet.
const EMPTY: u8 = 200;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// Whether anything was written since the pool was filled with `EMPTY`.
fn has_begun(pool: &Pool) -> bool {
    let mut byte = [0];
    // Programs begin with the source's first block.
    pool.read(0, blocks(pool) - 1, 0, &mut byte).unwrap();
    byte != [EMPTY.wrapping_add((blocks(pool) - 1) as u8)]
}

/// Has `party` initiate a transfer with a peer whose address and keys it was given.
fn initiate(
    party: &mut Party,
    pool: &Pool,
    (address, keys): (&[u8], &PoolKeys),
    direction: Direction,
    id: TransferId,
) -> Result<(), ConnectError> {
    let peer = party.transport.connect(address)?;
    let remote = party.import(peer, keys, pool.layout());
    let program = program(blocks(pool));
    let range = program.whole();
    let transfer = Transfer { id, peer, direction, local: pool.id(), remote, program, range, notice: None };
    party.transport.post(transfer).unwrap();
    Ok(())
}

fn expect(party: &mut Party, pool: &Pool, id: TransferId) {
    let program = program(blocks(pool));
    let range = program.whole();
    party.transport.expect(Expected { from: None, id, pool: pool.id(), program, range }).unwrap();
}

/// What the other process runs: this test, started again with a role. It says what happens and does what it is told.
#[test]
fn peer_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (way, means) = role.split_once(' ').unwrap();
    if means == "poor" {
        lock_no_memory();
    }
    let Scene { mut party, pool, keys, .. } = Scene::open(WAYS[way.parse::<usize>().unwrap()]);
    println!("\n@ {} {}", hex(&party.transport.address()), hex(&keys.0));
    let (sender, told) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            sender.send(line.unwrap()).unwrap();
        }
        std::process::exit(0)
    });
    let (start, mut waits, mut heard) = (Instant::now(), false, 0);
    while start.elapsed() < Duration::from_secs(120) {
        party.transport.poll(&mut party.events);
        if waits && has_begun(&pool) {
            waits = false;
            println!("@ begun");
            // In the middle until told otherwise.
            assert_eq!(told.recv().unwrap(), "go on");
        }
        for event in &party.events[heard..] {
            match event {
                Event::Arrived { .. } => {
                    verify(&pool, SALT);
                    println!("@ arrived");
                }
                Event::Failed { id, .. } => println!("@ failed {}", id.0),
                Event::PeerLost { .. } => println!("@ lost"),
                _ => {}
            }
        }
        heard = party.events.len();
        let Ok(line) = told.try_recv() else {
            std::thread::sleep(Duration::from_micros(20));
            continue;
        };
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["hold"] => {
                fill(&pool, SALT);
                println!("@ ready");
            }
            ["expect", id] => {
                fill(&pool, EMPTY);
                waits = true;
                expect(&mut party, &pool, TransferId(id.parse().unwrap()));
                println!("@ ready");
            }
            ["push", id, address, keys] => {
                let (address, keys) = (unhex(address), PoolKeys(unhex(keys).into()));
                let push = TransferId(id.parse().unwrap());
                if initiate(&mut party, &pool, (&address, &keys), Direction::Push, push).is_err() {
                    println!("@ failed {id}");
                }
            }
            _ => panic!("told {line:?}"),
        }
    }
}

/// As in a container with `ulimit -l 0`: the capability that would override it is given up.
fn lock_no_memory() {
    setrlimit(Resource::Memlock, Rlimit { current: Some(0), maximum: Some(0) }).unwrap();
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    sets.permitted.remove(CapabilitySet::IPC_LOCK);
    sets.inheritable.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).unwrap();
    let page = vec![0u8; 8192];
    // SAFETY: locking memory of ours changes nothing in it. AddressSanitizer has a `mlock` of its own, which locks nothing.
    let locked = unsafe { libc::syscall(libc::SYS_mlock, page.as_ptr(), page.len()) };
    assert_ne!(locked, 0, "memory can be locked all the same");
}

struct Peer {
    child: Child,
    stdin: ChildStdin,
    said: Receiver<String>,
    address: Vec<u8>,
    keys: PoolKeys,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _already_dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Peer {
    fn start(way: usize, means: &str, port: Option<u16>) -> Peer {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "peer_process", "--nocapture"]).env(ROLE, format!("{way} {means}"));
        if let Some(port) = port {
            command.env("UCX_TCP_PORT_RANGE", format!("{port}-{port}"));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(word) = line.strip_prefix("@ ") {
                    // The test may be over.
                    let _unheard = sender.send(word.to_owned());
                }
            }
        });
        let first = said.recv_timeout(Duration::from_secs(60)).unwrap();
        let (address, keys) = first.split_once(' ').unwrap();
        Peer { child, stdin, said, address: unhex(address), keys: PoolKeys(unhex(keys).into()) }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    /// Polls `party` until the peer says a word.
    fn hear(&self, party: &mut Party, word: &str) {
        until(&mut [party], word, |_| self.said.try_iter().any(|said| said == word));
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

/// What moves while the peer comes to harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// This side reads the peer's pool.
    Pull,
    /// This side's pool goes to the peer.
    Push,
    /// The peer's pool comes here, as the peer wants it.
    Pushed,
}

const ACTS: [Act; 3] = [Act::Pull, Act::Push, Act::Pushed];

/// Both processes, seen from this one.
struct Scene {
    way: Way,
    party: Party,
    pool: Pool,
    keys: PoolKeys,
    /// Of the next transfer.
    id: TransferId,
}

impl Scene {
    fn open(way: Way) -> Scene {
        let options = Options { poll_bytes_max: BLOCK_BYTES, ..Options::default() };
        let mut party = Party::open(&way.provider(), &options);
        let pool = pool(5, BLOCKS);
        let keys = party.bind(&pool);
        Scene { way, party, pool, keys, id: TransferId(1) }
    }

    /// Begins a transfer; false where the connection broke before.
    fn begin(&mut self, peer: &mut Peer, act: Act) -> bool {
        let Scene { party, pool, keys, id, .. } = self;
        party.events.clear();
        id.0 += 1;
        fill(pool, if act == Act::Push { SALT } else { EMPTY });
        peer.tell(&if act == Act::Push { format!("expect {}", id.0) } else { "hold".to_owned() });
        peer.hear(party, "ready");
        let there = (peer.address.clone(), peer.keys.clone());
        let connected = match act {
            Act::Pull => initiate(party, pool, (&there.0, &there.1), Direction::Pull, *id),
            Act::Push => initiate(party, pool, (&there.0, &there.1), Direction::Push, *id),
            Act::Pushed => {
                expect(party, pool, *id);
                peer.tell(&format!("push {} {} {}", id.0, hex(&party.transport.address()), hex(&keys.0)));
                Ok(())
            }
        };
        if connected.is_err() {
            return false;
        }
        let (mut begun, mut failed) = (false, false);
        until(&mut [party], "it begins", |parties| {
            let word = peer.said.try_recv().unwrap_or_default();
            begun = if act == Act::Push { word == "begun" } else { has_begun(pool) };
            failed = parties.iter().any(|party| party.failed(*id)) || word == format!("failed {}", id.0);
            begun || failed
        });
        begun && !failed
    }

    /// The middle of a transfer, and the peer as it is known here.
    fn middle(&mut self, peer: &mut Peer, act: Act) -> PeerId {
        assert!(self.begin(peer, act), "{self}, {act:?}");
        assert!(self.party.end(self.id).is_none(), "{self}, {act:?}: over before it came to harm");
        let met = self.party.events.iter().find_map(|event| match event {
            Event::Connected { peer } => Some(*peer),
            _ => None,
        });
        met.unwrap()
    }

    /// A whole transfer, checked. UCX may reset an endpoint that is made while the peer still closes an earlier one: both ends hear of that,
    /// and the next one stands.
    fn whole(&mut self, peer: &mut Peer, act: Act) {
        let begun = (0..4).any(|_| self.begin(peer, act));
        assert!(begun, "{self}, {act:?}");
        if act == Act::Push {
            peer.tell("go on");
            peer.hear(&mut self.party, "arrived");
        }
        self.until("it ends", |party, id| party.end(id).is_some());
        assert!(!self.party.failed(self.id), "{self}, {act:?}");
        if act != Act::Push {
            verify(&self.pool, SALT);
        }
    }

    fn until(&mut self, what: &str, done: impl Fn(&Party, TransferId) -> bool) {
        let id = self.id;
        until(&mut [&mut self.party], what, |parties| parties.iter().all(|party| done(party, id)));
    }
}

impl fmt::Display for Scene {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {:?}", self.way, self.id, self.party.events)
    }
}

#[test]
fn a_killed_peer_fails_its_transfers_and_the_next_one_is_met() {
    let Some(_turn) = turn() else { return };
    for (number, way) in WAYS.into_iter().enumerate() {
        let mut scene = Scene::open(way);
        let mut before = 0;
        for (round, act) in ACTS.into_iter().chain(ACTS).enumerate() {
            let mut peer = Peer::start(number, "rich", None);
            scene.middle(&mut peer, act);
            peer.child.kill().unwrap();
            peer.child.wait().unwrap();
            scene.until("the loss is told", |party, id| party.lost_someone() && party.end(id).is_some());
            assert!(scene.party.failed(scene.id), "{scene}, {act:?}");
            let mut next = Peer::start(number, "rich", None);
            scene.whole(&mut next, act);
            drop(next);
            scene.until("that one's end is told", |party, _| party.lost_someone());
            drop(peer);
            if round == 2 {
                before = descriptors();
            }
        }
        let now = descriptors();
        assert!(now <= before + 8, "{way}: descriptors grew from {before} to {now}");
    }
}

#[test]
fn a_stopped_peer_is_fenced_and_met_again() {
    let Some(_turn) = turn() else { return };
    for (number, way) in WAYS.into_iter().enumerate() {
        for act in ACTS {
            let mut peer = Peer::start(number, "rich", None);
            let mut scene = Scene::open(way);
            let name = scene.middle(&mut peer, act);
            peer.signal(Signal::STOP);
            let start = Instant::now();
            scene.party.transport.fence(name);
            scene.until("the fence is proved, without the peer", |party, _| {
                party.events.iter().any(|event| matches!(event, Event::Fenced { peer, .. } if *peer == name))
            });
            assert!(start.elapsed() < Duration::from_secs(10), "{scene}, {act:?}");
            assert!(scene.party.failed(scene.id), "{scene}, {act:?}");
            // The pool is its owner's again, whatever the peer does when it wakes up.
            fill(&scene.pool, 77);
            peer.signal(Signal::CONT);
            if act == Act::Push {
                peer.tell("go on");
            }
            peer.hear(&mut scene.party, "lost");
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            for block in 0..BLOCKS {
                scene.pool.read(0, block, 0, &mut bytes).unwrap();
                let wanted = 77u8.wrapping_add(block as u8);
                assert!(bytes.iter().all(|byte| *byte == wanted), "{scene}, {act:?}: block {block} was written");
            }
            scene.whole(&mut peer, act);
        }
    }
}

/// The next process listens at the port of the one that was killed: who comes with the old address is not let in, who has the new one is.
#[test]
fn a_peer_that_starts_again_at_its_address_is_somebody_new() {
    let Some(_turn) = turn() else { return };
    for (number, way) in WAYS.into_iter().enumerate() {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let listens = || TcpListener::bind(("127.0.0.1", port)).is_err();
        let mut scene = Scene::open(way);
        let mut first = Peer::start(number, "rich", Some(port));
        assert!(listens(), "{way}: the peer does not listen at its port");
        // The connection is one that the peer made, from another port: its own is free as soon as it is gone.
        scene.middle(&mut first, Act::Pushed);
        let old = first.address.clone();
        drop(first);
        let mut second = Peer::start(number, "rich", Some(port));
        assert!(listens(), "{way}: the next one does not listen there");
        scene.until("the loss is told", |party, id| party.lost_someone() && party.end(id).is_some());
        assert!(scene.party.failed(scene.id), "{scene}");
        scene.party.events.clear();
        if let Ok(stranger) = scene.party.transport.connect(&old) {
            scene.until("nobody answers there", |party, _| party.lost_someone());
            assert!(!scene.party.saw(&Event::Connected { peer: stranger }), "{scene}");
        }
        ACTS.into_iter().for_each(|act| scene.whole(&mut second, act));
    }
}

/// Neither this host's memory nor tcp has anything registered with a device: `ulimit -l` does not matter to them.
#[test]
fn memory_that_cannot_be_locked_is_no_obstacle_without_rdma() {
    let Some(_turn) = turn() else { return };
    for (number, way) in WAYS.into_iter().enumerate() {
        let mut peer = Peer::start(number, "poor", None);
        let mut scene = Scene::open(way);
        ACTS.into_iter().for_each(|act| scene.whole(&mut peer, act));
    }
}

/// A peer that dies as soon as the two are connected, or while they connect, a little later each time, leaves nothing here.
#[test]
fn peers_that_are_killed_while_they_connect_leave_nothing_behind() {
    let Some(_turn) = turn() else { return };
    let cycles = std::env::var("KVFERRY_CYCLES").map_or(12, |cycles| cycles.parse().unwrap());
    for (number, way) in WAYS.into_iter().enumerate() {
        let mut scene = Scene::open(way);
        let mut before = 0;
        for cycle in 0..cycles {
            let mut peer = Peer::start(number, "rich", None);
            scene.party.events.clear();
            let connected = scene.party.transport.connect(&peer.address);
            let start = Instant::now();
            let is_up = |event: &Event| matches!(event, Event::Connected { .. });
            let goes_on = |party: &Party| match cycle % 2 {
                0 => !party.events.iter().any(is_up),
                _ => start.elapsed() < Duration::from_micros(cycle * 997 % 20_000),
            };
            while connected.is_ok() && goes_on(&scene.party) {
                assert!(start.elapsed() < Duration::from_secs(60), "{scene}");
                scene.party.transport.poll(&mut scene.party.events);
            }
            peer.child.kill().unwrap();
            peer.child.wait().unwrap();
            if connected.is_ok() {
                scene.until("the loss is told", |party, _| party.lost_someone());
            }
            if cycle == cycles / 3 {
                before = descriptors();
            }
        }
        let now = descriptors();
        assert!(now <= before + 4, "{way}: descriptors grew from {before} to {now}");
    }
}
