//! What sampling costs, measured by the program itself on 1 of [`TIMED_EVERY`] runs.
//!
//! The kernel's own account of BPF time is a sysctl of the whole machine, and makes every program of everybody slower.

use profiler_common::stats::{Counter, TIMED_EVERY, durations};

use crate::{
    helpers::monotonic_ns,
    maps::{CPU_DURATIONS, add, count},
};

/// When a run began; 0 for a run that is not timed. `run` is its number on this CPU.
#[inline(always)]
pub fn begin(run: u64) -> u64 {
    if run % TIMED_EVERY == 0 { monotonic_ns() } else { 0 }
}

/// The end of a run of the sampling program.
#[inline(always)]
pub fn end(began_ns: u64) {
    if began_ns != 0 {
        let ns = monotonic_ns().wrapping_sub(began_ns);
        add(Counter::CpuTimedNs, ns);
        count(Counter::CpuTimed);
        if let Some(slot) = CPU_DURATIONS.get_ptr_mut(durations::slot(ns)) {
            // SAFETY: the look-up gave this CPU's value, and the program is not interrupted by itself.
            unsafe { *slot += 1 };
        }
    }
}
