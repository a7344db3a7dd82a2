//! Whether the current task is one that is to be sampled. Without targets, that is one look at the list.

use profiler_common::{
    stats::Counter,
    targets::{BY_CGROUP, BY_FAMILY, TARGETS_MAX, Target, Targets, Turn},
};

use crate::{
    helpers::{ancestor_cgroup_id, current_cgroup_id, current_ids, random},
    maps::{CPU_SCRATCH, FAMILY, TARGET_TURNS, TARGETS, count, kernel_fact, setting},
    stack::mask,
    task,
};

/// Whether this sample is to be taken, of so many samples each `period_ns`; 0 where it is not, else for how many samples
/// it stands. What is not taken is counted.
#[inline(always)]
pub fn weight(period_ns: u64) -> u32 {
    let Some(list) = list() else { return 1 };
    if list.want_everything() {
        return 1;
    }
    remember_process();
    let mut at = 0;
    while at < TARGETS_MAX as u32 {
        if at >= list.count {
            break;
        }
        if matches(at) != 0 {
            return weight_by(target(list, at), at, period_ns);
        }
        at += 1;
    }
    if list.is_default_wanted == 0 {
        count(Counter::CpuFiltered);
        return 0;
    }
    1
}

/// Whether samples of the current task are wanted, whatever their frequency.
///
/// The name goes through `CPU_SCRATCH`, which is `cpu_sample`'s: where that interrupts, it writes the same name, of the same
/// task.
#[inline(always)]
pub fn wants() -> bool {
    let Some(list) = list() else { return true };
    if list.want_everything() {
        return true;
    }
    remember_process();
    let mut at = 0;
    while at < TARGETS_MAX as u32 {
        if at >= list.count {
            break;
        }
        if matches(at) != 0 {
            return target(list, at).is_wanted != 0;
        }
        at += 1;
    }
    list.is_default_wanted != 0
}

#[inline(always)]
fn list() -> Option<&'static Targets> {
    let list = TARGETS.get_ptr(0)?;
    // SAFETY: a live map value; the agent writes it as a whole, and each field by itself is one it has written.
    Some(unsafe { &*list })
}

#[inline(always)]
fn target(list: &'static Targets, at: u32) -> &'static Target {
    let index = mask!(u64::from(at), 15) as usize;
    // SAFETY: the index is below TARGETS_MAX. By pointer, since indexing would bring the code of a panic.
    unsafe { &*(&raw const list.targets).cast::<Target>().add(index) }
}

/// Puts the name of the process where [`matches`] finds it.
#[inline(always)]
fn remember_process() {
    let Some(scratch) = CPU_SCRATCH.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's value, which nothing else uses while the program runs.
    let comm = unsafe { &raw mut (*scratch).sample.header.comm };
    task::read_comm(task::group_leader(), comm);
}

#[inline(always)]
fn weight_by(target: &Target, at: u32, period_ns: u64) -> u32 {
    if target.is_wanted == 0 {
        count(Counter::CpuFiltered);
        return 0;
    }
    let n = target.one_in(period_ns);
    if n.get() == 1 {
        return 1;
    }
    let Some(turn) = TARGET_TURNS.get_ptr_mut(at) else { return 1 };
    // SAFETY: this CPU's value, which nothing else uses while the program runs.
    let turn: &mut Turn = unsafe { &mut *turn };
    if turn.keeps_next(n, random()) {
        return n.get();
    }
    count(Counter::CpuThinned);
    0
}

/// A process of a family has made another, which belongs to it too. One look-up for others; nothing without families.
#[inline(always)]
pub fn follow_fork(parent: u32, child: u32) {
    if setting!(has_families) != 1 || FAMILY.get_ptr(parent).is_none() {
        return;
    }
    if FAMILY.insert(child, 1u32, 0).is_err() {
        count(Counter::FamilyNotFollowed);
    }
}

/// A process has ended: another may get its id.
#[inline(always)]
pub fn follow_exit(tgid: u32) {
    if setting!(has_families) == 1 && !task::has_live_threads() {
        // One that is in no family is no error.
        let _ = FAMILY.remove(tgid);
    }
}

/// Whether the current task matches a target: 1 or 0. A global function, as [`crate::stack`]'s are.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn matches(at: u32) -> u32 {
    let (Some(list), Some(scratch)) = (list(), CPU_SCRATCH.get_ptr_mut(0)) else { return 0 };
    let target = target(list, at);
    // SAFETY: this CPU's value; two words of 16 bytes that lie at a multiple of 8.
    let comm = unsafe { (&raw const (*scratch).sample.header.comm).cast::<[u64; 2]>().read() };
    let (tgid, _) = current_ids();
    if !target.matches_process(tgid, comm) {
        return 0;
    }
    if target.conditions & BY_FAMILY != 0 && FAMILY.get_ptr(tgid).is_none() {
        return 0;
    }
    let is_in = target.conditions & BY_CGROUP == 0
        || target.cgroup_id != 0 && cgroup_id_at(target.cgroup_level) == target.cgroup_id;
    u32::from(is_in)
}

/// Id of the current task's cgroup or of its ancestor at a depth. Where the kernel does not tell of ancestors, of the cgroup
/// itself: those below a target's cgroup are not found there.
#[inline(always)]
fn cgroup_id_at(level: u32) -> u64 {
    if kernel_fact!(has_ancestor_cgroup_id) == 1 { ancestor_cgroup_id(level) } else { current_cgroup_id() }
}
