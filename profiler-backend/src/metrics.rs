//! Counters of the backend, and their Prometheus text form.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
};

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything counted since the start; each is counted where it happens.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) pushes_stored: Counter,
    pub(crate) pushes_duplicate: Counter,
    /// Refused for good: the request is wrong.
    pub(crate) pushes_invalid: Counter,
    /// Refused for now: too many at once, memory or disk full.
    pub(crate) pushes_deferred: Counter,
    /// Of the deferred, those that the disk could not take.
    pub(crate) pushes_unwritable: Counter,
    pub(crate) profiles_stored: Counter,
    pub(crate) samples_stored: Counter,
    pub(crate) wal_syncs: Counter,
    pub(crate) wal_records_replayed: Counter,
    pub(crate) wal_records_unreadable: Counter,
    pub(crate) wal_bytes_torn: Counter,
    pub(crate) parts_written: Counter,
    pub(crate) parts_compacted: Counter,
    pub(crate) parts_expired: Counter,
    pub(crate) parts_unreadable: Counter,
    pub(crate) flushes_failed: Counter,
    pub(crate) compactions_failed: Counter,
    pub(crate) queries: Counter,
    pub(crate) queries_refused: Counter,
    pub(crate) queries_failed: Counter,
    pub(crate) hosts_refused: Counter,
    pub(crate) tokens_refused: Counter,
}

/// What holds at this moment, as opposed to what was counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gauges {
    pub(crate) memory_bytes: usize,
    pub(crate) memory_profiles: usize,
    pub(crate) parts: usize,
    pub(crate) stack_cache_bytes: usize,
}

impl Metrics {
    /// Prometheus text exposition format 0.0.4.
    pub(crate) fn render(&self, gauges: &Gauges) -> String {
        let mut text = String::new();
        let counters = [
            ("pushes_stored_total", "Pushes stored and acknowledged.", &self.pushes_stored),
            ("pushes_duplicate_total", "Pushes whose batch id was stored before.", &self.pushes_duplicate),
            ("pushes_invalid_total", "Pushes refused for good.", &self.pushes_invalid),
            ("pushes_deferred_total", "Pushes refused for now.", &self.pushes_deferred),
            ("pushes_unwritable_total", "Pushes that the disk could not take.", &self.pushes_unwritable),
            ("profiles_stored_total", "Profiles stored.", &self.profiles_stored),
            ("samples_stored_total", "Samples stored.", &self.samples_stored),
            ("wal_syncs_total", "Syncs of the write-ahead log.", &self.wal_syncs),
            ("wal_records_replayed_total", "Records replayed at the start.", &self.wal_records_replayed),
            (
                "wal_records_unreadable_total",
                "Replayed records not understood.",
                &self.wal_records_unreadable,
            ),
            ("wal_torn_bytes_total", "Bytes of records a crash cut short.", &self.wal_bytes_torn),
            ("parts_written_total", "Parts written from memory.", &self.parts_written),
            ("parts_compacted_total", "Parts merged into larger ones.", &self.parts_compacted),
            ("parts_expired_total", "Parts deleted by retention.", &self.parts_expired),
            ("parts_unreadable_total", "Parts that could not be read.", &self.parts_unreadable),
            ("flushes_failed_total", "Attempts to write a part that failed.", &self.flushes_failed),
            ("compactions_failed_total", "Attempts to merge parts that failed.", &self.compactions_failed),
            ("queries_total", "Queries answered.", &self.queries),
            ("queries_refused_total", "Queries refused: wrong, or too many at once.", &self.queries_refused),
            ("queries_failed_total", "Queries that failed inside.", &self.queries_failed),
            ("hosts_refused_total", "Requests refused for their Host header.", &self.hosts_refused),
            ("tokens_refused_total", "Requests refused for want of the token.", &self.tokens_refused),
        ];
        for (name, help, counter) in counters {
            metric(&mut text, name, help, "counter", counter.get());
        }
        let Gauges { memory_bytes, memory_profiles, parts, stack_cache_bytes } = *gauges;
        let gauges = [
            ("memory_bytes", "Profiles not yet in a part.", memory_bytes),
            ("memory_profiles", "Profiles not yet in a part.", memory_profiles),
            ("parts", "Parts on disk.", parts),
            ("stack_cache_bytes", "Stacks and frames kept in memory.", stack_cache_bytes),
        ];
        for (name, help, value) in gauges {
            metric(&mut text, name, help, "gauge", value as u64);
        }
        text
    }
}

fn metric(text: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    let name = format!("profiler_backend_{name}");
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}")
        .expect("writing to a String cannot fail");
}
