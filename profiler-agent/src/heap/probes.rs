//! The probes of one process: which are in, and what the program in the kernel knows of it.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use aya::maps::MapError;
use profiler_common::heap::{
    Call, Hits, Point, SCALE_ONE, TARGET_ENTRY_ONLY, TARGET_EVERY_RETURN, TARGET_NO_LIVE, Target,
};
use profiler_heap::Function;

use super::{HeapError, budget::Governor, find::Found, link_map::Objects, notes::InUse};
use crate::{
    bpf::{HeapProgram, Links},
    executable::{Executable, ExecutableId},
    sys::bpf::Probe,
};

/// A process that is profiled.
pub(super) struct Attached {
    pub(super) start_ticks: u64,
    /// When its image was first looked at, by the boot clock.
    pub(super) looked_ns: u64,
    pub(super) slot: u32,
    pub(super) objects: Objects,
    pub(super) governor: Governor,
    pub(super) in_use: InUse,
    /// What the program knows of it.
    pub(super) target: Target,
    /// The last reading.
    pub(super) hits: Hits,
    groups: Vec<Group>,
}

/// The functions of one of its files.
struct Group {
    executable: Arc<Executable>,
    path: PathBuf,
    points: Vec<u32>,
    allocs: Probes,
    /// Functions that free what they replace.
    reallocs: Probes,
    frees: Probes,
}

/// Functions that are probed together.
#[derive(Default)]
struct Probes {
    probes: Vec<Probe>,
    /// `None` while none of them is in.
    links: Option<Links>,
}

/// Which probes are in. Those of `realloc` are with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) allocs: bool,
    pub(super) frees: bool,
}

impl Attached {
    /// Nothing is probed yet. `points` takes a free number for each function.
    pub(super) fn new(
        (start_ticks, looked_ns): (u64, u64),
        slot: u32,
        objects: Objects,
        governor: Governor,
        target: Target,
        in_use: InUse,
    ) -> Self {
        let hits = Hits::default();
        Self { start_ticks, looked_ns, slot, objects, governor, in_use, target, hits, groups: Vec::new() }
    }

    /// Functions of these files are to be probed as well; of those that are, nothing changes. Gives back their numbers if
    /// there are too few.
    pub(super) fn add(
        &mut self,
        program: &mut HeapProgram,
        found: Vec<Found>,
        free_points: &mut Vec<u32>,
    ) -> Result<(), HeapError> {
        let known: HashSet<ExecutableId> = self.groups.iter().map(|group| group.executable.id()).collect();
        for found in found.into_iter().filter(|found| !known.contains(&found.executable.id())) {
            if free_points.len() < found.functions.len() {
                return Err(HeapError::full());
            }
            let points = free_points.split_off(free_points.len() - found.functions.len());
            match Group::new(program, self.slot, &found, &points) {
                Ok(group) => self.groups.push(group),
                Err(error) => {
                    free_points.extend(points);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Lets go of files that the process no longer has.
    pub(super) fn keep(&mut self, found: &[Found], free_points: &mut Vec<u32>) {
        let ids: HashSet<ExecutableId> = found.iter().map(|found| found.executable.id()).collect();
        self.groups.retain_mut(|group| {
            let is_there = ids.contains(&group.executable.id());
            if !is_there {
                group.close();
                free_points.append(&mut group.points);
            }
            is_there
        });
    }

    pub(super) fn functions(&self) -> usize {
        self.groups.iter().map(|group| group.points.len()).sum()
    }

    pub(super) fn files(&self) -> String {
        self.groups.iter().map(|group| group.executable.name().into_owned()).collect::<Vec<_>>().join(", ")
    }

    /// Puts the wanted probes in and takes the others out. Frees are the first in and the last out, so that none is missed of
    /// what was sampled.
    pub(super) fn probe(&mut self, program: &HeapProgram, pid: u32, wanted: Wanted) -> Result<(), HeapError> {
        let has_returns = self.target.flags & TARGET_ENTRY_ONLY == 0;
        for group in &mut self.groups {
            let Group { executable, path, allocs, reallocs, frees, .. } = group;
            let attach = |probes: &[Probe]| {
                let attached = program.attach(path, pid, probes, has_returns);
                attached.map_err(|source| HeapError::Attach { file: executable.to_string(), source })
            };
            let Wanted { allocs: wants_allocs, frees: wants_frees } = wanted;
            if !wants_allocs {
                allocs.links = None;
            }
            frees.put_in(wants_frees, attach)?;
            reallocs.put_in(wants_allocs || wants_frees, attach)?;
            allocs.put_in(wants_allocs, attach)?;
        }
        Ok(())
    }

    /// Takes the probes of returns out. The program is to be told first.
    pub(super) fn drop_returns(&mut self) {
        for group in &mut self.groups {
            let all = [&mut group.allocs, &mut group.reallocs, &mut group.frees];
            all.into_iter().filter_map(|probes| probes.links.as_mut()).for_each(Links::drop_returns);
        }
    }

    /// Takes samples from one time to another. To be called while none are taken.
    pub(super) fn set_time(
        &mut self,
        program: &mut HeapProgram,
        (begin_ns, end_ns): (u64, u64),
        scale: f64,
    ) -> Result<(), MapError> {
        self.target.begin_ns = begin_ns;
        self.target.scale = (scale * f64::from(SCALE_ONE)).round() as u32;
        self.write(program)?;
        self.target.end_ns = end_ns;
        self.write(program)
    }

    /// Takes no samples from a time on, which is now.
    pub(super) fn stop(&mut self, program: &mut HeapProgram, now_ns: u64) -> Result<(), MapError> {
        self.target.end_ns = self.target.end_ns.min(now_ns);
        self.write(program)
    }

    /// Follows samples until they are freed, or no longer, under a number by which they are told from those before.
    pub(super) fn set_in_use(
        &mut self,
        program: &mut HeapProgram,
        in_use: InUse,
        id: u32,
    ) -> Result<(), MapError> {
        self.in_use = in_use;
        self.target.id = id;
        self.target.flags = flags(program, in_use);
        self.write(program)
    }

    pub(super) fn set_rate(&mut self, program: &mut HeapProgram, rate: u32) -> Result<(), MapError> {
        self.target.rate = rate;
        self.write(program)
    }

    /// Tells the program what is known of the process.
    pub(super) fn write(&self, program: &mut HeapProgram) -> Result<(), MapError> {
        program.set_target(self.slot, self.target)
    }

    /// Takes all probes out and gives the numbers of its functions back.
    pub(super) fn take_out(self, free_points: &mut Vec<u32>) {
        drop(self.release(free_points));
    }

    /// Gives all probes and the numbers of its functions back, which may be used again when the probes are out.
    pub(super) fn release(self, free_points: &mut Vec<u32>) -> Vec<Links> {
        let mut links = Vec::new();
        for mut group in self.groups {
            free_points.append(&mut group.points);
            let Group { allocs, reallocs, frees, .. } = group;
            links.extend([allocs, reallocs, frees].into_iter().filter_map(|probes| probes.links));
        }
        links
    }
}

/// Takes probes out, many at a time: for each, the kernel waits until no CPU is in a program any more.
pub(super) fn take_out_together(links: Vec<Links>) {
    const THREADS_MAX: usize = 32;
    let threads = links.len().min(THREADS_MAX);
    let links = Mutex::new(links);
    let next = || links.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let take_out = || std::iter::from_fn(&next).for_each(drop);
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without it, the others do its part.
            let _ = thread::Builder::new().name("heap-detach".to_owned()).spawn_scoped(scope, take_out);
        }
        take_out();
    });
}

/// What the program is to do for a process.
pub(super) fn flags(program: &HeapProgram, in_use: InUse) -> u32 {
    let by_use = match in_use {
        InUse::Known => 0,
        InUse::FreesTooDear => TARGET_NO_LIVE,
        InUse::Seccomp => TARGET_NO_LIVE | TARGET_ENTRY_ONLY,
    };
    if program.probes_every_return() { by_use | TARGET_EVERY_RETURN } else { by_use }
}

impl Group {
    /// Writes what the program finds at each probe.
    fn new(program: &mut HeapProgram, slot: u32, found: &Found, points: &[u32]) -> Result<Self, MapError> {
        let (executable, path) = (Arc::clone(&found.executable), found.path());
        let (allocs, reallocs, frees) = Default::default();
        let mut group = Self { executable, path, points: points.to_vec(), allocs, reallocs, frees };
        for (&cookie, (function, address)) in points.iter().zip(&found.functions) {
            let &Function { name: _, call, offset, arguments, flags, is_standard: _ } = function;
            let point = Point { address: *address, target: slot, call: call as u8, flags, arguments };
            program.set_point(cookie, point)?;
            let probes = match call {
                Call::Free => &mut group.frees,
                Call::Reallocate | Call::ReallocateArray => &mut group.reallocs,
                Call::Allocate | Call::AllocateArray | Call::AllocateAligned | Call::AllocateInto => {
                    &mut group.allocs
                }
            };
            let has_return = call != Call::Free;
            probes.probes.push(Probe { offset, cookie: cookie.into(), has_return });
        }
        Ok(group)
    }

    fn close(&mut self) {
        for probes in [&mut self.allocs, &mut self.reallocs, &mut self.frees] {
            probes.links = None;
        }
    }
}

impl Probes {
    fn put_in(
        &mut self,
        is_wanted: bool,
        attach: impl Fn(&[Probe]) -> Result<Links, HeapError>,
    ) -> Result<(), HeapError> {
        if !is_wanted {
            self.links = None;
        } else if self.links.is_none() && !self.probes.is_empty() {
            self.links = Some(attach(&self.probes)?);
        }
        Ok(())
    }
}
