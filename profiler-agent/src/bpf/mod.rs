//! The programs in the kernel: what this kernel can do, loading, attaching, counters.

mod heap;
mod load;
mod probe;
mod stats;
mod targets;
mod unwind;
mod value;

pub(crate) use heap::{HeapCounts, HeapProgram, HeapSource, Links, LiveMap};
pub(crate) use load::{BpfError, LoadOptions, Programs};
pub(crate) use stats::KernelCounts;
pub(crate) use unwind::UnwindMaps;
