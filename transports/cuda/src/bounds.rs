//! Whether what a peer says of its memory stays inside memory that is really there. The peer's numbers are any numbers.

/// Where a region of `bytes` begins that lies `offset` bytes behind `address`, if all of it lies in the allocation `(base, length)` around that
/// address, as the driver knows it.
pub(crate) fn placed(address: u64, offset: u64, bytes: u64, (base, length): (u64, u64)) -> Result<u64, String> {
    let outside = || {
        format!(
            "its region needs {bytes} bytes from byte {offset} on of an allocation that has {length}; share the pool anew"
        )
    };
    let start = address.checked_add(offset).ok_or_else(outside)?;
    let (end, limit) = (start.checked_add(bytes), base.checked_add(length));
    match (end, limit) {
        (Some(end), Some(limit)) if start >= base && end <= limit => Ok(start),
        _ => Err(outside()),
    }
}

/// The sum of pieces' lengths, if a region of `bytes` that begins `offset` bytes behind their start fits them.
pub(crate) fn total(pieces: impl IntoIterator<Item = u64>, offset: u64, bytes: u64) -> Result<u64, String> {
    let total = pieces.into_iter().try_fold(0u64, u64::checked_add);
    let end = offset.checked_add(bytes);
    match (total, end) {
        (Some(total), Some(end)) if end <= total => Ok(total),
        _ => Err("its region is longer than the memory that it shared".to_owned()),
    }
}

/// Whether regions as long as a layout asks lie in memory whose regions have these lengths.
pub(crate) fn fits(asked: &[u64], there: &[u64]) -> bool {
    asked.len() == there.len() && asked.iter().zip(there).all(|(asked, there)| asked <= there)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_region_stays_in_its_allocation() {
        let allocation = (0x7000_0000, 4 * MIB);
        assert_eq!(placed(0x7000_0000, 0, 4 * MIB, allocation), Ok(0x7000_0000));
        assert_eq!(placed(0x7000_0000, MIB, 3 * MIB, allocation), Ok(0x7000_0000 + MIB));
        // The handle may stand for the middle of an allocation.
        assert_eq!(placed(0x7000_0000 + MIB, MIB, 2 * MIB, allocation), Ok(0x7000_0000 + 2 * MIB));
        assert!(placed(0x7000_0000 + MIB, MIB, 2 * MIB + 1, allocation).is_err());
        assert!(placed(0x7000_0000, 0, 4 * MIB + 1, allocation).is_err());
        assert!(placed(0x7000_0000, 4 * MIB + 1, 0, allocation).is_err());
        assert!(placed(0x6fff_ffff, 0, 1, allocation).is_err());
    }

    #[test]
    fn no_sum_wraps() {
        let allocation = (0x7000_0000, 4 * MIB);
        // Both would come out inside again.
        assert!(placed(0x7000_0000, u64::MAX - 0xfff, 0x2000, allocation).is_err());
        assert!(placed(0x7000_0000, 0x1000, u64::MAX, allocation).is_err());
        assert!(placed(u64::MAX, 1, 1, (0, u64::MAX)).is_err());
        assert!(placed(0x1000, 0, 1, (u64::MAX, 2)).is_err());
        assert!(total([u64::MAX, 2], 0, 1).is_err());
        assert!(total([4 * MIB], u64::MAX, 2).is_err());
        assert!(total([4 * MIB], MIB, 3 * MIB + 1).is_err());
        assert!(total([], 0, 1).is_err());
        assert_eq!(total([MIB, 3 * MIB], MIB, 3 * MIB), Ok(4 * MIB));
    }

    #[test]
    fn a_layout_asks_no_more_than_is_there() {
        assert!(fits(&[4, 0], &[4, 0]));
        assert!(fits(&[3], &[4]));
        assert!(!fits(&[4, 1], &[4, 0]));
        assert!(!fits(&[4], &[4, 4]));
        assert!(!fits(&[4, 4], &[4]));
    }
}
