//! Heap sampling: which allocations are samples, and what programs and agent share about them.
//!
//! Each allocation is tossed for by itself: one of `size` bytes is a sample with probability `1 - exp(-size / rate)`. As an
//! exponential countdown of bytes has no memory, that is the distribution that Go's runtime has (runtime/malloc.go:
//! nextSample), without a state per thread.

/// A probability of 1, in the unit of [`unsampled`]: 32 binary digits.
pub const ONE: u64 = 1 << 32;

/// Entries of [`EXP`]: exponents from 0 to 32 in steps of 1/64. `exp(-32)` is below 2^-46.
pub const EXP_ENTRIES: usize = 1 << EXP_ENTRIES_LOG2;
const EXP_ENTRIES_LOG2: u32 = 11;
/// Binary digits of an exponent behind the step of the table, of 32.
const STEP_BITS: u32 = 26;

/// `EXP[k]` is `exp(-k / 64)`, with 31 binary digits.
pub static EXP: [u32; EXP_ENTRIES] = exp_table();

/// Repeated multiplication in 62 binary digits: 2,048 roundings leave an error below 2^-50.
const fn exp_table() -> [u32; EXP_ENTRIES] {
    const ONE_62: u128 = 1 << 62;
    // exp(-1/64) by its series: the term of power 10 is below 2^-81.
    let mut ratio = ONE_62 as i128;
    let mut term = ONE_62 as i128;
    let mut power = 1;
    while power <= 10 {
        term = -term / (64 * power);
        ratio += term;
        power += 1;
    }
    let mut table = [0; EXP_ENTRIES];
    let mut value = ONE_62;
    let mut k = 0;
    while k < EXP_ENTRIES {
        table[k] = ((value + (1 << 30)) >> 31) as u32;
        value = (value * ratio as u128) >> 62;
        k += 1;
    }
    table
}

/// The probability that an allocation of `size` bytes is no sample at a mean of `rate` bytes between samples, in units of
/// 2^-32. `exp` looks [`EXP`] up; its argument is below [`EXP_ENTRIES`].
///
/// A rate of 1 samples everything. An allocation of 0 bytes counts as one of 1 here. The kernel side tosses by this value
/// and the agent scales by it, so that what it lacks in precision (2^-28) makes no bias.
///
/// ```text
/// exp(-(k/64 + f)) = EXP[k] * (1 - f + f^2/2 - f^3/6)        0 <= f < 1/64
/// ```
#[inline(always)]
pub fn unsampled(size: u64, rate: u32, exp: impl FnOnce(u64) -> u32) -> u64 {
    if rate <= 1 || size >= 1 << 31 {
        return 0;
    }
    let size = if size == 0 { 1 } else { size };
    let x = (size << 32) / rate as u64;
    let k = x >> STEP_BITS;
    if k >= EXP_ENTRIES as u64 {
        return 0;
    }
    let f = x & ((1 << STEP_BITS) - 1);
    let f2 = (f * f) >> 32;
    let series = ONE - f + (f2 >> 1) - ((f2 * f) >> 32) / 6;
    (exp(k & (EXP_ENTRIES as u64 - 1)) as u64 * series) >> 31
}

/// What a probed function does with its arguments. Decoded with [`Call::decode`], never cast.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    /// `(size)`: `malloc`, `operator new`, `valloc`.
    Allocate = 1,
    /// `(count, size)`: `calloc`.
    AllocateArray = 2,
    /// `(old, size)`: `realloc`.
    Reallocate = 3,
    /// `(old, count, size)`: `reallocarray`.
    ReallocateArray = 4,
    /// `(alignment, size)`: `aligned_alloc`, `memalign`.
    AllocateAligned = 5,
    /// `(result, alignment, size)`: `posix_memalign`.
    AllocateInto = 6,
    /// `(pointer)`: `free`, `operator delete`.
    Free = 7,
}

impl Call {
    /// Every call, in the order of its number.
    pub const ALL: [Self; 7] = [
        Self::Allocate,
        Self::AllocateArray,
        Self::Reallocate,
        Self::ReallocateArray,
        Self::AllocateAligned,
        Self::AllocateInto,
        Self::Free,
    ];

    /// The call named by a byte, `None` for a byte that names none.
    #[inline(always)]
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Allocate),
            2 => Some(Self::AllocateArray),
            3 => Some(Self::Reallocate),
            4 => Some(Self::ReallocateArray),
            5 => Some(Self::AllocateAligned),
            6 => Some(Self::AllocateInto),
            7 => Some(Self::Free),
            _ => None,
        }
    }
}

/// Flag of a [`Point`]: the function may call another probed one, which must not count again.
pub const POINT_NESTS: u8 = 1;

/// Where a probe sits, and where it finds the arguments there. An unused one is all zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Address of the probed instruction in the process: tells the entry of a function from its return.
    pub address: u64,
    /// Index of its [`Target`].
    pub target: u32,
    /// [`Call`].
    pub call: u8,
    /// [`POINT_NESTS`], or 0.
    pub flags: u8,
    /// Registers of the arguments in the order of [`Call`], numbered by the psABI of x86-64, 4 bits each, the first one
    /// lowest.
    pub arguments: u16,
}

/// What the programs know of a process whose heap is profiled. An unused one is all zero.
///
/// The agent writes it while a program may read it: of [`Self::end_ns`] and the other fields of its time, one write changes
/// only that one or only those, and the latter only while `end_ns` is past.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Number of the process among those that were ever profiled; 0 for an unused entry.
    pub id: u32,
    /// Mean bytes between samples: 1 samples everything, 0 nothing.
    pub rate: u32,
    /// By how much a sample stands for more than its like: for the time in which there were none. In 1/[`SCALE_ONE`]s.
    pub scale: u32,
    /// [`TARGET_ENTRY_ONLY`], [`TARGET_NO_LIVE`], [`TARGET_EVERY_RETURN`].
    pub flags: u32,
    /// Samples are taken from this time on: CLOCK_BOOTTIME, in nanoseconds.
    pub begin_ns: u64,
    /// And before this one.
    pub end_ns: u64,
}

/// A [`Target::scale`] of 1.
pub const SCALE_ONE: u32 = 1 << 16;

/// Flag of a [`Target`]: no return of its functions is probed. Allocations are sampled where they are asked for; whether they
/// succeed, and where they are, is not known.
pub const TARGET_ENTRY_ONLY: u32 = 1;
/// Flag of a [`Target`]: its samples are not followed until they are freed.
pub const TARGET_NO_LIVE: u32 = 2;
/// Flag of a [`Target`]: every return of its functions is probed, whatever the program says at the entry.
pub const TARGET_EVERY_RETURN: u32 = 4;

/// What the probes of one [`Target`] cost on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Entries of functions that allocate.
    pub allocs: u64,
    /// Entries of functions that free.
    pub frees: u64,
    /// Returns.
    pub returns: u64,
    /// Nanoseconds spent on samples.
    pub sample_ns: u64,
}

/// An allocation in use that was a sample.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LiveKey {
    /// Its address.
    pub pointer: u64,
    /// [`Target::id`].
    pub target: u32,
    /// Zero: keys are compared byte by byte.
    pub reserved: u32,
}

/// A thread inside a probed function that is a sample, or that may call other probed functions.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Stack pointer at the entry: the return address lies there.
    pub sp: u64,
    /// Bytes asked for.
    pub size: u64,
    /// `AllocateInto`: where the result will be.
    pub result: u64,
    /// `Reallocate`: the allocation that is replaced, if it was a sample in use; else 0.
    pub old: u64,
    /// When that one was made: the value it had in the table of live allocations.
    pub old_time_ns: u64,
    /// When the call began: CLOCK_BOOTTIME, in nanoseconds.
    pub time_ns: u64,
    /// Index of the [`Point`].
    pub point: u32,
    /// Mean bytes between samples when the coin was tossed; 0 when the call is no sample.
    pub rate: u32,
    /// [`Target::scale`] then.
    pub scale: u32,
    /// Zero.
    pub reserved: u32,
}

/// The outermost function that a thread of a target with [`TARGET_ENTRY_ONLY`] has entered, of those that may call others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// Stack pointer at the entry.
    pub sp: u64,
    /// The return address, which lies there until the caller calls something else.
    pub caller: u64,
    /// Index of the [`Point`].
    pub point: u64,
}

/// Between the header of an [`AllocSample`](crate::wire::RecordKind::AllocSample) and its frames. The header's value is
/// the number of bytes asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocPart {
    /// Address of the allocation; 0 where it is not known.
    pub pointer: u64,
    /// [`Target::id`].
    pub target: u32,
    /// Mean bytes between samples when the coin was tossed.
    pub rate: u32,
    /// [`Target::scale`] then.
    pub scale: u32,
    /// [`PART_NOT_LIVE`], [`PART_LIVE_FULL`].
    pub flags: u32,
}

/// Flag of an [`AllocPart`]: the allocation is not followed until it is freed.
pub const PART_NOT_LIVE: u32 = 1;
/// Flag of an [`AllocPart`]: nor was there room for it among those that are.
pub const PART_LIVE_FULL: u32 = 2;

/// 64-bit words of an [`AllocPart`].
pub const ALLOC_PART_WORDS: usize = 3;

const _: () = assert!(size_of::<AllocPart>() == 8 * ALLOC_PART_WORDS);
const _: () = assert!(size_of::<Point>() == 16);
const _: () = assert!(size_of::<Target>() == 32);
const _: () = assert!(size_of::<Hits>() == 32);
const _: () = assert!(size_of::<LiveKey>() == 16);
const _: () = assert!(size_of::<Pending>() == 64);
const _: () = assert!(size_of::<Outer>() == 24);

/// Processes profiled at a time.
pub const TARGETS_MAX: u32 = 256;
/// Probed functions of all of them: an allocator has about 10, with all of C++'s operators 40.
pub const POINTS_MAX: u32 = 4096;
/// Threads inside probed functions at a time: those that sleep in one, for all others are on a CPU. Of targets with
/// [`TARGET_ENTRY_ONLY`]: threads that entered one that may call others, the latest.
pub const PENDING_MAX: u32 = 8192;
/// Sampled allocations in use: at a rate of 512 KiB, 64 GiB of memory in use.
pub const LIVE_MAX: u32 = 1 << 17;
/// User frames of a sampled allocation. A power of two less one, for the mask the verifier wants.
pub const HEAP_FRAMES_MAX: usize = 127;
/// Samples in the making on one CPU: a thread may be preempted in the middle of one.
pub const SCRATCH_SLOTS: u32 = 4;

/// A slot of the per-CPU array `HEAP_STATS`, in events unless said otherwise.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeapCounter {
    /// Allocations that were made and are samples.
    Taken = 0,
    /// Of these: written to the ring buffer.
    Submitted = 1,
    /// Of these: dropped, the ring buffer was full.
    DroppedRingFull = 2,
    /// Of these: dropped, more samples were in the making on one CPU than there are slots for.
    DroppedNoScratch = 3,
    /// Of these: dropped, more threads were inside probed functions than are remembered.
    DroppedPendingFull = 4,
    /// Samples missing from what is in use: the table of live allocations was full.
    LiveFull = 5,
    /// Calls that never returned: a thread that was left by an exception, or killed.
    Unreturned = 6,
    /// Sampled allocations in use that were freed.
    Freed = 7,
    /// Probes hit where nothing is known of: between an exec and the detaching.
    Stray = 8,
}

impl HeapCounter {
    /// Number of counters: the size of `HEAP_STATS`.
    pub const COUNT: u32 = 9;

    /// Every counter, in the order of its slot.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::Taken,
        Self::Submitted,
        Self::DroppedRingFull,
        Self::DroppedNoScratch,
        Self::DroppedPendingFull,
        Self::LiveFull,
        Self::Unreturned,
        Self::Freed,
        Self::Stray,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;

    fn exactly(size: u64, rate: u32) -> f64 {
        (-(size as f64) / f64::from(rate)).exp()
    }

    #[test]
    fn the_probability_is_that_of_an_exponential_countdown() {
        for rate in [2, 3, 64, 4096, 1 << 16, 1 << 19, 1 << 26, u32::MAX] {
            for size in (0..31).flat_map(|bits| [1 << bits, (1 << bits) + 1, 3 << bits >> 1]) {
                let found = unsampled(size, rate, |k| EXP[k as usize]) as f64 / ONE as f64;
                let expect = exactly(size.max(1), rate);
                assert!(
                    (found - expect).abs() < 1.0 / f64::from(1 << 28),
                    "{size} at {rate}: {found} {expect}"
                );
            }
        }
    }

    #[test]
    fn a_rate_of_one_samples_everything() {
        for size in [0, 1, 16, u64::MAX] {
            assert_eq!(unsampled(size, 1, |k| EXP[k as usize]), 0);
        }
    }

    #[test]
    fn an_allocation_as_large_as_an_address_space_is_always_a_sample() {
        assert_eq!(unsampled(u64::MAX, 1 << 19, |k| EXP[k as usize]), 0);
        assert_eq!(unsampled(1 << 31, u32::MAX, |k| EXP[k as usize]), 0);
    }

    #[test]
    fn the_table_falls_from_one_to_nothing() {
        assert_eq!(EXP[0], 1 << 31);
        assert!(EXP.is_sorted_by(|a, b| a >= b));
        assert_eq!(EXP[EXP_ENTRIES - 1], 0);
        let worst = EXP
            .iter()
            .enumerate()
            .map(|(k, &value)| (f64::from(value) / f64::from(1u32 << 31) - (-(k as f64) / 64.0).exp()).abs());
        assert!(worst.fold(0.0, f64::max) < 1.0 / f64::from(1 << 30));
    }

    #[test]
    fn every_call_and_counter_keeps_its_number() {
        for call in Call::ALL {
            assert_eq!(Call::decode(call as u8), Some(call));
        }
        assert_eq!((Call::decode(0), Call::decode(8)), (None, None));
        for (slot, counter) in HeapCounter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, slot, "{counter:?}");
        }
    }
}
