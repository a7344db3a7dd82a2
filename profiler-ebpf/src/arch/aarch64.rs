//! Register layout of aarch64. Source: arch/arm64/include/uapi/asm/ptrace.h: struct user_pt_regs.

/// Words of `struct user_pt_regs`, which `struct pt_regs` starts with.
pub const PT_REGS_WORDS: usize = 34;
/// Index of the instruction pointer, in words.
pub const IP: usize = 32;
/// Index of the frame pointer (x29), in words.
pub const FP: usize = 29;

/// Registers of a perf event's context, each by its byte offset.
macro_rules! context_ip {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 256)
    };
}
macro_rules! context_fp {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 232)
    };
}
/// `bpf_perf_event_data.sample_period`, which lies behind the registers.
macro_rules! context_period {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 272)
    };
}
pub(crate) use {context_fp, context_ip, context_period};

/// Whether the sample was taken in user mode. Kernel addresses have the top bit set.
#[inline(always)]
pub fn is_user_address(address: u64) -> bool {
    address >> 63 == 0
}

/// The address without its pointer authentication code, which fills the bits above the 48 of a user address.
#[inline(always)]
pub fn strip(address: u64) -> u64 {
    address & 0x0000_ffff_ffff_ffff
}
