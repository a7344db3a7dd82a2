//! The one thread that writes the log: many pushes, one sync.

use std::{
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use super::{Shared, maintain::Wake};
use crate::{
    model::Profile,
    wal::{Segment, WalError},
};

/// Commands that may wait for the writer; more block their senders.
const COMMANDS_MAX: usize = 256;
/// Most bytes written between two syncs: bounds how long the first of them waits.
const GROUP_BYTES_MAX: usize = 64 << 20;

/// Why a batch was not stored; every one of these passes, so a retry makes sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppendError {
    #[error("memory is full: parts are not written fast enough")]
    MemoryFull,
    #[error("the same batch is being stored right now")]
    Underway,
    #[error("the store is closing")]
    Closed,
    #[error("{0}")]
    Log(Arc<str>),
}

pub(crate) enum Command {
    Append(Append),
    /// Start a new segment and freeze what is in memory.
    Rotate(mpsc::SyncSender<Rotated>),
}

pub(crate) struct Append {
    pub(crate) record: Vec<u8>,
    pub(crate) profiles: Vec<Arc<Profile>>,
    /// Has room for the one answer, so that answering never blocks.
    pub(crate) done: mpsc::SyncSender<Result<(), AppendError>>,
}

/// After a rotation: everything frozen is in parts or in segments up to `sequence`.
pub(crate) struct Rotated {
    pub(crate) sequence: u64,
    /// Segments that were closed since the last rotation.
    pub(crate) closed: Vec<u64>,
}

/// The segments being written.
#[derive(Debug)]
pub(crate) struct Log {
    directory: PathBuf,
    /// None until something is to be written.
    segment: Option<Segment>,
    /// Of the next segment.
    sequence: u64,
    closed: Vec<u64>,
}

impl Log {
    /// A log that goes on with the segment `sequence`, which must be new.
    pub(crate) fn new(directory: PathBuf, sequence: u64) -> Self {
        Self { directory, segment: None, sequence, closed: Vec::new() }
    }

    fn write(&mut self, records: &[&[u8]]) -> Result<(), WalError> {
        let segment = match &mut self.segment {
            Some(segment) => segment,
            None => {
                let segment = Segment::create(&self.directory, self.sequence)?;
                self.sequence += 1;
                self.segment.insert(segment)
            }
        };
        let written = segment.append(records).and_then(|()| segment.sync());
        if segment.is_broken() {
            // A replay may find the records there; their senders retry with the same batch ids.
            self.close_segment();
        }
        written
    }

    fn close_segment(&mut self) {
        self.closed.extend(self.segment.take().map(|segment| segment.sequence()));
    }

    fn rotate(&mut self) -> Rotated {
        self.close_segment();
        Rotated { sequence: self.sequence - 1, closed: std::mem::take(&mut self.closed) }
    }
}

/// Starts the thread; it ends when the last sender of commands is gone.
pub(crate) fn spawn(
    shared: Arc<Shared>,
    log: Log,
    wake: mpsc::SyncSender<Wake>,
) -> (mpsc::SyncSender<Command>, JoinHandle<()>) {
    let (sender, commands) = mpsc::sync_channel(COMMANDS_MAX);
    let writer = Writer { shared, log, wake, failing: false };
    let thread = std::thread::Builder::new().name("wal-writer".to_owned());
    let thread =
        thread.spawn(move || writer.run(&commands)).expect("a process that starts can start a thread");
    (sender, thread)
}

struct Writer {
    shared: Arc<Shared>,
    log: Log,
    wake: mpsc::SyncSender<Wake>,
    /// The last write failed, and the log of this program says so.
    failing: bool,
}

impl Writer {
    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        while let Ok(first) = commands.recv() {
            let mut next = Some(first);
            while let Some(command) = next.take() {
                match command {
                    Command::Append(first) => {
                        let (group, after) = gather(first, commands);
                        self.store(group);
                        next = after;
                    }
                    Command::Rotate(done) => self.rotate(&done),
                }
            }
        }
    }

    fn store(&mut self, group: Vec<Append>) {
        let records: Vec<&[u8]> = group.iter().map(|append| &*append.record).collect();
        let written = self.log.write(&records);
        self.shared.metrics.wal_syncs.add(1);
        match written {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("pushes are stored again");
                }
                self.publish(group);
            }
            Err(error) => {
                let message: Arc<str> = crate::describe(&error).into();
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!("pushes are not stored, and answered 503, until this passes: {message}");
                }
                self.shared.metrics.pushes_unwritable.add(group.len() as u64);
                for append in group {
                    // A sender that went away needs no answer.
                    let _ = append.done.send(Err(AppendError::Log(Arc::clone(&message))));
                }
            }
        }
    }

    /// Makes durable profiles visible, then acknowledges them.
    fn publish(&self, group: Vec<Append>) {
        let mut state = self.shared.state_mut();
        let mut acknowledge = Vec::with_capacity(group.len());
        for Append { profiles, done, .. } in group {
            state.memory_bytes += profiles.iter().map(|profile| profile.bytes).sum::<usize>();
            state.active.extend(profiles);
            acknowledge.push(done);
        }
        let large = state.memory_bytes > self.shared.options.flush_bytes;
        drop(state);
        for done in acknowledge {
            let _ = done.send(Ok(()));
        }
        if large {
            // Full means that the maintainer is about to wake up anyway.
            let _ = self.wake.try_send(Wake::Flush);
        }
    }

    fn rotate(&mut self, done: &mpsc::SyncSender<Rotated>) {
        let rotated = self.log.rotate();
        let mut state = self.shared.state_mut();
        let active = std::mem::take(&mut state.active);
        state.frozen.extend(active);
        drop(state);
        let _ = done.send(rotated);
    }
}

/// Takes the appends that wait already, up to the bound; the command after them, if it is another, comes along.
fn gather(first: Append, commands: &mpsc::Receiver<Command>) -> (Vec<Append>, Option<Command>) {
    let mut bytes = first.record.len();
    let mut group = vec![first];
    while bytes < GROUP_BYTES_MAX {
        match commands.try_recv() {
            Ok(Command::Append(append)) => {
                bytes += append.record.len();
                group.push(append);
            }
            Ok(other) => return (group, Some(other)),
            Err(_) => break,
        }
    }
    (group, None)
}
