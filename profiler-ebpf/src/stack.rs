//! The user stack of the sampled task: its registers, then the walk from frame to caller.
//!
//! Each frame has a rule: from the tables where they cover its address, else that of frame pointers.

use aya_ebpf::{EbpfContext, programs::PerfEventContext};
use profiler_common::{
    limits::USER_FRAMES_MAX,
    unwind::{Block, ReadUser, Step, StopReason, UnwindRule},
    wire::{Frame, StackEnd},
};

use crate::{
    arch::{self, Regs},
    helpers::{current_user_regs, read_kernel, read_user},
    maps::{CPU_SCRATCH, NO_CHUNK, Scratch, kernel_fact, setting},
    table, task,
};

/// Loads a word of the context at a constant offset. In assembly: LLVM would merge this load with one of another branch
/// into a load at a computed address, which the verifier refuses ("dereference of modified ctx ptr").
macro_rules! load_context {
    ($ctx:expr, $offset:literal) => {{
        let value: u64;
        // SAFETY: the offset lies inside the context, as the verifier checks.
        unsafe {
            core::arch::asm!(concat!("{0} = *(u64 *)({1} + ", $offset, ")"), out(reg) value, in(reg) $ctx,
                options(readonly, nostack))
        };
        value
    }};
}
pub(crate) use load_context;

/// Ands with a constant in a way that LLVM can neither drop (it knows the range, the verifier does not) nor move.
macro_rules! mask {
    ($value:expr, $mask:literal) => {{
        let mut value: u64 = $value;
        // SAFETY: register arithmetic.
        unsafe { core::arch::asm!(concat!("{0} &= ", $mask), inout(reg) value, options(pure, nomem, nostack)) };
        value
    }};
}
pub(crate) use mask;

/// Fills `scratch.sample.frames` with the user stack, leaf first, and sets `scratch.frames`, `scratch.end` and
/// `scratch.chunk`.
#[inline(always)]
pub fn walk_user(ctx: &PerfEventContext, scratch: &mut Scratch, tgid: u32, start_ns: u64) {
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
    let first = Frame::raw(scratch.regs.ip, false).0;
    scratch.sample.frames[0] = first;
    scratch.frames = 1;
    let mut turn = 0;
    while turn < TURNS_MAX {
        if walk_on() != 0 {
            return;
        }
        turn += 1;
    }
    scratch.end = StackEnd::DepthLimit as u64;
}

/// Steps of one turn. The verifier follows a loop from start to end once: two loops of 8 and 128 turns instead of one
/// of 1,024, the inner one in a function that it checks by itself.
pub const TURN_STEPS: u32 = 128;
/// Turns that make [`USER_FRAMES_MAX`] steps.
pub const TURNS_MAX: u32 = USER_FRAMES_MAX as u32 / TURN_STEPS;

/// Walks on for one turn; 0 while there may be more frames, 1 at the end.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_on() -> u32 {
    let mut taken = 0;
    while taken < TURN_STEPS {
        if step() != 0 {
            return 1;
        }
        taken += 1;
    }
    0
}

/// User registers at the sample: the context's own in user mode, else those saved on entry to the kernel.
#[inline(always)]
pub fn read_user_registers(ctx: &PerfEventContext, scratch: &mut Scratch) -> Option<()> {
    let context = ctx.as_ptr();
    if arch::is_user_address(arch::context_ip!(context)) {
        arch::context_registers(context, &mut scratch.regs);
        return Some(());
    }
    let saved = if kernel_fact!(has_task_pt_regs) == 1 {
        current_user_regs()
    } else {
        task::saved_user_regs(8 * arch::PT_REGS_WORDS as u64)?
    };
    read_kernel(saved, &raw mut scratch.user_regs)?;
    arch::saved_registers(&scratch.user_regs, &mut scratch.regs);
    arch::is_user_address(scratch.regs.ip).then_some(())
}

/// Walks from one frame to its caller; 0 while there may be another, 1 at the end.
///
/// A global function, so that the verifier checks it once by itself and not once per turn of the loop. It finds the state
/// in this CPU's scratch value.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step() -> u32 {
    let Some(scratch) = CPU_SCRATCH.get_ptr_mut(0) else { return 1 };
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

/// Appends the frame that the registers are of, unless as many were taken as are asked for.
#[inline(always)]
fn push_frame(scratch: &mut Scratch) -> Result<(), StackEnd> {
    let taken = scratch.frames;
    if taken >= u64::from(setting!(user_frames_limit)) {
        return Err(StackEnd::DepthLimit);
    }
    let Regs { ip, exact, .. } = scratch.regs;
    let index = mask!(taken, 1023) as usize;
    let frames = (&raw mut scratch.sample.frames).cast::<u64>();
    // SAFETY: index is at most 1023, and the array has FRAMES_MAX slots.
    unsafe { frames.add(index).write(Frame::raw(ip, exact == 0).0) };
    scratch.frames = taken + 1;
    Ok(())
}

/// Makes `scratch.regs` the caller's.
///
/// Generated code and code without unwind information often keeps frame pointers; where they lead nowhere, the reason is
/// that there was no rule.
#[inline(always)]
pub fn go_to_caller(scratch: &mut Scratch) -> Result<(), StackEnd> {
    let has_tables = scratch.chunk != NO_CHUNK;
    let (rule, missing) = match find_rule(scratch, has_tables) {
        Ok(rule) => (rule, None),
        Err(missing) => (&arch::FRAME_POINTER, missing),
    };
    go_by(rule, scratch).map_err(|reason| match (reason, missing) {
        (StopReason::FramePointerZero, _) if !has_tables => StackEnd::Root,
        (StopReason::FramePointerZero, _) | (_, None) => stack_end(reason),
        (_, Some(missing)) => missing,
    })?;
    if has_tables || chain_rises(&scratch.regs) { Ok(()) } else { Err(StackEnd::NotRising) }
}

/// The rule from the tables, or what they lack; nothing where there are none.
#[inline(always)]
fn find_rule(scratch: &Scratch, has_tables: bool) -> Result<&'static UnwindRule, Option<StackEnd>> {
    if !has_tables {
        return Err(None);
    }
    table::find_rule(scratch.chunk, scratch.regs.lookup_address()).map_err(Some)
}

/// In a process without tables nothing but its order tells a chain of frame pointers from other uses of the register.
///
/// ```text
/// sp ▶         (behind the frame that was left)
/// sp - 8       return address
/// sp - 16      frame pointer, above sp or 0
/// ```
#[inline(always)]
fn chain_rises(caller: &Regs) -> bool {
    let fp = arch::frame_pointer(caller);
    fp == 0 || fp >= arch::stack_pointer(caller)
}

/// Makes `scratch.regs` the caller's by a rule; leaves them as they are where it leads nowhere.
#[inline(always)]
fn go_by(rule: &UnwindRule, scratch: &mut Scratch) -> Result<(), StopReason> {
    let Scratch { regs, block, word, .. } = scratch;
    match arch::step(rule, regs, &mut UserStack { block, word }) {
        Step::Caller => Ok(()),
        Step::Stop(reason) => Err(reason),
    }
}

/// The stack of the sampled task.
struct UserStack<'a> {
    block: &'a mut Block,
    word: &'a mut u64,
}

impl ReadUser for UserStack<'_> {
    #[inline(always)]
    fn read_u64(&mut self, addr: u64) -> Option<u64> {
        read_user(addr, &raw mut *self.word)?;
        Some(*self.word)
    }

    #[inline(always)]
    fn read_block64(&mut self, addr: u64) -> Option<&Block> {
        read_user(addr, &raw mut *self.block)?;
        Some(self.block)
    }
}

#[inline(always)]
fn stack_end(reason: StopReason) -> StackEnd {
    match reason {
        StopReason::End | StopReason::ReturnAddressZero => StackEnd::Root,
        StopReason::FramePointerZero => StackEnd::FramePointerZero,
        StopReason::NoMapping => StackEnd::NoMapping,
        StopReason::NoUnwindInformation => StackEnd::NoUnwindInformation,
        StopReason::InvalidRule => StackEnd::InvalidRule,
        StopReason::RegisterLost => StackEnd::RegisterLost,
        StopReason::ReadFailed => StackEnd::ReadFailed,
        StopReason::NotRising => StackEnd::NotRising,
        StopReason::DepthLimit => StackEnd::DepthLimit,
    }
}
