//! The way of a sample, stage by stage, and the order in which the stages stop.
//!
//! ```text
//! ring buffer ─ drain ─▶ batches ─ worker: normalize, label, window ─▶ closed windows ─ encoder ─▶ queues ─▶ uploads
//! ```
//! Each stage is one thread, each arrow a bounded channel. A stage stops when its input is closed: the drain first, then
//! the worker, the encoder, and last the uploads, so that what was taken is delivered or counted.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use profiler_common::{stats::Counter, wire::StackEnd};
use reqwest::Client;
use tokio::{runtime, sync::watch, task::JoinHandle as Task};
use tracing::error;

use crate::{
    bpf::{KernelCounts, LoadOptions, Programs},
    config::{Config, Unwind},
    drain::{self, BATCHES_MAX, RawSample, Record},
    executable::ExecutableCache,
    export::{self, Batch, Destination, Losses, Queue, UploadCounts},
    label::{Labeler, fold_kworker, task_name},
    ledger::{Balance, Cause, Ledger, Place},
    normalize::{self, Location},
    process::{ImageReader, Processes},
    symbolize::{self, LocationKey, Symbols},
    sys::clock::{self, WallClock},
    telemetry::Gauges,
    unwind::{self, TableRequests, UnwindCounts, Unwinder},
    window::{Closed, SampleLabels, Windows},
};

/// Closed windows between worker and encoder. Each may hold megabytes; symbolizing is behind by seconds at most.
const CLOSED_MAX: usize = 8;
/// How long a closed window waits for names. What is late leaves as an address; the next window has its name.
const SYMBOLS_DEADLINE: Duration = Duration::from_secs(2);
/// How long the uploads have to finish at the end.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);
/// A backend that does not answer a connection for so long is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The worker looks after its tables at least this often.
const TICK: Duration = Duration::from_secs(1);
/// Open executables, as a share of the limit of open files: the rest is for maps, sockets and reading `/proc`.
const OPEN_FILES_SHARE: u64 = 2;
const EXECUTABLES_MAX: u64 = 8192;

/// One destination and its queue.
pub(crate) struct Exporter {
    /// As the user named it, without credentials.
    pub(crate) name: String,
    /// What waits for it.
    pub(crate) queue: Arc<Queue>,
    /// What its uploads did.
    pub(crate) counts: Arc<UploadCounts>,
}

impl Exporter {
    fn new(name: String) -> Self {
        Self { name, queue: Arc::default(), counts: Arc::default() }
    }
}

/// What the stages share with each other and with those who look at them.
#[derive(Clone)]
pub(crate) struct Shared {
    /// The account of samples.
    pub(crate) ledger: Arc<Ledger>,
    /// Sizes and rates of now.
    pub(crate) gauges: Arc<Gauges>,
    /// The symbolizer.
    pub(crate) symbols: Arc<Symbols>,
    /// Unwind tables.
    pub(crate) unwind: Arc<UnwindCounts>,
    /// The destinations.
    pub(crate) exporters: Arc<[Exporter]>,
}

impl Shared {
    fn new(exporters: Arc<[Exporter]>) -> anyhow::Result<Self> {
        let symbols =
            Symbols::start("/proc".as_ref(), symbolize::CACHE_BYTES_MAX).context("start the symbolizer")?;
        let symbols = Arc::new(symbols);
        let (ledger, gauges, unwind) = Default::default();
        Ok(Self { ledger, gauges, symbols, unwind, exporters })
    }

    /// The account of every destination, for so many samples taken.
    fn balances(&self, taken: u64) -> Vec<Balance> {
        let balance =
            |exporter: &Exporter| Balance::new(taken, &self.ledger, &exporter.name, exporter.queue.totals());
        self.exporters.iter().map(balance).collect()
    }
}

/// What metrics and the status line look at: the stages, and the counters of the kernel side.
#[derive(Clone)]
pub(crate) struct View {
    /// What the stages share.
    pub(crate) shared: Shared,
    /// Counted by the programs.
    pub(crate) kernel: KernelCounts,
}

impl View {
    /// Samples taken. A counter that cannot be read counts as zero, which shows as a negative rest in the account, never
    /// as one that holds by accident.
    pub(crate) fn taken(&self) -> u64 {
        self.kernel.get(Counter::CpuTaken).unwrap_or(0)
    }

    /// The account of every destination.
    pub(crate) fn balances(&self) -> Vec<Balance> {
        take_kernel_drops(&self.kernel, &self.shared.ledger);
        self.shared.balances(self.taken())
    }
}

/// Copies the kernel side's drops to the ledger; the programs stay the only place where they are counted.
fn take_kernel_drops(kernel: &KernelCounts, ledger: &Ledger) {
    let drops =
        [(Cause::RingFull, Counter::CpuDroppedRingFull), (Cause::NoScratch, Counter::CpuDroppedNoScratch)];
    for (cause, counter) in drops {
        if let Ok(events) = kernel.get(counter) {
            ledger.set_dropped(cause, events);
        }
    }
}

/// The running stages.
pub(crate) struct Pipeline {
    programs: Programs,
    view: View,
    uploads: Vec<Task<()>>,
    stop_drain: Sender<()>,
    drain: JoinHandle<()>,
    worker: JoinHandle<()>,
    unwinder: Option<JoinHandle<()>>,
    encoder: JoinHandle<()>,
    stop_uploads: watch::Sender<Option<tokio::time::Instant>>,
}

impl Pipeline {
    /// Loads the programs, starts every stage and then sampling.
    pub(crate) fn start(
        config: &Config,
        destinations: Vec<Destination>,
        runtime: &runtime::Handle,
    ) -> anyhow::Result<Self> {
        let options = LoadOptions {
            ring_bytes: ring_bytes(),
            has_tables: config.unwind == Unwind::Dwarf,
            period_ns: config.period_ns(),
            sys_root: "/sys".into(),
        };
        let mut programs = Programs::load(&options).context("start the kernel side")?;
        let ring = programs.take_events()?;
        forward_messages(&mut programs, runtime);

        let (stop_uploads, upload_stop) = watch::channel(None);
        let shared = Shared::new(destinations.iter().map(|to| Exporter::new(to.name())).collect())?;
        let uploads = start_uploads(destinations, &shared.exporters, runtime, &upload_stop)?;
        let view = View { shared: shared.clone(), kernel: programs.take_counts()? };
        let (stop_drain, drain_stop) = channel();
        let (batch_sender, batches) = sync_channel(BATCHES_MAX);
        let (closed_sender, closed) = sync_channel(CLOSED_MAX);

        let executables = executables();
        let (tables, unwinder) = match config.unwind {
            Unwind::Dwarf => {
                let (tables, unwinder) = start_unwinder(&mut programs, &shared, &executables)?;
                (Some(tables), Some(unwinder))
            }
            Unwind::FramePointers => (None, None),
        };
        let labeler = Labeler::new(&config.node, &config.labels);
        let processes = Processes::new(ImageReader::new("/proc".into(), executables), labeler, tables);
        let windows = Windows::new(clock::boot_ns(), config.window, config.period_ns(), WallClock::now());
        let worker = Worker { shared: shared.clone(), processes, windows, closed: closed_sender };
        let encoder = Encoder { shared: shared.clone(), reported: Losses::new() };
        let kernel = view.kernel.clone();
        let ledger = shared.ledger;
        let pipeline = Self {
            drain: spawn("drain", move || drain::run(ring, &batch_sender, &ledger, &drain_stop))?,
            worker: spawn("window", move || worker.run(&batches))?,
            encoder: spawn("encode", move || encoder.run(&closed, &kernel))?,
            unwinder,
            programs,
            view,
            uploads,
            stop_drain,
            stop_uploads,
        };
        pipeline.programs.start()?;
        Ok(pipeline)
    }

    /// What metrics and the status line read.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// CPUs being sampled.
    pub(crate) fn cpus(&self) -> usize {
        self.programs.cpus()
    }

    /// Stops sampling, lets every stage finish what it has, and gives the final account.
    pub(crate) fn stop(mut self, runtime: &runtime::Handle) -> Vec<Balance> {
        self.programs.stop();
        drop(self.stop_drain);
        let stages = [self.drain, self.worker, self.encoder];
        for stage in stages.into_iter().chain(self.unwinder) {
            let name = stage.thread().name().unwrap_or_default().to_owned();
            if stage.join().is_err() {
                error!(stage = name, "a stage ended by a panic; the account below shows what it lost");
            }
        }
        self.stop_uploads.send_replace(Some((Instant::now() + FLUSH_DEADLINE).into()));
        for exporter in self.view.shared.exporters.iter() {
            exporter.queue.close();
        }
        for upload in self.uploads {
            // The tasks hold to the deadline themselves; a panic in one shows as events that still wait.
            let _ = runtime.block_on(upload);
        }
        self.view.balances()
    }
}

fn spawn(name: &str, stage: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(stage).with_context(|| format!("start thread {name}"))
}

/// Room for a second of samples at 200 Hz from every CPU, 256 bytes each, but not less than the default.
fn ring_bytes() -> u32 {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let wanted = u32::try_from(cpus * 200 * 256).unwrap_or(u32::MAX / 2);
    wanted.clamp(profiler_common::limits::EVENTS_BYTES, 16 << 20).next_power_of_two()
}

fn executables() -> Arc<ExecutableCache> {
    let open_files = crate::sys::limits::raise_open_files().unwrap_or(1024);
    let executables = usize::try_from((open_files / OPEN_FILES_SHARE).min(EXECUTABLES_MAX)).unwrap_or(256);
    Arc::new(ExecutableCache::new(executables))
}

fn start_unwinder(
    programs: &mut Programs,
    shared: &Shared,
    executables: &Arc<ExecutableCache>,
) -> anyhow::Result<(TableRequests, JoinHandle<()>)> {
    let maps = programs.take_unwind_maps()?;
    let images = ImageReader::new("/proc".into(), Arc::clone(executables));
    let unwinder = Unwinder::new(maps, images, Arc::clone(&shared.unwind));
    let (tables, requests) = unwind::requests(Arc::clone(&shared.unwind));
    Ok((tables, spawn("unwind", move || unwinder.run(&requests))?))
}

/// The BPF programs' rare messages become log lines.
fn forward_messages(programs: &mut Programs, runtime: &runtime::Handle) {
    let Some(mut logger) = programs.take_logger() else { return };
    runtime.spawn(async move {
        let mut tick = tokio::time::interval(TICK);
        loop {
            tick.tick().await;
            logger.flush();
        }
    });
}

fn start_uploads(
    destinations: Vec<Destination>,
    exporters: &[Exporter],
    runtime: &runtime::Handle,
    stop: &watch::Receiver<Option<tokio::time::Instant>>,
) -> anyhow::Result<Vec<Task<()>>> {
    let client =
        Client::builder().connect_timeout(CONNECT_TIMEOUT).build().context("set up the HTTP client")?;
    let start = |(destination, exporter): (Destination, &Exporter)| {
        let Exporter { name: _, queue, counts } = exporter;
        let upload =
            export::upload(client.clone(), destination, Arc::clone(queue), Arc::clone(counts), stop.clone());
        runtime.spawn(upload)
    };
    Ok(destinations.into_iter().zip(exporters).map(start).collect())
}

/// Normalizes, labels and counts. The only owner of the process table and the open windows.
struct Worker {
    shared: Shared,
    processes: Processes,
    windows: Windows,
    closed: SyncSender<Closed>,
}

impl Worker {
    fn run(mut self, batches: &Receiver<drain::Batch>) {
        loop {
            let wait = clock::until(self.windows.next_due_ns()).min(TICK);
            match batches.recv_timeout(wait) {
                Ok(batch) => self.take(&batch),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            for window in self.windows.close_due(clock::boot_ns(), WallClock::now()) {
                self.processes.forget_idle();
                self.hand_on(window);
            }
            self.update_gauges();
        }
        for window in self.windows.close_all(clock::boot_ns()) {
            self.hand_on(window);
        }
    }

    /// Takes a batch. Its samples stop waiting in the channel; what becomes of each is counted one by one.
    fn take(&mut self, batch: &drain::Batch) {
        self.shared.ledger.leave(Place::DrainQueue, batch.samples());
        for record in batch.records() {
            match drain::decode(record) {
                Some(Record::Sample(raw)) => self.add(&raw),
                Some(Record::Exec { tgid }) => self.processes.exec(tgid),
                None => self.shared.ledger.drop_events(Cause::Malformed, 1),
            }
        }
    }

    fn add(&mut self, raw: &RawSample) {
        let comm = fold_kworker(&task_name(&raw.comm));
        let thread_name = fold_kworker(&task_name(&raw.thread_name));
        let comm = if comm.is_empty() { thread_name.clone() } else { comm };
        let series = self.processes.get(raw.tgid, raw.start_ns, &comm).series.clone();
        let stack = normalize::stack(raw, &mut self.processes);
        if lacks_tables(raw) {
            self.processes.lacks_tables(raw.tgid);
        }
        let labels = SampleLabels { comm, thread_name, pid: raw.tgid };
        let symbols = &self.shared.symbols;
        let prefetch = |location: &Location| {
            if let Location::Code(key) = location {
                symbols.prefetch(key.clone());
            }
        };
        self.shared.gauges.count_stack(raw.user_end, raw.by_tables);
        match self.windows.at(raw.time_ns).add(series, labels, stack, raw.value, prefetch) {
            Ok(()) => self.shared.ledger.enter(Place::Window, 1),
            Err(_full) => self.shared.ledger.drop_events(Cause::WindowFull, 1),
        }
    }

    /// Gives a closed window to the encoder; its samples are counted from what it holds.
    fn hand_on(&self, window: Closed) {
        let ledger = &self.shared.ledger;
        let samples = window.samples;
        ledger.leave(Place::Window, samples);
        if samples == 0 {
            return;
        }
        ledger.enter(Place::EncodeQueue, samples);
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.closed.try_send(window) {
            ledger.leave(Place::EncodeQueue, samples);
            ledger.drop_events(Cause::EncodeQueueFull, samples);
        }
    }

    fn update_gauges(&self) {
        let gauges = &self.shared.gauges;
        gauges.set_processes(&self.processes);
        gauges.set_late(self.windows.late());
    }
}

/// Whether better tables would have led further: the process had none, or they do not know its latest mappings.
fn lacks_tables(raw: &RawSample) -> bool {
    match raw.user_end {
        StackEnd::NoUserStack | StackEnd::NoRegisters => false,
        StackEnd::NoMapping => true,
        _ => !raw.by_tables,
    }
}

/// Names the frames of closed windows, encodes them and gives them to every destination.
struct Encoder {
    shared: Shared,
    /// Losses already told in a profile.
    reported: Losses,
}

impl Encoder {
    fn run(mut self, closed: &Receiver<Closed>, kernel: &KernelCounts) {
        for window in closed {
            take_kernel_drops(kernel, &self.shared.ledger);
            let losses = self.new_losses();
            self.export(&window, &losses);
        }
    }

    fn export(&self, window: &Closed, losses: &Losses) {
        let Shared { ledger, gauges, symbols, exporters, .. } = &self.shared;
        let resolved = symbols.resolve(code_locations(window), Instant::now() + SYMBOLS_DEADLINE);
        let encoded = export::encode(window, &resolved, losses);
        ledger.leave(Place::EncodeQueue, window.samples);
        match encoded {
            Ok(encoded) => {
                gauges.set_quality(encoded.quality);
                for exporter in exporters.iter() {
                    encoded.batches.iter().for_each(|batch: &Batch| exporter.queue.push(batch.clone()));
                }
            }
            Err(error) => {
                error!(%error, samples = window.samples, "window not encoded and dropped");
                ledger.drop_events(Cause::EncodeFailed, window.samples);
            }
        }
    }

    /// Samples lost since the last window, by cause.
    fn new_losses(&mut self) -> Losses {
        let total: Losses =
            Cause::ALL.iter().map(|&cause| (cause.name(), self.shared.ledger.dropped(cause))).collect();
        let before =
            |name| self.reported.iter().find(|(known, _)| *known == name).map_or(0, |&(_, events)| events);
        let new = total
            .iter()
            .map(|&(name, events)| (name, events - before(name)))
            .filter(|&(_, events)| events > 0);
        let new = new.collect();
        self.reported = total;
        new
    }
}

fn code_locations(window: &Closed) -> impl Iterator<Item = LocationKey> {
    window.locations.iter().filter_map(|location| match location {
        Location::Code(key) => Some(key.clone()),
        Location::Unnamed { .. } | Location::Marker(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::tests::{batch, encode, sample};

    /// Sends a batch of samples through worker and encoder to a destination that nobody serves, and gives its account.
    fn account(taken: u64, records: &[Vec<u8>]) -> Balance {
        let shared = Shared::new([Exporter::new("nobody".to_owned())].into()).expect("threads can be had");
        let (closed_sender, closed) = sync_channel(CLOSED_MAX);
        let (batch_sender, batches) = sync_channel(BATCHES_MAX);
        let now = clock::boot_ns();
        let images = ImageReader::new("/proc".into(), Arc::new(ExecutableCache::new(8)));
        let processes = Processes::new(images, Labeler::new("n", &[]), None);
        let windows = Windows::new(now, Duration::from_secs(10), 52_631_578, WallClock::now());
        let worker = Worker { shared: shared.clone(), processes, windows, closed: closed_sender };
        let encoder = Encoder { shared: shared.clone(), reported: Losses::new() };

        drain::send(batch(records), &batch_sender, &shared.ledger);
        drop(batch_sender);
        worker.run(&batches);
        closed.iter().for_each(|window| encoder.export(&window, &Losses::new()));
        let mut balances = shared.balances(taken);
        balances.pop().expect("one destination")
    }

    fn records() -> Vec<Vec<u8>> {
        let now = clock::boot_ns();
        (0..10).map(|index| encode(&sample(now + index))).collect()
    }

    #[test]
    fn every_sample_is_accounted_for() {
        let balance = account(10, &records());
        assert_eq!(balance.unaccounted(), 0, "{balance}");
        assert_eq!(balance.waiting, [("upload_queue", 10)], "{balance}");
    }

    #[test]
    fn a_record_deleted_between_drain_and_window_shows_in_the_account() {
        let mut records = records();
        records.remove(4);
        let balance = account(10, &records);
        assert_eq!(balance.unaccounted(), 1, "{balance}");
    }

    #[test]
    fn a_record_that_cannot_be_read_is_counted_as_malformed() {
        let mut records = records();
        records[4].truncate(40);
        let balance = account(10, &records);
        assert_eq!(balance.unaccounted(), 0, "{balance}");
        assert_eq!(balance.dropped, [("malformed", 1)], "{balance}");
    }
}
