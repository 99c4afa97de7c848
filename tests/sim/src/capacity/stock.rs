//! The blocks of a rank without memory: how many there are, and which prefixes they hold.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::{BlockTable, GroupGeometry, Rank, TableShape, Tables};

/// Blocks per layer group; with a prefix cache, in which whole stripes of a prefix stay until their blocks are needed.
pub(super) struct Stock {
    free: Vec<Free>,
    /// Blocks of a stripe; 0 when prefixes are not kept.
    stripe_blocks: usize,
    stripes: BTreeMap<u64, Stripe>,
    /// Stripes that nobody uses, the least recently used first; of one prefix the last first.
    idle: BTreeSet<(u64, usize, u64)>,
    uses: u64,
}

/// Free blocks of one layer group.
struct Free {
    /// Blocks from this one on were never used: thousands of ranks need no list of theirs.
    unused: std::ops::Range<u32>,
    returned: Vec<u32>,
}

impl Free {
    fn len(&self) -> usize {
        self.unused.len() + self.returned.len()
    }

    /// Takes so many, as far as there are any; the last that came back go first.
    fn take(&mut self, count: usize) -> Vec<u32> {
        let mut taken = self.returned.split_off(self.returned.len().saturating_sub(count));
        let fresh = (count - taken.len()).min(self.unused.len()) as u32;
        taken.extend(self.unused.start..self.unused.start + fresh);
        self.unused.start += fresh;
        taken
    }
}

struct Stripe {
    blocks: Vec<Vec<u32>>,
    users: u32,
    rank: (u64, usize),
}

/// The blocks of one request.
pub(super) struct Holding {
    shapes: Vec<TableShape>,
    blocks: Vec<Vec<u32>>,
    /// Stripes at its start that belong to the cache.
    shared: Vec<u64>,
}

impl Stock {
    /// All free. `stripe_blocks` is how many blocks hold the tokens of one prefix hash, 0 to keep no prefixes.
    pub(super) fn new(blocks: &[u32], stripe_blocks: usize) -> Self {
        Stock {
            free: blocks.iter().map(|blocks| Free { unused: 0..*blocks, returned: Vec::new() }).collect(),
            stripe_blocks,
            stripes: BTreeMap::new(),
            idle: BTreeSet::new(),
            uses: 0,
        }
    }

    /// Blocks for a request of `tokens` tokens, of which the first stripes of `prefix` may be held already, except the last of them that
    /// would leave nothing to fetch. `None` when there is no room now; stripes that had to go are added to `evicted`.
    pub(super) fn take(
        &mut self,
        geometry: &GroupGeometry,
        rank: Rank,
        tokens: u64,
        prefix: &[u64],
        evicted: &mut Vec<u64>,
    ) -> Option<Holding> {
        let shapes: Vec<TableShape> =
            (0..self.free.len()).map(|group| geometry.blocks_for(group, tokens, rank)).collect();
        let whole = self.whole_stripes(&shapes, prefix.len());
        let held = prefix.iter().take(whole).take_while(|hash| self.stripes.contains_key(hash)).count();
        let shared = prefix.get(..held).unwrap_or_default().to_vec();
        self.uses += 1;
        for (index, hash) in shared.iter().enumerate() {
            self.pin(*hash, index);
        }
        let need = |shape: &TableShape| (shape.blocks as usize).saturating_sub(held * self.stripe_blocks);
        let needs: Vec<usize> = shapes.iter().map(need).collect();
        while needs.iter().zip(&self.free).any(|(need, free)| *need > free.len()) {
            let Some((_, _, hash)) = self.idle.pop_first() else {
                self.unpin(&shared);
                return None;
            };
            if let Some(stripe) = self.stripes.remove(&hash) {
                self.put_back(stripe.blocks);
            }
            evicted.push(hash);
        }
        let blocks = needs.iter().zip(&mut self.free).map(|(need, free)| free.take(*need)).collect();
        Some(Holding { shapes, blocks, shared })
    }

    /// Lets a request's blocks go; the stripes that they hold of `prefix` stay for others. Says which are new.
    pub(super) fn give_back(&mut self, holding: Holding, prefix: &[u64]) -> Vec<u64> {
        let Holding { shapes, mut blocks, shared } = holding;
        let (whole, size) = (self.whole_stripes(&shapes, prefix.len()), self.stripe_blocks);
        self.unpin(&shared);
        self.uses += 1;
        let mut added = Vec::new();
        for (index, hash) in prefix.iter().enumerate().take(whole).skip(shared.len()) {
            let mine = blocks.iter_mut().map(|blocks| blocks.drain(..size.min(blocks.len())).collect()).collect();
            if self.stripes.contains_key(hash) {
                self.put_back(mine);
                continue;
            }
            let rank = (self.uses, usize::MAX - index);
            self.stripes.insert(*hash, Stripe { blocks: mine, users: 0, rank });
            self.idle.insert((rank.0, rank.1, *hash));
            added.push(*hash);
        }
        self.put_back(blocks);
        added
    }

    fn whole_stripes(&self, shapes: &[TableShape], hashes: usize) -> usize {
        let size = self.stripe_blocks;
        let fits = shapes.iter().map(|shape| (shape.blocks as usize).saturating_sub(1).checked_div(size).unwrap_or(0));
        fits.min().unwrap_or(0).min(hashes)
    }

    fn pin(&mut self, hash: u64, index: usize) {
        if let Some(stripe) = self.stripes.get_mut(&hash) {
            self.idle.remove(&(stripe.rank.0, stripe.rank.1, hash));
            (stripe.users, stripe.rank) = (stripe.users + 1, (self.uses, usize::MAX - index));
        }
    }

    fn unpin(&mut self, hashes: &[u64]) {
        for hash in hashes {
            if let Some(stripe) = self.stripes.get_mut(hash) {
                stripe.users = stripe.users.saturating_sub(1);
                if stripe.users == 0 {
                    self.idle.insert((stripe.rank.0, stripe.rank.1, *hash));
                }
            }
        }
    }

    fn put_back(&mut self, blocks: Vec<Vec<u32>>) {
        for (free, mut blocks) in self.free.iter_mut().zip(blocks) {
            free.returned.append(&mut blocks);
        }
    }

    /// The tables of a request.
    pub(super) fn tables(&self, holding: &Holding) -> Tables {
        let tables = holding.blocks.iter().zip(&holding.shapes).enumerate().map(|(group, (own, shape))| {
            let stripes = holding.shared.iter().filter_map(|hash| self.stripes.get(hash)?.blocks.get(group));
            let blocks: Vec<u32> = stripes.flatten().chain(own).copied().collect();
            BlockTable::known(shape.first_token, blocks)
        });
        Tables { groups: tables.collect() }
    }
}

impl Holding {
    /// How many stripes of its prefix were there already.
    pub(super) fn shared_stripes(&self) -> usize {
        self.shared.len()
    }
}

#[cfg(test)]
mod tests {
    use kvferry_core::{Format, Model, Parallel};

    use super::*;

    fn geometry() -> GroupGeometry {
        let model = Model::preset("tiny").expect("a preset");
        GroupGeometry { model, format: Format { block_tokens: 16, ..Format::default() }, parallel: Parallel::default() }
    }

    fn count(stock: &Stock) -> usize {
        stock.free[0].len() + stock.stripes.values().map(|stripe| stripe.blocks[0].len()).sum::<usize>()
    }

    #[test]
    fn prefixes_are_kept_until_room_is_needed() {
        let (geometry, mut gone) = (geometry(), Vec::new());
        let mut stock = Stock::new(&[10], 2);
        // Five blocks: two stripes of two, and a rest.
        let first = stock.take(&geometry, Rank(0), 80, &[1, 2, 3], &mut gone).expect("room");
        assert_eq!((first.shared_stripes(), stock.tables(&first).groups[0].blocks.count()), (0, 5));
        assert_eq!(stock.give_back(first, &[1, 2, 3]), [1, 2], "the third is not whole");
        let second = stock.take(&geometry, Rank(0), 80, &[1, 2, 9], &mut gone).expect("room");
        assert_eq!((second.shared_stripes(), stock.tables(&second).groups[0].blocks.count()), (2, 5));
        // What is used stays; there is no room for six more.
        assert!(stock.take(&geometry, Rank(0), 96, &[7], &mut gone).is_none());
        let third = stock.take(&geometry, Rank(0), 80, &[7], &mut gone).expect("room");
        assert!(gone.is_empty(), "nothing was idle");
        assert!(stock.give_back(second, &[1, 2, 9]).is_empty());
        assert_eq!(stock.give_back(third, &[7]), [7]);
        assert_eq!(count(&stock), 10);
        // The end of a prefix goes before its beginning.
        let large = stock.take(&geometry, Rank(0), 16 * 6, &[], &mut gone).expect("room");
        assert_eq!(gone, [2]);
        assert!(stock.give_back(large, &[]).is_empty());
        assert_eq!(count(&stock), 10);
    }
}
