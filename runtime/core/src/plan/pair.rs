//! The plan of one pair of ranks: what does not depend on the request is worked out once.

use core::ops::Range;
use std::sync::Arc;

use super::peers::check;
use super::tables::{BlockTable, Tables};
use crate::Rank;
use crate::geometry::{Extent, GeometryError, GroupGeometry, ModelMismatch, Shard, ShardGroup, ShardTensor};
use crate::limits::{SEGMENTS_MAX, TOKENS_MAX};
use crate::program::{End, Program, Segment, Side};

/// Everything about a source rank and a destination rank that does not depend on a request. Kept per peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairPlan {
    /// Layer groups of the model, with or without pieces.
    groups: Vec<GroupPlan>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct GroupPlan {
    name: String,
    extent: Extent,
    source: Blocks,
    destination: Blocks,
    pieces: Vec<Piece>,
}

/// How one side deals out the tokens of a layer group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocks {
    tokens: u32,
    cp: u32,
    cp_rank: u32,
}

/// Heads of one tensor, or of tensors that lie alike, in layers whose planes are equally far apart on either side.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    /// The model layers, ascending.
    layers: Vec<u32>,
    source: Strides,
    destination: Strides,
    heads: u32,
    run_bytes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Strides {
    plane: u32,
    plane_step: u32,
    offset: u64,
    token_pitch: u64,
    head_pitch: u64,
}

/// What a program is planned from.
#[derive(Clone, Debug)]
pub struct PlanRequest<'a> {
    /// Tokens of the request.
    pub tokens: u64,
    /// How many of the first of them the destination already has.
    pub have: u64,
    /// The model layers of this step.
    pub layers: Range<u32>,
    /// The source rank's blocks, or their shape.
    pub source: &'a Tables,
    /// The destination rank's blocks, or their shape.
    pub destination: &'a Tables,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The models' KV differs.
    #[error(transparent)]
    Model(#[from] ModelMismatch),
    /// One of the geometries is impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A request beyond [`TOKENS_MAX`].
    #[error("the request has {tokens} tokens, at most {TOKENS_MAX} are allowed: refuse it")]
    TooManyTokens {
        /// Its tokens.
        tokens: u64,
    },
    /// Layers are dealt so unevenly that the program would be too long.
    #[error(
        "the program would have {segments} segments, at most {SEGMENTS_MAX} are allowed: give pipeline stages longer layer intervals"
    )]
    TooManySegments {
        /// How many it would have.
        segments: usize,
    },
    /// Not one table per layer group.
    #[error(
        "{end:?}: {have} block tables for {need} layer groups: give one per group, without blocks where the rank holds nothing"
    )]
    TableCount {
        /// At which end.
        end: End,
        /// Tables.
        have: usize,
        /// Layer groups.
        need: usize,
    },
    /// A table that does not start at a block that its rank may start with.
    #[error(
        "{end:?}, group `{group}`: the table starts at token {first_token}, which must be a multiple of {multiple} (0 in a ring): round it down"
    )]
    Misaligned {
        /// At which end.
        end: End,
        /// The layer group.
        group: String,
        /// Where the table starts.
        first_token: u64,
        /// `block_tokens * cp`.
        multiple: u64,
    },
    /// A table that does not cover the tokens.
    #[error(
        "{end:?}, group `{group}`: tokens {}..{} are needed, {blocks} blocks of {block_tokens} tokens from token {first_token} on are there: \
         allocate blocks for all of them",
        needed.start, needed.end
    )]
    TableShort {
        /// At which end.
        end: End,
        /// The layer group.
        group: String,
        /// The tokens that are needed.
        needed: Range<u64>,
        /// Where the table starts.
        first_token: u64,
        /// Blocks in it.
        blocks: u32,
        /// Tokens of a block, times the ranks that share them.
        block_tokens: u64,
    },
}

impl PairPlan {
    /// Plans for two ranks; an error when the models differ or a geometry is impossible.
    pub fn new(
        source: &GroupGeometry,
        source_rank: Rank,
        destination: &GroupGeometry,
        destination_rank: Rank,
    ) -> Result<PairPlan, PlanError> {
        check(source, destination)?;
        let (from, to) = (source.shard_of_valid(source_rank)?, destination.shard_of_valid(destination_rank)?);
        Ok(PairPlan::between(source, &from, &to))
    }

    /// Plans for two shards of groups that have passed [`check`].
    pub(super) fn between(source: &GroupGeometry, from: &Shard, to: &Shard) -> PairPlan {
        let mut groups = Vec::with_capacity(source.model.groups.len());
        for ((model, from_group), to_group) in source.model.groups.iter().zip(&from.groups).zip(&to.groups) {
            let blocks = |shard: &Shard, group: &ShardGroup| Blocks {
                tokens: group.block_tokens,
                cp: shard.cp,
                cp_rank: shard.coords.cp,
            };
            let mut plan = GroupPlan {
                name: model.name.clone(),
                extent: model.extent,
                source: blocks(from, from_group),
                destination: blocks(to, to_group),
                pieces: Vec::new(),
            };
            // State is one token: whoever shares blocks, the first rank has it.
            let state_elsewhere = model.extent == Extent::State && (from.coords.cp > 0 || to.coords.cp > 0);
            if !state_elsewhere && plan.source.meets(&plan.destination) {
                let common = Common::of(&model.layers, from_group, to_group);
                for (tensor, counterpart) in from_group.tensors.iter().zip(&to_group.tensors) {
                    plan.add_tensor(&common, (from_group, tensor), (to_group, counterpart), to.rank);
                }
                plan.join_tensors();
            }
            groups.push(plan);
        }
        PairPlan { groups }
    }

    /// Whether this pair never moves anything.
    pub fn is_empty(&self) -> bool {
        self.groups.iter().all(|group| group.pieces.is_empty())
    }

    /// The copies of one step of one request. Both ends plan the same segments from the same request, whichever blocks each knows.
    pub fn program(&self, request: &PlanRequest<'_>) -> Result<Program, PlanError> {
        if request.tokens > TOKENS_MAX {
            return Err(PlanError::TooManyTokens { tokens: request.tokens });
        }
        let need = self.groups.len();
        for (end, tables) in [(End::Source, request.source), (End::Destination, request.destination)] {
            if tables.groups.len() != need {
                return Err(PlanError::TableCount { end, have: tables.groups.len(), need });
            }
        }
        let mut program = Program { segments: Vec::new(), sources: vec![None; need], destinations: vec![None; need] };
        let tables = request.source.groups.iter().zip(&request.destination.groups);
        let slots = program.sources.iter_mut().zip(&mut program.destinations);
        for (index, ((group, (from, to)), slots)) in self.groups.iter().zip(tables).zip(slots).enumerate() {
            let before = program.segments.len();
            group.plan(index as u32, request, from, to, &mut program.segments)?;
            if program.segments.len() > before {
                *slots.0 = from.blocks.known().map(Arc::clone);
                *slots.1 = to.blocks.known().map(Arc::clone);
            }
        }
        let segments = program.segments.len();
        if segments > SEGMENTS_MAX { Err(PlanError::TooManySegments { segments }) } else { Ok(program) }
    }
}

impl GroupPlan {
    /// Adds the pieces of one tensor: the heads that both ranks hold, in the layers that this replica serves.
    fn add_tensor(
        &mut self,
        common: &[Common],
        (from_group, from): (&ShardGroup, &ShardTensor),
        (to_group, to): (&ShardGroup, &ShardTensor),
        to_rank: Rank,
    ) {
        let heads = from.heads.start.max(to.heads.start)..from.heads.end.min(to.heads.end);
        if heads.is_empty() {
            return;
        }
        let serves = |layer: &&Common| {
            (u64::from(layer.index) + u64::from(to_rank.0)) % u64::from(from.replicas) == u64::from(from.replica)
        };
        let mut run: Vec<Common> = Vec::new();
        let mut step = None;
        let mut runs = Vec::new();
        for layer in common.iter().filter(serves) {
            let here = run.last().map(|last| (layer.source - last.source, layer.destination - last.destination));
            if here.is_some() && step.is_some() && here != step {
                runs.push((std::mem::take(&mut run), step.take()));
            } else {
                step = here;
            }
            run.push(*layer);
        }
        runs.push((run, step));
        for (run, step) in runs {
            let Some(first) = run.first() else { continue };
            let (source_step, destination_step) = step.unwrap_or((1, 1));
            self.pieces.push(Piece {
                layers: run.iter().map(|layer| layer.model).collect(),
                source: Strides::new(from_group, from, first.source, source_step, heads.start),
                destination: Strides::new(to_group, to, first.destination, destination_step, heads.start),
                heads: heads.end - heads.start,
                run_bytes: from.head_bytes,
            });
        }
    }

    /// Makes one piece of tensors that lie alike behind each other in the same planes: interleaved K and V, sections of state.
    fn join_tensors(&mut self) {
        let mut joined: Vec<Piece> = Vec::with_capacity(self.pieces.len());
        for mut piece in std::mem::take(&mut self.pieces) {
            piece.join_heads();
            if !joined.iter_mut().any(|earlier| earlier.join(&piece)) {
                joined.push(piece);
            }
        }
        self.pieces = joined;
    }

    fn plan(
        &self,
        table: u32,
        request: &PlanRequest<'_>,
        from: &BlockTable,
        to: &BlockTable,
        segments: &mut Vec<Segment>,
    ) -> Result<(), PlanError> {
        let needed = self.extent.needed(request.tokens, request.have);
        let moves = |piece: &&Piece| !piece.layers_in(&request.layers).is_empty();
        if needed.is_empty() || !self.pieces.iter().any(|piece| moves(&piece)) {
            return Ok(());
        }
        self.check_table(End::Source, from, &needed)?;
        self.check_table(End::Destination, to, &needed)?;
        for tokens in self.intervals(&needed, from, to) {
            let (first, last) =
                (self.source.first_block(from, tokens.start), self.destination.first_block(to, tokens.start));
            for piece in self.pieces.iter().filter(moves) {
                let layers = piece.layers_in(&request.layers);
                let segment = Segment {
                    source: piece.source.side(layers.start, table, first, self.source),
                    destination: piece.destination.side(layers.start, table, last, self.destination),
                    planes: layers.end - layers.start,
                    start: tokens.start,
                    end: tokens.end,
                    heads: piece.heads,
                    run_bytes: piece.run_bytes,
                };
                // Every piece of these tokens has the same answer.
                if segment.held(segment.start, segment.end) == 0 {
                    break;
                }
                segments.push(segment);
            }
        }
        Ok(())
    }

    /// The needed tokens, cut where a ring starts again.
    fn intervals(&self, needed: &Range<u64>, from: &BlockTable, to: &BlockTable) -> Vec<Range<u64>> {
        let mut cuts = vec![needed.start, needed.end];
        for (blocks, table) in [(self.source, from), (self.destination, to)] {
            if table.ring {
                // At most one: a ring holds all the tokens needed.
                let around = blocks.stride().saturating_mul(u64::from(table.blocks.count()));
                cuts.push((needed.end - 1) / around * around);
            }
        }
        cuts.retain(|cut| (needed.start..=needed.end).contains(cut));
        cuts.sort_unstable();
        cuts.dedup();
        cuts.iter().zip(cuts.iter().skip(1)).map(|(start, end)| *start..*end).collect()
    }

    fn check_table(&self, end: End, table: &BlockTable, needed: &Range<u64>) -> Result<(), PlanError> {
        let blocks = match end {
            End::Source => self.source,
            End::Destination => self.destination,
        };
        let (stride, count) = (blocks.stride(), table.blocks.count());
        if !table.first_token.is_multiple_of(stride) || (table.ring && table.first_token != 0) {
            let (group, first_token) = (self.name.clone(), table.first_token);
            return Err(PlanError::Misaligned { end, group, first_token, multiple: stride });
        }
        let covered = if table.ring {
            needed.end - needed.start <= stride.saturating_mul(u64::from(count))
        } else {
            let first_block = blocks.first_block(table, needed.start);
            let side = blocks.side(first_block);
            side.blocks(needed.start, needed.end)
                .is_none_or(|(first, last)| first >= first_block && last < first_block.saturating_add(u64::from(count)))
        };
        if covered {
            return Ok(());
        }
        Err(PlanError::TableShort {
            end,
            group: self.name.clone(),
            needed: needed.clone(),
            first_token: table.first_token,
            blocks: count,
            block_tokens: stride,
        })
    }
}

impl Blocks {
    /// Tokens from one of this rank's blocks to the next.
    fn stride(&self) -> u64 {
        u64::from(self.tokens) * u64::from(self.cp)
    }

    /// [`Side::first_block`] for tokens from `token` on, none of them beyond a ring's next start.
    fn first_block(&self, table: &BlockTable, token: u64) -> u64 {
        match (table.ring, u64::from(table.blocks.count())) {
            (false, _) | (true, 0) => table.first_token / self.stride(),
            (true, count) => token / self.stride().saturating_mul(count) * count,
        }
    }

    fn side(&self, first_block: u64) -> Side {
        Side {
            plane: 0,
            plane_step: 0,
            table: 0,
            first_block,
            block_tokens: self.tokens,
            cp: self.cp,
            cp_rank: self.cp_rank,
            token_pitch: 0,
            head_pitch: 0,
            offset: 0,
        }
    }

    /// Whether there is any token that both sides hold.
    fn meets(&self, other: &Blocks) -> bool {
        let (mut a, mut b) = (self.stride(), other.stride());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        // The distance between a block of one and a block of the other takes every value that is `apart` modulo `a`.
        let (here, there) =
            (u64::from(self.cp_rank) * u64::from(self.tokens), u64::from(other.cp_rank) * u64::from(other.tokens));
        let apart = (there % a + a - here % a) % a;
        apart < u64::from(self.tokens) || a - apart < u64::from(other.tokens)
    }
}

impl Piece {
    /// Which of its layers are in `range`, as indices.
    fn layers_in(&self, range: &Range<u32>) -> Range<u32> {
        let start = self.layers.partition_point(|layer| *layer < range.start);
        let end = self.layers.partition_point(|layer| *layer < range.end);
        start as u32..end.max(start) as u32
    }

    /// Makes one head of heads that lie behind each other on both sides.
    fn join_heads(&mut self) {
        let run = u64::from(self.run_bytes);
        if self.heads > 1
            && self.source.head_pitch == run
            && self.destination.head_pitch == run
            && let Some(all) = self.run_bytes.checked_mul(self.heads)
        {
            self.run_bytes = all;
            self.heads = 1;
        }
    }

    /// Takes in `next` as further heads where it lies so on both sides.
    fn join(&mut self, next: &Piece) -> bool {
        let alike = self.layers == next.layers && self.run_bytes == next.run_bytes;
        let (Some(heads), true) = (self.heads.checked_add(next.heads), alike) else { return false };
        let source = self.source.pitch_with(self.heads, &next.source, next.heads);
        let destination = self.destination.pitch_with(self.heads, &next.destination, next.heads);
        let (Some(source), Some(destination)) = (source, destination) else { return false };
        self.source.head_pitch = source;
        self.destination.head_pitch = destination;
        self.heads = heads;
        true
    }
}

impl Strides {
    fn new(group: &ShardGroup, tensor: &ShardTensor, layer: u32, step: u32, first_head: u32) -> Self {
        let per_layer = group.planes_per_layer();
        Strides {
            plane: group.first_plane + layer * per_layer + tensor.plane,
            plane_step: step * per_layer,
            offset: tensor.offset + u64::from(first_head - tensor.heads.start) * tensor.head_pitch,
            token_pitch: tensor.token_pitch,
            head_pitch: tensor.head_pitch,
        }
    }

    /// The head pitch at which `next_heads` heads of `next` continue these `heads` heads, if there is one.
    fn pitch_with(&self, heads: u32, next: &Strides, next_heads: u32) -> Option<u64> {
        let together =
            (self.plane, self.plane_step, self.token_pitch) == (next.plane, next.plane_step, next.token_pitch);
        let pitch = match (heads, next_heads) {
            (1, 1) => next.offset.checked_sub(self.offset)?,
            (1, _) => next.head_pitch,
            _ => self.head_pitch,
        };
        let continues = next.offset.checked_sub(self.offset) == pitch.checked_mul(u64::from(heads));
        (together && continues && (next_heads == 1 || next.head_pitch == pitch)).then_some(pitch)
    }

    fn side(&self, skip: u32, table: u32, first_block: u64, blocks: Blocks) -> Side {
        Side {
            plane: self.plane + skip * self.plane_step,
            plane_step: self.plane_step,
            table,
            token_pitch: self.token_pitch,
            head_pitch: self.head_pitch,
            offset: self.offset,
            ..blocks.side(first_block)
        }
    }
}

/// A layer that both ranks hold.
#[derive(Clone, Copy, Debug)]
struct Common {
    model: u32,
    /// Its index in the layer group, by which replicas share the work.
    index: u32,
    /// How many layers of the group the source holds before it.
    source: u32,
    /// The same at the destination.
    destination: u32,
}

impl Common {
    fn of(layers: &[u32], from: &ShardGroup, to: &ShardGroup) -> Vec<Common> {
        let position = |held: &[u32], layer: u32| held.binary_search(&layer).ok().map(|position| position as u32);
        let common = layers.iter().zip(0..).filter_map(|(layer, index)| {
            let (source, destination) = (position(&from.layers, *layer)?, position(&to.layers, *layer)?);
            Some(Common { model: *layer, index, source, destination })
        });
        common.collect()
    }
}
