//! How far the peer's clock is from this one: questions and answers over UDP, as NTP asks them.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvferry_doctor::ClockSeen;

/// Questions; the fastest answer counts.
pub(super) const QUESTIONS: u64 = 16;
const ANSWER_WITHIN: Duration = Duration::from_millis(200);
/// Unanswered questions in a row after which nobody is asked any more.
const UNANSWERED_MAX: u32 = 3;
const MAGIC: &[u8; 8] = b"kvfclock";
/// The magic, the number of the question, and the peer's clock when it came and when it was answered. A question is as long as an answer: nobody
/// gets more than he sends.
pub(super) const BYTES: usize = 32;

/// What is answered to what came at that time; `None` if that is no question of this kind.
pub(super) fn answer(question: &[u8], came: u64) -> Option<[u8; BYTES]> {
    let number = number_of(Some(question).filter(|question| question.len() == BYTES)?)?;
    Some(packet(number, came, unix_ns()))
}

/// Asks; `None` if nobody answers.
pub(super) fn ask(socket: &UdpSocket, peer: SocketAddr) -> Option<ClockSeen> {
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

/// Nanoseconds since 1970.
pub(super) fn unix_ns() -> u64 {
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
    fn only_questions_are_answered() {
        assert!(answer(&packet(7, 0, 0), 1).is_some());
        assert_eq!(answer(&packet(7, 0, 0)[1..], 1), None);
        assert_eq!(answer(b"hello", 1), None);
        assert_eq!(answer(&[0; BYTES], 1), None);
    }
}
