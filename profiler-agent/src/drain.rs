//! Ring buffer to worker: copies records out and nothing else, so that it never waits for a file, a symbol or the
//! network. What the worker has no room for stays in the ring, where the programs count what they find no room for.
//!
//! What the rings of perf events say of new mappings goes the same way, beside the records of the programs.

use std::{
    io::{self, PipeReader},
    os::fd::{AsFd, OwnedFd},
    sync::{
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
        mpsc::{SendError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use aya::maps::{MapData, RingBuf};
use profiler_common::{
    heap::AllocPart,
    limits::{COMM_BYTES, KERNEL_FRAMES_MAX, USER_FRAMES_MAX},
    wire::{
        FLAG_KERNEL_CUT, FLAG_KERNEL_REFUSED, FLAG_TABLES, FRAMES_MAX, Frame, RecordHead, RecordKind,
        SampleHeader, StackEnd, WIRE_VERSION,
    },
};
use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
};

use crate::{
    addr::Addr,
    ledger::{Cause, Ledger, PerType, Place, ProfileType},
    mapping_events::MappingEvents,
    process::Exec,
    sys::clock,
};

/// Longest time between drains: each costs the wake of two threads, 30 µs and more. A ring that fills sooner wakes us.
const INTERVAL: Duration = Duration::from_millis(500);
/// Shortest time between drains, so that programs started by the thousand do not keep the agent busy.
const INTERVAL_MIN: Duration = Duration::from_millis(5);

/// Bytes of one batch: small enough that a batch dropped is a small loss, large enough that a channel of a few holds
/// seconds of samples.
pub(crate) const BATCH_BYTES_MAX: usize = 64 << 10;

/// Records copied out of the ring buffer, in its order, each behind its length.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    samples: PerType<u64>,
    execs: u64,
    /// Fork and exit records.
    lives: u64,
    /// Records of perf events, as `bytes`; they have an order of their own.
    perf_bytes: Vec<u8>,
    perf_records: u64,
    /// Of the samples, those that are in the account as waiting for the worker.
    entered: PerType<u64>,
}

impl Batch {
    /// Appends one record. `false`, and nothing appended, when it does not fit.
    fn push(&mut self, record: &[u8]) -> bool {
        if !self.has_room(record.len()) || !append(&mut self.bytes, record) {
            return false;
        }
        if let Some(profile_type) = sample_type(record) {
            *self.samples.of_mut(profile_type) += 1;
        }
        self.execs += u64::from(kind(record) == Some(RecordKind::Exec));
        self.lives += u64::from(matches!(kind(record), Some(RecordKind::Fork | RecordKind::Exit)));
        true
    }

    /// Appends one record of a perf event, as [`Self::push`].
    fn push_perf(&mut self, record: &[u8]) -> bool {
        let is_in = self.has_room(record.len()) && append(&mut self.perf_bytes, record);
        self.perf_records += u64::from(is_in);
        is_in
    }

    /// For a record of so many bytes.
    fn has_room(&self, record_bytes: usize) -> bool {
        let bytes = self.bytes.len() + self.perf_bytes.len();
        bytes == 0 || bytes + LENGTH_BYTES + record_bytes <= BATCH_BYTES_MAX
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.perf_bytes.is_empty()
    }

    /// Samples among the records, by type.
    pub(crate) fn samples(&self) -> PerType<u64> {
        self.samples
    }

    /// The records, in order.
    pub(crate) fn records(&self) -> impl Iterator<Item = &[u8]> {
        each(&self.bytes)
    }

    /// The records of perf events, by CPU and in order.
    pub(crate) fn perf_records(&self) -> impl Iterator<Item = &[u8]> {
        each(&self.perf_bytes)
    }
}

const LENGTH_BYTES: usize = 4;

/// A record of the programs is no longer.
const RECORD_BYTES_MAX: usize = 16 << 10;
const _: () = assert!(size_of::<SampleHeader>() + 8 * FRAMES_MAX <= RECORD_BYTES_MAX);

/// Appends a record behind its length; `false` for one that has none.
fn append(bytes: &mut Vec<u8>, record: &[u8]) -> bool {
    let Ok(length) = u32::try_from(record.len()) else { return false };
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(record);
    true
}

/// What was appended, in order.
fn each(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, behind) = rest.split_first_chunk::<LENGTH_BYTES>()?;
        let (record, behind) = behind.split_at_checked(u32::from_ne_bytes(*length) as usize)?;
        rest = behind;
        Some(record)
    })
}

/// The type of a record that stands for a sample, by its kind; also when the rest of it is broken.
pub(crate) fn sample_type(record: &[u8]) -> Option<ProfileType> {
    match kind(record)? {
        RecordKind::CpuSample => Some(ProfileType::Cpu),
        RecordKind::AllocSample => Some(ProfileType::Allocs),
        RecordKind::PageFault => Some(ProfileType::PageFaults),
        RecordKind::Exec | RecordKind::Fork | RecordKind::Exit | RecordKind::CgroupMade => None,
    }
}

/// When a record was written, by the boot clock.
pub(crate) fn time_ns(record: &[u8]) -> Option<u64> {
    const AT: usize = std::mem::offset_of!(RecordHead, time_ns);
    record.get(AT..)?.first_chunk().map(|time| u64::from_ne_bytes(*time))
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

/// Drains until the other end of `stop` is closed, then once more until the ring buffer is empty. Samples wait for the
/// timer; records that must be looked at soon, and a ring that is half full, wake us ([`INTERVAL_MIN`] after the last drain at
/// the earliest).
pub(crate) fn run(
    mut ring: RingBuf<MapData>,
    mappings: &MappingEvents,
    alarm: &Alarm,
    batches: &SyncSender<Batch>,
    ledger: &Ledger,
    progress: &Progress,
) {
    let mut drained = Instant::now();
    let mut kept = Batch::default();
    loop {
        let stopping = alarm.wait(if kept.is_empty() { INTERVAL } else { INTERVAL_MIN });
        if !stopping {
            thread::sleep(INTERVAL_MIN.saturating_sub(drained.elapsed()));
        }
        drained = Instant::now();
        let began_ns = clock::boot_ns();
        kept = drain(kept, &mut ring, mappings, batches, ledger);
        if kept.is_empty() {
            progress.reach(began_ns);
        }
        if stopping {
            return finish(kept, &mut ring, batches, ledger);
        }
    }
}

/// What ends the wait of the drain.
#[derive(Debug)]
pub(crate) struct Alarm {
    set: OwnedFd,
    _stop: PipeReader,
}

impl Alarm {
    const STOP: u64 = 0;
    const NEWS: u64 = 1;

    /// Rings when the programs or [`MappingEvents`] say so, and when the other end of `stop` is closed.
    ///
    /// Of the ring buffer that is when a program asks for it, not when there is something in it: samples that came since the
    /// last drain wait for the timer. Source: epoll(7), "Level-triggered and edge-triggered".
    pub(crate) fn new(ring: &impl AsFd, mappings: &impl AsFd, stop: PipeReader) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let [stopping, news] = [Self::STOP, Self::NEWS].map(epoll::EventData::new_u64);
        // That a pipe is closed is told unasked.
        epoll::add(&set, &stop, stopping, epoll::EventFlags::empty())?;
        epoll::add(&set, ring, news, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        epoll::add(&set, mappings, news, epoll::EventFlags::IN)?;
        Ok(Self { set, _stop: stop })
    }

    /// Waits for it, at most so long, which is less than a second; true when nothing is written any more.
    fn wait(&self, longest: Duration) -> bool {
        let timeout = Timespec { tv_sec: 0, tv_nsec: longest.subsec_nanos().into() };
        let mut events = Vec::with_capacity(3);
        if epoll::wait(&self.set, spare_capacity(&mut events), Some(&timeout)).is_err() {
            // A signal, or no memory: neither must make this a busy loop.
            thread::sleep(INTERVAL_MIN);
        }
        events.iter().any(|event: &epoll::Event| event.data.u64() == Self::STOP)
    }
}

/// Fills and sends batches, beginning with one that was kept, until there is no more, or no room for a batch: the rest stays
/// in the ring. Gives the last one where the worker has no room for it: it is filled on with the next drain, so that many
/// small drains take no more room than few large ones.
fn drain(
    kept: Batch,
    ring: &mut RingBuf<MapData>,
    mappings: &MappingEvents,
    batches: &SyncSender<Batch>,
    ledger: &Ledger,
) -> Batch {
    let mut batch = kept;
    let mut no_room = 0;
    // First, so that the samples that follow find them.
    let broken = mappings.take(|record| {
        if !batch.push_perf(record) {
            batch = offer(std::mem::take(&mut batch), batches, ledger).unwrap_or_default();
            no_room += u64::from(!batch.push_perf(record));
        }
    });
    ledger.lose_mappings(broken + no_room);
    loop {
        if !batch.has_room(RECORD_BYTES_MAX) {
            match offer(batch, batches, ledger) {
                Some(kept) => return kept,
                None => batch = Batch::default(),
            }
        }
        match ring.next() {
            Some(record) => batch.push(&record),
            None => return offer(batch, batches, ledger).unwrap_or_default(),
        };
    }
}

/// What is left: nothing is written any more.
fn finish(kept: Batch, ring: &mut RingBuf<MapData>, batches: &SyncSender<Batch>, ledger: &Ledger) {
    let mut batch = kept;
    while !batch.is_empty() && deliver(batch, batches, ledger) {
        batch = Batch::default();
        while batch.has_room(RECORD_BYTES_MAX) {
            let Some(record) = ring.next() else { break };
            batch.push(&record);
        }
    }
}

/// Hands a batch on, however long the worker has no room for it. `false`, and the batch is dropped, when there is none.
fn deliver(mut batch: Batch, batches: &SyncSender<Batch>, ledger: &Ledger) -> bool {
    enter(&mut batch, ledger);
    let sent = batches.send(batch);
    if let Err(SendError(batch)) = &sent {
        lose(batch, ledger);
    }
    sent.is_ok()
}

/// Hands a batch on, and gives it back where there is no room. Its samples wait for the worker either way.
pub(crate) fn offer(mut batch: Batch, batches: &SyncSender<Batch>, ledger: &Ledger) -> Option<Batch> {
    if batch.is_empty() {
        return None;
    }
    enter(&mut batch, ledger);
    match batches.try_send(batch) {
        Ok(()) => None,
        Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) => Some(batch),
    }
}

/// Counts the samples that have come to a batch.
fn enter(batch: &mut Batch, ledger: &Ledger) {
    for profile_type in ProfileType::ALL {
        let account = ledger.of(profile_type);
        let new = batch.samples.of(profile_type) - batch.entered.of(profile_type);
        account.add_drained(new);
        account.enter(Place::DrainQueue, new);
    }
    batch.entered = batch.samples;
}

/// Counts a batch as dropped.
fn lose(batch: &Batch, ledger: &Ledger) {
    let Batch { bytes: _, samples, execs, lives, perf_bytes: _, perf_records, entered: _ } = batch;
    for profile_type in ProfileType::ALL {
        let (account, samples) = (ledger.of(profile_type), *samples.of(profile_type));
        account.leave(Place::DrainQueue, samples);
        account.drop_events(Cause::DrainQueueFull, samples);
    }
    ledger.lose_execs(*execs);
    ledger.lose_lives(*lives);
    ledger.lose_mappings(*perf_records);
}

/// A record as the worker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// An on-CPU sample.
    Sample(RawSample),
    /// A sampled allocation. The sample's value is the number of bytes asked for.
    Alloc(RawSample, AllocPart),
    /// A sampled page fault at an address. The sample's value is the number of faults it stands for.
    PageFault(RawSample, Addr),
    /// A process has a new image.
    Exec(Exec),
    /// A cgroup was made.
    CgroupMade {
        /// Its id.
        id: u64,
    },
    /// A process has forked another.
    Fork(Fork),
    /// The process has ended.
    Exit {
        /// Process id.
        tgid: u32,
        /// As [`RawSample::start_ns`].
        start_ns: u64,
    },
}

/// A process that was forked, as its parent is until it execs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fork {
    /// Process id of the parent.
    pub(crate) parent: u32,
    /// Process id of the child.
    pub(crate) child: u32,
    /// Start of the child, as [`RawSample::start_ns`].
    pub(crate) start_ns: u64,
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
    /// Id of the task's cgroup.
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
    /// What is missing of the kernel frames.
    pub(crate) kernel_cut: Option<KernelCut>,
}

/// Why a kernel stack is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum KernelCut {
    /// As many frames as are ever taken: there may be more.
    DepthLimit,
    /// The sample was taken in kernel mode, and the kernel gave no stack.
    Refused,
}

impl KernelCut {
    /// Every way.
    pub(crate) const ALL: [Self; 2] = [Self::DepthLimit, Self::Refused];

    /// The name used in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::DepthLimit => "depth_limit",
            Self::Refused => "refused",
        }
    }

    fn of_flags(flags: u8) -> Option<Self> {
        if flags & FLAG_KERNEL_REFUSED != 0 {
            return Some(Self::Refused);
        }
        (flags & FLAG_KERNEL_CUT != 0).then_some(Self::DepthLimit)
    }
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
        RecordKind::Exec => {
            let (start_ns, cgroup_id) = (reader.u64()?, reader.u64()?);
            Some(Record::Exec(Exec { pid: tgid, start_ns, cgroup_id }))
        }
        RecordKind::Fork => {
            let (start_ns, _cgroup_id, parent) = (reader.u64()?, reader.u64()?, reader.u32()?);
            Some(Record::Fork(Fork { parent, child: tgid, start_ns }))
        }
        RecordKind::Exit => Some(Record::Exit { tgid, start_ns: reader.u64()? }),
        RecordKind::CgroupMade => Some(Record::CgroupMade { id: reader.u64()? }),
        kind @ (RecordKind::CpuSample | RecordKind::AllocSample | RecordKind::PageFault) => {
            if user_frames > USER_FRAMES_MAX || kernel_frames > KERNEL_FRAMES_MAX {
                return None;
            }
            let value = reader.u64()?;
            let cgroup_id = reader.u64()?;
            let start_ns = reader.u64()?;
            let thread_name = reader.array()?;
            let comm = reader.array()?;
            debug_assert_eq!(record.len() - reader.rest.len(), size_of::<SampleHeader>());
            let part = Part::read(kind, &mut reader)?;
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
                kernel_cut: KernelCut::of_flags(flags),
            };
            Some(match part {
                Part::None => Record::Sample(sample),
                Part::Alloc(part) => Record::Alloc(sample, part),
                Part::PageFault(address) => Record::PageFault(sample, address),
            })
        }
    }
}

/// What lies between the header and the frames.
enum Part {
    None,
    Alloc(AllocPart),
    PageFault(Addr),
}

impl Part {
    fn read(kind: RecordKind, reader: &mut Reader<'_>) -> Option<Self> {
        Some(match kind {
            RecordKind::AllocSample => Self::Alloc(alloc_part(reader)?),
            RecordKind::PageFault => Self::PageFault(Addr(reader.u64()?)),
            _ => Self::None,
        })
    }
}

fn alloc_part(reader: &mut Reader<'_>) -> Option<AllocPart> {
    let (pointer, target, rate) = (reader.u64()?, reader.u32()?, reader.u32()?);
    Some(AllocPart { pointer, target, rate, scale: reader.u32()?, flags: reader.u32()? })
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
        let by = if sample.by_tables { FLAG_TABLES } else { 0 };
        let cut = match sample.kernel_cut {
            None => 0,
            Some(KernelCut::DepthLimit) => FLAG_KERNEL_CUT,
            Some(KernelCut::Refused) => FLAG_KERNEL_REFUSED,
        };
        let mut bytes = vec![WIRE_VERSION, RecordKind::CpuSample as u8, sample.user_end as u8, by | cut];
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
    pub(crate) const PART: AllocPart =
        AllocPart { pointer: 0x5000, target: 3, rate: 1 << 19, scale: 3 << 15, flags: 1 };

    /// The bytes of a sampled allocation as the kernel side writes them; it has no kernel frames.
    pub(crate) fn encode_alloc(sample: &RawSample, part: AllocPart) -> Vec<u8> {
        let sample = RawSample { kernel: Vec::new(), ..sample.clone() };
        let mut bytes = encode(&sample);
        bytes[1] = RecordKind::AllocSample as u8;
        let AllocPart { pointer, target, rate, scale, flags } = part;
        let words = [target, rate, scale, flags].into_iter().flat_map(u32::to_ne_bytes);
        let header = size_of::<SampleHeader>();
        bytes.splice(header..header, pointer.to_ne_bytes().into_iter().chain(words));
        bytes
    }

    /// The bytes of a sampled page fault as the kernel side writes them.
    pub(crate) fn encode_page_fault(sample: &RawSample, address: Addr) -> Vec<u8> {
        let mut bytes = encode(&RawSample { kernel: Vec::new(), ..sample.clone() });
        bytes[1] = RecordKind::PageFault as u8;
        let header = size_of::<SampleHeader>();
        bytes.splice(header..header, address.0.to_ne_bytes());
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
            kernel_cut: None,
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
        Batch { samples: batch.samples, entered: batch.entered, ..shorter }
    }

    #[test]
    fn a_sample_is_read_back_as_it_was_written() {
        let sample = sample(5);
        assert_eq!(decode(&encode(&sample)), Some(Record::Sample(sample)));
    }

    #[test]
    fn a_deep_sample_whose_kernel_stack_is_cut_is_read_back() {
        let user = (0..USER_FRAMES_MAX as u64).map(|at| Frame::raw(at, true)).collect();
        let kernel = (0..KERNEL_FRAMES_MAX as u64).collect();
        let sample = RawSample { user, kernel, kernel_cut: Some(KernelCut::DepthLimit), ..sample(5) };
        assert_eq!(decode(&encode(&sample)), Some(Record::Sample(sample.clone())));
        let one_more = RawSample { user: [&sample.user[..], &sample.user[..1]].concat(), ..sample };
        assert_eq!(decode(&encode(&one_more)), None);
    }

    /// The bytes of a fork or an exit.
    fn process_record(kind: RecordKind) -> Vec<u8> {
        let mut bytes = vec![WIRE_VERSION, kind as u8, 0, 0, 0, 0, 0, 0];
        bytes.extend(8u32.to_ne_bytes());
        bytes.extend(8u32.to_ne_bytes());
        bytes.extend([1u64, 77, 5].map(u64::to_ne_bytes).concat());
        bytes.extend([7u32, 0].map(u32::to_ne_bytes).concat());
        bytes
    }

    #[test]
    fn forks_and_exits_are_read_back_and_truncated_ones_refused() {
        let fork = process_record(RecordKind::Fork);
        let expect = Fork { parent: 7, child: 8, start_ns: 77 };
        assert_eq!(decode(&fork), Some(Record::Fork(expect)));
        assert_eq!(decode(&fork[..42]), None);
        let exit = process_record(RecordKind::Exit);
        assert_eq!(decode(&exit), Some(Record::Exit { tgid: 8, start_ns: 77 }));
        assert_eq!(decode(&exit[..30]), None);
    }

    #[test]
    fn closing_the_other_end_ends_the_wait() {
        let [(ring, _ring), (mappings, _mappings), (stop, stopper)] =
            [(); 3].map(|()| std::io::pipe().expect("a pipe"));
        let alarm = Alarm::new(&ring, &mappings, stop).expect("descriptors");
        assert!(!alarm.wait(INTERVAL_MIN));
        drop(stopper);
        assert!(alarm.wait(INTERVAL_MIN));
    }

    #[test]
    fn a_sampled_allocation_is_read_back_as_it_was_written() {
        let sample = RawSample { kernel: Vec::new(), ..sample(5) };
        let bytes = encode_alloc(&sample, PART);
        assert_eq!(time_ns(&bytes), Some(sample.time_ns));
        assert_eq!(decode(&bytes), Some(Record::Alloc(sample, PART)));
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn a_sampled_page_fault_is_read_back_as_it_was_written() {
        let sample = RawSample { kernel: Vec::new(), ..sample(5) };
        let bytes = encode_page_fault(&sample, Addr(0x7000));
        assert_eq!(decode(&bytes), Some(Record::PageFault(sample, Addr(0x7000))));
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
        assert_eq!(*batch.samples().of(ProfileType::Cpu), 2);
        assert!(batch.records().eq(records.iter().map(Vec::as_slice)));
    }

    #[test]
    fn a_batch_keeps_the_records_of_programs_and_of_perf_events_apart_and_holds_no_more_of_both() {
        let mut batch = batch(&[encode(&sample(1))]);
        let record = [7; 1000];
        let taken = (0..100).take_while(|_| batch.push_perf(&record)).count();
        assert_eq!(taken, (BATCH_BYTES_MAX - batch.bytes.len()) / (LENGTH_BYTES + record.len()));
        assert_eq!((batch.records().count(), batch.perf_records().count()), (1, taken));
        assert!(batch.perf_records().all(|found| found == record));
        assert!(!batch.push(&record), "there is no room for either");
    }

    #[test]
    fn a_batch_that_is_kept_is_filled_on_and_its_samples_wait_once() {
        let ledger = Ledger::default();
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        assert!(offer(batch(&[encode(&sample(1))]), &sender, &ledger).is_none());
        let mut kept = offer(batch(&[encode(&sample(2))]), &sender, &ledger).expect("there is no room");
        assert!(kept.push(&encode(&sample(3))));
        let kept = offer(kept, &sender, &ledger).expect("there is no room");
        let account = ledger.of(ProfileType::Cpu);
        assert_eq!((account.drained(), account.waiting(Place::DrainQueue)), (3, 3));
        assert_eq!(receiver.recv().expect("the first").records().count(), 1);
        assert!(deliver(kept, &sender, &ledger));
        assert_eq!(receiver.recv().expect("the one that was kept").records().count(), 2);
        assert_eq!((account.drained(), account.dropped(Cause::DrainQueueFull)), (3, 0));
    }

    #[test]
    fn what_is_left_when_the_worker_is_gone_is_dropped_and_counted() {
        let ledger = Ledger::default();
        let (sender, receiver) = std::sync::mpsc::sync_channel(2);
        let batch = || {
            let mut batch = batch(&[encode(&sample(1))]);
            assert!(batch.push_perf(&[7; 8]));
            batch
        };
        assert!(deliver(batch(), &sender, &ledger));
        drop(receiver);
        assert!(!deliver(batch(), &sender, &ledger));
        assert_eq!(ledger.mappings_lost(), 1);
        let account = ledger.of(ProfileType::Cpu);
        assert_eq!((account.drained(), account.waiting(Place::DrainQueue)), (2, 1));
        assert_eq!(account.dropped(Cause::DrainQueueFull), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&bytes);
        }
    }
}
