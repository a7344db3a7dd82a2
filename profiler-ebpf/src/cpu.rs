//! On-CPU samples: where every task that is not idle spends its time.

use core::num::NonZeroU64;

use aya_ebpf::{EbpfContext, programs::PerfEventContext};
use aya_log_ebpf::error;
use profiler_common::{
    limits::KERNEL_FRAMES_MAX,
    stats::Counter,
    wire::{
        FLAG_KERNEL_CUT, FLAG_KERNEL_REFUSED, FLAG_TABLES, FRAMES_MAX, RecordHead, RecordKind, SampleHeader,
        StackEnd, WIRE_VERSION,
    },
};

use crate::{
    helpers::{boot_time_ns, current_ids, current_thread_name, kernel_stack},
    maps::{CPU_SCRATCH, EVENTS, NO_CHUNK, RECORD_MASK, Scratch, WAKEUP, count, wakeup_if_filling},
    stack::{mask, walk_user},
    targets, task,
};

/// Ends of stacks that lack nothing an agent could mend, a bit each.
const NOT_TO_BE_MENDED: u64 = StackEnd::COMPLETE | 1 << StackEnd::DepthLimit as u64;

/// Counts a sample and takes it, if it is wanted.
#[inline(always)]
pub fn sample(ctx: &PerfEventContext) {
    let weight = targets::weight(period_ns(ctx));
    if weight == 0 {
        return;
    }
    count(Counter::CpuTaken);
    take(ctx, weight);
}

/// Nanoseconds of CPU time that a sample stands for.
#[inline(always)]
fn period_ns(ctx: &PerfEventContext) -> u64 {
    let context = ctx.as_ptr();
    crate::arch::context_period!(context)
}

/// Takes one sample and writes it to the ring buffer.
#[inline(always)]
fn take(ctx: &PerfEventContext, weight: u32) {
    let Some(scratch) = CPU_SCRATCH.get_ptr_mut(0) else {
        count(Counter::CpuDroppedNoScratch);
        error!(ctx, "no scratch value on this CPU: sample dropped");
        return;
    };
    // SAFETY: the look-up gave this CPU's value; a perf event program is not interrupted by itself.
    let scratch = unsafe { &mut *scratch };
    let task = Task::current();
    walk_user(ctx, scratch, task.tgid, task.start_ns);
    let user_frames = scratch.frames;
    let kernel_frames = append_kernel_stack(ctx, scratch, user_frames);
    scratch.sample.header.value = period_ns(ctx).wrapping_mul(u64::from(weight));
    write_header(ctx, scratch, &task, user_frames, kernel_frames);
    submit(scratch, user_frames + kernel_frames);
}

/// Whose sample it is.
struct Task {
    leader: Option<NonZeroU64>,
    start_ns: u64,
    tgid: u32,
    tid: u32,
}

impl Task {
    #[inline(always)]
    fn current() -> Self {
        let leader = task::group_leader();
        let (tgid, tid) = current_ids();
        Self { leader, start_ns: task::start_ns(leader), tgid, tid }
    }
}

/// Puts the kernel stack behind the user frames; gives the number of its frames.
#[inline(always)]
fn append_kernel_stack(ctx: &PerfEventContext, scratch: &mut Scratch, user_frames: u64) -> u64 {
    const BYTES: u32 = 8 * KERNEL_FRAMES_MAX as u32;
    let index = mask!(user_frames, 2047) as usize;
    let frames = (&raw mut scratch.sample.frames).cast::<u64>();
    // SAFETY: index is below 2 * USER_FRAMES_MAX, and so much room with KERNEL_FRAMES_MAX more slots is there, in slack.
    let behind_user = unsafe { frames.add(index) };
    kernel_stack(ctx, behind_user, BYTES).map_or(0, |bytes| bytes >> 3)
}

/// Fills in everything but the frames and the value.
#[inline(always)]
fn write_header(
    ctx: &PerfEventContext,
    scratch: &mut Scratch,
    task: &Task,
    user_frames: u64,
    kernel_frames: u64,
) {
    let &Task { leader, start_ns, tgid, tid } = task;
    let context = ctx.as_ptr();
    let in_kernel = !crate::arch::is_user_address(crate::arch::context_ip!(context));
    let by = if scratch.chunk == NO_CHUNK { 0 } else { FLAG_TABLES };
    let flags = by | kernel_flags(in_kernel, kernel_frames);
    let header = &mut scratch.sample.header;
    header.head = RecordHead {
        version: WIRE_VERSION,
        kind: RecordKind::CpuSample as u8,
        user_end: scratch.end as u8,
        flags,
        user_frames: user_frames as u16,
        kernel_frames: kernel_frames as u16,
        tgid,
        tid,
        time_ns: boot_time_ns(),
    };
    header.cgroup_id = task::cgroup_id();
    header.start_ns = start_ns;
    header.thread_name = current_thread_name();
    task::read_comm(leader, &raw mut header.comm);
}

/// What is missing of the kernel stack.
#[inline(always)]
fn kernel_flags(in_kernel: bool, frames: u64) -> u8 {
    match frames {
        0 if in_kernel => FLAG_KERNEL_REFUSED,
        frames if frames >= KERNEL_FRAMES_MAX as u64 => FLAG_KERNEL_CUT,
        _ => 0,
    }
}

/// Writes the header and the frames in use to the ring buffer.
#[inline(always)]
fn submit(scratch: &Scratch, frames: u64) {
    const HEADER_BYTES: u64 = size_of::<SampleHeader>() as u64;
    const BYTES_MAX: u64 = HEADER_BYTES + 8 * FRAMES_MAX as u64;
    const { assert!(BYTES_MAX <= RECORD_MASK && RECORD_MASK == 16_383, "the mask below lets every size through") };
    let bytes = mask!(HEADER_BYTES + 8 * frames, 16383);
    // SAFETY: `bytes` is at most RECORD_MASK, and sample and slack together are larger.
    let record =
        unsafe { core::slice::from_raw_parts((&raw const scratch.sample).cast::<u8>(), bytes as usize) };
    // The agent may have to read the process, or what it has mapped of late, for the next sample to be better.
    let is_news = NOT_TO_BE_MENDED >> (scratch.end & 63) & 1 == 0;
    match EVENTS.output::<[u8]>(record, if is_news { WAKEUP } else { wakeup_if_filling() }) {
        Ok(()) => count(Counter::CpuSubmitted),
        Err(_) => count(Counter::CpuDroppedRingFull),
    }
}
