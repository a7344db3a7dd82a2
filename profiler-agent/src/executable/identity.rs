//! What makes two files the same executable.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use sha2::{Digest as _, Sha256};

use super::build_id::BuildIds;
use super::content::{ContentHash, FileKey, first_half};

/// Files up to so many bytes are hashed whole.
const WHOLE_BYTES_MAX: u64 = 1 << 20;

/// Bytes hashed at either end of a larger file: headers and notes in front; symbols and section headers behind.
const END_BYTES: u64 = 64 << 10;

const CHUNK_BYTES: usize = 64 << 10;

/// The content of an executable as far as it is compared: build ids, size, and a hash of small files, or of both ends.
///
/// A build id alone is what the linker was told; a patched or stripped copy keeps it. The middle of a large file is not
/// read when it is opened, for that is on the way of samples: until all of its bytes are known to be another's
/// ([`super::ExecutableCache::settle`]) it is itself alone, lest somebody forges a file with the ends of another and says
/// what everybody's functions are called.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) build_ids: BuildIds,
    pub(crate) file_bytes: u64,
    /// Of all bytes up to `WHOLE_BYTES_MAX`; beyond, of head and tail, `END_BYTES` each.
    pub(crate) content_hash: ContentHash,
    /// Which file it is, where the hash does not say all: of a large one, or one that was changed a moment ago.
    pub(crate) file: Option<FileKey>,
}

impl Identity {
    /// `is_settled`: the file was changed long enough ago for its version to vouch for its bytes.
    pub(crate) fn read(
        file: &File,
        key: FileKey,
        is_settled: bool,
        file_bytes: u64,
        build_ids: BuildIds,
    ) -> io::Result<Self> {
        let is_whole = file_bytes <= WHOLE_BYTES_MAX && is_settled;
        let ranges = match file_bytes {
            0..=WHOLE_BYTES_MAX => [0..file_bytes, file_bytes..file_bytes],
            _ => [0..END_BYTES, file_bytes - END_BYTES..file_bytes],
        };
        let mut hash = Sha256::new();
        for range in ranges {
            update(&mut hash, file, range)?;
        }
        let content_hash = first_half(&hash.finalize());
        Ok(Self { build_ids, file_bytes, content_hash, file: (!is_whole).then_some(key) })
    }

    /// What two files have in common that may have the same content.
    pub(super) fn resemblance(&self) -> Self {
        Self { file: None, ..self.clone() }
    }

    /// That of all files with this content.
    pub(super) fn of_content(&self, content_hash: ContentHash) -> Self {
        Self { content_hash, file: None, ..self.clone() }
    }
}

/// Hashes a range of a file, which must have all of it.
fn update(hash: &mut Sha256, file: &File, range: Range<u64>) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let Range { mut start, end } = range;
    while start < end {
        let bytes = usize::try_from(end - start).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let (chunk, _) = chunk.split_at_mut(bytes);
        file.read_exact_at(chunk, start)?;
        hash.update(&*chunk);
        start += bytes as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(bytes: &[u8]) -> Identity {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let key = FileKey::of(&file).unwrap();
        let identity = Identity::read(&file, key, true, bytes.len() as u64, BuildIds::default()).unwrap();
        // Open, as executables are: the next file would have its inode.
        std::mem::forget(file);
        identity
    }

    /// A file, and what it is with another byte at a place.
    fn base(bytes: u64) -> (Vec<u8>, impl Fn(u64) -> Identity) {
        let base = vec![7; usize::try_from(bytes).unwrap()];
        let other = base.clone();
        let with = move |at| {
            let mut bytes = other.clone();
            bytes[usize::try_from(at).unwrap()] = 8;
            identity(&bytes)
        };
        (base, with)
    }

    #[test]
    fn large_files_resemble_each_other_by_both_ends_and_size_and_are_never_the_same() {
        let size = WHOLE_BYTES_MAX + 1;
        let (base, with) = base(size);
        let of_base = identity(&base).resemblance();
        assert_ne!(identity(&base), identity(&base));
        assert_eq!(of_base, identity(&base).resemblance());
        for at in [0, END_BYTES - 1, size - END_BYTES, size - 1] {
            assert_ne!(of_base, with(at).resemblance(), "{at}");
        }
        assert_ne!(of_base, identity(&[base.as_slice(), &[7]].concat()).resemblance());
        assert_eq!(of_base, with(END_BYTES).resemblance(), "the middle is not read");
    }

    #[test]
    fn files_of_a_mebibyte_and_less_differ_by_any_byte() {
        for size in [1, CHUNK_BYTES as u64 + 1, WHOLE_BYTES_MAX] {
            let (base, with) = base(size);
            assert_eq!(identity(&base), identity(&base));
            for at in [0, size / 2, size - 1] {
                assert_ne!(identity(&base), with(at), "{at} of {size}");
            }
        }
        assert_ne!(identity(b""), identity(b"a"));
    }

    #[test]
    fn a_file_shorter_than_it_was_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let key = FileKey::of(&file).unwrap();
        assert!(Identity::read(&file, key, true, 10, BuildIds::default()).is_err());
    }
}
