//! What the agent says about itself: log lines, metrics, the status line.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use profiler_common::{heap::HeapCounter, stats::Counter, wire::StackEnd};

use crate::{
    background::Background,
    binaries::Binaries,
    budget::{CpuShare, Sampling},
    drain::KernelCut,
    export::Quality,
    label::NameCounts,
    ledger::{ProfileType, Snapshot},
    memory::MemoryPlan,
    pipeline::{Exporter, HeapView, Shared, View},
    process::{ProcessCounts, Processes},
    status::Health,
    symbolize,
    sys::usage,
    unwind::UnwindCounts,
};

/// Sizes and rates of now, written by the stages.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    stacks: [AtomicU64; StackEnd::ALL.len()],
    kernel_cuts: [AtomicU64; KernelCut::ALL.len()],
    walked_by_tables: AtomicU64,
    walked_by_frame_pointers: AtomicU64,
    first_by_tables: AtomicU64,
    first_by_frame_pointers: AtomicU64,
    processes: AtomicU64,
    containers: AtomicU64,
    executables: AtomicU64,
    process_counts: Mutex<ProcessCounts>,
    cgroups: Mutex<NameCounts>,
    mapping_cpus: AtomicU64,
    late: AtomicU64,
    named: AtomicU64,
    unnamed: AtomicU64,
    is_paused: AtomicBool,
    reloads_accepted: AtomicU64,
    reloads_refused: AtomicU64,
}

impl Gauges {
    /// One stack, by its end and by how it was walked.
    pub(crate) fn count_stack(&self, end: StackEnd, by_tables: bool) {
        let walked = if by_tables { &self.walked_by_tables } else { &self.walked_by_frame_pointers };
        walked.fetch_add(u64::from(end != StackEnd::NoUserStack), Relaxed);
        let slot = StackEnd::ALL.iter().position(|&known| known == end).expect("ALL holds every end");
        self.stacks[slot].fetch_add(1, Relaxed);
    }

    /// The first stack of a process, or of its new image, by how it was walked.
    pub(crate) fn count_first_stack(&self, by_tables: bool) {
        let walked = if by_tables { &self.first_by_tables } else { &self.first_by_frame_pointers };
        walked.fetch_add(1, Relaxed);
    }

    /// A kernel stack that is not whole.
    pub(crate) fn count_kernel_cut(&self, cut: KernelCut) {
        let slot = KernelCut::ALL.iter().position(|&known| known == cut).expect("ALL holds every way");
        self.kernel_cuts[slot].fetch_add(1, Relaxed);
    }

    /// The state of the process table.
    pub(crate) fn set_processes(&self, processes: &Processes) {
        self.processes.store(processes.len() as u64, Relaxed);
        self.containers.store(processes.containers() as u64, Relaxed);
        self.executables.store(processes.executables() as u64, Relaxed);
        *self.process_counts.lock().unwrap_or_else(PoisonError::into_inner) = processes.counts();
        *self.cgroups.lock().unwrap_or_else(PoisonError::into_inner) = processes.cgroups();
    }

    /// CPUs whose new executable mappings are told.
    pub(crate) fn set_mapping_cpus(&self, cpus: usize) {
        self.mapping_cpus.store(cpus as u64, Relaxed);
    }

    /// Samples that came after their window had closed.
    pub(crate) fn set_late(&self, late: u64) {
        self.late.store(late, Relaxed);
    }

    /// Names in the last window.
    pub(crate) fn set_quality(&self, quality: Quality) {
        self.named.store(quality.named, Relaxed);
        self.unnamed.store(quality.unnamed, Relaxed);
    }

    /// User stacks that end at their root, and all of them.
    fn complete(&self) -> (u64, u64) {
        self.stacks().fold((0, 0), |(complete, all), (end, count)| {
            (complete + if end.is_complete() { count } else { 0 }, all + count)
        })
    }

    /// First stacks that were walked by tables, and all of them.
    fn first_stacks(&self) -> (u64, u64) {
        let (tables, others) =
            (self.first_by_tables.load(Relaxed), self.first_by_frame_pointers.load(Relaxed));
        (tables, tables + others)
    }

    /// Named frames of the last window, and all of them.
    fn named(&self) -> (u64, u64) {
        let (named, unnamed) = (self.named.load(Relaxed), self.unnamed.load(Relaxed));
        (named, named + unnamed)
    }

    /// Whether nothing is attached to the kernel, for somebody has said so.
    pub(crate) fn set_paused(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Relaxed);
    }

    /// Whether nothing is attached to the kernel.
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused.load(Relaxed)
    }

    /// The configuration was read again; it was accepted or not.
    pub(crate) fn count_reload(&self, is_accepted: bool) {
        let count = if is_accepted { &self.reloads_accepted } else { &self.reloads_refused };
        count.fetch_add(1, Relaxed);
    }

    fn stacks(&self) -> impl Iterator<Item = (StackEnd, u64)> {
        StackEnd::ALL.into_iter().zip(self.stacks.iter().map(|count| count.load(Relaxed)))
    }
}

/// What `/status` says of how it goes.
pub(crate) fn health(view: &View) -> Health {
    let gauges = &view.shared.gauges;
    let ((complete, all), (named, frames)) = (gauges.complete(), gauges.named());
    let ratio = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
    let (first_by_tables, first) = gauges.first_stacks();
    Health {
        first_by_tables_ratio: ratio(first_by_tables, first),
        families_not_followed: view.families_not_followed(),
        processes: gauges.processes.load(Relaxed),
        containers: gauges.containers.load(Relaxed),
        complete_ratio: ratio(complete, all),
        named_ratio: ratio(named, frames),
        cpu_seconds: usage::cpu_time().as_secs_f64(),
        resident_bytes: usage::resident_bytes(),
        sampling: view.shared.sampling.to_string(),
        memory: view.shared.memory.to_string(),
    }
}

/// The Prometheus text format, version 0.0.4.
pub(crate) fn metrics(view: &View, snapshot: &Snapshot) -> String {
    let mut text = Text::default();
    let shared = &view.shared;
    samples(&mut text, snapshot);
    let late = shared.gauges.late.load(Relaxed);
    text.counter(
        "profiler_agent_samples_late_total",
        "Samples put into a later window than their own.",
        late,
    );
    sampling(&mut text, &shared.sampling);
    durations(&mut text, view);
    background(&mut text, &shared.background);
    stacks(&mut text, shared);
    memory(&mut text, &shared.memory);
    binaries(&mut text, &shared.binaries);
    unwind_tables(&mut text, &shared.unwind, shared.memory.unwind.leaves);
    symbols(&mut text, &shared.symbols.counts());
    names_on_disk(&mut text, shared.symbols.store_counts());
    debuginfod(&mut text, shared.symbols.debuginfod());
    uploads(&mut text, shared);
    heap(&mut text, view.heap.get());
    let gauges = &shared.gauges;
    text.gauge("profiler_agent_processes", "Processes known now.", gauges.processes.load(Relaxed));
    text.gauge("profiler_agent_containers", "Containers among them.", gauges.containers.load(Relaxed));
    text.gauge("profiler_agent_executables", "Executables open now.", gauges.executables.load(Relaxed));
    process_counts(&mut text, *gauges.process_counts.lock().unwrap_or_else(PoisonError::into_inner));
    text.gauge(
        "profiler_agent_mapping_event_cpus",
        "CPUs whose new executable mappings are told as they are made.",
        gauges.mapping_cpus.load(Relaxed),
    );
    cgroups(&mut text, *gauges.cgroups.lock().unwrap_or_else(PoisonError::into_inner));
    let execs_lost = shared.ledger.execs_lost();
    text.counter(
        "profiler_agent_exec_events_lost_total",
        "Exec events lost; each time all processes are read again.",
        execs_lost,
    );
    let metric = "profiler_agent_samples_filtered_total";
    text.head(
        metric,
        "Samples not taken: no target wants them, another stands for them, or they are of no memory of a program's own.",
        "counter",
    );
    for (of, reason, count) in view.not_taken() {
        text.line(format_args!("{metric}{{type=\"{}\",reason=\"{reason}\"}} {count}", of.name()));
    }
    text.counter(
        "profiler_agent_fork_exit_events_lost_total",
        "Fork and exit events lost: such processes are read from /proc, and forgotten when it has them no more.",
        shared.ledger.lives_lost(),
    );
    text.counter(
        "profiler_agent_cgroup_events_lost_total",
        "Events of new cgroups lost: such cgroups are looked up with their first exec or sample.",
        view.cgroup_events_lost(),
    );
    text.counter(
        "profiler_agent_mapping_events_lost_total",
        "Events of new executable mappings lost: processes are read again with their next sample.",
        shared.ledger.mappings_lost(),
    );
    text.counter(
        "profiler_agent_families_not_followed_total",
        "Children of recorded processes that there was no room for: they are not sampled.",
        view.families_not_followed(),
    );
    text.counter(
        "profiler_agent_processes_not_kept_total",
        "Times that the kernel's map of known processes had no room for one.",
        view.processes_not_kept(),
    );
    operation(&mut text, gauges);
    text.gauge("profiler_agent_resident_bytes", "Resident memory of the agent.", usage::resident_bytes());
    text.head("profiler_agent_cpu_seconds_total", "CPU time of the agent, user and system.", "counter");
    text.line(format_args!("profiler_agent_cpu_seconds_total {}", usage::cpu_time().as_secs_f64()));
    text.0
}

fn operation(text: &mut Text, gauges: &Gauges) {
    let is_paused = gauges.is_paused().into();
    text.gauge(
        "profiler_agent_paused",
        "1 while nothing is attached to the kernel, as was asked.",
        is_paused,
    );
    let metric = "profiler_agent_config_reloads_total";
    text.head(metric, "Times the configuration was read again, by what became of it.", "counter");
    for (result, count) in [("accepted", &gauges.reloads_accepted), ("refused", &gauges.reloads_refused)] {
        text.line(format_args!("{metric}{{result=\"{result}\"}} {}", count.load(Relaxed)));
    }
    text.counter(
        "profiler_agent_log_lines_left_out_total",
        "Log lines that were left out, since their cause has had 20 in a minute.",
        crate::logs::lines_left_out(),
    );
}

fn background(text: &mut Text, background: &Background) {
    let metric = "profiler_agent_background_waits_total";
    let help = "Times that work had to wait for CPU time of its share of the budget, by task.";
    text.head(metric, help, "counter");
    for (task, waits) in background.waits() {
        text.line(format_args!("{metric}{{task=\"{}\"}} {}", task.as_str(), waits.count));
    }
    let metric = "profiler_agent_background_wait_seconds_total";
    text.head(metric, "How long such work waited, of all threads that do it, by task.", "counter");
    for (task, waits) in background.waits() {
        let seconds = waits.time.as_secs_f64();
        text.line(format_args!("{metric}{{task=\"{}\"}} {seconds:.3}", task.as_str()));
    }
    let metric = "profiler_agent_background_cpu_seconds_total";
    text.head(metric, "CPU time of unwind tables, names, and processes read ahead.", "counter");
    text.line(format_args!("{metric} {:.3}", background.taken().as_secs_f64()));
}

fn sampling(text: &mut Text, sampling: &Sampling) {
    let hz = sampling.hz().into();
    text.gauge("profiler_agent_frequency_hz", "Samples per second and CPU.", hz);
    let metric = "profiler_agent_frequency_changes_total";
    text.head(metric, "Changes of the frequency by the CPU budget, by direction.", "counter");
    for (direction, changes) in sampling.changes() {
        text.line(format_args!("{metric}{{direction=\"{direction}\"}} {changes}"));
    }
    let metric = "profiler_agent_cpu_budget_ratio";
    text.head(
        metric,
        "Share of the CPU time of all CPUs that profiling may take; 1 without a budget.",
        "gauge",
    );
    text.line(format_args!("{metric} {}", sampling.budget().map_or(1.0, CpuShare::ratio)));
    let metric = "profiler_agent_cpu_used_ratio";
    let help = "Share it took in the last 10 s: the agent without the embedded backend, and its programs in the kernel.";
    text.head(metric, help, "gauge");
    text.line(format_args!("{metric} {}", sampling.used()));
    let metric = "profiler_agent_bpf_seconds_total";
    text.head(metric, "CPU time of the programs in the kernel, estimated from 1 of 64 runs.", "counter");
    for (programs, time) in sampling.bpf_times() {
        text.line(format_args!("{metric}{{programs=\"{}\"}} {}", programs.name(), time.as_secs_f64()));
    }
    let metric = "profiler_agent_backend_cpu_seconds_total";
    text.head(
        metric,
        "CPU time of the embedded backend, also part of profiler_agent_cpu_seconds_total.",
        "counter",
    );
    text.line(format_args!("{metric} {}", sampling.backend_time().as_secs_f64()));
}

/// Empty slots stand too: a histogram's buckets never change.
fn durations(text: &mut Text, view: &View) {
    let metric = "profiler_agent_bpf_sample_seconds";
    text.head(metric, "Time of a sample in the kernel, of the 1 of 64 that are timed.", "histogram");
    let mut up_to = 0;
    for (bound_ns, count) in view.kernel.durations().unwrap_or_default() {
        up_to += count;
        match bound_ns {
            Some(ns) => text.line(format_args!("{metric}_bucket{{le=\"{}\"}} {up_to}", ns as f64 / 1e9)),
            None => text.line(format_args!("{metric}_bucket{{le=\"+Inf\"}} {up_to}")),
        }
    }
    let sum_ns = view.kernel.get(Counter::CpuTimedNs).unwrap_or(0);
    text.line(format_args!("{metric}_sum {}", sum_ns as f64 / 1e9));
    text.line(format_args!("{metric}_count {up_to}"));
}

fn process_counts(text: &mut Text, counts: ProcessCounts) {
    let ProcessCounts { gone, unusable_files, ranges_cut, evicted, read_late, left_idle, .. } = counts;
    let ProcessCounts { mappings_added, mappings_deferred, .. } = counts;
    let counters = [
        ("processes_gone", "Processes gone before they could be read.", gone),
        ("processes_evicted", "Processes forgotten to make room for others.", evicted),
        ("processes_read_late", "New images left to their first sample, there being too many.", read_late),
        ("processes_left_idle", "New images left to their first sample, having hardly run.", left_idle),
        ("unusable_files", "Mappings whose file could not be used.", unusable_files),
        ("mappings_cut", "Processes with more executable ranges than are kept.", ranges_cut),
        (
            "mappings_added",
            "New executable mappings of known processes, added as they were made.",
            mappings_added,
        ),
        (
            "mappings_deferred",
            "New executable mappings there was no CPU time or room for: read with the process's next sample.",
            mappings_deferred,
        ),
    ];
    for (name, help, value) in counters {
        text.counter(&format!("profiler_agent_{name}_total"), help, value);
    }
}

fn cgroups(text: &mut Text, counts: NameCounts) {
    let NameCounts { known, evicted, unknown } = counts;
    text.gauge("profiler_agent_cgroups", "Cgroups whose names are known, removed ones too.", known);
    text.counter(
        "profiler_agent_cgroups_evicted_total",
        "Cgroups forgotten to make room for others.",
        evicted,
    );
    text.counter(
        "profiler_agent_cgroups_unknown_total",
        "Cgroups gone before their names were learnt, or that may not be looked up.",
        unknown,
    );
}

/// The account as metrics. What happens before samples belong to a destination stands once and without the label
/// `destination`, so that sums over all lines are sums of events. Every line is always there: `rate` needs the zero.
fn samples(text: &mut Text, snapshot: &Snapshot) {
    let label = |profile_type: ProfileType| format!("type=\"{}\"", profile_type.name());
    let types = ProfileType::ALL.map(|profile_type| (label(profile_type), snapshot.of(profile_type)));
    let destinations: Vec<_> = snapshot
        .destinations()
        .flat_map(|(name, totals)| {
            let label = move |of| format!("{},destination={}", label(of), quoted(name));
            ProfileType::ALL.map(|of| (label(of), *totals.of(of)))
        })
        .collect();
    let taken = "profiler_agent_samples_taken_total";
    text.head(taken, "Samples taken by the kernel side.", "counter");
    for (labels, terms) in &types {
        text.line(format_args!("{taken}{{{labels}}} {}", terms.taken));
    }
    let delivered = "profiler_agent_samples_delivered_total";
    text.head(delivered, "Samples a destination has acknowledged.", "counter");
    for (labels, totals) in &destinations {
        text.line(format_args!("{delivered}{{{labels}}} {}", totals.delivered));
    }
    let dropped = "profiler_agent_samples_dropped_total";
    text.head(dropped, "Samples dropped, by reason; without a destination, for all of them.", "counter");
    for (labels, terms) in &types {
        text.terms(dropped, labels, "reason", &terms.dropped);
    }
    for (labels, totals) in &destinations {
        text.terms(dropped, labels, "reason", &totals.dropped());
    }
    let waiting = "profiler_agent_samples_waiting";
    text.head(waiting, "Samples on their way, by place; without a destination, for all of them.", "gauge");
    for (labels, terms) in &types {
        text.terms(waiting, labels, "place", &terms.waiting);
    }
    for (labels, totals) in &destinations {
        text.terms(waiting, labels, "place", &[("upload_queue", totals.waiting)]);
    }
    let drained = "profiler_agent_samples_drained_total";
    text.head(drained, "Samples read from the ring buffer.", "counter");
    for (labels, terms) in &types {
        text.line(format_args!("{drained}{{{labels}}} {}", terms.drained));
    }
}

/// Heap profiling; zeros where it is off.
fn heap(text: &mut Text, heap: Option<&HeapView>) {
    let counter = |counter| heap.map_or(0, |heap| heap.count(counter));
    let gauge = |of: fn(&HeapView) -> &AtomicU64| heap.map_or(0, |heap| of(heap).load(Relaxed));
    text.gauge(
        "profiler_agent_heap_targets",
        "Processes whose heap is profiled.",
        gauge(|heap| &heap.gauges.targets),
    );
    text.gauge(
        "profiler_agent_heap_targets_limited",
        "Of these: above their heap budget, sampled in windows.",
        gauge(|heap| &heap.gauges.limited),
    );
    text.gauge(
        "profiler_agent_heap_targets_without_in_use",
        "Of these: what is in use is not followed, for it costs too much or a seccomp filter forbids it.",
        gauge(|heap| &heap.gauges.without_in_use),
    );
    text.gauge(
        "profiler_agent_heap_targets_entry_only",
        "Of these: under a seccomp filter, which might kill them for a probed return.",
        gauge(|heap| &heap.gauges.entry_only),
    );
    text.counter(
        "profiler_agent_heap_windows_total",
        "Windows in which processes above their heap budget were sampled.",
        gauge(|heap| &heap.gauges.windows),
    );
    let (name, probe_ns) = ("profiler_agent_heap_probe_seconds_total", gauge(|heap| &heap.gauges.probe_ns));
    let help = "CPU time that probes took of the profiled processes, by the calibrated cost of a hit.";
    text.head(name, help, "counter");
    text.line(format_args!("{name} {}", probe_ns as f64 / 1e9));
    let costs = heap.map(|heap| heap.gauges.costs()).unwrap_or_default();
    let name = "profiler_agent_heap_hit_seconds";
    text.head(name, "What a hit costs on this host: measured when heap profiling starts, 0 before.", "gauge");
    for (kind, ns) in [("entry", costs.entry_ns), ("return", costs.return_ns), ("stepped", costs.stepped_ns)]
    {
        text.line(format_args!("{name}{{kind=\"{kind}\"}} {}", ns / 1e9));
    }
    text.gauge(
        "profiler_agent_heap_live_samples",
        "Sampled allocations in the last snapshot.",
        gauge(|heap| &heap.live.samples),
    );
    text.counter(
        "profiler_agent_heap_refused_total",
        "Times that a process's heap was to be profiled and could not.",
        gauge(|heap| &heap.gauges.refused),
    );
    text.counter(
        "profiler_agent_heap_hits_total",
        "Entries of allocator functions that were probed.",
        gauge(|heap| &heap.gauges.hits),
    );
    text.counter(
        "profiler_agent_heap_freed_total",
        "Sampled allocations that were freed.",
        counter(HeapCounter::Freed),
    );
    text.counter(
        "profiler_agent_heap_live_full_total",
        "Samples missing from snapshots: too many in use.",
        counter(HeapCounter::LiveFull),
    );
    text.counter(
        "profiler_agent_heap_live_dropped_total",
        "Samples missing from snapshots: too many to remember.",
        gauge(|heap| &heap.live.dropped),
    );
    text.counter(
        "profiler_agent_heap_missing_objects_total",
        "Allocations missing from snapshots: those that the samples stand for there was no room for.",
        gauge(|heap| &heap.live.missing_objects),
    );
    text.counter(
        "profiler_agent_heap_missing_bytes_total",
        "Their bytes.",
        gauge(|heap| &heap.live.missing_bytes),
    );
    text.counter(
        "profiler_agent_heap_snapshots_failed_total",
        "Snapshots that could not be read.",
        gauge(|heap| &heap.live.failed),
    );
    text.counter(
        "profiler_agent_heap_unreturned_total",
        "Calls of allocator functions that were left otherwise than by returning.",
        counter(HeapCounter::Unreturned),
    );
    text.counter(
        "profiler_agent_heap_stray_total",
        "Probes hit that belong to no call known.",
        counter(HeapCounter::Stray),
    );
}

fn stacks(text: &mut Text, shared: &Shared) {
    let metric = "profiler_agent_stacks_total";
    text.head(metric, "User stacks, by why they have no further frame.", "counter");
    for (end, count) in shared.gauges.stacks() {
        text.line(format_args!("{metric}{{end=\"{}\"}} {count}", end.name()));
    }
    let metric = "profiler_agent_kernel_stacks_cut_total";
    text.head(metric, "Kernel stacks that are not whole, by reason.", "counter");
    for (cut, count) in KernelCut::ALL.iter().zip(&shared.gauges.kernel_cuts) {
        text.line(format_args!("{metric}{{reason=\"{}\"}} {}", cut.name(), count.load(Relaxed)));
    }
    let metric = "profiler_agent_first_stacks_total";
    let help = "First user stacks of processes, once for each image they run, by how they were walked.";
    text.head(metric, help, "counter");
    let Gauges { first_by_tables, first_by_frame_pointers, .. } = &*shared.gauges;
    for (by, count) in [("tables", first_by_tables), ("frame_pointers", first_by_frame_pointers)] {
        text.line(format_args!("{metric}{{by=\"{by}\"}} {}", count.load(Relaxed)));
    }
    let metric = "profiler_agent_stacks_walked_total";
    text.head(metric, "User stacks, by what led from frame to caller.", "counter");
    let Gauges { walked_by_tables, walked_by_frame_pointers, .. } = &*shared.gauges;
    for (by, count) in [("tables", walked_by_tables), ("frame_pointers", walked_by_frame_pointers)] {
        text.line(format_args!("{metric}{{by=\"{by}\"}} {}", count.load(Relaxed)));
    }
}

fn memory(text: &mut Text, plan: &MemoryPlan) {
    let metric = "profiler_agent_memory_limit_bytes";
    text.gauge(metric, "The limit that all sizes follow from.", plan.limit_bytes);
    let metric = "profiler_agent_memory_bytes";
    text.head(metric, "What each table, cache or queue may take of it.", "gauge");
    for (what, bytes) in plan.parts() {
        text.line(format_args!("{metric}{{what=\"{what}\"}} {bytes}"));
    }
}

fn binaries(text: &mut Text, binaries: &Binaries) {
    let largest = binaries.largest();
    let metric = "profiler_agent_binary_samples";
    text.head(metric, "Samples with a frame in a binary, since the start, of the largest ones.", "gauge");
    for (binary, samples, _) in &largest {
        text.line(format_args!("{metric}{{binary={}}} {samples}", quoted(binary)));
    }
    let metric = "profiler_agent_binary_samples_truncated";
    text.head(metric, "Those whose stack ends too early in that binary.", "gauge");
    for (binary, _, truncated) in &largest {
        text.line(format_args!("{metric}{{binary={}}} {truncated}", quoted(binary)));
    }
}

fn unwind_tables(text: &mut Text, counts: &UnwindCounts, leaves_max: u32) {
    let UnwindCounts { tables, leaves, processes, has_scanned, requests_dropped, .. } = counts;
    text.gauge("profiler_agent_unwind_tables", "Unwind tables in the kernel.", tables.load(Relaxed));
    let processes = processes.load(Relaxed);
    text.gauge("profiler_agent_unwind_processes", "Processes that are walked by tables.", processes);
    let has_scanned = has_scanned.load(Relaxed).into();
    text.gauge(
        "profiler_agent_unwind_scanned",
        "1 once the processes that ran at the start have their tables.",
        has_scanned,
    );
    let metric = "profiler_agent_unwind_leaves";
    text.head(metric, "Pages of 512 unwind rows in the kernel.", "gauge");
    text.line(format_args!("{metric}{{state=\"used\"}} {}", leaves.load(Relaxed)));
    text.line(format_args!("{metric}{{state=\"max\"}} {leaves_max}"));
    let metric = "profiler_agent_unwind_table_errors_total";
    text.head(metric, "Executables or processes that must do without unwind tables, by reason.", "counter");
    for (reason, count) in counts.errors() {
        text.line(format_args!("{metric}{{reason=\"{}\"}} {count}", reason.name()));
    }
    text.counter(
        "profiler_agent_unwind_requests_dropped_total",
        "Requests for unwind tables there was no room for.",
        requests_dropped.load(Relaxed),
    );
}

fn symbols(text: &mut Text, counts: &symbolize::Counts) {
    text.counter(
        "profiler_agent_symbol_hits_total",
        "Locations known when their window closed.",
        counts.hits,
    );
    text.counter(
        "profiler_agent_symbol_misses_total",
        "Locations waited for at a window's close.",
        counts.misses,
    );
    text.counter("profiler_agent_symbolized_total", "Locations symbolized.", counts.symbolized);
    text.counter(
        "profiler_agent_symbol_evictions_total",
        "Locations dropped from the cache.",
        counts.evictions,
    );
    text.counter(
        "profiler_agent_symbol_prefetch_refused_total",
        "Prefetches not taken because the queue was full.",
        counts.prefetch_refused,
    );
    text.counter(
        "profiler_agent_symbol_parser_panics_total",
        "Panics of a parser that were caught.",
        counts.parser_panics,
    );
    text.counter(
        "profiler_agent_perf_map_bytes_total",
        "Bytes read of perf maps, in which runtimes name generated code.",
        counts.perf_map_bytes,
    );
    text.counter(
        "profiler_agent_perf_map_lines_left_out_total",
        "Lines of perf maps left out: not as documented, too long, or too many.",
        counts.perf_map_lines_left_out,
    );
    text.gauge("profiler_agent_symbol_cache_bytes", "Bytes of symbolized locations.", counts.cache_bytes);
    text.gauge("profiler_agent_symbol_cache_entries", "Symbolized locations.", counts.cached);
    text.gauge(
        "profiler_agent_symbol_queue_entries",
        "Locations waiting for the symbolizer.",
        counts.waiting,
    );
    let metric = "profiler_agent_symbols_unresolved_total";
    text.head(metric, "Locations without a function, by reason.", "counter");
    for (reason, count) in symbolize::Reason::ALL.iter().zip(counts.unresolved) {
        text.line(format_args!("{metric}{{reason=\"{}\"}} {count}", reason.as_str()));
    }
}

fn names_on_disk(text: &mut Text, counts: Option<&symbolize::StoreCounts>) {
    let none = symbolize::StoreCounts::default();
    let symbolize::StoreCounts { hits, misses, loaded, discarded, saved, errors, evicted, bytes } =
        counts.unwrap_or(&none);
    let counters = [
        ("hits", "Locations whose names were kept on disk.", hits),
        ("misses", "Locations whose names were not.", misses),
        ("files_loaded", "Files of names that were read.", loaded),
        ("files_discarded", "Files of names that were damaged, foreign or of another format.", discarded),
        ("files_saved", "Files of names that were written.", saved),
        ("file_errors", "Files of names that could not be read or written.", errors),
        ("files_evicted", "Files of names that made room for others.", evicted),
    ];
    for (name, help, value) in counters {
        text.counter(&format!("profiler_agent_name_store_{name}_total"), help, value.load(Relaxed));
    }
    text.gauge("profiler_agent_name_store_bytes", "Bytes of names on disk.", bytes.load(Relaxed));
}

fn debuginfod(text: &mut Text, servers: Option<&symbolize::DebugInfod>) {
    let none = symbolize::DebugInfodCounts::default();
    let symbolize::DebugInfodCounts { fetched, absent, refused, failed, dropped, received_bytes } =
        servers.map_or(&none, symbolize::DebugInfod::counts);
    let metric = "profiler_agent_debuginfod_requests_total";
    text.head(metric, "Build ids that servers were to be asked for, by what became of it.", "counter");
    let results = [
        ("fetched", fetched),
        ("absent", absent),
        ("refused", refused),
        ("failed", failed),
        ("dropped", dropped),
    ];
    for (result, count) in results {
        text.line(format_args!("{metric}{{result=\"{result}\"}} {}", count.load(Relaxed)));
    }
    text.counter(
        "profiler_agent_debuginfod_received_bytes_total",
        "Bytes of debug files received, also of those that were refused.",
        received_bytes.load(Relaxed),
    );
    let (bytes, evicted) = servers.map_or((0, 0), symbolize::DebugInfod::stored);
    text.gauge("profiler_agent_debuginfod_bytes", "Bytes of debug files from servers on disk.", bytes);
    text.counter(
        "profiler_agent_debuginfod_evicted_total",
        "Debug files from servers that made room for others.",
        evicted,
    );
}

/// Name, help, kind and value of a metric that each destination has.
type ExporterMetric = (&'static str, &'static str, &'static str, fn(&Exporter) -> u64);

fn uploads(text: &mut Text, shared: &Shared) {
    let gauges: [ExporterMetric; 3] = [
        ("profiler_agent_upload_queue_bytes", "Bytes waiting for a destination.", "gauge", |exporter| {
            exporter.queue.bytes() as u64
        }),
        ("profiler_agent_upload_retries_total", "Uploads that were tried again.", "counter", |exporter| {
            exporter.counts.retries.load(Relaxed)
        }),
        (
            "profiler_agent_upload_bytes_total",
            "Bytes a destination has acknowledged.",
            "counter",
            |exporter| exporter.counts.bytes.load(Relaxed),
        ),
    ];
    for (metric, help, kind, value) in gauges {
        text.head(metric, help, kind);
        for exporter in shared.exporters.iter() {
            text.line(format_args!("{metric}{{destination={}}} {}", quoted(&exporter.name), value(exporter)));
        }
    }
}

/// A label value in quotes, escaped.
fn quoted(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// Metrics text under construction.
#[derive(Default)]
struct Text(String);

impl Text {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a String takes every write");
    }

    /// One line for each term, named by a label behind others.
    fn terms(&mut self, metric: &str, labels: &str, name: &str, terms: &[(&str, u64)]) {
        for (value, events) in terms {
            self.line(format_args!("{metric}{{{labels},{name}=\"{value}\"}} {events}"));
        }
    }

    fn head(&mut self, metric: &str, help: &str, kind: &str) {
        self.line(format_args!("# HELP {metric} {help}\n# TYPE {metric} {kind}"));
    }

    fn counter(&mut self, metric: &str, help: &str, value: u64) {
        self.head(metric, help, "counter");
        self.line(format_args!("{metric} {value}"));
    }

    fn gauge(&mut self, metric: &str, help: &str, value: u64) {
        self.head(metric, help, "gauge");
        self.line(format_args!("{metric} {value}"));
    }
}

/// What has happened since the last status line.
pub(crate) struct Status {
    view: View,
    at: Instant,
    taken: u64,
    cpu: Duration,
    is_terminal: bool,
}

impl Status {
    /// A status that counts from now.
    pub(crate) fn new(view: View) -> Self {
        let is_terminal = io::stderr().is_terminal();
        Self { view, at: Instant::now(), taken: 0, cpu: usage::cpu_time(), is_terminal }
    }

    /// Time between two status lines: a second where the line is overwritten, a minute in a log.
    pub(crate) fn interval(&self) -> Duration {
        if self.is_terminal { Duration::from_secs(1) } else { Duration::from_secs(60) }
    }

    /// Prints the line: over the last one on a terminal, as a log line otherwise.
    pub(crate) fn print(&mut self) {
        let line = self.line();
        if self.is_terminal {
            // A terminal that is gone is no reason to stop profiling.
            let _ = write!(io::stderr(), "\r\x1b[K{line}");
        } else {
            tracing::info!("{line}");
        }
    }

    /// Ends the overwritten line.
    pub(crate) fn end_line(&self) {
        if self.is_terminal {
            let _ = writeln!(io::stderr());
        }
    }

    /// `38 samples/s, 3 containers, 99% to the root, 98% named, 0 dropped, 0.4% CPU, 31 MiB`
    fn line(&mut self) -> String {
        let (now, cpu) = (Instant::now(), usage::cpu_time());
        let seconds = now.duration_since(self.at).as_secs_f64().max(1e-3);
        let snapshot = self.view.snapshot();
        let taken: u64 = ProfileType::ALL.iter().map(|&profile_type| snapshot.of(profile_type).taken).sum();
        let rate = taken.saturating_sub(self.taken) as f64 / seconds;
        let own_cpu = cpu.saturating_sub(self.cpu).as_secs_f64() / seconds * 100.0;
        (self.at, self.cpu, self.taken) = (now, cpu, taken);

        let gauges = &self.view.shared.gauges;
        let ((complete, all), (named, frames)) = (gauges.complete(), gauges.named());
        let dropped = snapshot.dropped();
        format!(
            "{rate:.0} samples/s, {} containers, {} to the root, {} named, {dropped} dropped, {own_cpu:.1}% CPU, {} MiB",
            gauges.containers.load(Relaxed),
            percent(complete, all),
            percent(named, frames),
            usage::resident_bytes() >> 20,
        )
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}%", part as f64 * 100.0 / whole as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Cause, KernelTotals, Ledger, PerType};

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(quoted("a\"b\\c\nd"), r#""a\"b\\c\nd""#);
    }

    #[test]
    fn every_term_of_the_account_has_a_line_of_its_own_before_it_ever_happens() {
        let ledger = Ledger::default();
        ledger.of(ProfileType::Cpu).drop_events(Cause::RingFull, 3);
        let destinations = ["http://a/", "http://b/"].map(|name| (name.to_owned(), PerType::default()));
        let kernel = |_| KernelTotals { taken: 9, submitted: 6 };
        let mut text = Text::default();
        samples(&mut text, &Snapshot::take(&ledger, kernel, destinations.to_vec()));

        let lines: Vec<_> = text.0.lines().filter(|line| !line.starts_with('#')).collect();
        for line in [
            "taken_total{type=\"cpu\"} 9",
            "delivered_total{type=\"cpu\",destination=\"http://a/\"} 0",
            "dropped_total{type=\"cpu\",reason=\"ring_full\"} 3",
            "dropped_total{type=\"cpu\",destination=\"http://b/\",reason=\"refused\"} 0",
            "waiting{type=\"cpu\",place=\"ring\"} 6",
            "waiting{type=\"cpu\",destination=\"http://b/\",place=\"upload_queue\"} 0",
        ] {
            assert!(
                lines.contains(&format!("profiler_agent_samples_{line}").as_str()),
                "{line} in {lines:#?}"
            );
        }
        let of_dropped = |line: &&&str| line.starts_with("profiler_agent_samples_dropped_total{");
        let sum: u64 = lines
            .iter()
            .filter(of_dropped)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum();
        assert_eq!(sum, 3, "each event once, however many destinations there are: {lines:#?}");
        let unique: std::collections::HashSet<_> =
            lines.iter().filter_map(|line| line.rsplit_once(' ')).map(|(name, _)| name).collect();
        assert_eq!(unique.len(), lines.len(), "{lines:#?}");
    }

    #[test]
    fn shares_of_nothing_are_not_shown_as_numbers() {
        assert_eq!((percent(0, 0), percent(1, 3)), ("-".to_owned(), "33.3%".to_owned()));
    }
}
