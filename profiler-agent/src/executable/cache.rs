//! Executables by content, so that a file is read once however many processes map it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::content::{AGE_MIN, FileKey};
use super::{Executable, ExecutableError, ExecutableId, Identity, MappedFile};

/// All executables that are open, at most `max` of them, each with one open file.
///
/// An executable that only the cache holds is closed when its place is needed, the longest unused first; one that is
/// held elsewhere (a window, the process table, the symbolizer) stays. No lock is held while a file is read.
#[derive(Debug)]
pub(crate) struct ExecutableCache {
    max: usize,
    age_min: Duration,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_identity: HashMap<Identity, Place>,
    /// How many of these have the same ends and size, and may be copies of each other.
    alike: HashMap<Identity, u32>,
    /// By content, what stands for it: the identity of one that is open.
    by_content: HashMap<Identity, Identity>,
    /// Copies of one executable (an image layer each) lead to the same entry. Only a shortcut: emptied at 4 × `max`.
    by_file: HashMap<FileKey, Identity>,
    /// By device and inode, the version that was met last of a file. Only a shortcut, emptied with that one.
    by_inode: HashMap<(u64, u64), FileKey>,
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
        Self { max, age_min: AGE_MIN, table: Mutex::default() }
    }

    /// One that vouches for files however new they are.
    #[cfg(test)]
    pub(crate) fn of_new_files(max: usize) -> Self {
        Self { age_min: Duration::ZERO, ..Self::new(max) }
    }

    /// The executable that stands for all with the same content, from now on ([`Executable::settled`]). Reads the whole
    /// file, so never on the way of samples.
    pub(crate) fn settle(&self, executable: &Arc<Executable>) -> Arc<Executable> {
        if executable.identity().file.is_some()
            && executable.settled.get().is_none()
            && let Some(content) = executable.content()
        {
            self.lock().settle(executable, executable.identity().of_content(content));
        }
        Arc::clone(executable.settled())
    }

    /// The same, but reads nothing as long as no other file looks like a copy of this one.
    pub(crate) fn settle_copies(&self, executable: &Arc<Executable>) -> Arc<Executable> {
        let alike = self.lock().alike(executable);
        for other in &alike {
            self.settle(other);
        }
        Arc::clone(executable.settled())
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
        if let Some(known) = self.held(mapped) {
            return Ok(known);
        }
        let found = mapped.find(proc_root)?;
        let key = FileKey::new(&found.stat);
        if let Some(known) = self.lock().by_file(&key) {
            return Ok(known);
        }
        let file = mapped.open(&found)?;
        let id = self.lock().take_id();
        let read = Executable::read(id, mapped.path, file, key, self.age_min)?;
        self.lock().insert(key, read, self.max)
    }

    /// The executable, if the very file that is mapped is the one it holds open and has not changed: while it is open, no
    /// other file has its inode, and the process's mapping need not be followed, which is a walk through `/proc`.
    fn held(&self, mapped: &MappedFile<'_>) -> Option<Arc<Executable>> {
        let (major, minor) = mapped.device;
        let inode = (rustix::fs::makedev(major, minor), mapped.inode);
        let (key, known) = {
            let mut table = self.lock();
            let key = *table.by_inode.get(&inode)?;
            (key, table.by_file(&key)?)
        };
        (known.version() == Some(key)).then_some(known)
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
            self.by_inode.clear();
        }
        self.by_file.insert(key, identity.clone());
        self.by_inode.insert(key.inode(), key);
        self.clock += 1;
        let place = match self.by_identity.entry(identity) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                *self.alike.entry(free.key().resemblance()).or_default() += 1;
                free.insert(Place { executable: Arc::new(read), used_at: 0 })
            }
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
        let by_file = &self.by_file;
        self.by_inode.retain(|_, key| by_file.contains_key(key));
        self.by_content.retain(|_, other| *other != identity);
        if let Entry::Occupied(mut alike) = self.alike.entry(identity.resemblance()) {
            *alike.get_mut() -= 1;
            if *alike.get() == 0 {
                alike.remove();
            }
        }
        true
    }

    /// This executable and those that look like copies of it, the oldest first; none when there are no others.
    fn alike(&self, executable: &Executable) -> Vec<Arc<Executable>> {
        let resemblance = executable.identity().resemblance();
        if self.alike.get(&resemblance).is_none_or(|&count| count < 2) {
            return Vec::new();
        }
        let open = self.by_identity.iter().filter(|(identity, _)| identity.resemblance() == resemblance);
        let mut alike: Vec<_> = open.map(|(_, place)| Arc::clone(&place.executable)).collect();
        alike.sort_by_key(|executable| executable.id());
        alike
    }

    /// Makes an executable stand for its content, or another that does already stand for it.
    fn settle(&mut self, executable: &Arc<Executable>, content: Identity) {
        let known = self.by_content.get(&content).unwrap_or(&content);
        let known = self.by_identity.get(known).map(|place| &place.executable);
        match known.filter(|known| !known.has_changed() && known.settled.get().is_none()) {
            Some(known) if known.id() == executable.id() => {}
            Some(known) => {
                let known = Arc::clone(known);
                for identity in self.by_file.values_mut().filter(|found| *found == executable.identity()) {
                    *identity = known.identity().clone();
                }
                // Another thread may have been first.
                let _ = executable.settled.set(known);
            }
            None => {
                self.by_content.insert(content, executable.identity().clone());
            }
        }
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
        device: (u32, u32),
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
        let (addr, stat) = (start as u64, file.metadata().unwrap());
        Mapping {
            path: path.into(),
            range: Addr(addr)..Addr(addr + bytes as u64),
            device: (rustix::fs::major(stat.dev()), rustix::fs::minor(stat.dev())),
            inode: stat.ino(),
            _map: Map(start, bytes),
        }
    }

    fn open(cache: &ExecutableCache, mapping: &Mapping) -> Result<Arc<Executable>, ExecutableError> {
        open_below(Path::new("/proc"), cache, mapping)
    }

    fn open_below(
        proc_root: &Path,
        cache: &ExecutableCache,
        mapping: &Mapping,
    ) -> Result<Arc<Executable>, ExecutableError> {
        let Mapping { path, range, device, inode, _map } = mapping;
        let (pid, range, device, inode) = (std::process::id(), range.clone(), *device, *inode);
        cache.open(proc_root, &MappedFile { pid, range, device, inode, path })
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
        let cache = ExecutableCache::of_new_files(8);
        let one = open(&cache, &map(&program(dir.path(), "one", 1))).unwrap();
        let copied = map(&program(dir.path(), "copy", 1));
        let copy = open(&cache, &copied).unwrap();
        let other = open(&cache, &map(&program(dir.path(), "other", 2))).unwrap();

        assert_eq!(cache.settle_copies(&other).id(), other.id());
        assert_eq!(other.settled.get().map(|other| other.id()), None);
        assert_ne!(one.id(), copy.id(), "nobody has read them yet");
        for executable in [&one, &copy] {
            assert_eq!(cache.settle_copies(executable).id(), one.id());
            assert_eq!(executable.settled().id(), one.id());
        }
        assert_eq!(open(&cache, &copied).unwrap().id(), one.id());
        assert_ne!(cache.settle(&other).id(), one.id());
        assert_eq!(one.build_id(), other.build_id(), "the build id does not tell them apart");
        assert_eq!(one.name(), "one");
    }

    /// A copy of this program with another byte in its middle, where nothing but a reading of all of it would look.
    fn forged(dir: &Path, name: &str) -> PathBuf {
        let path = program(dir, name, 1);
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let middle = file.metadata().unwrap().len() / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, middle).unwrap();
        file.write_all_at(&[!byte[0]], middle).unwrap();
        path
    }

    #[test]
    fn a_forged_middle_is_another_executable_whoever_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        for original_first in [true, false] {
            let cache = ExecutableCache::of_new_files(8);
            let original = map(&program(dir.path(), "original", 1));
            let forged = map(&forged(dir.path(), "forged"));
            let [first, second] = if original_first { [&original, &forged] } else { [&forged, &original] };
            let (first, second) = (open(&cache, first).unwrap(), open(&cache, second).unwrap());
            assert_eq!(first.identity().resemblance(), second.identity().resemblance());
            assert_ne!(first.id(), second.id());
            assert_ne!(cache.settle_copies(&first).id(), cache.settle_copies(&second).id());
            assert_ne!(first.content(), second.content());
        }
    }

    #[test]
    fn a_copy_whose_bytes_are_changed_later_stands_for_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::of_new_files(8);
        let first_path = program(dir.path(), "first", 1);
        let first = open(&cache, &map(&first_path)).unwrap();
        let second = open(&cache, &map(&program(dir.path(), "second", 1))).unwrap();
        assert_eq!(cache.settle_copies(&second).id(), first.id());
        let file = fs::OpenOptions::new().write(true).open(&first_path).unwrap();
        file.write_all_at(&[0xcc], file.metadata().unwrap().len() / 2).unwrap();
        assert_eq!(first.content(), None);
        assert_eq!(second.settled().id(), second.id());
        let third = open(&cache, &map(&program(dir.path(), "third", 1))).unwrap();
        assert_ne!(cache.settle(&third).id(), first.id());
    }

    #[test]
    fn a_file_that_was_written_a_moment_ago_is_nobodys_copy_yet() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache { age_min: Duration::from_secs(3600), ..ExecutableCache::new(8) };
        let one = open(&cache, &map(&program(dir.path(), "one", 1))).unwrap();
        let copy = open(&cache, &map(&program(dir.path(), "copy", 1))).unwrap();
        assert_ne!(cache.settle_copies(&copy).id(), one.id());
        assert!(!one.has_changed() && !copy.has_changed());
    }

    #[test]
    fn a_file_that_is_held_open_is_known_by_its_inode_as_long_as_it_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::of_new_files(8);
        let path = program(dir.path(), "program", 1);
        let mut mapping = map(&path);
        let unmapped = |mapping: &Mapping| open_below(dir.path(), &cache, mapping);
        assert!(unmapped(&mapping).is_err(), "nobody has read it yet");
        let known = open(&cache, &mapping).unwrap();
        assert_eq!(unmapped(&mapping).unwrap().id(), known.id());

        mapping.device.1 += 1;
        assert!(unmapped(&mapping).is_err(), "the same inode of another file system");
        mapping.device.1 -= 1;
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[2], file.metadata().unwrap().len()).unwrap();
        assert!(unmapped(&mapping).is_err(), "it may be another content");
    }

    #[test]
    fn a_copy_that_another_file_stands_for_is_not_known_by_its_inode() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::of_new_files(8);
        let [one, copy] = ["one", "copy"].map(|name| map(&program(dir.path(), name, 1)));
        let held = open(&cache, &one).unwrap();
        let copied = open(&cache, &copy).unwrap();
        assert_eq!(cache.settle_copies(&copied).id(), held.id());
        assert_eq!(open_below(dir.path(), &cache, &one).unwrap().id(), held.id());
        assert!(open_below(dir.path(), &cache, &copy).is_err(), "nothing keeps its inode");
        assert_eq!(open(&cache, &copy).unwrap().id(), held.id());
    }

    /// Only who may follow the mapping itself still reaches a file that lost its name.
    #[test]
    fn a_deleted_and_replaced_file_is_the_mapped_one_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::of_new_files(8);
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
            // Another version of the file, for its name is gone; the same content.
            assert_eq!(cache.settle_copies(&deleted.unwrap()).id(), known.id());
            assert_eq!(cache.settle_copies(&replaced.unwrap()).id(), known.id());
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
            device: (0, 0),
            inode: 1,
            path: Path::new("/nowhere"),
        };
        let error = cache.open(Path::new("/proc"), &mapped).unwrap_err();
        assert!(matches!(error, ExecutableError::Open { .. }), "{error}");
    }
}
