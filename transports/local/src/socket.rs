//! A framed, non-blocking Unix stream socket that can carry descriptors.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::carrier::Descriptor;
use crate::wire::{FDS_PER_FRAME_MAX, Frame, GREETING_BYTES_MAX};

/// Frames that may wait for a peer that does not read.
const OUTGOING_MAX: usize = 1 << 16;
/// Bytes read from one connection in one poll.
const READ_BYTES_MAX: usize = 1 << 20;
/// Descriptors that may wait for their frame.
const FDS_MAX: usize = 2 * FDS_PER_FRAME_MAX;

/// One socket and what is half read from it and half written to it. Every error is the reason why it is of no further use.
pub(crate) struct Connection {
    socket: OwnedFd,
    incoming: Vec<u8>,
    taken: usize,
    fds: VecDeque<OwnedFd>,
    outgoing: VecDeque<Outgoing>,
    trusted: bool,
    ended: bool,
    chunk: Vec<u8>,
}

struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// What goes with the first byte.
    descriptors: Vec<Box<dyn Descriptor>>,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Connection {
        Connection {
            socket,
            incoming: Vec::new(),
            taken: 0,
            fds: VecDeque::new(),
            outgoing: VecDeque::new(),
            trusted: false,
            ended: false,
            chunk: Vec::new(),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// From now on larger frames are taken.
    pub(crate) fn trust(&mut self) {
        self.trusted = true;
    }

    /// Whether something waits to be written.
    pub(crate) fn is_backed_up(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Queues an encoded frame, together with descriptors.
    pub(crate) fn send_with(&mut self, bytes: Vec<u8>, descriptors: Vec<Box<dyn Descriptor>>) {
        self.outgoing.push_back(Outgoing { bytes, sent: 0, descriptors });
    }

    /// Writes what the socket takes.
    pub(crate) fn flush(&mut self) -> Result<(), String> {
        while let Some(next) = self.outgoing.front_mut() {
            let rest = next.bytes.get(next.sent..).unwrap_or_default();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_FRAME_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<BorrowedFd<'_>> = if next.sent == 0 {
                next.descriptors.iter().filter_map(|descriptor| descriptor.fd()).collect()
            } else {
                Vec::new()
            };
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err("too many descriptors for one frame".into());
            }
            match sendmsg(
                &self.socket,
                &[IoSlice::new(rest)],
                &mut ancillary,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(sent) => next.sent += sent,
                Err(Errno::AGAIN) if self.outgoing.len() > OUTGOING_MAX => {
                    return Err("it does not read what it is sent".into());
                }
                // ENOBUFS and ETOOMANYREFS end when the peer has taken descriptors that are under way.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::TOOMANYREFS) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(format!("writing to its socket failed: {error}")),
            }
            if next.sent == next.bytes.len() {
                self.outgoing.pop_front();
            }
        }
        Ok(())
    }

    /// Reads what there is, up to a bound; nothing while a whole frame waits, which may have to for long. The end of the stream is an error only
    /// once every whole frame before it was taken.
    pub(crate) fn fill(&mut self) -> Result<(), String> {
        if self.has_next() {
            return Ok(());
        }
        self.forget_taken();
        let mut left = READ_BYTES_MAX;
        while left > 0 && !self.ended {
            self.chunk.resize(64 << 10, 0);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_FRAME_MAX))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let got = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut self.chunk)], &mut ancillary, flags) {
                Ok(got) => got,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(format!("reading from its socket failed: {error}")),
            };
            let waiting = self.fds.len();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            if got.flags.contains(ReturnFlags::CTRUNC) {
                return Err("its descriptors did not fit; raise the limit on open files (ulimit -n)".into());
            }
            if self.fds.len() > if self.trusted { FDS_MAX } else { 0 } {
                return Err("it sent descriptors that nobody asked for".into());
            }
            self.ended = got.bytes == 0;
            self.incoming.extend_from_slice(self.chunk.get(..got.bytes).unwrap_or_default());
            // Descriptors are taken before more of them are read. Where less came than there was room for, that was most likely all.
            let was_all = got.bytes < self.chunk.len();
            left = if was_all || self.fds.len() > waiting { 0 } else { left.saturating_sub(got.bytes) };
        }
        Ok(())
    }

    /// The next whole frame, if it is here.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, String> {
        let Some(body) = self.body()? else { return self.wait_for_more() };
        let length = body.len();
        let frame = Frame::decode(body).map_err(|e| format!("it sent a malformed frame: {e}"))?;
        self.taken += 4 + length;
        Ok(Some(frame))
    }

    /// Whether a frame is here that [`Connection::next`] gives or refuses.
    pub(crate) fn has_next(&self) -> bool {
        !matches!(self.body(), Ok(None))
    }

    /// Whether the peer has closed it; frames may still be here.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Bytes that are kept of what was read.
    #[cfg(test)]
    pub(crate) fn unread(&self) -> usize {
        self.incoming.len()
    }

    /// The bytes of the next frame, if all are here.
    fn body(&self) -> Result<Option<&[u8]>, String> {
        let rest = self.incoming.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*header) as usize;
        let Some(&first) = rest.first() else { return Ok(None) };
        let most = if self.trusted { Frame::bytes_max(first) } else { GREETING_BYTES_MAX };
        if length == 0 || length > most {
            return Err(format!("it announced a frame of {length} bytes where at most {most} are allowed"));
        }
        Ok(rest.get(..length))
    }

    /// Takes descriptors that came with the current frame.
    pub(crate) fn take_fds(&mut self, count: usize) -> Result<Vec<OwnedFd>, String> {
        if count > self.fds.len() {
            return Err(format!("it announced {count} descriptors and sent {}", self.fds.len()));
        }
        Ok(self.fds.drain(..count).collect())
    }

    fn wait_for_more(&mut self) -> Result<Option<Frame>, String> {
        self.forget_taken();
        if self.ended { Err("it closed the connection".into()) } else { Ok(None) }
    }

    fn forget_taken(&mut self) {
        self.incoming.drain(..self.taken);
        self.taken = 0;
        if self.incoming.is_empty() {
            self.incoming.shrink_to(64 << 10);
        }
    }
}
