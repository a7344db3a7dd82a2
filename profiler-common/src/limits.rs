//! Every bound shared by both sides, with its unit and the sketch behind the number.

/// User frames of one sample, at most; the agent may ask for fewer. A power of two, for the mask the verifier wants.
/// Recursive parsers and deep frameworks stay below some hundreds; what is deeper has recursed without end.
pub const USER_FRAMES_MAX: usize = 1024;

/// The least bound on user frames that may be asked for: `kernel.perf_event_max_stack`'s default, what users of perf
/// expect.
pub const USER_FRAMES_LIMIT_MIN: u32 = 127;

/// Kernel frames of one sample. Kernel stacks are 16 KiB; traces deeper than this were never seen outside recursion bugs.
pub const KERNEL_FRAMES_MAX: usize = 127;

/// Bytes of a task's `comm`, with the final NUL. Source: include/linux/sched.h: TASK_COMM_LEN.
pub const COMM_BYTES: usize = 16;

/// Sampling frequency accepted from users, in Hz per CPU.
pub const FREQUENCY_HZ_MIN: u32 = 1;
/// Sampling frequency accepted from users, in Hz per CPU.
pub const FREQUENCY_HZ_MAX: u32 = 1000;

/// Bytes of the ring buffer when the agent does not say otherwise. A 30-frame sample takes 312 bytes, so 1 MiB holds
/// about 3,300 of them: 2.6 s of 64 CPUs at 19 Hz between drains.
pub const EVENTS_BYTES: u32 = 1 << 20;

/// Pages of unwind rows in the kernel, 2 KiB each: 32 MiB, which grow with what is seen. A Debian host's 510 shared libraries
/// would fill 16,000, those in use at one time some hundreds; node takes 570, rustc with its libraries 4,900.
pub const UNWIND_LEAVES_MAX: u32 = UNWIND_SHARD_LEAVES * UNWIND_LEAF_SHARDS_MAX;

/// Pages that room is made for at a time: 256 KiB. A power of two, for the look-up.
pub const UNWIND_SHARD_LEAVES: u32 = 128;
const _: () = assert!(UNWIND_SHARD_LEAVES.is_power_of_two());

/// Times that room is made.
pub const UNWIND_LEAF_SHARDS_MAX: u32 = 128;

/// Directories of pages in the kernel, 2 KiB each: 2 MiB. An executable takes one, and one more for every 256 of
/// its pages: a host that runs many programs has hundreds of libraries open.
pub const UNWIND_DIRECTORIES_MAX: u32 = 1024;

/// Sets of mappings that the kernel side knows, 4 KiB each: 3 MiB. Processes that were forked and have not changed
/// their mappings share one.
pub const UNWIND_PROCESSES_MAX: u32 = 768;

/// Processes of the families that are sampled, 8 bytes each and the hash table's own: a build starts some hundreds at a time.
pub const FAMILY_MAX: u32 = 16_384;

/// Distinct unwind rules in the kernel, 12 bytes each. 510 shared libraries have 3,600.
pub const UNWIND_RULES_MAX: u32 = 16_384;
