//! What the directory tells a node of others: members, with the geometries that they share said once.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::bounds::capped;
use super::{Member, Place, Role};
use crate::{Epoch, GroupGeometry, GroupId, NodeId, Rank, limits};

/// Members that a node hears of.
///
/// A `whole` list is all that concern it; any other list only adds, or says a member's new place. Who is gone is told by
/// [`Lost`](super::Lost), in the same order as the lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Packed", into = "Packed")]
pub struct MemberList {
    /// Whether everybody who is not listed is no member.
    pub whole: bool,
    /// Who.
    pub members: Vec<Arc<Member>>,
}

/// As it travels: members name a geometry by its place in a table.
#[derive(Serialize, Deserialize)]
struct Packed {
    whole: bool,
    #[serde(deserialize_with = "capped::<_, _, { limits::GEOMETRIES_MAX }>")]
    geometries: Vec<Arc<GroupGeometry>>,
    #[serde(deserialize_with = "capped::<_, _, { limits::MEMBERS_MAX }>")]
    members: Vec<PackedMember>,
}

#[derive(Serialize, Deserialize)]
struct PackedMember {
    node: NodeId,
    epoch: Epoch,
    address: String,
    place: Option<PackedPlace>,
}

#[derive(Serialize, Deserialize)]
struct PackedPlace {
    role: Role,
    group: GroupId,
    rank: Rank,
    geometry: u32,
    blocks: Vec<u32>,
    handovers_max: u32,
}

/// A list that names what it does not carry.
#[derive(Debug, Error)]
#[error("{node} has geometry {index} of {geometries} in its list")]
struct NoSuchGeometry {
    node: NodeId,
    index: u32,
    geometries: usize,
}

impl From<MemberList> for Packed {
    fn from(MemberList { whole, members }: MemberList) -> Packed {
        let mut geometries: Vec<Arc<GroupGeometry>> = Vec::new();
        let mut pack = |place: &Place| {
            let same = |known: &Arc<GroupGeometry>| Arc::ptr_eq(known, &place.geometry) || *known == place.geometry;
            let index = geometries.iter().position(same).unwrap_or_else(|| {
                geometries.push(Arc::clone(&place.geometry));
                geometries.len() - 1
            });
            PackedPlace {
                role: place.role,
                group: place.group,
                rank: place.rank,
                geometry: index as u32,
                blocks: place.blocks.clone(),
                handovers_max: place.handovers_max,
            }
        };
        let members = members.iter().map(|member| PackedMember {
            node: member.node,
            epoch: member.epoch,
            address: member.address.clone(),
            place: member.place.as_ref().map(&mut pack),
        });
        let members = members.collect();
        Packed { whole, geometries, members }
    }
}

impl TryFrom<Packed> for MemberList {
    type Error = NoSuchGeometry;

    fn try_from(Packed { whole, geometries, members }: Packed) -> Result<MemberList, NoSuchGeometry> {
        let unpack = |PackedMember { node, epoch, address, place }: PackedMember| {
            let place = match place {
                None => None,
                Some(PackedPlace { role, group, rank, geometry: index, blocks, handovers_max }) => {
                    let geometry = geometries.get(index as usize).map(Arc::clone);
                    let geometry = geometry.ok_or(NoSuchGeometry { node, index, geometries: geometries.len() })?;
                    Some(Place { role, group, rank, geometry, blocks, handovers_max })
                }
            };
            Ok(Arc::new(Member { node, epoch, address, place }))
        };
        Ok(MemberList { whole, members: members.into_iter().map(unpack).collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, Model, Parallel};

    fn member(node: u64, group: u32, geometry: &Arc<GroupGeometry>) -> Arc<Member> {
        let geometry = Arc::clone(geometry);
        let place = Place {
            role: Role::Prefill,
            group: GroupId(group),
            rank: Rank(0),
            geometry,
            blocks: vec![7],
            handovers_max: 3,
        };
        Arc::new(Member { node: NodeId(node), epoch: Epoch(1), address: format!("n{node}"), place: Some(place) })
    }

    fn geometry(tp: u32) -> Arc<GroupGeometry> {
        let model = Model::preset("llama-3.1-8b").expect("a preset");
        Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel { tp, ..Parallel::default() } })
    }

    #[test]
    fn geometries_are_said_once_and_shared() {
        // Equal geometries of other allocations count as one.
        let mut members: Vec<_> = (0..100).map(|node| member(node, node as u32, &geometry(2))).collect();
        members.push(member(100, 100, &geometry(4)));
        members.push(Arc::new(Member { node: NodeId(101), epoch: Epoch(3), address: String::new(), place: None }));
        let list = MemberList { whole: true, members };
        let bytes = postcard::to_allocvec(&list).expect("encodes");
        let one = postcard::to_allocvec(&geometry(2)).expect("encodes").len();
        assert!(bytes.len() < 3 * one + 101 * 16, "{} bytes, {one} for a geometry", bytes.len());
        let back: MemberList = postcard::from_bytes(&bytes).expect("decodes");
        assert_eq!(back, list);
        let place = |index: usize| back.members[index].place.as_ref().expect("a place");
        assert!(Arc::ptr_eq(&place(0).geometry, &place(99).geometry));
    }

    #[test]
    fn hostile_lists_are_refused() {
        let list = MemberList { whole: false, members: vec![member(1, 1, &geometry(2))] };
        let mut packed = Packed::from(list);
        if let Some(place) = &mut packed.members[0].place {
            place.geometry = 1;
        }
        let bytes = postcard::to_allocvec(&packed).expect("encodes");
        assert!(postcard::from_bytes::<MemberList>(&bytes).is_err(), "an index beyond the table");
        // `whole`, then a table that announces more than may be.
        let mut bytes = vec![1];
        bytes.extend(postcard::to_allocvec(&(limits::GEOMETRIES_MAX as u64 + 1)).expect("encodes"));
        bytes.resize(1 << 20, 0);
        assert!(postcard::from_bytes::<MemberList>(&bytes).is_err(), "too many geometries");
        let mut bytes = vec![1, 0];
        bytes.extend(postcard::to_allocvec(&(limits::MEMBERS_MAX as u64 + 1)).expect("encodes"));
        bytes.resize(1 << 20, 0);
        assert!(postcard::from_bytes::<MemberList>(&bytes).is_err(), "too many members");
    }
}
