//! Fills, compares and poisons blocks.

use kvferry_core::protocol::RequestSpec;
use kvferry_transport::{KnownBlocks, KnownRun, Pool, PoolError, write_known};

use crate::EngineReport;
use crate::pattern::{Place, request_key, run_state, token_key, token_seed};
use crate::shape::RankShape;
use crate::table::Unit;

/// What every byte holds that holds no KV.
pub(crate) const POISON: u8 = 0xdb;

/// Bytes that one slice of work touches, about.
pub(crate) const SLICE_BYTES: usize = 4 << 20;

/// Blocks that a device is asked at once whether they hold nothing.
const CHECKS_MAX: usize = 4096;

/// A rank's pool with its shape, and what was found in it.
///
/// What is on a device is written and compared there, many blocks at once: until [`Memory::flush`], nothing of it is done.
pub(crate) struct Memory {
    pool: Pool,
    shape: RankShape,
    found: Found,
    expected: Vec<u8>,
    actual: Vec<u8>,
    poison: Vec<u8>,
    seeds: Vec<u64>,
    runs: Vec<KnownRun>,
    device: Option<Device>,
}

/// What a device has yet to do: first to compare, then to write.
#[derive(Default)]
struct Device {
    checks: KnownBlocks,
    /// What is compared, and for whom; for nobody where it is to hold nothing.
    checked: Vec<(Unit, Option<(RequestSpec, u64)>)>,
    writes: KnownBlocks,
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
            runs: Vec::new(),
            device: None,
        }
        .on_device()
    }

    fn on_device(mut self) -> Memory {
        self.device = self.pool.device().map(|_| Device::default());
        self
    }

    /// Has the device do what is left, and says whether every block that was to be compared with a request's KV since the last time was right.
    pub(crate) fn flush(&mut self) -> bool {
        let Some(Device { checks, checked, writes }) = self.device.as_mut().map(std::mem::take) else { return true };
        let mut right = true;
        match self.pool.count_unknown(&checks) {
            Ok(counts) => {
                for ((unit, due), _) in checked.into_iter().zip(counts).filter(|(_, wrong)| *wrong > 0) {
                    right &= due.is_none();
                    self.look_closer(unit, due);
                }
            }
            Err(error) => {
                right &= checked.iter().all(|(_, due)| due.is_none());
                checked.iter().for_each(|(unit, _)| self.unreachable(unit.plane, &error));
            }
        }
        if let Err(error) = self.pool.write_known(&writes) {
            self.unreachable(0, &error);
        }
        right
    }

    /// Finds what is wrong with a block of which a device says that something is.
    fn look_closer(&mut self, unit: Unit, due: Option<(RequestSpec, u64)>) {
        let before = self.found.mismatched_bytes;
        match due {
            Some((spec, have)) => {
                self.build(unit, &spec, have);
                self.compare(unit, &spec);
            }
            None => self.expect_poison_here(unit.plane, unit.block),
        }
        if self.found.mismatched_bytes == before {
            self.found.mismatched_bytes += 1;
            self.found.first_mismatch.get_or_insert_with(|| {
                format!(
                    "plane {}, block {}: its device finds wrong bytes that the host does not",
                    unit.plane, unit.block
                )
            });
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
        if let Some(device) = &mut self.device {
            return device.writes.push(plane.number, unit.block, POISON, self.runs.drain(..));
        }
        let image = image(&mut self.expected, plane.block_bytes, &self.runs);
        if let Err(error) = self.pool.write(plane.number, unit.block, 0, image) {
            self.unreachable(unit.plane, &error);
        }
    }

    /// Compares a block with what it has to hold: the request's KV, and poison where the request has no token. Tokens before `have`
    /// were there before the handover. Returns whether all is right; of what is on a device, [`Memory::flush`] does.
    pub(crate) fn verify(&mut self, unit: Unit, spec: &RequestSpec, have: u64) -> bool {
        let (fresh, reused) = self.build(unit, spec, have);
        self.found.verified_bytes += fresh;
        self.found.reused_bytes += reused;
        if let (Some(device), Some(plane)) = (&mut self.device, self.shape.planes.get(unit.plane)) {
            device.checks.push(plane.number, unit.block, POISON, self.runs.drain(..));
            device.checked.push((unit, Some((spec.clone(), have))));
            return true;
        }
        self.compare(unit, spec)
    }

    /// Compares a block with what was [built](Memory::build) for it, on the host.
    fn compare(&mut self, unit: Unit, spec: &RequestSpec) -> bool {
        if !self.load(unit.plane, unit.block) {
            return false;
        }
        let Some(plane) = self.shape.planes.get(unit.plane) else {
            return false;
        };
        let expected = image(&mut self.expected, plane.block_bytes, &self.runs);
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
        if let (Some(device), Some(shape)) = (&mut self.device, self.shape.planes.get(plane)) {
            device.checks.push(shape.number, block, POISON, []);
            device.checked.push((Unit { plane, block, own_block: 0 }, None));
            if device.checked.len() >= CHECKS_MAX {
                self.flush();
            }
            return;
        }
        self.expect_poison_here(plane, block);
    }

    /// The same, on the host.
    fn expect_poison_here(&mut self, plane: usize, block: u32) {
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
        if let Some(device) = &mut self.device {
            return device.writes.push(shape.number, block, POISON, []);
        }
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

    /// Finds what a block has to hold besides poison: `runs`. Returns the bytes of KV in it: of tokens from `have` on, and of those before.
    /// Only groups that keep all tokens have any before.
    fn build(&mut self, unit: Unit, spec: &RequestSpec, have: u64) -> (u64, u64) {
        self.runs.clear();
        let Some(plane) = self.shape.planes.get(unit.plane) else {
            return (0, 0);
        };
        let Some(group) = self.shape.groups.get(plane.group) else {
            return (0, 0);
        };
        let (tokens, kept) = (group.tokens_of(unit.own_block), group.kept(spec.tokens));
        let valid = tokens.start.max(kept.start)..tokens.end.min(kept.end);
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
                    let (state, bytes) = (run_state(*seed, place), section.run_bytes as u32);
                    self.runs.push(KnownRun { state, offset: start as u32, bytes });
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

/// The bytes of a block that holds these runs, built in `room`.
fn image<'a>(room: &'a mut [u8], bytes: usize, runs: &[KnownRun]) -> &'a [u8] {
    let Some(image) = room.get_mut(..bytes) else { return &[] };
    image.fill(POISON);
    for run in runs {
        let start = run.offset as usize;
        if let Some(part) = image.get_mut(start..start + run.bytes as usize) {
            write_known(part, run.state);
        }
    }
    image
}
