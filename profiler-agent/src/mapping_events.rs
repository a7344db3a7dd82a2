//! Executable mappings that processes make after their exec, as the kernel tells them: an event and a ring for each CPU.
//!
//! ```text
//! mmap, mprotect ─▶ ring of the CPU ─▶ drain: copies ─▶ worker: known process? ─▶ its mappings, unwind thread
//! ```
//! There is no cheap tracepoint for this; `PERF_RECORD_MMAP2` of an event that counts nothing is the way perf itself goes.
//! Without these events, a process's mappings are read again when an address lies in none of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::event::epoll;
use tracing::warn;

use crate::sys::{page::page_len, perf_ring::MappingRing};

/// Room for records on each CPU: about 200 of 150 bytes. The drain is woken when half of it is full, and comes every 5 ms
/// then: 40,000 a second.
const RING_BYTES: usize = 32 << 10;

/// The rings. One thread opens and closes them, another reads.
#[derive(Debug)]
pub(crate) struct MappingEvents {
    /// Readable when one of the rings is half full.
    news: OwnedFd,
    /// Held for no system call that could wait.
    rings: Mutex<BTreeMap<u32, MappingRing>>,
    /// What all rings together may take, in bytes.
    bytes_max: usize,
    refused: Mutex<BTreeSet<u32>>,
}

impl MappingEvents {
    /// No event yet, and so much memory for the rings of all CPUs.
    pub(crate) fn new(bytes_max: usize) -> io::Result<Self> {
        let news = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (rings, refused) = Default::default();
        Ok(Self { news, rings, bytes_max, refused })
    }

    /// Opens events for CPUs that have come online, and closes those of the others. A CPU whose event cannot be opened is
    /// told once, and tried again at the next call.
    pub(crate) fn follow(&self, online: &[u32]) {
        let known: Vec<u32> = self.rings().keys().copied().collect();
        for cpu in known.iter().filter(|cpu| !online.contains(cpu)) {
            // Closing the event takes it out of what is waited for.
            let gone = self.rings().remove(cpu);
            drop(gone);
        }
        let bytes = ring_bytes(self.bytes_max, online.len());
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|cpu| online.contains(cpu));
        for &cpu in online.iter().filter(|cpu| !known.contains(cpu)) {
            match bytes
                .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
                .and_then(|bytes| self.open(cpu, bytes))
            {
                Ok(()) => {
                    refused.remove(&cpu);
                }
                Err(error) if refused.insert(cpu) => {
                    warn!(cpu, %error, "new mappings are not told here: processes are read when an address is unknown");
                }
                Err(_) => {}
            }
        }
    }

    fn open(&self, cpu: u32, bytes: usize) -> io::Result<()> {
        let ring = MappingRing::open(cpu, bytes)?;
        epoll::add(&self.news, &ring, epoll::EventData::new_u64(cpu.into()), epoll::EventFlags::IN)?;
        self.rings().insert(cpu, ring);
        Ok(())
    }

    /// Closes all events. What is in their rings is given up.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *self.rings());
        drop(gone);
    }

    /// CPUs whose mappings are told.
    pub(crate) fn cpus(&self) -> usize {
        self.rings().len()
    }

    /// Hands on every record that is there. Gives the number of rings that held something else, which was given up with all
    /// that was behind it.
    pub(crate) fn take(&self, mut each: impl FnMut(&[u8])) -> u64 {
        let mut rings = self.rings();
        rings.values_mut().map(|ring| u64::from(!ring.take(&mut each))).sum()
    }

    fn rings(&self) -> MutexGuard<'_, BTreeMap<u32, MappingRing>> {
        // Every change to the table is complete before anything that could panic.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable when a ring would soon be full.
impl AsFd for MappingEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }
}

/// Room for records on each of so many CPUs; `None` where not even a page each would fit.
fn ring_bytes(bytes_max: usize, cpus: usize) -> Option<usize> {
    let page = page_len();
    let each = (bytes_max / cpus.max(1)).checked_sub(page).filter(|&each| each >= page)?;
    Some((1 << each.ilog2()).min(RING_BYTES.max(page)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_of_many_cpus_are_smaller_and_of_too_many_none() {
        let page = page_len();
        let most = RING_BYTES.max(page);
        assert_eq!(ring_bytes(8 << 20, 2), Some(most));
        assert_eq!(ring_bytes(16 * (most / 2 + page), 16), Some((most / 2).max(page)));
        assert_eq!(ring_bytes(100 * 2 * page, 100), Some(page));
        assert_eq!(ring_bytes(100 * 2 * page, 101), None);
        for cpus in 1..1000 {
            let all = ring_bytes(3 << 20, cpus).map_or(0, |bytes| cpus * (bytes + page));
            assert!(all <= 3 << 20, "{cpus} CPUs take {all} bytes");
        }
    }

    #[test]
    #[ignore = "needs root and BPF"]
    fn events_follow_the_cpus_and_leave_nothing_behind() {
        let open = || std::fs::read_dir("/proc/self/fd").expect("descriptors").count();
        let events = MappingEvents::new(1 << 20).expect("a set of descriptors");
        let before = open();
        events.follow(&[0]);
        assert_eq!((events.cpus(), open()), (1, before + 1));
        events.follow(&[0]);
        assert_eq!(events.cpus(), 1);
        events.follow(&[]);
        assert_eq!((events.cpus(), open()), (0, before));
        events.follow(&[0, 16_000]);
        assert_eq!(events.cpus(), 1, "no such CPU is no reason to do without the others");
        events.clear();
        assert_eq!((events.cpus(), open()), (0, before));
    }
}
