//! A file's bytes without a copy of them.

use std::{fs::File, hint::black_box, io, os::fd::AsRawFd as _, ptr, slice};

use super::sigbus::{self, FileShrank};

/// A whole file, mapped for reading. Only pages that are read are ever resident.
pub(crate) struct FileMap {
    start: *const u8,
    bytes: usize,
}

impl FileMap {
    /// Maps a file that has `bytes` bytes, which is not 0.
    pub(crate) fn new(file: &File, bytes: usize) -> io::Result<Self> {
        sigbus::install()?;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), bytes })
    }

    /// Hands the bytes to `read`, which keeps to this thread. A file that others write to may change meanwhile, so its
    /// bytes deserve no trust from one look to the next.
    ///
    /// # Errors
    /// The file was made shorter meanwhile; what `read` gave is thrown away.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&[u8]) -> T) -> Result<T, FileShrank> {
        sigbus::guard(|| {
            // Opaque to the compiler, which may otherwise read ahead of the guard: it takes the bytes of a slice to be
            // there.
            let start = black_box(self.start);
            // SAFETY: the mapping has this many bytes and lives as long as `self`; nobody can write through it.
            read(unsafe { slice::from_raw_parts(start, self.bytes) })
        })
    }

    /// Gives the resident pages back. Who reads them again gets them from the page cache.
    pub(crate) fn release(&self) {
        // SAFETY: pages of the mapping that nobody can have written to: they are the file's before and after. An error means
        // that they stay.
        unsafe { libc::madvise(self.start.cast_mut().cast(), self.bytes, libc::MADV_DONTNEED) };
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // SAFETY: exactly the range that mmap returned, unmapped once; no slice outlives `read`.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_is_read_and_one_cut_short_is_an_error() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&[7; 10_000]).expect("room for it");
        let map = FileMap::new(&file, 10_000).expect("it can be mapped");
        assert_eq!(map.read(|bytes| bytes.iter().filter(|&&byte| byte == 7).count()), Ok(10_000));
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        let around_a_release = map.read(|bytes| (sum(bytes), map.release(), sum(bytes)));
        assert_eq!(around_a_release, Ok((70_000, (), 70_000)));
        file.set_len(100).expect("it can be cut");
        assert_eq!(map.read(|bytes| bytes.last().copied()), Err(FileShrank));
    }
}
