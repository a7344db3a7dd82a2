//! What our programs cost, measured by themselves on 1 of [`TIMED_EVERY`] runs.
//!
//! The kernel's own account of BPF time is a sysctl of the whole machine, and makes every program of everybody slower.
//!
//! An entry point is to be between the two calls as a whole, whatever way it goes:
//! ```text
//! let began_ns = timing::begin(Timed::Samples);
//! ..
//! timing::end(Timed::Samples, began_ns);
//! ```
//! Counts of a program that may be preempted by itself are near enough: a run that comes between the reading and the
//! writing of a counter is not in it.

use profiler_common::stats::{TIMED_EVERY, Timed, durations};

use crate::{
    helpers::monotonic_ns,
    maps::{CPU_DURATIONS, add, count},
};

/// Counts a run, and gives when it began; 0 for a run that is not timed.
#[inline(always)]
pub fn begin(programs: Timed) -> u64 {
    let run = add(programs.runs(), 1);
    if run % TIMED_EVERY == 0 { monotonic_ns() } else { 0 }
}

/// The end of a run.
#[inline(always)]
pub fn end(programs: Timed, began_ns: u64) {
    if began_ns != 0 {
        let ns = monotonic_ns().wrapping_sub(began_ns);
        add(programs.timed_ns(), ns);
        count(programs.timed());
        if let Timed::Samples = programs
            && let Some(slot) = CPU_DURATIONS.get_ptr_mut(durations::slot(ns))
        {
            // SAFETY: the look-up gave this CPU's value, which the program of no other event adds to.
            unsafe { *slot += 1 };
        }
    }
}
