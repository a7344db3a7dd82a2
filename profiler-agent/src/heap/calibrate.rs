//! Which way of probing functions this kernel has, and what a hit costs on this host: found out on functions of this
//! program's own.

use std::{os::fd::AsRawFd as _, path::PathBuf, sync::Arc, time::Instant};

use aya::maps::MapError;
use profiler_common::heap::{Call, LIVE_MAX, POINT_NESTS, Point, SCALE_ONE, TARGET_EVERY_RETURN, Target};

use super::{Costs, rules::DEFAULT_RATE};
use crate::{
    addr::Addr,
    bpf::{BpfError, HeapProgram},
    executable::Executable,
    process::{Backing, ImageReader},
    sys::{
        bpf::{Probe, UprobeKind},
        probed::Probed,
        seccomp::FilteredChild,
    },
};

/// Ways to probe, the cheapest first.
const KINDS: [UprobeKind; 3] = [UprobeKind::Session, UprobeKind::Multi, UprobeKind::Perf];

/// Calls of each function that are timed, in batches. A batch in which the thread was preempted does not move the median.
const BATCHES: usize = 21;
const BATCH: u32 = 50;
/// Bytes that the functions are taken to allocate.
const SIZE: u64 = 16;
/// The first argument's register, numbered by the psABI of x86-64.
const RDI: u16 = 5;

/// What is tried, for tests to choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Ways to probe.
    pub(crate) kinds: Vec<UprobeKind>,
    /// Whether to go by it that filters kill for probed returns.
    pub(crate) seccomp_kills: bool,
    /// Sampled allocations in use, at most.
    pub(crate) live_max: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { kinds: KINDS.to_vec(), seccomp_kills: false, live_max: LIVE_MAX }
    }
}

/// Why a way to probe is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error(transparent)]
    Load(#[from] BpfError),
    #[error("write the maps of the programs")]
    Map(#[from] MapError),
    #[error("find this program's own code")]
    NoCode,
    #[error("attach to this program's own functions")]
    Attach(#[source] std::io::Error),
    #[error("of {calls} calls {entries} entries and {returns} returns were seen")]
    Missed { calls: u64, entries: u64, returns: u64 },
    #[error("no way to probe was tried")]
    Nothing,
    #[error("{kind:?}, the last of the ways to probe functions: {why}")]
    Last { kind: UprobeKind, why: String },
}

/// What was found out.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) kind: UprobeKind,
    pub(super) costs: Costs,
    /// Whether a process under a seccomp filter may have its returns probed.
    pub(super) survives_seccomp: bool,
}

/// Loads the programs of the first way that works. Nothing else may use the program yet.
pub(super) fn prepare(
    program: &mut HeapProgram,
    images: &mut ImageReader,
    options: &Options,
) -> Result<Ready, ProbeError> {
    let mut last = ProbeError::Nothing;
    for &kind in &options.kinds {
        match measure(program, images, kind) {
            Ok(costs) => {
                let survives_seccomp = !options.seccomp_kills && survives_seccomp(program, images)?;
                return Ok(Ready { kind, costs, survives_seccomp });
            }
            Err(error) => {
                let why = format!("{:#}", anyhow::Error::from(error));
                tracing::debug!(?kind, why, "the kernel does not probe in this way");
                last = ProbeError::Last { kind, why };
            }
        }
    }
    Err(last)
}

/// This program's own code.
struct OwnCode {
    executable: Arc<Executable>,
    offsets: [u64; 3],
}

/// In the order of their points.
const FUNCTIONS: [Probed; 3] = [Probed::Emulated, Probed::EmulatedReturn, Probed::Stepped];

impl OwnCode {
    fn find(images: &mut ImageReader) -> Option<Self> {
        let mappings = images.mappings(std::process::id());
        let mapping = mappings.iter().find(|mapping| {
            FUNCTIONS.iter().all(|function| mapping.range().contains(&Addr(function.address())))
        })?;
        let Backing::Executable(executable) = &mapping.backing else { return None };
        let offsets = FUNCTIONS.map(|function| mapping.file_offset(Addr(function.address())).0);
        Some(Self { executable: Arc::clone(executable), offsets })
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.executable.file().as_raw_fd()))
    }

    fn probe(&self, index: usize) -> Probe {
        let has_return = FUNCTIONS[index] == Probed::EmulatedReturn;
        Probe { offset: self.offsets[index], cookie: index as u64, has_return }
    }
}

fn measure(
    program: &mut HeapProgram,
    images: &mut ImageReader,
    kind: UprobeKind,
) -> Result<Costs, ProbeError> {
    program.choose(kind)?;
    let code = OwnCode::find(images).ok_or(ProbeError::NoCode)?;
    let flags = if program.probes_every_return() { TARGET_EVERY_RETURN } else { 0 };
    // Its time never comes: it is asked for samples, and takes none.
    let target = Target { id: 0, rate: DEFAULT_RATE, scale: SCALE_ONE, flags, begin_ns: 0, end_ns: 0 };
    program.set_target(0, target)?;
    for (cookie, function) in (0..).zip(FUNCTIONS) {
        let flags = if function == Probed::EmulatedReturn { POINT_NESTS } else { 0 };
        let call = Call::Allocate as u8;
        program.set_point(
            cookie,
            Point { address: function.address(), target: 0, call, flags, arguments: RDI },
        )?;
    }
    let bare = FUNCTIONS.map(ns_per_call);
    let before = program.hits(0)?;
    let probes = [0, 1, 2].map(|index| code.probe(index));
    let links =
        program.attach(&code.path(), std::process::id(), &probes, true).map_err(ProbeError::Attach)?;
    let probed = FUNCTIONS.map(ns_per_call);
    drop(links);
    let after = program.hits(0)?;
    for cookie in 0..FUNCTIONS.len() as u32 {
        program.set_point(cookie, Point::default())?;
    }
    program.set_target(0, Target::default())?;
    let calls = BATCHES as u64 * u64::from(BATCH);
    let (entries, returns) = (after.allocs - before.allocs, after.returns - before.returns);
    if (entries, returns) != (3 * calls, calls) {
        return Err(ProbeError::Missed { calls: 3 * calls, entries, returns });
    }
    let [entry, both, stepped] = std::array::from_fn(|index| (probed[index] - bare[index]).max(0.0));
    Ok(Costs { entry_ns: entry, return_ns: (both - entry).max(0.0), stepped_ns: stepped })
}

/// The median of batches.
fn ns_per_call(function: Probed) -> f64 {
    let mut batches: [f64; BATCHES] = std::array::from_fn(|_| {
        let began = Instant::now();
        (0..BATCH).for_each(|_| {
            std::hint::black_box(function.call(SIZE));
        });
        began.elapsed().as_nanos() as f64 / f64::from(BATCH)
    });
    batches.sort_unstable_by(f64::total_cmp);
    batches[BATCHES / 2]
}

/// Has a child under a filter return from a probed function.
fn survives_seccomp(program: &mut HeapProgram, images: &mut ImageReader) -> Result<bool, ProbeError> {
    const INDEX: u32 = 1;
    let code = OwnCode::find(images).ok_or(ProbeError::NoCode)?;
    let flags = if program.probes_every_return() { TARGET_EVERY_RETURN } else { 0 };
    let target = Target { id: 0, rate: DEFAULT_RATE, scale: SCALE_ONE, flags, begin_ns: 0, end_ns: 0 };
    let address = Probed::EmulatedReturn.address();
    let point = Point { address, target: 0, call: Call::Allocate as u8, flags: POINT_NESTS, arguments: RDI };
    program.set_target(0, target)?;
    program.set_point(INDEX, point)?;
    let before = program.hits(0)?;
    let child = FilteredChild::start().map_err(ProbeError::Attach)?;
    let links = program.attach(&code.path(), child.pid(), &[code.probe(INDEX as usize)], true);
    let links = links.map_err(ProbeError::Attach)?;
    let survived = child.survives();
    drop(links);
    // One that the probe did not see has proved nothing.
    let is_seen = program.hits(0)?.returns > before.returns;
    program.set_point(INDEX, Point::default())?;
    program.set_target(0, Target::default())?;
    Ok(survived && is_seen)
}
