//! Peers of other hosts of an NVLink domain, without a GPU: another process, killed ones, hostile ones, and memory that stays with its host.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{Direction, FenceProof, PoolId, PoolLayout, TransferId};
use kvferry_cuda::{Allocate, CudaProvider, check_blocks, fill_blocks};
use kvferry_local::wire::{Address, Frame, Keys, MemoryKind, VERSION};
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    Event, Options, PeerId, Pool, PoolKeys, Provider, Transfer, TransferError, Transport, TransportKind,
};
use support::{Hosts, device, is_ready};

const ROLE: &str = "KVFERRY_RACK_TEST_ROLE";
const PLANES: u32 = 2;
const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

fn layout() -> PoolLayout {
    block_planes(PLANES, BLOCKS, BLOCK_BYTES)
}

fn open() -> Box<dyn Transport> {
    Hosts(Allocate::Best).open(&device(), &Options::default()).unwrap()
}

fn pool(id: u32, how: Allocate) -> Pool {
    CudaProvider::default().with_memory(how).allocate(&device(), PoolId(id), layout(), "rack").unwrap()
}

fn labels(first: u64) -> Vec<u64> {
    (first..first + u64::from(BLOCKS)).collect()
}

fn until(parties: &mut [&mut dyn Transport], events: &mut Vec<Event>, mut done: impl FnMut(&[Event]) -> bool) {
    let start = Instant::now();
    while !done(events) {
        assert!(start.elapsed() < PATIENCE, "{events:?}");
        let mut others = Vec::new();
        for (index, party) in parties.iter_mut().enumerate() {
            party.poll(if index == 0 { events } else { &mut others });
        }
        std::thread::yield_now();
    }
}

fn is_end(event: &Event) -> bool {
    matches!(event, Event::Failed { .. } | Event::Completed { .. })
}

/// Pulls a whole pool; how that ended.
fn pull(parties: &mut [&mut dyn Transport], (peer, keys): (PeerId, &PoolKeys), into: &Pool) -> Event {
    let mut events = Vec::new();
    let here = &mut parties[0];
    let remote = here.import(peer, keys, &layout()).unwrap();
    let program = Arc::new(whole_blocks(PLANES, 16, BLOCK_BYTES, 0..BLOCKS, 0..BLOCKS));
    let (id, range, local) = (TransferId(1), program.whole(), into.id());
    here.post(Transfer { id, peer, direction: Direction::Pull, local, remote, program, range, notice: None }).unwrap();
    until(parties, &mut events, |events| events.iter().any(is_end));
    events.into_iter().find(is_end).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

/// The process of another host: serves a pool until it is killed. As a test it does nothing.
#[test]
fn another_host() {
    if std::env::var_os(ROLE).is_none() || !is_ready() {
        return;
    }
    let (mut transport, pool) = (open(), pool(1, Allocate::Best));
    fill_blocks(&pool, &labels(100), 0).unwrap();
    let keys = transport.bind(&pool).unwrap();
    println!("\n@ {} {}", hex(&transport.address()), hex(&keys.0));
    let mut events = Vec::new();
    loop {
        transport.poll(&mut events);
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Host {
    child: Child,
    address: Vec<u8>,
    keys: PoolKeys,
}

impl Host {
    fn start() -> Host {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "another_host", "--nocapture"]).env(ROLE, "serve").stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.into_iter().find_map(|line| line.strip_prefix("@ ").map(str::to_owned)).unwrap();
        let (address, keys) = line.split_once(' ').unwrap();
        Host { child, address: unhex(address), keys: PoolKeys(unhex(keys).into()) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have been killed before.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn another_process_is_read_and_missed_when_it_is_killed() {
    if !is_ready() {
        return;
    }
    let mut host = Host::start();
    let (mut here, into) = (open(), pool(2, Allocate::Best));
    here.bind(&into).unwrap();
    fill_blocks(&into, &labels(0), 0).unwrap();
    let (peer, mut events) = (here.connect(&host.address).unwrap(), Vec::new());
    until(&mut [here.as_mut()], &mut events, |events| events.contains(&Event::Connected { peer }));
    let end = pull(&mut [here.as_mut()], (peer, &host.keys), &into);
    let all = u64::from(PLANES * BLOCKS) * BLOCK_BYTES;
    assert!(matches!(end, Event::Completed { bytes, .. } if bytes == all), "{end:?}");
    assert_eq!(check_blocks(&into, &labels(100)).unwrap(), None);

    host.child.kill().unwrap();
    let lost = |event: &Event| matches!(event, Event::PeerLost { peer: lost, .. } if *lost == peer);
    until(&mut [here.as_mut()], &mut events, |events| events.iter().any(lost));
    // Kernels of this side are all that writes here.
    here.fence(peer);
    let fenced = Event::Fenced { peer, proof: FenceProof::OwnerCopies };
    until(&mut [here.as_mut()], &mut events, |events| events.contains(&fenced));
}

#[test]
fn memory_without_fabric_handles_stays_with_its_host() {
    if !is_ready() {
        return;
    }
    for how in [Allocate::Descriptor, Allocate::Plain] {
        let (mut there, source) = (open(), pool(1, how));
        let domain = there.domain().unwrap();
        assert_eq!(domain.name, "5b1c0102-0304-0506-0708-090a0b0c0d0e/32766");
        let keys = there.bind(&source).unwrap();
        assert_eq!(there.domain(), None, "nobody beyond is told of it");
        // Whoever comes nevertheless hears why not, and what to do.
        let (mut here, into) = (open(), pool(2, Allocate::Best));
        here.bind(&into).unwrap();
        let (peer, mut events) = (here.connect(&domain.address).unwrap(), Vec::new());
        let connected = Event::Connected { peer };
        until(&mut [here.as_mut(), there.as_mut()], &mut events, |events| events.contains(&connected));
        let end = pull(&mut [here.as_mut(), there.as_mut()], (peer, &keys), &into);
        let Event::Failed { error: TransferError::Refused(reason), .. } = end else { panic!("{end:?}") };
        assert!(reason.contains("stays with its host") && reason.contains("allocate it with them"), "{reason}");
    }
}

/// Where a transport listens for other hosts, and its key.
fn at(transport: &dyn Transport) -> (SocketAddr, Address) {
    let address = Address::decode(TransportKind::Cuda, &transport.address()).unwrap();
    let place: [u8; 6] = address.place.as_ref().try_into().unwrap();
    let ip = IpAddr::V4(Ipv4Addr::new(place[0], place[1], place[2], place[3]));
    (SocketAddr::new(ip, u16::from_le_bytes([place[4], place[5]])), address)
}

/// Whether the other end closed the connection.
fn closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    match stream.read(&mut [0; 256]) {
        Ok(length) => length == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

#[test]
fn strangers_cost_only_their_own_connection() {
    if !is_ready() {
        return;
    }
    let mut victim = open();
    let (to, address) = at(victim.as_ref());
    let hello = |key| Frame::Hello { version: VERSION, key, instance: [9; 16] }.encode();
    let greetings: Vec<Vec<u8>> = vec![
        hello([0; 16]),
        Frame::Hello { version: VERSION + 1, key: address.key, instance: [9; 16] }.encode(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        [&u32::MAX.to_le_bytes()[..], &[2]].concat(),
        Frame::Open { request: 1, pool: PoolId(1), token: 1 }.encode(),
        // Greeted well, then what does not go between hosts, or nowhere.
        [hello(address.key), Frame::Ring.encode()].concat(),
        [hello(address.key), Frame::Fds { request: 1, count: 1 }.encode()].concat(),
        [hello(address.key), hello(address.key)].concat(),
        [hello(address.key), u32::MAX.to_le_bytes().to_vec(), vec![2]].concat(),
        [hello(address.key), vec![5, 0, 0, 0, 0xee, 1, 2, 3, 4]].concat(),
    ];
    let mut events = Vec::new();
    for greeting in greetings {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(&greeting).unwrap();
        let start = Instant::now();
        while !closed(&mut stream) {
            assert!(start.elapsed() < PATIENCE, "{greeting:?} was not refused");
            victim.poll(&mut events);
        }
    }
    // More than may wait: the oldest make room, and who shows the key is let in.
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(to).unwrap());
        victim.poll(&mut events);
    }
    let mut honest = open();
    let peer = honest.connect(&victim.address()).unwrap();
    let (mut seen, connected) = (Vec::new(), Event::Connected { peer });
    until(&mut [honest.as_mut(), victim.as_mut()], &mut seen, |seen| seen.contains(&connected));
    assert!(closed(&mut silent[0]), "the oldest was kept");
    assert!(!closed(silent.last_mut().unwrap()), "the newest still has time");
}

#[test]
fn who_is_called_says_little_before_its_welcome() {
    if !is_ready() {
        return;
    }
    let layout = block_planes(64, 16, 4096);
    let large = Frame::Opened { request: 0, layout, memory: MemoryKind::Shared }.encode();
    for (first, is_let_in) in [(Frame::Welcome { instance: [4; 16] }.encode(), true), (large, false)] {
        let mut victim = open();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (peer, mut events) = (victim.connect(&address_of(&listener)).unwrap(), Vec::new());
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&first).unwrap();
        let lost = |event: &Event| matches!(event, Event::PeerLost { reason, .. } if reason.contains("at most 256"));
        let is_over = |event: &Event| *event == Event::Connected { peer } || lost(event);
        until(&mut [victim.as_mut()], &mut events, |events| events.iter().any(is_over));
        assert_eq!(events.contains(&Event::Connected { peer }), is_let_in, "{events:?}");
    }
}

/// Of a transport of another host that listens there.
fn address_of(listener: &TcpListener) -> Bytes {
    let port = listener.local_addr().unwrap().port().to_le_bytes();
    let place = [127, 0, 0, 1, port[0], port[1]].to_vec().into();
    Address::new(TransportKind::Cuda, "another".into(), place, [3; 16], [4; 16]).encode()
}

/// What the owner of a pool says of its memory to who asks from another host.
fn words_of(owner: &mut dyn Transport, keys: &PoolKeys) -> Bytes {
    let (to, address) = at(owner);
    let mut stream = TcpStream::connect(to).unwrap();
    stream.write_all(&Frame::Hello { version: VERSION, key: address.key, instance: [9; 16] }.encode()).unwrap();
    // The token stands in the keys, which have no other way out.
    let token = (0..keys.0.len()).find_map(|at| {
        let (pool, rest) = postcard::take_from_bytes::<u64>(keys.0.get(at..)?).ok()?;
        let (token, rest) = postcard::take_from_bytes::<u64>(rest).ok()?;
        let (regions, rest) = postcard::take_from_bytes::<Vec<u64>>(rest).ok()?;
        (rest.is_empty() && pool == 1 && regions == layout().regions).then_some(token)
    });
    let (pool, token) = (PoolId(1), token.unwrap());
    stream.write_all(&Frame::Open { request: 0, pool, token }.encode()).unwrap();
    stream.set_nonblocking(true).unwrap();
    let (mut bytes, mut events, start) = (Vec::new(), Vec::new(), Instant::now());
    loop {
        assert!(start.elapsed() < PATIENCE);
        owner.poll(&mut events);
        let mut chunk = [0; 4096];
        bytes.extend_from_slice(stream.read(&mut chunk).map_or(&[][..], |length| &chunk[..length]));
        let mut rest = &bytes[..];
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            let Some(body) = after.get(..length) else { break };
            if let Ok(Frame::Opened { memory: MemoryKind::Opaque(words), .. }) = Frame::decode(body) {
                return words;
            }
            rest = &after[length..];
        }
    }
}

/// Pulls from a peer of another host that says this of its memory; how that ended.
fn pull_from(words: Bytes) -> Event {
    let mut victim = open();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (peer, mut events) = (victim.connect(&address_of(&listener)).unwrap(), Vec::new());
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(&Frame::Welcome { instance: [4; 16] }.encode()).unwrap();
    until(&mut [victim.as_mut()], &mut events, |events| events.contains(&Event::Connected { peer }));
    let into = pool(2, Allocate::Best);
    victim.bind(&into).unwrap();
    let keys = PoolKeys(Keys::new(TransportKind::Cuda, [4; 16], PoolId(1), 5, layout().regions).encode());
    let answer = std::thread::spawn(move || {
        let mut length = [0; 4];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        loop {
            stream.read_exact(&mut length).unwrap();
            let mut body = vec![0; u32::from_le_bytes(length) as usize];
            stream.read_exact(&mut body).unwrap();
            if let Frame::Open { request, .. } = Frame::decode(&body).unwrap() {
                let memory = MemoryKind::Opaque(words);
                stream.write_all(&Frame::Opened { request, layout: layout(), memory }.encode()).unwrap();
                return stream;
            }
        }
    });
    let end = pull(&mut [victim.as_mut()], (peer, &keys), &into);
    let _still_open = answer.join().unwrap();
    end
}

#[test]
fn what_a_host_says_of_its_memory_is_believed_in_nothing_but_names() {
    if !is_ready() {
        return;
    }
    let (mut owner, source) = (open(), pool(1, Allocate::Best));
    let keys = owner.bind(&source).unwrap();
    let words = words_of(owner.as_mut(), &keys);
    let changed = |change: &dyn Fn(&mut Vec<u8>, usize)| {
        let mut words = words.to_vec();
        let mark = words.windows(15).position(|part| part == b"kvferry-fabric!").unwrap();
        change(&mut words, mark);
        Bytes::from(words)
    };
    let lies = [
        changed(&|words, mark| words[mark] ^= 1),
        changed(&|words, mark| words[mark + 16] ^= 1),
        changed(&|words, mark| words[mark + 20] ^= 0x40),
        // Another way to reach it, which means nothing between hosts: a legacy handle.
        changed(&|words, mark| words[mark - 2] = 1),
        changed(&|words, _| words.truncate(words.len() - 1)),
        changed(&|words, _| words.push(0)),
        Bytes::new(),
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        let end = pull_from(lie);
        assert!(matches!(end, Event::Failed { error: TransferError::Refused(_), .. }), "lie {index}: {end:?}");
    }
    let truth = pull_from(words);
    assert!(matches!(truth, Event::Completed { .. }), "{truth:?}");
}
