//! From an address of the sampled process to its unwind rule, by plain loads from map values.

use core::arch::asm;

use profiler_common::{
    stats::Counter,
    unwind::{
        Directory, Leaf, RowTable, UnwindRule, find_row,
        mappings::{MappingChunk, MappingRecord, MappingTable, NS_PER_TICK, ProcessEntry, find_mapping},
    },
    wire::StackEnd,
};

use crate::{
    arch,
    maps::{CHUNKS, DIRECTORIES, GENERATIONS, NO_CHUNK, PROCESSES, RULES, count, leaf},
    task,
};

/// The process's entry; an entry of an earlier process of the same id is none. A start of 0 is unknown and equals any.
#[inline(always)]
pub fn entry_of(tgid: u32, start_ns: u64) -> Option<&'static ProcessEntry> {
    let entry = PROCESSES.get_ptr(tgid)?;
    // SAFETY: the look-up gave a value of a preallocated map, which stays readable; others write it only as a whole.
    let entry = unsafe { &*entry };
    entry.is_of(start_ns).then_some(entry)
}

/// Chunk of the current process, or [`NO_CHUNK`]. A process that was not known is from now on.
#[inline(always)]
pub fn chunk_of(tgid: u32, start_ns: u64) -> u64 {
    let Some(entry) = entry_of(tgid, start_ns) else {
        keep(tgid, start_ns);
        return NO_CHUNK;
    };
    match GENERATIONS.get(entry.chunk) {
        Some(&generation) if generation == entry.generation => u64::from(entry.chunk),
        _ => NO_CHUNK,
    }
}

/// Makes a sampled process known, so that its children and its end are told; unless its end has been told already.
#[inline(always)]
fn keep(tgid: u32, start_ns: u64) {
    if task::is_exiting() {
        return;
    }
    let entry = ProcessEntry::without_tables(start_ns / NS_PER_TICK);
    if PROCESSES.insert(tgid, entry, 0).is_err() {
        count(Counter::CpuProcessNotKept);
    }
}

/// The rule for an address; where there is none, why.
#[inline(always)]
pub fn find_rule(chunk: u64, address: u64) -> Result<&'static UnwindRule, StackEnd> {
    let chunk = CHUNKS.get_ptr(chunk as u32).ok_or(StackEnd::NoMapping)?;
    let mapping = find_mapping(&ChunkValue(chunk), address).ok_or(StackEnd::NoMapping)?;
    let directory = DIRECTORIES.get_ptr(mapping.directory).ok_or(StackEnd::NoUnwindInformation)?;
    let relative = address.wrapping_sub(mapping.bias);
    let rule = find_row(&DirectoryValue(directory), relative, arch::OFFSET_SHIFT)
        .ok_or(StackEnd::NoUnwindInformation)?;
    let rule = RULES.get(u32::from(rule)).ok_or(StackEnd::InvalidRule)?;
    if rule.is_gap() {
        return Err(StackEnd::NoUnwindInformation);
    }
    Ok(rule)
}

/// 1 if `value < bound`, else 0, for values below 2^63. In assembly: LLVM would make it a branch.
#[inline(always)]
fn below(value: u64, bound: u64) -> u64 {
    let mut difference = value;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("{0} -= {1}", "{0} >>= 63", inout(reg) difference, in(reg) bound, options(pure, nomem, nostack));
    }
    difference
}

/// A value of [`CHUNKS`].
struct ChunkValue(*const MappingChunk);

impl MappingTable for ChunkValue {
    #[inline(always)]
    fn start(&self, slot: u64) -> u64 {
        // SAFETY: a live map value, and the search keeps `slot` below CHUNK_RECORDS.
        unsafe { (&raw const (*self.0).starts).cast::<u64>().add(slot as usize).read() }
    }

    #[inline(always)]
    fn record(&self, slot: u64) -> MappingRecord {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).records).cast::<MappingRecord>().add(slot as usize).read() }
    }

    #[inline(always)]
    fn below(value: u64, bound: u64) -> u64 {
        below(value, bound)
    }
}

/// A value of [`DIRECTORIES`].
struct DirectoryValue(*const Directory);

impl RowTable for DirectoryValue {
    type Leaf = *const Leaf;

    #[inline(always)]
    fn leaf_base(&self, slot: u64) -> u64 {
        // SAFETY: a live map value, and the search keeps `slot` below DIRECTORY_LEAVES.
        let base = unsafe { (&raw const (*self.0).bases).cast::<u32>().add(slot as usize).read() };
        u64::from(base)
    }

    #[inline(always)]
    fn leaf(&self, slot: u64) -> Option<*const Leaf> {
        // SAFETY: as above.
        let id = unsafe { (&raw const (*self.0).leaves).cast::<u32>().add(slot as usize).read() };
        leaf(id)
    }

    #[inline(always)]
    fn row_offset(leaf: &*const Leaf, row: u64) -> u64 {
        // SAFETY: a live map value, and the search keeps `row` below LEAF_ROWS.
        let offset = unsafe { (&raw const (**leaf).offsets).cast::<u16>().add(row as usize).read() };
        u64::from(offset)
    }

    #[inline(always)]
    fn row_rule(leaf: &*const Leaf, row: u64) -> u16 {
        // SAFETY: as above.
        unsafe { (&raw const (**leaf).rules).cast::<u16>().add(row as usize).read() }
    }

    #[inline(always)]
    fn below(value: u64, bound: u64) -> u64 {
        below(value, bound)
    }
}
