//! Which pushes are stored already, so that a retry is not counted twice.

use std::collections::{HashSet, VecDeque};

use crate::model::BatchId;

/// Ids remembered. At ten pushes a second they reach back almost two hours, longer than a sender keeps retrying.
pub(crate) const BATCHES_MAX: usize = 65_536;

/// The newest batch ids, and those being stored right now.
#[derive(Debug, Default)]
pub(crate) struct RecentBatches {
    stored: HashSet<BatchId>,
    /// `stored`, oldest first.
    order: VecDeque<BatchId>,
    underway: HashSet<BatchId>,
}

/// What is known about a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    New,
    Underway,
    Stored,
}

impl RecentBatches {
    /// Tells whether the batch is known; a new one is underway from now on.
    pub(crate) fn begin(&mut self, id: BatchId) -> Seen {
        if self.stored.contains(&id) {
            Seen::Stored
        } else if self.underway.insert(id) {
            Seen::New
        } else {
            Seen::Underway
        }
    }

    /// The batch is durable.
    pub(crate) fn finish(&mut self, id: BatchId) {
        self.underway.remove(&id);
        if !self.stored.insert(id) {
            return;
        }
        self.order.push_back(id);
        if self.order.len() > BATCHES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.stored.remove(&oldest);
        }
    }

    /// The batch was not stored; a retry is welcome.
    pub(crate) fn abandon(&mut self, id: &BatchId) {
        self.underway.remove(id);
    }

    pub(crate) fn has(&self, id: &BatchId) -> bool {
        self.stored.contains(id)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.stored.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ContentId;

    fn id(number: usize) -> BatchId {
        ContentId((number as u128).to_le_bytes())
    }

    #[test]
    fn a_batch_is_new_then_underway_then_stored() {
        let mut recent = RecentBatches::default();
        assert_eq!(recent.begin(id(1)), Seen::New);
        assert_eq!(recent.begin(id(1)), Seen::Underway);
        recent.abandon(&id(1));
        assert_eq!(recent.begin(id(1)), Seen::New);
        recent.finish(id(1));
        assert_eq!(recent.begin(id(1)), Seen::Stored);
    }

    #[test]
    fn the_oldest_batches_are_forgotten_first() {
        let mut recent = RecentBatches::default();
        (0..BATCHES_MAX + 10).for_each(|number| recent.finish(id(number)));
        assert_eq!(recent.len(), BATCHES_MAX);
        assert_eq!(recent.begin(id(9)), Seen::New);
        assert_eq!(recent.begin(id(10)), Seen::Stored);
    }
}
