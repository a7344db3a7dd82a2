//! Executables by content, so that a file is read once however many processes map it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Executable, ExecutableError, ExecutableId, Identity, MappedFile};

/// A file's version, cheap to ask for: while none of this changes, the content is taken to be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileKey {
    device: u64,
    inode: u64,
    bytes: i64,
    modified_ns: (i64, u64),
    changed_ns: (i64, u64),
}

impl FileKey {
    #[expect(clippy::useless_conversion, reason = "the fields of stat differ in width between architectures")]
    fn new(stat: &rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev.into(),
            inode: stat.st_ino.into(),
            bytes: stat.st_size.into(),
            modified_ns: (stat.st_mtime.into(), stat.st_mtime_nsec.into()),
            changed_ns: (stat.st_ctime.into(), stat.st_ctime_nsec.into()),
        }
    }
}

/// All executables that are open, at most `max` of them, each with one open file.
///
/// An executable that only the cache holds is closed when its place is needed, the longest unused first; one that is
/// held elsewhere (a window, the process table, the symbolizer) stays. No lock is held while a file is read.
#[derive(Debug)]
pub(crate) struct ExecutableCache {
    max: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_identity: HashMap<Identity, Place>,
    /// Copies of one executable (an image layer each) lead to the same entry. Only a shortcut: emptied at 4 × `max`.
    by_file: HashMap<FileKey, Identity>,
    next_id: u32,
    clock: u64,
}

#[derive(Debug)]
struct Place {
    executable: Arc<Executable>,
    used_at: u64,
}

impl ExecutableCache {
    /// A cache of at most `max` open executables; the caller raises RLIMIT_NOFILE to fit.
    pub(crate) fn new(max: usize) -> Self {
        Self { max, table: Mutex::default() }
    }

    /// The executable behind a mapping of a process.
    ///
    /// # Errors
    /// See [`ExecutableError`]; none of them is worth a retry before the mapping changes.
    pub(crate) fn open(
        &self,
        proc_root: &Path,
        mapped: &MappedFile<'_>,
    ) -> Result<Arc<Executable>, ExecutableError> {
        let (file, stat) = mapped.open(proc_root)?;
        let key = FileKey::new(&stat);
        if let Some(known) = self.lock().by_file(&key) {
            return Ok(known);
        }
        let id = self.lock().take_id();
        let read = Executable::read(id, mapped.path, file)?;
        self.lock().insert(key, read, self.max)
    }

    /// Executables open now.
    pub(crate) fn len(&self) -> usize {
        self.lock().by_identity.len()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change to the table is complete before anything that could panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn take_id(&mut self) -> ExecutableId {
        let id = ExecutableId(self.next_id);
        self.next_id =
            self.next_id.checked_add(1).expect("one file a millisecond fills 32 bits in 49 days of misses");
        id
    }

    fn by_file(&mut self, key: &FileKey) -> Option<Arc<Executable>> {
        let place = self.by_identity.get_mut(self.by_file.get(key)?)?;
        self.clock += 1;
        place.used_at = self.clock;
        Some(Arc::clone(&place.executable))
    }

    /// Adds what was read, or finds that it is there already: as a copy, or read by another thread meanwhile.
    fn insert(
        &mut self,
        key: FileKey,
        read: Executable,
        max: usize,
    ) -> Result<Arc<Executable>, ExecutableError> {
        let identity = read.identity().clone();
        if !self.by_identity.contains_key(&identity) && self.by_identity.len() >= max && !self.close_one() {
            return Err(ExecutableError::Full { path: read.path().into(), max });
        }
        if self.by_file.len() >= max.saturating_mul(4) {
            self.by_file.clear();
        }
        self.by_file.insert(key, identity.clone());
        self.clock += 1;
        let place = match self.by_identity.entry(identity) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(Place { executable: Arc::new(read), used_at: 0 }),
        };
        place.used_at = self.clock;
        Ok(Arc::clone(&place.executable))
    }

    /// Closes the longest unused executable that nobody else holds; false when there is none.
    fn close_one(&mut self) -> bool {
        let unheld = self.by_identity.iter().filter(|(_, place)| Arc::strong_count(&place.executable) == 1);
        let Some(identity) =
            unheld.min_by_key(|(_, place)| place.used_at).map(|(identity, _)| identity.clone())
        else {
            return false;
        };
        self.by_identity.remove(&identity);
        self.by_file.retain(|_, other| *other != identity);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::ops::Range;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    use std::path::PathBuf;

    use super::*;
    use crate::addr::Addr;

    /// A real mapping of this process: `bytes` of a file, mapped from its start.
    struct Mapping {
        path: PathBuf,
        range: Range<Addr>,
        inode: u64,
        _map: Map,
    }

    struct Map(*mut libc::c_void, usize);

    impl Drop for Map {
        fn drop(&mut self) {
            // SAFETY: exactly the range that mmap returned, unmapped once; nothing points into it.
            unsafe { libc::munmap(self.0, self.1) };
        }
    }

    fn map(path: &Path) -> Mapping {
        let file = fs::File::open(path).unwrap();
        let bytes = 8192;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let addr = start as u64;
        Mapping {
            path: path.into(),
            range: Addr(addr)..Addr(addr + bytes as u64),
            inode: file.metadata().unwrap().ino(),
            _map: Map(start, bytes),
        }
    }

    fn open(cache: &ExecutableCache, mapping: &Mapping) -> Result<Arc<Executable>, ExecutableError> {
        let Mapping { path, range, inode, _map } = mapping;
        let pid = std::process::id();
        cache.open(Path::new("/proc"), &MappedFile { pid, range: range.clone(), inode: *inode, path })
    }

    /// A copy of this program that differs from all others in its last byte.
    fn program(dir: &Path, name: &str, variant: u8) -> PathBuf {
        let path = dir.join(name);
        fs::copy("/proc/self/exe", &path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[variant], file.metadata().unwrap().len()).unwrap();
        path
    }

    #[test]
    fn copies_of_a_file_are_one_executable_and_changed_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::new(8);
        let one = open(&cache, &map(&program(dir.path(), "one", 1))).unwrap();
        let copy = open(&cache, &map(&program(dir.path(), "copy", 1))).unwrap();
        let other = open(&cache, &map(&program(dir.path(), "other", 2))).unwrap();

        assert_eq!(one.id(), copy.id());
        assert_ne!(one.id(), other.id());
        assert_eq!(one.build_id(), other.build_id(), "the build id does not tell them apart");
        assert_eq!(cache.len(), 2);
        assert_eq!(one.name(), "one");
    }

    /// Only who may follow the mapping itself still reaches a file that lost its name.
    #[test]
    fn a_deleted_and_replaced_file_is_the_mapped_one_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::new(8);
        let path = program(dir.path(), "program", 1);
        let mapping = map(&path);
        let Range { start, end } = &mapping.range;
        let may_follow = fs::File::open(format!("/proc/self/map_files/{:x}-{:x}", start.0, end.0)).is_ok();
        let known = open(&cache, &mapping).unwrap();
        fs::remove_file(&path).unwrap();
        let deleted = open(&cache, &mapping);
        program(dir.path(), "program", 2);
        let replaced = open(&cache, &mapping);

        if may_follow {
            assert_eq!(deleted.unwrap().id(), known.id());
            assert_eq!(replaced.unwrap().id(), known.id());
        } else {
            assert!(matches!(deleted, Err(ExecutableError::Open { .. })), "{deleted:?}");
            assert!(matches!(replaced, Err(ExecutableError::Replaced { .. })), "{replaced:?}");
        }
        assert_ne!(open(&cache, &map(&path)).unwrap().id(), known.id());
    }

    #[test]
    fn the_longest_unused_makes_room_but_nothing_in_use_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::new(2);
        let mappings: Vec<_> = (1..=3).map(|i| map(&program(dir.path(), &format!("p{i}"), i))).collect();
        let [first, second, third] = mappings.as_slice() else { unreachable!("three were made") };

        let held = open(&cache, first).unwrap();
        let second_id = open(&cache, second).unwrap().id();
        let third_held = open(&cache, third).unwrap();
        assert_eq!(cache.len(), 2);
        assert_eq!(open(&cache, first).unwrap().id(), held.id());

        let full = open(&cache, second).unwrap_err();
        assert!(matches!(full, ExecutableError::Full { max: 2, .. }), "{full}");
        drop(third_held);
        assert_ne!(open(&cache, second).unwrap().id(), second_id, "ids are not used twice");
    }

    #[test]
    fn what_is_not_an_elf_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        fs::write(&path, vec![b' '; 9000]).unwrap();
        let error = open(&ExecutableCache::new(2), &map(&path)).unwrap_err();
        assert!(matches!(error, ExecutableError::Elf { .. }), "{error}");
        assert!(error.to_string().ends_with("/text"), "{error}");
    }

    #[test]
    fn a_range_that_is_not_mapped_is_an_error() {
        let cache = ExecutableCache::new(2);
        let mapped = MappedFile {
            pid: std::process::id(),
            range: Addr(0x1000)..Addr(0x2000),
            inode: 1,
            path: Path::new("/nowhere"),
        };
        let error = cache.open(Path::new("/proc"), &mapped).unwrap_err();
        assert!(matches!(error, ExecutableError::Open { .. }), "{error}");
    }
}
