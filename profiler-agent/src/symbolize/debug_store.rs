//! Debug files that servers gave, by build id, and which build ids they had nothing for.
//!
//! ```text
//! <directory>/<build id>.debug     <directory>/<build id>.absent     <directory>/<build id>.<random>.new
//! ```

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use super::store::{StoreError, private_directory};
use crate::executable::{BuildId, Elf};

/// Bytes of all files; beyond, the longest unused go.
const STORE_BYTES_MAX: u64 = 1 << 30;

/// Build ids that are known to be absent; beyond, the oldest go.
const ABSENT_MAX: usize = 4096;

/// Servers are asked again after so long: debug files are published later than the programs.
const ABSENT_FOR: Duration = Duration::from_secs(24 * 3600);

/// What is known of a build id.
#[derive(Debug)]
pub(super) enum Found {
    File(File),
    /// No server had it, less than a day ago.
    Absent,
    Unknown,
}

/// Why a file that was received is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error("no debug information of this build id")]
    NotOfThisBuildId,
    /// The names would be looked up with the agent's rights, in its mount namespace.
    #[error("leads to other files")]
    NamesOtherFile,
    #[error("keep a debug file")]
    Keep(#[from] io::Error),
}

/// A directory of debug files, this agent's alone.
#[derive(Debug)]
pub(super) struct DebugStore {
    directory: PathBuf,
    bytes_max: u64,
    bytes: AtomicU64,
    evicted: AtomicU64,
}

/// A file that is being received. Dropped without [`DebugStore::take`], it is gone.
#[derive(Debug)]
pub(super) struct Incoming {
    file: File,
    path: PathBuf,
}

impl Incoming {
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // It has another name when it was taken.
        let _ = fs::remove_file(&self.path);
    }
}

impl DebugStore {
    /// # Errors
    /// See [`StoreError`].
    pub(super) fn open(directory: PathBuf) -> Result<Self, StoreError> {
        private_directory(&directory)?;
        let (bytes, evicted) = Default::default();
        let store = Self { directory, bytes_max: STORE_BYTES_MAX, bytes, evicted };
        // What cannot be listed now is when room is made.
        let files = store.files().unwrap_or_default();
        let is_unfinished = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "new");
        for path in files.iter().map(|(_, _, path)| path).filter(is_unfinished) {
            let _ = fs::remove_file(path);
        }
        let _ = store.make_room(0);
        Ok(store)
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Files that made room for others.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted.load(Relaxed)
    }

    /// Opens the debug file of a build id, and marks it as used now.
    pub(super) fn find(&self, build_id: &BuildId) -> Found {
        let open = |kind| {
            let path = self.path(build_id, kind);
            File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
        };
        if let Ok(file) = open("debug") {
            return match file
                .set_modified(SystemTime::now())
                .and_then(|()| check(&file, build_id).map_err(io::Error::other))
            {
                Ok(()) => Found::File(file),
                Err(_) => self.forget(build_id),
            };
        }
        let age = open("absent").and_then(|file| file.metadata()?.modified()).map(|at| at.elapsed());
        match age {
            Ok(Ok(age)) if age < ABSENT_FOR => Found::Absent,
            // A time to come says nothing.
            _ => Found::Unknown,
        }
    }

    /// Remembers that no server has the debug file of a build id.
    pub(super) fn put_absent(&self, build_id: &BuildId) -> io::Result<()> {
        let path = self.path(build_id, "absent");
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.set_modified(SystemTime::now())?;
        self.make_room(0)
    }

    pub(super) fn receive(&self, build_id: &BuildId) -> io::Result<Incoming> {
        let random = u64::from_ne_bytes(crate::sys::random::bytes()?);
        let path = self.path(build_id, &format!("{random:x}.new"));
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Incoming { file, path })
    }

    /// Keeps a file that was received in full.
    ///
    /// # Errors
    /// It is not what was asked for, or there is no place for it.
    pub(super) fn take(&self, incoming: &Incoming, build_id: &BuildId) -> Result<(), TakeError> {
        check(&incoming.file, build_id)?;
        self.make_room(incoming.file.metadata()?.len())?;
        fs::rename(&incoming.path, self.path(build_id, "debug"))?;
        let _ = fs::remove_file(self.path(build_id, "absent"));
        Ok(self.make_room(0)?)
    }

    fn forget(&self, build_id: &BuildId) -> Found {
        let _ = fs::remove_file(self.path(build_id, "debug"));
        Found::Unknown
    }

    fn path(&self, build_id: &BuildId, kind: &str) -> PathBuf {
        self.directory.join(format!("{build_id}.{kind}"))
    }

    /// Removes the files that were not used for the longest time until there is room for so many bytes more.
    fn make_room(&self, more_bytes: u64) -> io::Result<()> {
        let (mut absent, mut files): (Vec<_>, Vec<_>) =
            self.files()?.into_iter().partition(|(_, _, path)| has_extension(path, "absent"));
        absent.sort_unstable();
        for (_, _, path) in absent.iter().take(absent.len().saturating_sub(ABSENT_MAX)) {
            fs::remove_file(path)?;
        }
        files.retain(|(_, _, path)| has_extension(path, "debug"));
        files.sort_unstable();
        let mut bytes: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, file_bytes, path) in files {
            if bytes.saturating_add(more_bytes) <= self.bytes_max {
                break;
            }
            fs::remove_file(path)?;
            bytes -= file_bytes;
            self.evicted.fetch_add(1, Relaxed);
        }
        self.bytes.store(bytes, Relaxed);
        Ok(())
    }

    /// Time of the last use, bytes and path of each.
    fn files(&self) -> io::Result<Vec<(SystemTime, u64, PathBuf)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            // A file may be gone by now: a symbolizer forgets those that are damaged.
            if let Ok(metadata) = entry.metadata() {
                files.push((metadata.modified()?, metadata.len(), entry.path()));
            }
        }
        Ok(files)
    }
}

fn has_extension(path: &Path, expect: &str) -> bool {
    path.extension().is_some_and(|extension| extension == expect)
}

/// Whether a file is debug information of a build id that leads nowhere else.
fn check(file: &File, build_id: &BuildId) -> Result<(), TakeError> {
    let elf = Elf::of(file).map_err(|_| TakeError::NotOfThisBuildId)?;
    if elf.build_ids.gnu.as_ref() != Some(build_id) || !elf.symbols.has_debug_info {
        return Err(TakeError::NotOfThisBuildId);
    }
    if elf.symbols.names_other_file {
        return Err(TakeError::NamesOtherFile);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executable::testing::{compile, read};

    fn program(dir: &Path, name: &str) -> (BuildId, Vec<u8>) {
        let path = compile(
            dir,
            name,
            &format!("int {name}(void) {{ return 1; }} int main(void) {{ return {name}(); }}"),
            &[],
        );
        (read(&path).unwrap().build_id().unwrap().clone(), fs::read(path).unwrap())
    }

    fn put(store: &DebugStore, build_id: &BuildId, bytes: &[u8]) -> Result<(), TakeError> {
        let mut incoming = store.receive(build_id).unwrap();
        incoming.write(bytes).unwrap();
        store.take(&incoming, build_id)
    }

    #[test]
    fn a_file_is_kept_only_under_its_own_build_id() {
        let dir = tempfile::tempdir().unwrap();
        let store = DebugStore::open(dir.path().join("debug")).unwrap();
        let ((one, bytes), (two, _)) = (program(dir.path(), "one"), program(dir.path(), "two"));
        assert!(matches!(store.find(&one), Found::Unknown));
        assert!(matches!(put(&store, &two, &bytes), Err(TakeError::NotOfThisBuildId)));
        assert!(matches!(put(&store, &one, &bytes[..bytes.len() / 2]), Err(TakeError::NotOfThisBuildId)));
        assert!(matches!(store.find(&two), Found::Unknown));
        put(&store, &one, &bytes).unwrap();
        assert!(matches!(store.find(&one), Found::File(_)));
        assert_eq!(store.files().unwrap().len(), 1, "what was refused is gone");

        // A file that was damaged later is forgotten.
        fs::write(store.path(&one, "debug"), "").unwrap();
        assert!(matches!(store.find(&one), Found::Unknown));
        assert_eq!(store.files().unwrap().len(), 0);
    }

    #[test]
    fn what_is_absent_is_asked_for_again_after_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let store = DebugStore::open(dir.path().join("debug")).unwrap();
        let (one, bytes) = program(dir.path(), "one");
        store.put_absent(&one).unwrap();
        let store = DebugStore::open(dir.path().join("debug")).unwrap();
        assert!(matches!(store.find(&one), Found::Absent), "also after a restart");
        let absent = File::options().write(true).open(store.path(&one, "absent")).unwrap();
        absent.set_modified(SystemTime::now() - ABSENT_FOR).unwrap();
        assert!(matches!(store.find(&one), Found::Unknown));
        put(&store, &one, &bytes).unwrap();
        assert!(matches!(store.find(&one), Found::File(_)));
    }

    #[test]
    fn the_longest_unused_make_room_and_what_was_not_finished_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let programs = ["one", "two", "three"].map(|name| program(dir.path(), name));
        let [(one, _), (two, _), (three, _)] = &programs;
        let largest = programs.iter().map(|(_, bytes)| bytes.len()).max().unwrap() as u64;
        let store =
            DebugStore { bytes_max: largest * 5 / 2, ..DebugStore::open(dir.path().join("debug")).unwrap() };
        for (seconds, (id, bytes)) in (0..).zip(&programs) {
            put(&store, id, bytes).unwrap();
            let file = File::options().write(true).open(store.path(id, "debug")).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
            // Used each time, so it stays.
            assert!(matches!(store.find(one), Found::File(_)));
        }
        assert!(matches!(store.find(two), Found::Unknown));
        assert!(matches!(store.find(three), Found::File(_)));
        assert_eq!(store.evicted(), 1);
        assert!(store.bytes() <= store.bytes_max);

        fs::write(store.path(two, "0.new"), "part").unwrap();
        drop(DebugStore::open(store.directory.clone()).unwrap());
        assert!(!store.path(two, "0.new").exists());
    }
}
