//! What operators grep for: which path was chosen to each peer and why, what is shown of it, and what becomes of its rails.

use kvferry_core::Direction;
use kvferry_core::protocol::{ChosenPath, Event, PassedOver, RailHealth, RailTurn, ShownPath};

/// Logs what an event says of a path: a line at info once per peer and rail, once more when its evidence rises, and a warning where RDMA was
/// expected or a rail is not up any more.
pub(crate) fn log(event: &Event) {
    let shortfall = match event {
        Event::PathChosen(chosen) => {
            tracing::info!("{}", choice(chosen));
            chosen.shortfall.as_ref().map(|short| (chosen.peer, short))
        }
        Event::PathShown(shown) => {
            tracing::info!("{}", proof(shown));
            shown.shortfall.as_ref().map(|short| (shown.peer, short))
        }
        Event::RailTurned(turn) => {
            match turn.health {
                RailHealth::Up => tracing::info!("{}", turned(turn)),
                _ => tracing::warn!("{}", turned(turn)),
            }
            None
        }
        _ => None,
    };
    if let Some((peer, short)) = shortfall {
        tracing::warn!("kvferry: peer={peer}: {short}");
    }
}

fn choice(chosen: &ChosenPath) -> String {
    let direction = match chosen.direction {
        Direction::Pull => "pull",
        Direction::Push => "push",
    };
    let passed: Vec<String> = chosen.passed_over.iter().map(PassedOver::to_string).collect();
    let passed = if passed.is_empty() { "nothing".to_owned() } else { passed.join(", ") };
    let ChosenPath { peer, kind, device, remote_device, .. } = chosen;
    format!(
        "kvferry: path peer={peer} transport={kind} device={device} peer_device={remote_device} direction={direction} passed over: {passed}"
    )
}

fn turned(turn: &RailTurn) -> String {
    let RailTurn { peer, kind, device, remote_device, health, reason } = turn;
    let health = health.name();
    format!(
        "kvferry: rail peer={peer} transport={kind} device={device} peer_device={remote_device} is {health}: {reason}"
    )
}

fn proof(shown: &ShownPath) -> String {
    let ShownPath { peer, kind, device, evidence, .. } = shown;
    let lanes = if evidence.lanes.is_empty() { "-".to_owned() } else { evidence.lanes.join(",") };
    let library = evidence.library.as_ref();
    let (path, version) = library.map_or(("-", "-"), |library| (library.path.as_str(), library.version.as_str()));
    let grade = evidence.grade;
    format!(
        "kvferry: transport={kind} peer={peer} lanes={lanes} device={device} library={path} version={version} evidence={grade}"
    )
}

#[cfg(test)]
mod tests {
    use kvferry_core::protocol::{Obstacle, PeerName, Role};
    use kvferry_core::{Evidence, Grade, GroupId, LibraryName, NodeId, Rank, TransportKind};

    use super::*;

    const PEER: PeerName = PeerName { role: Role::Prefill, group: GroupId(0), rank: Rank(1), node: NodeId(2) };

    #[test]
    fn the_line_that_operators_grep_for() {
        let library = Some(LibraryName { path: "/usr/lib/libucp.so.0".into(), version: "1.22.0".into() });
        let evidence = Evidence {
            grade: Grade::E4,
            library,
            ..Evidence::connected(vec!["srd/rdmap40s0:1".into(), "srd/rdmap62s0:1".into()])
        };
        let shown =
            ShownPath { peer: PEER, kind: TransportKind::Ucx, device: "rdmap40s0:1".into(), evidence, shortfall: None };
        assert_eq!(
            proof(&shown),
            "kvferry: transport=ucx peer=prefill/group-0/rank-1/node-2 lanes=srd/rdmap40s0:1,srd/rdmap62s0:1 device=rdmap40s0:1 \
             library=/usr/lib/libucp.so.0 version=1.22.0 evidence=E4"
        );
    }

    #[test]
    fn a_rail_is_named_by_both_its_devices() {
        let turn = RailTurn {
            peer: PEER,
            kind: TransportKind::Tcp,
            device: "eth1".into(),
            remote_device: "eth3".into(),
            health: RailHealth::Down,
            reason: "the peer was lost: reset".into(),
        };
        assert_eq!(
            turned(&turn),
            "kvferry: rail peer=prefill/group-0/rank-1/node-2 transport=tcp device=eth1 peer_device=eth3 is down: the peer was lost: reset"
        );
    }

    #[test]
    fn the_choice_says_why() {
        let chosen = ChosenPath {
            peer: PEER,
            kind: TransportKind::Tcp,
            device: "lo".into(),
            remote_device: "eth0".into(),
            direction: Direction::Pull,
            passed_over: vec![
                PassedOver { kind: TransportKind::Cuda, obstacle: Obstacle::OpenedBy(Role::Decode) },
                PassedOver { kind: TransportKind::Shm, obstacle: Obstacle::Apart },
            ],
            shortfall: None,
        };
        assert_eq!(
            choice(&chosen),
            "kvferry: path peer=prefill/group-0/rank-1/node-2 transport=tcp device=lo peer_device=eth0 direction=pull passed over: \
             cuda (only the decode side has opened it), shm (the two are on different hosts)"
        );
    }
}
