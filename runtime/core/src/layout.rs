//! Where the blocks of a pool lie: exchanged once, at the handshake, apart from programs.

use serde::{Deserialize, Serialize};

use crate::Location;
use crate::limits::{BLOCKS_MAX, PLANES_MAX, REGIONS_MAX};

/// The planes of one rank's pool. A plane holds, for one layer, one tensor (K and V separate) or several (interleaved, state).
///
/// Programs name plane indices and block numbers; every NIC resolves its own addresses and keys from this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolLayout {
    /// Bytes of each allocation.
    pub regions: Vec<u64>,
    /// The planes, in the order that [`Shard`](crate::Shard) gives them.
    pub planes: Vec<Plane>,
}

/// `blocks` blocks of `block_bytes` bytes, block `b` at `offset + b * block_stride` in `region`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plane {
    /// Index into [`PoolLayout::regions`].
    pub region: u32,
    /// Bytes from the region's start to block 0.
    pub offset: u64,
    /// Blocks in this plane.
    pub blocks: u32,
    /// Bytes from one block's start to the next.
    pub block_stride: u64,
    /// Bytes of a block that belong to this plane; at most `block_stride`.
    pub block_bytes: u64,
}

/// Why a layout describes no pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// More of something than [`crate::limits`] allows.
    #[error("the layout has {value} {what}, at most {limit} are allowed: use a smaller pool or several nodes")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much of it.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A plane names a region that is not there.
    #[error("plane {plane} lies in region {region}, but there are {regions}: list every allocation")]
    NoSuchRegion {
        /// Index of the plane.
        plane: usize,
        /// The region that it names.
        region: u32,
        /// Regions of the layout.
        regions: usize,
    },
    /// Blocks of a plane overlap.
    #[error(
        "plane {plane}: blocks of {block_bytes} bytes stand {block_stride} bytes apart: the stride must not be smaller"
    )]
    StrideTooSmall {
        /// Index of the plane.
        plane: usize,
        /// Bytes from block to block.
        block_stride: u64,
        /// Bytes of a block.
        block_bytes: u64,
    },
    /// A plane ends behind its region, or its end is no 64-bit number.
    #[error(
        "plane {plane} needs {needed} bytes of region {region}, which has {bytes}: allocate more or use fewer blocks"
    )]
    OutsideRegion {
        /// Index of the plane.
        plane: usize,
        /// Its region.
        region: u32,
        /// Bytes up to the plane's end, `u64::MAX` when that overflows.
        needed: u64,
        /// Bytes of the region.
        bytes: u64,
    },
    /// The regions together have more bytes than a 64-bit number counts.
    #[error("the regions together exceed 2^64 bytes: no machine has them, check the sizes")]
    Overflow,
}

impl PoolLayout {
    /// Checks that every block of every plane lies inside its region and that all is within [`crate::limits`].
    pub fn validate(&self) -> Result<(), LayoutError> {
        let at_most = |what, value: u64, limit: u64| {
            if value > limit { Err(LayoutError::TooMany { what, value, limit }) } else { Ok(()) }
        };
        at_most("regions", self.regions.len() as u64, REGIONS_MAX as u64)?;
        at_most("planes", self.planes.len() as u64, PLANES_MAX as u64)?;
        self.regions.iter().try_fold(0u64, |sum, bytes| sum.checked_add(*bytes)).ok_or(LayoutError::Overflow)?;
        for (index, plane) in self.planes.iter().enumerate() {
            at_most("blocks in a plane", u64::from(plane.blocks), u64::from(BLOCKS_MAX))?;
            let Some(&bytes) = self.regions.get(plane.region as usize) else {
                let regions = self.regions.len();
                return Err(LayoutError::NoSuchRegion { plane: index, region: plane.region, regions });
            };
            if plane.block_stride < plane.block_bytes {
                let Plane { block_stride, block_bytes, .. } = *plane;
                return Err(LayoutError::StrideTooSmall { plane: index, block_stride, block_bytes });
            }
            let needed = plane.end().unwrap_or(u64::MAX);
            if plane.end().is_none() || needed > bytes {
                return Err(LayoutError::OutsideRegion { plane: index, region: plane.region, needed, bytes });
            }
        }
        Ok(())
    }

    /// Where block `block` of plane `plane` starts; `None` when there is no such block.
    pub fn locate(&self, plane: u32, block: u32) -> Option<Location> {
        let plane = self.planes.get(plane as usize)?;
        if block >= plane.blocks {
            return None;
        }
        let offset = plane.offset.checked_add(u64::from(block).checked_mul(plane.block_stride)?)?;
        Some(Location { region: plane.region, offset })
    }

    /// Bytes of all regions together.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().copied().fold(0, u64::saturating_add)
    }
}

impl Plane {
    /// Bytes from the region's start to the end of the last block; `None` when that is no 64-bit number.
    fn end(&self) -> Option<u64> {
        let Some(last) = self.blocks.checked_sub(1) else { return Some(self.offset) };
        self.offset.checked_add(u64::from(last).checked_mul(self.block_stride)?)?.checked_add(self.block_bytes)
    }
}
