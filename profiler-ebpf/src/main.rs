//! The BPF programs. An entry point reads its context, calls on, and has counted something on every way out.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![deny(unsafe_op_in_unsafe_fn)]

use aya_ebpf::{
    macros::{perf_event, raw_tracepoint},
    programs::{PerfEventContext, RawTracePointContext},
};
use profiler_common::stats::Timed;

#[cfg(bpf_target_arch = "x86_64")]
mod alloc;
#[cfg_attr(bpf_target_arch = "x86_64", path = "arch/x86_64.rs")]
#[cfg_attr(bpf_target_arch = "aarch64", path = "arch/aarch64.rs")]
mod arch;
mod cpu;
mod faults;
mod helpers;
mod maps;
mod process;
mod stack;
mod table;
mod targets;
mod task;
mod timing;

/// On-CPU samples: attached to one clock event per CPU.
#[perf_event]
pub fn cpu_sample(ctx: PerfEventContext) -> u32 {
    let began_ns = timing::begin(Timed::Samples);
    cpu::sample(&ctx);
    timing::end(Timed::Samples, began_ns);
    0
}

/// Page faults: attached to one event per CPU.
#[perf_event]
pub fn page_fault(ctx: PerfEventContext) -> u32 {
    let began_ns = timing::begin(Timed::PageFaults);
    faults::sample(&ctx);
    timing::end(Timed::PageFaults, began_ns);
    0
}

/// A process has a new image.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn process_exec(ctx: RawTracePointContext) -> i32 {
    let began_ns = timing::begin(Timed::ProcessEvents);
    process::exec(&ctx);
    timing::end(Timed::ProcessEvents, began_ns);
    0
}

/// A task was made.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn process_fork(ctx: RawTracePointContext) -> i32 {
    let began_ns = timing::begin(Timed::ProcessEvents);
    process::fork(&ctx);
    timing::end(Timed::ProcessEvents, began_ns);
    0
}

/// A task exits.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(ctx: RawTracePointContext) -> i32 {
    let began_ns = timing::begin(Timed::ProcessEvents);
    process::exit(&ctx);
    timing::end(Timed::ProcessEvents, began_ns);
    0
}

/// A cgroup was made.
#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
pub fn cgroup_made(ctx: RawTracePointContext) -> i32 {
    let began_ns = timing::begin(Timed::ProcessEvents);
    process::cgroup_made(&ctx);
    timing::end(Timed::ProcessEvents, began_ns);
    0
}

/// An allocator's function is entered, or returns. Not aya's macro, whose programs answer 0 whatever they mean.
#[cfg(bpf_target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
extern "C" fn heap_probe(ctx: *mut core::ffi::c_void) -> u32 {
    alloc::session(ctx)
}

/// An allocator's function is entered, before kernel 6.13. Kernels that look at the answer take 1 as a wish to be detached.
#[cfg(bpf_target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
extern "C" fn heap_entry(ctx: *mut core::ffi::c_void) -> u32 {
    alloc::entry(ctx);
    0
}

/// An allocator's function returns, before kernel 6.13.
#[cfg(bpf_target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
extern "C" fn heap_return(ctx: *mut core::ffi::c_void) -> u32 {
    alloc::returned(ctx);
    0
}

/// GPL-only helpers (`bpf_probe_read_user`, `bpf_get_stack`) need it.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
