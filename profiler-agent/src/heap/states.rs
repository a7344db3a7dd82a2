//! What became of each process whose heap is meant: for `targets`.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

/// Processes that are remembered; those beyond are in the counts only.
const PROCESSES_MAX: usize = 1024;

/// How it stands with the heap of a process.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub(crate) enum HeapState {
    /// Its allocator is probed.
    Profiled {
        /// Mean bytes between samples.
        rate: u32,
        /// The file with its allocator.
        file: String,
        /// Functions that are probed.
        functions: usize,
    },
    /// It is meant, and why it is not profiled.
    Refused {
        /// One line.
        why: String,
    },
}

/// By pid, of processes that live.
#[derive(Debug, Default)]
pub(crate) struct HeapStates(Mutex<BTreeMap<u32, HeapState>>);

impl HeapStates {
    /// What became of a process.
    pub(super) fn set(&self, pid: u32, state: HeapState) {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if states.len() < PROCESSES_MAX || states.contains_key(&pid) {
            states.insert(pid, state);
        }
    }

    /// A process is no longer meant, or has a new image.
    pub(super) fn forget(&self, pid: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }

    /// Keeps those that are still there.
    pub(super) fn retain(&self, lives: impl Fn(u32) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|&pid, _| lives(pid));
    }

    /// All of them.
    pub(crate) fn all(&self) -> BTreeMap<u32, HeapState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_state_of_each_process_is_kept_within_the_bound() {
        let states = HeapStates::default();
        let refused = |why: &str| HeapState::Refused { why: why.to_owned() };
        (0..PROCESSES_MAX as u32 + 5).for_each(|pid| states.set(pid, refused("a")));
        states.set(7, refused("b"));
        assert_eq!(states.all().len(), PROCESSES_MAX);
        assert_eq!(states.all()[&7], refused("b"));
        states.retain(|pid| pid < 8);
        states.forget(3);
        assert_eq!(states.all().len(), 7);
    }
}
