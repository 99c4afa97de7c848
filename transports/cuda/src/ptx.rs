//! The kernels, as the driver loads them. `kernels/build` makes them.

/// PTX of `kernels/walk.cu`.
pub(crate) const PTX: &str = include_str!("../kernels/walk.ptx");

/// The kernels, by the names that the source gives them.
pub(crate) const WALK_SMALL: &str = "kvferry_walk_small";
pub(crate) const WALK_INLINE: &str = "kvferry_walk_inline";
pub(crate) const WALK: &str = "kvferry_walk";
pub(crate) const EVEN_SMALL: &str = "kvferry_even_small";
pub(crate) const EVEN_INLINE: &str = "kvferry_even_inline";
pub(crate) const EVEN: &str = "kvferry_even";
pub(crate) const EVEN_STANDBY: &str = "kvferry_even_standby";
pub(crate) const WRITE_KNOWN: &str = "kvferry_write_known";
pub(crate) const COUNT_UNKNOWN: &str = "kvferry_count_unknown";

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn ptx_was_made_from_the_source_beside_it() {
        let hash = Sha256::digest(include_bytes!("../kernels/walk.cu"));
        let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = format!("// sha256 of walk.cu: {hex}");
        assert!(PTX.lines().any(|found| found == line), "walk.cu has changed: run transports/cuda/kernels/build");
        let walks = [WALK_SMALL, WALK_INLINE, WALK, EVEN_SMALL, EVEN_INLINE, EVEN];
        for name in walks.into_iter().chain([EVEN_STANDBY, WRITE_KNOWN, COUNT_UNKNOWN]) {
            assert!(PTX.contains(&format!(".entry {name}(")), "{name}");
        }
    }
}
