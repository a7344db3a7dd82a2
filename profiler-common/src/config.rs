//! What the agent tells the programs before they load: frozen, read-only values.

/// Facts about the running kernel, set by the agent before the programs are loaded. A byte offset of 0 means
/// "unknown": no field used here lies at the start of its structure.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelFacts {
    /// 1 where `bpf_task_pt_regs` exists (5.15 and later).
    pub has_task_pt_regs: u32,
    /// Byte offset of `task_struct.stack`: the fallback for kernels without `bpf_task_pt_regs`.
    pub task_stack_offset: u32,
    /// Byte offset of `task_struct.mm`, null for kernel threads.
    pub task_mm_offset: u32,
    /// Byte offset of `task_struct.group_leader`.
    pub task_group_leader_offset: u32,
    /// Byte offset of `task_struct.start_boottime` (`real_start_time` before 5.5).
    pub task_start_boottime_offset: u32,
    /// Byte offset of `task_struct.comm`.
    pub task_comm_offset: u32,
    /// Bytes of a kernel stack: THREAD_SIZE.
    pub thread_bytes: u32,
    /// Byte offset of `task_struct.tgid`.
    pub task_tgid_offset: u32,
    /// Byte offset of `task_struct.flags`. Source: include/linux/sched.h, PF_EXITING.
    pub task_flags_offset: u32,
    /// Byte offset of `task_struct.signal`.
    pub task_signal_offset: u32,
    /// Byte offset of `signal_struct.live`: threads of the process that have not begun to exit.
    pub signal_live_offset: u32,
    /// 1 where sampling programs may call `bpf_get_current_ancestor_cgroup_id`: not yet in 5.10.
    pub has_ancestor_cgroup_id: u32,
}

const _: () = assert!(size_of::<KernelFacts>() == 48);

/// What the agent asks of the programs, set before they are loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// User frames of one sample, at most `limits::USER_FRAMES_MAX`.
    pub user_frames_limit: u32,
    /// 1 where some of them are families (`targets::BY_FAMILY`).
    pub has_families: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: [u32; 2],
}

const _: () = assert!(size_of::<Settings>() == 16);

impl Settings {
    /// The fields in order, as [`KernelFacts::words`].
    #[must_use]
    pub const fn words(self) -> [u32; 4] {
        let Self { user_frames_limit, has_families, reserved: [first, second] } = self;
        [user_frames_limit, has_families, first, second]
    }
}

impl KernelFacts {
    /// The fields in order: what the agent writes over the programs' read-only value.
    #[must_use]
    pub const fn words(self) -> [u32; 12] {
        let Self {
            has_task_pt_regs,
            task_stack_offset,
            task_mm_offset,
            task_group_leader_offset,
            task_start_boottime_offset,
            task_comm_offset,
            thread_bytes,
            task_tgid_offset,
            task_flags_offset,
            task_signal_offset,
            signal_live_offset,
            has_ancestor_cgroup_id,
        } = self;
        [
            has_task_pt_regs,
            task_stack_offset,
            task_mm_offset,
            task_group_leader_offset,
            task_start_boottime_offset,
            task_comm_offset,
            thread_bytes,
            task_tgid_offset,
            task_flags_offset,
            task_signal_offset,
            signal_live_offset,
            has_ancestor_cgroup_id,
        ]
    }
}

/// Where a task's cgroup is found, and in which hierarchy: set by the agent before the programs are loaded. Byte offsets
/// within the structures named first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CgroupFacts {
    /// `task_struct.cgroups`; 0 where the v2 hierarchy is mounted: a helper knows the id then.
    pub task_cgroups_offset: u32,
    /// The element of `css_set.subsys` of the controller whose v1 hierarchy is used.
    pub css_set_subsys_offset: u32,
    /// `cgroup_subsys_state.cgroup`.
    pub css_cgroup_offset: u32,
    /// `cgroup.kn`.
    pub cgroup_kn_offset: u32,
    /// `kernfs_node.id`.
    pub node_id_offset: u32,
    /// `cgroup.root`.
    pub cgroup_root_offset: u32,
    /// `cgroup_root.hierarchy_id`.
    pub root_hierarchy_offset: u32,
    /// Number of the hierarchy whose ids samples carry, as `/proc/cgroups` has it; 0 is v2.
    pub hierarchy: u32,
}

const _: () = assert!(size_of::<CgroupFacts>() == 32);

impl CgroupFacts {
    /// The fields in order: what the agent writes over the programs' read-only value.
    #[must_use]
    pub const fn words(self) -> [u32; 8] {
        let Self {
            task_cgroups_offset,
            css_set_subsys_offset,
            css_cgroup_offset,
            cgroup_kn_offset,
            node_id_offset,
            cgroup_root_offset,
            root_hierarchy_offset,
            hierarchy,
        } = self;
        [
            task_cgroups_offset,
            css_set_subsys_offset,
            css_cgroup_offset,
            cgroup_kn_offset,
            node_id_offset,
            cgroup_root_offset,
            root_hierarchy_offset,
            hierarchy,
        ]
    }
}
