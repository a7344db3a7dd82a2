//! What the running kernel offers, asked for once.

use std::path::Path;

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use profiler_common::config::KernelFacts;

use crate::sys::btf::{Btf, BtfError};

/// Bytes of a kernel stack: THREAD_SIZE without KASAN. Source: arch/x86/include/asm/page_64_types.h and
/// arch/arm64/include/asm/memory.h.
const THREAD_BYTES: u32 = 16 << 10;

/// Finds the facts the programs are compiled to ask for.
pub(super) fn kernel_facts(sys_root: &Path) -> Result<KernelFacts, BtfError> {
    let btf = Btf::of_kernel(sys_root)?;
    let structs = btf.structs(&["task_struct", "signal_struct"]);
    let offset_in =
        |name, member| structs.get(name).and_then(|&found| btf.member_offset(found, member)).unwrap_or(0);
    let offset = |member| offset_in("task_struct", member);
    Ok(KernelFacts {
        has_task_pt_regs: u32::from(has_task_pt_regs()),
        task_stack_offset: offset("stack"),
        task_mm_offset: offset("mm"),
        task_group_leader_offset: offset("group_leader"),
        task_start_boottime_offset: match offset("start_boottime") {
            0 => offset("real_start_time"),
            offset => offset,
        },
        task_comm_offset: offset("comm"),
        thread_bytes: THREAD_BYTES,
        task_tgid_offset: offset("tgid"),
        task_flags_offset: offset("flags"),
        task_signal_offset: offset("signal"),
        signal_live_offset: offset_in("signal_struct", "live"),
        reserved: 0,
    })
}

/// `bpf_task_pt_regs` came with kernel 5.15. A kernel that refuses the question is taken not to have it.
fn has_task_pt_regs() -> bool {
    is_helper_supported(ProgramType::PerfEvent, BpfHelper::BPF_FUNC_task_pt_regs).unwrap_or(false)
}
