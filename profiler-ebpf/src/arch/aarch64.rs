//! Register layout of aarch64. Source: arch/arm64/include/uapi/asm/ptrace.h: struct user_pt_regs.

use aya_ebpf::cty::c_void;

use crate::stack::load_context;

/// Words of `struct user_pt_regs`, which `struct pt_regs` starts with.
pub const PT_REGS_WORDS: usize = 34;

pub use profiler_common::unwind::aarch64::{FRAME_POINTER, OFFSET_SHIFT, Regs, step};

/// Instruction pointer of a perf event's context.
macro_rules! context_ip {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 256)
    };
}

/// Registers of a perf event's context, which starts with a `user_pt_regs`.
#[inline(always)]
pub fn context_registers(context: *mut c_void, regs: &mut Regs) {
    regs.fp = load_context!(context, 232);
    regs.lr = load_context!(context, 240);
    regs.sp = load_context!(context, 248);
    regs.ip = load_context!(context, 256);
    regs.exact = 1;
}

/// Registers that the kernel saved when it was entered.
#[inline(always)]
pub fn saved_registers(saved: &[u64; PT_REGS_WORDS], regs: &mut Regs) {
    regs.fp = saved[29];
    regs.lr = saved[30];
    regs.sp = saved[31];
    regs.ip = saved[32];
    regs.exact = 1;
}

/// The stack pointer.
#[inline(always)]
pub fn stack_pointer(regs: &Regs) -> u64 {
    regs.sp
}

/// The frame pointer.
#[inline(always)]
pub fn frame_pointer(regs: &Regs) -> u64 {
    regs.fp
}

/// `bpf_perf_event_data.sample_period`, which lies behind the registers.
macro_rules! context_period {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 272)
    };
}
/// `bpf_perf_event_data.addr`, behind the period.
macro_rules! context_address {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 280)
    };
}
pub(crate) use {context_address, context_ip, context_period};

/// Whether the sample was taken in user mode. Kernel addresses have the top bit set.
#[inline(always)]
pub fn is_user_address(address: u64) -> bool {
    address >> 63 == 0
}
