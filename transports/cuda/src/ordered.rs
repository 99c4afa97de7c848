//! Transfers and a slow producer, on a GPU: the bytes are right because of the event, and wrong without it.
//! `cargo test -p kvferry-cuda --lib -- --ignored`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use kvferry_core::{Direction, End, PoolId, PoolLayout, Program, TransferId};
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    Device, DeviceEvent, Event, Expected, Options, PeerId, Pool, Provider, RemotePool, Transfer, TransferError,
    Transport, TransportKind,
};

use crate::buffer::Buffer;
use crate::driver::{self, Stream};
use crate::event::GpuEvent;
use crate::gpu::Gpu;
use crate::provider::CudaProvider;

const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 64 << 10;
const OLD: u8 = 0x11;
const NEW: u8 = 0x77;
const LATE: u8 = 0x33;
const ID: TransferId = TransferId(9);

fn layout() -> PoolLayout {
    block_planes(1, BLOCKS, BLOCK_BYTES)
}

fn program() -> Program {
    whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev())
}

/// Kernels that take a tenth of a second, and then write every byte of a pool.
struct Slow {
    gpu: Arc<Gpu>,
    stream: Stream,
    _scratch: Buffer,
}

impl Slow {
    fn write(pool: &Pool, byte: u8) -> Slow {
        let gpu = Gpu::open(0).unwrap();
        let bytes = 1usize << 30;
        let scratch = Buffer::new(&gpu, bytes).unwrap();
        gpu.enter().unwrap();
        let stream = driver::create_stream().unwrap();
        let region = pool.device_regions()[0];
        // SAFETY: both ranges are allocated for longer than this lives, which waits for the stream.
        unsafe {
            for _ in 0..250 {
                driver::set(scratch.address(), 1, bytes, stream).unwrap();
            }
            driver::set(region.address, byte, region.bytes as usize, stream).unwrap();
        }
        Slow { gpu, stream, _scratch: scratch }
    }

    fn event(&self) -> Arc<GpuEvent> {
        // SAFETY: the stream is this one's.
        unsafe { GpuEvent::record(0, self.stream.cast()) }.unwrap()
    }

    fn wait(&self) {
        self.gpu.enter().unwrap();
        // SAFETY: the stream exists.
        unsafe { driver::synchronize(self.stream) }.unwrap();
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.wait();
        // SAFETY: nothing is in it any more.
        let _destroyed = unsafe { driver::destroy_stream(self.stream) };
    }
}

fn fill(pool: &Pool, byte: u8) {
    for block in 0..BLOCKS {
        pool.fill(0, block, byte).unwrap();
    }
}

/// Two transports with a pool each.
struct Two {
    source: Pool,
    destination: Pool,
    a: Box<dyn Transport>,
    b: Box<dyn Transport>,
    a_at_b: (PeerId, RemotePool),
    b_at_a: (PeerId, RemotePool),
    events: Vec<Event>,
}

impl Two {
    fn new() -> Two {
        let device = Device { kind: TransportKind::Cuda, name: "gpu0".into(), unavailable: None };
        let provider = CudaProvider::default();
        let pool = |id, byte| {
            let pool = provider.allocate(&device, PoolId(id), layout(), "ordered").unwrap();
            fill(&pool, byte);
            pool
        };
        let (source, destination) = (pool(1, OLD), pool(2, 0xee));
        let open = || provider.open(&device, &Options::default()).unwrap();
        let (mut a, mut b) = (open(), open());
        let (source_keys, destination_keys) = (a.bind(&source).unwrap(), b.bind(&destination).unwrap());
        let (to_a, to_b) = (b.connect(&a.address()).unwrap(), a.connect(&b.address()).unwrap());
        let a_at_b = (to_a, b.import(to_a, &source_keys, source.layout()).unwrap());
        let b_at_a = (to_b, a.import(to_b, &destination_keys, destination.layout()).unwrap());
        let mut two = Two { source, destination, a, b, a_at_b, b_at_a, events: Vec::new() };
        // Once through, so that everything is mapped and loaded.
        let transfer = two.pull();
        two.b.post(transfer).unwrap();
        two.until_ended();
        fill(&two.destination, 0xee);
        two
    }

    fn pull(&self) -> Transfer {
        let (peer, remote) = self.a_at_b;
        let (program, local) = (Arc::new(program()), self.destination.id());
        let range = program.whole();
        Transfer { id: ID, peer, direction: Direction::Pull, local, remote, program, range, notice: None }
    }

    fn push(&mut self) -> Transfer {
        let (peer, remote) = self.b_at_a;
        let whole = program();
        let range = whole.whole();
        let expected = Expected {
            from: None,
            id: ID,
            pool: self.destination.id(),
            program: Arc::new(whole.without(End::Source)),
            range,
        };
        self.b.expect(expected).unwrap();
        let (program, local) = (Arc::new(whole.without(End::Destination)), self.source.id());
        Transfer { id: ID, peer, direction: Direction::Push, local, remote, program, range, notice: None }
    }

    fn turn(&mut self) {
        self.a.poll(&mut self.events);
        self.b.poll(&mut self.events);
    }

    /// Until the initiator knows the end, which is returned.
    fn until_ended(&mut self) -> Event {
        let start = Instant::now();
        loop {
            self.turn();
            let is_end = |e: &Event| matches!(e, Event::Completed { .. } | Event::Failed { .. });
            if let Some(at) = self.events.iter().position(is_end) {
                return self.events.drain(..).nth(at).unwrap();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", self.events);
        }
    }

    /// The bytes of the destination, if all are alike.
    fn moved(&self) -> Option<u8> {
        let mut all = vec![0; BLOCK_BYTES as usize];
        let mut first = None;
        for block in 0..BLOCKS {
            self.destination.read(0, block, 0, &mut all).unwrap();
            let due = *first.get_or_insert(all[0]);
            if all.iter().any(|byte| *byte != due) {
                return None;
            }
        }
        first
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_push_follows_its_producer() {
    let mut two = Two::new();
    // Without the event what is moved is what was there before.
    let slow = Slow::write(&two.source, NEW);
    let push = two.push();
    two.a.post(push).unwrap();
    assert!(matches!(two.until_ended(), Event::Completed { .. }));
    assert_eq!(two.moved(), Some(OLD), "the producer is too fast for this test");
    drop(slow);
    fill(&two.source, OLD);
    let slow = Slow::write(&two.source, NEW);
    let push = two.push();
    two.a.post_after(push, slow.event()).unwrap();
    assert!(matches!(two.until_ended(), Event::Completed { .. }));
    assert_eq!(two.moved(), Some(NEW));
}

#[test]
#[ignore = "needs a GPU"]
fn a_pull_follows_the_last_user_of_its_blocks() {
    let mut two = Two::new();
    let slow = Slow::write(&two.destination, LATE);
    let pull = two.pull();
    two.b.post(pull).unwrap();
    assert!(matches!(two.until_ended(), Event::Completed { .. }));
    slow.wait();
    assert_eq!(two.moved(), Some(LATE), "the last user is too fast for this test");
    drop(slow);
    let slow = Slow::write(&two.destination, LATE);
    let pull = two.pull();
    two.b.post_after(pull, slow.event()).unwrap();
    assert!(matches!(two.until_ended(), Event::Completed { .. }));
    assert_eq!(two.moved(), Some(OLD));
}

#[test]
#[ignore = "needs a GPU"]
fn others_overtake_what_waits() {
    let mut two = Two::new();
    let slow = Slow::write(&two.destination, LATE);
    let event = slow.event();
    let held = Transfer { id: TransferId(1), ..two.pull() };
    two.b.post_after(held, event.clone()).unwrap();
    // More than there are streams.
    for number in 2..10 {
        let free = Transfer { id: TransferId(number), ..two.pull() };
        two.b.post(free).unwrap();
        let ended = two.until_ended();
        assert!(matches!(ended, Event::Completed { id, .. } if id == TransferId(number)), "{ended:?}");
    }
    assert_eq!(event.is_done(), Ok(false), "the producer is too fast for this test");
    // A cancelled one ends when its kernels have: what the event stands for is not taken back.
    two.b.cancel(TransferId(1));
    let cancelled = Event::Failed { id: TransferId(1), error: TransferError::Cancelled };
    assert_eq!(two.until_ended(), cancelled);
    assert_eq!(event.is_done(), Ok(true));
}

#[test]
#[ignore = "needs a GPU"]
fn layers_are_ready_when_their_kernels_have_ended() {
    let two = Two::new();
    let slow = Slow::write(&two.source, NEW);
    let event = slow.event();
    let (called, calls) = mpsc::channel();
    let early = Arc::new(AtomicBool::new(true));
    let still = Arc::clone(&early);
    event.on_done(move || called.send(still.load(Ordering::SeqCst)).unwrap()).unwrap();
    assert_eq!(event.is_done(), Ok(false), "the producer is too fast for this test");
    early.store(false, Ordering::SeqCst);
    assert_eq!(calls.recv_timeout(Duration::from_secs(60)), Ok(false), "called before the event");
    assert_eq!(event.is_done(), Ok(true));
    let mut byte = [0];
    two.source.read(0, BLOCKS - 1, BLOCK_BYTES - 1, &mut byte).unwrap();
    assert_eq!(byte, [NEW]);
}
