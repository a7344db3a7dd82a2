//! The counters of the kernel side, summed over CPUs.

use std::sync::Arc;

use aya::maps::{MapData, MapError, PerCpuArray};
use profiler_common::stats::Counter;

/// The `STATS` map.
#[derive(Clone)]
pub(crate) struct KernelCounts {
    map: Arc<PerCpuArray<MapData, u64>>,
}

impl KernelCounts {
    pub(super) fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self { map: Arc::new(map) }
    }

    /// The counter's value since load, over all CPUs.
    pub(crate) fn get(&self, counter: Counter) -> Result<u64, MapError> {
        let values = self.map.get(&(counter as u32), 0)?;
        Ok(values.iter().sum())
    }
}
