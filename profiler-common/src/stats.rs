//! Counters of the kernel side. Each is raised at the place where the thing happens; none is computed from others.

/// A slot of the per-CPU array `STATS`, in events unless said otherwise.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Counter {
    /// Samples taken: raised by the first instruction of the sampling program.
    CpuTaken = 0,
    /// Samples written to the ring buffer.
    CpuSubmitted = 1,
    /// Samples dropped: the ring buffer was full.
    CpuDroppedRingFull = 2,
    /// Samples dropped: the per-CPU scratch value was not there. Cannot happen; counted all the same.
    CpuDroppedNoScratch = 3,
    /// Exec records written.
    ExecSubmitted = 4,
    /// Exec records dropped: the ring buffer was full.
    ExecDroppedRingFull = 5,
    /// Fork records written.
    ForkSubmitted = 6,
    /// Fork records dropped: the ring buffer was full.
    ForkDroppedRingFull = 7,
    /// Exit records written.
    ExitSubmitted = 8,
    /// Exit records dropped: the ring buffer was full.
    ExitDroppedRingFull = 9,
    /// Sampled processes that `PROCESSES` had no room for, at each of their samples.
    CpuProcessNotKept = 10,
    /// Forked processes that `PROCESSES` had no room for.
    ForkProcessNotKept = 11,
}

impl Counter {
    /// Number of counters: the size of `STATS`.
    pub const COUNT: u32 = 12;

    /// Every counter, in the order of its slot.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::CpuTaken,
        Self::CpuSubmitted,
        Self::CpuDroppedRingFull,
        Self::CpuDroppedNoScratch,
        Self::ExecSubmitted,
        Self::ExecDroppedRingFull,
        Self::ForkSubmitted,
        Self::ForkDroppedRingFull,
        Self::ExitSubmitted,
        Self::ExitDroppedRingFull,
        Self::CpuProcessNotKept,
        Self::ForkProcessNotKept,
    ];
}

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn every_counter_has_its_own_slot() {
        for (slot, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, slot, "{counter:?}");
        }
    }
}
