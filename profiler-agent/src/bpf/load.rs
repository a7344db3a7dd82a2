//! Sizes, loads and attaches the programs. The compiled object of this architecture is part of the binary.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{PerfEvent, Program, ProgramError, RawTracePoint, raw_trace_point::RawTracePointLink},
};
use aya_log::EbpfLogger;
use profiler_common::{config::Settings, limits};
use tracing::{info, warn};

use super::{
    heap::{HeapLoadError, HeapSource},
    probe::{cgroup_facts, kernel_facts},
    stats::KernelCounts,
    targets::TargetMap,
    unwind::UnwindMaps,
};
use crate::{
    faults,
    memory::UnwindSizes,
    sys::{
        btf::{Btf, BtfError},
        cgroup, cpu,
        perf_event::{self, CpuEvent},
    },
    targets::Targets,
};

#[cfg(target_arch = "x86_64")]
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!("../../../profiler-ebpf/prebuilt/profiler-x86_64.bpf.o");
#[cfg(target_arch = "aarch64")]
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!("../../../profiler-ebpf/prebuilt/profiler-aarch64.bpf.o");

/// Why the programs could not be loaded or attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BpfError {
    #[error("read the kernel's type information (CONFIG_DEBUG_INFO_BTF must be on)")]
    Btf(#[from] BtfError),
    #[error("load the BPF object")]
    Load(#[from] EbpfError),
    #[error("the BPF object has no {what}: it does not belong to this agent")]
    Missing { what: &'static str },
    #[error("load or attach program {program}")]
    Program {
        program: &'static str,
        #[source]
        source: ProgramError,
    },
    #[error("use map {map}")]
    Map {
        map: &'static str,
        #[source]
        source: MapError,
    },
    #[error(transparent)]
    Heap(#[from] HeapLoadError),
    #[error(
        "find target cgroup {}: no cgroup v2 hierarchy is mounted here, or a part of it alone and CAP_DAC_READ_SEARCH \
         is missing; use a target's pid or comm",
        .0.display()
    )]
    NoCgroup2(PathBuf),
    #[error("list the online CPUs")]
    Cpus(#[source] io::Error),
    #[error("open the sampling event of CPU {cpu}")]
    PerfEvent {
        cpu: u32,
        #[source]
        source: io::Error,
    },
    #[error(
        "open the sampling event of CPU {cpu}: kernel.perf_event_paranoid is {level}, and above 2 kernels of Debian and \
         Ubuntu refuse events to all without CAP_SYS_ADMIN; set it to 2, or give the agent that capability"
    )]
    Paranoid {
        cpu: u32,
        level: i32,
        #[source]
        source: io::Error,
    },
}

/// Entries of the maps of unwind tables. As many sets of mappings as processes: children share their parent's.
///
/// Leaves come in shards, as they are needed.
fn table_maps(sizes: UnwindSizes) -> [(&'static str, u32); 4] {
    let UnwindSizes { leaves: _, directories, processes, rules } = sizes;
    [("CHUNKS", processes), ("GENERATIONS", processes), ("DIRECTORIES", directories), ("RULES", rules)]
}

/// What may be chosen before loading.
#[derive(Clone, Debug)]
pub(crate) struct LoadOptions {
    /// Bytes of the ring buffer; a power of two and a multiple of the page size.
    pub(crate) ring_bytes: u32,
    /// Room for unwind tables; `None` where there are none.
    pub(crate) tables: Option<UnwindSizes>,
    /// Whether CPU time is sampled.
    pub(crate) has_cpu: bool,
    /// Whether page faults are sampled.
    pub(crate) has_page_faults: bool,
    /// Processes that the kernel side knows, about 90 bytes each.
    pub(crate) processes: u32,
    /// User frames of one sample, `limits::USER_FRAMES_LIMIT_MIN` to `limits::USER_FRAMES_MAX`.
    pub(crate) stack_depth: u32,
    /// What is sampled.
    pub(crate) targets: Targets,
    /// Sampling period in nanoseconds of CPU time.
    pub(crate) period_ns: u64,
    /// The hierarchy whose cgroup ids samples carry.
    pub(crate) cgroups: Option<cgroup::Version>,
    /// Root of sysfs.
    pub(crate) sys_root: PathBuf,
}

/// The loaded programs. Dropping it detaches and unloads everything.
pub(crate) struct Programs {
    ebpf: Ebpf,
    /// What samples heaps, when it is wanted.
    heap: Option<HeapSource>,
    /// The clock event of every CPU that is sampled.
    clocks: BTreeMap<u32, CpuEvent>,
    /// The same of page faults; `None` where they are not wanted.
    page_faults: Option<BTreeMap<u32, CpuEvent>>,
    /// What follows the events of processes. Dropping them detaches.
    process_events: Vec<RawTracePointLink>,
    /// CPUs that are online but whose event could not be opened when they came.
    refused: BTreeSet<u32>,
    targets: TargetMap,
    /// Whether CPU time is sampled.
    has_cpu: bool,
    period_ns: u64,
    sys_root: PathBuf,
}

const SAMPLE_PROGRAM: &str = "cpu_sample";
const FAULT_PROGRAM: &str = "page_fault";
/// Programs that follow processes, and the raw tracepoints they are attached to. The end of a process before its
/// beginning, so that none is known whose end is not seen.
const PROCESS_PROGRAMS: [(&str, &str); 4] = [
    ("process_exit", "sched_process_exit"),
    ("process_exec", "sched_process_exec"),
    ("process_fork", "sched_process_fork"),
    ("cgroup_made", "cgroup_mkdir"),
];

impl Programs {
    /// Loads everything; nothing is attached before [`Self::start`].
    pub(crate) fn load(options: &LoadOptions) -> Result<Self, BpfError> {
        let btf = Btf::of_kernel(&options.sys_root)?;
        let (facts, cgroups) = (kernel_facts(&btf).words(), cgroup_facts(&btf, options.cgroups).words());
        drop(btf);
        let has_families = !options.targets.families().is_empty();
        let settings = Settings {
            user_frames_limit: options.stack_depth,
            has_families: has_families.into(),
            reserved: [0; 2],
        }
        .words();
        let mut loader = EbpfLoader::new();
        loader.override_global("KERNEL_FACTS", &facts, true).override_global("CGROUP_FACTS", &cgroups, true);
        loader
            .override_global("SETTINGS", &settings, true)
            .map_max_entries("EVENTS", options.ring_bytes)
            .map_max_entries("PROCESSES", options.processes);
        for (map, entries) in options.tables.into_iter().flat_map(table_maps) {
            loader.map_max_entries(map, entries);
        }
        if has_families {
            loader.map_max_entries("FAMILY", limits::FAMILY_MAX);
        }
        let mut ebpf = loader.load(OBJECT)?;
        let heap = Some(HeapSource::new(OBJECT, &ebpf)?);
        for (name, _) in PROCESS_PROGRAMS {
            raw_tracepoint(&mut ebpf, name)?.load().map_err(|source| failed(name, source))?;
        }
        sample_program(&mut ebpf)?.load().map_err(sample_failed)?;
        if options.has_page_faults {
            load_page_faults(&mut ebpf)?;
        }
        let targets = TargetMap::new(&mut ebpf, options.targets.clone())?;
        Ok(Self {
            ebpf,
            heap,
            targets,
            has_cpu: options.has_cpu,
            clocks: BTreeMap::new(),
            page_faults: options.has_page_faults.then(BTreeMap::new),
            process_events: Vec::new(),
            refused: BTreeSet::new(),
            period_ns: options.period_ns,
            sys_root: options.sys_root.clone(),
        })
    }

    /// Attaches everything and starts sampling on every CPU. For a sampler that does not run.
    pub(crate) fn start(&mut self) -> Result<(), BpfError> {
        self.attach_process_events()?;
        if self.has_cpu {
            self.start_clocks()?;
        }
        self.follow_page_faults()
    }

    fn start_clocks(&mut self) -> Result<(), BpfError> {
        self.open_clocks()?;
        for (&cpu, clock) in &self.clocks {
            clock.enable().map_err(|source| event_failed(cpu, source))?;
        }
        Ok(())
    }

    /// Samples page faults of the CPUs that are online, where they are wanted.
    fn follow_page_faults(&mut self) -> Result<(), BpfError> {
        let Some(events) = &mut self.page_faults else { return Ok(()) };
        let online: BTreeSet<u32> =
            cpu::online(&self.sys_root).map_err(BpfError::Cpus)?.into_iter().collect();
        events.retain(|cpu, _| online.contains(cpu));
        let new: Vec<u32> = online.into_iter().filter(|cpu| !events.contains_key(cpu)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let fd = fault_program(&mut self.ebpf)?.fd().map_err(fault_failed)?.as_fd();
        for cpu in new {
            let event = start_page_faults(cpu, fd).map_err(|source| event_failed(cpu, source))?;
            events.insert(cpu, event);
        }
        Ok(())
    }

    fn attach_process_events(&mut self) -> Result<(), BpfError> {
        for (name, tracepoint) in PROCESS_PROGRAMS {
            let program = raw_tracepoint(&mut self.ebpf, name)?;
            let link = program.attach(tracepoint).and_then(|id| program.take_link(id));
            self.process_events.push(link.map_err(|source| failed(name, source))?);
        }
        Ok(())
    }

    fn open_clocks(&mut self) -> Result<(), BpfError> {
        let fd = sample_program(&mut self.ebpf)?.fd().map_err(sample_failed)?.as_fd();
        for cpu in cpu::online(&self.sys_root).map_err(BpfError::Cpus)? {
            let clock = open_clock(cpu, self.period_ns, fd).map_err(|source| event_failed(cpu, source))?;
            self.clocks.insert(cpu, clock);
        }
        Ok(())
    }

    /// Samples the CPUs that have come online since, and drops the events of those that are gone. For a running
    /// sampler; a CPU whose event cannot be opened is tried again at the next call.
    pub(crate) fn follow_cpus(&mut self) -> Result<(), BpfError> {
        let faults = self.follow_page_faults();
        if self.has_cpu {
            self.follow_clocks()?;
        }
        faults
    }

    fn follow_clocks(&mut self) -> Result<(), BpfError> {
        let online: BTreeSet<u32> =
            cpu::online(&self.sys_root).map_err(BpfError::Cpus)?.into_iter().collect();
        let changes = Changes::between(&self.clocks, &online);
        for cpu in changes.gone {
            info!(cpu, "CPU went offline");
            self.clocks.remove(&cpu);
        }
        self.refused.retain(|cpu| online.contains(cpu));
        self.renew_clocks()?;
        if changes.new.is_empty() {
            return Ok(());
        }
        let fd = sample_program(&mut self.ebpf)?.fd().map_err(sample_failed)?.as_fd();
        for cpu in changes.new {
            match start_clock(cpu, self.period_ns, fd) {
                Ok(clock) => {
                    info!(cpu, "CPU came online and is sampled");
                    self.clocks.insert(cpu, clock);
                    self.refused.remove(&cpu);
                }
                Err(error) => {
                    if self.refused.insert(cpu) {
                        warn!(cpu, %error, "CPU came online but cannot be sampled; trying again");
                    }
                }
            }
        }
        Ok(())
    }

    /// Samples with another period from now on, for a running sampler. A CPU whose event cannot be opened anew keeps the
    /// old one until [`Self::follow_cpus`] succeeds.
    ///
    /// What a CPU has used up of its old period is in no sample: half a period on average.
    pub(crate) fn set_period(&mut self, period_ns: u64) -> Result<(), BpfError> {
        self.period_ns = period_ns;
        self.renew_clocks()
    }

    /// Opens events of another period than the wanted one anew. The new one runs before the old one is closed.
    fn renew_clocks(&mut self) -> Result<(), BpfError> {
        let period_ns = self.period_ns;
        let old = self.clocks.iter().filter(|(_, clock)| clock.period() != period_ns);
        let old: Vec<u32> = old.map(|(&cpu, _)| cpu).collect();
        if old.is_empty() {
            return Ok(());
        }
        let fd = sample_program(&mut self.ebpf)?.fd().map_err(sample_failed)?.as_fd();
        for cpu in old {
            match start_clock(cpu, period_ns, fd) {
                Ok(clock) => {
                    self.clocks.insert(cpu, clock);
                    self.refused.remove(&cpu);
                }
                Err(error) => {
                    if self.refused.insert(cpu) {
                        warn!(cpu, %error, "CPU keeps its old sampling frequency; trying again");
                    }
                }
            }
        }
        Ok(())
    }

    /// Looks for cgroups of targets that were not there before.
    pub(crate) fn follow_cgroups(&mut self) -> Result<(), BpfError> {
        self.targets.follow_cgroups()
    }

    /// Samples other targets from now on. Where that fails, the old ones stay.
    pub(crate) fn set_targets(&mut self, targets: Targets) -> Result<(), BpfError> {
        self.targets.set(targets)
    }

    /// Samples CPU time from now on, or no longer. `is_running`: between [`Self::start`] and [`Self::stop`].
    pub(crate) fn set_cpu(&mut self, wanted: bool, is_running: bool) -> Result<(), BpfError> {
        self.has_cpu = wanted;
        match (wanted, is_running) {
            (true, true) => self.start_clocks(),
            (false, _) => {
                self.stop_clocks();
                Ok(())
            }
            (true, false) => Ok(()),
        }
    }

    /// The same of page faults.
    pub(crate) fn set_page_faults(&mut self, wanted: bool, is_running: bool) -> Result<(), BpfError> {
        if !wanted {
            self.stop_page_faults();
            self.page_faults = None;
            return Ok(());
        }
        load_page_faults(&mut self.ebpf)?;
        self.page_faults.get_or_insert_default();
        if is_running { self.follow_page_faults() } else { Ok(()) }
    }

    /// Stops sampling and detaches everything; what is in the ring buffer stays there to be drained.
    pub(crate) fn stop(&mut self) {
        self.process_events.clear();
        self.stop_clocks();
        self.stop_page_faults();
    }

    fn stop_clocks(&mut self) {
        disable(std::mem::take(&mut self.clocks));
    }

    fn stop_page_faults(&mut self) {
        disable(self.page_faults.as_mut().map(std::mem::take).unwrap_or_default());
    }

    /// CPUs being sampled.
    pub(crate) fn cpus(&self) -> usize {
        self.clocks.len()
    }

    /// The ring buffer; can be taken once.
    pub(crate) fn take_events(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        let map = self.take_map("EVENTS")?;
        RingBuf::try_from(map).map_err(|source| BpfError::Map { map: "EVENTS", source })
    }

    /// The counters; can be taken once.
    pub(crate) fn take_counts(&mut self) -> Result<KernelCounts, BpfError> {
        let [counters, durations] = ["STATS", "CPU_DURATIONS"].map(|name| {
            let map = self.take_map(name)?;
            PerCpuArray::try_from(map).map_err(|source| BpfError::Map { map: name, source })
        });
        Ok(KernelCounts::new(counters?, durations?))
    }

    /// The maps of unwind tables; can be taken once.
    pub(crate) fn take_unwind_maps(&mut self) -> Result<UnwindMaps, BpfError> {
        UnwindMaps::new(|name| self.take_map(name))
    }

    /// What samples heaps; can be taken once.
    pub(crate) fn take_heap(&mut self) -> Option<HeapSource> {
        self.heap.take()
    }

    /// The programs' own rare messages; can be taken once.
    pub(crate) fn take_logger(&mut self) -> Option<EbpfLogger<&'static dyn log::Log>> {
        EbpfLogger::init(&mut self.ebpf)
            .inspect_err(|error| warn!(%error, "no messages from BPF programs"))
            .ok()
    }

    fn take_map(&mut self, name: &'static str) -> Result<Map, BpfError> {
        self.ebpf.take_map(name).ok_or(BpfError::Missing { what: name })
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, BpfError> {
    ebpf.program_mut(name).ok_or(BpfError::Missing { what: name })
}

fn raw_tracepoint<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut RawTracePoint, BpfError> {
    program(ebpf, name)?.try_into().map_err(|source| failed(name, source))
}

fn failed(program: &'static str, source: ProgramError) -> BpfError {
    BpfError::Program { program, source }
}

fn event_failed(cpu: u32, source: io::Error) -> BpfError {
    let is_refused = source.raw_os_error() == Some(libc::EACCES);
    let level = perf_event::paranoia(Path::new("/proc")).filter(|_| is_refused);
    match level {
        Some(level) if level > perf_event::PARANOIA_MAX => BpfError::Paranoid { cpu, level, source },
        _ => BpfError::PerfEvent { cpu, source },
    }
}

fn sample_program(ebpf: &mut Ebpf) -> Result<&mut PerfEvent, BpfError> {
    program(ebpf, SAMPLE_PROGRAM)?.try_into().map_err(sample_failed)
}

fn sample_failed(source: ProgramError) -> BpfError {
    failed(SAMPLE_PROGRAM, source)
}

fn fault_program(ebpf: &mut Ebpf) -> Result<&mut PerfEvent, BpfError> {
    program(ebpf, FAULT_PROGRAM)?.try_into().map_err(fault_failed)
}

/// Does nothing where it is loaded.
fn load_page_faults(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    let program = fault_program(ebpf)?;
    if program.fd().is_ok() { Ok(()) } else { program.load().map_err(fault_failed) }
}

fn disable(events: BTreeMap<u32, CpuEvent>) {
    for (cpu, event) in events {
        if let Err(error) = event.disable() {
            warn!(cpu, %error, "a sampling event could not be stopped; closing it");
        }
    }
}

fn fault_failed(source: ProgramError) -> BpfError {
    failed(FAULT_PROGRAM, source)
}

fn start_page_faults(cpu: u32, program: BorrowedFd<'_>) -> io::Result<CpuEvent> {
    let event = CpuEvent::page_faults(cpu, faults::PERIOD)?;
    event.set_program(program)?;
    event.enable()?;
    Ok(event)
}

fn open_clock(cpu: u32, period_ns: u64, program: BorrowedFd<'_>) -> io::Result<CpuEvent> {
    let clock = CpuEvent::clock(cpu, period_ns)?;
    clock.set_program(program)?;
    Ok(clock)
}

fn start_clock(cpu: u32, period_ns: u64, program: BorrowedFd<'_>) -> io::Result<CpuEvent> {
    let clock = open_clock(cpu, period_ns, program)?;
    clock.enable()?;
    Ok(clock)
}

/// CPUs that came and went since the events were opened.
#[derive(Debug, PartialEq, Eq)]
struct Changes {
    new: Vec<u32>,
    gone: Vec<u32>,
}

impl Changes {
    fn between<T>(sampled: &BTreeMap<u32, T>, online: &BTreeSet<u32>) -> Self {
        Self {
            new: online.iter().copied().filter(|cpu| !sampled.contains_key(cpu)).collect(),
            gone: sampled.keys().copied().filter(|cpu| !online.contains(cpu)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{drain, sys::clock};

    #[track_caller]
    fn check(sampled: &[u32], online: &[u32], new: &[u32], gone: &[u32]) {
        let sampled = sampled.iter().map(|&cpu| (cpu, ())).collect();
        let online = online.iter().copied().collect();
        assert_eq!(Changes::between(&sampled, &online), Changes { new: new.to_vec(), gone: gone.to_vec() });
    }

    /// The period that each sample of the ring states, with its time.
    fn periods(ring: &mut RingBuf<MapData>) -> Vec<(u64, u64)> {
        let sample = |record: &[u8]| match drain::decode(record) {
            Some(drain::Record::Sample(sample)) => Some((sample.time_ns, sample.value)),
            _ => None,
        };
        std::iter::from_fn(|| Some(sample(&ring.next()?))).flatten().collect()
    }

    #[test]
    #[ignore = "needs root and BPF"]
    fn samples_state_the_period_that_they_were_taken_with() {
        const PERIODS_NS: [u64; 3] = [5_000_000, 20_000_000, 2_000_000];
        /// Each CPU goes over to the new period within this time.
        const CHANGE_NS: u64 = 50_000_000;
        let end = Instant::now() + Duration::from_secs(60);
        let stop = Arc::new(AtomicBool::new(false));
        let is_stopped = Arc::clone(&stop);
        let burner = std::thread::spawn(move || while !is_stopped.load(Relaxed) {});
        let options = LoadOptions {
            has_cpu: true,
            has_page_faults: false,
            ring_bytes: 1 << 20,
            tables: None,
            processes: 1024,
            stack_depth: 127,
            targets: Targets::new(Vec::new(), true).expect("none"),
            period_ns: PERIODS_NS[0],
            cgroups: None,
            sys_root: "/sys".into(),
        };
        let mut programs = Programs::load(&options).expect("this kernel runs the programs");
        let mut ring = programs.take_events().expect("the ring");
        programs.start().expect("sampling starts");
        for period_ns in PERIODS_NS {
            programs.set_period(period_ns).expect("a new period");
            let changed_ns = clock::boot_ns() + CHANGE_NS;
            let mut found = Vec::new();
            while found.len() < 5 {
                assert!(Instant::now() < end, "no samples of {period_ns} ns");
                let all = periods(&mut ring);
                found.extend(all.into_iter().filter(|&(time_ns, _)| time_ns > changed_ns));
            }
            assert!(found.iter().all(|&(_, period)| period == period_ns), "{period_ns}: {found:?}");
        }
        stop.store(true, Relaxed);
        burner.join().expect("it ends");
    }

    #[test]
    fn cpus_that_come_get_an_event_and_those_that_go_lose_theirs() {
        check(&[0, 1], &[0, 1], &[], &[]);
        check(&[0], &[0, 2, 3], &[2, 3], &[]);
        check(&[0, 1, 2], &[0, 2], &[], &[1]);
        check(&[0, 1], &[0, 4], &[4], &[1]);
    }
}
