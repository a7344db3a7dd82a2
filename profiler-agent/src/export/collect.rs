//! The destination inside this process: one profile per type, the sum of all that would have been sent.

use std::{
    collections::BTreeMap,
    io::Read as _,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use profiler_pprof::{
    DecodeError, DecodeLimits, LabelSpec, Merger, OpsError, decode,
    proto::Profile,
    push::{PushError, PushRequest, Temporality},
};
use tracing::warn;

use super::queue::{Batch, Next, Outcome, Queue};

/// Bytes of requests that are summed up. Their sum is smaller than they are; one that is larger would take the machine's
/// memory.
const BYTES_MAX: u64 = 512 << 20;
/// Bytes of one request. They are made of 1 MiB of gzipped profiles, at most.
const REQUEST_BYTES_MAX: u64 = 64 << 20;

/// What has been collected.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By profile type.
    sums: BTreeMap<String, Sum>,
    bytes: u64,
}

/// Everything of a profile type that is summed over time; of one that is not, all series of the latest snapshot.
#[derive(Debug, Default)]
struct Sum {
    merger: Merger,
    /// When the snapshot was taken, in nanoseconds since the Unix epoch; 0 of what is no snapshot.
    taken_unix_ns: i64,
}

/// Why a request was not added.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error("decompress a batch")]
    Decompress(#[from] std::io::Error),
    #[error("read a batch")]
    Request(#[from] PushError),
    #[error("read a profile")]
    Profile(#[from] DecodeError),
    #[error("add a profile")]
    Sum(#[from] OpsError),
    #[error("more than {BYTES_MAX} bytes of profiles; record for a shorter time, or fewer processes")]
    Full,
}

impl Collector {
    /// The sum of one profile type; `None` when nothing of it came.
    ///
    /// # Errors
    /// When the sum cannot be finished.
    pub(crate) fn take(&self, profile_type: &str) -> Result<Option<Profile>, OpsError> {
        let sum = self.lock().sums.remove(profile_type);
        sum.map(|sum| sum.merger.finish()).transpose()
    }

    /// The latest snapshot, if it was taken at that time or later. Nothing is sent of one that is empty.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(crate) fn take_snapshot_since(
        &self,
        profile_type: &str,
        time: SystemTime,
    ) -> Result<Option<Profile>, OpsError> {
        let sum = self.lock().sums.remove(profile_type);
        let time_ns = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let is_since = |sum: &Sum| i128::from(sum.taken_unix_ns) >= time_ns.cast_signed();
        sum.filter(is_since).map(|sum| sum.merger.finish()).transpose()
    }

    fn add(&self, body: &[u8]) -> Result<(), CollectError> {
        let mut bytes = Vec::new();
        zstd::Decoder::new(body)?.take(REQUEST_BYTES_MAX).read_to_end(&mut bytes)?;
        let request = PushRequest::from_bytes(&bytes)?;
        let mut state = self.lock();
        state.bytes += bytes.len() as u64;
        if state.bytes > BYTES_MAX {
            return Err(CollectError::Full);
        }
        for series in &request.series {
            let profile = decode(&series.pprof, &DecodeLimits::default())?;
            let labels: Vec<_> =
                series.labels.iter().map(|label| LabelSpec::text(&label.name, &label.value)).collect();
            let sum = state.sums.entry(series.profile_type.clone()).or_default();
            if Temporality::from_wire(series.temporality) == Some(Temporality::Snapshot) {
                if series.start_unix_ns < sum.taken_unix_ns {
                    continue;
                }
                if series.start_unix_ns > sum.taken_unix_ns {
                    *sum = Sum { merger: Merger::default(), taken_unix_ns: series.start_unix_ns };
                }
            }
            sum.merger.add(&profile, &labels)?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A sum is changed by one call, which checks before it changes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds what is in the queue until it is closed and empty.
pub(crate) async fn run(collector: Arc<Collector>, queue: Arc<Queue>) {
    while let Next::Send(Batch { body, events }) = queue.next().await {
        let outcome = match collector.add(&body) {
            Ok(()) => Outcome::Delivered,
            Err(error) => {
                warn!(?events, error = %format!("{:#}", anyhow::Error::from(error)), "batch dropped");
                Outcome::Refused
            }
        };
        queue.finish(outcome);
    }
}

#[cfg(test)]
mod tests {
    use profiler_pprof::{ProfileBuilder, TypeSpec, encode_gzip, push};

    use super::*;

    fn body(seconds: i64) -> Vec<u8> {
        body_of("cpu", push::Temporality::Delta, 1, seconds)
    }

    fn body_of(
        profile_type: &str,
        temporality: push::Temporality,
        start_unix_ns: i64,
        seconds: i64,
    ) -> Vec<u8> {
        let cpu = TypeSpec::new("cpu", "nanoseconds");
        let mut builder = ProfileBuilder::new(&[cpu], cpu, 1);
        builder.duration_ns(seconds * 1_000_000_000);
        builder.sample(&[], &[seconds], &[]);
        let series = push::Series {
            labels: push::labels([("exe", "app")]),
            profile_type: profile_type.to_owned(),
            temporality: temporality.to_wire(),
            start_unix_ns,
            duration_ns: 1,
            pprof: encode_gzip(&builder.finish()),
        };
        let request = PushRequest {
            format_version: push::FORMAT_VERSION,
            batch_id: vec![0; push::BATCH_ID_BYTES],
            agent: "test".to_owned(),
            series: vec![series],
        };
        zstd::bulk::compress(&request.to_bytes(), 1).expect("it compresses")
    }

    #[test]
    fn batches_become_one_profile_with_their_series_as_labels() {
        let collector = Collector::default();
        collector.add(&body(1)).expect("a batch");
        collector.add(&body(2)).expect("a batch");
        let profile = collector.take("cpu").expect("a sum").expect("of two");
        assert_eq!(profile.sample.len(), 1, "{profile}");
        assert_eq!(profile.sample[0].value, [3], "{profile}");
        assert!(profile.to_string().contains("exe=\"app\""), "{profile}");
        assert_eq!(collector.take("heap"), Ok(None));
    }

    #[test]
    fn of_snapshots_the_latest_counts_with_all_its_series() {
        let collector = Collector::default();
        for (time, value) in [(5, 100), (7, 1), (7, 2), (6, 200)] {
            let body = body_of("heap", push::Temporality::Snapshot, time, value);
            collector.add(&body).expect("a batch");
        }
        let since = |ns| UNIX_EPOCH + std::time::Duration::from_nanos(ns);
        let profile = collector.take_snapshot_since("heap", since(7)).expect("a sum").expect("of two");
        assert_eq!(profile.sample[0].value, [3], "{profile}");
        collector.add(&body_of("heap", push::Temporality::Snapshot, 8, 1)).expect("a batch");
        assert_eq!(collector.take_snapshot_since("heap", since(9)), Ok(None), "it held nothing at the end");
    }

    #[test]
    fn a_damaged_batch_is_an_error_and_leaves_the_sum_as_it_is() {
        let collector = Collector::default();
        collector.add(&body(1)).expect("a batch");
        let mut damaged = body(2);
        damaged.truncate(damaged.len() / 2);
        collector.add(&damaged).expect_err("half a batch");
        let profile = collector.take("cpu").expect("a sum").expect("of one");
        assert_eq!(profile.sample[0].value, [1], "{profile}");
    }
}
