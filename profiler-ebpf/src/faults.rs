//! Page faults: where the memory of processes grows. The agent finds out whose page it is; this says where it was touched.

use aya_ebpf::{EbpfContext, macros::map, maps::PerCpuArray, programs::PerfEventContext};
use profiler_common::{
    limits::USER_FRAMES_MAX,
    stats::Counter,
    wire::{
        FAULT_PART_WORDS, FLAG_TABLES, FaultPart, Frame, RecordHead, RecordKind, SampleHeader, StackEnd,
        WIRE_VERSION,
    },
};

use crate::{
    arch,
    helpers::{boot_time_ns, current_ids, current_thread_name},
    maps::{EVENTS, NO_CHUNK, RECORD_MASK, Scratch, WAKEUP, count, setting},
    stack::{TURN_STEPS, TURNS_MAX, go_to_caller, mask, read_user_registers},
    table, targets, task,
};

/// As `CPU_SCRATCH`, of this program alone: a clock event may interrupt it.
#[map]
pub static FAULT_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Counts a sample and takes it.
#[inline(always)]
pub fn sample(ctx: &PerfEventContext) {
    if !targets::wants() {
        count(Counter::FaultFiltered);
        return;
    }
    count(Counter::FaultTaken);
    let Some(scratch) = FAULT_SCRATCH.get_ptr_mut(0) else {
        count(Counter::FaultDroppedNoScratch);
        return;
    };
    // SAFETY: this CPU's value. The event is counted with preemption off, and a fault inside of one is not counted.
    let scratch = unsafe { &mut *scratch };
    let (leader, (tgid, tid)) = (task::group_leader(), current_ids());
    let start_ns = task::start_ns(leader);
    walk(ctx, scratch, tgid, start_ns);
    let context = ctx.as_ptr();
    let header = &mut scratch.sample.header;
    header.head = RecordHead {
        version: WIRE_VERSION,
        kind: RecordKind::PageFault as u8,
        user_end: scratch.end as u8,
        flags: if scratch.chunk == NO_CHUNK { 0 } else { FLAG_TABLES },
        user_frames: scratch.frames as u16,
        kernel_frames: 0,
        tgid,
        tid,
        time_ns: boot_time_ns(),
    };
    header.value = arch::context_period!(context);
    header.cgroup_id = task::cgroup_id();
    header.start_ns = start_ns;
    header.thread_name = current_thread_name();
    task::read_comm(leader, &raw mut header.comm);
    let part = FaultPart { address: arch::context_address!(context) };
    let words = (&raw mut scratch.sample.frames).cast::<FaultPart>();
    // SAFETY: the first words of the array, which the walk leaves to the part.
    unsafe { words.write(part) };
    submit(scratch);
}

/// As `stack::walk_user`, with the frames behind the part.
#[inline(always)]
fn walk(ctx: &PerfEventContext, scratch: &mut Scratch, tgid: u32, start_ns: u64) {
    scratch.frames = 0;
    scratch.end = 0;
    scratch.chunk = NO_CHUNK;
    if !task::has_user_memory() {
        scratch.end = StackEnd::NoUserStack as u64;
        return;
    }
    if read_user_registers(ctx, scratch).is_none() {
        scratch.end = StackEnd::NoRegisters as u64;
        return;
    }
    scratch.chunk = table::chunk_of(tgid, start_ns);
    scratch.sample.frames[FAULT_PART_WORDS] = Frame::raw(scratch.regs.ip, false).0;
    scratch.frames = 1;
    let mut turn = 0;
    while turn < TURNS_MAX {
        if fault_walk_on() != 0 {
            return;
        }
        turn += 1;
    }
    scratch.end = StackEnd::DepthLimit as u64;
}

/// As `stack::walk_on`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn fault_walk_on() -> u32 {
    let mut taken = 0;
    while taken < TURN_STEPS {
        if fault_step() != 0 {
            return 1;
        }
        taken += 1;
    }
    0
}

/// As `stack::step`, on this program's scratch value.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn fault_step() -> u32 {
    let Some(scratch) = FAULT_SCRATCH.get_ptr_mut(0) else { return 1 };
    // SAFETY: the look-up gave this CPU's value, and nothing else on this CPU uses it while the program runs.
    let scratch = unsafe { &mut *scratch };
    match go_to_caller(scratch).and_then(|()| push_frame(scratch)) {
        Ok(()) => 0,
        Err(end) => {
            scratch.end = end as u64;
            1
        }
    }
}

/// As `stack::push_frame`, behind the part.
#[inline(always)]
fn push_frame(scratch: &mut Scratch) -> Result<(), StackEnd> {
    let taken = scratch.frames;
    if taken >= u64::from(setting!(user_frames_limit)) {
        return Err(StackEnd::DepthLimit);
    }
    let is_return_address = scratch.regs.exact == 0;
    let index = mask!(taken, 1023) as usize + FAULT_PART_WORDS;
    let frames = (&raw mut scratch.sample.frames).cast::<u64>();
    // SAFETY: index is at most USER_FRAMES_MAX, and the array has FRAMES_MAX slots, of which no kernel frame uses one.
    unsafe { frames.add(index).write(Frame::raw(scratch.regs.ip, is_return_address).0) };
    scratch.frames = taken + 1;
    Ok(())
}

/// Writes the header, the part and the frames in use to the ring buffer.
#[inline(always)]
fn submit(scratch: &Scratch) {
    const FIXED_BYTES: u64 = (size_of::<SampleHeader>() + size_of::<FaultPart>()) as u64;
    const { assert!(FIXED_BYTES + 8 * USER_FRAMES_MAX as u64 <= RECORD_MASK && RECORD_MASK == 16_383) };
    let bytes = mask!(FIXED_BYTES + 8 * scratch.frames, 16383);
    // SAFETY: `bytes` is at most RECORD_MASK, and sample and slack together are larger.
    let record =
        unsafe { core::slice::from_raw_parts((&raw const scratch.sample).cast::<u8>(), bytes as usize) };
    // The agent is to look at the page while it is there.
    match EVENTS.output::<[u8]>(record, WAKEUP) {
        Ok(()) => count(Counter::FaultSubmitted),
        Err(_) => count(Counter::FaultDroppedRingFull),
    }
}
