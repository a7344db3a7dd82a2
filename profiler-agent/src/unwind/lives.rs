//! Forks and ends of processes, gathered so that the unwind thread is woken once for many. What begins and ends between two
//! drains, as the children of a shell do by the thousand, is not worth its while: the kernel side has made the entry and
//! deleted it.

/// What happened to a process, with its start on the boot clock in nanoseconds (0 is "unknown").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// It was forked from a process that was known.
    Forked { pid: u32, start_ns: u64 },
    /// It has ended.
    Exited { pid: u32, start_ns: u64 },
}

/// Gathered in their order.
#[derive(Debug, Default)]
pub(crate) struct Lives(Vec<Life>);

impl Lives {
    /// A process was forked from one that was known.
    pub(crate) fn fork(&mut self, pid: u32, start_ns: u64) {
        self.0.push(Life::Forked { pid, start_ns });
    }

    /// A process has ended. One whose fork is gathered too leaves no trace.
    pub(crate) fn exit(&mut self, pid: u32, start_ns: u64) {
        let begun = self.0.iter().rposition(|&life| life == Life::Forked { pid, start_ns });
        match begun {
            Some(at) => drop(self.0.remove(at)),
            None => self.0.push(Life::Exited { pid, start_ns }),
        }
    }

    /// Takes what was gathered, in parts of at most `most`.
    pub(crate) fn take(&mut self, most: usize) -> impl Iterator<Item = Box<[Life]>> {
        let lives = std::mem::take(&mut self.0);
        let starts = (0..lives.len()).step_by(most);
        starts.map(move |start| lives[start..lives.len().min(start + most)].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_began_and_ended_leaves_no_trace_and_all_else_keeps_its_order() {
        let mut lives = Lives::default();
        lives.fork(1, 10);
        lives.exit(7, 3);
        lives.fork(2, 20);
        lives.exit(1, 10);
        // Another process of the same pid.
        lives.fork(1, 30);
        lives.exit(2, 0);
        let taken: Vec<Vec<Life>> = lives.take(2).map(Vec::from).collect();
        let expect = [
            vec![Life::Exited { pid: 7, start_ns: 3 }, Life::Forked { pid: 2, start_ns: 20 }],
            vec![Life::Forked { pid: 1, start_ns: 30 }, Life::Exited { pid: 2, start_ns: 0 }],
        ];
        assert_eq!(taken, expect);
        assert_eq!(lives.take(2).count(), 0);
    }
}
