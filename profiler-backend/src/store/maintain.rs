//! What keeps the store in shape: parts from memory, one part per closed hour, nothing past retention.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    Shared, State,
    layout::Hour,
    now_us,
    part::{Part, PartError, PartRows, SampleRow},
    writer::{Command, Rotated},
};
use crate::{
    model::{Profile, ProfileHead},
    wal,
};

/// An hour is compacted this long after its end: late pushes have arrived by then.
const HOUR_GRACE_US: i64 = 10 * 60 * 1_000_000;
/// Most sample rows merged into one part: about 150 MB while it is made.
const COMPACTION_ROWS_MAX: u64 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    Flush,
    /// Flush and end.
    Close,
}

/// Starts the thread; it ends on [`Wake::Close`].
pub(crate) fn spawn(
    shared: Arc<Shared>,
    commands: mpsc::SyncSender<Command>,
    woken: mpsc::Receiver<Wake>,
    old_segments: Vec<u64>,
) -> JoinHandle<()> {
    let maintainer = Maintainer { shared, commands, segments: old_segments, names: 0 };
    let thread = std::thread::Builder::new().name("store-maintain".to_owned());
    thread.spawn(move || maintainer.run(&woken)).expect("a process that starts can start a thread")
}

struct Maintainer {
    shared: Arc<Shared>,
    commands: mpsc::SyncSender<Command>,
    /// Segments on disk that are no longer written, ascending.
    segments: Vec<u64>,
    /// Part names given out.
    names: u32,
}

impl Maintainer {
    fn run(mut self, woken: &mpsc::Receiver<Wake>) {
        let mut due = Instant::now() + self.shared.options.flush_interval;
        loop {
            match woken.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(Wake::Close) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                    self.flush();
                    return;
                }
                Ok(Wake::Flush) | Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            self.flush();
            self.expire();
            self.compact();
            due = Instant::now() + self.shared.options.flush_interval;
        }
    }

    /// Writes what is in memory to parts, then deletes the log segments that held it.
    fn flush(&mut self) {
        let (done, rotated) = mpsc::sync_channel(1);
        if self.commands.send(Command::Rotate(done)).is_err() {
            return;
        }
        let Ok(Rotated { sequence, closed }) = rotated.recv() else { return };
        self.segments.extend(closed);
        match self.write_frozen(sequence) {
            Ok(()) => self.remove_segments(),
            Err(error) => {
                self.shared.metrics.flushes_failed.add(1);
                let what = if error.is_full() { "the disk is full; " } else { "" };
                tracing::error!("{what}profiles stay in memory and in the log: {}", crate::describe(&error));
            }
        }
    }

    fn write_frozen(&mut self, sequence: u64) -> Result<(), PartError> {
        let mut by_hour: BTreeMap<Hour, Vec<Arc<Profile>>> = BTreeMap::new();
        for profile in &self.shared.state().frozen {
            by_hour.entry(Hour::of(profile.head.start_us)).or_default().push(Arc::clone(profile));
        }
        for (hour, profiles) in by_hour {
            let (layout, name) = (self.shared.layout.clone(), self.name());
            let part = Part::write(&layout, hour, name, rows_of(&profiles), sequence, Vec::new())?;
            self.shared.metrics.parts_written.add(1);
            self.shared.state_mut().take_over(part);
        }
        Ok(())
    }

    fn remove_segments(&mut self) {
        let directory = self.shared.layout.wal();
        // One that cannot be deleted stays listed: a later flush tries again, and parts it may repeat are not
        // compacted meanwhile.
        self.segments.retain(|&sequence| match wal::remove(&directory, sequence) {
            Ok(()) => false,
            Err(error) => {
                tracing::error!("{}", crate::describe(&error));
                true
            }
        });
    }

    /// A name that sorts by time and that no other part of this directory has: `lock` keeps other processes out.
    fn name(&mut self) -> String {
        self.names = self.names.wrapping_add(1);
        format!("{:016x}-{:08x}", now_us(), self.names)
    }

    /// Retires parts whose hour lies before the retention.
    fn expire(&self) {
        let retention_us = i64::try_from(self.shared.options.retention.as_micros()).unwrap_or(i64::MAX);
        let oldest_us = now_us().saturating_sub(retention_us);
        let mut state = self.shared.state_mut();
        let (kept, expired): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.parts).into_iter().partition(|part| part.hour.end_us() > oldest_us);
        state.parts = kept;
        drop(state);
        for part in expired {
            self.shared.metrics.parts_expired.add(1);
            part.retire();
        }
    }

    /// Merges the parts of each closed hour.
    fn compact(&mut self) {
        for (hour, parts) in self.closed_hours() {
            for group in groups(parts) {
                // It can be done at any time, and a group may take seconds: who closes does not wait for it.
                if self.shared.is_closing() {
                    return;
                }
                if let Err(error) = self.compact_group(hour, &group) {
                    self.shared.metrics.compactions_failed.add(1);
                    tracing::error!("parts stay as they are: {}", crate::describe(&error));
                    return;
                }
            }
        }
    }

    fn closed_hours(&self) -> BTreeMap<Hour, Vec<Arc<Part>>> {
        let now_us = now_us();
        let mut hours: BTreeMap<Hour, Vec<Arc<Part>>> = BTreeMap::new();
        for part in &self.shared.state().parts {
            let closed = part.hour.end_us().saturating_add(HOUR_GRACE_US) < now_us;
            // What a leftover segment would replay must stay recognizable by the part's own sequence.
            let settled = self.segments.first().is_none_or(|&first| part.wal_sequence < first);
            if closed && settled {
                hours.entry(part.hour).or_default().push(Arc::clone(part));
            }
        }
        hours
    }

    fn compact_group(&mut self, hour: Hour, group: &[Arc<Part>]) -> Result<(), PartError> {
        let started = Instant::now();
        let mut rows = PartRows::default();
        for part in group {
            let more = part.rows(&self.shared.stacks)?;
            rows.profiles.extend(more.profiles);
            rows.samples.extend(more.samples);
            rows.stacks.extend(more.stacks);
        }
        let mut seen = HashSet::new();
        rows.stacks.retain(|stack| seen.insert(stack.id));
        let sequence = group.iter().map(|part| part.wal_sequence).max().unwrap_or(0);
        let replaces: Vec<String> = group.iter().map(|part| part.name.clone()).collect();
        let (layout, name) = (self.shared.layout.clone(), self.name());
        let part = Part::write(&layout, hour, name, rows, sequence, replaces)?;
        tracing::debug!("{} parts of an hour became one in {:?}", group.len(), started.elapsed());
        self.shared.metrics.parts_compacted.add(group.len() as u64);
        self.shared.state_mut().replace(group, part);
        group.iter().for_each(|part| part.retire());
        Ok(())
    }
}

impl State {
    /// The profiles of the part's hour leave memory in the moment the part appears.
    fn take_over(&mut self, part: Part) {
        let in_part = |profile: &Arc<Profile>| Hour::of(profile.head.start_us) == part.hour;
        let bytes: usize = self.frozen.iter().filter(|p| in_part(p)).map(|p| p.bytes).sum();
        self.frozen.retain(|profile| !in_part(profile));
        self.memory_bytes = self.memory_bytes.saturating_sub(bytes);
        self.parts.push(Arc::new(part));
    }

    fn replace(&mut self, old: &[Arc<Part>], new: Part) {
        self.parts.retain(|part| !old.iter().any(|gone| Arc::ptr_eq(gone, part)));
        self.parts.push(Arc::new(new));
    }
}

/// Cuts the parts of an hour into groups worth merging, each within the bound.
fn groups(parts: Vec<Arc<Part>>) -> Vec<Vec<Arc<Part>>> {
    let mut groups: Vec<Vec<Arc<Part>>> = Vec::new();
    let mut rows = 0;
    for part in parts {
        rows += part.sample_rows;
        match groups.last_mut() {
            Some(group) if rows <= COMPACTION_ROWS_MAX => group.push(part),
            _ => {
                rows = part.sample_rows;
                groups.push(vec![part]);
            }
        }
    }
    groups.retain(|group| group.len() > 1);
    groups
}

fn rows_of(profiles: &[Arc<Profile>]) -> PartRows {
    let mut rows = PartRows::default();
    let mut stacks = HashMap::new();
    for profile in profiles {
        rows.profiles.push((profile.head.clone(), profile.samples.len() as i64));
        for sample in &profile.samples {
            stacks.entry(sample.stack.id).or_insert_with(|| Arc::clone(&sample.stack));
        }
        push_samples(profile, &mut rows.samples);
    }
    rows.stacks = stacks.into_values().collect();
    rows
}

fn push_samples(profile: &Profile, rows: &mut Vec<SampleRow>) {
    let ProfileHead { series, start_us, duration_ns, sample_types, .. } = &profile.head;
    let duration = Duration::from_nanos(duration_ns.unsigned_abs());
    for sample in &profile.samples {
        for (value_type, &value) in sample_types.iter().zip(&sample.values).filter(|(_, value)| **value != 0)
        {
            rows.push(SampleRow {
                series: Arc::clone(series),
                start_us: *start_us,
                duration_ms: i32::try_from(duration.as_millis()).unwrap_or(i32::MAX),
                value_type: value_type.clone(),
                labels: Arc::clone(&sample.labels),
                stack_id: sample.stack.id,
                value,
            });
        }
    }
}
