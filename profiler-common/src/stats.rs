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
    /// Runs of the sampling program whose duration was measured: 1 of [`TIMED_EVERY`]. This counter, and the others of
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
    /// Runs of the sampling program, those of samples that no target wants too.
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
    /// As [`Self::CpuRuns`], of page faults.
    FaultRuns = 27,
    /// As `CpuTimed`, of page faults.
    FaultTimed = 28,
    /// As `CpuTimedNs`, of page faults.
    FaultTimedNs = 29,
}

/// Programs whose time is measured together. Those in allocator functions have a budget and an account of their own: most of
/// what they cost is the trap, which no program can time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// The program that samples CPU time.
    Samples,
    /// The program that samples page faults.
    PageFaults,
    /// Those that follow processes and cgroups.
    ProcessEvents,
}

impl Timed {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Samples, Self::PageFaults, Self::ProcessEvents];

    /// Counter of all runs.
    #[inline(always)]
    #[must_use]
    pub const fn runs(self) -> Counter {
        match self {
            Self::Samples => Counter::CpuRuns,
            Self::PageFaults => Counter::FaultRuns,
            Self::ProcessEvents => Counter::ProcessRuns,
        }
    }

    /// Counter of the runs that were measured.
    #[inline(always)]
    #[must_use]
    pub const fn timed(self) -> Counter {
        match self {
            Self::Samples => Counter::CpuTimed,
            Self::PageFaults => Counter::FaultTimed,
            Self::ProcessEvents => Counter::ProcessTimed,
        }
    }

    /// Counter of the nanoseconds that those took.
    #[inline(always)]
    #[must_use]
    pub const fn timed_ns(self) -> Counter {
        match self {
            Self::Samples => Counter::CpuTimedNs,
            Self::PageFaults => Counter::FaultTimedNs,
            Self::ProcessEvents => Counter::ProcessTimedNs,
        }
    }

    /// The name used in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Samples => "samples",
            Self::PageFaults => "page_faults",
            Self::ProcessEvents => "process_events",
        }
    }
}

/// Of so many runs of a program one is timed; a power of two. Two readings of the clock take some 40 ns.
pub const TIMED_EVERY: u64 = 64;
const _: () = assert!(TIMED_EVERY.is_power_of_two());

/// Slots of a histogram of durations: each octave in four, those below the first bound in the first slot, those of
/// the last bound and more in the last.
pub mod durations {
    /// Durations below `2^FIRST_LOG2` ns are in the first slot: 512 ns.
    const FIRST_LOG2: u32 = 9;
    /// Durations of `2^END_LOG2` ns and more are in the last slot: 2 ms.
    const END_LOG2: u32 = 21;
    /// Parts of an octave.
    const STEPS: u32 = 4;

    /// Number of slots.
    pub const SLOTS: u32 = (END_LOG2 - FIRST_LOG2) * STEPS + 2;

    /// The slot of a duration.
    #[inline(always)]
    #[must_use]
    pub const fn slot(ns: u64) -> u32 {
        if ns < 1 << FIRST_LOG2 {
            return 0;
        }
        if ns >= 1 << END_LOG2 {
            return SLOTS - 1;
        }
        let log2 = 63 - ns.leading_zeros();
        // The two bits behind the first.
        let step = (ns >> (log2 - 2)) as u32 & (STEPS - 1);
        1 + (log2 - FIRST_LOG2) * STEPS + step
    }

    /// All durations in a slot are less than so many nanoseconds; `None` for the last.
    #[must_use]
    pub const fn bound_ns(slot: u32) -> Option<u64> {
        if slot >= SLOTS - 1 {
            return None;
        }
        let (octave, step) = (slot / STEPS, slot % STEPS);
        Some((1 << (FIRST_LOG2 + octave - 2)) * (STEPS + step) as u64)
    }
}

impl Counter {
    /// Number of counters: the size of `STATS`.
    pub const COUNT: u32 = 30;

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
        Self::FaultRuns,
        Self::FaultTimed,
        Self::FaultTimedNs,
    ];
}

#[cfg(test)]
mod tests {
    use super::{
        Counter,
        durations::{SLOTS, bound_ns, slot},
    };

    #[test]
    fn a_duration_is_below_the_bound_of_its_slot_and_not_below_the_one_before() {
        let edges = (0..30).flat_map(|log2| [0_u64, 1, 3, 7].map(|more| (1_u64 << log2) + more));
        for ns in edges.flat_map(|ns| [ns - 1, ns, ns + ns / 4, ns + ns / 2, ns + ns / 4 * 3]) {
            let at = slot(ns);
            assert!(bound_ns(at).is_none_or(|bound| ns < bound), "{ns} in slot {at}");
            let before = at.checked_sub(1).and_then(bound_ns).unwrap_or(0);
            assert!(before <= ns, "{ns} in slot {at}");
        }
        assert_eq!((bound_ns(0), bound_ns(1), slot(u64::MAX)), (Some(512), Some(640), SLOTS - 1));
    }

    #[test]
    fn every_counter_has_its_own_slot() {
        for (slot, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, slot, "{counter:?}");
        }
    }
}
