//! Heap samples: taken when a probed allocator function returns, which the program at its entry asks for (uprobe session,
//! kernel 6.13) or a second program sees each time; or at the entry alone.
//!
//! A thread may be preempted in the middle of the program, by another that runs it on the same CPU: counters are added
//! to atomically, and a sample in the making has a scratch slot to itself.

use core::{arch::asm, ffi::c_void};

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray},
    programs::ProbeContext,
};
use profiler_common::{
    heap::{
        ALLOC_PART_WORDS, AllocPart, Call, EXP, HEAP_FRAMES_MAX, HeapCounter, Hits, LiveKey, Outer,
        PART_LIVE_FULL, PART_NOT_LIVE, POINT_NESTS, Pending, Point, SCRATCH_SLOTS, TARGET_ENTRY_ONLY,
        TARGET_EVERY_RETURN, TARGET_NO_LIVE, Target, unsampled,
    },
    wire::{FLAG_TABLES, Frame, RecordHead, RecordKind, SampleHeader, StackEnd, WIRE_VERSION},
};

use crate::{
    arch,
    helpers::{
        attach_cookie, boot_time_ns, current_ids, current_thread_name, monotonic_ns, random, read_user,
    },
    maps::{EVENTS, NO_CHUNK, Scratch, wakeup_if_filling},
    stack::{go_to_caller, load_context, mask},
    table, task,
};

/// Probed functions: key the cookie of the probe. Written by the agent while no probe has that cookie. This map and those
/// below have one entry unless the agent sizes them before loading (`profiler_common::heap`).
#[map]
pub static HEAP_POINTS: Array<Point> = Array::with_max_entries(1, 0);

/// Processes whose heap is profiled: key [`Point::target`]. Written by the agent.
#[map]
pub static HEAP_TARGETS: Array<Target> = Array::with_max_entries(1, 0);

/// Probes hit, and what samples cost: key as [`HEAP_TARGETS`]. Written here, read by the agent.
#[map]
pub static HEAP_HITS: PerCpuArray<Hits> = PerCpuArray::with_max_entries(1, 0);

/// Threads inside a probed function: key thread id. An entry is made and deleted here; that of a thread which never comes
/// back is replaced when its id comes up again. When it is full, samples are dropped and counted.
#[map]
pub static HEAP_PENDING: HashMap<u32, Pending> = HashMap::with_max_entries(1, 0);

/// Threads of targets whose returns are not probed, and the function that they entered last of those that may call others: key
/// thread id. Written here; when it is full, the oldest go, whose threads may count a nested call.
#[map]
pub static HEAP_OUTER: LruHashMap<u32, Outer> = LruHashMap::with_max_entries(1, 0);

/// `BPF_F_NO_PREALLOC`: memory is taken as entries are made.
const NO_PREALLOC: u32 = 1;

/// Sampled allocations in use, and the time of each one's sample. Made and deleted here; the agent reads all of them for a
/// snapshot, and deletes those of processes that are gone. When it is full, a sample is not among those in use, counted.
#[map]
pub static HEAP_LIVE: HashMap<LiveKey, u64> = HashMap::with_max_entries(1, NO_PREALLOC);

/// Counters: key [`HeapCounter`]. Written here, summed by the agent.
#[map]
pub static HEAP_STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(HeapCounter::COUNT, 0);

/// Samples in the making. Only this program uses it.
#[map]
pub static HEAP_SCRATCH: PerCpuArray<HeapScratch> = PerCpuArray::with_max_entries(1, 0);

/// A sample in the making.
#[repr(C)]
pub struct HeapScratch {
    /// 1 while a thread uses it.
    busy: u64,
    scratch: Scratch,
}

/// Empty, and one of its own for each program. That a program has a tail call, though to nowhere, is what counts: see [`probed`].
#[map]
pub static HEAP_NO_PROGRAM: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// What the program answers at the entry of a function: its return is of no interest.
const SKIP_RETURN: u32 = 1;
/// The program is to run at the function's return too.
const WANT_RETURN: u32 = 0;

/// A nested call lies below its caller's frame within this many bytes of stack, or in its place if it is the last thing
/// that the caller does. Anything else is a thread that left the outer call otherwise than by returning.
const NESTED_BYTES_MAX: u64 = 64 << 10;
/// So is a call that began longer ago: a thread that was left by an exception may come back to the same depth.
const NESTED_NS_MAX: u64 = 1_000_000_000;

/// The function's entry or its return: one program for both.
#[inline(always)]
pub fn session(ctx: *mut c_void) -> u32 {
    let Some((index, point)) = probed(ctx) else { return SKIP_RETURN };
    let (_, tid) = current_ids();
    if load_context!(ctx, 128) == point.address {
        return enter(ctx, index, point, tid);
    }
    leave(ctx, point, tid);
    WANT_RETURN
}

/// The function's entry; its return is probed in any case, or never.
#[inline(always)]
pub fn entry(ctx: *mut c_void) {
    if let Some((index, point)) = probed(ctx) {
        let (_, tid) = current_ids();
        enter(ctx, index, point, tid);
    }
}

/// The function's return.
#[inline(always)]
pub fn returned(ctx: *mut c_void) {
    if let Some((_, point)) = probed(ctx) {
        let (_, tid) = current_ids();
        leave(ctx, point, tid);
    }
}

/// The probe that was hit; `None` for one of which the agent knows nothing, counted.
///
/// The tail call leads nowhere. That it is there keeps the program's variables on the thread's own stack: from 6.13 on they
/// are in memory of the CPU (kernel/bpf/verifier.c: `bpf_enable_priv_stack`), unless a program has tail calls, and a thread
/// that preempts this one in the middle of the program, which nothing prevents in a uprobe (kernel/trace/bpf_trace.c:
/// `uprobe_prog_run`), would overwrite them: pointers, which the kernel then follows.
#[inline(always)]
fn probed(ctx: *mut c_void) -> Option<(u32, &'static Point)> {
    let index = attach_cookie(ctx) as u32;
    let point = HEAP_POINTS.get(index);
    if point.is_none() {
        // SAFETY: the array is empty, so that the program goes on here.
        unsafe { HEAP_NO_PROGRAM.tail_call(&ProbeContext::new(ctx), 0) };
        count(HeapCounter::Stray, 1);
    }
    Some((index, point?))
}

#[inline(always)]
fn enter(ctx: *mut c_void, index: u32, point: &Point, tid: u32) -> u32 {
    let target = HEAP_TARGETS.get(point.target);
    let (Some(target), Some(call)) = (target, Call::decode(point.call)) else {
        count(HeapCounter::Stray, 1);
        return SKIP_RETURN;
    };
    if let Call::Free = call {
        hit(point.target, |hits| &raw mut hits.frees, 1);
        take_live(target.id, argument(ctx, point, 0));
        return SKIP_RETURN;
    }
    hit(point.target, |hits| &raw mut hits.allocs, 1);
    let sp = load_context!(ctx, 152);
    if target.flags & TARGET_ENTRY_ONLY != 0 {
        enter_only(ctx, index, (point, target, call), tid, sp);
        return SKIP_RETURN;
    }
    if is_nested(tid, sp) {
        return SKIP_RETURN;
    }
    let size = size(ctx, point, call);
    let is_sample = toss(size, target.rate) && is_time(target);
    if !is_sample && point.flags & POINT_NESTS == 0 {
        return SKIP_RETURN;
    }
    let mut pending = Pending {
        sp,
        size,
        result: 0,
        old: 0,
        old_time_ns: 0,
        time_ns: boot_time_ns(),
        point: index,
        rate: if is_sample { target.rate } else { 0 },
        scale: target.scale,
        reserved: 0,
    };
    match call {
        Call::AllocateInto => pending.result = argument(ctx, point, 0),
        // It gives the old memory back, but only if it succeeds: then it is put back. Deleted now, for at the return
        // another thread may have got the address.
        Call::Reallocate | Call::ReallocateArray => {
            let old = argument(ctx, point, 0);
            if let Some(time_ns) = take_live(target.id, old) {
                (pending.old, pending.old_time_ns) = (old, time_ns);
            }
        }
        _ => {}
    }
    match HEAP_PENDING.insert(tid, pending, 0) {
        Ok(()) => WANT_RETURN,
        Err(_) => {
            if is_sample {
                count(HeapCounter::Taken, 1);
                count(HeapCounter::DroppedPendingFull, 1);
            }
            SKIP_RETURN
        }
    }
}

/// Samples the call by what is known at its entry.
#[inline(always)]
fn enter_only(
    ctx: *mut c_void,
    index: u32,
    (point, target, call): (&Point, &Target, Call),
    tid: u32,
    sp: u64,
) {
    let mut caller = 0;
    // The call has just written it; where it cannot be read all the same, the stack ends here.
    let _ = read_user(sp, &raw mut caller);
    if is_inside_outer(tid, sp, index) {
        return;
    }
    if point.flags & POINT_NESTS != 0 {
        // When there is no room, the oldest goes.
        let _ = HEAP_OUTER.insert(tid, Outer { sp, caller, point: index.into() }, 0);
    }
    let size = size(ctx, point, call);
    if !toss(size, target.rate) || !is_time(target) {
        return;
    }
    count(HeapCounter::Taken, 1);
    let part = AllocPart {
        pointer: 0,
        target: target.id,
        rate: target.rate,
        scale: target.scale,
        flags: PART_NOT_LIVE,
    };
    sample(ctx, point.target, part, size, Some((caller, sp)));
}

/// Whether the call comes from the function that the thread entered last of those that may call others: it lies below it,
/// whose return address is still there. A tail call lies in its place.
#[inline(always)]
fn is_inside_outer(tid: u32, sp: u64, index: u32) -> bool {
    let Some(outer) = HEAP_OUTER.get_ptr(tid) else { return false };
    // SAFETY: the look-up gave a value that stays readable for the run of the program; only this thread writes it.
    let Outer { sp: outer_sp, caller, point } = unsafe { outer.read() };
    let is_below = outer_sp.wrapping_sub(sp) < NESTED_BYTES_MAX;
    if !is_below || (outer_sp == sp && point == u64::from(index)) {
        return false;
    }
    let mut found = 0;
    read_user(outer_sp, &raw mut found).is_some() && found == caller
}

/// Whether samples are taken now.
#[inline(always)]
fn is_time(target: &Target) -> bool {
    let now_ns = boot_time_ns();
    // Volatile: the agent writes them meanwhile.
    // SAFETY: fields of a map value, which stays readable.
    let (begin_ns, end_ns) =
        unsafe { ((&raw const target.begin_ns).read_volatile(), (&raw const target.end_ns).read_volatile()) };
    begin_ns <= now_ns && now_ns < end_ns
}

/// Whether the thread is inside another probed function. One that it has left without returning is forgotten.
#[inline(always)]
fn is_nested(tid: u32, sp: u64) -> bool {
    let Some(outer) = HEAP_PENDING.get_ptr(tid) else { return false };
    // SAFETY: the look-up gave a value of a preallocated map, which stays readable; only this thread writes it.
    let Pending { sp: outer_sp, time_ns, .. } = unsafe { outer.read() };
    let is_inside = outer_sp.wrapping_sub(sp) < NESTED_BYTES_MAX;
    if is_inside && boot_time_ns() - time_ns < NESTED_NS_MAX {
        return true;
    }
    count(HeapCounter::Unreturned, 1);
    // It is there: only this thread deletes it.
    let _ = HEAP_PENDING.remove(tid);
    false
}

/// Bytes asked for. A product that overflows is one that the allocator refuses.
#[inline(always)]
fn size(ctx: *mut c_void, point: &Point, call: Call) -> u64 {
    match call {
        Call::Allocate | Call::Free => argument(ctx, point, 0),
        Call::Reallocate | Call::AllocateAligned => argument(ctx, point, 1),
        Call::AllocateInto => argument(ctx, point, 2),
        Call::AllocateArray => argument(ctx, point, 0).wrapping_mul(argument(ctx, point, 1)),
        Call::ReallocateArray => argument(ctx, point, 1).wrapping_mul(argument(ctx, point, 2)),
    }
}

/// The coin of one allocation.
#[inline(always)]
fn toss(size: u64, rate: u32) -> bool {
    let exp = |k| {
        let k = mask!(k, 2047) as usize;
        // SAFETY: k is below 2048, the length of the table. Volatile, since LLVM would copy the table to the stack.
        unsafe { EXP.as_ptr().add(k).read_volatile() }
    };
    rate != 0 && u64::from(random()) >= unsampled(size, rate, exp)
}

/// The registers that an argument may be in, numbered by the psABI.
#[inline(always)]
fn argument(ctx: *mut c_void, point: &Point, index: u32) -> u64 {
    match (point.arguments >> (4 * index)) & 15 {
        5 => load_context!(ctx, 112),
        4 => load_context!(ctx, 104),
        1 => load_context!(ctx, 96),
        2 => load_context!(ctx, 88),
        8 => load_context!(ctx, 72),
        9 => load_context!(ctx, 64),
        0 => load_context!(ctx, 80),
        _ => 0,
    }
}

/// The time of a live sample, which no longer is one.
#[inline(always)]
fn take_live(target: u32, pointer: u64) -> Option<u64> {
    if pointer == 0 {
        return None;
    }
    let key = LiveKey { pointer, target, reserved: 0 };
    let live = HEAP_LIVE.get_ptr(key)?;
    // SAFETY: the look-up gave a value that stays readable for the run of the program.
    let time_ns = unsafe { live.read() };
    HEAP_LIVE.remove(key).ok()?;
    count(HeapCounter::Freed, 1);
    Some(time_ns)
}

#[inline(always)]
fn leave(ctx: *mut c_void, probed: &Point, tid: u32) {
    hit(probed.target, |hits| &raw mut hits.returns, 1);
    let Some(pending) = HEAP_PENDING.get_ptr(tid) else { return stray(probed) };
    // SAFETY: as in `is_nested`.
    let pending = unsafe { pending.read() };
    if load_context!(ctx, 152) != pending.sp + 8 {
        return stray(probed);
    }
    // It is there: only this thread deletes it.
    let _ = HEAP_PENDING.remove(tid);
    let Some(point) = HEAP_POINTS.get(pending.point) else { return };
    let Some(target) = HEAP_TARGETS.get(point.target) else { return };
    let pointer = result(ctx, &pending);
    if pointer == 0 {
        if pending.old != 0 && pending.size != 0 {
            let key = LiveKey { pointer: pending.old, target: target.id, reserved: 0 };
            if HEAP_LIVE.insert(key, pending.old_time_ns, 0).is_err() {
                count(HeapCounter::LiveFull, 1);
            }
        }
        return;
    }
    if pending.rate != 0 {
        count(HeapCounter::Taken, 1);
        let flags = if target.flags & TARGET_NO_LIVE == 0 { 0 } else { PART_NOT_LIVE };
        let Pending { rate, scale, size, .. } = pending;
        let part = AllocPart { pointer, target: target.id, rate, scale, flags };
        sample(ctx, point.target, part, size, None);
    }
}

/// A return that no entry asked for.
#[inline(always)]
fn stray(probed: &Point) {
    let every = HEAP_TARGETS.get(probed.target).is_some_and(|target| target.flags & TARGET_EVERY_RETURN != 0);
    if !every {
        count(HeapCounter::Stray, 1);
    }
}

/// The new allocation's address; 0 where there is none.
#[inline(always)]
fn result(ctx: *mut c_void, pending: &Pending) -> u64 {
    let returned = load_context!(ctx, 80);
    if pending.result == 0 {
        return returned;
    }
    let mut pointer = 0;
    match returned as u32 {
        0 => read_user(pending.result, &raw mut pointer).map_or(0, |()| pointer),
        _ => 0,
    }
}

/// Takes the stack of the caller and writes the record. At the entry of a function, the caller is the return address and
/// where it lies.
#[inline(always)]
fn sample(ctx: *mut c_void, slot: u32, part: AllocPart, size: u64, caller: Option<(u64, u64)>) {
    let began_ns = monotonic_ns();
    let Some((scratch_slot, value)) = claim_scratch() else {
        count(HeapCounter::DroppedNoScratch, 1);
        return;
    };
    // SAFETY: a value of this CPU, and `claim_scratch` made it this thread's alone.
    let scratch = unsafe { &mut (*value).scratch };
    arch::context_registers(ctx, &mut scratch.regs);
    if let Some((address, sp)) = caller {
        arch::return_to(&mut scratch.regs, address, sp + 8);
    }
    fill(scratch_slot, scratch, size);
    submit(scratch, part);
    // SAFETY: as above; volatile, so that it comes last.
    unsafe { (&raw mut (*value).busy).write_volatile(0) };
    hit(slot, |hits| &raw mut hits.sample_ns, monotonic_ns().wrapping_sub(began_ns));
}

/// A slot of this CPU that no other thread uses, for one that was preempted may.
#[inline(always)]
fn claim_scratch() -> Option<(u32, *mut HeapScratch)> {
    let mut slot = 0;
    while slot < SCRATCH_SLOTS {
        let value = HEAP_SCRATCH.get_ptr_mut(slot)?;
        // SAFETY: a live map value; only its address is taken.
        let busy = unsafe { &raw mut (*value).busy };
        if exchange(busy, 1) == 0 {
            return Some((slot, value));
        }
        slot += 1;
    }
    None
}

/// Walks the user stack, then fills in the header.
#[inline(always)]
fn fill(slot: u32, scratch: &mut Scratch, size: u64) {
    let (tgid, tid) = current_ids();
    let leader = task::group_leader();
    let start_ns = task::start_ns(leader);
    walk(slot, scratch, tgid, start_ns);
    let header = &mut scratch.sample.header;
    header.head = RecordHead {
        version: WIRE_VERSION,
        kind: RecordKind::AllocSample as u8,
        user_end: scratch.end as u8,
        flags: if scratch.chunk == NO_CHUNK { 0 } else { FLAG_TABLES },
        user_frames: scratch.frames as u16,
        kernel_frames: 0,
        tgid,
        tid,
        time_ns: boot_time_ns(),
    };
    header.value = size;
    header.cgroup_id = task::cgroup_id();
    header.start_ns = start_ns;
    header.thread_name = current_thread_name();
    task::read_comm(leader, &raw mut header.comm);
}

/// As `stack::walk_user`, from the caller of the function, whose registers are there. The frames lie behind the part.
#[inline(always)]
fn walk(slot: u32, scratch: &mut Scratch, tgid: u32, start_ns: u64) {
    scratch.chunk = table::chunk_of(tgid, start_ns);
    scratch.sample.frames[ALLOC_PART_WORDS] = Frame::raw(scratch.regs.ip, true).0;
    // Inside the call instruction, where all registers are known.
    scratch.regs.ip = scratch.regs.ip.wrapping_sub(1);
    scratch.frames = 1;
    scratch.end = 0;
    let mut i = 1;
    while i < HEAP_FRAMES_MAX as u32 {
        if heap_step(i, slot) != 0 {
            return;
        }
        i += 1;
    }
    scratch.end = StackEnd::DepthLimit as u64;
}

/// As `stack::step`, on a scratch slot of this program.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn heap_step(frame: u32, slot: u32) -> u32 {
    let Some(value) = HEAP_SCRATCH.get_ptr_mut(slot) else { return 1 };
    // SAFETY: the caller has claimed the slot, and a thread stays on its CPU while it runs a program.
    let scratch = unsafe { &mut (*value).scratch };
    match go_to_caller(scratch) {
        Ok(()) => {
            let index = mask!(u64::from(frame), 127) as usize + ALLOC_PART_WORDS;
            let frames = (&raw mut scratch.sample.frames).cast::<u64>();
            let is_return_address = scratch.regs.exact == 0;
            // SAFETY: index is at most 130, and the array has FRAMES_MAX slots.
            unsafe { frames.add(index).write(Frame::raw(scratch.regs.ip, is_return_address).0) };
            scratch.frames = u64::from(frame) + 1;
            0
        }
        Err(end) => {
            scratch.end = end as u64;
            1
        }
    }
}

/// Makes the sample one of those in use, and writes it to the ring buffer. One that does not get there is not in use
/// either, for nobody would know its stack.
#[inline(always)]
fn submit(scratch: &mut Scratch, mut part: AllocPart) {
    const FIXED_BYTES: u64 = (size_of::<SampleHeader>() + size_of::<AllocPart>()) as u64;
    const { assert!(FIXED_BYTES + 8 * (HEAP_FRAMES_MAX as u64) < 2048, "the mask below lets every size through") };
    let key = LiveKey { pointer: part.pointer, target: part.target, reserved: 0 };
    if part.flags & PART_NOT_LIVE == 0
        && HEAP_LIVE.insert(key, scratch.sample.header.head.time_ns, 0).is_err()
    {
        count(HeapCounter::LiveFull, 1);
        part.flags = PART_NOT_LIVE | PART_LIVE_FULL;
    }
    let words = (&raw mut scratch.sample.frames).cast::<u64>();
    // SAFETY: the first words of the array, which the walk leaves to the part.
    unsafe { words.cast::<AllocPart>().write(part) };
    let bytes = mask!(FIXED_BYTES + 8 * scratch.frames, 2047);
    // SAFETY: `bytes` is below 2048, and the sample is larger.
    let record =
        unsafe { core::slice::from_raw_parts((&raw const scratch.sample).cast::<u8>(), bytes as usize) };
    match EVENTS.output::<[u8]>(record, wakeup_if_filling()) {
        Ok(()) => count(HeapCounter::Submitted, 1),
        Err(_) => {
            count(HeapCounter::DroppedRingFull, 1);
            // It may not be there.
            let _ = HEAP_LIVE.remove(key);
        }
    }
}

/// Adds to one of the counts of a target.
#[inline(always)]
fn hit(slot: u32, field: impl FnOnce(&mut Hits) -> *mut u64, amount: u64) {
    if let Some(hits) = HEAP_HITS.get_ptr_mut(slot) {
        // SAFETY: a live map value; only the address of a field is taken.
        add(field(unsafe { &mut *hits }), amount);
    }
}

#[inline(always)]
fn count(counter: HeapCounter, amount: u64) {
    if let Some(slot) = HEAP_STATS.get_ptr_mut(counter as u32) {
        add(slot, amount);
    }
}

/// Adds to a map value that other threads add to as well. In assembly: rustc knows no atomics of this target.
#[inline(always)]
fn add(slot: *mut u64, amount: u64) {
    // SAFETY: a live, aligned map value that programs only add to.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) slot, in(reg) amount, options(nostack)) };
}

/// Puts a value in place of another, which it gives (kernel 5.12).
#[inline(always)]
fn exchange(slot: *mut u64, value: u64) -> u64 {
    let mut value = value;
    // SAFETY: a live, aligned map value that programs exchange, or write while it is theirs.
    unsafe { asm!("{1} = xchg_64({0} + 0, {1})", in(reg) slot, inout(reg) value, options(nostack)) };
    value
}
