//! Huge units cut into smaller ones, so that a few of them can be shared out.

use super::{Program, Segment};
use crate::limits::{SEGMENT_PLANES_MAX, SEGMENTS_MAX};

impl Program {
    /// Bytes of the largest (plane, token) unit.
    pub fn unit_bytes_max(&self) -> u64 {
        self.segments.iter().map(unit_bytes).max().unwrap_or(0)
    }

    /// The same copies in another order: no unit has more than `bytes_max` bytes (at least 1). Units are cut between heads, and inside a head
    /// only where one alone is larger. Where that would take more segments than a program may have, it stays as it is.
    pub fn with_units_up_to(&self, bytes_max: u64) -> Program {
        let bytes_max = bytes_max.max(1);
        let parts = |segment: &Segment| {
            let (run, heads) = (u64::from(segment.run_bytes), u64::from(segment.heads));
            match unit_bytes(segment) {
                bytes if bytes <= bytes_max => 1,
                _ if run <= bytes_max => heads.div_ceil(bytes_max / run.max(1)),
                _ => heads.saturating_mul(run.div_ceil(bytes_max)),
            }
        };
        let planes = |segment: &Segment| parts(segment).saturating_mul(u64::from(segment.planes));
        let segments = self.segments.iter().map(parts).fold(0, u64::saturating_add);
        let all_planes = self.segments.iter().map(planes).fold(0, u64::saturating_add);
        if segments > SEGMENTS_MAX as u64 || all_planes > SEGMENT_PLANES_MAX {
            return self.clone();
        }
        let cut = |segment: &Segment| cut(segment, bytes_max);
        Program { segments: self.segments.iter().flat_map(cut).collect(), ..self.clone() }
    }
}

fn unit_bytes(segment: &Segment) -> u64 {
    u64::from(segment.heads) * u64::from(segment.run_bytes)
}

fn cut(segment: &Segment, bytes_max: u64) -> Vec<Segment> {
    let run = u64::from(segment.run_bytes);
    if unit_bytes(segment) <= bytes_max || run == 0 {
        return vec![*segment];
    }
    let heads_each = u32::try_from(bytes_max / run).unwrap_or(u32::MAX).max(1);
    let bytes_each = u32::try_from(bytes_max).unwrap_or(u32::MAX).min(segment.run_bytes);
    let mut parts = Vec::new();
    for head in (0..segment.heads).step_by(heads_each as usize) {
        for byte in (0..segment.run_bytes).step_by(bytes_each as usize) {
            let mut part = *segment;
            part.heads = heads_each.min(segment.heads - head);
            part.run_bytes = bytes_each.min(segment.run_bytes - byte);
            for side in [&mut part.source, &mut part.destination] {
                let first = side.head_pitch.saturating_mul(u64::from(head)).saturating_add(u64::from(byte));
                side.offset = side.offset.saturating_add(first);
            }
            parts.push(part);
        }
    }
    parts
}
