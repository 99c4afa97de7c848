//! A shadow of pool memory: whose every block is, and what it holds.

use std::collections::BTreeMap;
use std::ops::Range;

use kvferry_core::{End, Epoch, HandoverId, PoolId, Program, RequestId, UnitRange};
use kvferry_transport::Pool;

use crate::fabric::NicId;

/// Whose a block is, for one layer group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// Its engine's: nobody else may read or write it.
    #[default]
    Nobody,
    /// It holds a request's KV, which others may read.
    Offer(RequestId),
    /// A handover may write it.
    Handover(HandoverId),
    /// A handover that has failed may still be writing it.
    Quarantined(HandoverId),
}

/// Something that must never happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Nanoseconds of the fabric's time.
    pub at: u64,
    /// Where it was seen, if a NIC saw it.
    pub nic: Option<NicId>,
    /// Whose transfer or claim.
    pub handover: HandoverId,
    /// In which pool.
    pub pool: PoolId,
    /// The first plane of the layer group.
    pub plane: u32,
    /// The block.
    pub block: u32,
    /// What.
    pub breach: Breach,
}

/// Which rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breach {
    /// A slice landed in a block that was not its handover's (I1).
    ForeignWrite(Owner),
    /// A slice landed in a block that was given out by another incarnation of the node (I6).
    StaleWrite(Epoch),
    /// A block was let go while a transfer of its handover could still write it (I1).
    ReleasedUnderWrite,
    /// A block was claimed while it was somebody else's (I9).
    ClaimedTwice(Owner),
    /// A delivered block holds bytes that were read where nothing was offered any more, or another request's (I2).
    WrongContent,
    /// Nothing of a delivered block ever came (I2).
    NothingCame,
    /// A block was called delivered that is not the handover's (I2).
    NotItsOwn(Owner),
}

/// What a block or a slice holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Content {
    #[default]
    Nothing,
    Of(RequestId),
    Garbage,
}

/// The shadows of one transfer's pools, as they were when it began.
#[derive(Clone, Copy)]
pub(crate) struct Watched {
    source: Option<(usize, Epoch)>,
    destination: Option<(usize, Epoch)>,
}

/// All pools that are watched.
#[derive(Default)]
pub(crate) struct Shadow {
    pools: Vec<PoolShadow>,
    /// By the address of their memory, which is only looked up.
    by_memory: BTreeMap<usize, usize>,
    nics: BTreeMap<usize, Vec<NicId>>,
    /// Transfers that are not over.
    under_way: BTreeMap<HandoverId, usize>,
    pub(crate) violations: Vec<Violation>,
}

struct PoolShadow {
    pool: PoolId,
    epoch: Epoch,
    /// The group of each plane.
    group_of: Vec<usize>,
    /// First plane and blocks of each group.
    groups: Vec<(u32, Vec<Cell>)>,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    owner: Owner,
    epoch: Epoch,
    content: Content,
}

impl Shadow {
    /// A pool in one incarnation of its node: nobody's, all of it.
    pub(crate) fn incarnate(&mut self, pool: &Pool, epoch: Epoch, groups: &[Range<u32>]) {
        let planes = &pool.layout().planes;
        let mut group_of = vec![usize::MAX; planes.len()];
        let mut cells = Vec::with_capacity(groups.len());
        for (index, group) in groups.iter().enumerate() {
            for plane in group.clone() {
                if let Some(of) = group_of.get_mut(plane as usize) {
                    *of = index;
                }
            }
            let blocks = group.clone().filter_map(|plane| planes.get(plane as usize)).map(|plane| plane.blocks).max();
            cells.push((group.start, vec![Cell::default(); blocks.unwrap_or(0) as usize]));
        }
        let shadow = PoolShadow { pool: pool.id(), epoch, group_of, groups: cells };
        let Some(memory) = memory(pool) else { return };
        match self.by_memory.get(&memory).and_then(|index| self.pools.get_mut(*index)) {
            Some(known) => *known = shadow,
            None => {
                self.by_memory.insert(memory, self.pools.len());
                self.pools.push(shadow);
            }
        }
    }

    /// A NIC reaches a pool.
    pub(crate) fn bind(&mut self, pool: &Pool, nic: NicId) {
        if let Some(memory) = memory(pool) {
            self.nics.entry(memory).or_default().push(nic);
        }
    }

    /// The NICs that reach, or have reached, a pool.
    pub(crate) fn nics(&self, pool: &Pool) -> &[NicId] {
        memory(pool).and_then(|memory| self.nics.get(&memory)).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn begin(&mut self, handover: HandoverId) {
        *self.under_way.entry(handover).or_default() += 1;
    }

    pub(crate) fn end(&mut self, handover: HandoverId) {
        if let Some(count) = self.under_way.get_mut(&handover) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&handover);
            }
        }
    }

    pub(crate) fn in_flight_to(&self, handover: HandoverId) -> usize {
        self.under_way.get(&handover).copied().unwrap_or(0)
    }

    pub(crate) fn watched(&self, source: &Pool, destination: &Pool) -> Option<Watched> {
        let of = |pool| {
            let index = *self.by_memory.get(&memory(pool)?)?;
            Some((index, self.pools.get(index)?.epoch))
        };
        let watched = Watched { source: of(source), destination: of(destination) };
        (watched.source.is_some() || watched.destination.is_some()).then_some(watched)
    }

    /// What a slice carries that leaves now.
    pub(crate) fn content(&self, watched: &Watched, program: &Program, part: UnitRange) -> Content {
        let Some((pool, epoch)) = watched.source.and_then(|(index, epoch)| Some((self.pools.get(index)?, epoch)))
        else {
            return Content::Nothing;
        };
        let mut content = Content::Nothing;
        touched(program, End::Source, part, |plane, block| {
            let read = match pool.cell(plane, block) {
                Some(Cell { owner: Owner::Offer(_), epoch: since, content }) if *since == epoch => *content,
                _ => Content::Garbage,
            };
            content = content.with(read);
        });
        content
    }

    /// A slice has landed.
    #[allow(clippy::too_many_arguments, reason = "all that a record of a violation has to name")]
    pub(crate) fn write(
        &mut self,
        at: u64,
        nic: NicId,
        handover: HandoverId,
        watched: &Watched,
        program: &Program,
        part: UnitRange,
        content: Content,
    ) {
        let Some((index, epoch)) = watched.destination else { return };
        let Some(shadow) = self.pools.get_mut(index) else { return };
        let pool = shadow.pool;
        let mut first = None;
        touched(program, End::Destination, part, |plane, block| {
            let Some(cell) = shadow.cell_mut(plane, block) else { return };
            let breach = match cell.owner {
                Owner::Handover(of) | Owner::Quarantined(of) if of == handover => {
                    (cell.epoch != epoch).then_some(Breach::StaleWrite(cell.epoch))
                }
                owner => Some(Breach::ForeignWrite(owner)),
            };
            cell.content = cell.content.with(if breach.is_some() { Content::Garbage } else { content });
            if let Some(breach) = breach {
                first.get_or_insert((plane, block, breach));
            }
        });
        if let Some((plane, block, breach)) = first {
            self.violations.push(Violation { at, nic: Some(nic), handover, pool, plane, block, breach });
        }
    }

    /// Blocks change hands. `writes` says whether transfers of a handover may still write this pool.
    pub(crate) fn claim(
        &mut self,
        at: u64,
        pool: &Pool,
        plane: u32,
        blocks: &[u32],
        owner: Owner,
        writes: impl Fn(HandoverId) -> bool,
    ) {
        let Some(shadow) = self.find(pool) else { return };
        let (id, epoch) = (shadow.pool, shadow.epoch);
        let mut found = Vec::new();
        // Blocks that change hands together mostly come from one handover.
        let mut asked: Option<(HandoverId, bool)> = None;
        let mut writes = |handover| match asked {
            Some((of, answer)) if of == handover => answer,
            _ => asked.insert((handover, writes(handover))).1,
        };
        for block in blocks {
            let Some(cell) = shadow.cell_mut(plane, *block) else { continue };
            let before = cell.owner;
            let breach = match (before, owner) {
                (Owner::Handover(of) | Owner::Quarantined(of), Owner::Nobody) => {
                    writes(of).then_some((of, Breach::ReleasedUnderWrite))
                }
                (Owner::Handover(of) | Owner::Quarantined(of), Owner::Handover(now) | Owner::Quarantined(now)) => {
                    (of != now).then_some((now, Breach::ClaimedTwice(before)))
                }
                (Owner::Offer(_), Owner::Handover(now)) => Some((now, Breach::ClaimedTwice(before))),
                (Owner::Handover(of) | Owner::Quarantined(of), Owner::Offer(_)) => {
                    Some((of, Breach::ClaimedTwice(before)))
                }
                (Owner::Nobody | Owner::Offer(_), _) => None,
            };
            cell.content = match owner {
                Owner::Nobody => Content::Nothing,
                Owner::Offer(request) => Content::Of(request),
                Owner::Handover(_) if before != owner => Content::Nothing,
                Owner::Handover(_) | Owner::Quarantined(_) => cell.content,
            };
            (cell.owner, cell.epoch) = (owner, epoch);
            found.extend(breach.map(|(handover, breach)| (handover, *block, breach)));
        }
        self.violations.extend(found.into_iter().map(|(handover, block, breach)| Violation {
            at,
            nic: None,
            handover,
            pool: id,
            plane,
            block,
            breach,
        }));
    }

    /// Somebody says that these blocks hold a request's KV.
    pub(crate) fn delivered(
        &mut self,
        at: u64,
        pool: &Pool,
        plane: u32,
        blocks: &[u32],
        handover: HandoverId,
        request: RequestId,
    ) {
        let Some(shadow) = self.find(pool) else { return };
        let id = shadow.pool;
        let mut found = Vec::new();
        for block in blocks {
            let Some(cell) = shadow.cell(plane, *block) else { continue };
            let breach = match (cell.owner, cell.content) {
                (Owner::Handover(of), Content::Of(now)) if of == handover && now == request => continue,
                (Owner::Handover(of), Content::Nothing) if of == handover => Breach::NothingCame,
                (Owner::Handover(of), _) if of == handover => Breach::WrongContent,
                (owner, _) => Breach::NotItsOwn(owner),
            };
            found.push(Violation { at, nic: None, handover, pool: id, plane, block: *block, breach });
        }
        self.violations.append(&mut found);
    }

    fn find(&mut self, pool: &Pool) -> Option<&mut PoolShadow> {
        let index = *self.by_memory.get(&memory(pool)?)?;
        self.pools.get_mut(index)
    }
}

impl PoolShadow {
    fn cell(&self, plane: u32, block: u32) -> Option<&Cell> {
        self.groups.get(*self.group_of.get(plane as usize)?)?.1.get(block as usize)
    }

    fn cell_mut(&mut self, plane: u32, block: u32) -> Option<&mut Cell> {
        self.groups.get_mut(*self.group_of.get(plane as usize)?)?.1.get_mut(block as usize)
    }
}

impl Content {
    /// Both together.
    fn with(self, other: Content) -> Content {
        match (self, other) {
            (Content::Nothing, other) => other,
            (this, Content::Nothing) => this,
            (Content::Of(this), Content::Of(other)) if this == other => Content::Of(this),
            _ => Content::Garbage,
        }
    }
}

/// What tells pools of one process apart.
fn memory(pool: &Pool) -> Option<usize> {
    pool.regions().iter().find(|region| region.bytes() > 0).map(|region| region.base() as usize)
}

/// The blocks at one end that a part of a program lies in, each with a plane of its layer group; some of them more than once.
fn touched(program: &Program, end: End, part: UnitRange, mut each: impl FnMut(u32, u32)) {
    let mut base = 0u64;
    for segment in &program.segments {
        let side = segment.side(end);
        let tokens = segment.end.saturating_sub(segment.start);
        let units = tokens.saturating_mul(u64::from(segment.planes));
        let (from, to) = (part.start.max(base), part.end.min(base.saturating_add(units)));
        if from < to && side.block_tokens > 0 && side.cp > 0 {
            let (from, last) = (from - base, to - base - 1);
            let (first_row, last_row) = (from / tokens, last / tokens);
            let (head, tail) = (from % tokens, last % tokens);
            let plane = side.plane + first_row as u32 * side.plane_step;
            let table = program.tables(end).get(side.table as usize).and_then(Option::as_deref).unwrap_or_default();
            let slot = |token: u64| {
                let block = (segment.start + token) / u64::from(side.block_tokens) / u64::from(side.cp);
                block.saturating_sub(side.first_block) as usize
            };
            // Rows of one segment share their block table.
            let runs = match last_row - first_row {
                0 => [(head, tail), (1, 0)],
                1 => [(head, tokens - 1), (0, tail)],
                _ => [(0, tokens - 1), (1, 0)],
            };
            for (first, last) in runs.into_iter().filter(|(first, last)| first <= last) {
                let blocks = table.get(slot(first)..=slot(last).min(table.len().saturating_sub(1)));
                blocks.unwrap_or_default().iter().for_each(|block| each(plane, *block));
            }
        }
        base = base.saturating_add(units);
    }
}
