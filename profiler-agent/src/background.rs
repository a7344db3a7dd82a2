//! What work may take of the CPU that does not follow the sampling frequency: making unwind tables, finding names, reading
//! processes ahead of their first sample. On a host that starts programs all the time it is most of what profiling costs, and
//! no lower frequency makes it cheaper.
//!
//! ```text
//! CPU budget ─ shares ─▶ a bucket of CPU time for each task ─▶ below zero: its work waits
//! ```
//! Work is paid for when it is done, by the clock of the thread that did it: the longest piece (the tables of one process,
//! 64 addresses of one file) is what a bucket may owe. What waits is not lost: stacks of processes without tables are walked
//! by frame pointers, and frames without names leave as addresses, until its turn has come.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::sys::usage;

/// CPU time that each task has at the start, on top of its share: nothing is known yet of what runs. What is left of it
/// after a term is taken back.
const AT_START: Duration = Duration::from_secs(5);

/// Who waits looks again after this long: the budget may have changed.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Work with an allowance of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Unwind tables of programs, and the mappings of processes for the kernel side.
    Tables,
    /// Names of addresses.
    Names,
    /// Processes with a new image, read before their first sample.
    Processes,
}

impl Task {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Tables, Self::Names, Self::Processes];

    /// The task as a metric's label value.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Tables => "tables",
            Self::Names => "names",
            Self::Processes => "processes",
        }
    }

    /// Its part of the CPU budget. Together they leave three eighths to sampling.
    fn share(self) -> f64 {
        match self {
            Self::Tables | Self::Names => 0.25,
            Self::Processes => 0.125,
        }
    }
}

/// CPU time that may be taken, in seconds.
#[derive(Debug)]
struct Bucket {
    /// Seconds that come in a second; `None` for no limit.
    rate: Option<f64>,
    /// Below zero: owed.
    left_s: f64,
    /// What is saved at most is what comes in so long.
    term: Duration,
    began: Instant,
    filled: Instant,
}

impl Bucket {
    fn new(term: Duration, now: Instant) -> Self {
        Self { rate: None, left_s: AT_START.as_secs_f64(), term, began: now, filled: now }
    }

    fn set_rate(&mut self, rate: Option<f64>, now: Instant) {
        self.fill(now);
        if rate.is_none() {
            // Without a limit nothing is owed.
            self.left_s = self.left_s.max(0.0);
        }
        self.rate = rate;
    }

    /// What is not taken within a term is not saved for later: a term then takes two terms' worth at most.
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        let Some(rate) = self.rate else { return };
        let of_a_term = rate * self.term.as_secs_f64();
        let is_start = now.saturating_duration_since(self.began) < self.term;
        let most = if is_start { of_a_term.max(AT_START.as_secs_f64()) } else { of_a_term };
        self.left_s = (self.left_s + rate * elapsed).min(most);
    }

    fn take(&mut self, time: Duration) {
        if self.rate.is_some() {
            self.left_s -= time.as_secs_f64();
        }
    }

    /// How long nothing may be done; `None` when something may.
    fn wait(&self) -> Option<Duration> {
        let rate = self.rate?;
        let wait = (self.left_s < 0.0).then(|| -self.left_s / rate)?;
        let wait = Duration::try_from_secs_f64(wait).unwrap_or(WAIT_MAX);
        Some(wait.clamp(Duration::from_millis(1), WAIT_MAX))
    }
}

/// The allowances of all tasks.
#[derive(Debug)]
pub(crate) struct Background {
    accounts: [Account; Task::ALL.len()],
}

#[derive(Debug)]
struct Account {
    bucket: Mutex<Bucket>,
    taken_ns: AtomicU64,
    waits: AtomicU64,
    waited_ns: AtomicU64,
}

/// What became of a task's work since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Waits {
    /// Times that work had to wait.
    pub(crate) count: u64,
    /// How long it waited, of all threads that do it.
    pub(crate) time: Duration,
}

impl Background {
    /// Nobody is limited until [`Self::allow`] says so. A term is what the budget is judged by.
    pub(crate) fn new(term: Duration, now: Instant) -> Self {
        let account = |_| Account {
            bucket: Mutex::new(Bucket::new(term, now)),
            taken_ns: AtomicU64::default(),
            waits: AtomicU64::default(),
            waited_ns: AtomicU64::default(),
        };
        Self { accounts: Task::ALL.map(account) }
    }

    /// Divides a budget, in seconds of CPU time a second; `None` lifts the limits.
    pub(crate) fn allow(&self, budget: Option<f64>, now: Instant) {
        for task in Task::ALL {
            self.account(task).bucket().set_rate(budget.map(|budget| budget * task.share()), now);
        }
    }

    /// CPU time that all tasks have taken since the start.
    pub(crate) fn taken(&self) -> Duration {
        Duration::from_nanos(self.accounts.iter().map(|account| account.taken_ns.load(Relaxed)).sum())
    }

    /// How often and how long each task's work had to wait.
    pub(crate) fn waits(&self) -> impl Iterator<Item = (Task, Waits)> {
        Task::ALL.into_iter().zip(&self.accounts).map(|(task, account)| {
            let time = Duration::from_nanos(account.waited_ns.load(Relaxed));
            (task, Waits { count: account.waits.load(Relaxed), time })
        })
    }

    fn account(&self, task: Task) -> &Account {
        &self.accounts[task as usize]
    }
}

impl Account {
    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread's part in a task: its clock, and whether it waits. Belongs to the thread that does the work.
#[derive(Debug)]
pub(crate) struct Payer {
    background: Arc<Background>,
    task: Task,
    /// Reading of the thread's clock up to which its time is paid, or was none of the task's; `None` before the first.
    paid: Option<Duration>,
    waits_since: Option<Instant>,
}

impl Payer {
    /// Pays for nothing yet: the thread may not have been started.
    pub(crate) fn new(background: &Arc<Background>, task: Task) -> Self {
        Self { background: Arc::clone(background), task, paid: None, waits_since: None }
    }

    /// What the thread did until now is not the task's.
    pub(crate) fn begin(&mut self) {
        self.paid = Some(usage::thread_cpu_time());
    }

    /// Pays for what the thread did since it has paid or begun.
    pub(crate) fn pay(&mut self) {
        let now = usage::thread_cpu_time();
        let time = now.saturating_sub(self.paid.replace(now).unwrap_or(now));
        let account = self.background.account(self.task);
        account.taken_ns.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        account.bucket().take(time);
    }

    /// How long work that is there has to wait; `None` when it may be done now.
    pub(crate) fn wait(&mut self, now: Instant) -> Option<Duration> {
        let account = self.background.account(self.task);
        let wait = {
            let mut bucket = account.bucket();
            bucket.fill(now);
            bucket.wait()
        };
        let waited = self.waits_since.take();
        let time = waited.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        account.waited_ns.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        if wait.is_some() {
            account.waits.fetch_add(u64::from(waited.is_none()), Relaxed);
            self.waits_since = Some(now);
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::TERM;

    const S: Duration = Duration::from_secs(1);

    /// What is taken in each second by somebody who always has pieces of work of this length.
    fn taken(bucket: &mut Bucket, start: Instant, seconds: u32, piece: Duration) -> Vec<Duration> {
        let mut taken = vec![Duration::ZERO; seconds as usize];
        let mut now = start;
        while let Some(second) = taken.get_mut((now - start).as_secs() as usize) {
            bucket.fill(now);
            if let Some(wait) = bucket.wait() {
                now += wait;
                continue;
            }
            bucket.take(piece);
            *second += piece;
            now += piece;
        }
        taken
    }

    fn sum(times: &[Duration]) -> f64 {
        times.iter().sum::<Duration>().as_secs_f64()
    }

    #[test]
    fn work_without_end_takes_its_share_once_the_start_is_over() {
        let start = Instant::now();
        for (rate, piece_ms) in [(0.005, 1), (0.005, 150), (0.3, 20)] {
            let mut bucket = Bucket::new(TERM, start);
            bucket.set_rate(Some(rate), start);
            let taken = taken(&mut bucket, start, 1260, Duration::from_millis(piece_ms));
            let (at_start, later) = taken.split_at(60);
            assert!(sum(at_start) >= AT_START.as_secs_f64(), "{rate}: {}", sum(at_start));
            let mean = sum(later) / 1200.0;
            assert!((mean / rate - 1.0).abs() < 0.05, "{rate}: {mean}");
        }
    }

    #[test]
    fn what_was_not_taken_is_kept_for_one_term() {
        let start = Instant::now();
        let mut bucket = Bucket::new(TERM, start);
        bucket.set_rate(Some(0.01), start);
        let later = start + 10 * TERM;
        let taken = taken(&mut bucket, later, 30, Duration::from_millis(1));
        assert!((0.58..0.62).contains(&sum(&taken)), "a term saved, a term of now: {}", sum(&taken));
    }

    #[test]
    fn a_limit_that_is_lifted_leaves_nothing_owed() {
        let start = Instant::now();
        let mut bucket = Bucket::new(TERM, start);
        bucket.set_rate(Some(0.01), start);
        bucket.take(AT_START + S);
        assert_eq!(bucket.wait(), Some(WAIT_MAX));
        bucket.set_rate(None, start);
        bucket.take(100 * S);
        assert_eq!(bucket.wait(), None);
        bucket.set_rate(Some(0.01), start);
        assert_eq!(bucket.wait(), None);
    }

    #[test]
    fn each_task_owes_for_itself_and_its_waits_are_counted() {
        let now = Instant::now();
        let background = Arc::new(Background::new(TERM, now));
        background.allow(Some(0.02), now);
        let mut tables = Payer::new(&background, Task::Tables);
        let mut names = Payer::new(&background, Task::Names);
        assert_eq!(tables.wait(now), None);
        background.account(Task::Tables).bucket().take(AT_START + S);
        assert_eq!(tables.wait(now), Some(WAIT_MAX));
        assert_eq!(tables.wait(now + 2 * S), Some(WAIT_MAX));
        assert_eq!(names.wait(now), None);
        assert_eq!(tables.wait(now + 1000 * S), None);
        let waits: Vec<_> = background.waits().map(|(_, waits)| waits).collect();
        assert_eq!(waits, [Waits { count: 1, time: 1000 * S }, Waits::default(), Waits::default()]);
    }

    #[test]
    fn a_thread_pays_for_its_own_time() {
        let background = Arc::new(Background::new(TERM, Instant::now()));
        let mut payer = Payer::new(&background, Task::Names);
        payer.begin();
        let begun = usage::thread_cpu_time();
        while usage::thread_cpu_time() - begun < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        payer.pay();
        assert!(background.taken() >= Duration::from_millis(20), "{:?}", background.taken());
    }
}
