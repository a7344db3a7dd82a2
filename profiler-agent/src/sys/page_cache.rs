//! Which parts of a file are in memory.

use std::{fs::File, ops::Range, os::fd::AsRawFd as _, ptr};

/// The parts of a range of a file, which begins with a page, that are not in the page cache. None where the kernel does not
/// say: it tells only who may write to the file. Source: mincore(2).
pub(crate) fn absent(file: &File, start: u64, bytes: u64) -> Vec<Range<u64>> {
    let page = super::page::page_bytes();
    let (Ok(length), Ok(offset)) = (usize::try_from(bytes), i64::try_from(start)) else { return Vec::new() };
    let pages = bytes.div_ceil(page);
    let mut resident = vec![0u8; usize::try_from(pages).unwrap_or_default()];
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
    let map = unsafe {
        libc::mmap(ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
    };
    if map == libc::MAP_FAILED {
        return Vec::new();
    }
    // SAFETY: the mapping has `length` bytes, and there is a byte in `resident` for each of its pages.
    let answer = unsafe { libc::mincore(map, length, resident.as_mut_ptr()) };
    // SAFETY: exactly the range that mmap returned, unmapped once; nothing points into it.
    unsafe { libc::munmap(map, length) };
    if answer != 0 {
        return Vec::new();
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (number, _) in (0..).zip(resident).filter(|(_, resident)| resident & 1 == 0) {
        let at = start + number * page;
        match ranges.last_mut() {
            Some(last) if last.end == at => last.end += page,
            _ => ranges.push(at..at + page),
        }
    }
    ranges
}
