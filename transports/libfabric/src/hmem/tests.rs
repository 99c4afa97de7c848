use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, PoolId, TransferId};
use kvferry_local::wire::MemoryKind;
use kvferry_local::{Backend, LocalTransport, Owner};
use kvferry_topology::Counters;
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    BindError, Event, Evidence, Options, PackedBy, PeerId, Pool, PoolKeys, Transfer, TransferError, Transport,
};

use super::*;
use crate::backend::Fabric;
use crate::emulated::{GPU, Gpu, Script, library, pool, script};
use crate::packing::Packing;
use crate::{provider, wire};

const BLOCKS: u32 = 256;
const BLOCK_BYTES: u64 = 4 << 10;
/// `-FI_EOPNOTSUPP`.
const UNSUPPORTED: c_int = -libc::EOPNOTSUPP;

mod both {
    use kvferry_transport::conformance::every_pool;

    use crate::emulated::{Gpus, library};
    kvferry_transport::conformance!(if library().is_some() => Gpus::new("lo", every_pool).packed());
}

mod source {
    use kvferry_transport::conformance::source_pools;

    use crate::emulated::{Gpus, library};
    kvferry_transport::conformance!(if library().is_some() => Gpus::new("lo", source_pools));
}

mod destination {
    use kvferry_transport::conformance::destination_pools;

    use crate::emulated::{Gpus, library};
    kvferry_transport::conformance!(if library().is_some() => Gpus::new("lo", destination_pools).packed());
}

type Side = LocalTransport<Fabric>;
type Change = fn(&mut Script);

fn open_side() -> Option<Side> {
    let domain = open(library()?, "lo", true, false).unwrap();
    // Whatever may be packed is.
    let options = Options { packed_by: PackedBy::Read, packed_below_bytes: Some(u64::MAX), ..Options::default() };
    Some(provider::open(&domain, "lo", &options, Counters::default()).unwrap())
}

fn on_gpu(id: u32, gpu: Gpu) -> Pool {
    pool(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), gpu)
}

fn on_host(id: u32) -> Pool {
    Pool::allocate(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "host").unwrap()
}

fn bind(side: &mut Side, gpu: Gpu) -> Result<PoolKeys, BindError> {
    side.bind(&on_gpu(1, gpu))
}

/// What a GPU's pool is refused with, which says what takes it instead; pools in host memory are bound all the same.
fn refusal(change: impl FnOnce(&mut Script), gpu: Gpu) -> Option<String> {
    script(|script| *script = Script::default());
    script(change);
    let mut side = open_side()?;
    let said = bind(&mut side, gpu).unwrap_err().to_string();
    assert!(said.contains(GPU.0) && said.contains("FI_HMEM") && said.ends_with("through host memory"), "{said}");
    side.bind(&on_host(1)).unwrap();
    Some(said)
}

#[test]
fn whatever_a_provider_refuses_is_refused_in_its_words() {
    let cases: [(Change, &str); 4] = [
        (|script| script.offers_nothing = true, "offers no device memory"),
        (|script| script.p2p = UNSUPPORTED, "FI_OPT_FI_HMEM_P2P"),
        (|script| script.cuda_api = UNSUPPORTED, "FI_OPT_CUDA_API_PERMITTED"),
        (|script| (script.by_dmabuf, script.by_address) = (UNSUPPORTED, -libc::EFAULT), "by address: Bad address"),
    ];
    for (change, words) in cases {
        let Some(said) = refusal(change, Gpu::default()) else { return };
        assert!(said.contains(words), "{said}");
    }
    let unordered = Gpu { unordered: Some("nothing flushes".to_owned()), ..Gpu::default() };
    let said = refusal(|_| (), unordered).unwrap();
    assert!(said.contains("nothing flushes"), "{said}");
}

#[test]
fn a_device_that_was_not_asked_for_gpus_says_so() {
    script(|script| *script = Script::default());
    let Some(library) = library() else { return };
    let domain = open(library, "lo", false, false).unwrap();
    assert!(script(|script| script.options.is_empty()), "endpoints are as they were");
    let mut side = provider::open(&domain, "lo", &Options::default(), Counters::default()).unwrap();
    let said = bind(&mut side, Gpu::default()).unwrap_err().to_string();
    assert!(said.contains("Options::device_memory") && said.ends_with("through host memory"), "{said}");
}

#[test]
fn memory_of_another_make_is_refused() {
    script(|script| *script = Script::default());
    let Some(mut side) = open_side() else { return };
    let said = bind(&mut side, Gpu { is_no_cuda: true, ..Gpu::default() }).unwrap_err().to_string();
    assert!(said.contains("no device of CUDA's"), "{said}");
}

/// By what stands for it, where that is there and taken; else by address.
#[test]
fn memory_is_registered_by_dmabuf_or_by_address() {
    let counts = || script(|script| (script.dmabufs, script.addresses));
    for (by_dmabuf, has_no_dmabuf, due) in [(0, false, (1, 0)), (UNSUPPORTED, false, (0, 1)), (0, true, (0, 1))] {
        script(|script| *script = Script { by_dmabuf, ..Script::default() });
        let Some(mut side) = open_side() else { return };
        bind(&mut side, Gpu { has_no_dmabuf, ..Gpu::default() }).unwrap();
        assert_eq!(counts(), due);
        assert!(script(|script| script.complaints.is_empty()), "{:?}", script(|script| script.complaints.clone()));
    }
}

/// What an endpoint is told by each provider and version.
#[test]
fn old_libraries_are_asked_for_nothing_that_they_cannot_promise() {
    let of = |provider, minor| Reach::of(provider, Version(version(1, minor)));
    assert!(of("shm", 17).unwrap_err().contains("1.18") && of("efa", 20).unwrap_err().contains("1.21"));
    assert_eq!(
        (of("shm", 18), of("efa", 21), of("tcp", 17)),
        (Ok(Reach::Copied), Ok(Reach::Direct), Ok(Reach::Direct))
    );
    assert_eq!((Reach::Copied.writer(), Reach::Direct.writer()), (Writer::Driver, Writer::Nic));
}

#[test]
fn endpoints_are_told_what_their_provider_knows() {
    let told = |provider, minor, reach| -> Vec<(u32, Value, bool)> {
        let wishes = wishes(provider, Version(version(1, minor)), reach).into_iter();
        wishes.map(|wish| (wish.option, wish.value, wish.is_needed)).collect()
    };
    let p2p = (FI_OPT_FI_HMEM_P2P, Value::Number(1), true);
    let cuda = |permitted| (FI_OPT_CUDA_API_PERMITTED, Value::Flag(permitted), true);
    let sharing = |is_needed| (FI_OPT_SHARED_MEMORY_PERMITTED, Value::Flag(false), is_needed);
    assert_eq!(told("efa", 21, Some(Reach::Direct)), [p2p, cuda(false), sharing(true)]);
    assert_eq!(told("tcp", 22, Some(Reach::Direct)), [p2p, cuda(false)]);
    assert_eq!(told("tcp", 17, Some(Reach::Direct)), [p2p]);
    assert_eq!(told("shm", 18, Some(Reach::Copied)), [cuda(true)]);
    // For pools of the host's only EFA's endpoints hear anything, and may refuse.
    assert_eq!((told("efa", 21, None), told("efa", 20, None)), (vec![sharing(false)], vec![]));
    assert!(told("tcp", 22, None).is_empty() && told("shm", 22, None).is_empty());
}

/// Of the library that is here, by which no pool in such memory can be bound: it was built without CUDA, or there is no GPU.
#[test]
fn shared_memory_says_why_it_takes_no_gpus() {
    let library = match Library::find() {
        Ok(library) => library,
        Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
    };
    if let Err(reason) = &open(library, "shm", true, false).unwrap().reach {
        assert!(reason.contains("CUDA") || reason.contains("1.18") || reason.contains("FI_HMEM"), "{reason}");
    }
    let reason = open(library, "lo", true, false).unwrap().reach.clone().unwrap_err();
    assert!(reason.contains("offers no device memory"), "{reason}");
}

/// A reader that does not know of GPUs would read the address in the other process as the host's.
#[test]
fn shared_memory_does_not_read_a_gpus_one_sided() {
    let library = match Library::find() {
        Ok(library) => library,
        Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
    };
    let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
    let domain = open(library, "shm", false, true).unwrap();
    let owner: Endpoint<()> = Endpoint::open(&domain, 1).unwrap();
    let packing = Packing::new(&Options::default(), "shm");
    let mut fabric = Fabric::new(&domain, (owner.name(), None), None, Counters::default(), packing).unwrap();
    let memory =
        wire::Memory { name: owner.name().to_vec(), number: 1, regions: vec![(1 << 40, 1)], is_on_device: true };
    let owner = Owner { socket: None, pid: None, peer: Some(PeerId(1)), is_beyond: false };
    let refused = fabric.open(owner, &layout, MemoryKind::Opaque(memory.seal()), Vec::new()).err().unwrap();
    assert!(refused.contains("Options::device_memory"), "{refused}");
}

/// One pull from a pool to another, to its end; what was shown of the way to its source.
fn pull(source: &Pool, destination: &Pool) -> Option<(Event, Vec<Evidence>)> {
    script(|script| *script = Script::default());
    let (mut here, mut there) = (open_side()?, open_side()?);
    (0..BLOCKS).for_each(|block| source.fill(0, block, block as u8 | 1).unwrap());
    let keys = there.bind(source).unwrap();
    here.bind(destination).unwrap();
    let peer = here.connect(&there.address()).unwrap();
    let remote = here.import(peer, &keys, source.layout()).unwrap();
    let program = Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev()));
    let (id, range, local) = (TransferId(1), program.whole(), destination.id());
    here.post(Transfer { id, peer, direction: Direction::Pull, local, remote, range, program, notice: None }).unwrap();
    let (mut events, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
    let is_end = |event: &Event| matches!(event, Event::Completed { .. } | Event::Failed { .. });
    while !events.iter().any(is_end) {
        assert!(Instant::now() < deadline, "{events:?}");
        here.poll(&mut events);
        there.poll(&mut Vec::new());
    }
    let shown = |event: &Event| if let Event::Shown { evidence, .. } = event { Some(*evidence.clone()) } else { None };
    let evidence = events.iter().filter_map(shown).collect();
    Some((events.into_iter().find(is_end).unwrap(), evidence))
}

fn verify(pool: &Pool) {
    for block in 0..BLOCKS {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        pool.read(0, block, 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == (BLOCKS - 1 - block) as u8 | 1), "block {block}");
    }
}

/// A transfer is complete only once kernels see its bytes; one that they need not see has failed.
#[test]
fn what_was_read_is_made_visible_before_it_counts() {
    let gpu = Gpu::default();
    let destination = on_gpu(2, gpu.clone());
    let Some((end, evidence)) = pull(&on_host(1), &destination) else { return };
    assert!(matches!(end, Event::Completed { .. }), "{end:?}");
    assert_eq!(gpu.settled.load(Ordering::Relaxed), 1);
    verify(&destination);
    let words = |of: &str| evidence.iter().filter(|shown| shown.seen.iter().any(|seen| seen.contains(of))).count();
    assert!(!evidence.is_empty() && words("GPU memory is registered") == evidence.len(), "{evidence:?}");
    assert_eq!(words("packed"), 0, "{evidence:?}");

    let gpu = Gpu { unsettled: Some("the flush failed".to_owned()), ..Gpu::default() };
    let (end, _) = pull(&on_host(1), &on_gpu(2, gpu)).unwrap();
    let failed = |error: &TransferError| error.to_string().contains("the flush failed");
    assert!(matches!(&end, Event::Failed { error, .. } if failed(error)), "{end:?}");
}

/// No processor packs out of a GPU's memory, or unpacks into it: it would fault, and a source refuses.
#[test]
fn short_pieces_of_a_gpu_are_read() {
    let places: [fn(u32) -> Pool; 2] = [on_host, |id| on_gpu(id, Gpu::default())];
    for (source, destination) in [(1, 0), (0, 1), (1, 1)] {
        let (source, destination) = (places[source](1), places[destination](2));
        let Some((end, _)) = pull(&source, &destination) else { return };
        assert!(matches!(end, Event::Completed { .. }), "{end:?}");
        verify(&destination);
        assert!(script(|script| script.complaints.is_empty()), "{:?}", script(|script| script.complaints.clone()));
    }
}
