//! Compressed sections, tried before anybody allocates for them.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use object::elf;

use crate::executable::{CompressedSection, SectionBytes};

/// Whether a section unfolds to as many bytes as its header says: a few bytes can unfold to any number, and blazesym
/// unfolds a section to its end before it compares. Nothing is kept.
///
/// A file that is rewritten between this and its use escapes it.
pub(super) fn is_honest(file: &File, section: &CompressedSection) -> bool {
    let inflated = inflate(file, section).and_then(|decoder| count(decoder, section.inflated_bytes));
    inflated.is_ok_and(|bytes| bytes == section.inflated_bytes)
}

/// The bytes of a section, unfolded; nothing bounds how many.
pub(super) fn read<'f>(file: &'f File, section: &SectionBytes) -> io::Result<Box<dyn Read + 'f>> {
    match section {
        SectionBytes::Plain(range) => Ok(Box::new(buffered(file, range))),
        SectionBytes::Compressed(section) => inflate(file, section),
    }
}

fn inflate<'f>(file: &'f File, section: &CompressedSection) -> io::Result<Box<dyn Read + 'f>> {
    let bytes = buffered(file, &section.file_range);
    match section.format {
        elf::ELFCOMPRESS_ZLIB => Ok(Box::new(flate2::bufread::ZlibDecoder::new(bytes))),
        elf::ELFCOMPRESS_ZSTD => Ok(Box::new(zstd::stream::read::Decoder::with_buffer(bytes)?)),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The bytes of a range of a file.
pub(super) fn range<'f>(file: &'f File, range: &Range<u64>) -> impl Read + use<'f> {
    buffered(file, range)
}

fn buffered<'f>(file: &'f File, range: &Range<u64>) -> BufReader<RangeReader<'f>> {
    BufReader::with_capacity(64 << 10, RangeReader { file, at: range.start, end: range.end })
}

/// Bytes that come out, counted up to one more than `expected`.
fn count(decoder: impl Read, expected: u64) -> io::Result<u64> {
    io::copy(&mut decoder.take(expected.saturating_add(1)), &mut io::sink())
}

/// A part of a file, read by position.
struct RangeReader<'f> {
    file: &'f File,
    at: u64,
    end: u64,
}

impl Read for RangeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        let read = self.file.read_at(buffer.get_mut(..room).unwrap_or_default(), self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn check(format: u32, compressed: &[u8], inflated_bytes: u64, expect: bool) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(compressed, 100).unwrap();
        let file_range = 100..100 + compressed.len() as u64;
        assert_eq!(is_honest(&file, &CompressedSection { file_range, format, inflated_bytes }), expect);
    }

    #[test]
    fn a_section_is_honest_when_it_unfolds_to_what_it_says() {
        let (zeros, size) = (vec![0; 1 << 20], 1 << 20);
        let zstd = zstd::encode_all(zeros.as_slice(), 1).unwrap();
        check(elf::ELFCOMPRESS_ZLIB, &zlib(&zeros), size, true);
        check(elf::ELFCOMPRESS_ZSTD, &zstd, size, true);
        for wrong in [0, 1, size - 1, size + 1, u64::MAX] {
            check(elf::ELFCOMPRESS_ZLIB, &zlib(&zeros), wrong, false);
            check(elf::ELFCOMPRESS_ZSTD, &zstd, wrong, false);
        }
        check(elf::ELFCOMPRESS_ZLIB, &zlib(&zeros)[..20], size, false);
        check(elf::ELFCOMPRESS_ZLIB, b"no zlib", 7, false);
        check(7, &zlib(&zeros), size, false);
    }
}
