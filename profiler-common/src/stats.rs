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
    /// Runs of the sampling program whose duration was measured: 1 of [`TIMED_EVERY`].
    CpuTimed = 6,
    /// Nanoseconds that the measured runs took.
    CpuTimedNs = 7,
    /// Records of new cgroups dropped: the ring buffer was full.
    CgroupDroppedRingFull = 8,
    /// Fork records written.
    ForkSubmitted = 9,
    /// Fork records dropped: the ring buffer was full.
    ForkDroppedRingFull = 10,
    /// Exit records written.
    ExitSubmitted = 11,
    /// Exit records dropped: the ring buffer was full.
    ExitDroppedRingFull = 12,
    /// Sampled processes that `PROCESSES` had no room for, at each of their samples.
    CpuProcessNotKept = 13,
    /// Forked processes that `PROCESSES` had no room for.
    ForkProcessNotKept = 14,
    /// Samples that no target wants. Not taken.
    CpuFiltered = 15,
    /// Samples that another of the same target stands for. Not taken.
    CpuThinned = 16,
    /// Children of a family that `FAMILY` had no room for: they are not sampled.
    FamilyNotFollowed = 17,
    /// Page faults sampled.
    FaultTaken = 18,
    /// Page faults written to the ring buffer.
    FaultSubmitted = 19,
    /// Page faults dropped: the ring buffer was full.
    FaultDroppedRingFull = 20,
    /// As [`Self::CpuDroppedNoScratch`], of page faults.
    FaultDroppedNoScratch = 21,
    /// Page faults that no target wants. Not taken.
    FaultFiltered = 22,
}

/// Of so many runs of a program one is timed; a power of two. Two readings of the clock take some 40 ns.
pub const TIMED_EVERY: u64 = 64;
const _: () = assert!(TIMED_EVERY.is_power_of_two());

impl Counter {
    /// Number of counters: the size of `STATS`.
    pub const COUNT: u32 = 23;

    /// Every counter, in the order of its slot.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::CpuTaken,
        Self::CpuSubmitted,
        Self::CpuDroppedRingFull,
        Self::CpuDroppedNoScratch,
        Self::ExecSubmitted,
        Self::ExecDroppedRingFull,
        Self::CpuTimed,
        Self::CpuTimedNs,
        Self::CgroupDroppedRingFull,
        Self::ForkSubmitted,
        Self::ForkDroppedRingFull,
        Self::ExitSubmitted,
        Self::ExitDroppedRingFull,
        Self::CpuProcessNotKept,
        Self::ForkProcessNotKept,
        Self::CpuFiltered,
        Self::CpuThinned,
        Self::FamilyNotFollowed,
        Self::FaultTaken,
        Self::FaultSubmitted,
        Self::FaultDroppedRingFull,
        Self::FaultDroppedNoScratch,
        Self::FaultFiltered,
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
