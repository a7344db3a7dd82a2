//! What profiling may take of the node, and the sampling frequency that keeps it there.
//!
//! ```text
//! each second   use of the CPU ─▶ term of 30 s ─▶ judged: halve, double or keep ─▶ a new term
//! ```
//! The frequency halves when the mean use of a whole term and that of its last third are both above the budget: a burst
//! that is over, such as the tables of all programs at the start, changes nothing. It doubles when what both
//! would come to then is below [`RESTORE_SHARE`] of the budget: twice as much at most, but for the work in the background,
//! which has its own allowance ([`crate::background`]).

use std::{
    fmt, iter,
    str::FromStr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use profiler_common::{limits::FREQUENCY_HZ_MIN, stats::Timed};

/// How long a frequency is kept before its use is judged.
pub(crate) const TERM: Duration = Duration::from_secs(30);
/// Share of the budget that a doubled frequency may come to: the rest keeps it from being halved again at once.
const RESTORE_SHARE: f64 = 0.8;

/// A share of the CPU time of all online CPUs, in millionths; above 0 and at most all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CpuShare(u32);

impl CpuShare {
    /// 1 %.
    pub(crate) const DEFAULT: Self = Self(10_000);

    /// The share, 1 for all CPUs.
    pub(crate) fn ratio(self) -> f64 {
        f64::from(self.0) / 1e6
    }
}

/// `1%`, `0.5%`: with a percent sign, at most four digits behind the point.
impl FromStr for CpuShare {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let number = text.strip_suffix('%').ok_or(())?;
        let (whole, behind) = number.split_once('.').unwrap_or((number, "0"));
        let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(whole) || !is_number(behind) || whole.len() > 3 || behind.len() > 4 {
            return Err(());
        }
        let number: u32 = format!("{whole}{behind:0<4}").parse().map_err(|_| ())?;
        if (1..=1_000_000).contains(&number) { Ok(Self(number)) } else { Err(()) }
    }
}

impl fmt::Display for CpuShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 1e4)
    }
}

/// CPU time taken, of the CPU time there was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Use {
    /// Taken, by the agent and by its programs in the kernel.
    pub(crate) taken: Duration,
    /// Of that, by work that has an allowance of its own, at every frequency.
    pub(crate) background: Duration,
    /// Of all online CPUs.
    pub(crate) available: Duration,
}

impl Use {
    /// Taken of what there was; 0 where there was none.
    pub(crate) fn ratio(self) -> f64 {
        self.share(self.taken)
    }

    /// What it would come to at twice the frequency, at most.
    fn ratio_if_doubled(self) -> f64 {
        self.share(2 * self.taken - self.background.min(self.taken))
    }

    fn share(self, time: Duration) -> f64 {
        if self.available.is_zero() {
            return 0.0;
        }
        time.as_secs_f64() / self.available.as_secs_f64()
    }

    fn add(&mut self, more: Self) {
        *self = [*self, more].into_iter().sum();
    }
}

impl iter::Sum for Use {
    fn sum<I: Iterator<Item = Self>>(uses: I) -> Self {
        uses.fold(Self::default(), |sum, more| Self {
            taken: sum.taken + more.taken,
            background: sum.background + more.background,
            available: sum.available + more.available,
        })
    }
}

/// Which way the frequency goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Halved: the use was above the budget.
    Down,
    /// Doubled, or back at what is wanted.
    Up,
}

/// A frequency to take from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) hz: u32,
    pub(crate) direction: Direction,
    /// What was judged.
    pub(crate) used: f64,
}

/// Chooses the frequency by the use. Knows no clock: it is told what was used in how much time.
#[derive(Debug)]
pub(crate) struct Governor {
    budget: Option<CpuShare>,
    wanted_hz: u32,
    hz: u32,
    term: Duration,
    /// Time into the term.
    elapsed: Duration,
    whole: Use,
    last_third: Use,
}

impl Governor {
    /// Begins at the wanted frequency. Without a budget it stays there.
    pub(crate) fn new(budget: Option<CpuShare>, wanted_hz: u32, term: Duration) -> Self {
        Self {
            budget,
            wanted_hz,
            hz: wanted_hz,
            term,
            elapsed: Duration::ZERO,
            whole: Use::default(),
            last_third: Use::default(),
        }
    }

    /// The frequency of now.
    pub(crate) fn hz(&self) -> u32 {
        self.hz
    }

    /// The frequency that the user wants.
    pub(crate) fn wanted_hz(&self) -> u32 {
        self.wanted_hz
    }

    /// The user wants another frequency: the budget is judged anew from there.
    pub(crate) fn want(&mut self, hz: u32) {
        (self.wanted_hz, self.hz) = (hz, hz);
        self.begin_term();
    }

    /// Takes what was used since the last call, and says what follows from it.
    pub(crate) fn observe(&mut self, used: Use, elapsed: Duration) -> Option<Step> {
        self.elapsed += elapsed;
        self.whole.add(used);
        if self.elapsed > self.term * 2 / 3 {
            self.last_third.add(used);
        }
        if self.elapsed < self.term {
            return None;
        }
        let step = self.judge();
        self.hz = step.map_or(self.hz, |step| step.hz);
        self.begin_term();
        step
    }

    fn judge(&self) -> Option<Step> {
        let budget = self.budget?.ratio();
        let (whole, last) = (self.whole.ratio(), self.last_third.ratio());
        let least = whole.min(last);
        let most_if_doubled = self.whole.ratio_if_doubled().max(self.last_third.ratio_if_doubled());
        let halved = (self.hz / 2).max(FREQUENCY_HZ_MIN);
        let doubled = self.hz.saturating_mul(2).min(self.wanted_hz);
        if least > budget && halved < self.hz {
            Some(Step { hz: halved, direction: Direction::Down, used: whole })
        } else if most_if_doubled < RESTORE_SHARE * budget && doubled > self.hz {
            Some(Step { hz: doubled, direction: Direction::Up, used: whole })
        } else {
            None
        }
    }

    fn begin_term(&mut self) {
        (self.elapsed, self.whole, self.last_third) = (Duration::ZERO, Use::default(), Use::default());
    }
}

/// Time of programs in the kernel, from the measured ones among their runs.
#[derive(Debug, Default)]
pub(crate) struct BpfTime {
    runs: u64,
    timed: u64,
    timed_ns: u64,
    ns_per_run: f64,
    total: Duration,
}

impl BpfTime {
    /// Measured runs that make a mean: at 19 Hz and 2 CPUs, those of 14 s.
    const TIMED_MIN: u64 = 8;

    /// Takes the counters of now, all since load. Until enough runs were measured, others take what earlier ones did.
    pub(crate) fn update(&mut self, runs: u64, timed: u64, timed_ns: u64) {
        let new = timed.saturating_sub(self.timed);
        let is_first = self.ns_per_run == 0.0 && new > 0;
        if new >= Self::TIMED_MIN || is_first {
            self.ns_per_run = timed_ns.saturating_sub(self.timed_ns) as f64 / new as f64;
            (self.timed, self.timed_ns) = (timed, timed_ns);
        }
        let others = runs.saturating_sub(self.runs);
        self.runs = runs;
        self.total += Duration::from_secs_f64(others as f64 * self.ns_per_run / 1e9);
    }

    /// Since load, estimated.
    pub(crate) fn total(&self) -> Duration {
        self.total
    }
}

/// The state of sampling, for those who look at it.
#[derive(Debug, Default)]
pub(crate) struct Sampling {
    hz: AtomicU32,
    wanted_hz: AtomicU32,
    budget_millionths: AtomicU32,
    used_billionths: AtomicU64,
    /// As `Timed::ALL`.
    bpf_ns: [AtomicU64; Timed::ALL.len()],
    backend_ns: AtomicU64,
    halved: AtomicU64,
    doubled: AtomicU64,
}

impl Sampling {
    /// The frequency of now, and the one that the user wants.
    pub(crate) fn set_hz(&self, hz: u32, wanted_hz: u32) {
        self.hz.store(hz, Relaxed);
        self.wanted_hz.store(wanted_hz, Relaxed);
    }

    /// `None` for no budget.
    pub(crate) fn set_budget(&self, budget: Option<CpuShare>) {
        self.budget_millionths.store(budget.map_or(0, |CpuShare(millionths)| millionths), Relaxed);
    }

    /// Share of the node's CPU time that was used of late.
    pub(crate) fn set_used(&self, ratio: f64) {
        self.used_billionths.store((ratio * 1e9) as u64, Relaxed);
    }

    /// CPU time since the start: of the programs in the kernel, and of the embedded backend.
    pub(crate) fn set_times(&self, bpf: [Duration; Timed::ALL.len()], backend: Duration) {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        for (kept, time) in self.bpf_ns.iter().zip(bpf) {
            kept.store(ns(time), Relaxed);
        }
        self.backend_ns.store(ns(backend), Relaxed);
    }

    /// The budget has changed the frequency.
    pub(crate) fn count(&self, direction: Direction) {
        let count = match direction {
            Direction::Down => &self.halved,
            Direction::Up => &self.doubled,
        };
        count.fetch_add(1, Relaxed);
    }

    /// Samples per second and CPU, of now.
    pub(crate) fn hz(&self) -> u32 {
        self.hz.load(Relaxed)
    }

    /// `None` for no budget.
    pub(crate) fn budget(&self) -> Option<CpuShare> {
        Some(self.budget_millionths.load(Relaxed)).filter(|&millionths| millionths > 0).map(CpuShare)
    }

    /// Share of the node's CPU time that was used of late.
    pub(crate) fn used(&self) -> f64 {
        self.used_billionths.load(Relaxed) as f64 / 1e9
    }

    /// CPU time of the programs in the kernel since the start, by what they do.
    pub(crate) fn bpf_times(&self) -> impl Iterator<Item = (Timed, Duration)> {
        let times = self.bpf_ns.iter().map(|ns| Duration::from_nanos(ns.load(Relaxed)));
        Timed::ALL.into_iter().zip(times)
    }

    /// CPU time of the embedded backend since the start.
    pub(crate) fn backend_time(&self) -> Duration {
        Duration::from_nanos(self.backend_ns.load(Relaxed))
    }

    /// How often the budget has changed the frequency, by direction.
    pub(crate) fn changes(&self) -> [(&'static str, u64); 2] {
        [("down", self.halved.load(Relaxed)), ("up", self.doubled.load(Relaxed))]
    }
}

/// `9 Hz of 19 Hz per CPU; 0.312% of the node's CPU used of late, budget 0.25%`
impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.used() * 100.0;
        write!(f, "{} Hz of {} Hz per CPU; ", self.hz(), self.wanted_hz.load(Relaxed))?;
        write!(f, "{used:.3}% of the node's CPU used of late, ")?;
        match self.budget() {
            None => write!(f, "no budget"),
            Some(budget) => write!(f, "budget {budget}"),
        }?;
        match self.budget().is_some_and(|budget| self.used() > budget.ratio())
            && self.hz() == FREQUENCY_HZ_MIN
        {
            true => write!(f, ", which the lowest frequency exceeds"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn share(text: &str) -> Option<CpuShare> {
        Some(text.parse().expect("a share"))
    }

    /// Runs a governor for so long over a use that depends on the frequency and the second; gives the frequency of
    /// each second.
    fn run(governor: &mut Governor, seconds: u32, used: impl Fn(u32, u32) -> f64) -> Vec<u32> {
        let frequencies = (0..seconds).map(|second| {
            let used = Use {
                taken: S.mul_f64(2.0 * used(governor.hz(), second)),
                background: Duration::ZERO,
                available: 2 * S,
            };
            governor.observe(used, S);
            governor.hz()
        });
        frequencies.collect()
    }

    #[test]
    fn shares_are_read_as_written() {
        for (text, ratio) in
            [("1%", 0.01), ("0.5%", 0.005), ("0.02%", 0.0002), ("100%", 1.0), ("0.0001%", 1e-6)]
        {
            let share: CpuShare = text.parse().expect(text);
            assert!((share.ratio() - ratio).abs() < 1e-12, "{text}");
            assert_eq!(share.to_string(), text);
        }
        for text in
            ["", "%", "1", "0%", "0.0%", "101%", "100.1%", "-1%", "1.%", ".5%", "1e1%", "0.00001%", "+1%"]
        {
            assert_eq!(text.parse::<CpuShare>(), Err(()), "{text}");
        }
    }

    #[test]
    fn a_use_of_ten_times_the_budget_ends_below_it() {
        let budget = share("0.5%");
        let mut governor = Governor::new(budget, 1000, TERM);
        let frequencies = run(&mut governor, 600, |hz, _| 0.05 * f64::from(hz) / 1000.0);
        assert_eq!(frequencies[28], 1000, "not before its term");
        assert_eq!(frequencies[29], 500);
        assert_eq!(frequencies[149], 62, "after four more terms");
        assert!(frequencies[150..].iter().all(|&hz| hz == 62), "and there it stays");
    }

    #[test]
    fn it_stops_at_one_sample_a_second() {
        let mut governor = Governor::new(share("0.02%"), 19, TERM);
        let frequencies = run(&mut governor, 600, |_, _| 0.01);
        let steps: Vec<_> = frequencies.chunk_by(|a, b| a == b).map(|same| same[0]).collect();
        assert_eq!(steps, [19, 9, 4, 2, 1]);
    }

    #[test]
    fn it_is_restored_when_the_load_is_gone_and_not_beyond_what_is_wanted() {
        let mut governor = Governor::new(share("1%"), 19, TERM);
        let frequencies = run(&mut governor, 400, |_, second| if second < 120 { 0.05 } else { 0.001 });
        let steps: Vec<_> = frequencies.chunk_by(|a, b| a == b).map(|same| same[0]).collect();
        assert_eq!(steps, [19, 9, 4, 2, 1, 2, 4, 8, 16, 19]);
    }

    #[test]
    fn it_does_not_swing() {
        for per_hz in [0.0005, 0.0006, 0.0011, 0.0013, 0.0026] {
            let mut governor = Governor::new(share("1%"), 19, TERM);
            let noise = |second: u32| if second.is_multiple_of(2) { 1.1 } else { 0.9 };
            let frequencies = run(&mut governor, 3600, |hz, second| per_hz * f64::from(hz) * noise(second));
            let changes = frequencies.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(changes <= 3, "{per_hz}: {changes} changes");
        }
    }

    #[test]
    fn a_burst_that_is_over_changes_nothing() {
        let mut governor = Governor::new(share("1%"), 19, TERM);
        let frequencies = run(&mut governor, 60, |_, second| if second < 3 { 0.5 } else { 0.002 });
        assert!(frequencies.iter().all(|&hz| hz == 19), "{frequencies:?}");
    }

    #[test]
    fn work_in_the_background_is_not_thought_to_double() {
        let mut governor = Governor::new(share("1%"), 19, TERM);
        let observe = |governor: &mut Governor, taken_ms: u32, background_ms: u32| {
            let ms = Duration::from_millis(1);
            let used = Use { taken: taken_ms * ms, background: background_ms * ms, available: 2 * S };
            (0..30).filter_map(|_| governor.observe(used, S)).map(|step| step.hz).last()
        };
        assert_eq!(observe(&mut governor, 30, 10), Some(9), "all of it counts");
        assert_eq!(observe(&mut governor, 12, 8), None, "8 + 2 * 4 are all that may be");
        assert_eq!(observe(&mut governor, 11, 8), Some(18), "8 + 2 * 3 are less");
    }

    #[test]
    fn without_a_budget_nothing_changes() {
        let mut governor = Governor::new(None, 19, TERM);
        assert!(run(&mut governor, 300, |_, _| 1.0).iter().all(|&hz| hz == 19));
    }

    #[test]
    fn another_wanted_frequency_is_taken_at_once() {
        let mut governor = Governor::new(share("1%"), 19, TERM);
        run(&mut governor, 40, |_, _| 0.05);
        assert_eq!(governor.hz(), 9);
        governor.want(49);
        assert_eq!(governor.hz(), 49);
        assert_eq!(run(&mut governor, 30, |_, _| 0.05).last(), Some(&24));
    }

    #[test]
    fn the_time_of_all_samples_follows_from_the_measured_ones() {
        let mut time = BpfTime::default();
        time.update(640, 10, 100_000);
        assert_eq!(time.total(), Duration::from_micros(6400));
        time.update(1280, 20, 300_000);
        assert_eq!(time.total(), Duration::from_micros(6400 + 12_800), "these were slower");
        time.update(1344, 21, 900_000);
        assert_eq!(time.total(), Duration::from_micros(6400 + 12_800 + 1280), "one run is no mean");
    }

    #[test]
    fn the_line_of_the_status_says_when_nothing_helps() {
        let sampling = Sampling::default();
        sampling.set_hz(9, 19);
        sampling.set_used(0.00312);
        assert_eq!(
            sampling.to_string(),
            "9 Hz of 19 Hz per CPU; 0.312% of the node's CPU used of late, no budget"
        );
        sampling.set_budget(share("0.25%"));
        sampling.set_hz(1, 19);
        let line = sampling.to_string();
        assert!(line.ends_with("budget 0.25%, which the lowest frequency exceeds"), "{line}");
    }
}
