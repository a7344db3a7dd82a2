//! The counters of the kernel side, summed over CPUs.

use std::sync::Arc;

use aya::maps::{MapData, MapError, PerCpuArray};
use profiler_common::stats::{Counter, durations};

/// The maps `STATS` and `CPU_DURATIONS`.
#[derive(Clone)]
pub(crate) struct KernelCounts {
    map: Arc<PerCpuArray<MapData, u64>>,
    durations: Arc<PerCpuArray<MapData, u64>>,
}

impl KernelCounts {
    pub(super) fn new(map: PerCpuArray<MapData, u64>, durations: PerCpuArray<MapData, u64>) -> Self {
        Self { map: Arc::new(map), durations: Arc::new(durations) }
    }

    /// The counter's value since load, over all CPUs.
    pub(crate) fn get(&self, counter: Counter) -> Result<u64, MapError> {
        let values = self.map.get(&(counter as u32), 0)?;
        Ok(values.iter().sum())
    }

    /// Timed samples since load by how long they took in the kernel, over all CPUs: the bound in nanoseconds that those of
    /// a slot are below, `None` for the last, and their number.
    pub(crate) fn durations(&self) -> Result<Vec<(Option<u64>, u64)>, MapError> {
        let slot = |slot: u32| {
            let values = self.durations.get(&slot, 0)?;
            Ok((durations::bound_ns(slot), values.iter().sum()))
        };
        (0..durations::SLOTS).map(slot).collect()
    }
}
