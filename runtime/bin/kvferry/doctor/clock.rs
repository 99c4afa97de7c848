//! How far the peer's clock is from this one: questions and answers over UDP, as NTP asks them.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvferry_doctor::ClockSeen;

/// Questions; the fastest answer counts.
const QUESTIONS: u64 = 16;
const ANSWER_WITHIN: Duration = Duration::from_millis(200);
/// Unanswered questions in a row after which nobody is asked any more.
const UNANSWERED_MAX: u32 = 3;
const MAGIC: &[u8; 8] = b"kvfclock";
/// The magic, the number of the question, and the peer's clock when it came and when it was answered. A question is as long as an answer: nobody
/// gets more than he sends.
const BYTES: usize = 32;

/// Answers questions until the process ends, on a thread of its own.
pub(crate) fn answer(socket: UdpSocket) -> std::io::Result<()> {
    std::thread::Builder::new().name("kvferry-clock".to_owned()).spawn(move || {
        let mut question = [0; BYTES + 1];
        loop {
            match socket.recv_from(&mut question) {
                Ok((BYTES, asker)) => {
                    let came = unix_ns();
                    if let Some(number) = number_of(&question) {
                        // Whoever asks asks again.
                        let _ = socket.send_to(&packet(number, came, unix_ns()), asker);
                    }
                }
                Ok(_) => {}
                // Of an asker that has gone.
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::Interrupted) => {}
                Err(error) => {
                    tracing::warn!(%error, "nobody is told the time any more");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

/// Asks; `None` if nobody answers.
pub(crate) fn ask(socket: &UdpSocket, peer: SocketAddr) -> Option<ClockSeen> {
    socket.set_read_timeout(Some(ANSWER_WITHIN)).ok()?;
    let (mut best, mut answers, mut unanswered) = (None, 0, 0);
    for number in 1..=QUESTIONS {
        let (asked, at) = (Instant::now(), unix_ns());
        socket.send_to(&packet(number, 0, 0), peer).ok()?;
        match heard(socket, peer, number) {
            Some((came, answered)) => {
                let round_trip = asked.elapsed().as_nanos() as i128 - (answered as i128 - came as i128);
                let sample = offset((at, at + asked.elapsed().as_nanos() as u64), (came, answered));
                (answers, unanswered) = (answers + 1, 0);
                if best.is_none_or(|(fastest, _)| round_trip < fastest) {
                    best = Some((round_trip, sample));
                }
            }
            None => unanswered += 1,
        }
        if unanswered >= UNANSWERED_MAX {
            break;
        }
    }
    best.map(|(round_trip, offset_ns)| ClockSeen { offset_ns, round_trip_ns: round_trip.max(0) as u64, answers })
}

/// The answer to that question, not to an earlier one.
fn heard(socket: &UdpSocket, peer: SocketAddr, number: u64) -> Option<(u64, u64)> {
    let until = Instant::now() + ANSWER_WITHIN;
    let mut answer = [0; BYTES + 1];
    while Instant::now() < until {
        let (bytes, from) = socket.recv_from(&mut answer).ok()?;
        if (bytes, from) == (BYTES, peer) && number_of(&answer) == Some(number) {
            return Some((word(&answer, 16)?, word(&answer, 24)?));
        }
    }
    None
}

/// How far the peer is ahead: the mean of what the way there and the way back show.
fn offset((asked, heard): (u64, u64), (came, answered): (u64, u64)) -> i64 {
    let ahead = (i128::from(came) - i128::from(asked)) + (i128::from(answered) - i128::from(heard));
    i64::try_from(ahead / 2).unwrap_or(if ahead > 0 { i64::MAX } else { i64::MIN })
}

fn packet(number: u64, came: u64, answered: u64) -> [u8; BYTES] {
    let mut packet = [0; BYTES];
    let words = [number.to_be_bytes(), came.to_be_bytes(), answered.to_be_bytes()];
    packet.iter_mut().zip(MAGIC.iter().chain(words.iter().flatten())).for_each(|(byte, value)| *byte = *value);
    packet
}

fn number_of(packet: &[u8]) -> Option<u64> {
    packet.starts_with(MAGIC).then(|| word(packet, 8)).flatten()
}

fn word(packet: &[u8], at: usize) -> Option<u64> {
    packet.get(at..)?.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_is_the_middle_of_both_ways() {
        // The peer is 1,000 ahead; the way there takes 30, the answer 5, the way back 50.
        assert_eq!(offset((0, 85), (1_030, 1_035)), 990);
        assert_eq!(offset((5_000, 5_080), (4_040, 4_040)), -1_000);
    }

    #[test]
    fn a_peer_answers_and_nonsense_is_not_answered() {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (server, client) = (bind(), bind());
        let peer = server.local_addr().unwrap();
        answer(server).unwrap();
        client.send_to(b"hello", peer).unwrap();
        client.send_to(&[0; BYTES], peer).unwrap();
        let seen = ask(&client, peer).unwrap();
        assert_eq!(seen.answers, QUESTIONS as u32);
        // One clock: apart by no more than what it took.
        assert!(seen.offset_ns.unsigned_abs() <= seen.round_trip_ns, "{seen:?}");
        let silent = bind();
        assert_eq!(ask(&client, silent.local_addr().unwrap()), None);
    }
}
