//! The ring of a perf event: the kernel writes records behind `data_head`, we read them and move `data_tail` on.
//!
//! ```text
//! page 0: perf_event_mmap_page     pages 1..: records, each a multiple of 8 bytes, wrapping around at the end
//!         data_head 1024 ─ written by the kernel
//!         data_tail 1032 ─ written by us: what lies before it may be written over
//! ```
//! Source: include/uapi/linux/perf_event.h, struct `perf_event_mmap_page`; perf_event_open(2).

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Release},
    },
};

use super::{page::page_len, perf_event, perf_record};

const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// The executable mappings made on one CPU. Dropping it ends the event.
#[derive(Debug)]
pub(crate) struct MappingRing {
    fd: OwnedFd,
    memory: Memory,
    /// What is read next, counted since the event was opened.
    tail: u64,
    record: Vec<u8>,
}

/// The mapped pages.
#[derive(Debug)]
struct Memory {
    start: *mut u8,
    page_bytes: usize,
    /// A power of two.
    data_bytes: usize,
}

// SAFETY: the pages belong to the process, not to a thread; nobody else has the address.
unsafe impl Send for Memory {}

impl MappingRing {
    /// Opens the event of a CPU with so much room for records: a power of two of bytes, one page at least.
    pub(crate) fn open(cpu: u32, bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(page_len());
        // Who maps code pays for waking us, 5 µs and more: only lest the ring be full. Else the next drain finds it.
        let half = u32::try_from(bytes / 2).unwrap_or(u32::MAX);
        let fd = perf_event::open_mapping_event(cpu, half)?;
        let memory = Memory::map(&fd, bytes)?;
        Ok(Self { fd, memory, tail: 0, record: Vec::new() })
    }

    /// Hands on every record that is there now, oldest first, and makes room for others. What cannot be a record ends
    /// the reading: all that is there is given up, which `false` tells.
    pub(crate) fn take(&mut self, mut each: impl FnMut(&[u8])) -> bool {
        let head = self.memory.word(DATA_HEAD).load(Acquire);
        let mut is_whole = true;
        while self.tail != head {
            if !self.copy_record(head) {
                (self.tail, is_whole) = (head, false);
                break;
            }
            each(&self.record);
            self.tail = self.tail.wrapping_add(self.record.len() as u64);
        }
        self.memory.word(DATA_TAIL).store(self.tail, Release);
        is_whole
    }

    /// Copies the record at the tail, which ends before `head`; `false` where there is none.
    fn copy_record(&mut self, head: u64) -> bool {
        let there = head.wrapping_sub(self.tail);
        if there > self.memory.data_bytes as u64 || there < perf_record::HEADER_BYTES as u64 {
            return false;
        }
        self.memory.copy(self.tail, perf_record::HEADER_BYTES, &mut self.record);
        let header = self.record.first_chunk().copied().unwrap_or_default();
        let Some(bytes) = perf_record::length(header).filter(|&bytes| bytes as u64 <= there) else {
            return false;
        };
        self.memory.copy(self.tail, bytes, &mut self.record);
        true
    }
}

impl AsFd for MappingRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Memory {
    fn map(fd: &OwnedFd, data_bytes: usize) -> io::Result<Self> {
        assert!(data_bytes.is_power_of_two(), "{data_bytes} bytes");
        let (page_bytes, protection) = (page_len(), libc::PROT_READ | libc::PROT_WRITE);
        let bytes = page_bytes + data_bytes;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), page_bytes, data_bytes })
    }

    /// A word of the first page, which both sides read and write.
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.page_bytes, "{offset}");
        let word = self.start.wrapping_add(offset).cast();
        // SAFETY: the word lies in the mapped first page, which lives as long as `self`; both sides use it as an atomic.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Copies bytes out of the ring from a position on, around its end; `bytes` is at most the ring's size.
    fn copy(&self, from: u64, bytes: usize, to: &mut Vec<u8>) {
        assert!(bytes <= self.data_bytes, "{bytes} of {}", self.data_bytes);
        let at = from as usize & (self.data_bytes - 1);
        let first = bytes.min(self.data_bytes - at);
        let data = self.start.wrapping_add(self.page_bytes);
        to.clear();
        to.resize(bytes, 0);
        let (head, rest) = to.split_at_mut(first);
        let from = data.wrapping_add(at);
        // SAFETY: `at + first` bytes are in the ring, behind the first page; the kernel does not write there before the tail
        // has moved on.
        unsafe { ptr::copy_nonoverlapping(from, head.as_mut_ptr(), head.len()) };
        // SAFETY: the rest lies at the ring's beginning and is shorter than the ring; as above.
        unsafe { ptr::copy_nonoverlapping(data, rest.as_mut_ptr(), rest.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly the range that mmap returned, unmapped once; no reference to it outlives `self`.
        unsafe { libc::munmap(self.start.cast(), self.page_bytes + self.data_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::sys::{
        clock,
        perf_record::{PerfRecord, parse},
    };

    /// Maps the first page of a file as code, and unmaps it.
    fn map_code(file: &File) -> u64 {
        let bytes = page_len();
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: exactly the range that mmap returned, unmapped once.
        unsafe { libc::munmap(start, bytes) };
        start as u64
    }

    /// The ring of the CPU that this thread is on, and stays on from now on.
    fn own_ring() -> MappingRing {
        // SAFETY: takes nothing.
        let cpu = u32::try_from(unsafe { libc::sched_getcpu() }).expect("a CPU");
        // SAFETY: an array of integers, for which zeros are the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the CPU is one of this machine's, for which the set has a bit.
        unsafe { libc::CPU_SET(cpu as usize, &mut set) };
        // SAFETY: `set` is a whole set of the size stated.
        let status = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
        assert_eq!(status, 0, "a thread may stay where it is");
        MappingRing::open(cpu, 0).expect("an event")
    }

    /// This process's mappings as (start, path, time), and records lost, of whomever.
    fn take(ring: &mut MappingRing) -> (Vec<(u64, String, u64)>, u64) {
        let (mut found, mut lost) = (Vec::new(), 0);
        let is_whole = ring.take(|record| match parse(record) {
            Some(PerfRecord::Mapped(mapped)) if mapped.pid == std::process::id() => {
                let path = String::from_utf8_lossy(mapped.path).into_owned();
                found.push((mapped.start, path, mapped.time_ns));
            }
            Some(PerfRecord::Lost(records)) => lost += records,
            Some(_) => {}
            None => panic!("{record:?}"),
        });
        assert!(is_whole);
        (found, lost)
    }

    #[test]
    #[ignore = "needs root and BPF"]
    fn code_that_is_mapped_is_told_and_what_does_not_fit_is_counted() {
        let file = File::open("/proc/self/exe").expect("a test has a file");
        let mut ring = own_ring();
        let before_ns = clock::boot_ns();
        let start = map_code(&file);
        let after_ns = clock::boot_ns();
        let exe = std::env::current_exe().expect("a test has a file").display().to_string();
        let (found, _) = take(&mut ring);
        let is_it = |(at, path, time_ns): &&(u64, String, u64)| {
            *at == start && *path == exe && (before_ns..=after_ns).contains(time_ns)
        };
        assert_eq!(found.iter().filter(is_it).count(), 1, "{start:x} {exe} in {found:?}");

        // Far more than a page holds: what is told and what is lost are all there were, and the ring goes on.
        const MAPPED: u64 = 1000;
        for _ in 0..MAPPED {
            map_code(&file);
        }
        let (told, _) = take(&mut ring);
        map_code(&file);
        let (last, lost) = take(&mut ring);
        assert_eq!(last.len(), 1, "{last:?}");
        assert!(lost > 0 && told.len() as u64 + lost >= MAPPED, "{} told, {lost} lost", told.len());
    }
}
