//! One memory limit, and the sizes that follow from it for every map, table, cache and queue of the agent.
//!
//! ```text
//! limit ─ the embedded backend's quarter, where there is one
//!       ─ what the agent takes without a sample: code, stacks, the kernel's symbols, the file being read
//!       = the rest, in shares
//! ```

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use profiler_common::{
    limits::{UNWIND_DIRECTORIES_MAX, UNWIND_LEAVES_MAX, UNWIND_PROCESSES_MAX, UNWIND_RULES_MAX},
    unwind::{Directory, Leaf, mappings::MappingChunk},
};

const MIB: u64 = 1 << 20;

/// Where neither the user nor a cgroup says another.
const DEFAULT_BYTES: u64 = 256 * MIB;
/// What the agent takes beside the shares.
const BASE_BYTES: u64 = 32 * MIB;
/// The least that is worth being divided: at less, a table or a queue would hold too little to be of use.
const SHARED_BYTES_MIN: u64 = 16 * MIB;
/// The part of the limit that is left to the embedded backend, whose sizes are its own.
const BACKEND_PART: u64 = 4;

/// The rest, in these parts.
const PARTS: u64 = 64;
const UNWIND_PARTS: u64 = 8;
const RING_PARTS: u64 = 4;
const DRAIN_PARTS: u64 = 4;
const WINDOWS_PARTS: u64 = 15;
const SYMBOLS_PARTS: u64 = 10;
const SYMBOL_FILES_PARTS: u64 = 5;
const UPLOAD_PARTS: u64 = 8;
const EXECUTABLES_PARTS: u64 = 2;
const PROCESSES_PARTS: u64 = 7;
const MAPPING_RINGS_PARTS: u64 = 1;
const _: () = assert!(
    UNWIND_PARTS
        + RING_PARTS
        + DRAIN_PARTS
        + WINDOWS_PARTS
        + SYMBOLS_PARTS
        + SYMBOL_FILES_PARTS
        + UPLOAD_PARTS
        + EXECUTABLES_PARTS
        + PROCESSES_PARTS
        + MAPPING_RINGS_PARTS
        == PARTS
);

/// What one of each takes. Tests hold processes and executables against what the allocator counts.
const BATCH_BYTES: u64 = crate::drain::BATCH_BYTES_MAX as u64;
pub(crate) const EXECUTABLE_BYTES: usize = 1280;
pub(crate) const PROCESS_BYTES: usize = 2048;
const LEAF_BYTES: u64 = size_of::<Leaf>() as u64;
const DIRECTORY_BYTES: u64 = size_of::<Directory>() as u64;
/// A chunk, the entry that names it with the hash table's own, and the agent's copy.
const UNWIND_PROCESS_BYTES: u64 = size_of::<MappingChunk>() as u64 + 256;
/// Map values are multiples of 8 bytes.
const RULES_BYTES: u64 = 16 * UNWIND_RULES_MAX as u64;

/// More than this is of no use.
const SYMBOLS_BYTES_MAX: u64 = 256 * MIB;
const SYMBOL_FILES_BYTES_MAX: u64 = 64 * MIB;
const WINDOWS_BYTES_MAX: u64 = 512 * MIB;
const UPLOAD_BYTES_MAX: u64 = 256 * MIB;
const DRAIN_BATCHES_MAX: u64 = 1024;
const EXECUTABLES_MAX: u64 = 8192;
const PROCESSES_MAX: u64 = 65_536;
const MAPPING_RINGS_BYTES_MAX: u64 = 16 * MIB;
const RING_BYTES_MAX: u64 = 16 * MIB;
const RING_BYTES_MIN: u64 = 256 << 10;

/// Sizes of the unwind tables' maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnwindSizes {
    /// Pages of 512 rows.
    pub(crate) leaves: u32,
    /// Directories of 256 pages.
    pub(crate) directories: u32,
    /// Processes that are walked by tables.
    pub(crate) processes: u32,
    /// Distinct rules.
    pub(crate) rules: u32,
}

/// The bound of everything that grows with what is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// All of it, in bytes.
    pub(crate) limit_bytes: u64,
    /// Bytes of the ring buffer, a power of two; a machine of few CPUs takes less.
    pub(crate) ring_bytes_max: u32,
    /// Maps of unwind tables.
    pub(crate) unwind: UnwindSizes,
    /// Batches between drain and worker.
    pub(crate) drain_batches: usize,
    /// Bytes of the open windows and of those that wait for the encoder.
    pub(crate) windows_bytes: usize,
    /// Bytes of symbolized locations.
    pub(crate) symbols_bytes: usize,
    /// Bytes of the tables of files that are symbolized, of all threads together.
    pub(crate) symbol_files_bytes: usize,
    /// Bytes that wait for all destinations together.
    pub(crate) upload_bytes: usize,
    /// Open executables.
    pub(crate) executables: usize,
    /// Processes remembered.
    pub(crate) processes: usize,
    /// Bytes of the rings that new mappings are told by, of all CPUs.
    pub(crate) mapping_rings_bytes: usize,
}

/// The limit is too small to divide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooSmall {
    /// The least that is accepted.
    pub(crate) least_bytes: u64,
}

impl MemoryPlan {
    /// The sizes that keep the agent within so many bytes.
    pub(crate) fn for_limit(limit_bytes: u64, has_backend: bool) -> Result<Self, TooSmall> {
        let backend_bytes = if has_backend { limit_bytes / BACKEND_PART } else { 0 };
        let shared = (limit_bytes - backend_bytes).saturating_sub(BASE_BYTES);
        if shared < SHARED_BYTES_MIN {
            return Err(TooSmall { least_bytes: least_bytes(has_backend) });
        }
        let part = |parts: u64| shared / PARTS * parts;
        let at_most = |bytes: u64, most: u64| usize::try_from(bytes.min(most)).unwrap_or(usize::MAX);
        Ok(Self {
            limit_bytes,
            ring_bytes_max: ring_bytes_max(part(RING_PARTS)),
            unwind: unwind_sizes(part(UNWIND_PARTS)),
            drain_batches: at_most(part(DRAIN_PARTS) / BATCH_BYTES, DRAIN_BATCHES_MAX),
            windows_bytes: at_most(part(WINDOWS_PARTS), WINDOWS_BYTES_MAX),
            symbols_bytes: at_most(part(SYMBOLS_PARTS), SYMBOLS_BYTES_MAX),
            symbol_files_bytes: at_most(part(SYMBOL_FILES_PARTS), SYMBOL_FILES_BYTES_MAX),
            upload_bytes: at_most(part(UPLOAD_PARTS), UPLOAD_BYTES_MAX),
            executables: at_most(part(EXECUTABLES_PARTS) / EXECUTABLE_BYTES as u64, EXECUTABLES_MAX),
            processes: at_most(part(PROCESSES_PARTS) / PROCESS_BYTES as u64, PROCESSES_MAX),
            mapping_rings_bytes: at_most(part(MAPPING_RINGS_PARTS), MAPPING_RINGS_BYTES_MAX),
        })
    }

    /// What each may take, in bytes, by name.
    pub(crate) fn parts(&self) -> [(&'static str, u64); 11] {
        let Self { limit_bytes: _, ring_bytes_max, unwind, mapping_rings_bytes, .. } = *self;
        let Self { drain_batches, windows_bytes, symbols_bytes, symbol_files_bytes, .. } = *self;
        let Self { upload_bytes, executables, processes, .. } = *self;
        [
            ("base", BASE_BYTES),
            ("ring", ring_bytes_max.into()),
            ("unwind_tables", unwind.bytes()),
            ("drain_queue", drain_batches as u64 * BATCH_BYTES),
            ("windows", windows_bytes as u64),
            ("symbols", symbols_bytes as u64),
            ("symbol_files", symbol_files_bytes as u64),
            ("upload_queue", upload_bytes as u64),
            ("executables", (executables * EXECUTABLE_BYTES) as u64),
            ("processes", (processes * PROCESS_BYTES) as u64),
            ("mapping_rings", mapping_rings_bytes as u64),
        ]
    }
}

impl UnwindSizes {
    fn bytes(self) -> u64 {
        let Self { leaves, directories, processes, rules } = self;
        let entries = [
            (leaves, LEAF_BYTES),
            (directories, DIRECTORY_BYTES),
            (processes, UNWIND_PROCESS_BYTES),
            (rules, RULES_BYTES / u64::from(UNWIND_RULES_MAX)),
        ];
        entries.iter().map(|&(count, bytes)| u64::from(count) * bytes).sum()
    }
}

/// `limit 256 MiB: base 32, ring 8, ..` in MiB.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "limit {} MiB:", self.limit_bytes / MIB)?;
        for (at, (name, bytes)) in self.parts().into_iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma} {name} {:.1}", bytes as f64 / MIB as f64)?;
        }
        Ok(())
    }
}

/// The least limit that [`MemoryPlan::for_limit`] accepts.
fn least_bytes(has_backend: bool) -> u64 {
    let own = BASE_BYTES + SHARED_BYTES_MIN;
    if has_backend { own * BACKEND_PART / (BACKEND_PART - 1) } else { own }
}

fn ring_bytes_max(bytes: u64) -> u32 {
    // The largest power of two that is not more.
    let power = 1 << bytes.max(1).ilog2();
    u32::try_from(power.clamp(RING_BYTES_MIN, RING_BYTES_MAX)).unwrap_or(u32::MAX)
}

/// A sixth for processes, a twentieth for directories, the rest for leaves, which are made as they are needed; rules are few
/// and always the same room.
fn unwind_sizes(bytes: u64) -> UnwindSizes {
    let bytes = bytes.saturating_sub(RULES_BYTES);
    let entries =
        |bytes: u64, of: u64, most: u32| u32::try_from(bytes / of).unwrap_or(u32::MAX).clamp(1, most);
    let processes = entries(bytes / 6, UNWIND_PROCESS_BYTES, UNWIND_PROCESSES_MAX);
    let directories = entries(bytes / 20, DIRECTORY_BYTES, UNWIND_DIRECTORIES_MAX);
    let others = u64::from(processes) * UNWIND_PROCESS_BYTES + u64::from(directories) * DIRECTORY_BYTES;
    let leaves = entries(bytes - others, LEAF_BYTES, UNWIND_LEAVES_MAX);
    UnwindSizes { leaves, directories, processes, rules: UNWIND_RULES_MAX }
}

/// The limit where the user gives none: 90 % of what the agent's own cgroup may take, or the default.
pub(crate) fn default_limit_bytes(proc_root: &Path) -> u64 {
    cgroup_limit_bytes(proc_root).map_or(DEFAULT_BYTES, |bytes| bytes / 10 * 9)
}

/// The least limit of this process's memory cgroup and of those above it; `None` where none of them has one. Source:
/// Documentation/admin-guide/cgroup-v2.rst, memory.max; cgroup-v1/memory.rst, memory.limit_in_bytes.
fn cgroup_limit_bytes(proc_root: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(proc_root.join("self").join(name)).unwrap_or_default();
    let (mounts, cgroups) = (read("mounts"), read("cgroup"));
    let hierarchies = mounts.lines().filter_map(Hierarchy::parse);
    let limits = hierarchies.filter_map(|hierarchy| hierarchy.limit_bytes(hierarchy.path(&cgroups)?));
    limits.min()
}

/// A mounted hierarchy that limits memory.
struct Hierarchy {
    mount: PathBuf,
    /// Version 1, where the hierarchy is named by its controller.
    is_v1: bool,
}

impl Hierarchy {
    /// Takes a line of `/proc/<pid>/mounts`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let (_, mount, kind, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let is_v1 = kind == "cgroup" && options.split(',').any(|option| option == "memory");
        (is_v1 || kind == "cgroup2").then(|| Self { mount: mount.into(), is_v1 })
    }

    /// The process's cgroup in it, from the lines of `/proc/<pid>/cgroup`.
    fn path<'a>(&self, cgroups: &'a str) -> Option<&'a Path> {
        cgroups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let is_here = match self.is_v1 {
                true => controllers.split(',').any(|controller| controller == "memory"),
                false => controllers.is_empty(),
            };
            is_here.then_some(Path::new(path))
        })
    }

    /// The least limit from a cgroup up to the root. A part of the path that is not mounted here is none of them.
    fn limit_bytes(&self, path: &Path) -> Option<u64> {
        /// Version 1 writes "no limit" as the largest number of whole pages.
        const UNLIMITED: u64 = 1 << 60;
        let file = if self.is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
        let relative = path.strip_prefix("/").unwrap_or(path);
        let read =
            |cgroup: &Path| fs::read_to_string(self.mount.join(cgroup).join(file)).ok()?.trim().parse().ok();
        relative.ancestors().filter_map(read).filter(|&bytes: &u64| bytes < UNLIMITED).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(mib: u64, has_backend: bool) -> MemoryPlan {
        MemoryPlan::for_limit(mib * MIB, has_backend).expect("enough")
    }

    #[test]
    fn the_parts_are_never_more_than_the_limit() {
        for has_backend in [false, true] {
            for mib in (64..4096).step_by(7) {
                let plan = plan(mib, has_backend);
                let sum: u64 = plan.parts().iter().map(|(_, bytes)| bytes).sum();
                let backend = if has_backend { plan.limit_bytes / BACKEND_PART } else { 0 };
                assert!(sum + backend <= plan.limit_bytes, "{plan}: {sum} and {backend}");
            }
        }
    }

    #[test]
    fn the_least_limit_is_accepted_and_less_is_not() {
        for has_backend in [false, true] {
            let least = least_bytes(has_backend);
            let plan = MemoryPlan::for_limit(least, has_backend).expect("the least");
            assert!(
                plan.processes >= 512 && plan.unwind.leaves >= 256 && plan.drain_batches >= 8,
                "{plan:?}"
            );
            let refused = MemoryPlan::for_limit(least - 2, has_backend);
            assert_eq!(refused, Err(TooSmall { least_bytes: least }));
        }
    }

    #[test]
    fn more_memory_is_never_less_of_anything() {
        let sizes = |plan: MemoryPlan| plan.parts().map(|(_, bytes)| bytes);
        for mib in 64..2048 {
            let (less, more) = (sizes(plan(mib, false)), sizes(plan(mib + 1, false)));
            assert!(less.iter().zip(more).all(|(&less, more)| less <= more), "{mib} MiB");
        }
    }

    #[test]
    fn the_default_holds_what_a_machine_of_some_hundred_processes_needs() {
        let plan = plan(256, false);
        let expect = "limit 256 MiB: base 32.0, ring 8.0, unwind_tables 28.0, drain_queue 14.0, windows 52.5, symbols \
                       35.0, symbol_files 17.5, upload_queue 28.0, executables 7.0, processes 24.5, mapping_rings 3.5";
        assert_eq!(plan.to_string(), expect);
        assert_eq!(plan.unwind.processes, UNWIND_PROCESSES_MAX);
        assert!(plan.unwind.leaves >= 10_000, "two compilers with their libraries: {plan:?}");
    }

    /// `/proc` and cgroup mounts in a directory: files with their content.
    #[track_caller]
    fn check(mounts: &str, cgroup: &str, files: &[(&str, &str)], expect: Option<u64>) {
        let root = tempfile::tempdir().expect("a temporary directory");
        let at = |path: &str| root.path().join(path);
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
            fs::write(path, text).expect("a file");
        };
        write(at("proc/self/mounts"), &mounts.replace("ROOT", root.path().to_str().expect("a plain path")));
        write(at("proc/self/cgroup"), cgroup);
        files.iter().for_each(|(path, text)| write(at(path), text));
        assert_eq!(cgroup_limit_bytes(&at("proc")), expect);
    }

    #[test]
    fn the_least_limit_up_to_the_root_counts() {
        let v2 = "cgroup2 ROOT/cg cgroup2 rw 0 0\n";
        let files =
            [("cg/a/memory.max", "300\n"), ("cg/a/b/memory.max", "max\n"), ("cg/a/b/c/memory.max", "500\n")];
        check(v2, "0::/a/b/c\n", &files, Some(300));
        check(v2, "0::/a/b\n", &files, Some(300));
        check(v2, "0::/\n", &files, None);
        check(v2, "0::/not/mounted/here\n", &files, None);
        check("", "", &[], None);
    }

    #[test]
    fn version_1_and_hybrid_hosts_limit_by_the_memory_controller() {
        let mounts = "cgroup ROOT/cpu cgroup rw,cpu 0 0\ncgroup ROOT/mem cgroup rw,memory 0 0\n\
                      cgroup2 ROOT/unified cgroup2 rw 0 0\n";
        let cgroup = "5:cpu:/\n4:memory:/x/y\n0::/\n";
        let unlimited = "9223372036854771712\n";
        let of = |own| [("mem/memory.limit_in_bytes", unlimited), ("mem/x/y/memory.limit_in_bytes", own)];
        check(mounts, cgroup, &of("1000\n"), Some(1000));
        check(mounts, cgroup, &of(unlimited), None);
    }
}
