//! Every kernel helper that the programs call, wrapped once. Programs hold no raw pointer to kernel or user memory.

use aya_ebpf::{
    EbpfContext,
    cty::c_void,
    helpers::{bpf_get_current_comm, generated as raw},
};
use profiler_common::limits::COMM_BYTES;

/// Process and thread id of the current task: `(tgid, tid)`.
#[inline(always)]
pub fn current_ids() -> (u32, u32) {
    let both = aya_ebpf::helpers::bpf_get_current_pid_tgid();
    ((both >> 32) as u32, both as u32)
}

/// CLOCK_BOOTTIME in nanoseconds (kernel 5.8).
#[inline(always)]
pub fn boot_time_ns() -> u64 {
    // SAFETY: takes nothing and has no effect.
    unsafe { raw::bpf_ktime_get_boot_ns() }
}

/// CLOCK_MONOTONIC in nanoseconds: for durations.
#[inline(always)]
pub fn monotonic_ns() -> u64 {
    // SAFETY: takes nothing and has no effect.
    unsafe { raw::bpf_ktime_get_ns() }
}

/// Id of the current task's cgroup in the v2 hierarchy, mounted or not.
#[inline(always)]
pub fn current_cgroup_id() -> u64 {
    // SAFETY: takes nothing and has no effect.
    unsafe { raw::bpf_get_current_cgroup_id() }
}

/// Id of the ancestor at a depth of the current task's cgroup in the v2 hierarchy, itself included; 0 where there is
/// none. Only where `KERNEL_FACTS.has_ancestor_cgroup_id` says so.
#[inline(always)]
pub fn ancestor_cgroup_id(level: u32) -> u64 {
    // SAFETY: takes a number and has no effect.
    unsafe { raw::bpf_get_current_ancestor_cgroup_id(level as i32) }
}

/// 32 random bits.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: takes nothing; its effect is on the kernel's random state.
    unsafe { raw::bpf_get_prandom_u32() }
}

/// Name of the current thread; zeros when the kernel refuses.
#[inline(always)]
pub fn current_thread_name() -> [u8; COMM_BYTES] {
    bpf_get_current_comm().unwrap_or([0; COMM_BYTES])
}

/// Address of the current `task_struct`. Only for [`read_kernel`].
#[inline(always)]
pub fn current_task() -> u64 {
    // SAFETY: takes nothing and has no effect.
    unsafe { raw::bpf_get_current_task() }
}

/// Reads kernel memory into `to`; `None` where the address cannot be read. The size is `T`'s.
#[inline(always)]
pub fn read_kernel<T>(from: u64, to: *mut T) -> Option<()> {
    // SAFETY: the helper checks `from` itself and writes exactly size_of::<T>() bytes to `to`, which the verifier has
    // proved to be ours.
    let status =
        unsafe { raw::bpf_probe_read_kernel(to.cast(), size_of::<T>() as u32, from as *const c_void) };
    (status == 0).then_some(())
}

/// Reads the current task's user memory into `to`; `None` when the page is not resident. Never sleeps.
#[inline(always)]
pub fn read_user<T>(from: u64, to: *mut T) -> Option<()> {
    // SAFETY: the helper checks `from` itself, answers -EFAULT for what it cannot read, and writes exactly
    // size_of::<T>() bytes to `to`, which the verifier has proved to be ours.
    let status = unsafe { raw::bpf_probe_read_user(to.cast(), size_of::<T>() as u32, from as *const c_void) };
    (status == 0).then_some(())
}

/// Address of the registers that the current task's user mode was left with (kernel 5.15).
#[inline(always)]
pub fn current_user_regs() -> u64 {
    // SAFETY: takes nothing; the pointer is trusted for the run of the program.
    let task = unsafe { raw::bpf_get_current_task_btf() };
    // SAFETY: `task` is the current task as the helper above gave it.
    let regs = unsafe { raw::bpf_task_pt_regs(task) };
    regs as u64
}

/// The number that the agent gave the probe that was hit (kernel 5.15).
#[cfg(bpf_target_arch = "x86_64")]
#[inline(always)]
pub fn attach_cookie(ctx: *mut c_void) -> u64 {
    // SAFETY: `ctx` is the context of a running program.
    unsafe { raw::bpf_get_attach_cookie(ctx) }
}

/// Writes the kernel stack of the sample, leaf first, to `to`, which has room for `bytes`; gives the bytes written.
/// `None` when the sample was not in kernel mode or the kernel refused.
#[inline(always)]
pub fn kernel_stack<C: EbpfContext>(ctx: &C, to: *mut u64, bytes: u32) -> Option<u64> {
    // SAFETY: `ctx` is the context of a running program; the verifier has proved `to` to have room for `bytes`.
    let written = unsafe { raw::bpf_get_stack(ctx.as_ptr(), to.cast(), bytes, 0) };
    (written > 0).then_some(written as u64)
}
