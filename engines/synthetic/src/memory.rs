//! Fills, compares and poisons blocks.

use kvferry_core::protocol::RequestSpec;
use kvferry_transport::{Pool, PoolError};

use crate::EngineReport;
use crate::pattern::{Place, request_key, token_key, token_seed, write_run};
use crate::shape::RankShape;
use crate::table::Unit;

/// What every byte holds that holds no KV.
pub(crate) const POISON: u8 = 0xdb;

/// Bytes that one slice of work touches, about.
pub(crate) const SLICE_BYTES: usize = 4 << 20;

/// A rank's pool with its shape, and what was found in it.
pub(crate) struct Memory {
    pool: Pool,
    shape: RankShape,
    found: Found,
    expected: Vec<u8>,
    actual: Vec<u8>,
    poison: Vec<u8>,
    seeds: Vec<u64>,
}

#[derive(Clone, Debug, Default)]
struct Found {
    filled_bytes: u64,
    verified_bytes: u64,
    reused_bytes: u64,
    mismatched_bytes: u64,
    stray_bytes: u64,
    first_mismatch: Option<String>,
}

impl Memory {
    pub(crate) fn new(pool: Pool, shape: RankShape) -> Memory {
        let most = shape.planes.iter().map(|plane| plane.block_bytes).max().unwrap_or(0);
        let found = Found::default();
        Memory {
            pool,
            shape,
            found,
            expected: vec![0; most],
            actual: vec![0; most],
            poison: vec![POISON; most],
            seeds: Vec::new(),
        }
    }

    pub(crate) fn shape(&self) -> &RankShape {
        &self.shape
    }

    /// Bytes of a block in a plane.
    pub(crate) fn block_bytes(&self, plane: usize) -> usize {
        self.shape.planes.get(plane).map_or(0, |plane| plane.block_bytes)
    }

    /// Writes a request's KV into a poisoned block; where the request has no token, the poison stays.
    pub(crate) fn fill(&mut self, unit: Unit, spec: &RequestSpec) {
        self.expect_poison(unit.plane, unit.block);
        let (bytes, _) = self.build(unit, spec, 0);
        self.found.filled_bytes += bytes;
        let Some(plane) = self.shape.planes.get(unit.plane) else {
            return;
        };
        let image = self.expected.get(..plane.block_bytes).unwrap_or_default();
        if let Err(error) = self.pool.write(plane.number, unit.block, 0, image) {
            self.unreachable(unit.plane, &error);
        }
    }

    /// Compares a block with what it has to hold: the request's KV, and poison where the request has no token. Tokens before `have`
    /// were there before the handover. Returns whether all is right.
    pub(crate) fn verify(&mut self, unit: Unit, spec: &RequestSpec, have: u64) -> bool {
        let (fresh, reused) = self.build(unit, spec, have);
        self.found.verified_bytes += fresh;
        self.found.reused_bytes += reused;
        if !self.load(unit.plane, unit.block) {
            return false;
        }
        let Some(plane) = self.shape.planes.get(unit.plane) else {
            return false;
        };
        let expected = self.expected.get(..plane.block_bytes).unwrap_or_default();
        let actual = self.actual.get(..plane.block_bytes).unwrap_or_default();
        if expected == actual {
            return true;
        }
        let Some(group) = self.shape.groups.get(plane.group) else {
            return false;
        };
        let (kept, tokens) = (group.kept(spec.tokens), group.tokens_of(unit.own_block));
        for (offset, (want, is)) in expected.iter().zip(actual).enumerate().filter(|(_, (want, is))| want != is) {
            let at = plane.find(offset);
            let token = at.map_or(u64::MAX, |(_, token, _, _)| tokens.start.saturating_add(token as u64));
            let stray = !kept.contains(&token);
            self.found.mismatched_bytes += 1;
            self.found.stray_bytes += u64::from(stray);
            if self.found.first_mismatch.is_none() {
                let place = match at {
                    Some((section, _, head, byte)) => {
                        format!("tensor {}, head {head}, token {token}, byte {byte}", section.tensor)
                    }
                    None => "outside every tensor".to_owned(),
                };
                let what = if stray { "padding" } else { "KV" };
                self.found.first_mismatch = Some(format!(
                    "{}: {what} of group `{}`, layer {}, {place} (plane {}, block {}, offset {offset}) is {is:#04x}, not {want:#04x}",
                    spec.request, group.name, plane.layer, plane.number, unit.block
                ));
            }
        }
        false
    }

    /// Checks that nobody has written a block that holds nothing, and makes it so again.
    pub(crate) fn expect_poison(&mut self, plane: usize, block: u32) {
        if !self.load(plane, block) {
            return;
        }
        let Some(shape) = self.shape.planes.get(plane) else {
            return;
        };
        let actual = self.actual.get(..shape.block_bytes).unwrap_or_default();
        if self.poison.get(..shape.block_bytes).unwrap_or_default() == actual {
            return;
        }
        let wrong = actual.iter().filter(|byte| **byte != POISON).count() as u64;
        self.found.mismatched_bytes += wrong;
        self.found.stray_bytes += wrong;
        if self.found.first_mismatch.is_none() {
            let offset = actual.iter().position(|byte| *byte != POISON).unwrap_or(0);
            let (layer, number) = (shape.layer, shape.number);
            self.found.first_mismatch = Some(format!(
                "a block that held nothing was written: layer {layer}, plane {number}, block {block}, offset {offset}"
            ));
        }
        self.poison(plane, block);
    }

    /// Makes a block hold nothing.
    pub(crate) fn poison(&mut self, plane: usize, block: u32) {
        let Some(shape) = self.shape.planes.get(plane) else {
            return;
        };
        if let Err(error) = self.pool.fill(shape.number, block, POISON) {
            self.unreachable(plane, &error);
        }
    }

    /// Adds what was found to a report.
    pub(crate) fn report(&self, report: &mut EngineReport) {
        let Found { filled_bytes, verified_bytes, reused_bytes, mismatched_bytes, stray_bytes, first_mismatch } =
            self.found.clone();
        *report = EngineReport {
            filled_bytes,
            verified_bytes,
            reused_bytes,
            mismatched_bytes,
            stray_bytes,
            first_mismatch,
            ..std::mem::take(report)
        };
    }

    /// Builds what a block has to hold in `expected`. Returns the bytes of KV in it: of tokens from `have` on, and of those before.
    /// Only groups that keep all tokens have any before.
    fn build(&mut self, unit: Unit, spec: &RequestSpec, have: u64) -> (u64, u64) {
        let Some(plane) = self.shape.planes.get(unit.plane) else {
            return (0, 0);
        };
        let Some(group) = self.shape.groups.get(plane.group) else {
            return (0, 0);
        };
        let (tokens, kept) = (group.tokens_of(unit.own_block), group.kept(spec.tokens));
        let valid = tokens.start.max(kept.start)..tokens.end.min(kept.end);
        if let Some(image) = self.expected.get_mut(..plane.block_bytes) {
            image.fill(POISON);
        }
        self.seeds.clear();
        if group.is_state() {
            self.seeds.extend(valid.clone().map(|token| token_seed(request_key(spec), token)));
        } else {
            self.seeds.extend(valid.clone().map(|token| token_seed(token_key(spec, token), token)));
        }
        let first = valid.start.saturating_sub(tokens.start) as usize;
        for section in &plane.sections {
            for (index, head) in section.heads.clone().enumerate() {
                let place = Place { group: plane.group, layer: plane.layer, tensor: section.tensor, head };
                for (token, seed) in self.seeds.iter().enumerate() {
                    let start = plane.offset(section, first + token, index);
                    if let Some(run) = self.expected.get_mut(start..start + section.run_bytes) {
                        write_run(run, *seed, place);
                    }
                }
            }
        }
        let count = valid.end.saturating_sub(valid.start);
        let before =
            if group.is_full() { have.clamp(valid.start, valid.end.max(valid.start)) - valid.start } else { 0 };
        ((count - before) * plane.token_bytes(), before * plane.token_bytes())
    }

    /// Copies a block to `actual`.
    fn load(&mut self, plane: usize, block: u32) -> bool {
        let Some(shape) = self.shape.planes.get(plane) else {
            return false;
        };
        let Some(into) = self.actual.get_mut(..shape.block_bytes) else {
            return false;
        };
        match self.pool.read(shape.number, block, 0, into) {
            Ok(()) => true,
            Err(error) => {
                self.unreachable(plane, &error);
                false
            }
        }
    }

    /// A block that cannot be reached counts as wrong as a whole.
    fn unreachable(&mut self, plane: usize, error: &PoolError) {
        self.found.mismatched_bytes += self.block_bytes(plane) as u64;
        self.found.first_mismatch.get_or_insert_with(|| error.to_string());
    }
}
