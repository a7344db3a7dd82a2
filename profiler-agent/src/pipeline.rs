//! The way of a sample, stage by stage, and the order in which the stages stop.
//!
//! ```text
//! ring buffer ─ drain ─▶ batches ─ worker: normalize, label, window ─▶ closed windows ─ encoder ─▶ queues ─▶ uploads
//! ```
//! Each stage is one thread, each arrow a bounded channel. A stage stops when its input is closed: the drain first, then
//! the worker, the encoder, and last the uploads, so that what was taken is delivered or counted.

use std::{
    collections::{HashMap, VecDeque},
    io::PipeWriter,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya_log::EbpfLogger;
use profiler_common::{
    heap::{AllocPart, HeapCounter},
    stats::{Counter, Timed},
    wire::StackEnd,
};
use tokio::{runtime, sync::watch, task::JoinHandle as Task};
use tracing::{error, info, warn};

use crate::{
    addr::Addr,
    background::{Background, Payer, Task as Work},
    binaries::Binaries,
    bpf::{BpfError, HeapCounts, HeapSource, KernelCounts, LoadOptions, Programs},
    budget::{BpfTime, CpuShare, Direction, Governor, Sampling, Step, Use},
    config::{Config, Unwind},
    drain::{self, Progress, RawSample, Record},
    embedded,
    executable::ExecutableCache,
    export::{self, Batch, Collector, Destination, Losses, Queue, UploadCounts},
    faults::{Fault, FaultWindows},
    heap::{self, HeapGauges, HeapWindows, Live, LiveCounts, Notes, Orders},
    label::{CgroupNames, Labeler, SeriesLabels, fold_kworker, task_name},
    ledger::{Account, Balance, Cause, KernelTotals, Ledger, LeftOut, PerType, Place, ProfileType, Snapshot},
    mapping_events::MappingEvents,
    memory::MemoryPlan,
    normalize::{self, Location},
    process::{ImageReader, Processes, Sampled},
    symbolize::{self, DebugInfod, Fetcher, LocationKey, NameStore, Symbols},
    sys::{
        cgroup::Hierarchy,
        clock::{self, WallClock},
        cpu,
        perf_record::{self, Mapped, PerfRecord},
        threads::ThreadGroup,
        usage,
    },
    targets::Targets,
    telemetry::Gauges,
    unwind::{self, TableRequests, UnwindCounts, Unwinder},
    window::{Closed, Full, Measure, Room, SampleLabels, Windows},
};

/// Closed windows between worker and encoder. Each may hold megabytes; symbolizing is behind by seconds at most.
const CLOSED_MAX: usize = 8;
/// How long after its close a window waits for names. What is late leaves as an address; the next window has its name.
const SYMBOLS_DEADLINE: Duration = Duration::from_secs(2);
/// The same for a recording, which has no next window.
const RECORD_SYMBOLS_DEADLINE: Duration = Duration::from_secs(30);
/// New addresses are gathered for this part of a window, and no longer than the most, before they are symbolized: what came
/// in the last of it is all that a closed window has to wait for.
const GATHER_PART: u32 = 10;
const GATHER_MAX: Duration = Duration::from_secs(1);
/// How long the uploads have to finish at the end.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);
/// How long a stage has to finish at the end, beside what a window waits for names. One that reads from a file system that
/// hangs would keep the agent for ever.
const STAGE_DEADLINE: Duration = Duration::from_secs(10);
/// The worker looks after its tables this often.
const TICK: Duration = Duration::from_secs(1);
/// The drain passes a window's end within its interval; until then the worker looks again after this long.
const WAIT_MIN: Duration = Duration::from_millis(100);
/// Open executables, as a share of the limit of open files: the rest is for maps, sockets and reading `/proc`.
const OPEN_FILES_SHARE: u64 = 2;

/// Where closed windows go.
pub(crate) enum Sink {
    /// To a backend.
    Upload(Destination),
    /// Into one profile in this process.
    Collect(Arc<Collector>),
}

impl Sink {
    fn name(&self) -> String {
        match self {
            Self::Upload(destination) => destination.name(),
            Self::Collect(_) => "recording".to_owned(),
        }
    }

    /// How long a window of this length waits for names. Those that wait for CPU time come late in every window, and the
    /// encoder must keep up all the same; a recording has nothing behind it.
    fn patience(&self, window: Duration) -> Duration {
        match self {
            Self::Upload(_) => SYMBOLS_DEADLINE.min(window / 2),
            Self::Collect(_) => RECORD_SYMBOLS_DEADLINE,
        }
    }
}

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
    fn new(name: String, queue_bytes_max: usize) -> Self {
        let queue = Arc::new(Queue::with_bytes_max(queue_bytes_max));
        Self { name, queue, counts: Arc::default() }
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
    /// The sampling frequency, and what profiling takes.
    pub(crate) sampling: Arc<Sampling>,
    /// What work that does not follow the frequency may take.
    pub(crate) background: Arc<Background>,
    /// The bound of everything.
    pub(crate) memory: MemoryPlan,
    /// How well each binary unwinds and is named.
    pub(crate) binaries: Arc<Binaries>,
    /// The destinations.
    pub(crate) exporters: Arc<[Exporter]>,
}

impl Shared {
    fn new(
        exporters: Arc<[Exporter]>,
        memory: MemoryPlan,
        names: symbolize::Sources,
        background: Background,
    ) -> anyhow::Result<Self> {
        let background = Arc::new(background);
        let symbols =
            Symbols::start("/proc".as_ref(), &memory, names, &background).context("start the symbolizer")?;
        let symbols = Arc::new(symbols);
        let (ledger, gauges, unwind, sampling, binaries) = Default::default();
        Ok(Self { ledger, gauges, symbols, unwind, sampling, background, memory, binaries, exporters })
    }

    /// Reads every term of the account.
    fn snapshot(&self, kernel: impl Fn(ProfileType) -> KernelTotals) -> Snapshot {
        let totals = |exporter: &Exporter| (exporter.name.clone(), exporter.queue.totals());
        Snapshot::take(&self.ledger, kernel, self.exporters.iter().map(totals).collect())
    }
}

/// What metrics and the status line look at: the stages, and the counters of the kernel side.
#[derive(Clone)]
pub(crate) struct View {
    /// What the stages share.
    pub(crate) shared: Shared,
    /// Counted by the programs.
    pub(crate) kernel: KernelCounts,
    /// Heap profiling, once it is on.
    pub(crate) heap: Arc<OnceLock<HeapView>>,
}

/// What metrics look at of heap profiling.
#[derive(Clone)]
pub(crate) struct HeapView {
    /// Counted by the program.
    pub(crate) kernel: HeapCounts,
    /// What attaches.
    pub(crate) gauges: Arc<HeapGauges>,
    /// What is in use.
    pub(crate) live: Arc<LiveCounts>,
}

impl HeapView {
    /// A counter of the program's; 0 where it cannot be read.
    pub(crate) fn count(&self, counter: HeapCounter) -> u64 {
        self.kernel.get(counter).unwrap_or(0)
    }

    /// Copies the kernel side's drops to the ledger.
    fn take_drops(&self, ledger: &Ledger) {
        let drops = [
            (Cause::RingFull, HeapCounter::DroppedRingFull),
            (Cause::NoScratch, HeapCounter::DroppedNoScratch),
            (Cause::PendingFull, HeapCounter::DroppedPendingFull),
        ];
        for (cause, counter) in drops {
            ledger.of(ProfileType::Allocs).set_dropped(cause, self.count(counter));
        }
    }

    fn totals(&self) -> KernelTotals {
        KernelTotals { taken: self.count(HeapCounter::Taken), submitted: self.count(HeapCounter::Submitted) }
    }
}

impl View {
    /// Samples not taken: those that no target wants, those that another of the same target stands for, and those that turned
    /// out to be something else.
    pub(crate) fn not_taken(&self) -> Vec<(ProfileType, &'static str, u64)> {
        let counters = [
            (ProfileType::Cpu, "target", Counter::CpuFiltered),
            (ProfileType::Cpu, "frequency", Counter::CpuThinned),
            (ProfileType::PageFaults, "target", Counter::FaultFiltered),
        ];
        let in_kernel =
            counters.map(|(of, reason, counter)| (of, reason, self.kernel.get(counter).unwrap_or(0)));
        let faults = self.shared.ledger.of(ProfileType::PageFaults);
        let left_out =
            LeftOut::ALL.map(|reason| (ProfileType::PageFaults, reason.name(), faults.left_out(reason)));
        in_kernel.into_iter().chain(left_out).collect()
    }

    /// Processes that the kernel side had no room for.
    pub(crate) fn processes_not_kept(&self) -> u64 {
        let counters = [Counter::CpuProcessNotKept, Counter::ForkProcessNotKept];
        counters.into_iter().map(|counter| self.kernel.get(counter).unwrap_or(0)).sum()
    }

    /// Children of recorded families that there was no room for.
    pub(crate) fn families_not_followed(&self) -> u64 {
        self.kernel.get(Counter::FamilyNotFollowed).unwrap_or(0)
    }

    /// Records of new cgroups that the ring had no room for.
    pub(crate) fn cgroup_events_lost(&self) -> u64 {
        self.kernel.get(Counter::CgroupDroppedRingFull).unwrap_or(0)
    }

    /// Reads every term of the account. A counter that cannot be read counts as zero, which shows as a negative rest in
    /// the account, never as one that holds by accident.
    pub(crate) fn snapshot(&self) -> Snapshot {
        self.take_kernel_drops();
        let counter = |counter| self.kernel.get(counter).unwrap_or(0);
        self.shared.snapshot(|profile_type| match profile_type {
            ProfileType::Cpu => {
                KernelTotals { taken: counter(Counter::CpuTaken), submitted: counter(Counter::CpuSubmitted) }
            }
            ProfileType::Allocs => self.heap.get().map(HeapView::totals).unwrap_or_default(),
            ProfileType::PageFaults => KernelTotals {
                taken: counter(Counter::FaultTaken),
                submitted: counter(Counter::FaultSubmitted),
            },
        })
    }

    fn take_kernel_drops(&self) {
        take_kernel_drops(&self.kernel, &self.shared.ledger);
        if let Some(heap) = self.heap.get() {
            heap.take_drops(&self.shared.ledger);
        }
    }

    /// The same, taken again until no sample changed places meanwhile: then it is exact. Where that never happens, the
    /// last one, whose rest shows.
    pub(crate) async fn exact_snapshot(&self) -> Snapshot {
        const TRIES: usize = 50;
        const PAUSE: Duration = Duration::from_millis(2);
        for _ in 1..TRIES {
            let snapshot = self.snapshot();
            if snapshot.is_exact() {
                return snapshot;
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.snapshot()
    }
}

/// Copies the kernel side's drops to the ledger; the programs stay the only place where they are counted.
fn take_kernel_drops(kernel: &KernelCounts, ledger: &Ledger) {
    let drops = [
        (ProfileType::Cpu, Cause::RingFull, Counter::CpuDroppedRingFull),
        (ProfileType::Cpu, Cause::NoScratch, Counter::CpuDroppedNoScratch),
        (ProfileType::PageFaults, Cause::RingFull, Counter::FaultDroppedRingFull),
        (ProfileType::PageFaults, Cause::NoScratch, Counter::FaultDroppedNoScratch),
    ];
    for (of, cause, counter) in drops {
        if let Ok(events) = kernel.get(counter) {
            ledger.of(of).set_dropped(cause, events);
        }
    }
    if let Ok(records) = kernel.get(Counter::ExecDroppedRingFull) {
        ledger.set_execs_lost_in_ring(records);
    }
    let lives =
        [Counter::ForkDroppedRingFull, Counter::ExitDroppedRingFull].map(|counter| kernel.get(counter));
    if let [Ok(forks), Ok(exits)] = lives {
        ledger.set_lives_lost_in_ring(forks + exits);
    }
}

/// The running stages.
pub(crate) struct Pipeline {
    programs: Programs,
    /// The BPF programs' rare messages.
    messages: Option<EbpfLogger<&'static dyn log::Log>>,
    mappings: Arc<MappingEvents>,
    is_attached: bool,
    labelers: Sender<Labeler>,
    governor: Governor,
    meter: Meter,
    periods: Sender<NewPeriod>,
    view: View,
    uploads: Vec<Task<()>>,
    stop_drain: PipeWriter,
    drain: JoinHandle<()>,
    worker: JoinHandle<()>,
    unwinder: Option<JoinHandle<()>>,
    /// Where unwind tables are asked for.
    tables: Option<TableRequests>,
    heap: Heap,
    encoder: JoinHandle<()>,
    /// How long a window waits for names.
    symbols_deadline: Duration,
    stop_uploads: watch::Sender<Option<tokio::time::Instant>>,
}

impl Pipeline {
    /// Loads the programs and starts every stage; sampling begins with [`Self::resume`].
    pub(crate) fn start(
        config: &Config,
        sinks: Vec<Sink>,
        runtime: &runtime::Handle,
    ) -> anyhow::Result<Self> {
        let cpus = cpu::online("/sys".as_ref()).context("list the online CPUs")?.len();
        let cgroups = Hierarchy::find("/proc".as_ref());
        let options = LoadOptions {
            ring_bytes: ring_bytes(cpus).min(config.memory.ring_bytes_max),
            tables: (config.unwind == Unwind::Dwarf).then_some(config.memory.unwind),
            has_cpu: config.takes(ProfileType::Cpu),
            has_page_faults: config.takes(ProfileType::PageFaults),
            processes: u32::try_from(config.memory.processes).unwrap_or(u32::MAX),
            stack_depth: config.stack_depth,
            targets: config.targets.clone(),
            period_ns: config.period_ns(),
            cgroups: cgroups.as_ref().map(Hierarchy::version),
            sys_root: "/sys".into(),
        };
        let mut programs = Programs::load(&options).context("start the kernel side")?;
        let (labelers, new_labelers) = channel();
        let ring = programs.take_events()?;
        let messages = programs.take_logger();

        let (stop_uploads, upload_stop) = watch::channel(None);
        let queue_bytes_max = config.memory.upload_bytes / sinks.len().max(1);
        let exporters = sinks.iter().map(|to| Exporter::new(to.name(), queue_bytes_max));
        let background = Background::new(config.budget_term, Instant::now());
        let executables = executables(config.memory.executables);
        let names =
            symbolize::Sources { executables: Some(Arc::clone(&executables)), ..names(config, runtime) };
        let shared = Shared::new(exporters.collect(), config.memory, names, background)?;
        shared.background.allow(cpu_seconds(config.cpu_budget, cpus), Instant::now());
        let symbols_deadline =
            sinks.iter().map(|sink| sink.patience(config.window)).max().unwrap_or(SYMBOLS_DEADLINE);
        let uploads = start_uploads(sinks, &shared.exporters, runtime, &upload_stop)?;
        let view = View { shared: shared.clone(), kernel: programs.take_counts()?, heap: Arc::default() };
        let (drain_stop, stop_drain) = std::io::pipe().context("make a pipe")?;
        let mappings = MappingEvents::new(config.memory.mapping_rings_bytes);
        let mappings = Arc::new(mappings.context("make a set of descriptors")?);
        let drained_mappings = Arc::clone(&mappings);
        let alarm = drain::Alarm::new(&ring, &*mappings, drain_stop).context("make a set of descriptors")?;
        let progress = Arc::<Progress>::default();
        let (batch_sender, batches) = sync_channel(config.memory.drain_batches);
        let (closed_sender, closed) = sync_channel(CLOSED_MAX);

        let (tables, unwinder) = match config.unwind {
            Unwind::Dwarf => {
                let (tables, unwinder) = start_unwinder(&mut programs, &shared, &executables)?;
                (Some(tables), Some(unwinder))
            }
            Unwind::FramePointers => (None, None),
        };
        let labeler = Labeler::new(&config.node, &config.labels);
        let images = ImageReader::new("/proc".into(), Arc::clone(&executables));
        let names = CgroupNames::new(cgroups);
        let mut processes = Processes::new(images, labeler, names, tables.clone(), config.memory.processes);
        processes.set_period(config.period_ns());
        let room = Room::new(config.memory.windows_bytes);
        let windows =
            Windows::new(clock::boot_ns(), config.window, config.period_ns(), WallClock::now(), room.clone());
        let (heap_sender, new_heap) = channel();
        let parts = HeapParts {
            executables,
            tables: tables.clone(),
            room: room.clone(),
            windows: heap_sender,
            view: view.clone(),
        };
        let mut heap = Heap::New(programs.take_heap().map(|source| Box::new((source, parts))));
        heap.start(config)?;
        let (periods, new_periods) = channel();
        let worker = Worker {
            shared: shared.clone(),
            processes,
            windows,
            heap: None,
            new_heap,
            faults: None,
            window: config.window,
            room,
            periods: new_periods,
            closed: closed_sender,
            new_labelers,
            reads_ahead: Payer::new(&shared.background, Work::Processes),
        };
        let encoder = Encoder { shared: shared.clone(), symbols_deadline, reported: Default::default() };
        shared.sampling.set_hz(config.frequency_hz, config.frequency_hz);
        shared.sampling.set_budget(config.cpu_budget);
        let encoder_view = view.clone();
        let ledger = shared.ledger;
        let drained = Arc::clone(&progress);
        let pipeline = Self {
            is_attached: false,
            labelers,
            drain: spawn("drain", move || {
                drain::run(ring, &drained_mappings, &alarm, &batch_sender, &ledger, &drained);
            })?,
            worker: spawn("window", move || worker.run(&batches, &progress))?,
            encoder: spawn("encode", move || encoder.run(&closed, &encoder_view))?,
            symbols_deadline,
            unwinder,
            tables,
            heap,
            programs,
            messages,
            mappings,
            governor: Governor::new(config.cpu_budget, config.frequency_hz, config.budget_term),
            meter: Meter::new(config.uploads.is_empty()),
            periods,
            view,
            uploads,
            stop_drain,
            stop_uploads,
        };
        Ok(pipeline)
    }

    /// Whether the processes that ran at the start have their unwind tables, where there are any.
    pub(crate) fn has_scanned(&self) -> bool {
        self.unwinder.is_none()
            || self.view.shared.unwind.has_scanned.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Has the unwind tables of a process made, and waits for them until the deadline has passed.
    pub(crate) fn make_tables(&self, pid: u32, deadline: Duration) {
        if let Some(tables) = &self.tables {
            tables.request_and_wait(pid, deadline);
        }
    }

    /// Attaches everything and samples.
    pub(crate) fn resume(&mut self) -> anyhow::Result<()> {
        if let Err(error) = self.programs.start() {
            // Not half: what could be attached is not worth having.
            self.programs.stop();
            return Err(error).context("attach to the kernel");
        }
        self.follow_mappings();
        if let Heap::Runs(heap, _) = &self.heap {
            heap.resume();
        }
        self.is_attached = true;
        self.view.shared.gauges.set_paused(false);
        Ok(())
    }

    /// Detaches everything. What was sampled goes its way; the stages wait.
    pub(crate) fn pause(&mut self) {
        self.programs.stop();
        self.mappings.clear();
        self.view.shared.gauges.set_mapping_cpus(0);
        if let Heap::Runs(heap, _) = &self.heap {
            heap.pause();
        }
        self.is_attached = false;
        self.view.shared.gauges.set_paused(true);
    }

    /// Labels series anew, from the worker's next look at its tables on.
    pub(crate) fn set_labels(&self, node: &str, labels: &[(String, String)]) {
        // An error means that the worker is dead, which ends the agent.
        let labeler = Labeler::new(node, labels);
        let _ = self.labelers.send(labeler.clone());
        if let Heap::Runs(heap, _) = &self.heap {
            heap.set_labels(labeler);
        }
    }

    /// Profiles the heap of others from now on, or with another budget. What it needs is loaded when somebody is first meant.
    pub(crate) fn set_heap(&mut self, config: &Config) {
        if let Heap::Runs(heap, _) = &self.heap {
            heap.set_rules(config.heap.clone());
            return;
        }
        if let Err(error) = self.heap.start(config) {
            error!(error = %format!("{error:#}"), "no heap is profiled");
        }
        if let (Heap::Runs(heap, _), true) = (&self.heap, self.is_attached) {
            heap.resume();
        }
    }

    /// Samples other targets from now on. Where that fails, the old ones stay.
    pub(crate) fn set_targets(&mut self, targets: &Targets) -> Result<(), BpfError> {
        self.programs.set_targets(targets.clone())
    }

    /// Samples CPU time from now on, or no longer.
    pub(crate) fn set_cpu(&mut self, wanted: bool) -> Result<(), BpfError> {
        self.programs.set_cpu(wanted, self.is_attached)
    }

    /// Samples page faults from now on, or no longer.
    pub(crate) fn set_page_faults(&mut self, wanted: bool) -> Result<(), BpfError> {
        self.programs.set_page_faults(wanted, self.is_attached)
    }

    /// What metrics and the status line read.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// CPUs being sampled.
    pub(crate) fn cpus(&self) -> usize {
        self.programs.cpus()
    }

    /// Samples CPUs that have come online, and forgets those that are gone.
    pub(crate) fn follow_cpus(&mut self) {
        if !self.is_attached {
            return;
        }
        if let Err(error) = self.programs.follow_cgroups() {
            warn!(error = %format!("{:#}", anyhow::Error::from(error)), "look for the cgroups of targets");
        }
        if let Err(error) = self.programs.follow_cpus() {
            // Once a second at most, and only while sysfs cannot be read.
            warn!(error = %format!("{:#}", anyhow::Error::from(error)), "look for CPUs that came online");
        }
        self.follow_mappings();
    }

    /// Has the new mappings of the CPUs told that are online now.
    fn follow_mappings(&self) {
        // A list that cannot be read is told by those who sample the CPUs.
        if let Ok(online) = cpu::online("/sys".as_ref()) {
            self.mappings.follow(&online);
        }
        self.view.shared.gauges.set_mapping_cpus(self.mappings.cpus());
    }

    /// Samples so many times a second and CPU from now on, as far as the CPU budget lets it. The open window ends.
    pub(crate) fn set_frequency(&mut self, hz: u32) -> Result<(), BpfError> {
        self.governor.want(hz);
        self.apply_frequency()
    }

    fn apply_frequency(&mut self) -> Result<(), BpfError> {
        let hz = self.governor.hz();
        self.view.shared.sampling.set_hz(hz, self.governor.wanted_hz());
        let period_ns = period_ns(hz);
        // Told first: who gets a sample of the new period knows of it.
        let told = self.periods.send(NewPeriod { period_ns, at_ns: clock::boot_ns() });
        if told.is_err() {
            // The worker is dead, which ends the agent.
            return Ok(());
        }
        self.programs.set_period(period_ns)
    }

    /// Looks at what profiling takes of the CPUs, and lowers or restores the frequency. To be called about once a second.
    pub(crate) fn keep_to_budget(&mut self) {
        let Shared { sampling, background, .. } = &self.view.shared;
        let cpus = self.programs.cpus();
        background.allow(cpu_seconds(sampling.budget(), cpus.max(1)), Instant::now());
        let taken = background.taken();
        let Some((used, elapsed)) = self.meter.read(&self.view.kernel, cpus, sampling, taken) else {
            return;
        };
        // Without CPUs that are sampled nothing is to be learned: sampling is paused.
        let Some(step) = (self.programs.cpus() > 0).then(|| self.governor.observe(used, elapsed)).flatten()
        else {
            return;
        };
        let Step { hz, direction, used } = step;
        sampling.count(direction);
        let (used, budget) =
            (format!("{:.3}%", used * 100.0), sampling.budget().map(|budget| budget.to_string()));
        match direction {
            Direction::Down => warn!(hz, used, budget, "above the CPU budget: sampling less often"),
            Direction::Up => info!(hz, used, budget, "well below the CPU budget: sampling more often"),
        }
        if let Err(error) = self.apply_frequency() {
            warn!(error = %format!("{:#}", anyhow::Error::from(error)), hz, "change the sampling frequency");
        }
    }

    /// Has what the BPF programs say in the log.
    pub(crate) fn forward_messages(&mut self) {
        if let Some(messages) = &mut self.messages {
            messages.flush();
        }
    }

    /// A stage that has ended by itself, which none does but by a panic.
    pub(crate) fn dead_stage(&self) -> Option<&str> {
        let all = [&self.drain, &self.worker, &self.encoder].into_iter().chain(&self.unwinder);
        let mut threads = all.chain(self.heap.thread());
        let thread = threads.find(|thread| thread.is_finished());
        let name = thread.map(|thread| thread.thread().name().unwrap_or("unnamed"));
        let upload = self.uploads.iter().any(Task::is_finished).then_some("upload");
        name.or_else(|| self.view.shared.symbols.dead_thread()).or(upload)
    }

    /// Stops sampling, lets every stage finish what it has, and gives the final account.
    pub(crate) fn stop(mut self, runtime: &runtime::Handle) -> Stopped {
        self.programs.stop();
        // The unwind thread ends when nobody can ask it any more.
        self.tables = None;
        let heap = self.heap.stop();
        // Probes are out before the last drain, so that no allocation is sampled behind it.
        let detached = join_in_order(heap, STAGE_DEADLINE);
        drop(self.stop_drain);
        let stages = [self.drain, self.worker, self.encoder].into_iter().chain(self.unwinder);
        let failure = detached.and(join_in_order(stages, STAGE_DEADLINE + self.symbols_deadline)).err();
        let symbolizers = join_in_order(self.view.shared.symbols.close(), STAGE_DEADLINE);
        let failure = failure.or(unless_still_reading(symbolizers).err());
        self.stop_uploads.send_replace(Some((Instant::now() + FLUSH_DEADLINE).into()));
        for exporter in self.view.shared.exporters.iter() {
            exporter.queue.close();
        }
        for upload in self.uploads {
            // The tasks hold to the deadline themselves; a panic in one shows as events that still wait.
            let _ = runtime.block_on(upload);
        }
        Stopped { balances: self.view.snapshot().balances(), failure }
    }
}

/// The sampling period of a frequency, in nanoseconds of CPU time.
pub(crate) fn period_ns(hz: u32) -> u64 {
    1_000_000_000 / u64::from(hz.max(1))
}

/// A share of so many CPUs, in seconds of CPU time a second.
fn cpu_seconds(budget: Option<CpuShare>, cpus: usize) -> Option<f64> {
    budget.map(|budget| budget.ratio() * cpus as f64)
}

/// From `at_ns` of the boot clock on, samples are taken with another period.
#[derive(Clone, Copy, Debug)]
struct NewPeriod {
    period_ns: u64,
    at_ns: u64,
}

/// Threads of the embedded backend, by name. What they take is not what profiling costs: sampling less often makes no
/// query cheaper.
const BACKEND_THREADS: &[&str] = &[embedded::THREAD_NAME, "wal-writer", "store-maintain"];

/// Measures what profiling takes: the agent's threads but for the embedded backend's, and the programs in the kernel.
struct Meter {
    /// `None`: there is no embedded backend.
    backend: Option<ThreadGroup>,
    /// As `Timed::ALL`.
    bpf: [BpfTime; Timed::ALL.len()],
    at: Instant,
    taken: Duration,
    background: Duration,
    recent: VecDeque<Use>,
}

impl Meter {
    /// Readings that the shown use is a mean of: those of ten seconds.
    const RECENT_MAX: usize = 10;

    fn new(has_backend: bool) -> Self {
        Self {
            backend: has_backend.then(|| ThreadGroup::new(BACKEND_THREADS)),
            bpf: Default::default(),
            at: Instant::now(),
            taken: Duration::ZERO,
            background: Duration::ZERO,
            recent: VecDeque::new(),
        }
    }

    /// What was used since the last call. `None` where the counters cannot be read, which the next call makes up for.
    fn read(
        &mut self,
        kernel: &KernelCounts,
        cpus: usize,
        sampling: &Sampling,
        background: Duration,
    ) -> Option<(Use, Duration)> {
        let count = |counter| kernel.get(counter).ok();
        for (programs, time) in Timed::ALL.into_iter().zip(&mut self.bpf) {
            time.update(count(programs.runs())?, count(programs.timed())?, count(programs.timed_ns())?);
        }
        let bpf = self.bpf.each_ref().map(BpfTime::total);
        let backend = self.backend.as_mut().map(ThreadGroup::cpu_time).unwrap_or_default();
        let taken = usage::cpu_time().saturating_sub(backend) + bpf.iter().sum::<Duration>();
        let (now, cpus) = (Instant::now(), u32::try_from(cpus).unwrap_or(u32::MAX));
        let elapsed = now - self.at;
        let used = Use {
            taken: taken.saturating_sub(self.taken),
            background: background.saturating_sub(self.background),
            available: elapsed.saturating_mul(cpus),
        };
        (self.at, self.taken, self.background) = (now, taken, background);
        if self.recent.len() == Self::RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(used);
        sampling.set_used(self.recent.iter().copied().sum::<Use>().ratio());
        sampling.set_times(bpf, backend);
        Some((used, elapsed))
    }
}

/// How the stages ended.
pub(crate) struct Stopped {
    /// The final account of every destination.
    pub(crate) balances: Vec<Balance>,
    /// The stage that did not end as it should.
    pub(crate) failure: Option<StageError>,
}

/// A stage that did not end as it should. The account shows what it lost.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StageError {
    #[error("stage {stage} ended by a panic")]
    Panic { stage: String },
    #[error("stage {stage} did not stop within {deadline:?}: what it holds is counted as waiting")]
    Hangs { stage: String, deadline: Duration },
}

/// Joins stages, each of which ends when the one before it has. Those behind one that hangs are left running, for they
/// wait for it; those behind a panic are not, and the first failure is told.
fn join_in_order(
    stages: impl IntoIterator<Item = JoinHandle<()>>,
    deadline: Duration,
) -> Result<(), StageError> {
    let mut result = Ok(());
    for thread in stages {
        let joined = join(thread, deadline);
        let hangs = matches!(joined, Err(StageError::Hangs { .. }));
        result = result.and(joined);
        if hangs {
            break;
        }
    }
    result
}

/// Nobody asks for names any more, and no sample waits for them: a symbolizer that is still in a large file has lost nothing,
/// the next agent reads it again.
fn unless_still_reading(symbolizers: Result<(), StageError>) -> Result<(), StageError> {
    match symbolizers {
        Err(StageError::Hangs { stage, deadline }) => {
            info!(%stage, ?deadline, "names were still being read at the end; the next agent reads them again");
            Ok(())
        }
        ended => ended,
    }
}

fn join(thread: JoinHandle<()>, deadline: Duration) -> Result<(), StageError> {
    const POLL: Duration = Duration::from_millis(5);
    let stage = thread.thread().name().unwrap_or_default().to_owned();
    let end = Instant::now() + deadline;
    while !thread.is_finished() {
        if Instant::now() >= end {
            return Err(StageError::Hangs { stage, deadline });
        }
        thread::sleep(POLL);
    }
    thread.join().map_err(|_panic| StageError::Panic { stage })
}

fn spawn(name: &str, stage: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(stage).with_context(|| format!("start thread {name}"))
}

/// Room for a second of samples at 200 Hz from every CPU, 256 bytes each, but not less than the default.
/// The CPUs are those of the machine: all are sampled, however few the agent itself may use.
fn ring_bytes(cpus: usize) -> u32 {
    let wanted = u32::try_from(cpus * 200 * 256).unwrap_or(u32::MAX / 2);
    wanted.clamp(profiler_common::limits::EVENTS_BYTES, 16 << 20).next_power_of_two()
}

/// What the symbolizer has beside the files of this machine. Without any of it, all is had anew with each start.
fn names(config: &Config, runtime: &runtime::Handle) -> symbolize::Sources {
    let store = NameStore::open(config.cache_dir.join("names")).map(Arc::new);
    let store = or_warn(store, "names are not kept on disk, and read again after a restart");
    let gather = GATHER_MAX.min(config.window / GATHER_PART);
    symbolize::Sources { store, fetcher: fetcher(config, runtime), executables: None, gather }
}

fn fetcher(config: &Config, runtime: &runtime::Handle) -> Option<Fetcher> {
    if config.debuginfod_urls.is_empty() {
        return None;
    }
    let directory = config.cache_dir.join("debuginfod");
    let fetcher = DebugInfod::open(&config.debuginfod_urls, directory, runtime.clone());
    or_warn(fetcher, "no server is asked for debug information")
}

fn or_warn<T, E: std::error::Error + Send + Sync + 'static>(result: Result<T, E>, lack: &str) -> Option<T> {
    result.map_err(|error| warn!(error = %format!("{:#}", anyhow::Error::from(error)), "{lack}")).ok()
}

fn executables(most: usize) -> Arc<ExecutableCache> {
    let open_files = crate::sys::limits::raise_open_files().unwrap_or(1024);
    let executables = usize::try_from(open_files / OPEN_FILES_SHARE).unwrap_or(usize::MAX);
    Arc::new(ExecutableCache::new(executables.min(most)))
}

fn start_unwinder(
    programs: &mut Programs,
    shared: &Shared,
    executables: &Arc<ExecutableCache>,
) -> anyhow::Result<(TableRequests, JoinHandle<()>)> {
    let maps = programs.take_unwind_maps()?;
    let images = ImageReader::new("/proc".into(), Arc::clone(executables));
    let payer = Payer::new(&shared.background, Work::Tables);
    let unwinder = Unwinder::new(maps, shared.memory.unwind, images, Arc::clone(&shared.unwind), payer);
    let (tables, requests) = unwind::requests(Arc::clone(&shared.unwind));
    Ok((tables, spawn("unwind", move || unwinder.run(&requests))?))
}

/// Heap profiling.
enum Heap {
    /// Nobody's heap was ever to be profiled; with what it takes to begin. `None` where that was tried in vain.
    New(Option<Box<(HeapSource, HeapParts)>>),
    /// How to tell what attaches what to do, and its thread.
    Runs(Orders, JoinHandle<()>),
}

/// What heap profiling has of the other stages.
struct HeapParts {
    executables: Arc<ExecutableCache>,
    /// Where unwind tables of processes whose heap is profiled are asked for.
    tables: Option<TableRequests>,
    room: Room,
    /// Gives the worker its part.
    windows: Sender<HeapWindows>,
    view: View,
}

impl Heap {
    /// Starts it where a rule wants it. Where the kernel cannot do it, all else goes on.
    fn start(&mut self, config: &Config) -> anyhow::Result<()> {
        let Self::New(parts) = self else { return Ok(()) };
        if config.heap.list.is_empty() {
            return Ok(());
        }
        let Some((source, parts)) = parts.take().map(|parts| *parts) else { return Ok(()) };
        let (program, live, kernel) = match source.load(config.heap_options.live_max) {
            Ok(heap) => heap,
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                error!(error, "no heap is profiled");
                return Ok(());
            }
        };
        let HeapParts { executables, tables, room, windows: to_worker, view } = parts;
        let heap = HeapView { kernel, gauges: Arc::default(), live: Arc::default() };
        let images = || ImageReader::new("/proc".into(), Arc::clone(&executables));
        let labeler = Labeler::new(&config.node, &config.labels);
        let processes = Processes::new(images(), labeler, CgroupNames::new(None), tables, 0);
        let notes = Notes::default();
        let live = Live::new(live, notes.clone(), Arc::clone(&heap.live));
        let gauges = Arc::clone(&heap.gauges);
        let (rules, options) = (config.heap.clone(), config.heap_options.clone());
        let profiler =
            heap::Profiler::new(program, rules, options, (processes, images()), notes.clone(), gauges);
        let (orders, told) = heap::orders();
        let windows = Windows::new(clock::boot_ns(), config.window, 0, WallClock::now(), room.clone());
        // An error means that the worker is dead, which ends the agent. Before the first probe, so that no sample is ahead of it.
        let _ = to_worker.send(HeapWindows::new(windows, live, orders.clone(), notes, room));
        // It is set once: what it is made of has just been taken.
        let _ = view.heap.set(heap);
        *self = Self::Runs(orders, spawn("heap", move || profiler.run(&told))?);
        Ok(())
    }

    fn thread(&self) -> Option<&JoinHandle<()>> {
        match self {
            Self::New(_) => None,
            Self::Runs(_, thread) => Some(thread),
        }
    }

    /// Has all probes taken out, and gives the thread to join.
    fn stop(self) -> Option<JoinHandle<()>> {
        match self {
            Self::New(_) => None,
            Self::Runs(orders, thread) => {
                orders.stop();
                Some(thread)
            }
        }
    }
}

fn start_uploads(
    sinks: Vec<Sink>,
    exporters: &[Exporter],
    runtime: &runtime::Handle,
    stop: &watch::Receiver<Option<tokio::time::Instant>>,
) -> anyhow::Result<Vec<Task<()>>> {
    let start = |(sink, exporter): (Sink, &Exporter)| {
        let Exporter { name: _, queue, counts } = exporter;
        let (queue, counts) = (Arc::clone(queue), Arc::clone(counts));
        match sink {
            Sink::Upload(destination) => {
                let client = destination.client().context("set up the HTTP client")?;
                Ok(runtime.spawn(export::upload(client, destination, queue, counts, stop.clone())))
            }
            Sink::Collect(collector) => Ok(runtime.spawn(export::collect(collector, queue))),
        }
    };
    sinks.into_iter().zip(exporters).map(start).collect()
}

/// Events of processes that were lost since the start.
#[derive(Clone, Copy, Debug, Default)]
struct LostEvents {
    execs: u64,
    mappings: u64,
}

/// Normalizes, labels and counts. The only owner of the process table and the open windows.
struct Worker {
    shared: Shared,
    processes: Processes,
    windows: Windows,
    heap: Option<HeapWindows>,
    /// Where that comes from when it is first wanted.
    new_heap: Receiver<HeapWindows>,
    /// Made with the first page fault.
    faults: Option<FaultWindows>,
    /// What one profile covers.
    window: Duration,
    room: Room,
    periods: Receiver<NewPeriod>,
    closed: SyncSender<Handed>,
    /// Labelers that are to be used from now on.
    new_labelers: Receiver<Labeler>,
    /// For processes read ahead of their first sample.
    reads_ahead: Payer,
}

impl Worker {
    fn run(mut self, batches: &Receiver<drain::Batch>, progress: &Progress) {
        let mut looked_after = Instant::now();
        let mut lost = LostEvents::default();
        loop {
            let wait = clock::until(self.windows.next_end_ns()).clamp(WAIT_MIN, TICK);
            let fresh = self.processes.next_fresh();
            let wait = fresh.map_or(wait, |due| wait.min(due.saturating_duration_since(Instant::now())));
            match batches.recv_timeout(wait) {
                Ok(batch) => self.take(&batch),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            // Read before the channel is emptied: what the drain had come to by then has been taken below.
            let complete_ns = progress.get();
            batches.try_iter().for_each(|batch| self.take(&batch));
            self.read_ahead();
            for window in self.close_due(complete_ns) {
                self.hand_on(window);
            }
            if looked_after.elapsed() >= TICK {
                looked_after = Instant::now();
                lost = self.look_after_processes(lost);
            }
        }
        let now_ns = clock::boot_ns();
        let allocs = self.heap.as_mut().map(|heap| heap.close_all(now_ns)).unwrap_or_default();
        let faults = self.faults.as_mut().map(|faults| faults.close_all(now_ns)).unwrap_or_default();
        for window in self.windows.close_all(now_ns).into_iter().chain(allocs).chain(faults) {
            self.finish(window);
        }
    }

    /// Closed windows of samples, of allocations and what is in use, and of page faults.
    fn close_due(&mut self, complete_ns: u64) -> Vec<Closed> {
        let now = WallClock::now();
        let mut closed = self.windows.close_due(complete_ns, now);
        if let Some(heap) = &mut self.heap {
            closed.extend(heap.close_due(complete_ns, now));
        }
        if let Some(faults) = &mut self.faults {
            closed.extend(faults.close_due(complete_ns, now));
        }
        closed
    }

    /// Reads processes with a new image; those there is no CPU time for are left to their first sample.
    fn read_ahead(&mut self) {
        let now = Instant::now();
        if self.processes.next_fresh().is_none_or(|due| due > now) {
            return;
        }
        if self.reads_ahead.wait(now).is_some() {
            self.processes.skip_fresh(now);
            return;
        }
        self.reads_ahead.begin();
        self.processes.read_fresh(now);
        self.reads_ahead.pay();
    }

    /// Keeps the process table true and small. Gives what was lost so far.
    fn look_after_processes(&mut self, before: LostEvents) -> LostEvents {
        let ledger = &self.shared.ledger;
        let lost = LostEvents { execs: ledger.execs_lost(), mappings: ledger.mappings_lost() };
        if lost.execs > before.execs {
            warn!(lost = lost.execs - before.execs, "exec events were lost; all processes are read again");
            self.processes.forget_all();
        }
        if lost.mappings > before.mappings {
            self.processes.doubt_mappings();
        }
        if self.shared.gauges.is_paused() {
            // Nobody says which of them exec meanwhile.
            self.processes.forget_all();
        }
        if let Some(labeler) = self.new_labelers.try_iter().last() {
            self.processes.set_labeler(labeler);
            if let Some(heap) = &mut self.heap {
                heap.relabel(|pid| self.processes.series_of(pid));
            }
        }
        self.processes.forget_idle();
        self.processes.forget_exited();
        self.shared.gauges.set_processes(&self.processes);
        self.shared.gauges.set_late(self.windows.late());
        lost
    }

    /// What CPUs' rings say of new mappings.
    fn take_mappings(&mut self, batch: &drain::Batch) {
        for record in batch.perf_records() {
            match perf_record::parse(record) {
                Some(PerfRecord::Mapped(mapped)) => self.add_mapping(&mapped),
                Some(PerfRecord::Lost(records)) => self.shared.ledger.lose_mappings(records),
                Some(PerfRecord::Other) => {}
                None => self.shared.ledger.lose_mappings(1),
            }
        }
    }

    /// Opens what a known process has mapped, where there is CPU time for it.
    fn add_mapping(&mut self, mapped: &Mapped<'_>) {
        if !self.processes.is_news(mapped) {
            return;
        }
        if self.reads_ahead.wait(Instant::now()).is_some() {
            return self.processes.defer_mapping(mapped.pid);
        }
        self.reads_ahead.begin();
        self.processes.add_mapping(mapped);
        self.reads_ahead.pay();
    }

    /// Takes a batch. Its samples stop waiting in the channel one by one, each when it is counted elsewhere.
    fn take(&mut self, batch: &drain::Batch) {
        for NewPeriod { period_ns, at_ns } in self.periods.try_iter() {
            self.windows.set_period(period_ns, at_ns);
            self.processes.set_period(period_ns);
        }
        self.take_mappings(batch);
        if let Ok(heap) = self.new_heap.try_recv() {
            self.heap = Some(heap);
        }
        let mut samples_left = batch.samples();
        let records: Vec<_> = batch.records().map(|record| (record, drain::decode(record))).collect();
        let mut execs = Execs::in_records(records.iter().filter_map(|(_, record)| record.as_ref()));
        for (bytes, record) in records {
            match record {
                Some(Record::Sample(raw)) => {
                    *samples_left.of_mut(ProfileType::Cpu) -= 1;
                    self.add(&raw, execs.are_ahead(raw.tgid));
                }
                Some(Record::Alloc(raw, part)) => {
                    *samples_left.of_mut(ProfileType::Allocs) -= 1;
                    self.add_alloc(&raw, part, execs.are_ahead(raw.tgid));
                }
                Some(Record::PageFault(raw, address)) => {
                    *samples_left.of_mut(ProfileType::PageFaults) -= 1;
                    self.add_page_fault(&raw, address, execs.are_ahead(raw.tgid));
                }
                Some(Record::Exec(exec)) => {
                    execs.pass(exec.pid);
                    if let Some(heap) = &self.heap {
                        heap.orders.exec(exec.pid, drain::time_ns(bytes).unwrap_or(u64::MAX));
                    }
                    self.processes.exec(exec, Instant::now());
                }
                Some(Record::CgroupMade { id }) => self.processes.cgroup_made(id),
                Some(Record::Fork(fork)) => {
                    if let Some(heap) = &self.heap {
                        heap.orders.fork(fork.parent, fork.child);
                    }
                    self.processes.fork(fork);
                }
                Some(Record::Exit { tgid, start_ns }) => self.processes.exit(tgid, start_ns),
                None => match drain::sample_type(bytes) {
                    Some(profile_type) => {
                        *samples_left.of_mut(profile_type) -= 1;
                        self.account(profile_type).leave(Place::DrainQueue, 1);
                        self.account(profile_type).drop_events(Cause::Malformed, 1);
                    }
                    None => self.shared.ledger.lose_execs(1),
                },
            }
        }
        self.processes.tell_lives();
        // What the batch was said to hold and did not shows in the account.
        for profile_type in ProfileType::ALL {
            self.account(profile_type).leave(Place::DrainQueue, *samples_left.of(profile_type));
        }
    }

    fn account(&self, profile_type: ProfileType) -> &Account {
        self.shared.ledger.of(profile_type)
    }

    /// Whose sample it is, its labels, and its stack.
    fn place(&mut self, raw: &RawSample, exec_is_ahead: bool) -> (SeriesLabels, SampleLabels, Vec<Location>) {
        let comm = fold_kworker(&task_name(&raw.comm));
        let thread_name = fold_kworker(&task_name(&raw.thread_name));
        let comm = if comm.is_empty() { thread_name.clone() } else { comm };
        let sampled =
            Sampled { pid: raw.tgid, start_ns: raw.start_ns, cgroup_id: raw.cgroup_id, comm: &comm };
        let process =
            if exec_is_ahead { self.processes.get_before_exec(sampled) } else { self.processes.get(sampled) };
        let series = process.series.clone();
        let stack = normalize::stack(raw, &mut self.processes);
        if lacks_tables(raw) {
            self.processes.lacks_tables(raw.tgid);
        }
        if raw.user_end != StackEnd::NoUserStack && self.processes.is_first_sample(raw.tgid) {
            self.shared.gauges.count_first_stack(raw.by_tables);
        }
        self.shared.gauges.count_stack(raw.user_end, raw.by_tables);
        if let Some(cut) = raw.kernel_cut {
            self.shared.gauges.count_kernel_cut(cut);
        }
        (series, SampleLabels { comm, thread_name, pid: raw.tgid }, stack)
    }

    fn add(&mut self, raw: &RawSample, exec_is_ahead: bool) {
        let (series, labels, stack) = self.place(raw, exec_is_ahead);
        let prefetch = prefetch(&self.shared.symbols);
        let added = self.windows.at(raw.time_ns).add(series, labels, stack, raw.value, prefetch);
        self.count_added(ProfileType::Cpu, added);
    }

    fn add_alloc(&mut self, raw: &RawSample, part: AllocPart, exec_is_ahead: bool) {
        let placed = self.place(raw, exec_is_ahead);
        let prefetch = prefetch(&self.shared.symbols);
        let added = match &mut self.heap {
            Some(heap) => heap.add(placed, (raw.time_ns, raw.value), part, prefetch),
            None => Err(Full),
        };
        self.count_added(ProfileType::Allocs, added);
    }

    fn add_page_fault(&mut self, raw: &RawSample, address: Addr, exec_is_ahead: bool) {
        let (window, room) = (self.window, &self.room);
        let faults = self.faults.get_or_insert_with(|| FaultWindows::new(raw.time_ns, window, room.clone()));
        let bytes = match faults.look(raw.tgid, address) {
            Fault::Anonymous { bytes } => bytes,
            Fault::File => return self.leave_out_page_fault(LeftOut::FilePage),
            Fault::Gone => return self.leave_out_page_fault(LeftOut::PageGone),
        };
        let placed = self.place(raw, exec_is_ahead);
        let prefetch = prefetch(&self.shared.symbols);
        let added = match &mut self.faults {
            Some(faults) => faults.add(placed, raw.time_ns, (raw.value, bytes), prefetch),
            None => Err(Full),
        };
        self.count_added(ProfileType::PageFaults, added);
    }

    fn leave_out_page_fault(&self, reason: LeftOut) {
        let account = self.account(ProfileType::PageFaults);
        account.leave(Place::DrainQueue, 1);
        account.leave_out(reason);
    }

    /// A sample has left the channel for its window.
    fn count_added(&self, profile_type: ProfileType, added: Result<(), Full>) {
        let account = self.account(profile_type);
        account.leave(Place::DrainQueue, 1);
        match added {
            Ok(()) => account.enter(Place::Window, 1),
            Err(Full) => account.drop_events(Cause::WindowFull, 1),
        }
    }

    /// The last windows wait for the encoder as long as it takes.
    fn finish(&self, window: Closed) {
        self.pass_on(window, |encoder, handed| encoder.send(handed).is_ok());
    }

    /// Gives a closed window to the encoder, unless that is too far behind.
    fn hand_on(&self, window: Closed) {
        self.pass_on(window, |encoder, handed| encoder.try_send(handed).is_ok());
    }

    /// Moves a window's samples, counted from what it holds, to the encoder or to the dropped ones.
    fn pass_on(&self, window: Closed, send: impl FnOnce(&SyncSender<Handed>, Handed) -> bool) {
        let ledger = self.account(window.measure.profile_type());
        let samples = window.samples;
        ledger.leave(Place::Window, samples);
        if window.series.is_empty() {
            return;
        }
        ledger.enter(Place::EncodeQueue, samples);
        if !send(&self.closed, Handed { window, at: Instant::now() }) {
            ledger.leave(Place::EncodeQueue, samples);
            ledger.drop_events(Cause::EncodeQueueFull, samples);
        }
    }
}

/// Asks for the symbols of a location that is new to its window.
fn prefetch(symbols: &Symbols) -> impl FnMut(&Location) {
    |location| {
        if let Location::Code(key) = location {
            symbols.prefetch(key.clone());
        }
    }
}

/// The execs of a batch that are still ahead of a record in it, by process.
struct Execs {
    ahead: HashMap<u32, usize>,
}

impl Execs {
    fn in_records<'a>(records: impl Iterator<Item = &'a Record>) -> Self {
        let mut ahead = HashMap::new();
        for record in records {
            if let Record::Exec(exec) = record {
                *ahead.entry(exec.pid).or_default() += 1;
            }
        }
        Self { ahead }
    }

    fn are_ahead(&self, tgid: u32) -> bool {
        self.ahead.get(&tgid).is_some_and(|&execs| execs > 0)
    }

    fn pass(&mut self, tgid: u32) {
        if let Some(execs) = self.ahead.get_mut(&tgid) {
            *execs -= 1;
        }
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

/// A closed window on its way to the encoder.
struct Handed {
    window: Closed,
    /// When it was closed: waiting for the encoder is waiting for names, too.
    at: Instant,
}

/// Names the frames of closed windows, encodes them and gives them to every destination.
struct Encoder {
    shared: Shared,
    /// Losses already told in a profile, by type.
    reported: PerType<Losses>,
    /// How long after its close a window waits for names.
    symbols_deadline: Duration,
}

impl Encoder {
    fn run(mut self, closed: &Receiver<Handed>, view: &View) {
        for handed in closed {
            view.take_kernel_drops();
            let losses = self.new_losses(handed.window.measure.profile_type());
            self.export(&handed, &losses);
        }
    }

    fn export(&self, handed: &Handed, losses: &Losses) {
        let Shared { ledger, gauges, symbols, binaries, exporters, .. } = &self.shared;
        let Handed { window, at } = handed;
        let resolved = symbols.resolve(code_locations(window), *at + self.patience(window));
        let encoded = export::encode(window, &resolved, losses);
        let account = ledger.of(window.measure.profile_type());
        account.leave(Place::EncodeQueue, window.samples);
        match encoded {
            Ok(encoded) => {
                if window.measure == Measure::Cpu {
                    gauges.set_quality(encoded.quality);
                    binaries.add(window, &resolved);
                }
                for exporter in exporters.iter() {
                    encoded.batches.iter().for_each(|batch: &Batch| exporter.queue.push(batch.clone()));
                }
            }
            Err(error) => {
                error!(%error, samples = window.samples, "window not encoded and dropped");
                account.drop_events(Cause::EncodeFailed, window.samples);
            }
        }
    }

    /// Names that wait for CPU time come late in every window: the encoder must keep up all the same. A recording has
    /// nothing behind it.
    fn patience(&self, window: &Closed) -> Duration {
        let half = Duration::from_nanos(window.duration_ns / 2);
        let longest = self.symbols_deadline;
        if longest > SYMBOLS_DEADLINE { longest } else { longest.min(half) }
    }

    /// Samples of a type lost since its last window, by cause.
    fn new_losses(&mut self, profile_type: ProfileType) -> Losses {
        let account = self.shared.ledger.of(profile_type);
        let reported = self.reported.of_mut(profile_type);
        let total: Losses = Cause::ALL.iter().map(|&cause| (cause.name(), account.dropped(cause))).collect();
        let before =
            |name| reported.iter().find(|(known, _)| *known == name).map_or(0, |&(_, events)| events);
        let new = total
            .iter()
            .map(|&(name, events)| (name, events.saturating_sub(before(name))))
            .filter(|&(_, events)| events > 0);
        let new = new.collect();
        *reported = total;
        new
    }
}

fn code_locations(window: &Closed) -> impl Iterator<Item = LocationKey> {
    window.locations.iter().filter_map(|location| match location {
        Location::Code(key) => Some(key.clone()),
        Location::Unnamed { .. } | Location::Marker(_) | Location::KernelMarker(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::tests::{batch, encode, sample, without};

    /// Sends a batch through worker and encoder to a destination that nobody serves, and gives its account. `between`
    /// sees the batch after the drain and before the worker.
    fn account(records: &[Vec<u8>], between: impl FnOnce(drain::Batch) -> drain::Batch) -> Balance {
        let shared = {
            let memory = MemoryPlan::for_limit(128 << 20, false).expect("enough");
            let nobody = Exporter::new("nobody".to_owned(), memory.upload_bytes);
            let background = Background::new(crate::budget::TERM, Instant::now());
            Shared::new([nobody].into(), memory, symbolize::Sources::default(), background)
                .expect("threads can be had")
        };
        let (closed_sender, closed) = sync_channel(CLOSED_MAX);
        let (drain_sender, drained) = sync_channel(shared.memory.drain_batches);
        let (batch_sender, batches) = sync_channel(shared.memory.drain_batches);
        let now = clock::boot_ns();
        let images = ImageReader::new("/proc".into(), Arc::new(ExecutableCache::new(8)));
        let processes = Processes::new(images, Labeler::new("n", &[]), CgroupNames::new(None), None, 8);
        let room = Room::new(shared.memory.windows_bytes);
        let windows = Windows::new(now, Duration::from_secs(10), 52_631_578, WallClock::now(), room.clone());
        let ((_, periods), (_, new_labelers), (_, new_heap)) = (channel(), channel(), channel());
        let worker = Worker {
            shared: shared.clone(),
            processes,
            windows,
            heap: None,
            new_heap,
            faults: None,
            window: Duration::from_secs(10),
            room,
            periods,
            closed: closed_sender,
            new_labelers,
            reads_ahead: Payer::new(&shared.background, Work::Processes),
        };
        let symbols_deadline = SYMBOLS_DEADLINE;
        let encoder = Encoder { shared: shared.clone(), symbols_deadline, reported: Default::default() };

        assert!(drain::offer(batch(records), &drain_sender, &shared.ledger).is_none());
        let passed_on = between(drained.recv().expect("the batch that was sent"));
        batch_sender.send(passed_on).expect("the channel has room");
        drop(batch_sender);
        worker.run(&batches, &Progress::default());
        closed.iter().for_each(|handed| encoder.export(&handed, &Losses::new()));
        let taken = records.len() as u64;
        let snapshot = shared.snapshot(|profile_type| match profile_type {
            ProfileType::Cpu => KernelTotals { taken, submitted: taken },
            ProfileType::Allocs | ProfileType::PageFaults => KernelTotals::default(),
        });
        snapshot.balances().pop().expect("one destination")
    }

    fn records() -> Vec<Vec<u8>> {
        let now = clock::boot_ns();
        (0..10).map(|index| encode(&sample(now + index))).collect()
    }

    #[test]
    fn the_ring_grows_with_the_cpus_of_the_machine() {
        assert_eq!(ring_bytes(1), profiler_common::limits::EVENTS_BYTES);
        assert_eq!(ring_bytes(128), 8 << 20);
        assert_eq!(ring_bytes(16_384), 16 << 20);
    }

    #[test]
    fn a_stage_that_hangs_and_those_behind_it_are_left_behind() {
        let (sender, never) = channel::<()>();
        let hangs = spawn("hangs", move || assert!(never.recv().is_err())).expect("a thread");
        let (_sender, behind) = channel::<()>();
        let behind = spawn("behind", move || assert!(behind.recv().is_err())).expect("a thread");
        let deadline = Duration::from_millis(20);
        let expect = StageError::Hangs { stage: "hangs".to_owned(), deadline };
        assert_eq!(join_in_order([hangs, behind], deadline), Err(expect));
        drop(sender);
    }

    #[test]
    fn a_symbolizer_that_still_reads_at_the_end_is_no_failure_and_one_that_panics_is() {
        let hangs = StageError::Hangs { stage: "symbolize".to_owned(), deadline: STAGE_DEADLINE };
        assert_eq!(unless_still_reading(Err(hangs)), Ok(()));
        let panic = StageError::Panic { stage: "symbolize".to_owned() };
        assert_eq!(
            unless_still_reading(Err(panic)),
            Err(StageError::Panic { stage: "symbolize".to_owned() })
        );
    }

    #[test]
    fn a_panic_of_a_stage_is_told_and_the_others_are_joined() {
        let panics = spawn("panics", || panic!("as the test wants")).expect("a thread");
        let (done, is_done) = channel();
        let behind = spawn("behind", move || done.send(()).expect("a receiver")).expect("a thread");
        let joined = join_in_order([panics, behind], Duration::from_secs(60));
        assert_eq!(joined, Err(StageError::Panic { stage: "panics".to_owned() }));
        assert_eq!(is_done.try_recv(), Ok(()));
    }

    #[test]
    fn every_sample_is_accounted_for() {
        let balance = account(&records(), |batch| batch);
        assert_eq!(balance.unaccounted(), 0, "{balance}");
        assert_eq!(balance.waiting, [("upload_queue", 10)], "{balance}");
    }

    #[test]
    fn a_record_deleted_between_drain_and_window_shows_in_the_account() {
        let balance = account(&records(), |batch| without(&batch, 4));
        assert_eq!(balance.unaccounted(), 1, "{balance}");
    }

    #[test]
    fn a_record_that_cannot_be_read_is_counted_as_malformed() {
        let mut records = records();
        records[4].truncate(40);
        let balance = account(&records, |batch| batch);
        assert_eq!(balance.unaccounted(), 0, "{balance}");
        assert_eq!(balance.dropped, [("malformed", 1)], "{balance}");
    }
}
