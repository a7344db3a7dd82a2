//! Sizes, loads and attaches the programs. The compiled object of this architecture is part of the binary.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::PathBuf,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{PerfEvent, Program, ProgramError, RawTracePoint},
};
use aya_log::EbpfLogger;
use profiler_common::limits;
use tracing::{info, warn};

use super::{
    heap::{HEAP_MAPS, HeapCounts, HeapLoadError, HeapProgram, LiveMap},
    probe::kernel_facts,
    stats::KernelCounts,
    unwind::UnwindMaps,
};
use crate::sys::{btf::BtfError, cpu, perf_event::CpuClock};

#[cfg(target_arch = "x86_64")]
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../profiler-ebpf/prebuilt/profiler-x86_64.bpf.o");
#[cfg(target_arch = "aarch64")]
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../profiler-ebpf/prebuilt/profiler-aarch64.bpf.o");

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
    #[error("list the online CPUs")]
    Cpus(#[source] io::Error),
    #[error("open the clock event of CPU {cpu}")]
    PerfEvent {
        cpu: u32,
        #[source]
        source: io::Error,
    },
}

/// Sizes of the maps of unwind tables. Values of 4, 2, 2 KiB, 16 and about 64 bytes: 15.6 MiB.
const TABLE_MAPS: [(&str, u32); 5] = [
    ("PROCESSES", limits::UNWIND_PROCESSES_MAX),
    ("CHUNKS", limits::UNWIND_PROCESSES_MAX),
    ("DIRECTORIES", limits::UNWIND_DIRECTORIES_MAX),
    ("LEAVES", limits::UNWIND_LEAVES_MAX),
    ("RULES", limits::UNWIND_RULES_MAX),
];

/// What may be chosen before loading.
#[derive(Clone, Debug)]
pub(crate) struct LoadOptions {
    /// Bytes of the ring buffer; a power of two and a multiple of the page size.
    pub(crate) ring_bytes: u32,
    /// Whether to make room for unwind tables.
    pub(crate) has_tables: bool,
    /// Whether to load what samples heaps.
    pub(crate) has_heap: bool,
    /// Sampling period in nanoseconds of CPU time.
    pub(crate) period_ns: u64,
    /// Root of sysfs.
    pub(crate) sys_root: PathBuf,
}

/// The loaded programs. Dropping it detaches and unloads everything.
pub(crate) struct Programs {
    ebpf: Ebpf,
    /// What samples heaps, or why it could not be loaded; `None` where it is not wanted.
    heap: Option<Result<Heap, BpfError>>,
    /// The clock event of every CPU that is sampled.
    clocks: BTreeMap<u32, CpuClock>,
    /// CPUs that are online but whose event could not be opened when they came.
    refused: BTreeSet<u32>,
    period_ns: u64,
    sys_root: PathBuf,
}

/// The program for heap samples, what it counts as in use, and its counters.
pub(crate) type Heap = (HeapProgram, LiveMap, HeapCounts);

const SAMPLE_PROGRAM: &str = "cpu_sample";

impl Programs {
    /// Loads everything and attaches the process events; sampling starts with [`Self::start`].
    pub(crate) fn load(options: &LoadOptions) -> Result<Self, BpfError> {
        let facts = kernel_facts(&options.sys_root)?.words();
        let mut loader = EbpfLoader::new();
        loader.override_global("KERNEL_FACTS", &facts, true).map_max_entries("EVENTS", options.ring_bytes);
        if options.has_tables {
            for (map, entries) in TABLE_MAPS {
                loader.map_max_entries(map, entries);
            }
        }
        if options.has_heap {
            for (map, entries) in HEAP_MAPS {
                loader.map_max_entries(map, entries);
            }
        }
        let mut ebpf = loader.load(OBJECT)?;
        let heap = options.has_heap.then(|| HeapProgram::load(OBJECT, &mut ebpf));
        let mut programs = Self {
            ebpf,
            heap,
            clocks: BTreeMap::new(),
            refused: BTreeSet::new(),
            period_ns: options.period_ns,
            sys_root: options.sys_root.clone(),
        };
        programs.attach_process_events()?;
        programs.open_clocks()?;
        Ok(programs)
    }

    fn attach_process_events(&mut self) -> Result<(), BpfError> {
        const NAME: &str = "process_exec";
        let failed = |source| BpfError::Program { program: NAME, source };
        let program: &mut RawTracePoint = program(&mut self.ebpf, NAME)?.try_into().map_err(failed)?;
        program.load().map_err(failed)?;
        program.attach("sched_process_exec").map_err(failed)?;
        Ok(())
    }

    fn open_clocks(&mut self) -> Result<(), BpfError> {
        let program = sample_program(&mut self.ebpf)?;
        program.load().map_err(sample_failed)?;
        let fd = program.fd().map_err(sample_failed)?.as_fd();
        for cpu in cpu::online(&self.sys_root).map_err(BpfError::Cpus)? {
            let clock =
                open_clock(cpu, self.period_ns, fd).map_err(|source| BpfError::PerfEvent { cpu, source })?;
            self.clocks.insert(cpu, clock);
        }
        Ok(())
    }

    /// Starts sampling on every CPU.
    pub(crate) fn start(&self) -> Result<(), BpfError> {
        for (&cpu, clock) in &self.clocks {
            clock.enable().map_err(|source| BpfError::PerfEvent { cpu, source })?;
        }
        Ok(())
    }

    /// Samples the CPUs that have come online since, and drops the events of those that are gone. For a running
    /// sampler; a CPU whose event cannot be opened is tried again at the next call.
    pub(crate) fn follow_cpus(&mut self) -> Result<(), BpfError> {
        let online: BTreeSet<u32> =
            cpu::online(&self.sys_root).map_err(BpfError::Cpus)?.into_iter().collect();
        let changes = Changes::between(&self.clocks, &online);
        for cpu in changes.gone {
            info!(cpu, "CPU went offline");
            self.clocks.remove(&cpu);
        }
        self.refused.retain(|cpu| online.contains(cpu));
        if changes.new.is_empty() {
            return Ok(());
        }
        let fd = sample_program(&mut self.ebpf)?.fd().map_err(sample_failed)?.as_fd();
        for cpu in changes.new {
            let clock = open_clock(cpu, self.period_ns, fd).and_then(|clock| {
                clock.enable()?;
                Ok(clock)
            });
            match clock {
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

    /// Stops sampling; what is in the ring buffer stays there to be drained.
    pub(crate) fn stop(&mut self) {
        for (cpu, clock) in std::mem::take(&mut self.clocks) {
            if let Err(error) = clock.disable() {
                warn!(cpu, %error, "a clock event could not be stopped; closing it");
            }
        }
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
        let map = self.take_map("STATS")?;
        let map = PerCpuArray::try_from(map).map_err(|source| BpfError::Map { map: "STATS", source })?;
        Ok(KernelCounts::new(map))
    }

    /// The maps of unwind tables; can be taken once.
    pub(crate) fn take_unwind_maps(&mut self) -> Result<UnwindMaps, BpfError> {
        UnwindMaps::new(|name| self.take_map(name))
    }

    /// What samples heaps, if it was wanted; can be taken once.
    pub(crate) fn take_heap(&mut self) -> Option<Result<Heap, BpfError>> {
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

fn sample_program(ebpf: &mut Ebpf) -> Result<&mut PerfEvent, BpfError> {
    program(ebpf, SAMPLE_PROGRAM)?.try_into().map_err(sample_failed)
}

fn sample_failed(source: ProgramError) -> BpfError {
    BpfError::Program { program: SAMPLE_PROGRAM, source }
}

fn open_clock(cpu: u32, period_ns: u64, program: BorrowedFd<'_>) -> io::Result<CpuClock> {
    let clock = CpuClock::open(cpu, period_ns)?;
    clock.set_program(program)?;
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
    use super::*;

    #[track_caller]
    fn check(sampled: &[u32], online: &[u32], new: &[u32], gone: &[u32]) {
        let sampled = sampled.iter().map(|&cpu| (cpu, ())).collect();
        let online = online.iter().copied().collect();
        assert_eq!(Changes::between(&sampled, &online), Changes { new: new.to_vec(), gone: gone.to_vec() });
    }

    #[test]
    fn cpus_that_come_get_an_event_and_those_that_go_lose_theirs() {
        check(&[0, 1], &[0, 1], &[], &[]);
        check(&[0], &[0, 2, 3], &[2, 3], &[]);
        check(&[0, 1, 2], &[0, 2], &[], &[1]);
        check(&[0, 1], &[0, 4], &[4], &[1]);
    }
}
