//! From an address of a process to the directory of the executable that is mapped there.
//!
//! ```text
//! ProcessEntry  chunk 7                          by process id; replaced as a whole
//! MappingChunk  starts  [0x5555.., 0x7f01.., ..]  first address of each record
//!               records [{end, bias, directory}]  address - bias is relative to the directory's start
//! ```
//! A chunk is never changed while an entry names it: a new image of the process is written to a free chunk, which one
//! update of the entry makes live.

use super::last_not_above;

/// Records of one chunk; a power of two, for the search. Python and node need 15, a JVM 17, one more for every shared
/// library and for every 130,000 rows of a table.
pub const CHUNK_RECORDS: usize = 1 << CHUNK_RECORDS_LOG2;
const CHUNK_RECORDS_LOG2: u32 = 7;

/// Start of an unused record: greater than any user address.
pub const UNUSED_START: u64 = 1 << 62;

/// Directory of code that has no table: generated code, files without unwind information.
pub const NO_DIRECTORY: u32 = u32::MAX;

/// What the kernel side knows of a process: the value of the map `PROCESSES`, by process id.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessEntry {
    /// Start of the process on CLOCK_BOOTTIME in units of [`NS_PER_TICK`]: tells it from a later one of the same id.
    pub start_ticks: u64,
    /// Its chunk, or [`NO_CHUNK`].
    pub chunk: u32,
    /// The chunk's generation when the entry was made. A chunk of another one belongs to somebody else by now: entries
    /// are copied at a fork, and a copy must not outlive what it names.
    pub generation: u32,
}

impl ProcessEntry {
    /// A process that has no tables, known all the same.
    #[inline(always)]
    #[must_use]
    pub const fn without_tables(start_ticks: u64) -> Self {
        Self { start_ticks, chunk: NO_CHUNK, generation: 0 }
    }

    /// The entry of a child that was forked from this process: it has the same mappings.
    #[inline(always)]
    #[must_use]
    pub const fn inherited(self, start_ticks: u64) -> Self {
        Self { start_ticks, ..self }
    }

    /// Whether the entry is that of the process which started at a boot time. A start of 0 is unknown and equals any.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(&self, start_ns: u64) -> bool {
        start_ns == 0 || start_ns / NS_PER_TICK == self.start_ticks
    }
}

/// No chunk: the process is walked by frame pointers.
pub const NO_CHUNK: u32 = u32::MAX;

/// Nanoseconds of the unit that `/proc/<pid>/stat` states a start time in. Source: sysconf(3), _SC_CLK_TCK, 100 on every
/// architecture Linux runs on.
pub const NS_PER_TICK: u64 = 10_000_000;

/// Executable ranges of one process, sorted by start and disjoint; unused ones at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingChunk {
    /// First address of each record; [`UNUSED_START`] for unused ones.
    pub starts: [u64; CHUNK_RECORDS],
    /// The records.
    pub records: [MappingRecord; CHUNK_RECORDS],
}

/// One executable range, or the part of one that belongs to one directory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingRecord {
    /// First address behind the range; 0 for unused records.
    pub end: u64,
    /// Address in the process of the directory's start.
    pub bias: u64,
    /// Number of the directory, or [`NO_DIRECTORY`].
    pub directory: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

impl MappingRecord {
    /// No range.
    pub const UNUSED: Self = Self { end: 0, bias: 0, directory: NO_DIRECTORY, reserved: 0 };
}

impl MappingChunk {
    /// A chunk without records.
    pub const EMPTY: Self =
        Self { starts: [UNUSED_START; CHUNK_RECORDS], records: [MappingRecord::UNUSED; CHUNK_RECORDS] };
}

const _: () = assert!(size_of::<ProcessEntry>() == 16);
const _: () = assert!(size_of::<MappingChunk>() == 4096);

/// A chunk in hand: a BPF map value, or a reference.
///
/// Positions are `u64` and always below [`CHUNK_RECORDS`].
pub trait MappingTable {
    /// `MappingChunk::starts[slot]`.
    fn start(&self, slot: u64) -> u64;
    /// `MappingChunk::records[slot]`.
    fn record(&self, slot: u64) -> MappingRecord;

    /// As [`super::RowTable::below`].
    #[inline(always)]
    fn below(value: u64, bound: u64) -> u64 {
        value.wrapping_sub(bound) >> 63
    }
}

/// The record that holds an address; `None` where nothing executable is known to be mapped.
#[inline(always)]
#[must_use]
pub fn find_mapping<T: MappingTable>(table: &T, address: u64) -> Option<MappingRecord> {
    if address >= UNUSED_START {
        return None;
    }
    let slot = last_not_above::<CHUNK_RECORDS_LOG2>(address, |at| table.start(at), T::below);
    let start = table.start(slot);
    let record = table.record(slot);
    (address.wrapping_sub(start) < record.end.wrapping_sub(start)).then_some(record)
}

impl MappingTable for &MappingChunk {
    fn start(&self, slot: u64) -> u64 {
        self.starts[slot as usize]
    }

    fn record(&self, slot: u64) -> MappingRecord {
        self.records[slot as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chunk of `(start, end)` ranges whose directories are their positions.
    fn chunk(ranges: &[(u64, u64)]) -> MappingChunk {
        let mut chunk = MappingChunk::EMPTY;
        for (at, &(start, end)) in ranges.iter().enumerate() {
            chunk.starts[at] = start;
            chunk.records[at] = MappingRecord { end, bias: start, directory: at as u32, reserved: 0 };
        }
        chunk
    }

    #[track_caller]
    fn check(ranges: &[(u64, u64)], address: u64, expect: Option<u32>) {
        let found = find_mapping(&&chunk(ranges), address).map(|record| record.directory);
        assert_eq!(found, expect, "address {address:#x}");
    }

    #[test]
    fn a_range_holds_its_first_address_and_not_its_end() {
        let ranges = [(0x1000, 0x2000), (0x3000, 0x4000)];
        for (address, directory) in [(0x1000, 0), (0x1fff, 0), (0x3000, 1), (0x3fff, 1)] {
            check(&ranges, address, Some(directory));
        }
        for address in [0, 0xfff, 0x2000, 0x2fff, 0x4000, UNUSED_START, u64::MAX] {
            check(&ranges, address, None);
        }
    }

    #[test]
    fn a_child_has_its_parents_chunk_and_its_own_start() {
        let parent = ProcessEntry { start_ticks: 5, chunk: 7, generation: 3 };
        let child = parent.inherited(9);
        assert_eq!(child, ProcessEntry { start_ticks: 9, chunk: 7, generation: 3 });
        assert!(child.is_of(9 * NS_PER_TICK) && child.is_of(0) && !child.is_of(5 * NS_PER_TICK));
    }

    #[test]
    fn an_empty_chunk_holds_nothing() {
        for address in [0, 0x1000, UNUSED_START - 1, UNUSED_START, u64::MAX] {
            check(&[], address, None);
        }
    }

    #[test]
    fn every_record_of_a_full_chunk_is_found() {
        let ranges: [(u64, u64); CHUNK_RECORDS] =
            core::array::from_fn(|at| (at as u64 * 0x2000, at as u64 * 0x2000 + 0x1000));
        for (at, &(start, end)) in ranges.iter().enumerate() {
            check(&ranges, start, Some(at as u32));
            check(&ranges, end - 1, Some(at as u32));
            check(&ranges, end, None);
        }
    }
}
