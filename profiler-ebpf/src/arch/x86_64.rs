//! Register layout of x86-64. Source: arch/x86/include/asm/ptrace.h: struct pt_regs.

/// Words of `struct pt_regs`. Not one more may be read: it lies at the very top of the kernel stack, before a guard page.
pub const PT_REGS_WORDS: usize = 21;
/// Index of the instruction pointer in `pt_regs`, in words.
pub const IP: usize = 16;
/// Index of the frame pointer (rbp) in `pt_regs`, in words.
pub const FP: usize = 4;

/// Registers of a perf event's context, each by its byte offset.
macro_rules! context_ip {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 128)
    };
}
macro_rules! context_fp {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 32)
    };
}
/// `bpf_perf_event_data.sample_period`, which lies behind the registers.
macro_rules! context_period {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 168)
    };
}
pub(crate) use {context_fp, context_ip, context_period};

/// Whether the sample was taken in user mode. Kernel addresses have the top bit set.
#[inline(always)]
pub fn is_user_address(address: u64) -> bool {
    address >> 63 == 0
}

/// The address itself.
#[inline(always)]
pub fn strip(address: u64) -> u64 {
    address
}
