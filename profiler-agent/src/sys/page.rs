//! The size of pages.

use std::sync::OnceLock;

/// Bytes of a page on this kernel; on aarch64 it may be built with 4, 16 or 64 KiB. Source: sysconf(3), _SC_PAGESIZE.
pub(crate) fn page_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        // SAFETY: takes a number and gives one.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(bytes).expect("every system has pages")
    })
}

/// The same, as lengths of memory are counted.
pub(crate) fn page_len() -> usize {
    usize::try_from(page_bytes()).expect("a page fits into memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_begin_and_end_on_pages_and_one_of_them_is_no_multiple_of_more() {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("own mappings");
        let bounds = maps.lines().filter_map(|line| line.split_once(' ')?.0.split_once('-'));
        let bounds: Vec<u64> = bounds
            .flat_map(|(start, end)| [start, end])
            .map(|bound| u64::from_str_radix(bound, 16).expect("an address"))
            .collect();
        assert!(bounds.iter().all(|bound| bound % page_bytes() == 0), "{maps}");
        assert!(bounds.iter().any(|bound| bound % (2 * page_bytes()) != 0), "{maps}");
    }
}
