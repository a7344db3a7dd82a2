//! What is to be sampled: a short list of targets, of which the first that a task matches decides.
//!
//! Every sample costs a look-up of the list and the comparisons up to the first match; nothing is remembered of a task,
//! so that a new name or cgroup counts from its next sample on.

use core::num::NonZeroU32;

use crate::limits::COMM_BYTES;

/// Targets in one list; a power of two, for the mask the verifier wants.
pub const TARGETS_MAX: usize = 16;

/// Words of a task's name.
pub const COMM_WORDS: usize = COMM_BYTES / 8;

/// [`Target::conditions`]: the process id is [`Target::pid`].
pub const BY_PID: u32 = 1;
/// [`Target::conditions`]: the process's name begins with [`Target::comm`].
pub const BY_COMM: u32 = 2;
/// [`Target::conditions`]: the task is in the cgroup [`Target::cgroup_id`] or below.
pub const BY_CGROUP: u32 = 4;

/// [`Target::conditions`]: the process is one that was named, or descends from one of them by forks that were seen.
pub const BY_FAMILY: u32 = 8;

/// One target. A task matches it when it meets all of its conditions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// [`BY_PID`], [`BY_COMM`], [`BY_CGROUP`], [`BY_FAMILY`].
    pub conditions: u32,
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// The beginning of a name, zeros behind it.
    pub comm: [u64; COMM_WORDS],
    /// All ones where [`Self::comm`] has a byte, else zeros.
    pub comm_mask: [u64; COMM_WORDS],
    /// Id of a cgroup of the v2 hierarchy; 0, which none has, for one that is not there.
    pub cgroup_id: u64,
    /// Its depth: 0 for the root.
    pub cgroup_level: u32,
    /// 1 to sample what matches, 0 not to.
    pub is_wanted: u32,
    /// Nanoseconds between two samples of a CPU that are kept; 0 to keep all.
    pub period_ns: u64,
}

/// The list: the only value of the map `TARGETS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// Targets in use.
    pub count: u32,
    /// 1 to sample what matches no target, 0 not to.
    pub is_default_wanted: u32,
    /// The targets.
    pub targets: [Target; TARGETS_MAX],
}

const _: () = assert!(size_of::<Target>() == 64);
const _: () = assert!(size_of::<Targets>() == 8 + 64 * TARGETS_MAX);

impl Targets {
    /// Everything is sampled, each with the agent's own frequency.
    #[inline(always)]
    #[must_use]
    pub const fn want_everything(&self) -> bool {
        self.count == 0 && self.is_default_wanted != 0
    }
}

impl Target {
    /// Whether a process meets the conditions on its id and name.
    #[inline(always)]
    #[must_use]
    pub const fn matches_process(&self, pid: u32, comm: [u64; COMM_WORDS]) -> bool {
        let differs =
            (comm[0] ^ self.comm[0]) & self.comm_mask[0] | (comm[1] ^ self.comm[1]) & self.comm_mask[1];
        (self.conditions & BY_PID == 0 || self.pid == pid) && (self.conditions & BY_COMM == 0 || differs == 0)
    }

    /// Of how many samples one is kept, when they come each `period_ns`.
    #[inline(always)]
    #[must_use]
    pub fn one_in(&self, period_ns: u64) -> NonZeroU32 {
        const MOST: u64 = 1 << 16;
        if period_ns == 0 || self.period_ns <= period_ns {
            return NonZeroU32::MIN;
        }
        // Rounded to the nearest: half a period more.
        let ratio = (self.period_ns + (period_ns >> 1)) / period_ns;
        NonZeroU32::new(ratio.min(MOST) as u32).unwrap_or(NonZeroU32::MIN)
    }
}

/// Which one of each `n` samples in turn is kept, on one CPU: one at random, so that no rhythm of the sampled program
/// meets that of the choice. What is kept stands for `n`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Samples that are left of this turn.
    pub left: u32,
    /// The one that is kept, counted from the end.
    pub chosen: u32,
}

impl Turn {
    /// Whether the next sample is kept. A number that cannot be zero: a division that could fail has no place in a program.
    #[inline(always)]
    pub fn keeps_next(&mut self, n: NonZeroU32, random: u32) -> bool {
        // Also when `n` has become smaller.
        if self.left == 0 || self.left > n.get() {
            self.left = n.get();
            self.chosen = 1 + random % n;
        }
        let keeps = self.left == self.chosen;
        self.left -= 1;
        keeps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(comm: &str) -> [u64; COMM_WORDS] {
        let mut bytes = [0; COMM_BYTES];
        bytes[..comm.len()].copy_from_slice(comm.as_bytes());
        let (words, _) = bytes.as_chunks();
        [u64::from_ne_bytes(words[0]), u64::from_ne_bytes(words[1])]
    }

    fn by_comm(prefix: &str) -> Target {
        let mut mask = [0; COMM_BYTES];
        mask[..prefix.len()].fill(0xff);
        let (masks, _) = mask.as_chunks();
        let comm_mask = [u64::from_ne_bytes(masks[0]), u64::from_ne_bytes(masks[1])];
        Target { conditions: BY_COMM, comm: words(prefix), comm_mask, ..Target::default() }
    }

    #[test]
    fn a_name_matches_by_its_beginning() {
        for (prefix, comm, matches) in [
            ("nginx", "nginx", true),
            ("ngi", "nginx", true),
            ("nginx", "ngin", false),
            ("nginx", "xnginx", false),
            ("abcdefghij", "abcdefghijk", true),
            ("abcdefghij", "abcdefghiJ", false),
        ] {
            assert_eq!(by_comm(prefix).matches_process(1, words(comm)), matches, "{prefix} of {comm}");
        }
    }

    #[test]
    fn all_conditions_must_be_met() {
        let both = Target { conditions: BY_COMM | BY_PID, pid: 7, ..by_comm("a") };
        assert!(both.matches_process(7, words("ab")));
        assert!(!both.matches_process(8, words("ab")));
        assert!(!both.matches_process(7, words("b")));
        assert!(Target::default().matches_process(7, words("any")));
    }

    #[test]
    fn one_in_n_is_the_nearest_to_the_wanted_period() {
        let wants = |period_ns| Target { period_ns, ..Target::default() };
        assert_eq!(wants(0).one_in(10).get(), 1);
        assert_eq!(wants(5).one_in(10).get(), 1);
        assert_eq!(wants(24).one_in(10).get(), 2);
        assert_eq!(wants(25).one_in(10).get(), 3);
        assert_eq!(wants(100).one_in(0).get(), 1);
        assert_eq!(wants(u64::MAX / 2).one_in(1).get(), 1 << 16);
    }

    fn n(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).expect("not 0")
    }

    #[test]
    fn of_each_n_in_turn_one_is_kept() {
        let mut turn = Turn::default();
        for round in 0..100u32 {
            let kept =
                (0..7).filter(|at| turn.keeps_next(n(7), round.wrapping_mul(2_654_435_761) + at)).count();
            assert_eq!(kept, 1, "round {round}");
        }
        let mut kept = (0..30).map(|random| turn.keeps_next(n(3), random));
        assert_eq!(kept.by_ref().filter(|kept| *kept).count(), 10, "after a change of n");
        assert!((0..10).all(|random| turn.keeps_next(n(1), random)));
    }
}
