//! Things by small numbers that are never used twice.

/// Holds things under keys whose low half is a place and whose high half counts how often that place was given out.
pub(crate) struct Slab<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Self {
        Slab { places: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            (self.places.len() - 1) as u32
        });
        let Some((turn, place)) = self.places.get_mut(index as usize) else { return u64::MAX };
        *place = Some(value);
        u64::from(*turn) << 32 | u64::from(index)
    }

    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        self.places.get(key as u32 as usize).filter(|(turn, _)| *turn == (key >> 32) as u32)?.1.as_ref()
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        self.places.get_mut(key as u32 as usize).filter(|(turn, _)| *turn == (key >> 32) as u32)?.1.as_mut()
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let (turn, place) = self.places.get_mut(key as u32 as usize).filter(|(turn, _)| *turn == (key >> 32) as u32)?;
        let value = place.take()?;
        *turn = turn.wrapping_add(1);
        self.free.push(key as u32);
        Some(value)
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn a_key_outlives_its_thing_without_finding_another() {
        let mut slab = Slab::new();
        let first = slab.insert('a');
        assert_eq!((slab.get(first), slab.len()), (Some(&'a'), 1));
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!((slab.get(second), slab.len()), (Some(&'b'), 1));
    }
}
