//! Randomness that follows from the seed alone.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// One stream of random numbers. Streams of one seed are independent: a draw more from one shifts no other.
#[derive(Clone, Debug)]
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// The stream called `name`, number `index`, of a seed.
    pub fn new(seed: u64, name: &str, index: u64) -> Self {
        let mut stream = 0xcbf2_9ce4_8422_2325_u64;
        for byte in name.bytes().chain(index.to_le_bytes()) {
            stream = (stream ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let mut dice = ChaCha8Rng::seed_from_u64(seed);
        dice.set_stream(stream);
        Dice(dice)
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `below`; 0 when that is 0.
    pub fn below(&mut self, below: u64) -> u64 {
        // The bias is 2^-64 × `below`: of no matter here.
        ((u128::from(self.word()) * u128::from(below)) >> 64) as u64
    }

    /// A number of a range; its start when the range is empty.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// Sixteen bytes.
    pub fn nonce(&mut self) -> [u8; 16] {
        let mut nonce = [0; 16];
        self.0.fill_bytes(&mut nonce);
        nonce
    }

    /// Any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}
