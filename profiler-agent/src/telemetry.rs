//! What the agent says about itself: log lines, metrics, the status line.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use profiler_common::{heap::HeapCounter, limits::UNWIND_LEAVES_MAX, wire::StackEnd};
use tracing_subscriber::EnvFilter;

use crate::{
    config::{ConfigError, LogFormat},
    export::Quality,
    ledger::{Cause, DestinationTotals, Events, KernelTotals, Ledger, Place},
    pipeline::{Exporter, HeapView, Shared, View},
    process::{ProcessCounts, Processes},
    symbolize,
    sys::usage,
    unwind::UnwindCounts,
};

/// Starts logging to standard error.
pub(crate) fn start_logging(filter: &str, format: LogFormat) -> Result<(), ConfigError> {
    let parsed = EnvFilter::try_new(filter).map_err(|error| {
        ConfigError::new(
            "log",
            filter,
            format!("{error}; accepted: error, warn, info, debug, trace, or a tracing filter"),
        )
    })?;
    let logs = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(io::stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

/// Sizes and rates of now, written by the stages.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    stacks: [AtomicU64; StackEnd::ALL.len()],
    walked_by_tables: AtomicU64,
    walked_by_frame_pointers: AtomicU64,
    processes: AtomicU64,
    containers: AtomicU64,
    executables: AtomicU64,
    process_counts: Mutex<ProcessCounts>,
    late: AtomicU64,
    named: AtomicU64,
    unnamed: AtomicU64,
}

impl Gauges {
    /// One stack, by its end and by how it was walked.
    pub(crate) fn count_stack(&self, end: StackEnd, by_tables: bool) {
        let walked = if by_tables { &self.walked_by_tables } else { &self.walked_by_frame_pointers };
        walked.fetch_add(u64::from(end != StackEnd::NoUserStack), Relaxed);
        let slot = StackEnd::ALL.iter().position(|&known| known == end).expect("ALL holds every end");
        self.stacks[slot].fetch_add(1, Relaxed);
    }

    /// The state of the process table.
    pub(crate) fn set_processes(&self, processes: &Processes) {
        self.processes.store(processes.len() as u64, Relaxed);
        self.containers.store(processes.containers() as u64, Relaxed);
        self.executables.store(processes.executables() as u64, Relaxed);
        *self.process_counts.lock().unwrap_or_else(PoisonError::into_inner) = processes.counts();
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

    fn stacks(&self) -> impl Iterator<Item = (StackEnd, u64)> {
        StackEnd::ALL.into_iter().zip(self.stacks.iter().map(|count| count.load(Relaxed)))
    }
}

/// The Prometheus text format, version 0.0.4.
pub(crate) fn metrics(view: &View) -> String {
    let mut text = Text::default();
    let shared = &view.shared;
    samples(&mut text, &accounts(view));
    let late = shared.gauges.late.load(Relaxed);
    text.counter(
        "profiler_agent_samples_late_total",
        "Samples put into a later window than their own.",
        late,
    );
    stacks(&mut text, shared);
    unwind_tables(&mut text, &shared.unwind);
    symbols(&mut text, &shared.symbols.counts());
    uploads(&mut text, shared);
    if let Some(view) = &view.heap {
        heap(&mut text, view);
    }
    let gauges = &shared.gauges;
    text.gauge("profiler_agent_processes", "Processes known now.", gauges.processes.load(Relaxed));
    text.gauge("profiler_agent_containers", "Containers among them.", gauges.containers.load(Relaxed));
    text.gauge("profiler_agent_executables", "Executables open now.", gauges.executables.load(Relaxed));
    process_counts(&mut text, *gauges.process_counts.lock().unwrap_or_else(PoisonError::into_inner));
    let execs_lost = shared.ledger.execs_lost();
    text.counter(
        "profiler_agent_exec_events_lost_total",
        "Exec events lost; each time all processes are read again.",
        execs_lost,
    );
    text.gauge("profiler_agent_resident_bytes", "Resident memory of the agent.", usage::resident_bytes());
    text.head("profiler_agent_cpu_seconds_total", "CPU time of the agent, user and system.", "counter");
    text.line(format_args!("profiler_agent_cpu_seconds_total {}", usage::cpu_time().as_secs_f64()));
    text.0
}

fn process_counts(text: &mut Text, counts: ProcessCounts) {
    let ProcessCounts { gone, unusable_files, ranges_cut, evicted } = counts;
    let counters = [
        ("processes_gone", "Processes gone before they could be read.", gone),
        ("processes_evicted", "Processes forgotten to make room for others.", evicted),
        ("unusable_files", "Mappings whose file could not be used.", unusable_files),
        ("mappings_cut", "Processes with more executable ranges than are kept.", ranges_cut),
    ];
    for (name, help, value) in counters {
        text.counter(&format!("profiler_agent_{name}_total"), help, value);
    }
}

/// A destination's name, and what became of the samples that it was given.
type Destination<'a> = (&'a str, DestinationTotals);

fn destinations(shared: &Shared, kind: Events) -> Vec<Destination<'_>> {
    let totals = |exporter: &Exporter| exporter.queue.totals(kind);
    shared.exporters.iter().map(|exporter| (exporter.name.as_str(), totals(exporter))).collect()
}

/// What became of all events of a kind.
struct Account<'a> {
    kind: Events,
    kernel: KernelTotals,
    ledger: &'a Ledger,
    destinations: Vec<Destination<'a>>,
}

/// The accounts of all kinds of events that are taken.
fn accounts(view: &View) -> Vec<Account<'_>> {
    let shared = &view.shared;
    let account =
        |kind, kernel, ledger| Account { kind, kernel, ledger, destinations: destinations(shared, kind) };
    let cpu = account(Events::Cpu, view.kernel_totals(), &shared.ledger);
    let allocs = view.alloc_totals().map(|kernel| account(Events::Allocs, kernel, &shared.alloc_ledger));
    std::iter::once(cpu).chain(allocs).collect()
}

/// The accounts as metrics. What happens before samples belong to a destination stands once and without the label
/// `destination`, so that sums over all lines are sums of events. Every line is always there: `rate` needs the zero.
fn samples(text: &mut Text, accounts: &[Account<'_>]) {
    let taken = "profiler_agent_samples_taken_total";
    text.head(taken, "Samples taken by the kernel side.", "counter");
    for account in accounts {
        text.line(format_args!("{taken}{{type=\"{}\"}} {}", account.kind.name(), account.kernel.taken));
    }
    let delivered = "profiler_agent_samples_delivered_total";
    text.head(delivered, "Samples a destination has acknowledged.", "counter");
    for Account { kind, destinations, .. } in accounts {
        for (name, totals) in destinations {
            let (kind, name) = (kind.name(), quoted(name));
            text.line(format_args!("{delivered}{{type=\"{kind}\",destination={name}}} {}", totals.delivered));
        }
    }
    let dropped = "profiler_agent_samples_dropped_total";
    text.head(dropped, "Samples dropped, by reason; without a destination, for all of them.", "counter");
    for Account { kind, ledger, destinations, .. } in accounts {
        let causes = Cause::ALL.map(|cause| (cause.name(), ledger.dropped(cause)));
        terms(text, *kind, dropped, "reason", None, &causes);
        for (name, totals) in destinations {
            terms(text, *kind, dropped, "reason", Some(name), &totals.dropped());
        }
    }
    let waiting = "profiler_agent_samples_waiting";
    text.head(waiting, "Samples on their way, by place; without a destination, for all of them.", "gauge");
    for Account { kind, kernel, ledger, destinations } in accounts {
        let in_ring = kernel.submitted.saturating_sub(ledger.drained());
        let places = Place::ALL.map(|place| (place.name(), ledger.waiting(place)));
        terms(text, *kind, waiting, "place", None, &[("ring", in_ring)]);
        terms(text, *kind, waiting, "place", None, &places);
        for (name, totals) in destinations {
            terms(text, *kind, waiting, "place", Some(name), &[("upload_queue", totals.waiting)]);
        }
    }
    text.counter(
        "profiler_agent_samples_drained_total",
        "Samples read from the ring buffer.",
        accounts.iter().map(|account| account.ledger.drained()).sum(),
    );
}

fn terms(
    text: &mut Text,
    kind: Events,
    metric: &str,
    label: &str,
    destination: Option<&str>,
    terms: &[(&str, u64)],
) {
    let kind = kind.name();
    let destination = destination.map(|name| format!("destination={},", quoted(name))).unwrap_or_default();
    for (name, events) in terms {
        text.line(format_args!("{metric}{{type=\"{kind}\",{destination}{label}=\"{name}\"}} {events}"));
    }
}

/// Heap profiling; nothing where it is off.
fn heap(text: &mut Text, heap: &HeapView) {
    let HeapView { kernel: _, gauges, live } = heap;
    let counter = |counter| heap.count(counter);
    text.gauge(
        "profiler_agent_heap_targets",
        "Processes whose heap is profiled.",
        gauges.targets.load(Relaxed),
    );
    let refused = gauges.refused.load(Relaxed);
    text.counter(
        "profiler_agent_heap_refused_total",
        "Times that a process's heap was to be profiled and could not.",
        refused,
    );
    let hits = gauges.hits.load(Relaxed);
    text.counter("profiler_agent_heap_hits_total", "Entries of allocator functions that were probed.", hits);
    let in_use = live.samples.load(Relaxed);
    text.gauge("profiler_agent_heap_live_samples", "Sampled allocations in the last snapshot.", in_use);
    let counters = [
        ("freed", "Sampled allocations that were freed.", counter(HeapCounter::Freed)),
        ("live_full", "Samples missing from snapshots: too many in use.", counter(HeapCounter::LiveFull)),
        ("live_full_bytes", "Bytes of these allocations.", counter(HeapCounter::LiveFullBytes)),
        ("live_dropped", "Samples missing from snapshots: too many to remember.", live.dropped.load(Relaxed)),
        ("snapshots_failed", "Snapshots that could not be read.", live.failed.load(Relaxed)),
        ("unreturned", "Calls that were left otherwise than by returning.", counter(HeapCounter::Unreturned)),
        ("stray", "Probes hit that belong to no call known.", counter(HeapCounter::Stray)),
    ];
    for (name, help, value) in counters {
        text.counter(&format!("profiler_agent_heap_{name}_total"), help, value);
    }
}

/// Samples dropped before they belonged to a destination, once, and by each destination.
fn dropped(ledger: &Ledger, destinations: &[Destination<'_>]) -> u64 {
    let own = destinations.iter().flat_map(|(_, totals)| totals.dropped()).map(|(_, events)| events);
    Cause::ALL.iter().map(|&cause| ledger.dropped(cause)).chain(own).sum()
}

fn stacks(text: &mut Text, shared: &Shared) {
    let metric = "profiler_agent_stacks_total";
    text.head(metric, "User stacks, by why they have no further frame.", "counter");
    for (end, count) in shared.gauges.stacks() {
        text.line(format_args!("{metric}{{end=\"{}\"}} {count}", end.name()));
    }
    let metric = "profiler_agent_stacks_walked_total";
    text.head(metric, "User stacks, by what led from frame to caller.", "counter");
    let Gauges { walked_by_tables, walked_by_frame_pointers, .. } = &*shared.gauges;
    for (by, count) in [("tables", walked_by_tables), ("frame_pointers", walked_by_frame_pointers)] {
        text.line(format_args!("{metric}{{by=\"{by}\"}} {}", count.load(Relaxed)));
    }
}

fn unwind_tables(text: &mut Text, counts: &UnwindCounts) {
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
    text.line(format_args!("{metric}{{state=\"max\"}} {UNWIND_LEAVES_MAX}"));
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
        let taken = self.view.kernel_totals().taken;
        let rate = taken.saturating_sub(self.taken) as f64 / seconds;
        let own_cpu = cpu.saturating_sub(self.cpu).as_secs_f64() / seconds * 100.0;
        (self.at, self.cpu, self.taken) = (now, cpu, taken);

        let gauges = &self.view.shared.gauges;
        let (complete, all) = gauges.stacks().fold((0, 0), |(complete, all), (end, count)| {
            (complete + if end.is_complete() { count } else { 0 }, all + count)
        });
        let (named, unnamed) = (gauges.named.load(Relaxed), gauges.unnamed.load(Relaxed));
        let dropped: u64 =
            accounts(&self.view).iter().map(|account| dropped(account.ledger, &account.destinations)).sum();
        format!(
            "{rate:.0} samples/s, {} containers, {} to the root, {} named, {dropped} dropped, {own_cpu:.1}% CPU, {} MiB",
            gauges.containers.load(Relaxed),
            percent(complete, all),
            percent(named, named + unnamed),
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

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(quoted("a\"b\\c\nd"), r#""a\"b\\c\nd""#);
    }

    #[test]
    fn what_is_lost_before_the_destinations_counts_once_however_many_there_are() {
        let ledger = Ledger::default();
        ledger.drop_events(Cause::RingFull, 3);
        let refused = DestinationTotals { dropped_refused: 2, ..DestinationTotals::default() };
        let destinations = vec![("http://a/", refused), ("http://b/", DestinationTotals::default())];
        let mut text = Text::default();
        let kernel = KernelTotals { taken: 9, submitted: 6 };
        samples(
            &mut text,
            &[Account { kind: Events::Cpu, kernel, ledger: &ledger, destinations: destinations.clone() }],
        );

        let lines: Vec<_> =
            text.0.lines().filter(|line| line.starts_with("profiler_agent_samples_dropped_total{")).collect();
        let value = |line: &str| line.rsplit_once(' ').and_then(|(_, value)| value.parse::<u64>().ok());
        let sum: u64 = lines.iter().map(|line| value(line).expect("a number")).sum();
        assert_eq!(sum, 5, "{lines:#?}");
        assert_eq!(dropped(&ledger, &destinations), 5);
        assert!(lines.contains(&"profiler_agent_samples_dropped_total{type=\"cpu\",reason=\"ring_full\"} 3"));
        // Every cause has its line before it ever happens.
        assert_eq!(lines.len(), Cause::ALL.len() + 2 * refused.dropped().len(), "{lines:#?}");
        let unique: std::collections::HashSet<_> =
            lines.iter().filter_map(|line| line.rsplit_once(' ')).map(|(name, _)| name).collect();
        assert_eq!(unique.len(), lines.len(), "{lines:#?}");
    }

    #[test]
    fn shares_of_nothing_are_not_shown_as_numbers() {
        assert_eq!((percent(0, 0), percent(1, 3)), ("-".to_owned(), "33.3%".to_owned()));
    }
}
