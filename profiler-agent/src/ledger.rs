//! The account of every sample: taken = delivered + waiting(place) + dropped(cause), in events.
//!
//! Each term is counted where the thing happens and none is computed from others, so that the equation can fail: it is
//! checked at exit, when nothing moves any more.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// Why events were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Kernel side: the ring buffer was full.
    RingFull,
    /// Kernel side: no scratch value on this CPU.
    NoScratch,
    /// Kernel side: more threads were inside allocator functions than are remembered. Only of allocations.
    PendingFull,
    /// The worker behind the channel was gone. While it lives, what the channel has no room for waits in the ring buffer.
    DrainQueueFull,
    /// A record that could not be decoded.
    Malformed,
    /// The window held as many different stacks as it may.
    WindowFull,
    /// Windows were closed faster than they could be encoded.
    EncodeQueueFull,
    /// A profile could not be encoded.
    EncodeFailed,
}

impl Cause {
    const COUNT: usize = 8;

    /// Every cause.
    pub(crate) const ALL: [Self; Self::COUNT] = [
        Self::RingFull,
        Self::NoScratch,
        Self::PendingFull,
        Self::DrainQueueFull,
        Self::Malformed,
        Self::WindowFull,
        Self::EncodeQueueFull,
        Self::EncodeFailed,
    ];

    /// The value of the metric label `reason`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RingFull => "ring_full",
            Self::NoScratch => "no_scratch",
            Self::PendingFull => "pending_full",
            Self::DrainQueueFull => "drain_queue_full",
            Self::Malformed => "malformed",
            Self::WindowFull => "window_full",
            Self::EncodeQueueFull => "encode_queue_full",
            Self::EncodeFailed => "encode_failed",
        }
    }
}

/// Where events wait inside the agent, before they belong to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Between drain and worker.
    DrainQueue,
    /// In an open window.
    Window,
    /// In a closed window that is being symbolized and encoded.
    EncodeQueue,
}

impl Place {
    const COUNT: usize = 3;

    /// Every place.
    pub(crate) const ALL: [Self; Self::COUNT] = [Self::DrainQueue, Self::Window, Self::EncodeQueue];

    /// The value of the metric label `place`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::DrainQueue => "drain_queue",
            Self::Window => "window",
            Self::EncodeQueue => "encode_queue",
        }
    }
}

/// What is profiled. Each has an account of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProfileType {
    /// On-CPU stacks.
    Cpu,
    /// Sampled allocations.
    Allocs,
    /// Sampled page faults.
    PageFaults,
}

impl ProfileType {
    /// Number of types.
    pub(crate) const COUNT: usize = 3;

    /// Every type.
    pub(crate) const ALL: [Self; Self::COUNT] = [Self::Cpu, Self::Allocs, Self::PageFaults];

    /// The value of the metric label `type`, and of a series' profile type.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Allocs => "allocs",
            Self::PageFaults => "page_faults",
        }
    }
}

/// Why a sample turned out to be none of its type after it was taken: as if it had not been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeftOut {
    /// A page fault of a file's page, or of memory that may be shared.
    FilePage,
    /// A page fault whose page was gone when it was looked at.
    PageGone,
}

impl LeftOut {
    const COUNT: usize = 2;

    /// Every reason.
    pub(crate) const ALL: [Self; Self::COUNT] = [Self::FilePage, Self::PageGone];

    /// The value of the metric label `reason`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::FilePage => "file_page",
            Self::PageGone => "page_gone",
        }
    }
}

/// Something of every profile type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PerType<T>([T; ProfileType::COUNT]);

impl<T> PerType<T> {
    /// That of one type.
    pub(crate) fn of(&self, profile_type: ProfileType) -> &T {
        &self.0[profile_type as usize]
    }

    /// That of one type.
    pub(crate) fn of_mut(&mut self, profile_type: ProfileType) -> &mut T {
        &mut self.0[profile_type as usize]
    }

    /// That of each type, made by a function.
    pub(crate) fn from_fn(make: impl FnMut(ProfileType) -> T) -> Self {
        Self(ProfileType::ALL.map(make))
    }
}

/// Counts of one agent, shared by its threads. Relaxed throughout: a reading while samples move is a little old, the one
/// at exit is exact since the threads have been joined.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    types: PerType<Account>,
    execs_lost_in_ring: AtomicU64,
    execs_lost_in_queue: AtomicU64,
    lives_lost_in_ring: AtomicU64,
    lives_lost_in_queue: AtomicU64,
    mappings_lost: AtomicU64,
}

/// Counts of one profile type.
#[derive(Debug, Default)]
pub(crate) struct Account {
    drained: AtomicU64,
    dropped: [AtomicU64; Cause::COUNT],
    waiting: [AtomicU64; Place::COUNT],
    left_out: [AtomicU64; LeftOut::COUNT],
}

impl Ledger {
    /// The account of one profile type.
    pub(crate) fn of(&self, profile_type: ProfileType) -> &Account {
        self.types.of(profile_type)
    }

    /// Fork and exit records that the drain had no room for.
    pub(crate) fn lose_lives(&self, records: u64) {
        self.lives_lost_in_queue.fetch_add(records, Relaxed);
    }

    /// Takes over the kernel side's count of fork and exit records that the ring buffer had no room for.
    pub(crate) fn set_lives_lost_in_ring(&self, records: u64) {
        self.lives_lost_in_ring.fetch_max(records, Relaxed);
    }

    /// Fork and exit records lost: children are read from `/proc`, and the dead found by looking for them.
    pub(crate) fn lives_lost(&self) -> u64 {
        self.lives_lost_in_ring.load(Relaxed) + self.lives_lost_in_queue.load(Relaxed)
    }

    /// Records of new mappings that a CPU's ring, or the drain, had no room for.
    pub(crate) fn lose_mappings(&self, records: u64) {
        self.mappings_lost.fetch_add(records, Relaxed);
    }

    /// Records of new mappings lost: what is known of processes may lack some.
    pub(crate) fn mappings_lost(&self) -> u64 {
        self.mappings_lost.load(Relaxed)
    }

    /// Exec records that the drain had no room for.
    pub(crate) fn lose_execs(&self, records: u64) {
        self.execs_lost_in_queue.fetch_add(records, Relaxed);
    }

    /// Takes over the kernel side's count of exec records that the ring buffer had no room for.
    pub(crate) fn set_execs_lost_in_ring(&self, records: u64) {
        self.execs_lost_in_ring.fetch_max(records, Relaxed);
    }

    /// Exec records lost: what was known of processes may be of an earlier image.
    pub(crate) fn execs_lost(&self) -> u64 {
        self.execs_lost_in_ring.load(Relaxed) + self.execs_lost_in_queue.load(Relaxed)
    }
}

impl Account {
    /// Samples the drain has taken from the ring buffer.
    pub(crate) fn add_drained(&self, events: u64) {
        self.drained.fetch_add(events, Relaxed);
    }

    /// Samples the drain has taken from the ring buffer.
    pub(crate) fn drained(&self) -> u64 {
        self.drained.load(Relaxed)
    }

    /// Events that are gone for good.
    pub(crate) fn drop_events(&self, cause: Cause, events: u64) {
        self.dropped[cause as usize].fetch_add(events, Relaxed);
    }

    /// Takes over a count that the kernel side keeps. Several threads read it; the newest reading is the largest.
    pub(crate) fn set_dropped(&self, cause: Cause, events: u64) {
        self.dropped[cause as usize].fetch_max(events, Relaxed);
    }

    /// Events have come to a place.
    pub(crate) fn enter(&self, place: Place, events: u64) {
        self.waiting[place as usize].fetch_add(events, Relaxed);
    }

    /// Events have left a place.
    pub(crate) fn leave(&self, place: Place, events: u64) {
        self.waiting[place as usize].fetch_sub(events, Relaxed);
    }

    /// An event is none of this type after all.
    pub(crate) fn leave_out(&self, reason: LeftOut) {
        self.left_out[reason as usize].fetch_add(1, Relaxed);
    }

    /// Events left out so far.
    pub(crate) fn left_out(&self, reason: LeftOut) -> u64 {
        self.left_out[reason as usize].load(Relaxed)
    }

    /// Events dropped so far.
    pub(crate) fn dropped(&self, cause: Cause) -> u64 {
        self.dropped[cause as usize].load(Relaxed)
    }

    /// Events waiting now.
    pub(crate) fn waiting(&self, place: Place) -> u64 {
        self.waiting[place as usize].load(Relaxed)
    }
}

/// Counted by the kernel side, of one profile type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KernelTotals {
    /// Samples taken.
    pub(crate) taken: u64,
    /// Samples written to the ring buffer.
    pub(crate) submitted: u64,
}

/// What one destination did with the events of one profile type it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DestinationTotals {
    /// Acknowledged.
    pub(crate) delivered: u64,
    /// In its queue.
    pub(crate) waiting: u64,
    /// Its queue was full, so the oldest batch went.
    pub(crate) dropped_queue_full: u64,
    /// It refused them for good.
    pub(crate) dropped_refused: u64,
    /// The agent stopped before it answered.
    pub(crate) dropped_shutdown: u64,
}

impl DestinationTotals {
    /// What this destination dropped, by cause; those with none too.
    pub(crate) fn dropped(self) -> [(&'static str, u64); 3] {
        [
            ("queue_full", self.dropped_queue_full),
            ("refused", self.dropped_refused),
            ("shutdown", self.dropped_shutdown),
        ]
    }
}

/// Every term of every account, read one after the other: exact unless a sample changed places meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    types: PerType<Terms>,
    destinations: Vec<(String, PerType<DestinationTotals>)>,
}

/// The terms of one profile type that come before the destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Counted by the sampling program, without those left out.
    pub(crate) taken: u64,
    /// Read from the ring buffer.
    pub(crate) drained: u64,
    /// Waiting, by place.
    pub(crate) waiting: [(&'static str, u64); 1 + Place::COUNT],
    /// Dropped, by cause.
    pub(crate) dropped: [(&'static str, u64); Cause::COUNT],
}

impl Snapshot {
    /// Reads the terms. `kernel` gives what the kernel side has counted.
    pub(crate) fn take(
        ledger: &Ledger,
        kernel: impl Fn(ProfileType) -> KernelTotals,
        destinations: Vec<(String, PerType<DestinationTotals>)>,
    ) -> Self {
        let types = PerType::from_fn(|profile_type| {
            let (KernelTotals { taken, submitted }, account) =
                (kernel(profile_type), ledger.of(profile_type));
            let drained = account.drained();
            // Two counts: while samples move, the drain may be ahead of the earlier reading.
            let in_ring = submitted.saturating_sub(drained);
            let [drain_queue, window, encode_queue] =
                Place::ALL.map(|place| (place.name(), account.waiting(place)));
            let left_out: u64 = LeftOut::ALL.into_iter().map(|reason| account.left_out(reason)).sum();
            Terms {
                // While samples move, one may be left out that the earlier reading had not seen taken.
                taken: taken.saturating_sub(left_out),
                drained,
                waiting: [("ring", in_ring), drain_queue, window, encode_queue],
                dropped: Cause::ALL.map(|cause| (cause.name(), account.dropped(cause))),
            }
        });
        Self { types, destinations }
    }

    /// The terms of one profile type that come before the destinations.
    pub(crate) fn of(&self, profile_type: ProfileType) -> &Terms {
        self.types.of(profile_type)
    }

    /// Each destination's name, and what became of the samples that it was given.
    pub(crate) fn destinations(&self) -> impl Iterator<Item = (&str, &PerType<DestinationTotals>)> {
        self.destinations.iter().map(|(name, totals)| (name.as_str(), totals))
    }

    /// Samples dropped before they belonged to a destination, once, and by each destination.
    pub(crate) fn dropped(&self) -> u64 {
        let of_type = |profile_type| {
            let own = self.destinations().flat_map(move |(_, totals)| totals.of(profile_type).dropped());
            self.of(profile_type).dropped.into_iter().chain(own).map(|(_, events)| events)
        };
        ProfileType::ALL.into_iter().flat_map(of_type).sum()
    }

    /// The account of every destination and profile type.
    pub(crate) fn balances(&self) -> Vec<Balance> {
        let of_destination = |(name, totals): &(String, PerType<DestinationTotals>)| {
            ProfileType::ALL.map(|profile_type| {
                Balance::new(profile_type, self.of(profile_type), name, *totals.of(profile_type))
            })
        };
        // Most agents take no allocations, and then there is nothing to tell of them.
        let is_told = |balance: &Balance| balance.profile_type == ProfileType::Cpu || !balance.is_empty();
        self.destinations.iter().flat_map(of_destination).filter(is_told).collect()
    }

    /// Nothing changed places while it was taken, as far as can be seen.
    pub(crate) fn is_exact(&self) -> bool {
        self.balances().iter().all(|balance| balance.unaccounted() == 0)
    }
}

/// Both sides of the equation for one destination and profile type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Balance {
    /// Destination, as the user named it.
    pub(crate) destination: String,
    /// What was sampled.
    pub(crate) profile_type: ProfileType,
    /// Counted by the sampling program.
    pub(crate) taken: u64,
    /// Acknowledged by the destination.
    pub(crate) delivered: u64,
    /// Waiting, by place; places with none are left out.
    pub(crate) waiting: Vec<(&'static str, u64)>,
    /// Dropped, by cause; causes with none are left out.
    pub(crate) dropped: Vec<(&'static str, u64)>,
}

impl Balance {
    fn new(profile_type: ProfileType, terms: &Terms, destination: &str, totals: DestinationTotals) -> Self {
        let Terms { taken, drained: _, waiting: places, dropped: causes } = *terms;
        let nonzero = |&(_, events): &(_, u64)| events > 0;
        let places = places.into_iter().chain([("upload_queue", totals.waiting)]);
        Self {
            destination: destination.to_owned(),
            profile_type,
            taken,
            delivered: totals.delivered,
            waiting: places.filter(nonzero).collect(),
            dropped: causes.into_iter().chain(totals.dropped()).filter(nonzero).collect(),
        }
    }

    fn is_empty(&self) -> bool {
        self.taken == 0 && self.delivered == 0 && self.waiting.is_empty() && self.dropped.is_empty()
    }

    /// Taken less everything that is accounted for. Zero when nothing moves; negative when something was counted twice.
    /// While samples move, those that change places between the readings show here.
    pub(crate) fn unaccounted(&self) -> i128 {
        let sum = |terms: &[(_, u64)]| terms.iter().map(|&(_, events)| i128::from(events)).sum::<i128>();
        i128::from(self.taken) - i128::from(self.delivered) - sum(&self.waiting) - sum(&self.dropped)
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { destination, profile_type, taken, delivered, waiting, dropped } = self;
        let list = |terms: &[(&str, u64)]| {
            let total: u64 = terms.iter().map(|(_, events)| events).sum();
            let parts: Vec<_> = terms.iter().map(|(name, events)| format!("{name} {events}")).collect();
            if parts.is_empty() { "0".to_owned() } else { format!("{total} ({})", parts.join(", ")) }
        };
        write!(
            f,
            "{destination}: {}: taken {taken} = delivered {delivered} + waiting {} + dropped {}",
            profile_type.name(),
            list(waiting),
            list(dropped)
        )?;
        match self.unaccounted() {
            0 => Ok(()),
            events => write!(f, "; UNACCOUNTED {events}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_is_counted_nowhere_shows() {
        let ledger = Ledger::default();
        ledger.of(ProfileType::Cpu).drop_events(Cause::RingFull, 3);
        ledger.of(ProfileType::Cpu).enter(Place::Window, 2);
        let mut totals = PerType::<DestinationTotals>::default();
        totals.of_mut(ProfileType::Cpu).delivered = 4;
        let snapshot = |taken| {
            let kernel = |profile_type| match profile_type {
                ProfileType::Cpu => KernelTotals { taken, submitted: 0 },
                ProfileType::Allocs | ProfileType::PageFaults => KernelTotals::default(),
            };
            Snapshot::take(&ledger, kernel, vec![("here".to_owned(), totals)])
        };
        assert!(snapshot(9).is_exact());
        let off_by_one = snapshot(10);
        assert!(!off_by_one.is_exact());
        let [balance] = &off_by_one.balances()[..] else { panic!("one destination, one type") };
        assert_eq!(balance.unaccounted(), 1);
        assert_eq!(
            balance.to_string(),
            "here: cpu: taken 10 = delivered 4 + waiting 2 (window 2) + dropped 3 (ring_full 3); UNACCOUNTED 1"
        );
    }

    #[test]
    fn what_is_left_out_was_not_taken() {
        let ledger = Ledger::default();
        ledger.of(ProfileType::PageFaults).leave_out(LeftOut::FilePage);
        ledger.of(ProfileType::PageFaults).leave_out(LeftOut::PageGone);
        let taken = |_| KernelTotals { taken: 2, submitted: 0 };
        let snapshot = Snapshot::take(&ledger, taken, Vec::new());
        assert_eq!(snapshot.of(ProfileType::PageFaults).taken, 0);
        assert_eq!(snapshot.of(ProfileType::Allocs).taken, 2);
    }

    #[test]
    fn what_is_lost_before_the_destinations_counts_once_however_many_there_are() {
        let ledger = Ledger::default();
        ledger.of(ProfileType::Cpu).drop_events(Cause::RingFull, 3);
        let mut refused = PerType::<DestinationTotals>::default();
        refused.of_mut(ProfileType::Cpu).dropped_refused = 2;
        let destinations = vec![("a".to_owned(), refused), ("b".to_owned(), PerType::default())];
        assert_eq!(Snapshot::take(&ledger, |_| KernelTotals::default(), destinations).dropped(), 5);
    }
}
