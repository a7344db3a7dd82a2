//! The user stack of the sampled task: its registers, then the walk along frame pointers.

use aya_ebpf::{EbpfContext, programs::PerfEventContext};
use profiler_common::{
    limits::USER_FRAMES_MAX,
    wire::{Frame, StackEnd},
};

use crate::{
    arch,
    helpers::{current_user_regs, read_kernel, read_user},
    maps::{CPU_SCRATCH, Scratch, kernel_fact},
    task,
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

/// Fills `scratch.sample.frames` with the user stack, leaf first, and sets `scratch.frames` and `scratch.end`.
#[inline(always)]
pub fn walk_user(ctx: &PerfEventContext, scratch: &mut Scratch) {
    scratch.frames = 0;
    scratch.end = 0;
    if !task::has_user_memory() {
        scratch.end = StackEnd::NoUserStack as u64;
        return;
    }
    if read_user_registers(ctx, scratch).is_none() {
        scratch.end = StackEnd::NoRegisters as u64;
        return;
    }
    let first = Frame::raw(scratch.ip, false).0;
    scratch.sample.frames[0] = first;
    scratch.frames = 1;
    let mut i = 1;
    while i < USER_FRAMES_MAX as u32 {
        if step(i) != 0 {
            return;
        }
        i += 1;
    }
    scratch.end = StackEnd::DepthLimit as u64;
}

/// User registers at the sample: the context's own in user mode, else those saved on entry to the kernel.
#[inline(always)]
fn read_user_registers(ctx: &PerfEventContext, scratch: &mut Scratch) -> Option<()> {
    let context = ctx.as_ptr();
    let ip = arch::context_ip!(context);
    if arch::is_user_address(ip) {
        scratch.ip = ip;
        scratch.fp = arch::context_fp!(context);
        return Some(());
    }
    let saved = if kernel_fact!(has_task_pt_regs) == 1 {
        current_user_regs()
    } else {
        task::saved_user_regs(8 * arch::PT_REGS_WORDS as u64)?
    };
    read_kernel(saved, &raw mut scratch.user_regs)?;
    scratch.ip = scratch.user_regs[arch::IP];
    scratch.fp = scratch.user_regs[arch::FP];
    arch::is_user_address(scratch.ip).then_some(())
}

/// Walks from one frame to its caller; 0 while there may be another, 1 at the end.
///
/// A global function, so that the verifier checks it once by itself and not once per turn of the loop. It takes only the
/// number of the frame and finds the state in this CPU's scratch value.
///
/// ```text
/// fp + 8   return address
/// fp       frame pointer of the caller
/// ```
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step(frame: u32) -> u32 {
    let Some(scratch) = CPU_SCRATCH.get_ptr_mut(0) else { return 1 };
    // SAFETY: the look-up gave this CPU's value, and nothing else on this CPU uses it while the program runs.
    let scratch = unsafe { &mut *scratch };
    match caller(scratch) {
        Ok(return_address) => {
            let index = mask!(u64::from(frame), 127) as usize;
            let frames = (&raw mut scratch.sample.frames).cast::<u64>();
            // SAFETY: index is at most 127, and the array has FRAMES_MAX slots.
            unsafe { frames.add(index).write(Frame::raw(return_address, true).0) };
            scratch.frames = u64::from(frame) + 1;
            0
        }
        Err(end) => {
            scratch.end = end as u64;
            1
        }
    }
}

/// The return address of the frame at `scratch.fp`, which then becomes the caller's.
#[inline(always)]
fn caller(scratch: &mut Scratch) -> Result<u64, StackEnd> {
    let fp = scratch.fp;
    if fp == 0 {
        return Err(StackEnd::Root);
    }
    read_user(fp, &raw mut scratch.frame_record).ok_or(StackEnd::ReadFailed)?;
    let [next_fp, return_address] = scratch.frame_record;
    let return_address = arch::strip(return_address);
    if return_address == 0 {
        return Err(StackEnd::Root);
    }
    if next_fp != 0 && next_fp <= fp {
        return Err(StackEnd::NotRising);
    }
    scratch.fp = next_fp;
    Ok(return_address)
}
