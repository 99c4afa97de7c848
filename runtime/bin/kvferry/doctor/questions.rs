//! What a peer is asked over UDP beside the transfer, and answers until its process ends: its clock, and what it has of EFA. Neither is sealed: only the
//! checks that name them rest upon it.

use std::io::ErrorKind;
use std::net::UdpSocket;

use kvferry_doctor::End;

use super::{clock, ends};

/// Answers, on a thread of its own.
pub(super) fn answer(socket: UdpSocket, own: End) -> std::io::Result<()> {
    std::thread::Builder::new().name("kvferry-answers".to_owned()).spawn(move || {
        let mut question = [0; ends::BYTES + 1];
        loop {
            match socket.recv_from(&mut question) {
                Ok((bytes, asker)) => {
                    let came = clock::unix_ns();
                    let Some(question) = question.get(..bytes) else { continue };
                    // Whoever asks asks again.
                    if let Some(answer) = clock::answer(question, came) {
                        let _ = socket.send_to(&answer, asker);
                    } else if let Some(answer) = ends::answer(question, &own) {
                        let _ = socket.send_to(&answer, asker);
                    }
                }
                // Of an asker that has gone.
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::Interrupted) => {}
                Err(error) => {
                    tracing::warn!(%error, "nobody is answered any more over UDP");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_asked_for_both_and_nonsense_is_not_answered() {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (server, client) = (bind(), bind());
        let peer = server.local_addr().unwrap();
        let own = End { libfabric: Some(7), ..End::default() };
        answer(server, own.clone()).unwrap();
        client.send_to(b"hello", peer).unwrap();
        client.send_to(&[0; clock::BYTES], peer).unwrap();
        assert_eq!(ends::ask(&client, peer), Some(own));
        let seen = clock::ask(&client, peer).unwrap();
        assert_eq!(seen.answers, clock::QUESTIONS as u32);
        // One clock: apart by no more than what it took.
        assert!(seen.offset_ns.unsigned_abs() <= seen.round_trip_ns, "{seen:?}");
        // Bound, so that nobody else answers there.
        let unread = bind();
        let silent = unread.local_addr().unwrap();
        assert_eq!((clock::ask(&client, silent), ends::ask(&client, silent)), (None, None));
    }
}
