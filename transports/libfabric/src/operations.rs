//! Operations under way: what the library is given as their context, and what is to happen when they end.

use std::cell::UnsafeCell;
use std::ffi::c_void;

/// What a provider may use while an operation is under way (`fi_context2`).
#[repr(C, align(64))]
struct Context(UnsafeCell<[u64; 8]>);

/// A fixed number of contexts at fixed places. A context that the library gives back is believed only as far as it is one of these.
pub(crate) struct Operations<T> {
    contexts: Box<[Context]>,
    held: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Operations<T> {
    pub(crate) fn new(count: u32) -> Operations<T> {
        Operations {
            contexts: (0..count).map(|_| Context(UnsafeCell::new([0; 8]))).collect(),
            held: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
        }
    }

    /// A context for an operation, or the operation back when all are in use.
    pub(crate) fn begin(&mut self, operation: T) -> Result<*mut c_void, T> {
        let Some(at) = self.free.pop() else { return Err(operation) };
        let (Some(context), Some(held)) = (self.contexts.get(at as usize), self.held.get_mut(at as usize)) else {
            return Err(operation);
        };
        *held = Some(operation);
        Ok(context.0.get().cast())
    }

    /// The operation of a context, which is over. Nothing for a context that is not ours, or has ended.
    pub(crate) fn end(&mut self, context: *mut c_void) -> Option<T> {
        let bytes = (context as usize).checked_sub(self.contexts.as_ptr() as usize)?;
        if !bytes.is_multiple_of(size_of::<Context>()) {
            return None;
        }
        let at = bytes / size_of::<Context>();
        let operation = self.held.get_mut(at)?.take()?;
        self.free.push(u32::try_from(at).ok()?);
        Some(operation)
    }

    pub(crate) fn under_way(&self) -> usize {
        self.held.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_ends_once_and_strange_contexts_are_nobodys() {
        let mut operations = Operations::new(2);
        let (a, b) = (operations.begin('a').unwrap(), operations.begin('b').unwrap());
        assert_eq!(operations.begin('c'), Err('c'));
        assert_eq!((a as usize % 64, operations.under_way()), (0, 2));
        for strange in
            [std::ptr::null_mut(), b.wrapping_byte_add(1), b.wrapping_byte_sub(192), b.wrapping_byte_add(128)]
        {
            assert_eq!(operations.end(strange), None);
        }
        assert_eq!((operations.end(a), operations.end(a)), (Some('a'), None));
        assert_eq!(operations.begin('c'), Ok(a));
        assert_eq!((operations.end(b), operations.end(a), operations.under_way()), (Some('b'), Some('c'), 0));
    }
}
