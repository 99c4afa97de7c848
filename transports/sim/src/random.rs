//! Randomness that follows from the fabric's seed alone.

/// One stream of numbers (SplitMix64). Streams are independent: a draw more from one shifts no other.
pub(crate) struct Stream(u64);

impl Stream {
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        let mut stream = Stream(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        stream.word();
        stream
    }

    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `below`; 0 when that is 0.
    pub(crate) fn below(&mut self, below: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(below)) >> 64) as u64
    }
}
