//! Names on disk, a file per executable, so that a start does not read symbols that were read before.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use super::names::{FILE_BYTES_MAX, Names, NamesKey};

/// Bytes of all files; beyond, the longest unused go.
const STORE_BYTES_MAX: u64 = 64 << 20;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("create {path}")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Who may write there may give wrong names.
    #[error("{path} can be written by others")]
    NotPrivate { path: PathBuf },
}

/// What became of files and addresses since the start; `bytes` is of the last save.
#[derive(Debug, Default)]
pub(crate) struct StoreCounts {
    /// Addresses whose names were in a file.
    pub(crate) hits: AtomicU64,
    /// Addresses whose names were not.
    pub(crate) misses: AtomicU64,
    /// Files that were read.
    pub(crate) loaded: AtomicU64,
    /// Files that were damaged, foreign or of another format.
    pub(crate) discarded: AtomicU64,
    /// Files that were written.
    pub(crate) saved: AtomicU64,
    /// Files that could not be read or written.
    pub(crate) errors: AtomicU64,
    /// Files that made room for others.
    pub(crate) evicted: AtomicU64,
    /// Bytes of all files.
    pub(crate) bytes: AtomicU64,
}

/// A directory of names.
#[derive(Debug)]
pub(crate) struct NameStore {
    directory: PathBuf,
    bytes_max: u64,
    counts: StoreCounts,
}

impl NameStore {
    /// A store in `directory`, which is made if need be and must be this user's alone.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub(crate) fn open(directory: PathBuf) -> Result<Self, StoreError> {
        private_directory(&directory)?;
        Ok(Self { directory, bytes_max: STORE_BYTES_MAX, counts: StoreCounts::default() })
    }

    /// Where it is. Only this user writes there.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn counts(&self) -> &StoreCounts {
        &self.counts
    }

    /// What is known of an executable; nothing when there is no file, or none that can be used, which is removed.
    pub(super) fn load(&self, key: NamesKey) -> Names {
        let path = self.directory.join(key.file_name());
        let bytes = match read(&path) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.counts.errors.fetch_add(u64::from(error.kind() != io::ErrorKind::NotFound), Relaxed);
                return Names::default();
            }
        };
        let Ok(names) = Names::decode(&bytes, key) else {
            self.counts.discarded.fetch_add(1, Relaxed);
            // It will be written over when it cannot be removed.
            let _ = fs::remove_file(&path);
            return Names::default();
        };
        self.counts.loaded.fetch_add(1, Relaxed);
        names
    }

    /// Writes what is known of an executable, whole or not at all, and keeps the directory within its bound. A failure is
    /// counted; the names can be had again.
    pub(super) fn save(&self, key: NamesKey, names: &Names) {
        let saved = self.write(key, names).and_then(|()| self.make_room());
        let count = if saved.is_ok() { &self.counts.saved } else { &self.counts.errors };
        count.fetch_add(1, Relaxed);
    }

    pub(super) fn count_look_ups(&self, hits: u64, misses: u64) {
        self.counts.hits.fetch_add(hits, Relaxed);
        self.counts.misses.fetch_add(misses, Relaxed);
    }

    fn write(&self, key: NamesKey, names: &Names) -> io::Result<()> {
        let bytes = names.encode(key)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let random = u64::from_ne_bytes(crate::sys::random::bytes()?);
        let new = self.directory.join(format!("{}.{random:x}.new", key.file_name()));
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
        // Not synced: after a crash of the machine the sum tells.
        let written =
            file.write_all(&bytes).and_then(|()| fs::rename(&new, self.directory.join(key.file_name())));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written
    }

    /// Removes the files that were not written for the longest time.
    fn make_room(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            // A file may be gone by now: another thread makes room too.
            if let Ok(metadata) = entry.metadata() {
                files.push((metadata.modified()?, metadata.len(), entry.path()));
            }
        }
        files.sort_unstable();
        let mut bytes: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, file_bytes, path) in files {
            if bytes <= self.bytes_max {
                break;
            }
            fs::remove_file(path)?;
            bytes -= file_bytes;
            self.counts.evicted.fetch_add(1, Relaxed);
        }
        self.counts.bytes.store(bytes, Relaxed);
        Ok(())
    }
}

/// Reads a file and marks it as used now, which is what room is made by.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    (&file).take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    file.set_modified(SystemTime::now())?;
    Ok(bytes)
}

/// Makes a directory if need be, which must be this user's alone.
pub(super) fn private_directory(path: &Path) -> Result<(), StoreError> {
    let create = || {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        fs::symlink_metadata(path)
    };
    let metadata = create().map_err(|source| StoreError::Create { path: path.into(), source })?;
    if !is_private(&metadata) {
        return Err(StoreError::NotPrivate { path: path.into() });
    }
    Ok(())
}

fn is_private(metadata: &Metadata) -> bool {
    let own = rustix::process::geteuid().as_raw();
    metadata.is_dir() && metadata.uid() == own && metadata.mode() & 0o022 == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Duration;

    use super::*;
    use crate::executable::testing::read as read_executable;
    use crate::symbolize::NewFrame;

    fn key(variant: u32) -> NamesKey {
        let executable = read_executable("/proc/self/exe".as_ref()).unwrap();
        NamesKey::new(executable.identity(), [7; 16], &variant.to_string())
    }

    fn names(function: &str) -> Names {
        let mut names = Names::default();
        names.insert(1, &[NewFrame { function: function.into(), ..NewFrame::default() }]);
        names
    }

    fn function(names: &Names) -> Option<String> {
        Some(names.get(1)?.first()?.function.clone())
    }

    #[test]
    fn a_new_store_knows_what_the_one_before_it_has_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/names");
        NameStore::open(path.clone()).unwrap().save(key(1), &names("known"));
        let store = NameStore::open(path.clone()).unwrap();
        assert_eq!(function(&store.load(key(1))), Some("known".into()));
        assert_eq!(function(&store.load(key(2))), None);
        let modes =
            [path.clone(), path.join(key(1).file_name())].map(|path| fs::metadata(path).unwrap().mode());
        assert_eq!(modes.map(|mode| mode & 0o777), [0o700, 0o600]);
        assert_eq!(store.counts.errors.load(Relaxed), 0);
    }

    #[test]
    fn a_damaged_file_is_counted_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = NameStore::open(directory.path().join("names")).unwrap();
        store.save(key(1), &names("known"));
        let path = store.directory.join(key(1).file_name());
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(function(&store.load(key(1))), None);
        assert_eq!(store.counts.discarded.load(Relaxed), 1);
        assert!(!path.exists());
    }

    #[test]
    fn the_longest_unused_files_make_room() {
        let directory = tempfile::tempdir().unwrap();
        let store = NameStore { bytes_max: 1000, ..NameStore::open(directory.path().join("names")).unwrap() };
        let past = SystemTime::now() - Duration::from_secs(1000);
        for variant in 0..20 {
            store.save(key(variant), &names("known"));
            let path = store.directory.join(key(variant).file_name());
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(past + Duration::from_secs(variant.into())).unwrap();
            // Used each time, so it stays.
            assert_eq!(function(&store.load(key(0))), Some("known".into()), "after {variant}");
        }
        assert!(store.counts.bytes.load(Relaxed) <= 1000);
        assert!(store.counts.evicted.load(Relaxed) > 0);
        assert_eq!(function(&store.load(key(1))), None);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let opened = NameStore::open(directory.path().into());
        assert!(matches!(opened, Err(StoreError::NotPrivate { .. })), "{opened:?}");
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(NameStore::open(file), Err(StoreError::Create { .. })));
    }
}
