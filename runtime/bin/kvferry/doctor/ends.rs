//! What the peer's end has of EFA: asked over UDP, as its clock is. A build that is older does not answer.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use kvferry_doctor::End;

const QUESTIONS: u64 = 3;
const ANSWER_WITHIN: Duration = Duration::from_millis(200);
const MAGIC: &[u8; 8] = b"kvf-ends";
/// The magic, the number of the question, the length of the answer and the answer, filled up. A question is as long, so that nobody gets more than he
/// sends.
pub(super) const BYTES: usize = 1024;
const HEAD: usize = 18;

/// Asks; `None` if nobody answers, or with something else.
pub(super) fn ask(socket: &UdpSocket, peer: SocketAddr) -> Option<End> {
    socket.set_read_timeout(Some(ANSWER_WITHIN)).ok()?;
    (1..=QUESTIONS).find_map(|number| {
        socket.send_to(&packet(number, &[])?, peer).ok()?;
        let until = Instant::now() + ANSWER_WITHIN;
        let mut answer = [0; BYTES + 1];
        while Instant::now() < until {
            let (bytes, from) = socket.recv_from(&mut answer).ok()?;
            if from == peer
                && let Some((heard, said)) = read(answer.get(..bytes)?)
                && heard == number
            {
                return end(said);
            }
        }
        None
    })
}

/// What is answered to what came; `None` if that is no question of this kind.
pub(super) fn answer(question: &[u8], own: &End) -> Option<[u8; BYTES]> {
    let (number, nothing) = read(question)?;
    let said = serde_json::to_vec(own).ok()?;
    if nothing.is_empty() { packet(number, &said) } else { None }
}

fn end(said: &[u8]) -> Option<End> {
    let heard = serde_json::from_slice::<End>(said).map_err(|error| error.to_string());
    match heard.and_then(|end| end.checked().map_err(|error| error.to_string())) {
        Ok(end) => Some(end),
        Err(error) => {
            tracing::warn!(%error, "the peer does not say what it has of EFA");
            None
        }
    }
}

fn packet(number: u64, said: &[u8]) -> Option<[u8; BYTES]> {
    let mut packet = [0; BYTES];
    let length = u16::try_from(said.len()).ok()?;
    let head = [MAGIC.as_slice(), &number.to_be_bytes(), &length.to_be_bytes()].concat();
    packet.get_mut(..HEAD)?.copy_from_slice(&head);
    packet.get_mut(HEAD..HEAD + said.len())?.copy_from_slice(said);
    Some(packet)
}

/// The number of the question, and what is said.
fn read(packet: &[u8]) -> Option<(u64, &[u8])> {
    let rest = Some(packet).filter(|packet| packet.len() == BYTES)?.strip_prefix(MAGIC)?;
    let (number, rest) = rest.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    Some((u64::from_be_bytes(*number), rest.get(..usize::from(u16::from_be_bytes(*length)))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_doctor::EfaKind;

    /// The most that an end can say.
    fn most() -> End {
        let kind = |device| EfaKind { device, count: 256, gigabits: 1 << 20, reads: Some(false), writes: Some(false) };
        End { efa: (0xefa0..0xefa8).map(kind).collect(), libfabric: Some(u32::MAX) }
    }

    /// Answers the first question with what `say` makes of it.
    fn told(say: impl FnOnce(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> Option<End> {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (server, client) = (bind(), bind());
        let peer = server.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let mut question = [0; BYTES + 1];
            let (bytes, asker) = server.recv_from(&mut question).unwrap();
            if let Some(answer) = say(&question[..bytes]) {
                server.send_to(&answer, asker).unwrap();
            }
        });
        let told = ask(&client, peer);
        serving.join().unwrap();
        told
    }

    #[test]
    fn the_most_that_can_be_said_is_heard() {
        assert_eq!(told(|question| Some(answer(question, &most())?.to_vec())), Some(most()));
    }

    #[test]
    fn whoever_says_nothing_or_nonsense_has_not_told() {
        assert_eq!(told(|_| None), None);
        assert_eq!(told(|question| Some(answer(question, &most())?[..BYTES - 1].to_vec())), None);
        for said in [&b"{"[..], b"{}", b"[]", br#"{"efa":[{"device":1}],"libfabric":null}"#, b"\xff\xfe"] {
            assert_eq!(told(move |_| Some(packet(1, said)?.to_vec())), None, "{said:?}");
        }
        let many = End { efa: vec![most().efa[0]; 9], libfabric: None };
        assert_eq!(told(move |question| Some(answer(question, &many)?.to_vec())), None);
        // The answer to another question.
        assert_eq!(told(|_| Some(packet(9, &serde_json::to_vec(&most()).unwrap())?.to_vec())), None);
    }

    #[test]
    fn only_questions_are_answered() {
        let own = End::default();
        let question = packet(3, &[]).unwrap();
        assert!(answer(&question, &own).is_some());
        // An answer, which would go to and fro for ever.
        assert_eq!(answer(&answer(&question, &own).unwrap(), &own), None);
        assert_eq!(answer(&question[1..], &own), None);
        assert_eq!(answer(&[0; BYTES], &own), None);
        let mut beyond = question;
        beyond[16..18].copy_from_slice(&u16::MAX.to_be_bytes());
        assert_eq!(answer(&beyond, &own), None);
    }
}
