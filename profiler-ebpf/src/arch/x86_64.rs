//! Register layout of x86-64. Source: arch/x86/include/asm/ptrace.h: struct pt_regs.

use aya_ebpf::cty::c_void;

use crate::stack::load_context;

/// Words of `struct pt_regs`. Not one more may be read: it lies at the very top of the kernel stack, before a guard page.
pub const PT_REGS_WORDS: usize = 21;

use profiler_common::unwind::x86_64::BaseReg;
pub use profiler_common::unwind::x86_64::{FRAME_POINTER, OFFSET_SHIFT, Regs, step};

/// Registers by their word in `pt_regs`, each with the way to read it from `$from`.
macro_rules! copy_registers {
    ($regs:expr, $load:ident, $from:expr) => {{
        let regs: &mut Regs = $regs;
        let gpr = regs.gpr.as_mut_ptr();
        macro_rules! copy {
            ($register:ident, $byte:literal) => {
                let value = $load!($from, $byte);
                // SAFETY: numbers of registers are below 16. Volatile, since LLVM would merge the loads and stores.
                unsafe { gpr.add(BaseReg::$register as usize).write_volatile(value) };
            };
        }
        copy!(R15, 0);
        copy!(R14, 8);
        copy!(R13, 16);
        copy!(R12, 24);
        copy!(Rbp, 32);
        copy!(Rbx, 40);
        copy!(R11, 48);
        copy!(R10, 56);
        copy!(R9, 64);
        copy!(R8, 72);
        copy!(Rax, 80);
        copy!(Rcx, 88);
        copy!(Rdx, 96);
        copy!(Rsi, 104);
        copy!(Rdi, 112);
        copy!(Rsp, 152);
        regs.ip = $load!($from, 128);
        regs.exact = 1;
    }};
}

/// Reads a word of a saved `pt_regs`.
macro_rules! load_saved {
    ($saved:expr, $byte:literal) => {{
        const { assert!($byte / 8 < PT_REGS_WORDS) };
        // SAFETY: the word lies inside the structure.
        unsafe { $saved.add($byte / 8).read_volatile() }
    }};
}

/// Instruction pointer of a perf event's context.
macro_rules! context_ip {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 128)
    };
}

/// Registers of a perf event's context, which starts with a `pt_regs`.
#[inline(always)]
pub fn context_registers(context: *mut c_void, regs: &mut Regs) {
    copy_registers!(regs, load_context, context);
}

/// Makes the registers those of a caller: as a function has them that has just returned to it.
#[inline(always)]
pub fn return_to(regs: &mut Regs, address: u64, sp: u64) {
    let gpr = regs.gpr.as_mut_ptr();
    // SAFETY: numbers of registers are below 16. Volatile, as above.
    unsafe { gpr.add(BaseReg::Rsp as usize).write_volatile(sp) };
    regs.ip = address;
}

/// Registers that the kernel saved when it was entered.
#[inline(always)]
pub fn saved_registers(saved: &[u64; PT_REGS_WORDS], regs: &mut Regs) {
    let saved = saved.as_ptr();
    copy_registers!(regs, load_saved, saved);
}

/// The stack pointer.
#[inline(always)]
pub fn stack_pointer(regs: &Regs) -> u64 {
    regs.sp()
}

/// The frame pointer.
#[inline(always)]
pub fn frame_pointer(regs: &Regs) -> u64 {
    regs.fp()
}

/// `bpf_perf_event_data.sample_period`, which lies behind the registers.
macro_rules! context_period {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 168)
    };
}
/// `bpf_perf_event_data.addr`, behind the period.
macro_rules! context_address {
    ($ctx:expr) => {
        $crate::stack::load_context!($ctx, 176)
    };
}
pub(crate) use {context_address, context_ip, context_period};

/// Whether the sample was taken in user mode. Kernel addresses have the top bit set.
#[inline(always)]
pub fn is_user_address(address: u64) -> bool {
    address >> 63 == 0
}
