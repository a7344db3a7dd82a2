//! All bytes of a file, and whether they are still those that were hashed.
//!
//! Who shares names with other files of the same content must not be able to change them afterwards. A file's version
//! ([`FileKey`]) changes with every write, its time of change cannot be set; within the clock's tick it may stay, so a
//! file that was changed a moment ago is not hashed yet.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::fs::Advice;
use sha2::{Digest as _, Sha256};

use crate::sys::{clock, page_cache};

/// First half of a SHA-256.
pub(crate) type ContentHash = [u8; 16];

/// Larger files are not hashed: their names are theirs alone, and not kept on disk. 2 GiB take about 2 s of CPU time.
const BYTES_MAX: u64 = 2 << 30;
/// Bytes read at a time.
const CHUNK_BYTES: u64 = 1 << 20;
/// A file whose version changes more often is one that somebody writes to.
const HASHED_MAX: u32 = 8;
/// How long ago a file must have been changed: longer than any clock ticks that file systems stamp by.
pub(crate) const AGE_MIN: Duration = Duration::from_secs(2);

/// A file's version, cheap to ask for: while none of this changes, the content does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileKey {
    device: u64,
    inode: u64,
    bytes: i64,
    modified_ns: (i64, u64),
    changed_ns: (i64, u64),
}

impl FileKey {
    #[expect(clippy::useless_conversion, reason = "the fields of stat differ in width between architectures")]
    pub(crate) fn new(stat: &rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev.into(),
            inode: stat.st_ino.into(),
            bytes: stat.st_size.into(),
            modified_ns: (stat.st_mtime.into(), stat.st_mtime_nsec.into()),
            changed_ns: (stat.st_ctime.into(), stat.st_ctime_nsec.into()),
        }
    }

    /// Device and inode: one file's as long as that is open.
    pub(super) fn inode(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// The version of an open file now.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        Ok(Self::new(&rustix::fs::fstat(file)?))
    }

    /// Whether it was changed so long ago that a change to come has another time.
    pub(crate) fn is_settled(&self, age_min: Duration) -> bool {
        let (seconds, nanoseconds) = self.changed_ns;
        let changed_ns = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        changed_ns + i128::try_from(age_min.as_nanos()).unwrap_or(i128::MAX) <= i128::from(clock::wall_ns())
    }
}

/// What is known of a file's content.
#[derive(Debug)]
pub(super) struct Content {
    known: Mutex<Option<Known>>,
    has_changed: AtomicBool,
    age_min: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    key: FileKey,
    hash: ContentHash,
    /// How often it was hashed.
    times: u32,
}

impl Content {
    /// Nothing is known yet.
    pub(super) fn unknown(age_min: Duration) -> Self {
        Self { known: Mutex::new(None), has_changed: AtomicBool::new(false), age_min }
    }

    /// All bytes were hashed when the file was opened.
    pub(super) fn known(key: FileKey, hash: ContentHash, age_min: Duration) -> Self {
        Self { known: Mutex::new(Some(Known { key, hash, times: 1 })), ..Self::unknown(age_min) }
    }

    /// Whether it was found to be another than it was.
    pub(super) fn has_changed(&self) -> bool {
        self.has_changed.load(Relaxed)
    }

    /// The hash of all bytes. Reads the file when it is asked for first, and when the file's version is another: no lock is
    /// held meanwhile. `None` where it cannot be told, or nothing that holds can be: see [`super::Executable::content`].
    pub(super) fn hash(&self, file: &File) -> Option<ContentHash> {
        if self.has_changed() {
            return None;
        }
        let before = FileKey::of(file).ok()?;
        let known = *self.lock();
        if let Some(known) = known.filter(|known| known.key == before) {
            return Some(known.hash);
        }
        let times = known.map_or(0, |known| known.times);
        let is_stable = before.is_settled(self.age_min) && !is_served_by_a_user(file);
        if !is_stable || u64::try_from(before.bytes).is_ok_and(|bytes| bytes > BYTES_MAX) {
            // A version that cannot be vouched for, of a file that was vouched for.
            if times > 0 {
                self.has_changed.store(true, Relaxed);
            }
            return None;
        }
        let hash = hash_all(file, before.bytes.unsigned_abs()).ok();
        let is_same_file = FileKey::of(file).is_ok_and(|after| after == before);
        let hash = hash.filter(|hash| {
            is_same_file && times < HASHED_MAX && known.is_none_or(|known| known.hash == *hash)
        });
        match hash {
            Some(hash) => *self.lock() = Some(Known { key: before, hash, times: times + 1 }),
            None => self.has_changed.store(true, Relaxed),
        }
        hash
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Known>> {
        // Every change is complete before anything that could panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a program answers what is in the file: to each question another content, with the same times. Source:
/// include/uapi/linux/magic.h, FUSE_SUPER_MAGIC; 9p and others reach a server of the network, which is the
/// administrator's choice.
fn is_served_by_a_user(file: &File) -> bool {
    const FUSE_SUPER_MAGIC: i128 = 0x6573_5546;
    rustix::fs::fstatfs(file).map_or(true, |stat| i128::from(stat.f_type) == FUSE_SUPER_MAGIC)
}

/// Reads so many bytes from the start, and leaves the page cache as it was.
fn hash_all(file: &File, bytes: u64) -> io::Result<ContentHash> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; usize::try_from(CHUNK_BYTES.min(bytes)).unwrap_or_default()];
    // Else what is read ahead would be taken for what was there.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
    let mut start = 0;
    while start < bytes {
        let length = CHUNK_BYTES.min(bytes - start);
        let part = chunk.get_mut(..usize::try_from(length).unwrap_or_default()).unwrap_or_default();
        let absent = page_cache::absent(file, start, length);
        file.read_exact_at(part, start)?;
        hash.update(&*part);
        for range in absent {
            if let Some(length) = std::num::NonZeroU64::new(range.end - range.start) {
                let _ = rustix::fs::fadvise(file, range.start, Some(length), Advice::DontNeed);
            }
        }
        start += length;
    }
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Normal);
    Ok(first_half(&hash.finalize()))
}

/// Of a digest.
pub(super) fn first_half(digest: &[u8]) -> ContentHash {
    let mut half = ContentHash::default();
    half.iter_mut().zip(digest).for_each(|(to, from)| *to = *from);
    half
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, path::Path};

    use super::*;

    fn file(directory: &Path, bytes: usize) -> File {
        let path = directory.join("file");
        fs::write(&path, vec![7; bytes]).expect("write");
        File::options().read(true).write(true).open(path).expect("open")
    }

    #[test]
    fn the_same_bytes_have_the_same_hash_and_any_other_byte_another() {
        let directory = tempfile::tempdir().expect("a directory");
        let bytes = 3 * CHUNK_BYTES as usize + 5;
        let hash = |change: Option<u64>| {
            let file = file(directory.path(), bytes);
            if let Some(at) = change {
                file.write_all_at(&[8], at).expect("write");
            }
            Content::unknown(Duration::ZERO).hash(&file).expect("a hash")
        };
        let plain = hash(None);
        assert_eq!(plain, hash(None));
        for at in [0, CHUNK_BYTES - 1, CHUNK_BYTES, bytes as u64 / 2, bytes as u64 - 1] {
            assert_ne!(plain, hash(Some(at)), "{at}");
        }
    }

    #[test]
    fn a_file_that_others_change_is_vouched_for_no_longer() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut file = file(directory.path(), 1 << 20);
        let content = Content::unknown(Duration::ZERO);
        let first = content.hash(&file).expect("a hash");
        // Its name goes, as when a package is replaced: another version, the same bytes.
        fs::remove_file(directory.path().join("file")).expect("remove");
        assert_eq!((content.hash(&file), content.has_changed()), (Some(first), false));
        file.write_all(b"x").expect("write");
        assert_eq!((content.hash(&file), content.has_changed()), (None, true));
        file.write_all_at(&[7], 0).expect("write");
        assert_eq!(content.hash(&file), None, "the old bytes are back, and may go again");
    }

    #[test]
    fn a_file_that_was_changed_a_moment_ago_is_not_vouched_for_yet() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = file(directory.path(), 5000);
        let content = Content::unknown(Duration::from_secs(3600));
        assert_eq!((content.hash(&file), content.has_changed()), (None, false));
        let key = FileKey::of(&file).expect("a file");
        let vouched = Content::known(key, [1; 16], Duration::from_secs(3600));
        assert_eq!(vouched.hash(&file), Some([1; 16]));
        file.write_all_at(&[8], 0).expect("write");
        file.set_len(5001).expect("grow");
        assert_eq!((vouched.hash(&file), vouched.has_changed()), (None, true));
    }

    #[test]
    fn hashing_leaves_the_page_cache_as_it_was() {
        let directory = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let bytes = 4 * CHUNK_BYTES;
        let file = file(directory.path(), bytes as usize);
        file.sync_all().expect("write back");
        let whole = std::num::NonZeroU64::new(bytes);
        rustix::fs::fadvise(&file, 0, whole, Advice::DontNeed).expect("drop its pages");
        file.read_exact_at(&mut [0; 10], CHUNK_BYTES).expect("read a page");
        let absent = |file: &File| -> u64 {
            page_cache::absent(file, 0, bytes).iter().map(|range| range.end - range.start).sum()
        };
        let before = absent(&file);
        hash_all(&file, bytes).expect("a hash");
        assert!(absent(&file) >= before, "{before} bytes were not there, {} are not now", absent(&file));
    }
}
