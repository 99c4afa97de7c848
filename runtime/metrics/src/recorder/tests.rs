#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use kvferry_core::protocol::{Awaited, OutcomeReport};
use kvferry_core::{HandoverId, RequestId};
use serde_json::Value;

use super::*;

/// A recorder over a file of its own, which is removed at the end.
struct Bed {
    recorder: Recorder,
    file: PathBuf,
}

impl Bed {
    fn new(name: &str, entries_per_peer: usize) -> Bed {
        let file = std::env::temp_dir().join(format!("kvferry-recorder-{}-{name}.jsonl", std::process::id()));
        let _ = std::fs::remove_file(&file);
        let options = RecorderOptions { entries_per_peer, ..RecorderOptions::new(&file) };
        Bed { recorder: Recorder::start(options).unwrap(), file }
    }

    fn lines(&self) -> Vec<Value> {
        self.recorder.flush();
        let text = std::fs::read_to_string(&self.file).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

fn fetched(handover: u64) -> Message {
    Message::Fetched { handover: HandoverId(handover) }
}

#[test]
fn the_last_of_every_peer_is_written_in_order() {
    let bed = Bed::new("order", 3);
    for handover in 0..5 {
        bed.recorder.said(NodeId(1), true, &fetched(handover));
        bed.recorder.said(NodeId(2), false, &Message::Renew { requests: vec![RequestId(handover)] });
    }
    bed.recorder.happened(&Event::OfferOpened { request: RequestId(9) });
    assert_eq!(bed.lines(), Vec::<Value>::new(), "nothing went wrong");
    assert!(bed.recorder.dump("asked"));
    let lines = bed.lines();
    assert_eq!((&lines[0]["because"], &lines[0]["entries"]), (&"asked".into(), &7.into()));
    assert_eq!(lines.len(), 8);
    let entries: Vec<u64> = lines[1..].iter().map(|line| line["entry"].as_u64().unwrap()).collect();
    assert_eq!(entries, [5, 6, 7, 8, 9, 10, 11], "three of each peer, in the order of all");
    let of = |peer: u64| lines.iter().filter(move |line| line["peer"] == peer).collect::<Vec<_>>();
    assert!(of(1).iter().all(|line| line["what"] == "sent" && line["name"] == "Fetched"));
    assert_eq!(of(1).iter().map(|line| line["handover"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(of(2).iter().map(|line| line["request"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 3, 4]);
    let event = lines.last().unwrap();
    assert_eq!((&event["what"], &event["name"]), (&"event".into(), &"OfferOpened".into()));
    assert!(event["detail"].as_str().unwrap().contains('9'), "{event}");
}

/// Thousands of peers must not make a dump of hundreds of megabytes, which would hold the node up meanwhile.
#[test]
fn a_dump_has_the_latest_of_more_than_it_may_hold() {
    let bed = Bed::new("large", 8);
    let peers = DUMP_ENTRIES_MAX as u64 / 8 + 100;
    for handover in 0..8 {
        (0..peers).for_each(|peer| bed.recorder.said(NodeId(peer), true, &fetched(handover)));
    }
    bed.recorder.happened(&Event::DrainEnded { left: 3 });
    assert!(bed.recorder.dump("asked"));
    let lines = bed.lines();
    assert_eq!((&lines[0]["entries"], &lines[0]["left_out"]), (&DUMP_ENTRIES_MAX.into(), &801.into()));
    assert_eq!(lines.len(), DUMP_ENTRIES_MAX + 1);
    assert_eq!((&lines[1]["entry"], &lines.last().unwrap()["name"]), (&802.into(), &"DrainEnded".into()));
}

#[test]
fn quarantine_and_deadlines_are_written_by_themselves() {
    let deadline = FailReason::Deadline { awaited: Awaited::Transfer, waited_ms: 7 };
    let report = |outcome| OutcomeReport { handover: HandoverId(3), outcome, at: Moment(0), paths: vec![] };
    let failed = |reason| Event::Settled { report: report(Outcome::Failed { reason }) };
    for (name, event, word) in [
        ("quarantine", Event::Quarantined { handover: HandoverId(3) }, "quarantined"),
        ("deadline", failed(deadline), "7 ms"),
    ] {
        let bed = Bed::new(name, 8);
        bed.recorder.said(NodeId(1), true, &fetched(3));
        bed.recorder.happened(&event);
        bed.recorder.happened(&event);
        let lines = bed.lines();
        assert_eq!(lines.len(), 3, "once a second: {lines:?}");
        assert!(lines[0]["because"].as_str().unwrap().contains(word), "{}", lines[0]);
    }
    let bed = Bed::new("well", 8);
    bed.recorder.happened(&Event::Settled { report: report(Outcome::Delivered) });
    bed.recorder.happened(&failed(FailReason::Engine("full".into())));
    assert_eq!(bed.lines(), Vec::<Value>::new());
}

#[test]
fn of_too_many_peers_the_most_silent_is_forgotten() {
    let bed = Bed::new("peers", 1);
    for peer in 0..PEERS_MAX as u64 {
        bed.recorder.said(NodeId(peer), true, &fetched(peer));
    }
    bed.recorder.said(NodeId(0), true, &fetched(0));
    bed.recorder.said(NodeId(u64::MAX), true, &fetched(1));
    bed.recorder.dump("asked");
    let peers: Vec<u64> = bed.lines().iter().filter_map(|line| line["peer"].as_u64()).collect();
    assert_eq!(peers.len(), PEERS_MAX);
    assert!(peers.contains(&0) && !peers.contains(&1) && peers.contains(&u64::MAX));
}

#[test]
fn long_descriptions_are_cut() {
    let bed = Bed::new("long", 8);
    bed.recorder.happened(&Event::Health { trouble: Some("ä".repeat(DETAIL_BYTES_MAX)) });
    bed.recorder.dump("asked");
    let detail = bed.lines()[1]["detail"].as_str().unwrap().to_owned();
    assert!(detail.len() <= DETAIL_BYTES_MAX && detail.len() > DETAIL_BYTES_MAX - 4, "{}", detail.len());
}

#[tokio::test]
async fn sigusr1_asks_for_a_dump() {
    let bed = Bed::new("signal", 8);
    bed.recorder.said(NodeId(1), true, &fetched(3));
    let listening = tokio::spawn(bed.recorder.clone().dump_at_sigusr1());
    // The task listens once it has run up to its first wait.
    tokio::task::yield_now().await;
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::USR1).unwrap();
    while bed.lines().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(bed.lines()[0]["because"], "SIGUSR1");
    listening.abort();
}
