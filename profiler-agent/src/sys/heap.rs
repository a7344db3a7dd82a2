//! What a thread holds of the heap, counted where it is allocated.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

thread_local! {
    /// Bytes that this thread has allocated less those that it has freed.
    static HELD: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, with a count of each thread's bytes.
pub(crate) struct Counting;

/// Bytes that the calling thread has allocated less those it has freed, as they were asked for. What others free of its
/// allocations stays counted, and what it frees of theirs makes it less.
pub(crate) fn held_bytes() -> isize {
    HELD.get()
}

fn count(bytes: isize) {
    // At the end of a thread nothing counts any more.
    let _ = HELD.try_with(|held| held.set(held.get().wrapping_add(bytes)));
}

// SAFETY: every call is passed on to the system's allocator as it is; counting touches no memory but a thread-local
// integer without a destructor, and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps to the contract of `alloc`, which is this allocator's too.
        let start = unsafe { System.alloc(layout) };
        if !start.is_null() {
            count(layout.size().cast_signed());
        }
        start
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let start = unsafe { System.alloc_zeroed(layout) };
        if !start.is_null() {
            count(layout.size().cast_signed());
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: `start` came from one of the functions here, hence from the system's allocator, with this layout.
        unsafe { System.dealloc(start, layout) };
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; the caller answers for the new size.
        let new = unsafe { System.realloc(start, layout, bytes) };
        if !new.is_null() {
            count(bytes.cast_signed() - layout.size().cast_signed());
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_counts_what_it_holds() {
        let before = held_bytes();
        let mut bytes: Vec<u8> = vec![0; 1000];
        assert_eq!(held_bytes() - before, 1000);
        bytes.resize(5000, 1);
        bytes.shrink_to_fit();
        assert_eq!(held_bytes() - before, 5000);
        std::thread::spawn(|| drop(vec![1_u8; 777])).join().expect("it ends");
        drop(bytes);
        // The thread's own bookkeeping may stay.
        assert!((held_bytes() - before).abs() < 777, "{}", held_bytes() - before);
    }
}
