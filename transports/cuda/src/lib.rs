//! Transfers between GPUs of one host, or of one NVLink domain: one kernel launch walks a whole program, so that pieces cost nothing.
//!
//! **Who copies.** The destination's own GPU does every copy, in both directions: a pull reads the peer's memory, a push is a doorbell to its
//! destination, which then reads. No foreign kernel ever writes a pool, so a fence is proved by the owner's own streams having drained
//! ([`OwnerCopies`](kvferry_transport::FenceProof::OwnerCopies)). What two sides say to each other is `kvferry-local`'s business.
//!
//! **Memory.** Pools are physical memory that a handle stands for (the default: a fabric handle where IMEX lets one be made, else a
//! descriptor), plain allocations shared by legacy CUDA IPC, or a serving stack's own memory ([`from_raw`]). Readers map what handles stand
//! for read-only where the driver can.
//!
//! **Beyond the host.** A GPU that is registered with an NVLink domain of several hosts (NVML's cluster and clique), and makes fabric handles, also
//! listens at a TCP port. What two sides say to each other goes there, the bytes by NVLink as within the host. Peers of other hosts read nothing but
//! memory that fabric handles stand for.
//!
//! **Order.** A transfer that is posted after a [`GpuEvent`] touches its pool only once the event is done: a pull waits in the GPU's own stream, a
//! push is announced then. A layer is marked ready by [`GpuEvent::on_done`]. When a transfer has ended, every byte is visible to whatever is
//! launched afterwards, in any stream.
//!
//! **Peers that die.** Memory behind a handle stays until its last reader unmaps it: a kernel that reads a dead peer's pool goes on, and
//! its transfer fails because the connection is gone. Of memory behind legacy CUDA IPC the driver promises nothing once the owner has freed it;
//! keep such pools until their readers are fenced. Nothing is unmapped or freed here before the kernels that use it have ended. A kernel that
//! faults damages the context of its own process, never the peer's: every transfer of that process then fails, saying so.

mod allocation;
mod backend;
mod blocks;
mod bounds;
mod buffer;
mod copier;
mod copy;
mod domain;
mod driver;
#[cfg(test)]
mod emulated;
mod even;
mod event;
mod fabric;
mod gpu;
#[cfg(test)]
mod hostile;
mod known;
#[cfg(test)]
mod known_emulated;
mod launch;
mod memory;
mod order;
#[cfg(test)]
mod ordered;
mod paths;
mod planes;
mod provider;
mod ptx;
mod rdma;
mod rectangle;
mod shared;
mod slot;
mod staged;
#[cfg(test)]
mod staged_emulated;
mod standby;

pub use allocation::Allocate;
pub use blocks::{Difference, block_state, check_blocks, fill_blocks};
pub use event::GpuEvent;
pub use gpu::pci_address;
pub use memory::{allocate, free_bytes, from_raw};
pub use paths::reaches;
pub use provider::CudaProvider;
