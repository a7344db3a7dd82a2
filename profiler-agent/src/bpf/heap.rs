//! The programs for heap samples. aya loads none for uprobe sessions, so they are taken from the object here, with the maps
//! that aya has made; those of heap profiling are made here, when it is first wanted.

use std::{
    collections::{HashMap as StdHashMap, HashSet},
    ffi::CString,
    io,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
};
use aya_obj::{Object, btf::BtfError, obj::ParseError, relocation::EbpfRelocationError};
use profiler_common::heap::{
    HeapCounter, Hits, LIVE_MAX, LiveKey, PENDING_MAX, POINTS_MAX, Point, SCRATCH_SLOTS, TARGETS_MAX, Target,
};

use super::{load::BpfError, value::Value};
use crate::sys::{
    bpf::{self, Code, LinkKind, Probe, Records, UprobeKind},
    uprobe_event::UprobeEvents,
};

/// Sizes of the maps of heap profiling. Preallocated: 64 KiB of points, 8 KiB of targets, 1.6 MiB of threads; live
/// allocations take about 100 bytes each as they come; 100 KiB and 8 KiB a CPU of samples in the making and of hits.
const HEAP_MAPS: [(&str, u32); 8] = [
    ("HEAP_POINTS", POINTS_MAX),
    ("HEAP_TARGETS", TARGETS_MAX),
    ("HEAP_HITS", TARGETS_MAX),
    ("HEAP_PENDING", PENDING_MAX),
    ("HEAP_OUTER", PENDING_MAX),
    (LIVE, LIVE_MAX),
    ("HEAP_STATS", HeapCounter::COUNT),
    ("HEAP_SCRATCH", SCRATCH_SLOTS),
];

const LIVE: &str = "HEAP_LIVE";
const FAMILY: &str = "FAMILY";
/// Made anew for each program: the kernel binds it to the type and attachment of the first one that refers to it
/// (kernel/bpf/core.c: `bpf_prog_map_compatible`).
const NO_PROGRAM: &str = "HEAP_NO_PROGRAM";

const SESSION: &str = "heap_probe";
const ENTRY: &str = "heap_entry";
const RETURN: &str = "heap_return";

/// Why the programs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeapLoadError {
    #[error(
        "heap profiling is for x86-64 only: which instructions the kernel executes itself, and so where probes are cheap, \
         is not known here for other architectures"
    )]
    Architecture,
    #[error("read the BPF object")]
    Object(#[from] ParseError),
    #[error("prepare the type information of the BPF object")]
    Btf(#[from] BtfError),
    #[error("link program {program}")]
    Link {
        program: &'static str,
        #[source]
        source: EbpfRelocationError,
    },
    #[error("load program {program}")]
    Load {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("copy the descriptor of a map")]
    Descriptor(#[source] io::Error),
    #[error("find the kernel's uprobe events")]
    Events(#[source] io::Error),
}

/// What is needed to load the programs later: the object, and descriptors of the maps that they share with others.
pub(crate) struct HeapSource {
    object: &'static [u8],
    maps: StdHashMap<String, OwnedFd>,
}

/// The programs, and the maps they share with the agent. Dropping it unloads the programs once no link holds them.
pub(crate) struct HeapProgram {
    object: &'static [u8],
    maps: StdHashMap<String, OwnedFd>,
    loaded: Option<Loaded>,
    points: Array<MapData, Value<Point>>,
    targets: Array<MapData, Value<Target>>,
    hits: PerCpuArray<MapData, Value<Hits>>,
    /// The processes of recorded families, which the programs of CPU samples follow.
    family: HashMap<MapData, u32, u32>,
}

/// The programs of one way to probe functions.
enum Loaded {
    Session(OwnedFd),
    Multi { entry: OwnedFd, returns: OwnedFd },
    Perf { entry: OwnedFd, returns: OwnedFd, events: UprobeEvents },
}

/// Probes of one process. Dropping it takes them out: those of entries first, so that no return is missed.
#[derive(Debug, Default)]
pub(crate) struct Links {
    entries: Vec<OwnedFd>,
    returns: Vec<OwnedFd>,
}

impl Links {
    /// Takes the probes of returns out, as far as they are links of their own.
    pub(crate) fn drop_returns(&mut self) {
        self.returns.clear();
    }
}

/// Sampled allocations in use.
pub(crate) struct LiveMap {
    /// The same map, which aya reads an entry at a time.
    fd: OwnedFd,
    map: HashMap<MapData, Value<LiveKey>, u64>,
}

/// Counters of the kernel side.
#[derive(Clone)]
pub(crate) struct HeapCounts {
    map: Arc<PerCpuArray<MapData, u64>>,
}

/// The programs for heap samples, what they count as in use, and their counters.
pub(crate) type Heap = (HeapProgram, LiveMap, HeapCounts);

impl HeapSource {
    /// Of `ebpf`, which was made from `object` and whose maps nobody has taken yet.
    pub(super) fn new(object: &'static [u8], ebpf: &Ebpf) -> Result<Self, HeapLoadError> {
        let is_of_heap = |name: &str| HEAP_MAPS.iter().any(|(of_heap, _)| *of_heap == name);
        let shared = ebpf.maps().filter(|(name, _)| !is_of_heap(name));
        let maps = shared.filter_map(|(name, map)| {
            let fd = descriptor(map)?.try_clone_to_owned().map_err(HeapLoadError::Descriptor);
            Some(fd.map(|fd| (name.to_owned(), fd)))
        });
        Ok(Self { object, maps: maps.collect::<Result<_, _>>()? })
    }

    /// Makes the maps of heap profiling, with room for so many sampled allocations in use; [`HeapProgram::choose`] loads
    /// programs.
    pub(crate) fn load(self, live_max: u32) -> Result<Heap, BpfError> {
        if !cfg!(target_arch = "x86_64") {
            return Err(HeapLoadError::Architecture.into());
        }
        let Self { object, mut maps } = self;
        let parsed = Object::parse(object).map_err(HeapLoadError::Object)?;
        let family = maps.get(FAMILY).ok_or(BpfError::Missing { what: FAMILY })?;
        let family = family.try_clone().map_err(HeapLoadError::Descriptor)?;
        let family = MapData::from_fd(family).map_err(|source| BpfError::Map { map: FAMILY, source })?;
        let mut made = StdHashMap::new();
        for (name, entries) in HEAP_MAPS {
            let mut map = parsed.maps.get(name).ok_or(BpfError::Missing { what: name })?.clone();
            map.set_max_entries(if name == LIVE { live_max } else { entries });
            let map =
                MapData::create(map, name, None).map_err(|source| BpfError::Map { map: name, source })?;
            let fd = map.fd().as_fd().try_clone_to_owned().map_err(HeapLoadError::Descriptor)?;
            maps.insert(name.to_owned(), fd);
            made.insert(name, map);
        }
        let mut take = |name: &'static str| made.remove(name).ok_or(BpfError::Missing { what: name });
        let failed = |map| move |source: MapError| BpfError::Map { map, source };
        let program = HeapProgram {
            object,
            maps,
            loaded: None,
            points: Map::Array(take("HEAP_POINTS")?).try_into().map_err(failed("HEAP_POINTS"))?,
            targets: Map::Array(take("HEAP_TARGETS")?).try_into().map_err(failed("HEAP_TARGETS"))?,
            hits: Map::PerCpuArray(take("HEAP_HITS")?).try_into().map_err(failed("HEAP_HITS"))?,
            family: Map::HashMap(family).try_into().map_err(failed(FAMILY))?,
        };
        let live = LiveMap::new(Map::HashMap(take(LIVE)?))?;
        let stats = Map::PerCpuArray(take("HEAP_STATS")?).try_into().map_err(failed("HEAP_STATS"))?;
        Ok((program, live, HeapCounts { map: Arc::new(stats) }))
    }
}

impl HeapProgram {
    /// Loads the programs of a way to probe functions, in the place of those of another.
    pub(crate) fn choose(&mut self, kind: UprobeKind) -> Result<(), BpfError> {
        self.loaded = None;
        self.loaded = Some(match kind {
            UprobeKind::Session => Loaded::Session(self.load(SESSION, kind)?),
            UprobeKind::Multi => {
                Loaded::Multi { entry: self.load(ENTRY, kind)?, returns: self.load(RETURN, kind)? }
            }
            UprobeKind::Perf => {
                let events = UprobeEvents::find("/sys".as_ref()).map_err(HeapLoadError::Events)?;
                Loaded::Perf { entry: self.load(ENTRY, kind)?, returns: self.load(RETURN, kind)?, events }
            }
        });
        Ok(())
    }

    fn load(&self, name: &'static str, kind: UprobeKind) -> Result<OwnedFd, BpfError> {
        load_program(self.object, name, kind, &self.maps)
    }

    /// Whether every return is probed that is probed at all: no program says at the entry which it wants.
    pub(crate) fn probes_every_return(&self) -> bool {
        !matches!(self.loaded, Some(Loaded::Session(_)))
    }

    /// Writes what a probe with this cookie finds.
    pub(crate) fn set_point(&mut self, cookie: u32, point: Point) -> Result<(), MapError> {
        self.points.set(cookie, Value(point), 0)
    }

    /// Writes what the program knows of a process.
    pub(crate) fn set_target(&mut self, slot: u32, target: Target) -> Result<(), MapError> {
        self.targets.set(slot, Value(target), 0)
    }

    /// Whether a process is one of a recorded family, whoever its parent is by now.
    pub(crate) fn is_of_family(&self, pid: u32) -> bool {
        self.family.get(&pid, 0).is_ok()
    }

    /// Probes hit by the processes that had the slot so far, all together.
    pub(crate) fn hits(&self, slot: u32) -> Result<Hits, MapError> {
        let cpus = self.hits.get(&slot, 0)?;
        let sum = |of: fn(&Hits) -> u64| cpus.iter().map(|Value(hits)| of(hits)).sum();
        Ok(Hits {
            allocs: sum(|hits| hits.allocs),
            frees: sum(|hits| hits.frees),
            returns: sum(|hits| hits.returns),
            sample_ns: sum(|hits| hits.sample_ns),
        })
    }

    /// Puts probes into one process: of entries, and of those returns that are of interest where `has_returns` says so.
    pub(crate) fn attach(
        &self,
        file: &Path,
        pid: u32,
        probes: &[Probe],
        has_returns: bool,
    ) -> io::Result<Links> {
        let returned: Vec<Probe> =
            probes.iter().filter(|probe| has_returns && probe.has_return).copied().collect();
        let mut links = Links::default();
        let Some(loaded) = &self.loaded else { return Err(io::ErrorKind::NotFound.into()) };
        match loaded {
            Loaded::Session(program) => {
                links.entries.push(bpf::attach_uprobes(
                    program.as_fd(),
                    LinkKind::Session,
                    file,
                    pid,
                    probes,
                )?);
            }
            Loaded::Multi { entry, returns } => {
                if !returned.is_empty() {
                    let link = bpf::attach_uprobes(returns.as_fd(), LinkKind::Returns, file, pid, &returned)?;
                    links.returns.push(link);
                }
                let link = bpf::attach_uprobes(entry.as_fd(), LinkKind::Entries, file, pid, probes)?;
                links.entries.push(link);
            }
            Loaded::Perf { entry, returns, events } => {
                let one = |program: &OwnedFd, probe: &Probe, is_return| {
                    let event = events.open(file, pid, probe.offset, is_return)?;
                    bpf::attach_to_event(program.as_fd(), event.as_fd(), probe.cookie)
                };
                for probe in &returned {
                    links.returns.push(one(returns, probe, true)?);
                }
                for probe in probes {
                    links.entries.push(one(entry, probe, false)?);
                }
            }
        }
        Ok(links)
    }
}

impl LiveMap {
    fn new(map: Map) -> Result<Self, BpfError> {
        let fd = descriptor(&map).ok_or(BpfError::Missing { what: LIVE })?;
        let fd = fd.try_clone_to_owned().map_err(HeapLoadError::Descriptor)?;
        let map = map.try_into().map_err(|source| BpfError::Map { map: LIVE, source })?;
        Ok(Self { fd, map })
    }

    /// Each sampled allocation in use, and the time of its sample.
    pub(crate) fn each(&self, mut each: impl FnMut(LiveKey, u64)) -> io::Result<()> {
        const KEY: usize = size_of::<LiveKey>();
        bpf::read_hash_map::<KEY, 8>(self.fd.as_fd(), |key, value| {
            let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *key;
            let pointer = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
            let target = u32::from_ne_bytes([i, j, k, l]);
            each(LiveKey { pointer, target, reserved: 0 }, u64::from_ne_bytes(*value));
        })
    }

    /// Forgets an allocation.
    pub(crate) fn remove(&mut self, key: LiveKey) {
        // It may have been freed meanwhile.
        let _ = self.map.remove(&Value(key));
    }
}

impl HeapCounts {
    /// The counter's value since load, over all CPUs.
    pub(crate) fn get(&self, counter: HeapCounter) -> Result<u64, MapError> {
        Ok(self.map.get(&(counter as u32), 0)?.iter().sum())
    }
}

fn load_program(
    object: &[u8],
    name: &'static str,
    kind: UprobeKind,
    maps: &StdHashMap<String, OwnedFd>,
) -> Result<OwnedFd, BpfError> {
    let refused = |source| HeapLoadError::Load { program: name, source };
    let mut object = Object::parse(object).map_err(HeapLoadError::Object)?;
    let features = aya::features();
    let btf = match features.btf() {
        Some(features) => object.fixup_and_sanitize_btf(features).map_err(HeapLoadError::Btf)?,
        None => None,
    };
    let btf = btf.ok_or(BpfError::Missing { what: "type information" })?.to_bytes();
    let btf = bpf::load_btf(&btf).map_err(refused)?;
    let no_program = object.maps.get(NO_PROGRAM).ok_or(BpfError::Missing { what: NO_PROGRAM })?.clone();
    let no_program = MapData::create(no_program, NO_PROGRAM, None)
        .map_err(|source| BpfError::Map { map: NO_PROGRAM, source })?;
    link(&mut object, maps, &no_program).map_err(|source| HeapLoadError::Link { program: name, source })?;
    let program = object.programs.get(name).ok_or(BpfError::Missing { what: name })?;
    let function = object.functions.get(&program.function_key()).ok_or(BpfError::Missing { what: name })?;
    let instructions: Vec<u8> = function.instructions.iter().flat_map(instruction_bytes).collect();
    let (functions, lines) = (function.func_info.func_info_bytes(), function.line_info.line_info_bytes());
    let license: CString = program.license.clone();
    let code = Code {
        instructions: &instructions,
        license: &license,
        btf: btf.as_fd(),
        functions: Records { bytes: &functions, record_bytes: function.func_info_rec_size },
        lines: Records { bytes: &lines, record_bytes: function.line_info_rec_size },
    };
    Ok(bpf::load_uprobe(name, kind, &code).map_err(refused)?)
}

/// Writes the maps' descriptors into the instructions, and puts called functions behind their callers.
fn link(
    object: &mut Object,
    fds: &StdHashMap<String, OwnedFd>,
    no_program: &MapData,
) -> Result<(), EbpfRelocationError> {
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let maps = object.maps.clone();
    let fd = |name: &str| match name {
        NO_PROGRAM => Some(no_program.fd().as_fd().as_raw_fd()),
        _ => fds.get(name).map(AsRawFd::as_raw_fd),
    };
    let fds = maps.iter().filter_map(|(name, map)| Some((name.as_str(), fd(name)?, map)));
    object.relocate_maps(fds, &sections)?;
    object.relocate_calls(&sections)?;
    object.sanitize_functions(aya::features());
    Ok(())
}

/// Of the kinds of maps that the programs have.
fn descriptor(map: &Map) -> Option<BorrowedFd<'_>> {
    match map {
        Map::Array(map)
        | Map::ArrayOfMaps(map)
        | Map::PerCpuArray(map)
        | Map::HashMap(map)
        | Map::RingBuf(map) => Some(map.fd().as_fd()),
        _ => None,
    }
}

/// Source: include/uapi/linux/bpf.h: struct bpf_insn.
fn instruction_bytes(instruction: &aya_obj::generated::bpf_insn) -> [u8; 8] {
    let [off_low, off_high] = instruction.off.to_ne_bytes();
    let [a, b, c, d] = instruction.imm.to_ne_bytes();
    let registers = instruction.dst_reg() | instruction.src_reg() << 4;
    [instruction.code, registers, off_low, off_high, a, b, c, d]
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use aya_obj::generated::{BPF_CALL, BPF_JMP, bpf_func_id::BPF_FUNC_tail_call};

    use super::*;
    use crate::bpf::load::OBJECT;

    #[test]
    fn programs_that_may_be_preempted_have_their_variables_on_the_threads_own_stack() {
        let object = Object::parse(OBJECT).expect("the object of this build");
        for name in [SESSION, ENTRY, RETURN] {
            let function = &object.functions[&object.programs[name].function_key()];
            let is_tail_call = |instruction: &&aya_obj::generated::bpf_insn| {
                u32::from(instruction.code) == BPF_JMP | BPF_CALL
                    && instruction.src_reg() == 0
                    && instruction.imm.cast_unsigned() == BPF_FUNC_tail_call as u32
            };
            assert_eq!(function.instructions.iter().filter(is_tail_call).count(), 1, "{name}");
        }
    }
}
