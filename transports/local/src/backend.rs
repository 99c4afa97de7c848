//! The seam between the protocol and the memory that it moves.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::{FenceProof, GpuIdentity, PoolId, PoolLayout, Program, TransportKind, UnitRange};
use kvferry_transport::{DeviceEvent, Evidence, PeerId, Pool, TransferError, Wait};

use crate::carrier::{Carrier, Descriptor, Owner};
use crate::wire::MemoryKind;

/// How pools of one kind of memory are shared with peers and copied from them.
///
/// Errors that are strings name cause and remedy; peers may read them.
pub trait Backend: 'static {
    /// The kind of transport that it makes.
    const KIND: TransportKind;
    /// How its frames travel.
    type Carrier: Carrier;
    /// A peer's pool, as this process reaches it. Dropped when nothing needs it any more, by copies too.
    type Memory: 'static;
    /// A program on its way into a local pool.
    type Copy: Copying;

    /// How long after a push was announced its end is looked for all the time; for a multiple of it, now and then.
    const PUSH_SPIN: Duration = Duration::ZERO;
    /// How long after its last transfer, or expectation, a push that is expected is looked for all the time.
    const EXPECT_SPIN: Duration = Duration::ZERO;
    /// Whether small frames go through memory while their reader looks for them, where sockets carry them.
    const RINGS: bool = false;
    /// Whether a copy may seem to have succeeded though its source was withdrawn meanwhile. Then its owner is asked after the last byte
    /// whether the pool is still bound under the token by which it was opened, and only that makes it a success.
    const CHECKS: bool = false;
    /// Whether reaching a peer's memory takes so long that a push's source is made known to its destination before the first push.
    const OFFERS: bool = false;
    /// Whether backends of this kind have something to say to each other, beside the protocol.
    const SPEAKS: bool = false;
    /// Whether a peer's memory is reached by handles of its process, whichever connection they came over: then it is opened once for all connections
    /// to one transport, and closed by a fence.
    const HANDLES: bool = false;
    /// Whether memory of this side may still be read for a peer, by what this process does, after its pool was withdrawn. Then the pool is let go
    /// only once each peer that was lent it has said that it reads it no more, or was [cut off](Backend::cut).
    const OUTLASTS: bool = false;
    /// What proves that copies which were [cut off](Backend::sever) write no more.
    const SEVERED: FenceProof = FenceProof::OwnerCopies;

    /// Takes a pool, or says why this memory cannot be shared or copied.
    fn bind(&mut self, pool: &Pool) -> Result<(), String>;

    /// A pool is let go: nothing of this transport touches it any more.
    fn unbind(&mut self, pool: PoolId);

    /// What a peer needs to read a bound pool; for one beyond this host, without descriptors.
    fn share(&mut self, pool: &Pool, is_beyond: bool) -> Result<Shared, String>;

    /// The domain of hosts, this one among them, from all of which every pool that is bound now can be read.
    fn domain(&self) -> Option<String> {
        None
    }

    /// Which GPU's memory it is, where it is a GPU's.
    fn gpu(&self) -> Option<GpuIdentity> {
        None
    }

    /// Makes a peer's pool readable here, from what its owner shared. The layout is valid; everything else is the peer's word.
    fn open(
        &mut self,
        owner: Owner<'_>,
        layout: &PoolLayout,
        memory: MemoryKind,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self::Memory, String>;

    /// What is shown of the way to a peer's memory that was opened here.
    fn reached(&self, memory: &Self::Memory) -> Evidence;

    /// What is shown of the way to a peer that was given what it needs to read memory of this side; it copies.
    fn lent(&self, memory: &MemoryKind) -> Evidence;

    /// Starts a copy into a bound pool. The caller has validated the program against both layouts.
    fn copy(
        &mut self,
        program: Arc<Program>,
        range: UnitRange,
        layout: Arc<PoolLayout>,
        memory: Rc<Self::Memory>,
        pool: Pool,
    ) -> Result<Self::Copy, TransferError>;

    /// Ends the copies from a peer's memory that wait for the peer, which is gone or fenced: none of them runs when this returns, whether the
    /// memory is still known or was withdrawn. Nothing is copied from it any more.
    fn sever(&mut self, peer: PeerId) {
        let _its_copies_wait_for_nobody = peer;
    }

    /// Begins nothing more by itself of a peer's memory, beside copies. Whether nothing that it began so is under way.
    fn rests(&mut self, peer: PeerId) -> bool {
        let _nothing_is_begun_but_copies = peer;
        true
    }

    /// A peer that was lent memory is gone, and did not say that it reads it no more: has what is still sent to it end.
    fn cut(&mut self) {}

    /// Whether that has not ended.
    fn is_cutting(&self) -> bool {
        false
    }

    /// What has come to be known of the way to a peer's memory since it was last asked; asked after [`Backend::tend`].
    fn shown(&mut self) -> Vec<(PeerId, Evidence)> {
        Vec::new()
    }

    /// Peers whose memory cannot be reached any more since it was last asked, and why; asked after [`Backend::tend`]. They are let go.
    fn broken(&mut self) -> Vec<(PeerId, String)> {
        Vec::new()
    }

    /// Takes what a peer's backend says, in order. An error loses the peer.
    fn hear(&mut self, peer: PeerId, words: &[u8]) -> Result<(), String> {
        let (_, _) = (peer, words);
        Ok(())
    }

    /// What there is to say to peers since it was last asked; asked after copies have begun, at the end of each poll, and before
    /// the thread sleeps.
    fn say(&mut self) -> Vec<(PeerId, Bytes)> {
        Vec::new()
    }

    /// Whether there is more to do beside copies that needs nobody: then there is another poll at once.
    fn is_busy(&self) -> bool {
        false
    }

    /// Has a copy that has not begun wait for an event by itself. `false` if it cannot: then it is begun when the event is done.
    fn order(&mut self, copy: &mut Self::Copy, after: &dyn DeviceEvent) -> Result<bool, TransferError> {
        let (_, _) = (copy, after);
        Ok(false)
    }

    /// Goes on with what the backend does beside copies; called at every poll. Whether there is more of it, which nothing may announce: then there is
    /// another poll within milliseconds.
    fn tend(&mut self) -> bool {
        false
    }

    /// How to wait while copies run that need nobody's hand; `None` where the carrier's descriptor tells of them, too.
    fn wait(&self) -> Option<Wait>;
}

/// A copy under way. Dropping it while it [runs](Copying::is_running) is a bug of the caller.
pub trait Copying {
    /// Starts what needs no turn for it, so that it need not wait for one. Called once, first; why it could not, the next step says.
    fn begin(&mut self) {}

    /// Moves about `budget` bytes, or looks how far it is. After an error nothing more is started, but what was may still run.
    fn step(&mut self, budget: u64) -> Result<Step, TransferError>;

    /// All its bytes.
    fn bytes(&self) -> u64;

    /// Contiguous pieces so far.
    fn pieces(&self) -> u64;

    /// Whether something that was started may still touch memory of either side.
    fn is_running(&mut self) -> bool;
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It cost as much as copying so many bytes; there is more to do at once.
    More(u64),
    /// Nothing can be done at the moment.
    Waiting,
    /// Every byte is in place; the last step cost as much as copying so many bytes.
    Done(u64),
}

/// A pool's memory, for its readers.
pub struct Shared {
    /// What they are told.
    pub memory: MemoryKind,
    /// What they are given, in order.
    pub descriptors: Vec<Box<dyn Descriptor>>,
}
