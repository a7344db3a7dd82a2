//! Ring buffer to worker: copies records out and nothing else, so that it never waits for a file, a symbol or the
//! network. A batch that the worker has no room for is dropped here and counted.

use std::{
    sync::{
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use profiler_common::{
    heap::AllocPart,
    limits::{COMM_BYTES, KERNEL_FRAMES_MAX, USER_FRAMES_MAX},
    wire::{FLAG_TABLES, Frame, RecordKind, SampleHeader, StackEnd, WIRE_VERSION},
};

use crate::{
    ledger::{Cause, Ledgers, Place},
    sys::clock,
};

/// Time between drains. Samples are 2.6 s away from overflowing the smallest ring buffer at the default rate.
const INTERVAL: Duration = Duration::from_millis(100);

/// Bytes of one batch: small enough that a batch dropped is a small loss, large enough that a channel of a few holds
/// seconds of samples.
const BATCH_BYTES_MAX: usize = 64 << 10;

/// Batches between drain and worker: 16 MiB, tens of seconds of samples of a large machine.
pub(crate) const BATCHES_MAX: usize = 256;

/// Records copied out of the ring buffer, in its order, each behind its length.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    samples: u64,
    allocs: u64,
    execs: u64,
}

impl Batch {
    /// Appends one record. `false`, and nothing appended, when it does not fit.
    fn push(&mut self, record: &[u8]) -> bool {
        if !self.bytes.is_empty() && self.bytes.len() + LENGTH_BYTES + record.len() > BATCH_BYTES_MAX {
            return false;
        }
        let Ok(length) = u32::try_from(record.len()) else { return false };
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(record);
        self.samples += u64::from(is_sample(record));
        self.allocs += u64::from(is_alloc(record));
        self.execs += u64::from(kind(record) == Some(RecordKind::Exec));
        true
    }

    /// On-CPU samples among the records.
    pub(crate) fn samples(&self) -> u64 {
        self.samples
    }

    /// Sampled allocations among the records.
    pub(crate) fn allocs(&self) -> u64 {
        self.allocs
    }

    /// The records, in order.
    pub(crate) fn records(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let (length, behind) = rest.split_first_chunk::<LENGTH_BYTES>()?;
            let (record, behind) = behind.split_at_checked(u32::from_ne_bytes(*length) as usize)?;
            rest = behind;
            Some(record)
        })
    }
}

const LENGTH_BYTES: usize = 4;

/// A record that stands for a sampled allocation, by its kind; also when the rest of it is broken.
pub(crate) fn is_alloc(record: &[u8]) -> bool {
    kind(record) == Some(RecordKind::AllocSample)
}

/// A record that stands for an on-CPU sample, by its kind; also when the rest of it is broken.
pub(crate) fn is_sample(record: &[u8]) -> bool {
    kind(record) == Some(RecordKind::CpuSample)
}

fn kind(record: &[u8]) -> Option<RecordKind> {
    record.get(1).copied().and_then(RecordKind::decode)
}

/// How far the drain has come: everything that happened before is in the channel, or dropped and counted.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    boot_ns: AtomicU64,
}

impl Progress {
    /// A program may still be writing a record whose time it took just before the drain began.
    const IN_THE_MAKING_NS: u64 = 10_000_000;

    /// A drain that began at a boot time has handed on all it found.
    pub(crate) fn reach(&self, began_ns: u64) {
        self.boot_ns.fetch_max(began_ns.saturating_sub(Self::IN_THE_MAKING_NS), Release);
    }

    /// Samples taken before this boot time are in the channel.
    pub(crate) fn get(&self) -> u64 {
        self.boot_ns.load(Acquire)
    }
}

/// Drains until `stop` is closed, then once more until the ring buffer is empty.
pub(crate) fn run(
    mut ring: RingBuf<MapData>,
    batches: &SyncSender<Batch>,
    ledgers: &Ledgers,
    progress: &Progress,
    stop: &Receiver<()>,
) {
    loop {
        let stopping = stop.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Disconnected);
        let began_ns = clock::boot_ns();
        drain(&mut ring, batches, ledgers);
        progress.reach(began_ns);
        if stopping {
            return;
        }
    }
}

fn drain(ring: &mut RingBuf<MapData>, batches: &SyncSender<Batch>, ledgers: &Ledgers) {
    let mut batch = Batch::default();
    while let Some(record) = ring.next() {
        if !batch.push(&record) {
            send(std::mem::take(&mut batch), batches, ledgers);
            batch.push(&record);
        }
    }
    send(batch, batches, ledgers);
}

/// Hands a batch on; its samples wait in the channel or are dropped.
pub(crate) fn send(batch: Batch, batches: &SyncSender<Batch>, ledgers: &Ledgers) {
    if batch.bytes.is_empty() {
        return;
    }
    let Batch { bytes: _, samples, allocs, execs } = batch;
    let taken = [(&ledgers.cpu, samples), (&ledgers.allocs, allocs)];
    for (ledger, events) in taken {
        ledger.add_drained(events);
        ledger.enter(Place::DrainQueue, events);
    }
    if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = batches.try_send(batch) {
        for (ledger, events) in taken {
            ledger.leave(Place::DrainQueue, events);
            ledger.drop_events(Cause::DrainQueueFull, events);
        }
        ledgers.cpu.lose_execs(execs);
    }
}

/// A record as the worker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// An on-CPU sample.
    Sample(RawSample),
    /// A sampled allocation. The sample's value is the number of bytes asked for.
    Alloc(RawSample, AllocPart),
    /// The process `(tgid)` has a new image.
    Exec {
        /// Process id.
        tgid: u32,
    },
}

/// One sample before normalizing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawSample {
    /// Process id in the initial pid namespace.
    pub(crate) tgid: u32,
    /// Start of the process on the boot clock, in nanoseconds; 0 when unknown.
    pub(crate) start_ns: u64,
    /// Boot-clock time, in nanoseconds.
    pub(crate) time_ns: u64,
    /// Id of the task's cgroup in the v2 hierarchy.
    pub(crate) cgroup_id: u64,
    /// What the sample stands for: nanoseconds of CPU time.
    pub(crate) value: u64,
    /// Name of the process; empty when unknown.
    pub(crate) comm: TaskName,
    /// Name of the thread.
    pub(crate) thread_name: TaskName,
    /// User frames, leaf first.
    pub(crate) user: Vec<Frame>,
    /// Why the user stack has no further frame.
    pub(crate) user_end: StackEnd,
    /// The process had unwind tables.
    pub(crate) by_tables: bool,
    /// Kernel frames, leaf first: the instruction pointer, then return addresses.
    pub(crate) kernel: Vec<u64>,
}

/// A task's `comm`, as the kernel keeps it.
pub(crate) type TaskName = [u8; COMM_BYTES];

/// Reads one record. `None` for bytes that are none of this version's.
pub(crate) fn decode(record: &[u8]) -> Option<Record> {
    let mut reader = Reader { rest: record };
    let [version, kind, user_end, flags] = reader.array()?;
    if version != WIRE_VERSION {
        return None;
    }
    let user_frames = usize::from(reader.u16()?);
    let kernel_frames = usize::from(reader.u16()?);
    let tgid = reader.u32()?;
    let _tid = reader.u32()?;
    let time_ns = reader.u64()?;
    match RecordKind::decode(kind)? {
        RecordKind::Exec => Some(Record::Exec { tgid }),
        kind @ (RecordKind::CpuSample | RecordKind::AllocSample) => {
            if user_frames > USER_FRAMES_MAX || kernel_frames > KERNEL_FRAMES_MAX {
                return None;
            }
            let value = reader.u64()?;
            let cgroup_id = reader.u64()?;
            let start_ns = reader.u64()?;
            let thread_name = reader.array()?;
            let comm = reader.array()?;
            debug_assert_eq!(record.len() - reader.rest.len(), size_of::<SampleHeader>());
            let part = match kind {
                RecordKind::AllocSample => Some(alloc_part(&mut reader)?),
                RecordKind::CpuSample | RecordKind::Exec => None,
            };
            let sample = RawSample {
                tgid,
                start_ns,
                time_ns,
                cgroup_id,
                value,
                comm,
                thread_name,
                user: reader.words(user_frames)?.map(Frame).collect(),
                user_end: StackEnd::decode(user_end)?,
                by_tables: flags & FLAG_TABLES != 0,
                kernel: reader.words(kernel_frames)?.collect(),
            };
            Some(match part {
                Some(part) => Record::Alloc(sample, part),
                None => Record::Sample(sample),
            })
        }
    }
}

fn alloc_part(reader: &mut Reader<'_>) -> Option<AllocPart> {
    Some(AllocPart { pointer: reader.u64()?, target: reader.u32()?, rate: reader.u32()? })
}

/// Takes integers off the front of a record.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*array)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_ne_bytes)
    }

    fn words(&mut self, count: usize) -> Option<impl Iterator<Item = u64> + use<'a>> {
        let (words, rest) = self.rest.split_at_checked(count * 8)?;
        self.rest = rest;
        Some(words.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes of a sample as the kernel side writes them.
    pub(crate) fn encode(sample: &RawSample) -> Vec<u8> {
        let mut bytes = vec![
            WIRE_VERSION,
            RecordKind::CpuSample as u8,
            sample.user_end as u8,
            u8::from(sample.by_tables),
        ];
        bytes.extend((sample.user.len() as u16).to_ne_bytes());
        bytes.extend((sample.kernel.len() as u16).to_ne_bytes());
        bytes.extend(sample.tgid.to_ne_bytes());
        bytes.extend(sample.tgid.to_ne_bytes());
        for word in [sample.time_ns, sample.value, sample.cgroup_id, sample.start_ns] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(sample.thread_name);
        bytes.extend(sample.comm);
        bytes.extend(sample.user.iter().flat_map(|frame| frame.0.to_ne_bytes()));
        bytes.extend(sample.kernel.iter().flat_map(|address| address.to_ne_bytes()));
        bytes
    }

    /// Some sampled allocation.
    pub(crate) const PART: AllocPart = AllocPart { pointer: 0x5000, target: 3, rate: 1 << 19 };

    /// The bytes of a sampled allocation as the kernel side writes them; it has no kernel frames.
    pub(crate) fn encode_alloc(sample: &RawSample, part: AllocPart) -> Vec<u8> {
        let sample = RawSample { kernel: Vec::new(), ..sample.clone() };
        let mut bytes = encode(&sample);
        bytes[1] = RecordKind::AllocSample as u8;
        let words = [part.pointer.to_ne_bytes().to_vec(), part.target.to_ne_bytes().to_vec()].concat();
        let header = size_of::<SampleHeader>();
        bytes.splice(header..header, words.into_iter().chain(part.rate.to_ne_bytes()));
        bytes
    }

    /// A sample of a process that does not exist.
    pub(crate) fn sample(time_ns: u64) -> RawSample {
        RawSample {
            tgid: u32::MAX - 1,
            start_ns: 7,
            time_ns,
            cgroup_id: 1,
            value: 52_631_578,
            comm: *b"gone\0\0\0\0\0\0\0\0\0\0\0\0",
            thread_name: *b"worker-1\0\0\0\0\0\0\0\0",
            user: vec![Frame::raw(0x1000, false), Frame::raw(0x2000, true)],
            user_end: StackEnd::Root,
            by_tables: true,
            kernel: vec![0xffff_ffff_8100_0000],
        }
    }

    /// A batch of these records.
    pub(crate) fn batch(records: &[Vec<u8>]) -> Batch {
        let mut batch = Batch::default();
        for record in records {
            assert!(batch.push(record), "the batch has room");
        }
        batch
    }

    /// The batch without one of its records, which it still claims to hold.
    pub(crate) fn without(batch: &Batch, deleted: usize) -> Batch {
        let mut shorter = Batch::default();
        for (_, record) in batch.records().enumerate().filter(|&(index, _)| index != deleted) {
            assert!(shorter.push(record), "the batch has room");
        }
        Batch { samples: batch.samples, allocs: batch.allocs, ..shorter }
    }

    #[test]
    fn a_sample_is_read_back_as_it_was_written() {
        let sample = sample(5);
        assert_eq!(decode(&encode(&sample)), Some(Record::Sample(sample)));
    }

    #[test]
    fn a_sampled_allocation_is_read_back_as_it_was_written() {
        let sample = RawSample { kernel: Vec::new(), ..sample(5) };
        let bytes = encode_alloc(&sample, PART);
        assert_eq!(decode(&bytes), Some(Record::Alloc(sample, PART)));
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn every_truncation_of_a_sample_is_refused() {
        let whole = encode(&sample(5));
        for length in 0..whole.len() {
            assert_eq!(decode(&whole[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn another_version_or_kind_is_refused() {
        let mut bytes = encode(&sample(5));
        bytes[0] = WIRE_VERSION + 1;
        assert_eq!(decode(&bytes), None);
        bytes[0] = WIRE_VERSION;
        bytes[1] = 200;
        assert_eq!(decode(&bytes), None);
    }

    #[test]
    fn a_batch_gives_back_its_records_and_counts_the_samples() {
        let records = [encode(&sample(1)), encode(&sample(2))];
        let batch = batch(&records);
        assert_eq!(batch.samples(), 2);
        assert!(batch.records().eq(records.iter().map(Vec::as_slice)));
    }

    #[test]
    fn a_batch_the_worker_has_no_room_for_is_dropped_and_counted() {
        let ledgers = Ledgers::default();
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        for _ in 0..3 {
            send(batch(&[encode(&sample(1)), encode_alloc(&sample(1), PART)]), &sender, &ledgers);
        }
        for ledger in [&ledgers.cpu, &ledgers.allocs] {
            assert_eq!(ledger.drained(), 3);
            assert_eq!(ledger.waiting(Place::DrainQueue), 1);
            assert_eq!(ledger.dropped(Cause::DrainQueueFull), 2);
        }
        drop(receiver);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&bytes);
        }
    }
}
