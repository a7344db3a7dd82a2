//! Every map and every value shared with the agent.

use aya_ebpf::{
    btf_maps::{self, ArrayOfMaps},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use profiler_common::{
    config::{CgroupFacts, KernelFacts, Settings},
    limits::{EVENTS_BYTES, UNWIND_LEAF_SHARDS_MAX, UNWIND_SHARD_LEAVES, USER_FRAMES_MAX},
    stats::{Counter, durations},
    targets::{TARGETS_MAX, Targets, Turn},
    unwind::{
        Block, Directory, Leaf, UnwindRule,
        mappings::{MappingChunk, ProcessEntry},
    },
    wire::SampleBuffer,
};

use crate::arch::Regs;

/// Records to the agent (`profiler_common::wire`). Written by every program, read by the agent's drain thread. When it is
/// full the record is dropped and counted. The agent sizes it before loading.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);

/// `BPF_RB_NO_WAKEUP`: the agent drains on a timer, so no record pays for a wake-up.
pub const NO_WAKEUP: u64 = 1;
/// `BPF_RB_FORCE_WAKEUP`: the agent is to look at once. Without it, only a record behind which the reader has caught up
/// would wake it.
pub const WAKEUP: u64 = 2;

/// How a record is written for which the agent need not hurry: it does when [`EVENTS`] is half full, before its timer is up.
#[inline(always)]
pub fn wakeup_if_filling() -> u64 {
    const AVAILABLE_BYTES: u64 = 0;
    const RING_BYTES: u64 = 1;
    let is_filling = EVENTS.query(AVAILABLE_BYTES) > EVENTS.query(RING_BYTES) / 2;
    if is_filling { WAKEUP } else { NO_WAKEUP }
}

/// Counters: key `Counter`, value events on this CPU since load. Written here, summed by the agent.
#[map]
pub static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);

/// How long the timed runs of `cpu_sample` took: key slot of [`durations`], value runs on this CPU since load. Written by
/// `cpu_sample`, summed by the agent.
#[map]
pub static CPU_DURATIONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(durations::SLOTS, 0);

/// Processes that are known: key process id, value [`ProcessEntry`]. Written by the agent when it has tables for one, by
/// `cpu_sample` at a process's first sample, by `process_fork` for children of known ones; deleted by `process_exec` and
/// `process_exit`. When it is full, that is counted; a process without an entry is walked by frame pointers, and its
/// children and its end are not told.
///
/// This and the maps below have one entry, or no shard, unless the agent sizes them before loading (`profiler_common::limits`).
#[map]
pub static PROCESSES: HashMap<u32, ProcessEntry> = HashMap::with_max_entries(1, 0);

/// Executable ranges: key `ProcessEntry::chunk`. Written by the agent while no entry names the chunk, and not again until
/// a second after the last entry named it, so that no program in flight sees a change.
#[map]
pub static CHUNKS: Array<MappingChunk> = Array::with_max_entries(1, 0);

/// Generation of each chunk: key as [`CHUNKS`], value what `ProcessEntry::generation` must be. Written by the agent when it
/// gives a chunk up, before the chunk's rest begins: entries that it does not know of, copied at a fork, end with that.
#[map]
pub static GENERATIONS: Array<u32> = Array::with_max_entries(1, 0);

/// Directories of unwind tables: key `MappingRecord::directory`. Written as [`CHUNKS`] are.
#[map]
pub static DIRECTORIES: Array<Directory> = Array::with_max_entries(1, 0);

/// Pages of unwind tables, in shards of [`UNWIND_SHARD_LEAVES`]: key of a shard the upper bits of `Directory::leaves`, of a
/// page in it the lower ones. Written as [`CHUNKS`] are; the agent adds a shard when all others are full.
#[btf_map]
pub static LEAVES: ArrayOfMaps<Shard, { UNWIND_LEAF_SHARDS_MAX as usize }> = ArrayOfMaps::new();

/// One map of [`LEAVES`], of [`Leaf`]s. To BTF its value is no structure: Linux 5.15 to 6.1 take a map into another only if
/// both say the same of a `bpf_timer` in their values, and "none in this structure" (-ENOENT) is not the same as "no BTF"
/// (-EINVAL), which the agent's maps say (kernel/bpf/map_in_map.c: `bpf_map_meta_equal`). Of an array they say the latter.
type Shard = btf_maps::Array<[u64; LEAF_WORDS], { UNWIND_SHARD_LEAVES as usize }>;
const LEAF_WORDS: usize = size_of::<Leaf>() / 8;
const _: () = assert!(size_of::<Leaf>() == 8 * LEAF_WORDS && align_of::<Leaf>() <= 8);

/// The page with a number; `None` where there is none.
#[inline(always)]
pub fn leaf(id: u32) -> Option<*const Leaf> {
    let leaf = LEAVES.get_value(id / UNWIND_SHARD_LEAVES, &(id % UNWIND_SHARD_LEAVES))?;
    Some((&raw const *leaf).cast())
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
    /// User frames written so far; at most `USER_FRAMES_MAX`.
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
    /// Room behind the frames, so that the verifier accepts all that the masks in `cpu.rs` let through: a kernel stack of
    /// constant size behind 2 * `USER_FRAMES_MAX` - 1 user frames, records of [`RECORD_MASK`] bytes.
    pub slack: [u64; USER_FRAMES_MAX],
}

/// Lengths of records are below this power of two less one, which is the mask that proves it.
pub const RECORD_MASK: u64 = 16_383;

const _: () = assert!(RECORD_MASK < 8 * USER_FRAMES_MAX as u64 + size_of::<SampleBuffer>() as u64);
/// Source: mm/percpu-internal.h, PCPU_MIN_UNIT_SIZE: values of per-CPU maps are not larger.
const _: () = assert!(size_of::<Scratch>() <= 32 << 10);

/// The process has no tables: it is walked by frame pointers.
pub const NO_CHUNK: u64 = profiler_common::unwind::mappings::NO_CHUNK as u64;

/// What is to be sampled: one value. Written by the agent before anything is sampled and whenever that changes, read by
/// `cpu_sample`.
#[map]
pub static TARGETS: Array<Targets> = Array::with_max_entries(1, 0);

/// Which sample of each target is kept next: key position of the target, value of this CPU. Only `cpu_sample` uses it.
#[map]
pub static TARGET_TURNS: PerCpuArray<Turn> = PerCpuArray::with_max_entries(TARGETS_MAX as u32, 0);

/// Processes of the families that are targets: key process id, value 1. The agent writes those that were named,
/// `process_fork` adds their children, `process_exit` deletes. When it is full, that is counted.
#[map]
pub static FAMILY: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);

/// Set by the agent before loading, frozen by the kernel, as [`KERNEL_FACTS`].
#[unsafe(no_mangle)]
pub static SETTINGS: Settings =
    Settings { user_frames_limit: USER_FRAMES_MAX as u32, has_families: 0, reserved: [0; 2] };

/// Reads one field of [`SETTINGS`], as [`kernel_fact`] does.
macro_rules! setting {
    ($field:ident) => {{
        // SAFETY: a read-only static that is valid for ever; volatile only keeps the load in place.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::SETTINGS.$field) }
    }};
}
pub(crate) use setting;

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
    task_tgid_offset: 0,
    task_flags_offset: 0,
    task_signal_offset: 0,
    signal_live_offset: 0,
    has_ancestor_cgroup_id: 0,
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
