//! Memory of this process.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

use super::page::page_bytes;

/// Bounds what the allocator keeps for itself. To be called before the first thread is started.
///
/// glibc gives each thread an arena of its own and raises the size from which memory is mapped, and unmapped when it is
/// freed, with each larger piece that is freed: buffers of megabytes then stay where a thread needed one once.
pub(crate) fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    for (option, value) in
        [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 128 << 10), (libc::M_TRIM_THRESHOLD, 256 << 10)]
    {
        // SAFETY: takes two integers; the allocator locks its own state.
        let accepted = unsafe { libc::mallopt(option, value) };
        debug_assert_eq!(accepted, 1, "option {option}");
    }
}

/// Gives free memory of the allocator back to the system: glibc keeps what a thread has freed for its next need, which
/// after a burst of large files never comes.
pub(crate) fn release_free() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; the allocator locks its own state.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Resident pages of files, this program's own among them, in bytes. Source: proc_pid_statm(5), `shared`.
pub(crate) fn file_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = text.split(' ').nth(2).and_then(|pages| pages.parse().ok());
    pages.unwrap_or_default() * page_bytes()
}

/// Files smaller than this stay mapped as they are.
const FILE_BYTES_MIN: u64 = 1 << 20;

/// Held for writing while pages are given back, for reading while such a mapping may come or go: else another mapping
/// could have taken the place of one that is gone. Nobody waits for it but for the calls of `madvise`.
static FILES: RwLock<()> = RwLock::new(());

/// Somebody maps or unmaps files shared, whole and for reading, as the symbolizer does.
pub(crate) struct MappingFiles(
    #[expect(dead_code, reason = "held until it is dropped")] RwLockReadGuard<'static, ()>,
);

/// To be held by those who do.
pub(crate) fn mapping_files() -> MappingFiles {
    MappingFiles(FILES.read().unwrap_or_else(PoisonError::into_inner))
}

/// Unmaps the pages of files that are mapped shared, whole and for reading: those the symbolizer reads. The mappings
/// stay, and a page that is read again comes from the page cache for the price of a fault. `false`, and nothing done,
/// while such a mapping may come or go.
pub(crate) fn release_file_pages() -> bool {
    let Ok(_alone) = FILES.try_write() else { return false };
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, end) in maps.lines().filter_map(whole_file) {
        let Ok(bytes) = usize::try_from(end - start) else { continue };
        // SAFETY: the pages are those of a file mapped for reading alone, so that none differs from the file: what is
        // dropped here is read back as it was. The mapping is still there, since those who unmap such are kept out.
        unsafe { libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_DONTNEED) };
    }
    true
}

/// Start and end of a mapping that is shared, for reading, and of a whole file from its start. A segment of a loaded
/// program is none: it is a part of its file.
fn whole_file(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let (_device, inode) = (fields.next()?, fields.next()?);
    let (start, end) = range.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let bytes = end.checked_sub(start)?;
    if permissions != "r--s" || offset.bytes().any(|digit| digit != b'0') || bytes < FILE_BYTES_MIN {
        return None;
    }
    let file = fs::metadata(format!("/proc/self/map_files/{range}")).ok()?;
    let is_whole = file.len().next_multiple_of(page_bytes()) == bytes;
    (is_whole && inode.parse() == Ok(file.ino())).then_some((start, end))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, os::fd::AsRawFd as _};

    use super::*;

    /// A file of so many bytes, mapped whole.
    fn map(file: &File, bytes: usize) -> &'static [u8] {
        let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping is never unmapped, and the file neither changed nor made shorter.
        unsafe { std::slice::from_raw_parts(start.cast(), bytes) }
    }

    fn resident_pages(map: &[u8]) -> usize {
        let maps = fs::read_to_string("/proc/self/smaps").expect("own mappings");
        let head = format!("{:x}-", map.as_ptr() as usize);
        let rss = maps
            .lines()
            .skip_while(|line| !line.starts_with(&head))
            .find_map(|line| line.strip_prefix("Rss:"));
        rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok()).expect("its size")
            / 4
    }

    #[test]
    #[ignore = "needs root and BPF"]
    fn pages_of_a_file_that_was_read_are_given_back_and_come_again() {
        const BYTES: usize = 3 << 20;
        let content: Vec<u8> = (0..BYTES).map(|at| (at / 4096) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&content).expect("room for it");
        let map = map(&file, BYTES);
        assert!(map == content);
        assert_eq!(resident_pages(map), BYTES / 4096);
        let mapping = mapping_files();
        assert!(!release_file_pages());
        drop(mapping);
        while !release_file_pages() {
            std::thread::yield_now();
        }
        assert_eq!(resident_pages(map), 0);
        assert!(map == content);
    }

    #[test]
    fn segments_of_this_program_are_not_whole_files() {
        let maps = fs::read_to_string("/proc/self/maps").expect("own mappings");
        let exe = fs::read_link("/proc/self/exe").expect("a file");
        // Other tests may have it mapped as a file, which is shared.
        let is_private = |line: &&str| line.split(' ').nth(1).is_some_and(|flags| flags.ends_with('p'));
        let own = maps.lines().filter(|line| line.ends_with(exe.to_str().expect("a plain path")));
        let own = own.filter(is_private);
        assert!(own.clone().count() > 1, "{maps}");
        assert!(own.clone().all(|line| whole_file(line).is_none()), "{maps}");
    }
}
