//! What a page fault stands for: whether the page is a program's own memory, and how much of it came with the fault.
//!
//! The kernel's event says the address, not the page. That is looked up in `/proc/<pid>/pagemap` when the sample is
//! drained, some milliseconds later:
//!
//! ```text
//! pagemap: file bit ──▶ a page of a file, or of memory that is shared: left out
//!          nothing  ──▶ given back meanwhile, or its process has ended: left out
//!          a page   ──▶ kpageflags of its frame: the zero page is no memory; of a huge page, its whole size
//! ```
//! Source: Documentation/admin-guide/mm/pagemap.rst.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use tracing::warn;

use crate::{
    addr::Addr,
    label::SeriesLabels,
    normalize::Location,
    sys::{clock::WallClock, page},
    window::{Closed, Counts, Full, Measure, OBJECT, Room, SampleLabels, Windows},
};

/// Faults between two samples of one CPU: 2 MiB of small pages. A prime, so that no loop of a program falls into step
/// with it.
pub(crate) const PERIOD: u64 = 509;

/// Entries of both files are of 8 bytes. Bits of pagemap:
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// Number of the page frame; 0 for those without CAP_SYS_ADMIN.
const FRAME: u64 = (1 << 55) - 1;
/// Bits of kpageflags. Source: include/uapi/linux/kernel-page-flags.h.
const COMPOUND_HEAD: u64 = 1 << 15;
const COMPOUND_TAIL: u64 = 1 << 16;
const ZERO_PAGE: u64 = 1 << 24;
/// Pages of the largest anonymous page: 2 MiB of 4 KiB.
const HUGE_PAGES: usize = 512;

/// What a fault brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// So many bytes of memory of the program's own.
    Anonymous { bytes: u64 },
    /// A page of a file, or of memory that several processes may share.
    File,
    /// The page is not there any more: it was given back, or its process has ended.
    Gone,
}

/// Looks pages up.
#[derive(Debug)]
struct Pages {
    proc_root: PathBuf,
    /// `None` where it may not be read: the size of huge pages is unknown then.
    flags: Option<File>,
    page_bytes: u64,
}

impl Pages {
    /// `proc_root` is where the proc file system is mounted.
    fn new(proc_root: &Path) -> Self {
        let flags = File::open(proc_root.join("kpageflags")).ok();
        Self { proc_root: proc_root.to_owned(), flags, page_bytes: page::page_bytes() }
    }

    fn look(&self, pid: u32, address: Addr) -> Fault {
        let entry = File::open(self.proc_root.join(format!("{pid}/pagemap")))
            .and_then(|map| word(&map, address.0 / self.page_bytes));
        // An error is a process that is gone.
        self.judge(entry.unwrap_or(0))
    }

    fn judge(&self, entry: u64) -> Fault {
        if entry & (PRESENT | SWAPPED) == 0 {
            return Fault::Gone;
        }
        if entry & OF_FILE != 0 {
            return Fault::File;
        }
        let pages = if entry & PRESENT == 0 { 1 } else { self.pages_of(entry & FRAME) };
        Fault::Anonymous { bytes: pages * self.page_bytes }
    }

    /// Pages that came with a frame: 0 for the page of zeros that all share until they write.
    fn pages_of(&self, frame: u64) -> u64 {
        let Some(flags) = self.flags.as_ref().filter(|_| frame != 0) else { return 1 };
        match word(flags, frame) {
            Ok(found) if found & ZERO_PAGE != 0 => 0,
            Ok(found) if found & (COMPOUND_HEAD | COMPOUND_TAIL) != 0 => compound_pages(flags, frame),
            _ => 1,
        }
    }
}

/// The worker's part of page-fault profiles.
pub(crate) struct FaultWindows {
    windows: Windows,
    pages: Pages,
}

impl FaultWindows {
    /// No fault yet; the first window begins at a boot time.
    pub(crate) fn new(start_ns: u64, window: Duration, room: Room) -> Self {
        let windows = Windows::new(start_ns, window, 0, WallClock::now(), room);
        let pages = Pages::new("/proc".as_ref());
        if pages.flags.is_none() {
            warn!("/proc/kpageflags may not be read: faults of huge pages count as small ones");
        }
        Self { windows, pages }
    }

    /// What a fault of a process at an address brought.
    pub(crate) fn look(&self, pid: u32, address: Addr) -> Fault {
        self.pages.look(pid, address)
    }

    /// Adds a sample that stands for so many faults, each of which brought so many bytes.
    pub(crate) fn add(
        &mut self,
        (series, labels, stack): (SeriesLabels, SampleLabels, Vec<Location>),
        time_ns: u64,
        (faults, bytes): (u64, u64),
        on_new: impl FnMut(&Location),
    ) -> Result<(), Full> {
        let value = faults.saturating_mul(bytes);
        let counts = Counts { samples: 1, value, objects: faults.saturating_mul(OBJECT) };
        self.windows.at(time_ns).add_counts(series, labels, stack, counts, on_new)
    }

    /// Closes the windows whose samples are all there.
    pub(crate) fn close_due(&mut self, complete_ns: u64, clock: WallClock) -> Vec<Closed> {
        measured(self.windows.close_due(complete_ns, clock))
    }

    /// Closes everything.
    pub(crate) fn close_all(&mut self, now_ns: u64) -> Vec<Closed> {
        measured(self.windows.close_all(now_ns))
    }
}

fn measured(closed: Vec<Closed>) -> Vec<Closed> {
    closed.into_iter().map(|window| Closed { measure: Measure::PageFaults, ..window }).collect()
}

/// Pages of the compound page that a frame belongs to; it lies in an aligned run of [`HUGE_PAGES`].
fn compound_pages(flags: &File, frame: u64) -> u64 {
    let first = frame - frame % HUGE_PAGES as u64;
    let mut bytes = [0; 8 * HUGE_PAGES];
    if flags.read_exact_at(&mut bytes, first * 8).is_err() {
        return 1;
    }
    let run = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect::<Vec<_>>();
    compound_len(&run, (frame - first) as usize)
}

fn compound_len(flags: &[u64], at: usize) -> u64 {
    let head = flags[..=at].iter().rposition(|flags| flags & COMPOUND_HEAD != 0);
    let Some(head) = head else { return 1 };
    let tails = flags[head + 1..].iter().take_while(|flags| *flags & COMPOUND_TAIL != 0).count();
    1 + tails as u64
}

fn word(file: &File, index: u64) -> io::Result<u64> {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, index * 8)?;
    Ok(u64::from_ne_bytes(word))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn pages(flags: Option<File>) -> Pages {
        Pages { proc_root: "/proc".into(), flags, page_bytes: 4096 }
    }

    /// A file of such flags.
    fn flags_of(words: &[u64]) -> File {
        let file = tempfile::tempfile().expect("a file");
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        file.write_all_at(&bytes, 0).expect("written");
        file
    }

    #[test]
    fn what_is_of_a_file_or_gone_is_no_memory_of_the_programs_own() {
        let pages = pages(None);
        assert_eq!(pages.judge(0), Fault::Gone);
        assert_eq!(pages.judge(PRESENT | OF_FILE | 7), Fault::File);
        assert_eq!(pages.judge(SWAPPED | OF_FILE), Fault::File);
        assert_eq!(pages.judge(PRESENT), Fault::Anonymous { bytes: 4096 });
        assert_eq!(pages.judge(SWAPPED | 9), Fault::Anonymous { bytes: 4096 });
        assert_eq!(pages.look(u32::MAX - 1, Addr(0x1000)), Fault::Gone);
    }

    #[test]
    fn a_huge_page_came_as_a_whole_and_the_page_of_zeros_not_at_all() {
        let mut words = vec![0; 2 * HUGE_PAGES];
        words[3] = ZERO_PAGE;
        // 16 pages from 16 on, then 4; a whole 2 MiB behind.
        words[16] = COMPOUND_HEAD;
        words[17..32].fill(COMPOUND_TAIL);
        words[32] = COMPOUND_HEAD;
        words[33..36].fill(COMPOUND_TAIL);
        words[HUGE_PAGES] = COMPOUND_HEAD;
        words[HUGE_PAGES + 1..].fill(COMPOUND_TAIL);
        let pages = pages(Some(flags_of(&words)));
        let bytes = |frame| pages.judge(PRESENT | frame);
        for (frame, expect) in [(1, 1), (3, 0), (16, 16), (20, 16), (35, 4), (600, 512), (5000, 1)] {
            assert_eq!(bytes(frame), Fault::Anonymous { bytes: expect * 4096 }, "frame {frame}");
        }
    }

    #[test]
    fn own_memory_and_a_mapped_file_are_told_apart() {
        let pages = Pages::new("/proc".as_ref());
        let own = vec![7u8; 1 << 16];
        let at = |address: *const u8| pages.look(std::process::id(), Addr(address as u64));
        assert!(
            matches!(at(&raw const own[1 << 15]), Fault::Anonymous { bytes } if bytes >= pages.page_bytes)
        );
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&[7; 4096], 0).expect("written");
        let map = crate::sys::file_map::FileMap::new(&file, 4096).expect("a mapping");
        assert!(file.as_raw_fd() >= 0);
        let (address, first) = map.read(|bytes| (bytes.as_ptr(), bytes[0])).expect("readable");
        assert_eq!((first, at(address)), (7, Fault::File));
    }
}
