//! What makes two files the same executable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use sha2::{Digest as _, Sha256};

use super::build_id::BuildIds;

/// Bytes hashed at either end of the file: headers and notes in front; symbols and section headers behind.
const END_BYTES: u64 = 64 << 10;

/// The content of an executable as far as it is compared: build ids, size, and a hash of both ends.
///
/// A build id alone is what the linker was told; a patched or stripped copy keeps it. The middle of the file is not
/// read, so who forges a file with the ends of another can give wrong names to its own code, and to that of others
/// who run the original; numbers and labels stay right.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) build_ids: BuildIds,
    pub(crate) file_bytes: u64,
    /// First half of the SHA-256 of head and tail, `END_BYTES` each; of all bytes when they are fewer.
    pub(crate) ends_hash: [u8; 16],
}

impl Identity {
    pub(crate) fn read(file: &File, file_bytes: u64, build_ids: BuildIds) -> io::Result<Self> {
        let head = END_BYTES.min(file_bytes);
        let tail = END_BYTES.min(file_bytes - head);
        let mut ends = vec![0; usize::try_from(head + tail).expect("two ends fit into memory")];
        let (first, last) = ends.split_at_mut(usize::try_from(head).expect("an end fits into memory"));
        file.read_exact_at(first, 0)?;
        file.read_exact_at(last, file_bytes - tail)?;

        let mut ends_hash = [0; 16];
        let digest = Sha256::digest(&ends);
        ends_hash.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
        Ok(Self { build_ids, file_bytes, ends_hash })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(bytes: &[u8]) -> Identity {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Identity::read(&file, bytes.len() as u64, BuildIds::default()).unwrap()
    }

    #[test]
    fn files_differ_by_either_end_and_by_size() {
        let end = usize::try_from(END_BYTES).unwrap();
        let base = vec![7; 3 * end];
        let with = |at: usize| {
            let mut bytes = base.clone();
            bytes[at] = 8;
            identity(&bytes)
        };
        assert_eq!(identity(&base), identity(&base));
        assert_ne!(identity(&base), with(0));
        assert_ne!(identity(&base), with(end - 1));
        assert_ne!(identity(&base), with(2 * end));
        assert_ne!(identity(&base), with(3 * end - 1));
        assert_ne!(identity(&base), identity(&base[1..]));
        assert_eq!(identity(&base), with(end), "the middle is not read");
    }

    #[test]
    fn short_files_are_hashed_whole() {
        let end = usize::try_from(END_BYTES).unwrap();
        let base = vec![7; end + 10];
        let mut other = base.clone();
        other[end + 3] = 8;
        assert_ne!(identity(&base), identity(&other));
        assert_ne!(identity(b""), identity(b"a"));
    }

    #[test]
    fn a_file_shorter_than_it_was_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(Identity::read(&file, 10, BuildIds::default()).is_err());
    }
}
