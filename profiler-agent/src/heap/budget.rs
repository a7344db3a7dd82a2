//! What probing the heap of one process may cost, and what is done when it costs more. Pure: told of times and costs.
//!
//! ```text
//! whole ──▶ too dear ──▶ gap ──▶ window ──▶ gap ──▶ window ──▶ cheap enough ──▶ whole
//! ```
//! Above the budget, allocations are sampled in windows of a second at random times. Each sample of a window stands for the
//! gap before it as well: the sum over all windows of time times scale is the time that has passed, so that sums are right
//! in the long run for whatever the process does by itself. One that has no idle time does less while it is probed.
//!
//! Frees stay probed in the gaps while they take no more than half of the budget: then what is in use is known all the
//! time, and a sample of a window stands for as many in use as were made. Above that, what is in use is given up.

use std::{collections::VecDeque, fmt, str::FromStr};

use crate::budget::CpuShare;

/// How long samples are taken at a time. Probes take 50 to 150 ms to get in and out.
pub(super) const WINDOW_NS: u64 = NS;
/// Bounds of the time between two windows. The upper one keeps the scale below 2^16; at it, the budget of 1 % holds for
/// windows that take 430 seconds of CPU time.
const GAP_MIN_SECONDS: f64 = 1.0;
const GAP_MAX_SECONDS: f64 = 12.0 * 3600.0;
/// What may be saved up for a burst, in seconds of the whole budget.
const SAVED_SECONDS: f64 = 10.0;
/// Below this share of the budget, probes stay in again.
const CHEAP: f64 = 0.8;
/// Share of the budget that frees may take while allocations are sampled in windows.
const FREES: f64 = 0.5;
/// How far back the use of now is measured.
const RECENT_NS: u64 = NS;
/// The shortest time between two readings where what is saved up may soon be spent.
const LOOK_MIN_SECONDS: f64 = 0.01;

const NS: u64 = 1_000_000_000;

/// What the probes of one process may take: a share of one CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// That much.
    Share(CpuShare),
    /// Whatever it is.
    Off,
}

impl Budget {
    /// 1 % of one CPU.
    pub(crate) const DEFAULT: Self = Self::Share(CpuShare::DEFAULT);

    fn cpus(self) -> Option<f64> {
        match self {
            Self::Share(share) => Some(share.ratio()),
            Self::Off => None,
        }
    }
}

/// `1%`, `off`.
impl FromStr for Budget {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "off" { Ok(Self::Off) } else { text.parse().map(Self::Share) }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Share(share) => share.fmt(f),
            Self::Off => f.write_str("off"),
        }
    }
}

/// CPU time that probes took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spent {
    /// Those of functions that allocate, and samples.
    pub(super) allocs: f64,
    /// Those of functions that free.
    pub(super) frees: f64,
}

impl Spent {
    pub(super) fn total(self) -> f64 {
        self.allocs + self.frees
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Take no samples from now on, and take the probes out that cost too much.
    Close,
    /// Probe allocations for a window; [`Governor::opened`] wants to be told when it is.
    Open,
    /// Probe everything from now on.
    OpenForGood,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Whole,
    Gap { until_ns: u64 },
    Window { end_ns: u64 },
}

/// Keeps one process to its budget.
#[derive(Debug)]
pub(super) struct Governor {
    budget: Budget,
    /// CPU time that may be spent now, in seconds. Below 0 it has been spent ahead of its time.
    balance: f64,
    at_ns: u64,
    phase: Phase,
    /// Whether frees are probed in gaps.
    keeps_frees: bool,
    /// The end of the last time in which samples were taken.
    sampled_until_ns: u64,
    /// Time and use of the last readings.
    recent: VecDeque<(u64, Spent)>,
}

impl Governor {
    /// Of a process whose probes have just gone in.
    pub(super) fn new(budget: Budget, now_ns: u64) -> Self {
        Self {
            budget,
            balance: budget.cpus().unwrap_or(0.0) * SAVED_SECONDS,
            at_ns: now_ns,
            phase: Phase::Whole,
            keeps_frees: true,
            sampled_until_ns: now_ns,
            recent: VecDeque::new(),
        }
    }

    pub(super) fn budget(&self) -> Budget {
        self.budget
    }

    /// Judges by another budget from now on.
    pub(super) fn set_budget(&mut self, budget: Budget) {
        if self.budget == Budget::Off {
            self.balance = 0.0;
        }
        self.budget = budget;
    }

    /// Whether allocations are sampled in windows.
    pub(super) fn is_limited(&self) -> bool {
        self.phase != Phase::Whole
    }

    /// Whether frees stay probed when samples are not taken.
    pub(super) fn keeps_frees(&self) -> bool {
        self.keeps_frees
    }

    /// When it wants to be asked again, at the latest.
    pub(super) fn next_ns(&self) -> Option<u64> {
        match self.phase {
            Phase::Whole => self.budget.cpus().map(|_| self.at_ns + self.until_spent_ns()),
            Phase::Gap { until_ns: at_ns } | Phase::Window { end_ns: at_ns } => Some(at_ns),
        }
    }

    /// Takes in what was spent since the last call. `random` is from 0 to 1.
    pub(super) fn observe(&mut self, now_ns: u64, spent: Spent, random: f64) -> Option<Step> {
        let elapsed_ns = now_ns.saturating_sub(self.at_ns);
        self.at_ns = now_ns;
        self.remember(elapsed_ns, spent);
        let Some(share) = self.budget.cpus() else {
            return self.is_limited().then(|| self.open_for_good());
        };
        let earned = share * seconds(elapsed_ns);
        self.balance = (self.balance + earned - spent.total()).min(share * SAVED_SECONDS);
        match self.phase {
            Phase::Whole if self.balance < 0.0 => Some(self.close(now_ns, share, random)),
            Phase::Window { end_ns } if now_ns >= end_ns => Some(if self.is_cheap(share) {
                self.open_for_good()
            } else {
                self.close(now_ns, share, random)
            }),
            Phase::Gap { until_ns } if now_ns >= until_ns => Some(Step::Open),
            Phase::Gap { .. } if self.keeps_frees && self.frees_are_dear(share) => {
                Some(self.close(now_ns, share, random))
            }
            Phase::Whole | Phase::Window { .. } | Phase::Gap { .. } => None,
        }
    }

    /// Samples are taken from `begin_ns` to `end_ns`. Gives what one of them stands for.
    pub(super) fn opened(&mut self, begin_ns: u64, end_ns: u64) -> f64 {
        let stands_for = end_ns.saturating_sub(self.sampled_until_ns);
        self.sampled_until_ns = end_ns;
        self.phase = Phase::Window { end_ns };
        self.recent.clear();
        stands_for as f64 / end_ns.saturating_sub(begin_ns).max(1) as f64
    }

    fn open_for_good(&mut self) -> Step {
        self.phase = Phase::Whole;
        self.keeps_frees = true;
        self.recent.clear();
        Step::OpenForGood
    }

    fn close(&mut self, now_ns: u64, share: f64, random: f64) -> Step {
        if self.phase == Phase::Whole {
            self.sampled_until_ns = now_ns;
        }
        let Spent { allocs, frees } = self.rates();
        self.keeps_frees &= frees < share * FREES;
        let frees = if self.keeps_frees { frees } else { 0.0 };
        // In a gap, what a window takes is what the last one took; no more is known.
        let window = seconds(WINDOW_NS);
        let gap = ((allocs + frees) * window - self.balance) / (share - frees) - window;
        let gap = gap.clamp(GAP_MIN_SECONDS, GAP_MAX_SECONDS) * (0.5 + random);
        self.phase = Phase::Gap { until_ns: now_ns.saturating_add((gap * NS as f64) as u64) };
        self.recent.clear();
        Step::Close
    }

    /// Whether what a window has shown would keep to the budget all the time.
    fn is_cheap(&self, share: f64) -> bool {
        let Spent { allocs, frees } = self.rates();
        // What is allocated is freed, about as often.
        let frees = if self.keeps_frees { frees } else { allocs };
        self.balance > 0.0 && allocs + frees < share * CHEAP
    }

    /// The time in which no more is spent than is saved up: at twice what the probes take of late, or at a whole CPU where
    /// that is not known yet.
    fn until_spent_ns(&self) -> u64 {
        let cpus = if self.measured_ns() >= RECENT_NS { 2.0 * self.rates().total() } else { 1.0 };
        let seconds = (self.balance / cpus.max(f64::MIN_POSITIVE)).clamp(LOOK_MIN_SECONDS, SAVED_SECONDS);
        (seconds * NS as f64) as u64
    }

    fn measured_ns(&self) -> u64 {
        self.recent.iter().map(|(ns, _)| ns).sum()
    }

    fn frees_are_dear(&self, share: f64) -> bool {
        self.measured_ns() >= RECENT_NS && self.rates().frees >= share * FREES
    }

    fn remember(&mut self, elapsed_ns: u64, spent: Spent) {
        self.recent.push_back((elapsed_ns, spent));
        let mut all_ns: u64 = self.recent.iter().map(|(ns, _)| ns).sum();
        while let Some((oldest_ns, _)) = self.recent.front()
            && all_ns - oldest_ns >= RECENT_NS
        {
            all_ns -= oldest_ns;
            self.recent.pop_front();
        }
    }

    /// What is taken now, in seconds of CPU time a second.
    fn rates(&self) -> Spent {
        let ns = self.measured_ns();
        let rate = |of: fn(&Spent) -> f64| {
            self.recent.iter().map(|(_, spent)| of(spent)).sum::<f64>() / seconds(ns.max(1))
        };
        Spent { allocs: rate(|spent| spent.allocs), frees: rate(|spent| spent.frees) }
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / NS as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK_NS: u64 = NS / 4;
    /// Time that probes take to get in.
    const ATTACH_NS: u64 = NS / 10;

    /// A process that takes so much of a CPU while its allocations and its frees are probed.
    struct Simulated {
        governor: Governor,
        now_ns: u64,
        began_ns: u64,
        spent: f64,
        windows: u32,
        /// Time in which samples were taken, each times its scale, in seconds.
        stood_for: f64,
        allocs_probed: bool,
        frees_probed: bool,
        random: u64,
    }

    impl Simulated {
        fn new(budget: &str) -> Self {
            let now_ns = 1000 * NS;
            let governor = Governor::new(budget.parse().expect("a budget"), now_ns);
            Self {
                governor,
                now_ns,
                began_ns: now_ns,
                spent: 0.0,
                windows: 0,
                stood_for: 0.0,
                allocs_probed: true,
                frees_probed: true,
                random: 1,
            }
        }

        fn random(&mut self) -> f64 {
            // Source: Vigna, xorshift64*.
            self.random ^= self.random >> 12;
            self.random ^= self.random << 25;
            self.random ^= self.random >> 27;
            (self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
        }

        /// Goes on for so many seconds; gives the seconds that samples stood for.
        fn run(&mut self, seconds_long: u64, (allocs, frees): (f64, f64)) -> f64 {
            let (end, before) = (self.now_ns + seconds_long * NS, self.stood_for);
            while self.now_ns < end {
                let next = self.governor.next_ns().unwrap_or(u64::MAX).max(self.now_ns + 1);
                let elapsed = (next - self.now_ns).min(TICK_NS);
                self.pass(elapsed, (allocs, frees));
            }
            self.stood_for - before
        }

        fn pass(&mut self, elapsed: u64, (allocs, frees): (f64, f64)) {
            self.now_ns += elapsed;
            let spent = Spent {
                allocs: if self.allocs_probed { allocs * seconds(elapsed) } else { 0.0 },
                frees: if self.frees_probed { frees * seconds(elapsed) } else { 0.0 },
            };
            self.spent += spent.total();
            if !self.governor.is_limited() {
                self.stood_for += seconds(elapsed);
            }
            let random = self.random();
            match self.governor.observe(self.now_ns, spent, random) {
                None => {}
                Some(Step::Close) => {
                    self.allocs_probed = false;
                    self.frees_probed = self.governor.keeps_frees();
                }
                Some(Step::Open) => {
                    self.allocs_probed = true;
                    let (begin, end) = (self.now_ns + ATTACH_NS, self.now_ns + ATTACH_NS + WINDOW_NS);
                    self.windows += 1;
                    self.stood_for += self.governor.opened(begin, end) * seconds(end - begin);
                }
                Some(Step::OpenForGood) => (self.allocs_probed, self.frees_probed) = (true, true),
            }
        }

        fn share(&self) -> f64 {
            self.spent / seconds(self.now_ns - self.began_ns)
        }
    }

    #[test]
    fn what_costs_little_is_probed_all_the_time() {
        let mut process = Simulated::new("1%");
        assert!((process.run(600, (0.004, 0.003)) - 600.0).abs() < 1.0);
        assert_eq!((process.windows, process.frees_probed), (0, true));
    }

    #[test]
    fn what_costs_too_much_is_probed_in_windows_that_keep_to_the_budget() {
        for (allocs, frees) in [(0.3, 0.002), (0.5, 0.4), (8.0, 8.0)] {
            let mut process = Simulated::new("1%");
            let stood_for = process.run(40_000, (allocs, frees));
            assert!(process.share() < 0.0115, "{allocs} {frees}: {}", process.share());
            assert!(process.windows > 20, "{allocs} {frees}: {}", process.windows);
            // All but the last gap.
            assert!((stood_for / 40_000.0 - 1.0).abs() < 0.05, "{stood_for}");
        }
    }

    #[test]
    fn frees_stay_probed_while_they_leave_room_for_windows() {
        let mut process = Simulated::new("1%");
        process.run(100, (0.3, 0.002));
        assert!(process.frees_probed && process.governor.is_limited());
        process.run(300, (0.3, 0.02));
        assert!(!process.frees_probed, "frees alone take twice the budget");
        assert!(process.share() < 0.013, "{}", process.share());
    }

    #[test]
    fn a_process_that_has_become_quiet_is_probed_all_the_time_again() {
        let mut process = Simulated::new("10%");
        process.run(60, (0.4, 0.3));
        assert!(process.governor.is_limited() && !process.governor.keeps_frees());
        process.run(120, (0.01, 0.01));
        assert!(!process.governor.is_limited() && process.frees_probed);
    }

    #[test]
    fn what_is_saved_up_at_the_start_is_hardly_exceeded() {
        // A hundredth of a CPU for ten seconds; and ten milliseconds until the next look.
        for cpus in [0.3, 0.9] {
            let mut process = Simulated::new("1%");
            process.run(2, (cpus / 2.0, cpus / 2.0));
            assert!(process.governor.is_limited());
            assert!(process.spent < 0.1 + 0.03, "{cpus}: {}", process.spent);
        }
    }

    #[test]
    fn a_short_burst_is_let_pass() {
        let mut process = Simulated::new("5%");
        process.run(60, (0.01, 0.01));
        process.run(1, (0.2, 0.15));
        process.run(60, (0.01, 0.01));
        assert_eq!(process.windows, 0);
    }

    #[test]
    fn without_a_budget_there_are_no_gaps_and_one_that_is_lifted_ends_them() {
        let mut process = Simulated::new("off");
        process.run(60, (0.9, 0.9));
        assert!(!process.governor.is_limited());
        process.governor.set_budget("1%".parse().expect("a budget"));
        process.run(10, (0.9, 0.9));
        assert!(process.governor.is_limited());
        process.governor.set_budget(Budget::Off);
        process.run(1, (0.9, 0.9));
        assert!(!process.governor.is_limited() && process.allocs_probed);
    }

    #[test]
    fn budgets_are_shares_of_one_cpu_or_off() {
        for text in ["1%", "0.5%", "100%", "off"] {
            assert_eq!(text.parse::<Budget>().map(|budget| budget.to_string()), Ok(text.to_owned()));
        }
        for wrong in ["", "1", "0%", "101%", "no"] {
            assert_eq!(wrong.parse::<Budget>(), Err(()), "{wrong}");
        }
    }
}
