//! kvferry over TCP: any host, no native library.
//!
//! The memory's owner does every copy: a pull asks the source's owner to stream its blocks, a push streams into blocks that the
//! destination's owner expected. Bytes go straight between blocks and sockets with vectored calls where pieces are 4 KiB or more; shorter
//! ones are packed through a small buffer. Nothing here has a thread; one epoll descriptor announces everything.
//!
//! A push announces itself and waits for the receiver's go, so one that nobody expects (yet) holds up no other transfer.

mod address;
mod connection;
mod dispatch;
mod ending;
mod frame;
mod gather;
mod greeting;
mod initiator;
mod provider;
mod receiver;
mod responder;
mod scatter;
mod service;
mod share;
mod socket;
mod staging;
mod stream;
#[cfg(test)]
mod tests;
mod transport;

pub use provider::TcpProvider;
