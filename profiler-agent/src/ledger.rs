//! The account of every sample: taken = delivered + waiting(place) + dropped(cause), in events.
//!
//! Each term is counted where the thing happens and none is computed from others, so that the equation can fail: it is
//! checked at exit, when nothing moves any more.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
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
    /// The agent fell behind: the channel between drain and worker was full.
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

/// Counts of one agent, shared by its threads. Relaxed throughout: a reading while samples move is a little old, the one
/// at exit is exact since the threads have been joined.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    drained: AtomicU64,
    dropped: [AtomicU64; Cause::COUNT],
    waiting: [AtomicU64; Place::COUNT],
    execs_lost_in_ring: AtomicU64,
    execs_lost_in_queue: AtomicU64,
}

impl Ledger {
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

    /// Events have come to a place.
    pub(crate) fn enter(&self, place: Place, events: u64) {
        self.waiting[place as usize].fetch_add(events, Relaxed);
    }

    /// Events have left a place.
    pub(crate) fn leave(&self, place: Place, events: u64) {
        self.waiting[place as usize].fetch_sub(events, Relaxed);
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

/// Kinds of events, each with an account of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Events {
    /// On-CPU samples.
    Cpu,
    /// Sampled allocations.
    Allocs,
}

impl Events {
    /// Number of kinds.
    pub(crate) const COUNT: usize = 2;

    /// The value of the metric label `type`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Allocs => "allocs",
        }
    }
}

/// The account of each kind of event.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledgers {
    /// On-CPU samples; of exec records, too.
    pub(crate) cpu: Arc<Ledger>,
    /// Sampled allocations.
    pub(crate) allocs: Arc<Ledger>,
}

/// Counted by the kernel side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KernelTotals {
    /// Samples taken.
    pub(crate) taken: u64,
    /// Samples written to the ring buffer.
    pub(crate) submitted: u64,
}

/// What one destination did with the events it was given.
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

/// Both sides of the equation for one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Balance {
    /// Destination, as the user named it.
    pub(crate) destination: String,
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
    /// Puts the account of one destination together.
    pub(crate) fn new(
        kernel: KernelTotals,
        ledger: &Ledger,
        destination: &str,
        totals: DestinationTotals,
    ) -> Self {
        let KernelTotals { taken, submitted } = kernel;
        // Readings of two moments: while samples move, the drain may be ahead of the earlier one.
        let in_ring = submitted.saturating_sub(ledger.drained());
        let DestinationTotals { delivered, waiting, .. } = totals;
        let places = Place::ALL.map(|place| (place.name(), ledger.waiting(place)));
        let causes = Cause::ALL.map(|cause| (cause.name(), ledger.dropped(cause)));
        let nonzero = |&(_, events): &(_, u64)| events > 0;
        Self {
            destination: destination.to_owned(),
            taken,
            delivered,
            waiting: [("ring", in_ring)]
                .into_iter()
                .chain(places)
                .chain([("upload_queue", waiting)])
                .filter(nonzero)
                .collect(),
            dropped: causes.into_iter().chain(totals.dropped()).filter(nonzero).collect(),
        }
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
        let Self { destination, taken, delivered, waiting, dropped } = self;
        let list = |terms: &[(&str, u64)]| {
            let total: u64 = terms.iter().map(|(_, events)| events).sum();
            let parts: Vec<_> = terms.iter().map(|(name, events)| format!("{name} {events}")).collect();
            if parts.is_empty() { "0".to_owned() } else { format!("{total} ({})", parts.join(", ")) }
        };
        write!(
            f,
            "{destination}: taken {taken} = delivered {delivered} + waiting {} + dropped {}",
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
        ledger.drop_events(Cause::RingFull, 3);
        ledger.enter(Place::Window, 2);
        let totals = DestinationTotals { delivered: 4, ..DestinationTotals::default() };
        let account = |taken| Balance::new(KernelTotals { taken, submitted: 0 }, &ledger, "here", totals);
        assert_eq!(account(9).unaccounted(), 0);
        let off_by_one = account(10);
        assert_eq!(off_by_one.unaccounted(), 1);
        assert_eq!(
            off_by_one.to_string(),
            "here: taken 10 = delivered 4 + waiting 2 (window 2) + dropped 3 (ring_full 3); UNACCOUNTED 1"
        );
    }
}
