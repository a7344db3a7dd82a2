//! A debug file whose sections are compressed, as a file on disk in which they are not: blazesym unfolds them on the heap
//! each time it loads the file, 10 MB for the C library's, but maps what is not compressed.
//!
//! The new file has no name: it is gone with its descriptor.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use object::elf::SHF_COMPRESSED;
use rustix::fs::{Mode, OFlags};

use super::inflate;
use crate::executable::{CompressedSection, SectionBytes};

/// Sections of a file that are looked at.
const SECTIONS_MAX: u64 = 4096;

/// Sizes of 64-bit headers, and where their fields lie. Source: elf(5).
const SECTION_HEADER_BYTES: usize = 64;
const COMPRESSION_HEADER_BYTES: u64 = 24;
const FLAGS_AT: usize = 8;
const OFFSET_AT: usize = 24;
const SIZE_AT: usize = 32;
const ALIGNMENT_AT: usize = 48;

/// Sections begin on this, which is the most that any DWARF section asks for.
const ALIGNMENT: u64 = 8;

/// A copy of a 64-bit little-endian ELF file in `directory`, its compressed sections unfolded and put behind all others. They
/// must be honest and few enough bytes.
///
/// # Errors
/// The file is another kind of ELF, cannot be read, or there is no room on disk.
pub(super) fn unpack(file: &File, directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut copy = File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?);
    // By a path of its own, since the position of the descriptor is shared with others.
    let mut whole = inflate::read(file, &SectionBytes::Plain(0..file.metadata()?.len()))?;
    io::copy(&mut whole, &mut copy)?;
    for at in section_headers(file)? {
        let mut header = [0; SECTION_HEADER_BYTES];
        file.read_exact_at(&mut header, at)?;
        if word(&header, FLAGS_AT) & u64::from(SHF_COMPRESSED) != 0 {
            unpack_section(file, &mut header, &mut copy)?;
            copy.write_all_at(&header, at)?;
        }
    }
    Ok(copy)
}

/// Where each header lies in the file.
fn section_headers(file: &File) -> io::Result<impl Iterator<Item = u64>> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    let half = |at: usize| {
        header
            .get(at..at + 2)
            .and_then(|bytes| bytes.first_chunk())
            .map_or(0, |&bytes| u16::from_le_bytes(bytes))
    };
    let is_known = header.starts_with(b"\x7fELF\x02\x01") && usize::from(half(58)) == SECTION_HEADER_BYTES;
    if !is_known {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let (start, count) = (word(&header, 40), u64::from(half(60)).min(SECTIONS_MAX));
    Ok((0..count).map(move |at| start.saturating_add(at * SECTION_HEADER_BYTES as u64)))
}

/// Writes the section's bytes to the end of `copy`, and where they are to its header.
fn unpack_section(file: &File, header: &mut [u8; SECTION_HEADER_BYTES], copy: &mut File) -> io::Result<()> {
    let (offset, bytes) = (word(header, OFFSET_AT), word(header, SIZE_AT));
    let mut compression = [0; COMPRESSION_HEADER_BYTES as usize];
    file.read_exact_at(&mut compression, offset)?;
    let (format, inflated_bytes) = (word(&compression, 0) as u32, word(&compression, 8));
    let start = offset.saturating_add(COMPRESSION_HEADER_BYTES);
    let section =
        CompressedSection { file_range: start..offset.saturating_add(bytes), format, inflated_bytes };
    let at = copy.seek(SeekFrom::End(0))?.next_multiple_of(ALIGNMENT);
    copy.seek(SeekFrom::Start(at))?;
    let inflated = inflate::read(file, &SectionBytes::Compressed(section))?;
    if io::copy(&mut inflated.take(inflated_bytes), copy)? != inflated_bytes {
        return Err(io::ErrorKind::InvalidData.into());
    }
    copy.flush()?;
    let flags = word(header, FLAGS_AT) & !u64::from(SHF_COMPRESSED);
    let fields = [
        (FLAGS_AT, flags),
        (OFFSET_AT, at),
        (SIZE_AT, inflated_bytes),
        (ALIGNMENT_AT, word(&compression, 16)),
    ];
    for (field, value) in fields {
        if let Some(place) = header.get_mut(field..field + 8) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.first_chunk()).map_or(0, |&bytes| u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::executable::Elf;
    use crate::executable::testing::{compile, run};

    #[test]
    fn what_was_compressed_is_as_it_was_before() {
        let dir = tempfile::tempdir().unwrap();
        let program = compile(dir.path(), "program", "int main(void) { return 0; }", &[]);
        let compressed = dir.path().join("compressed");
        run(Command::new("objcopy").arg("--compress-debug-sections=zlib").args([&program, &compressed]));
        let [program, file] = [&program, &compressed].map(|path| File::open(path).unwrap());
        let copy = unpack(&file, dir.path()).unwrap();
        let [before, between, after] = [&program, &file, &copy].map(|file| Elf::of(file).unwrap());
        assert!(between.symbols.inflated_bytes > 0 && after.symbols.inflated_bytes == 0);
        let info = |file: &File, elf: &Elf| {
            let mut bytes = Vec::new();
            inflate::read(file, &elf.symbols.info[0]).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(info(&copy, &after), info(&program, &before));
        assert_eq!(after.build_ids, before.build_ids);
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 3, "the source, the program and the compressed one");
    }

    #[test]
    fn what_is_no_elf_file_or_breaks_off_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let program = compile(dir.path(), "program", "int main(void) { return 0; }", &[]);
        let compressed = dir.path().join("compressed");
        run(Command::new("objcopy").arg("--compress-debug-sections=zlib").args([&program, &compressed]));
        let whole = std::fs::read(&compressed).unwrap();
        for bytes in [0, 10, 64, whole.len() / 2, whole.len() - 1] {
            let mut cut = tempfile::tempfile().unwrap();
            cut.write_all(&whole[..bytes]).unwrap();
            assert!(unpack(&cut, dir.path()).is_err(), "{bytes} of {}", whole.len());
        }
    }
}
