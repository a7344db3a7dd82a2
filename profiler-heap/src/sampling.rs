//! From a sampled allocation to the allocations that it stands for.

use profiler_common::heap::{EXP, ONE, unsampled};

/// What one sample stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weight {
    /// Allocations: the inverse of the probability with which it was sampled.
    pub objects: f64,
    /// Bytes asked for by all of them.
    pub bytes: f64,
}

impl Weight {
    /// The weight of an allocation of `size` bytes at a mean of `rate` bytes between samples. Horvitz-Thompson: the sum of
    /// weights is, on average, the number of allocations, whatever their sizes. `None` for what is never sampled.
    #[must_use]
    pub fn of(size: u64, rate: u32) -> Option<Self> {
        if rate == 0 {
            return None;
        }
        let exp = |k: u64| usize::try_from(k).ok().and_then(|k| EXP.get(k)).copied().unwrap_or(0);
        let sampled = ONE - unsampled(size, rate, exp);
        if sampled == 0 {
            return None;
        }
        let objects = ONE as f64 / sampled as f64;
        Some(Self { objects, bytes: objects * size as f64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_allocation_stands_for_about_the_rate() {
        let weight = Weight::of(16, 1 << 19).expect("it may be sampled");
        assert!((weight.objects - 32_768.5).abs() < 64.0, "{weight:?}");
        assert!((weight.bytes / f64::from(1 << 19) - 1.0).abs() < 2e-3, "{weight:?}");
    }

    #[test]
    fn at_a_rate_of_one_and_for_huge_sizes_it_stands_for_itself() {
        assert_eq!(Weight::of(16, 1), Some(Weight { objects: 1.0, bytes: 16.0 }));
        assert_eq!(Weight::of(1 << 40, 1 << 19), Some(Weight { objects: 1.0, bytes: (1u64 << 40) as f64 }));
        assert_eq!(Weight::of(16, 0), None);
    }

    /// Tosses as the kernel side does, with a generator of the test's own.
    #[test]
    fn sums_of_weights_are_the_sums_of_what_was_allocated() {
        let mut state = 1u64;
        let mut random = || {
            // Source: Vigna, xorshift64*.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
        };
        for (size, count, rate) in
            [(16u64, 4_000_000u64, 4096u32), (100, 1_000_000, 4096), (10_000, 50_000, 65_536)]
        {
            let is_sample = |random: u64| random >= unsampled(size, rate, |k| EXP[k as usize]);
            let samples = (0..count).filter(|_| is_sample(random())).count();
            let estimate = samples as f64 * Weight::of(size, rate).expect("sampled").objects;
            let tolerance = 4.0 / (samples as f64).sqrt();
            assert!(
                (estimate / count as f64 - 1.0).abs() < tolerance,
                "{size} at {rate}: {estimate} of {count}"
            );
        }
    }
}
