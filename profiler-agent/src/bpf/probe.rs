//! What the running kernel offers, asked for once.

use std::sync::OnceLock;

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use profiler_common::config::{CgroupFacts, KernelFacts};

use crate::sys::{btf::Btf, cgroup::Version};

/// Bytes of a kernel stack: THREAD_SIZE without KASAN. Source: arch/x86/include/asm/page_64_types.h and
/// arch/arm64/include/asm/memory.h.
const THREAD_BYTES: u32 = 16 << 10;

/// Finds the facts the programs are compiled to ask for.
pub(super) fn kernel_facts(btf: &Btf) -> KernelFacts {
    let structs = btf.structs(&["task_struct", "signal_struct"]);
    let offset_in =
        |name, member| structs.get(name).and_then(|&found| btf.member_offset(found, member)).unwrap_or(0);
    let offset = |member| offset_in("task_struct", member);
    KernelFacts {
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
        has_ancestor_cgroup_id: u32::from(finds_cgroups_below()),
    }
}

/// Where the programs find a task's cgroup in the hierarchy that ids are taken from. What the kernel's BTF does not say
/// stays 0; on v1, samples have no id then.
pub(super) fn cgroup_facts(btf: &Btf, hierarchy: Option<Version>) -> CgroupFacts {
    let structs = btf.structs(&[
        "task_struct",
        "css_set",
        "cgroup_subsys_state",
        "cgroup",
        "kernfs_node",
        "cgroup_root",
    ]);
    let offset = |of, member| structs.get(of).and_then(|&of| btf.member_offset(of, member)).unwrap_or(0);
    let facts = CgroupFacts {
        cgroup_kn_offset: offset("cgroup", "kn"),
        node_id_offset: offset("kernfs_node", "id"),
        cgroup_root_offset: offset("cgroup", "root"),
        root_hierarchy_offset: offset("cgroup_root", "hierarchy_id"),
        ..CgroupFacts::default()
    };
    let Some(Version::V1 { controller, hierarchy }) = hierarchy else { return facts };
    let Some(number) = btf.enum_value("cgroup_subsys_id", &format!("{controller}_cgrp_id")) else {
        return facts;
    };
    CgroupFacts {
        task_cgroups_offset: offset("task_struct", "cgroups"),
        css_set_subsys_offset: offset("css_set", "subsys") + number * POINTER_BYTES,
        css_cgroup_offset: offset("cgroup_subsys_state", "cgroup"),
        hierarchy,
        ..facts
    }
}

const POINTER_BYTES: u32 = 8;

/// A kernel that refuses the question is taken not to have it.
fn has_ancestor_cgroup_id() -> bool {
    let helper = BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id;
    is_helper_supported(ProgramType::PerfEvent, helper).unwrap_or(false)
}

/// Whether a target's cgroup means those below it too. Asked of the kernel once.
pub(crate) fn finds_cgroups_below() -> bool {
    static FINDS: OnceLock<bool> = OnceLock::new();
    *FINDS.get_or_init(has_ancestor_cgroup_id)
}

/// `bpf_task_pt_regs` came with kernel 5.15. A kernel that refuses the question is taken not to have it.
fn has_task_pt_regs() -> bool {
    is_helper_supported(ProgramType::PerfEvent, BpfHelper::BPF_FUNC_task_pt_regs).unwrap_or(false)
}
