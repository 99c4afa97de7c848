//! Structures that a library of any version may read or fill in.

use std::mem::MaybeUninit;

/// Bytes behind the structure as these bindings know it.
const PADDING: usize = 256;

/// A C structure of zeroes with room behind it: a later library reads zeroes in fields that it has added, an earlier one reads less.
#[repr(C)]
pub struct Padded<T: Copy> {
    value: MaybeUninit<T>,
    padding: [u8; PADDING],
}

impl<T: Copy + Default> Padded<T> {
    /// The structure, all zeroes.
    pub fn zeroed() -> Padded<T> {
        Padded { value: MaybeUninit::zeroed(), padding: [0; PADDING] }
    }

    /// As the library is given it.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        (&raw mut *self).cast()
    }

    /// Its fields, as these bindings know them.
    pub fn fields(&mut self) -> &mut T {
        // SAFETY: these are C structures of numbers and pointers (bindgen's `Default` of each is the same zeroes), for which zero is a value.
        unsafe { self.value.assume_init_mut() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fi_cq_attr, fi_mr_attr};

    #[test]
    fn what_is_behind_a_structure_is_zero() {
        let mut padded = Padded::<fi_cq_attr>::zeroed();
        padded.fields().size = usize::MAX;
        let from = size_of::<fi_cq_attr>();
        assert!(size_of::<Padded<fi_cq_attr>>() >= from + 256 && size_of::<Padded<fi_mr_attr>>() >= 256);
        let all = padded.as_mut_ptr().cast::<u8>();
        // SAFETY: within the value, every byte of which was written.
        let bytes = unsafe { std::slice::from_raw_parts(all, from + 256) };
        assert!(bytes[..8].iter().all(|byte| *byte == 0xff) && bytes[8..].iter().all(|byte| *byte == 0));
    }
}
