//! Changes to processes, in the ring buffer in their order among the samples.

use aya_ebpf::programs::RawTracePointContext;
use profiler_common::{
    stats::Counter,
    wire::{CgroupRecord, ProcessRecord, RecordHead, RecordKind, WIRE_VERSION},
};

use crate::{
    helpers::{boot_time_ns, current_ids},
    maps::{EVENTS, PROCESSES, count},
    task,
};

/// `BPF_RB_FORCE_WAKEUP`: the agent has to look before a process that may be short-lived is gone. Without it, only a
/// record behind which the reader has caught up would wake it, and samples do not.
const WAKEUP: u64 = 2;

/// The current task has just got a new image. Runs in its own context, with its new name and after `exec` has made the
/// calling thread the main one.
#[inline(always)]
pub fn exec(_ctx: &RawTracePointContext) {
    let (tgid, tid) = current_ids();
    // The tables are those of the old image. A process that has none is no error.
    let _ = PROCESSES.remove(tgid);
    let head = RecordHead {
        version: WIRE_VERSION,
        kind: RecordKind::Exec as u8,
        user_end: 0,
        flags: 0,
        user_frames: 0,
        kernel_frames: 0,
        tgid,
        tid,
        time_ns: boot_time_ns(),
    };
    let start_ns = task::start_ns(task::group_leader());
    let record = ProcessRecord { head, start_ns, cgroup_id: task::cgroup_id() };
    match EVENTS.output::<ProcessRecord>(&record, WAKEUP) {
        Ok(()) => count(Counter::ExecSubmitted),
        Err(_) => count(Counter::ExecDroppedRingFull),
    }
}

/// A cgroup was made: its name is to be learnt while it is there. In other hierarchies than the agent's it costs two
/// reads and writes nothing.
#[inline(always)]
pub fn cgroup_made(ctx: &RawTracePointContext) {
    // Source: include/trace/events/cgroup.h, cgroup_mkdir: TP_PROTO(struct cgroup *cgrp, const char *path).
    let cgroup: u64 = ctx.arg(0);
    if !task::is_chosen_hierarchy(cgroup) {
        return;
    }
    let (tgid, tid) = current_ids();
    let head = RecordHead {
        version: WIRE_VERSION,
        kind: RecordKind::CgroupMade as u8,
        user_end: 0,
        flags: 0,
        user_frames: 0,
        kernel_frames: 0,
        tgid,
        tid,
        time_ns: boot_time_ns(),
    };
    let record = CgroupRecord { head, cgroup_id: task::id_of_cgroup(cgroup).unwrap_or(0) };
    if EVENTS.output::<CgroupRecord>(&record, WAKEUP).is_err() {
        count(Counter::CgroupDroppedRingFull);
    }
}
