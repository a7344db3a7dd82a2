//! Encoded batches on their way to one destination: bounded in bytes, the oldest goes first when it overflows.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::ledger::{DestinationTotals, PerType, ProfileType};

/// One upload: a whole `PushRequest`, encoded once and sent as it is at each try.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    /// Body of the request, compressed; shared by all destinations and tries.
    pub(crate) body: Bytes,
    /// Samples in it.
    pub(crate) events: PerType<u64>,
}

/// Batches waiting for one destination, and what became of those that left.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Notify,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct State {
    batches: VecDeque<Batch>,
    bytes: usize,
    closed: bool,
    totals: PerType<DestinationTotals>,
}

impl State {
    /// Each type's totals, and how many of its events a batch holds.
    fn count(&mut self, batch: &Batch, add: impl Fn(&mut DestinationTotals, u64)) {
        for profile_type in ProfileType::ALL {
            add(self.totals.of_mut(profile_type), *batch.events.of(profile_type));
        }
    }
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Send this; it stays in the queue until [`Queue::finish`].
    Send(Batch),
    /// The queue is closed and empty.
    Done,
}

/// What became of the batch at the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The destination has it.
    Delivered,
    /// The destination will never take it.
    Refused,
    /// There was no time left to try again.
    Shutdown,
}

impl Queue {
    /// A queue of so many bytes, kept while the destination is away. A node's batch is about 30 KiB: 28 MiB are hours of
    /// windows.
    pub(crate) fn with_bytes_max(bytes_max: usize) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), bytes_max }
    }

    /// Appends a batch. Drops the oldest ones, counted, until it fits; never the head that may be under way.
    pub(crate) fn push(&self, batch: Batch) {
        {
            let mut state = self.lock();
            state.bytes += batch.body.len();
            state.count(&batch, |totals, events| totals.waiting += events);
            state.batches.push_back(batch);
            while state.bytes > self.bytes_max && state.batches.len() > 1 {
                let Some(dropped) = state.batches.remove(1) else { break };
                state.bytes -= dropped.body.len();
                state.count(&dropped, |totals, events| {
                    totals.waiting -= events;
                    totals.dropped_queue_full += events;
                });
            }
        }
        self.changed.notify_one();
    }

    /// No more batches will come.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Waits for a batch, or for the end.
    pub(crate) async fn next(&self) -> Next {
        loop {
            {
                let state = self.lock();
                if let Some(batch) = state.batches.front() {
                    return Next::Send(batch.clone());
                }
                if state.closed {
                    return Next::Done;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Removes the head and counts what became of it.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let mut state = self.lock();
        let Some(batch) = state.batches.pop_front() else { return };
        state.bytes -= batch.body.len();
        state.count(&batch, |totals, events| {
            totals.waiting -= events;
            let total = match outcome {
                Outcome::Delivered => &mut totals.delivered,
                Outcome::Refused => &mut totals.dropped_refused,
                Outcome::Shutdown => &mut totals.dropped_shutdown,
            };
            *total += events;
        });
    }

    /// The events given to this destination so far, by what became of them.
    pub(crate) fn totals(&self) -> PerType<DestinationTotals> {
        self.lock().totals
    }

    /// Bytes waiting.
    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(bytes: usize, events: u64) -> Batch {
        Batch { body: vec![0; bytes].into(), events: PerType::from_fn(|_| events) }
    }

    #[test]
    fn what_overflows_is_dropped_behind_the_head_and_counted() {
        let queue = Queue::with_bytes_max(100);
        for events in [1, 2, 4, 8] {
            queue.push(batch(40, events));
        }
        let totals = *queue.totals().of(ProfileType::Cpu);
        assert_eq!((totals.waiting, totals.dropped_queue_full), (1 + 8, 2 + 4));
        assert_eq!(queue.bytes(), 80);
    }

    #[test]
    fn a_batch_larger_than_the_queue_is_still_sent() {
        let queue = Queue::with_bytes_max(100);
        queue.push(batch(400, 1));
        assert_eq!(queue.totals().of(ProfileType::Cpu).waiting, 1);
    }

    #[test]
    fn each_outcome_has_its_own_count_and_the_queue_ends_when_closed() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let queue = Queue::with_bytes_max(1 << 20);
        for events in [1, 2, 4] {
            queue.push(batch(1, events));
        }
        queue.close();
        for outcome in [Outcome::Delivered, Outcome::Refused, Outcome::Shutdown] {
            assert!(matches!(runtime.block_on(queue.next()), Next::Send(_)));
            queue.finish(outcome);
        }
        assert!(matches!(runtime.block_on(queue.next()), Next::Done));
        let expect = DestinationTotals {
            delivered: 1,
            dropped_refused: 2,
            dropped_shutdown: 4,
            ..DestinationTotals::default()
        };
        assert_eq!(*queue.totals().of(ProfileType::Cpu), expect);
    }
}
