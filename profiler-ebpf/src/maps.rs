//! Every map and every value shared with the agent.

use aya_ebpf::{
    btf_maps::{self, ArrayOfMaps},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use profiler_common::{
    config::{CgroupFacts, KernelFacts},
    limits::{EVENTS_BYTES, UNWIND_LEAF_SHARDS_MAX, UNWIND_SHARD_LEAVES},
    stats::Counter,
    unwind::{
        Block, Directory, Leaf, UnwindRule,
        mappings::{MappingChunk, ProcessEntry},
    },
    wire::{FRAMES_MAX, SampleBuffer},
};

use crate::arch::Regs;

/// Records to the agent (`profiler_common::wire`). Written by every program, read by the agent's drain thread. When it is
/// full the record is dropped and counted. The agent sizes it before loading.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);

/// Counters: key `Counter`, value events on this CPU since load. Written here, summed by the agent.
#[map]
pub static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);

/// Processes whose mappings are known: key process id, value [`ProcessEntry`]. Written by the agent, which counts those it
/// has no room for; an entry is deleted by `process_exec`. Without an entry a process is walked by frame pointers.
///
/// This and the maps below have one entry, or no shard, unless the agent sizes them before loading (`profiler_common::limits`).
#[map]
pub static PROCESSES: HashMap<u32, ProcessEntry> = HashMap::with_max_entries(1, 0);

/// Executable ranges: key `ProcessEntry::chunk`. Written by the agent while no entry names the chunk, and not again until
/// a second after the last entry named it, so that no program in flight sees a change.
#[map]
pub static CHUNKS: Array<MappingChunk> = Array::with_max_entries(1, 0);

/// Directories of unwind tables: key `MappingRecord::directory`. Written as [`CHUNKS`] are.
#[map]
pub static DIRECTORIES: Array<Directory> = Array::with_max_entries(1, 0);

/// Pages of unwind tables, in shards of [`UNWIND_SHARD_LEAVES`]: key of a shard the upper bits of `Directory::leaves`, of a
/// page in it the lower ones. Written as [`CHUNKS`] are; the agent adds a shard when all others are full.
#[btf_map]
pub static LEAVES: ArrayOfMaps<Shard, { UNWIND_LEAF_SHARDS_MAX as usize }> = ArrayOfMaps::new();

/// One map of [`LEAVES`].
type Shard = btf_maps::Array<Leaf, { UNWIND_SHARD_LEAVES as usize }>;

/// The page with a number; `None` where there is none.
#[inline(always)]
pub fn leaf(id: u32) -> Option<*const Leaf> {
    let leaf = LEAVES.get_value(id / UNWIND_SHARD_LEAVES, &(id % UNWIND_SHARD_LEAVES))?;
    Some(&raw const *leaf)
}

/// Unwind rules of all tables: key `Leaf::rules`. Written as [`CHUNKS`] are.
#[map]
pub static RULES: Array<UnwindRule> = Array::with_max_entries(1, 0);

/// The state of one sample in the making: one value per CPU, because it is far larger than the 512 bytes of BPF stack and
/// because the verifier then sees an almost empty state at the head of the unwind loop. Only `cpu_sample` uses it: a
/// program that can interrupt another must never share its scratch.
#[map]
pub static CPU_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Registers the walk needs, and the record under construction.
#[repr(C)]
pub struct Scratch {
    /// Registers of the frame being walked.
    pub regs: Regs,
    /// Frames written so far, user then kernel; at most `FRAMES_MAX`.
    pub frames: u64,
    /// `StackEnd` once the walk has ended, 0 before.
    pub end: u64,
    /// Chunk of the process, or [`NO_CHUNK`].
    pub chunk: u64,
    /// What the walk reads from the sampled task's stack.
    pub block: Block,
    /// As `block`, for single words.
    pub word: u64,
    /// User registers of a task sampled in kernel mode, as the kernel saved them.
    pub user_regs: [u64; crate::arch::PT_REGS_WORDS],
    /// The record.
    pub sample: SampleBuffer,
    /// Room behind the frames, so that a kernel stack of constant size may be asked for wherever the user frames end.
    pub slack: [u64; FRAMES_MAX],
}

/// The process has no tables: it is walked by frame pointers.
pub const NO_CHUNK: u64 = u32::MAX as u64;

/// Set by the agent before loading, frozen by the kernel: the verifier follows only the branches it takes.
#[unsafe(no_mangle)]
pub static KERNEL_FACTS: KernelFacts = KernelFacts {
    has_task_pt_regs: 0,
    task_stack_offset: 0,
    task_mm_offset: 0,
    task_group_leader_offset: 0,
    task_start_boottime_offset: 0,
    task_comm_offset: 0,
    thread_bytes: 0,
    reserved: 0,
};

/// Reads one field of [`KERNEL_FACTS`]; a volatile load, since LLVM must not fold in the zeros above.
macro_rules! kernel_fact {
    ($field:ident) => {{
        // SAFETY: a read-only static that is valid for ever; volatile only keeps the load in place.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::KERNEL_FACTS.$field) }
    }};
}
pub(crate) use kernel_fact;

/// As [`KERNEL_FACTS`].
#[unsafe(no_mangle)]
pub static CGROUP_FACTS: CgroupFacts = CgroupFacts {
    task_cgroups_offset: 0,
    css_set_subsys_offset: 0,
    css_cgroup_offset: 0,
    cgroup_kn_offset: 0,
    node_id_offset: 0,
    cgroup_root_offset: 0,
    root_hierarchy_offset: 0,
    hierarchy: 0,
};

/// Reads one field of [`CGROUP_FACTS`]; volatile as `kernel_fact`.
macro_rules! cgroup_fact {
    ($field:ident) => {{
        // SAFETY: a read-only static that is valid for ever; volatile only keeps the load in place.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::CGROUP_FACTS.$field) }
    }};
}
pub(crate) use cgroup_fact;

/// Adds one to a counter of this CPU.
///
/// A plain addition: a counter is raised by one program family, and a program is not interrupted by itself.
#[inline(always)]
pub fn count(counter: Counter) {
    add(counter, 1);
}

/// Adds to a counter of this CPU, as [`count`] does, and gives its new value; 0 where there is none.
#[inline(always)]
pub fn add(counter: Counter, amount: u64) -> u64 {
    let Some(slot) = STATS.get_ptr_mut(counter as u32) else { return 0 };
    // SAFETY: the look-up gave a live value of this CPU's slot.
    let sum = unsafe { *slot }.wrapping_add(amount);
    // SAFETY: as above.
    unsafe { *slot = sum };
    sum
}
