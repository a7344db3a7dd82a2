//! Counters of the kernel side. Each is raised at the place where the thing happens; none is computed from others.

/// A slot of the per-CPU array `STATS`, in events unless said otherwise.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Counter {
    /// Samples taken: raised by the sampling program as soon as a target, where there are any, wants the sample.
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
    /// Runs of the sampling programs whose duration was measured: 1 of [`TIMED_EVERY`]. This counter, and the others of
    /// [`Timed`], are for its use.
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
    /// Runs of the sampling programs, of page faults too, those of samples that no target wants too.
    CpuRuns = 18,
    /// Runs of the programs that follow processes and cgroups, those that have nothing to tell too.
    ProcessRuns = 19,
    /// Of these, as `CpuTimed`.
    ProcessTimed = 20,
    /// As `CpuTimedNs`.
    ProcessTimedNs = 21,
    /// Page faults sampled.
    FaultTaken = 22,
    /// Page faults written to the ring buffer.
    FaultSubmitted = 23,
    /// Page faults dropped: the ring buffer was full.
    FaultDroppedRingFull = 24,
    /// As [`Self::CpuDroppedNoScratch`], of page faults.
    FaultDroppedNoScratch = 25,
    /// Page faults that no target wants. Not taken.
    FaultFiltered = 26,
}

/// Programs whose time is measured together. Those in allocator functions have a budget and an account of their own: most of
/// what they cost is the trap, which no program can time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// The sampling programs.
    Samples,
    /// Those that follow processes and cgroups.
    ProcessEvents,
}

impl Timed {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Samples, Self::ProcessEvents];

    /// Counter of all runs.
    #[inline(always)]
    #[must_use]
    pub const fn runs(self) -> Counter {
        match self {
            Self::Samples => Counter::CpuRuns,
            Self::ProcessEvents => Counter::ProcessRuns,
        }
    }

    /// Counter of the runs that were measured.
    #[inline(always)]
    #[must_use]
    pub const fn timed(self) -> Counter {
        match self {
            Self::Samples => Counter::CpuTimed,
            Self::ProcessEvents => Counter::ProcessTimed,
        }
    }

    /// Counter of the nanoseconds that those took.
    #[inline(always)]
    #[must_use]
    pub const fn timed_ns(self) -> Counter {
        match self {
            Self::Samples => Counter::CpuTimedNs,
            Self::ProcessEvents => Counter::ProcessTimedNs,
        }
    }

    /// The name used in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Samples => "samples",
            Self::ProcessEvents => "process_events",
        }
    }
}

/// Of so many runs of a program one is timed; a power of two. Two readings of the clock take some 40 ns.
pub const TIMED_EVERY: u64 = 64;
const _: () = assert!(TIMED_EVERY.is_power_of_two());

impl Counter {
    /// Number of counters: the size of `STATS`.
    pub const COUNT: u32 = 27;

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
        Self::CpuRuns,
        Self::ProcessRuns,
        Self::ProcessTimed,
        Self::ProcessTimedNs,
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
