//! Changes to processes, in the ring buffer in their order among the samples.

use aya_ebpf::programs::RawTracePointContext;
use profiler_common::{
    stats::Counter,
    wire::{ProcessRecord, RecordHead, RecordKind, WIRE_VERSION},
};

use crate::{
    helpers::{boot_time_ns, current_ids},
    maps::{EVENTS, PROCESSES, count},
    task,
};

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
    let record = ProcessRecord { head, start_ns: task::start_ns(task::group_leader()) };
    match EVENTS.output::<ProcessRecord>(&record, 0) {
        Ok(()) => count(Counter::ExecSubmitted),
        Err(_) => count(Counter::ExecDroppedRingFull),
    }
}
