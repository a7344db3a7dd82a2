//! The program for heap samples. aya loads none for uprobe sessions, so it is taken from the object here, with the maps
//! that aya has made.

use std::{
    collections::HashSet,
    ffi::CString,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
};
use aya_obj::{Object, btf::BtfError, obj::ParseError, relocation::EbpfRelocationError};
use profiler_common::heap::{
    HeapCounter, LIVE_MAX, LiveKey, PENDING_MAX, POINTS_MAX, Point, SCRATCH_SLOTS, TARGETS_MAX, Target,
};

use super::{load::BpfError, value::Value};
use crate::sys::bpf::{self, Code, Probe, Records};

/// Sizes of the maps of heap profiling. Preallocated: 64 KiB of points, 2 KiB of targets, 0.9 MiB of threads; live
/// allocations take about 100 bytes each as they come; 100 KiB a CPU of samples in the making.
pub(super) const HEAP_MAPS: [(&str, u32); 6] = [
    ("HEAP_POINTS", POINTS_MAX),
    ("HEAP_TARGETS", TARGETS_MAX),
    ("HEAP_HITS", TARGETS_MAX),
    ("HEAP_PENDING", PENDING_MAX),
    ("HEAP_LIVE", LIVE_MAX),
    ("HEAP_SCRATCH", SCRATCH_SLOTS),
];

const PROGRAM: &str = "heap_probe";

/// Why the program could not be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeapLoadError {
    #[error("heap profiling is for x86-64 only")]
    Architecture,
    #[error("read the BPF object")]
    Object(#[from] ParseError),
    #[error("prepare the type information of the BPF object")]
    Btf(#[from] BtfError),
    #[error("link program {PROGRAM}")]
    Link(#[from] EbpfRelocationError),
    #[error("load program {PROGRAM} (uprobe sessions need kernel 6.13)")]
    Load(#[source] io::Error),
}

/// The program, and the maps it shares with the agent. Dropping it unloads the program once no link holds it.
pub(crate) struct HeapProgram {
    program: OwnedFd,
    points: Array<MapData, Value<Point>>,
    targets: Array<MapData, Value<Target>>,
    hits: PerCpuArray<MapData, u64>,
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
    map: std::sync::Arc<PerCpuArray<MapData, u64>>,
}

impl HeapProgram {
    /// Loads the program of `object` into the kernel, with the maps of `ebpf`, which was made from the same bytes and
    /// whose maps nobody has taken yet.
    pub(super) fn load(object: &[u8], ebpf: &mut Ebpf) -> Result<(Self, LiveMap, HeapCounts), BpfError> {
        let program = load_program(object, ebpf)?;
        let mut take = |name: &'static str| ebpf.take_map(name).ok_or(BpfError::Missing { what: name });
        let failed = |map| move |source: MapError| BpfError::Map { map, source };
        let program = Self {
            program,
            points: take("HEAP_POINTS")?.try_into().map_err(failed("HEAP_POINTS"))?,
            targets: take("HEAP_TARGETS")?.try_into().map_err(failed("HEAP_TARGETS"))?,
            hits: take("HEAP_HITS")?.try_into().map_err(failed("HEAP_HITS"))?,
        };
        let live = LiveMap::new(take("HEAP_LIVE")?)?;
        let map: PerCpuArray<_, _> = take("HEAP_STATS")?.try_into().map_err(failed("HEAP_STATS"))?;
        Ok((program, live, HeapCounts { map: map.into() }))
    }

    /// Writes what a probe with this cookie finds.
    pub(crate) fn set_point(&mut self, cookie: u32, point: Point) -> Result<(), MapError> {
        self.points.set(cookie, Value(point), 0)
    }

    /// Writes what the program knows of a process.
    pub(crate) fn set_target(&mut self, slot: u32, target: Target) -> Result<(), MapError> {
        self.targets.set(slot, Value(target), 0)
    }

    /// Probes hit by the processes that had the slot so far, all together.
    pub(crate) fn hits(&self, slot: u32) -> Result<u64, MapError> {
        Ok(self.hits.get(&slot, 0)?.iter().sum())
    }

    /// Puts probes into one process, as long as the link is open.
    pub(crate) fn attach(&self, file: &Path, pid: u32, probes: &[Probe]) -> io::Result<OwnedFd> {
        bpf::attach_uprobe_session(self.program.as_fd(), file, pid, probes)
    }
}

impl LiveMap {
    fn new(map: Map) -> Result<Self, BpfError> {
        const MAP: &str = "HEAP_LIVE";
        let fd = descriptor(&map).ok_or(BpfError::Missing { what: MAP })?;
        let fd = fd.try_clone_to_owned().map_err(HeapLoadError::Load)?;
        let map = map.try_into().map_err(|source| BpfError::Map { map: MAP, source })?;
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

fn load_program(object: &[u8], ebpf: &Ebpf) -> Result<OwnedFd, BpfError> {
    if !cfg!(target_arch = "x86_64") {
        return Err(HeapLoadError::Architecture.into());
    }
    let mut object = Object::parse(object).map_err(HeapLoadError::Object)?;
    let features = aya::features();
    let btf = match features.btf() {
        Some(features) => object.fixup_and_sanitize_btf(features).map_err(HeapLoadError::Btf)?,
        None => None,
    };
    let btf = btf.ok_or(BpfError::Missing { what: "type information" })?.to_bytes();
    let btf = bpf::load_btf(&btf).map_err(HeapLoadError::Load)?;
    link(&mut object, ebpf)?;
    let program = object.programs.get(PROGRAM).ok_or(BpfError::Missing { what: PROGRAM })?;
    let function =
        object.functions.get(&program.function_key()).ok_or(BpfError::Missing { what: PROGRAM })?;
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
    Ok(bpf::load_uprobe_session(PROGRAM, &code).map_err(HeapLoadError::Load)?)
}

/// Writes the maps' descriptors into the instructions, and puts called functions behind their callers.
fn link(object: &mut Object, ebpf: &Ebpf) -> Result<(), HeapLoadError> {
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let maps = object.maps.clone();
    let fds = maps
        .iter()
        .filter_map(|(name, map)| Some((name.as_str(), descriptor(ebpf.map(name)?)?.as_raw_fd(), map)));
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
