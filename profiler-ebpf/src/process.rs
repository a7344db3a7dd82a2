//! Changes to processes, in the ring buffer in their order among the samples.
//!
//! A process that nobody asks about pays one look-up for a fork or an exit of its own.

use core::num::NonZeroU64;

use aya_ebpf::programs::RawTracePointContext;
use profiler_common::{
    stats::Counter,
    unwind::mappings::NS_PER_TICK,
    wire::{CgroupRecord, ProcessRecord, RecordHead, RecordKind, WIRE_VERSION},
};

use crate::{
    helpers::{boot_time_ns, current_ids},
    maps::{EVENTS, PROCESSES, WAKEUP, count, setting, wakeup_if_filling},
    table, targets, task,
};

/// The current task has just got a new image. Runs in its own context, with its new name and after `exec` has made the
/// calling thread the main one.
#[inline(always)]
pub fn exec(_ctx: &RawTracePointContext) {
    let (tgid, tid) = current_ids();
    // The tables are those of the old image. A process that has none is no error.
    let _ = PROCESSES.remove(tgid);
    let start_ns = task::start_ns(task::group_leader());
    // The agent has to look before a process that may be short-lived is gone.
    match EVENTS.output::<ProcessRecord>(&record(RecordKind::Exec, tgid, tid, start_ns, 0), WAKEUP) {
        Ok(()) => count(Counter::ExecSubmitted),
        Err(_) => count(Counter::ExecDroppedRingFull),
    }
}

/// The current task has just made another, which has not run yet. A process that it made has its mappings, and is known
/// if it is.
///
/// Source: include/trace/events/sched.h: sched_process_fork(parent, child).
#[inline(always)]
pub fn fork(ctx: &RawTracePointContext) {
    let (parent, _) = current_ids();
    let is_known = PROCESSES.get_ptr(parent).is_some();
    if !is_known && setting!(has_families) != 1 {
        return;
    }
    let child: u64 = ctx.arg(1);
    let Some(tgid) = task::tgid_of(child) else { return };
    let tgid = tgid.get();
    // A thread of its own.
    if tgid == parent {
        return;
    }
    targets::follow_fork(parent, tgid);
    if !is_known {
        return;
    }
    let Some(entry) = table::entry_of(parent, task::start_ns(task::group_leader())) else { return };
    let start_ns = task::start_ns(NonZeroU64::new(child));
    if PROCESSES.insert(tgid, entry.inherited(start_ns / NS_PER_TICK), 0).is_err() {
        count(Counter::ForkProcessNotKept);
    }
    let record = record(RecordKind::Fork, tgid, tgid, start_ns, parent);
    match EVENTS.output::<ProcessRecord>(&record, wakeup_if_filling()) {
        Ok(()) => count(Counter::ForkSubmitted),
        Err(_) => count(Counter::ForkDroppedRingFull),
    }
}

/// The current task exits. The process ends with the last of its threads, which need not be its main one.
#[inline(always)]
pub fn exit(_ctx: &RawTracePointContext) {
    let (tgid, tid) = current_ids();
    targets::follow_exit(tgid);
    if PROCESSES.get_ptr(tgid).is_none() || task::has_live_threads() {
        return;
    }
    // The last threads may come here together: one of them finds the entry.
    if PROCESSES.remove(tgid).is_err() {
        return;
    }
    let start_ns = task::start_ns(task::group_leader());
    let record = record(RecordKind::Exit, tgid, tid, start_ns, 0);
    match EVENTS.output::<ProcessRecord>(&record, wakeup_if_filling()) {
        Ok(()) => count(Counter::ExitSubmitted),
        Err(_) => count(Counter::ExitDroppedRingFull),
    }
}

/// The head of a record without a stack.
#[inline(always)]
fn head(kind: RecordKind, tgid: u32, tid: u32) -> RecordHead {
    RecordHead {
        version: WIRE_VERSION,
        kind: kind as u8,
        user_end: 0,
        flags: 0,
        user_frames: 0,
        kernel_frames: 0,
        tgid,
        tid,
        time_ns: boot_time_ns(),
    }
}

#[inline(always)]
fn record(kind: RecordKind, tgid: u32, tid: u32, start_ns: u64, parent: u32) -> ProcessRecord {
    let head = head(kind, tgid, tid);
    ProcessRecord { head, start_ns, cgroup_id: task::cgroup_id(), parent, reserved: 0 }
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
    let head = head(RecordKind::CgroupMade, tgid, tid);
    let record = CgroupRecord { head, cgroup_id: task::id_of_cgroup(cgroup).unwrap_or(0) };
    if EVENTS.output::<CgroupRecord>(&record, WAKEUP).is_err() {
        count(Counter::CgroupDroppedRingFull);
    }
}
