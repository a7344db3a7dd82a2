//! Sizes, loads and attaches the programs. The compiled object of this architecture is part of the binary.

use std::{io, os::fd::AsFd as _, path::PathBuf};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{PerfEvent, Program, ProgramError, RawTracePoint},
};
use aya_log::EbpfLogger;
use profiler_common::limits;
use tracing::warn;

use super::{probe::kernel_facts, stats::KernelCounts, unwind::UnwindMaps};
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
    /// Sampling period in nanoseconds of CPU time.
    pub(crate) period_ns: u64,
    /// Root of sysfs.
    pub(crate) sys_root: PathBuf,
}

/// The loaded programs. Dropping it detaches and unloads everything.
pub(crate) struct Programs {
    ebpf: Ebpf,
    clocks: Vec<CpuClock>,
    sys_root: PathBuf,
}

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
        let ebpf = loader.load(OBJECT)?;
        let mut programs = Self { ebpf, clocks: Vec::new(), sys_root: options.sys_root.clone() };
        programs.attach_process_events()?;
        programs.open_clocks(options.period_ns)?;
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

    fn open_clocks(&mut self, period_ns: u64) -> Result<(), BpfError> {
        const NAME: &str = "cpu_sample";
        let failed = |source| BpfError::Program { program: NAME, source };
        let program: &mut PerfEvent = program(&mut self.ebpf, NAME)?.try_into().map_err(failed)?;
        program.load().map_err(failed)?;
        let fd = program.fd().map_err(failed)?.as_fd();
        for cpu in cpu::online(&self.sys_root).map_err(BpfError::Cpus)? {
            let open = || {
                let clock = CpuClock::open(cpu, period_ns)?;
                clock.set_program(fd)?;
                Ok(clock)
            };
            self.clocks.push(open().map_err(|source| BpfError::PerfEvent { cpu, source })?);
        }
        Ok(())
    }

    /// Starts sampling on every CPU.
    pub(crate) fn start(&self) -> Result<(), BpfError> {
        for (cpu, clock) in (0..).zip(&self.clocks) {
            clock.enable().map_err(|source| BpfError::PerfEvent { cpu, source })?;
        }
        Ok(())
    }

    /// Stops sampling; what is in the ring buffer stays there to be drained.
    pub(crate) fn stop(&mut self) {
        for clock in self.clocks.drain(..) {
            if let Err(error) = clock.disable() {
                warn!(%error, "a clock event could not be stopped; closing it");
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
