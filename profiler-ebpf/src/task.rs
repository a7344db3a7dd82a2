//! Fields of the current `task_struct`, read at offsets that the agent took from the kernel's BTF.

use core::num::{NonZeroU32, NonZeroU64};

use profiler_common::limits::COMM_BYTES;

use crate::{
    helpers::{current_cgroup_id, current_task, read_kernel},
    maps::{cgroup_fact, kernel_fact},
};

/// Reads the 8 bytes at `task + offset`; `None` when the offset is unknown.
#[inline(always)]
fn read_field(task: u64, offset: u32) -> Option<u64> {
    if offset == 0 {
        return None;
    }
    let mut value = 0u64;
    read_kernel(task.wrapping_add(u64::from(offset)), &raw mut value)?;
    Some(value)
}

/// Reads the 4 bytes at `task + offset`; `None` when the offset is unknown.
#[inline(always)]
fn read_word(task: u64, offset: u32) -> Option<u32> {
    if offset == 0 {
        return None;
    }
    let mut value = 0u32;
    read_kernel(task.wrapping_add(u64::from(offset)), &raw mut value)?;
    Some(value)
}

/// Id of the process that a task belongs to.
#[inline(always)]
pub fn tgid_of(task: u64) -> Option<NonZeroU32> {
    read_word(task, kernel_fact!(task_tgid_offset)).and_then(NonZeroU32::new)
}

/// Whether the current task has begun to exit. Unknown counts as yes.
#[inline(always)]
pub fn is_exiting() -> bool {
    const PF_EXITING: u32 = 4;
    read_word(current_task(), kernel_fact!(task_flags_offset)).is_none_or(|flags| flags & PF_EXITING != 0)
}

/// Whether threads of the current process are left that have not begun to exit. Unknown counts as yes.
///
/// The count goes down before `sched_process_exit` (kernel/exit.c: do_exit), so the last thread sees 0 there.
#[inline(always)]
pub fn has_live_threads() -> bool {
    let Some(signal) = read_field(current_task(), kernel_fact!(task_signal_offset)) else { return true };
    read_word(signal, kernel_fact!(signal_live_offset)) != Some(0)
}

/// Whether the current task has user memory. Unknown counts as yes: the walk then ends at its first read.
#[inline(always)]
pub fn has_user_memory() -> bool {
    read_field(current_task(), kernel_fact!(task_mm_offset)) != Some(0)
}

/// Address of the `task_struct` of the current process's main thread.
///
/// Never 0, so that an absent one is a 0 and not a flag beside an undefined word: LLVM keeps such a word on the stack and
/// loads it before it looks at the flag, which kernels before 6.3 refuse ("invalid read from stack").
#[inline(always)]
pub fn group_leader() -> Option<NonZeroU64> {
    read_field(current_task(), kernel_fact!(task_group_leader_offset)).and_then(NonZeroU64::new)
}

/// When the process started, on CLOCK_BOOTTIME in nanoseconds; 0 when unknown.
#[inline(always)]
pub fn start_ns(leader: Option<NonZeroU64>) -> u64 {
    let Some(leader) = leader else { return 0 };
    read_field(leader.get(), kernel_fact!(task_start_boottime_offset)).unwrap_or(0)
}

/// Copies the name of the process to `to`, or leaves zeros.
#[inline(always)]
pub fn read_comm(leader: Option<NonZeroU64>, to: *mut [u8; COMM_BYTES]) {
    let offset = kernel_fact!(task_comm_offset);
    let read = match leader {
        Some(leader) if offset != 0 => read_kernel(leader.get().wrapping_add(u64::from(offset)), to),
        _ => None,
    };
    if read.is_none() {
        // SAFETY: `to` points into this CPU's scratch value; two volatile words, since LLVM would call memset.
        unsafe { to.cast::<u64>().write_volatile(0) };
        // SAFETY: as above, the second of 16 bytes.
        unsafe { to.cast::<u64>().add(1).write_volatile(0) };
    }
}

/// Where the kernel saved the user registers on the current task's kernel stack: for kernels without
/// `bpf_task_pt_regs`. The registers lie at the very top of the stack.
#[inline(always)]
pub fn saved_user_regs(regs_bytes: u64) -> Option<u64> {
    let stack = read_field(current_task(), kernel_fact!(task_stack_offset))?;
    Some(stack.wrapping_add(u64::from(kernel_fact!(thread_bytes))).wrapping_sub(regs_bytes))
}

/// Id of the current task's cgroup in the hierarchy that the agent has chosen; 0 when it cannot be read.
#[inline(always)]
pub fn cgroup_id() -> u64 {
    let cgroups = cgroup_fact!(task_cgroups_offset);
    if cgroups == 0 {
        return current_cgroup_id();
    }
    v1_cgroup(cgroups).and_then(id_of_cgroup).unwrap_or(0)
}

/// Address of the current task's `cgroup` in a v1 hierarchy.
#[inline(always)]
fn v1_cgroup(cgroups_offset: u32) -> Option<u64> {
    let css_set = read_field(current_task(), cgroups_offset)?;
    let css = read_pointer(css_set, cgroup_fact!(css_set_subsys_offset))?;
    read_pointer(css, cgroup_fact!(css_cgroup_offset))
}

/// Id of the `cgroup` at an address, by which its directory can be opened.
#[inline(always)]
pub fn id_of_cgroup(cgroup: u64) -> Option<u64> {
    let node = read_pointer(cgroup, cgroup_fact!(cgroup_kn_offset))?;
    read_pointer(node, cgroup_fact!(node_id_offset))
}

/// Whether the `cgroup` at an address is in the hierarchy that the agent has chosen.
#[inline(always)]
pub fn is_chosen_hierarchy(cgroup: u64) -> bool {
    let Some(root) = read_pointer(cgroup, cgroup_fact!(cgroup_root_offset)) else { return false };
    let mut hierarchy = 0u32;
    let at = root.wrapping_add(u64::from(cgroup_fact!(root_hierarchy_offset)));
    read_kernel(at, &raw mut hierarchy).is_some() && hierarchy == cgroup_fact!(hierarchy)
}

/// Reads the 8 bytes at `base + offset`, where 0 is an offset like any other; `None` for a null base.
#[inline(always)]
fn read_pointer(base: u64, offset: u32) -> Option<u64> {
    if base == 0 {
        return None;
    }
    let mut value = 0u64;
    read_kernel(base.wrapping_add(u64::from(offset)), &raw mut value)?;
    Some(value)
}
