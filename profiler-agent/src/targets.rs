//! What is to be sampled, as the operator says it, and as the kernel side reads it.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
};

use profiler_common::{
    limits::COMM_BYTES,
    targets::{
        BY_CGROUP, BY_COMM, BY_FAMILY, BY_PID, COMM_WORDS, TARGETS_MAX, Target as Wire, Targets as WireList,
    },
};

/// One target. A task matches it when it meets all conditions that are given; the first that it matches decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Target {
    /// Process id in the initial pid namespace.
    pub(crate) pid: Option<u32>,
    /// The beginning of the process's name.
    pub(crate) comm: Option<CommPrefix>,
    /// A cgroup of the v2 hierarchy, as `/proc/<pid>/cgroup` writes it; what is below it matches as well.
    pub(crate) cgroup: Option<PathBuf>,
    /// Samples per second and CPU, at most those of the agent.
    pub(crate) frequency_hz: Option<u32>,
    /// Whether what matches is sampled.
    pub(crate) is_wanted: bool,
}

/// The beginning of a name: 1 to 15 bytes without NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommPrefix(String);

impl CommPrefix {
    /// `None` for what no name begins with: the kernel cuts names after 15 bytes.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let is_one = (1..COMM_BYTES).contains(&text.len()) && !text.contains('\0');
        is_one.then(|| Self(text.to_owned()))
    }

    /// Its text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A list of targets that fits the kernel side's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Targets {
    list: Vec<Target>,
    is_default_wanted: bool,
    family: Vec<u32>,
}

impl Targets {
    /// The most targets there may be.
    pub(crate) const MAX: usize = TARGETS_MAX;

    /// `None` for more targets than [`Self::MAX`].
    pub(crate) fn new(list: Vec<Target>, is_default_wanted: bool) -> Option<Self> {
        (list.len() <= Self::MAX).then_some(Self { list, is_default_wanted, family: Vec::new() })
    }

    /// These processes and what they start from then on, nothing else.
    pub(crate) fn family(pids: &[u32]) -> Self {
        Self { list: Vec::new(), is_default_wanted: false, family: pids.to_vec() }
    }

    /// The processes whose families are sampled.
    pub(crate) fn families(&self) -> &[u32] {
        &self.family
    }

    /// The targets, in order.
    pub(crate) fn list(&self) -> &[Target] {
        &self.list
    }

    /// Whether what matches no target is sampled.
    pub(crate) fn is_default_wanted(&self) -> bool {
        self.is_default_wanted
    }

    /// Everything is sampled: the kernel side need not ask.
    pub(crate) fn want_everything(&self) -> bool {
        self.list.is_empty() && self.family.is_empty() && self.is_default_wanted
    }

    /// The cgroups that are targets.
    pub(crate) fn cgroups(&self) -> impl Iterator<Item = &Path> {
        self.list.iter().filter_map(|target| target.cgroup.as_deref())
    }

    /// Those of them that are not there: nothing is in them until they are made.
    pub(crate) fn missing_cgroups(&self, hierarchy: &Path) -> impl Iterator<Item = &Path> {
        self.cgroups().filter(|cgroup| Cgroup::find(hierarchy, cgroup).is_none())
    }

    /// The value for the kernel's map. `hierarchy` is the root of the v2 hierarchy; a cgroup that is not there
    /// matches nothing until it is, so the value is to be made again now and then.
    pub(crate) fn to_wire(&self, hierarchy: Option<&Path>) -> Box<WireList> {
        let mut targets = [Wire::default(); TARGETS_MAX];
        let listed = self.list.iter().map(|target| target.to_wire(hierarchy));
        let family = Wire { conditions: BY_FAMILY, is_wanted: 1, ..Wire::default() };
        let family = (!self.family.is_empty()).then_some(family);
        let mut count = 0;
        for (slot, target) in targets.iter_mut().zip(listed.chain(family)) {
            *slot = target;
            count += 1;
        }
        Box::new(WireList { count, is_default_wanted: self.is_default_wanted.into(), targets })
    }
}

impl Target {
    fn to_wire(&self, hierarchy: Option<&Path>) -> Wire {
        let Self { pid, comm, cgroup, frequency_hz, is_wanted } = self;
        let condition = |is_given: bool, bit: u32| if is_given { bit } else { 0 };
        let name = comm.as_ref().map_or("", CommPrefix::as_str).as_bytes();
        let cgroup_at = cgroup.as_ref().and_then(|path| Cgroup::find(hierarchy?, path));
        let Cgroup { id, level } = cgroup_at.unwrap_or(Cgroup { id: 0, level: 0 });
        Wire {
            conditions: condition(pid.is_some(), BY_PID)
                | condition(comm.is_some(), BY_COMM)
                | condition(cgroup.is_some(), BY_CGROUP),
            pid: pid.unwrap_or(0),
            comm: words(|at| name.get(at).copied().unwrap_or(0)),
            comm_mask: words(|at| if at < name.len() { 0xff } else { 0 }),
            cgroup_id: id,
            cgroup_level: level,
            is_wanted: (*is_wanted).into(),
            period_ns: frequency_hz.map_or(0, crate::pipeline::period_ns),
        }
    }
}

/// A process's name as targets compare it.
pub(crate) fn comm_words(comm: &[u8]) -> [u64; COMM_WORDS] {
    words(|at| comm.get(at).copied().unwrap_or(0))
}

fn words(byte: impl Fn(usize) -> u8) -> [u64; COMM_WORDS] {
    std::array::from_fn(|word| u64::from_ne_bytes(std::array::from_fn(|at| byte(word * 8 + at))))
}

/// A directory of the v2 hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cgroup {
    /// Its inode number, which is the cgroup's id. Source: fs/kernfs: kernfs_id on 64-bit machines.
    id: u64,
    /// 0 for the root.
    level: u32,
}

impl Cgroup {
    fn find(hierarchy: &Path, path: &Path) -> Option<Self> {
        let names: PathBuf = names(path).collect();
        let id = fs::metadata(hierarchy.join(&names)).ok()?.ino();
        Some(Self { id, level: u32::try_from(names.components().count()).ok()? })
    }
}

/// The directories that a path names, none of them above where it begins.
pub(crate) fn names(path: &Path) -> impl Iterator<Item = &std::ffi::OsStr> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_of_everything_is_written_as_the_kernel_side_reads_it() {
        let target = Target {
            pid: Some(7),
            comm: CommPrefix::new("nginx"),
            cgroup: Some("/".into()),
            frequency_hz: Some(10),
            is_wanted: true,
        };
        let here = tempfile::tempdir().expect("a directory");
        let wire = *Targets::new(vec![target], false).expect("one").to_wire(Some(here.path()));
        assert_eq!((wire.count, wire.is_default_wanted), (1, 0));
        let Wire { conditions, pid, cgroup_id, cgroup_level, is_wanted, period_ns, .. } = wire.targets[0];
        assert_eq!((conditions, pid, is_wanted, period_ns), (7, 7, 1, 100_000_000));
        let inode = fs::metadata(here.path()).expect("it is there").ino();
        assert_eq!((cgroup_id, cgroup_level), (inode, 0));
        let name = |text: &str| {
            let mut bytes = [0; COMM_BYTES];
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            words(|at| bytes[at])
        };
        assert!(wire.targets[0].matches_process(7, name("nginx: worker")));
        assert!(!wire.targets[0].matches_process(7, name("ngin")));
    }

    #[test]
    fn a_cgroup_that_is_not_there_yet_has_no_id() {
        let here = tempfile::tempdir().expect("a directory");
        let target = Target { cgroup: Some("/a/b".into()), ..Target::default() };
        let targets = Targets::new(vec![target], true).expect("one");
        assert_eq!(targets.to_wire(Some(here.path())).targets[0].cgroup_id, 0);
        assert_eq!(targets.to_wire(None).targets[0].cgroup_id, 0);
        assert_eq!(targets.missing_cgroups(here.path()).collect::<Vec<_>>(), [Path::new("/a/b")]);
        fs::create_dir_all(here.path().join("a/b")).expect("directories");
        let wire = targets.to_wire(Some(here.path())).targets[0];
        assert!(wire.cgroup_id != 0);
        assert_eq!(targets.missing_cgroups(here.path()).next(), None);
        assert_eq!(wire.cgroup_level, 2);
    }

    #[test]
    fn a_path_does_not_lead_out_of_the_hierarchy() {
        let found: Vec<_> = names(Path::new("/../a/./b/")).collect();
        assert_eq!(found, ["a", "b"]);
    }

    #[test]
    fn names_the_kernel_would_cut_are_refused() {
        assert!(CommPrefix::new("").is_none() && CommPrefix::new("0123456789abcdef").is_none());
        assert!(CommPrefix::new("a\0").is_none() && CommPrefix::new("0123456789abcde").is_some());
    }
}
