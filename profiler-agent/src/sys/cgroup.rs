//! The cgroup hierarchy whose ids samples carry, and the way from an id to a path in it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

/// Controllers of v1 whose hierarchies hold every container and unit, best first: runtimes and systemd limit the number of
/// tasks of all they start, and account memory of most.
const CONTROLLERS: [&str; 5] = ["pids", "memory", "cpu", "devices", "freezer"];

/// Which hierarchy it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// The only one: its paths say who runs where.
    V2,
    /// Controllers are in others, and not every runtime makes its cgroups in this one.
    Hybrid,
    /// That of a v1 controller, by its number in `/proc/cgroups`.
    V1 {
        /// Its name in `/proc/cgroups`.
        controller: &'static str,
        /// Its number there.
        hierarchy: u32,
    },
}

/// A mounted hierarchy.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    version: Version,
    /// Where it is mounted.
    point: PathBuf,
    root: File,
}

impl Hierarchy {
    /// The v2 hierarchy, or a v1 one where that is not mounted. `None` without cgroups.
    pub(crate) fn find(proc_root: &Path) -> Option<Self> {
        let mounts = fs::read_to_string(proc_root.join("self/mounts")).ok()?;
        let controllers = fs::read_to_string(proc_root.join("cgroups")).unwrap_or_default();
        let (version, point) = choose(&mounts, &controllers)?;
        let root = File::open(&point).ok()?;
        Some(Self { version, point, root })
    }

    /// Which one it is.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The path of the cgroup with an id, from the root of the hierarchy, as `/proc/<pid>/cgroup` has it.
    ///
    /// # Errors
    /// ESTALE once the cgroup is removed; EPERM without CAP_DAC_READ_SEARCH.
    pub(crate) fn path(&self, id: u64) -> io::Result<String> {
        let directory = open_by_id(&self.root, id)?;
        let path = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        let inside = path.strip_prefix(&self.point).unwrap_or(&path);
        Ok(format!("/{}", String::from_utf8_lossy(inside.as_os_str().as_bytes())))
    }
}

/// The hierarchy to use and its mount point, by `/proc/self/mounts` and `/proc/cgroups`.
fn choose(mounts: &str, controllers: &str) -> Option<(Version, PathBuf)> {
    let mounted = |kind: &str, option: Option<&str>| {
        mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, found, options) = (fields.next()?, fields.next()?, fields.next()?);
            let has_option = option.is_none_or(|wanted| options.split(',').any(|option| option == wanted));
            (found == kind && has_option).then(|| PathBuf::from(point))
        })
    };
    if let Some(point) = mounted("cgroup2", None) {
        let version = if mounted("cgroup", None).is_some() { Version::Hybrid } else { Version::V2 };
        return Some((version, point));
    }
    CONTROLLERS.into_iter().find_map(|controller| {
        let point = mounted("cgroup", Some(controller))?;
        // proc_cgroups(5): name, hierarchy, number of cgroups, enabled; by tabs.
        let line = controllers.lines().find(|line| line.split('\t').next() == Some(controller))?;
        let hierarchy = line.split('\t').nth(1)?.parse().ok()?;
        Some((Version::V1 { controller, hierarchy }, point))
    })
}

/// The whole v2 hierarchy. A container, or any other cgroup namespace, has but a part of it mounted; a handle leads from
/// there to the root.
#[derive(Debug)]
pub(crate) struct WholeV2 {
    /// The root, as a directory of ours or of the mount.
    path: PathBuf,
    _root: Option<OwnedFd>,
}

impl WholeV2 {
    /// `None` where no part of it is mounted, or where CAP_DAC_READ_SEARCH is missing in a container.
    pub(crate) fn find(proc_root: &Path) -> Option<Self> {
        let mounts = fs::read_to_string(proc_root.join("self/mountinfo")).ok()?;
        let points: Vec<_> = mounts.lines().filter_map(v2_mount).collect();
        points
            .iter()
            .find_map(|point| Self::at(point))
            .or_else(|| points.iter().find_map(|point| Self::above(point)))
    }

    /// The directory that is the hierarchy's root.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the mount is of all of it. What mountinfo says of that is relative to the cgroup namespace.
    fn at(point: &Path) -> Option<Self> {
        (fs::metadata(point).ok()?.ino() == ROOT_ID).then(|| Self { path: point.into(), _root: None })
    }

    fn above(point: &Path) -> Option<Self> {
        let root = open_by_id(&File::open(point).ok()?, ROOT_ID).ok()?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
        Self::at(&path).map(|_| Self { path, _root: Some(root) })
    }
}

/// Id of a hierarchy's root on 64-bit machines. Source: fs/kernfs/dir.c: kernfs_create_root.
const ROOT_ID: u64 = 1;

/// `34 25 0:29 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw`. Source: proc_pid_mountinfo(5).
fn v2_mount(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    let point = mount.split(' ').nth(4)?;
    (file_system.split(' ').next()? == "cgroup2").then(|| point.into())
}

/// `struct file_handle` of open_by_handle_at(2), with a handle of kernfs: the node's id.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    id: [u8; 8],
}

/// Source: include/linux/exportfs.h: FILEID_KERNFS.
const FILEID_KERNFS: i32 = 0xfe;

/// Opens the directory with an id in the file system that `root` is in, as a path only.
fn open_by_id(root: &File, id: u64) -> io::Result<OwnedFd> {
    let id = id.to_ne_bytes();
    let mut handle = Handle { bytes: size_of_val(&id) as u32, kind: FILEID_KERNFS, id };
    // SAFETY: `root` is open; `handle` is a file_handle with as many bytes behind its head as it says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            root.as_raw_fd(),
            &raw mut handle,
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just given us this descriptor, nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
    const V1: &str = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0\n\
                      cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n";
    const CONTROLLERS: &str =
        "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t4\t73\t1\npids\t8\t1\t1\n";

    #[track_caller]
    fn check(mounts: &str, expect: Option<(Version, &str)>) {
        let expect = expect.map(|(version, point)| (version, PathBuf::from(point)));
        assert_eq!(choose(mounts, CONTROLLERS), expect, "{mounts}");
    }

    #[test]
    fn v2_comes_first_and_v1_is_known_by_a_controller() {
        check(V2, Some((Version::V2, "/sys/fs/cgroup")));
        let unified = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        check(&format!("{V1}{unified}"), Some((Version::Hybrid, "/sys/fs/cgroup/unified")));
        let pids = Version::V1 { controller: "pids", hierarchy: 8 };
        check(V1, Some((pids, "/sys/fs/cgroup/pids")));
        check("cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n", None);
        check("", None);
        check("cgroup2\n", None);
    }

    #[test]
    fn the_v2_hierarchy_is_found_among_mounts() {
        let found = v2_mount("34 25 0:29 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw");
        assert_eq!(found, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(v2_mount("34 25 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
        assert_eq!(v2_mount(""), None);
    }

    #[test]
    #[ignore = "needs root and BPF"]
    fn a_cgroup_is_found_by_its_id_until_it_is_removed() {
        let hierarchy = Hierarchy::find("/proc".as_ref()).expect("this machine has cgroups");
        let name = format!("profiler-unit-test-{}", std::process::id());
        let directory = hierarchy.point.join(&name);
        fs::create_dir(&directory).expect("a cgroup can be made");
        let id = fs::metadata(&directory).map(|cgroup| cgroup.ino());
        let found = id.and_then(|id| Ok((id, hierarchy.path(id)?)));
        fs::remove_dir(&directory).expect("an empty cgroup can be removed");
        let (id, path) = found.expect("the cgroup is there");
        assert_eq!(path, format!("/{name}"));
        assert_eq!(hierarchy.path(id).map_err(|error| error.raw_os_error()), Err(Some(libc::ESTALE)));
    }
}
