//! Positioned reads of a file that nobody vouches for.

use std::cell::Cell;
use std::fs::File;
use std::ops::Range;

use object::read::{ReadCache, ReadRef};

/// Largest single read, in bytes. Section headers of 64 thousand sections fit.
const READ_BYTES_MAX: u64 = 4 << 20;

/// Sum of all reads of one file, in bytes.
const TOTAL_BYTES_MAX: u64 = 16 << 20;

/// What a search for the end of a string may cost, in bytes: `ReadCache` reads on up to here.
const STRING_BYTES_MAX: u64 = 4096;

/// The parts of a file that were read, within a budget.
///
/// The file is read, never mapped: a file that shrinks gives an error, not a signal.
pub(crate) struct BoundedFile<'f> {
    cache: ReadCache<&'f File>,
    bytes_left: Cell<u64>,
}

impl<'f> BoundedFile<'f> {
    pub(crate) fn new(file: &'f File) -> Self {
        Self { cache: ReadCache::new(file), bytes_left: Cell::new(TOTAL_BYTES_MAX) }
    }

    fn charge(&self, bytes: u64) -> Result<(), ()> {
        let left = self.bytes_left.get().checked_sub(bytes).ok_or(())?;
        self.bytes_left.set(left);
        Ok(())
    }
}

impl<'a> ReadRef<'a> for &'a BoundedFile<'_> {
    fn len(self) -> Result<u64, ()> {
        (&self.cache).len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size > READ_BYTES_MAX {
            return Err(());
        }
        self.charge(size)?;
        (&self.cache).read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        let bytes = (&self.cache).read_bytes_at_until(range, delimiter)?;
        self.charge((bytes.len() as u64).clamp(1, STRING_BYTES_MAX))?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn reads_stop_at_the_budget_and_at_the_end_of_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc\0def").unwrap();
        file.set_len(64 << 20).unwrap();
        let bounded = BoundedFile::new(&file);

        assert_eq!((&bounded).read_bytes_at(0, 3), Ok(b"abc".as_slice()));
        assert_eq!((&bounded).read_bytes_at_until(4..64, 0), Ok(b"def".as_slice()));
        assert_eq!((&bounded).read_bytes_at(64 << 20, 1), Err(()));
        assert_eq!((&bounded).read_bytes_at(u64::MAX, 2), Err(()));
        assert_eq!((&bounded).read_bytes_at(0, READ_BYTES_MAX + 1), Err(()));
        let reads = (0..64).take_while(|i| (&bounded).read_bytes_at(i << 20, 1 << 20).is_ok()).count();
        assert_eq!(reads as u64, (TOTAL_BYTES_MAX >> 20) - 1);
    }
}
