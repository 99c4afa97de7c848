//! Which blocks of a rank are free.

use crate::memory::{Memory, SLICE_BYTES};
use crate::pattern::mix;
use crate::shape::RankShape;

/// The blocks that nobody has, per layer group. A block that comes back is poisoned before it is free.
#[derive(Debug)]
pub(crate) struct Blocks {
    groups: Vec<GroupBlocks>,
    cleaning: Option<Cleaning>,
    random: u64,
}

#[derive(Debug, Default)]
struct GroupBlocks {
    total: u32,
    free: Vec<u32>,
    dirty: Vec<u32>,
    /// Indices into [`RankShape::planes`].
    planes: Vec<usize>,
}

#[derive(Debug)]
struct Cleaning {
    group: usize,
    block: u32,
    planes_done: usize,
}

impl Blocks {
    /// All of them, to be poisoned first.
    pub(crate) fn new(shape: &RankShape, seed: u64) -> Blocks {
        let mut blocks = Blocks { groups: Vec::new(), cleaning: None, random: mix(seed) };
        for (index, group) in shape.groups.iter().enumerate() {
            let planes =
                shape.planes.iter().enumerate().filter(|(_, plane)| plane.group == index).map(|(at, _)| at).collect();
            let mut dirty: Vec<u32> = (0..group.blocks).collect();
            for last in (1..dirty.len()).rev() {
                dirty.swap(last, blocks.draw(last + 1));
            }
            blocks.groups.push(GroupBlocks { total: group.blocks, free: Vec::new(), dirty, planes });
        }
        blocks
    }

    /// Blocks of a layer group, whoever has them.
    pub(crate) fn total(&self, group: usize) -> u32 {
        self.groups.get(group).map_or(0, |group| group.total)
    }

    /// Blocks that can be taken now.
    pub(crate) fn free(&self, group: usize) -> usize {
        self.groups.get(group).map_or(0, |group| group.free.len())
    }

    /// Blocks that nobody has: [`Blocks::clean`] makes all of them free.
    pub(crate) fn unused(&self, group: usize) -> usize {
        let cleaning = self.cleaning.as_ref().is_some_and(|cleaning| cleaning.group == group);
        self.groups.get(group).map_or(0, |group| group.free.len() + group.dirty.len() + usize::from(cleaning))
    }

    /// Takes free blocks, any ones; fewer when there are fewer.
    pub(crate) fn take(&mut self, group: usize, count: usize) -> Vec<u32> {
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count.min(self.free(group)) {
            let chosen = self.draw(self.free(group));
            if let Some(blocks) = self.groups.get_mut(group) {
                taken.push(blocks.free.swap_remove(chosen));
            }
        }
        taken
    }

    /// Takes blocks back, whatever they hold.
    pub(crate) fn give_back(&mut self, group: usize, blocks: impl IntoIterator<Item = u32>) {
        if let Some(group) = self.groups.get_mut(group) {
            group.dirty.extend(blocks);
        }
    }

    /// Whether [`Blocks::clean`] has anything to do.
    pub(crate) fn is_dirty(&self) -> bool {
        self.cleaning.is_some() || self.groups.iter().any(|group| !group.dirty.is_empty())
    }

    /// Poisons blocks that came back: one slice.
    pub(crate) fn clean(&mut self, memory: &mut Memory) {
        self.poison_slice(memory);
        memory.flush();
    }

    fn poison_slice(&mut self, memory: &mut Memory) {
        let mut bytes = 0;
        while bytes < SLICE_BYTES && self.is_dirty() {
            let Some(mut cleaning) = self.cleaning.take().or_else(|| self.next_dirty()) else {
                return;
            };
            let Some(group) = self.groups.get_mut(cleaning.group) else {
                return;
            };
            while bytes < SLICE_BYTES
                && let Some(plane) = group.planes.get(cleaning.planes_done)
            {
                memory.poison(*plane, cleaning.block);
                bytes += memory.block_bytes(*plane).max(1);
                cleaning.planes_done += 1;
            }
            if cleaning.planes_done < group.planes.len() {
                self.cleaning = Some(cleaning);
            } else {
                group.free.push(cleaning.block);
                // Groups without planes have nothing to write, but must not keep this loop for ever either.
                bytes += 64;
            }
        }
    }

    /// Checks that blocks which were poisoned and not taken since still are.
    pub(crate) fn audit(&self, memory: &mut Memory) {
        for group in &self.groups {
            for (block, plane) in
                group.free.iter().flat_map(|block| group.planes.iter().map(move |plane| (*block, *plane)))
            {
                memory.expect_poison(plane, block);
            }
        }
        memory.flush();
    }

    /// Every block that nobody has, with its layer group.
    pub(crate) fn iter_unused(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let lists = self.groups.iter().enumerate();
        let listed =
            lists.flat_map(|(index, group)| group.free.iter().chain(&group.dirty).map(move |block| (index, *block)));
        listed.chain(self.cleaning.iter().map(|cleaning| (cleaning.group, cleaning.block)))
    }

    /// Layer groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    /// From the group that is shortest of free blocks.
    fn next_dirty(&mut self) -> Option<Cleaning> {
        let dirty = self.groups.iter().enumerate().filter(|(_, group)| !group.dirty.is_empty());
        let (group, _) = dirty.min_by_key(|(_, group)| group.free.len())?;
        let block = self.groups.get_mut(group)?.dirty.pop()?;
        Some(Cleaning { group, block, planes_done: 0 })
    }

    /// A number below `below`, or 0.
    fn draw(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.random) % (below.max(1) as u64)) as usize
    }
}

/// Marks who has which block, to find those that nobody knows of.
pub(crate) struct Census {
    seen: Vec<Vec<bool>>,
}

impl Census {
    pub(crate) fn new(blocks: &Blocks) -> Census {
        let mut census =
            Census { seen: (0..blocks.groups()).map(|group| vec![false; blocks.total(group) as usize]).collect() };
        for (group, block) in blocks.iter_unused() {
            census.mark(group, block);
        }
        census
    }

    /// Returns whether it is the first mark of that block.
    pub(crate) fn mark(&mut self, group: usize, block: u32) -> bool {
        let seen = self.seen.get_mut(group).and_then(|group| group.get_mut(block as usize));
        seen.is_some_and(|seen| !std::mem::replace(seen, true))
    }

    /// Blocks without a mark.
    pub(crate) fn unmarked(&self) -> u64 {
        self.seen.iter().flatten().filter(|seen| !**seen).count() as u64
    }
}
