//! What the agent must know of an ELF file before it trusts any of it: where its bytes are mapped, who linked it, and
//! how much a symbolizer would have to load.

use std::fs::File;
use std::ops::Range;

use object::read::ReadRef;
use object::read::elf::{
    CompressionHeader as _, FileHeader, ProgramHeader as _, SectionHeader as _, SectionTable,
};
use object::{Endian as _, Endianness, elf};

use super::bounded::BoundedFile;
use super::build_id::{BuildIds, build_ids};
use crate::addr::{ElfAddr, FileOffset};
use crate::sys::page::page_bytes;

/// Load segments taken from one file. Linkers write 2 to 6; every program header is 56 bytes of a bounded read.
const SEGMENTS_MAX: usize = 256;

/// A file's name, and the CRC behind it.
const DEBUG_LINK_BYTES_MAX: u64 = 256 + 8;

/// Why a file is not taken as an executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ElfError {
    /// Not an ELF file, or cut within its first header.
    #[error("no ELF header")]
    NoHeader,
    /// The program headers lie outside the file or claim more than is ever read.
    #[error("ELF program headers cannot be read")]
    ProgramHeaders,
    /// Nothing is mapped from it.
    #[error("no ELF load segment")]
    NoLoadSegment,
}

/// One PT_LOAD header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    file_offset: u64,
    file_bytes: u64,
    elf_addr: u64,
    executable: bool,
}

impl Segment {
    fn holds(&self, offset: u64) -> bool {
        offset.checked_sub(self.file_offset).is_some_and(|into| into < self.file_bytes)
    }

    /// The kernel maps whole pages: what lies around the segment in its first and last page is mapped with it.
    fn maps(&self, offset: u64, page_bytes: u64) -> bool {
        let start = self.file_offset & !(page_bytes - 1);
        let end = self.file_offset.saturating_add(self.file_bytes).checked_next_multiple_of(page_bytes);
        (start..end.unwrap_or(u64::MAX)).contains(&offset)
    }

    fn elf_addr(&self, offset: u64) -> ElfAddr {
        ElfAddr(self.elf_addr.wrapping_add(offset.wrapping_sub(self.file_offset)))
    }
}

/// The load segments of a file: file offsets to addresses.
///
/// ```text
///   process     mapping start ─────── pc          offset = pc - start + the mapping's offset
///   file        mapping offset ────── offset      [p_offset, p_offset + p_filesz)
///   ELF                               address     = p_vaddr + (offset - p_offset)
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segments(Box<[Segment]>);

impl Segments {
    /// The address that the ELF gives to the byte at `offset`, for code: an executable segment is preferred where the
    /// same page of the file is mapped twice. `None` when no segment maps it.
    pub(crate) fn elf_addr(&self, offset: FileOffset) -> Option<ElfAddr> {
        self.elf_addr_with(offset, page_bytes())
    }

    /// The same where pages have a size, a power of two.
    fn elf_addr_with(&self, FileOffset(offset): FileOffset, page_bytes: u64) -> Option<ElfAddr> {
        let code = || self.0.iter().filter(|segment| segment.executable);
        let found = code()
            .find(|segment| segment.holds(offset))
            .or_else(|| code().find(|segment| segment.maps(offset, page_bytes)))
            .or_else(|| self.0.iter().find(|segment| segment.holds(offset)))?;
        Some(found.elf_addr(offset))
    }

    /// From the first code address to the end of the last, and where the first lies in the file: what a pprof mapping
    /// states. `None` for a file without code.
    pub(crate) fn code_range(&self) -> Option<(Range<ElfAddr>, FileOffset)> {
        let code = || self.0.iter().filter(|segment| segment.executable);
        let first = code().min_by_key(|segment| segment.elf_addr)?;
        let end = code().map(|segment| segment.elf_addr.saturating_add(segment.file_bytes)).max()?;
        Some((ElfAddr(first.elf_addr)..ElfAddr(end), FileOffset(first.file_offset)))
    }
}

/// A section's compressed bytes in the file, and what its header says of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CompressedSection {
    pub(crate) file_range: Range<u64>,
    /// `ELFCOMPRESS_ZLIB`, `ELFCOMPRESS_ZSTD` or anything else.
    pub(crate) format: u32,
    pub(crate) inflated_bytes: u64,
}

/// Where a section's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SectionBytes {
    /// A range of the file.
    Plain(Range<u64>),
    Compressed(CompressedSection),
}

/// Where a symbol table of 64-bit little-endian entries lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SymbolTable {
    pub(crate) symbols: Range<u64>,
    /// Names, each ended by a zero byte.
    pub(crate) strings: Range<u64>,
    /// The table of the dynamic linker, which has only what others may use.
    pub(crate) is_dynamic: bool,
}

/// What a symbolizer would load from a file, from its section headers alone, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SymbolSections {
    /// Symbol tables and their strings.
    pub(crate) symbol_bytes: u64,
    /// Symbol tables; empty for other than 64-bit little-endian files.
    pub(crate) tables: Vec<SymbolTable>,
    /// DWARF sections as they are in memory: uncompressed.
    pub(crate) debug_bytes: u64,
    /// The part of `debug_bytes` that is compressed in the file, hence costs memory of our own.
    pub(crate) inflated_bytes: u64,
    pub(crate) compressed: Vec<CompressedSection>,
    /// Every `.debug_info`; a linker writes one.
    pub(crate) info: Vec<SectionBytes>,
    /// Every `.debug_abbrev`; a linker writes one.
    pub(crate) abbreviations: Vec<SectionBytes>,
    /// There is DWARF in the file itself.
    pub(crate) has_debug_info: bool,
    /// The name of a separate file with debug information, as `.gnu_debuglink` has it.
    pub(crate) debug_link: Option<Box<str>>,
    /// A section names another file with debug information.
    pub(crate) names_other_file: bool,
    /// Where symbols are that are compressed: `.gnu_debugdata`.
    pub(crate) mini: Option<Range<u64>>,
}

/// Go's own table of functions, and what the linker says beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GoTable {
    /// In the file.
    pub(crate) range: Range<u64>,
    /// Address of the first code, where the table does not say it.
    pub(crate) text: ElfAddr,
    /// `go:func.*`, counted from the start of the table.
    pub(crate) trees_at: Option<u64>,
}

/// The headers of an ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Elf {
    pub(crate) segments: Segments,
    pub(crate) build_ids: BuildIds,
    pub(crate) symbols: SymbolSections,
    /// Linked by Go's tool chain, which keeps frame pointers and its own tables.
    pub(crate) is_go: bool,
    /// There in stripped files too.
    pub(crate) go_table: Option<GoTable>,
}

impl Elf {
    /// Reads the headers of an open file, within a budget.
    ///
    /// # Errors
    /// See [`ElfError`].
    pub(crate) fn of(file: &File) -> Result<Self, ElfError> {
        Self::read(&BoundedFile::new(file))
    }

    /// Reads the headers through `data`, 32 or 64 bits, either byte order.
    ///
    /// # Errors
    /// See [`ElfError`]. Section headers are optional: what cannot be read counts as absent.
    fn read<'data, R: ReadRef<'data>>(data: R) -> Result<Self, ElfError> {
        let ident = data.read_bytes_at(0, 5).map_err(|()| ElfError::NoHeader)?;
        match ident {
            [0x7f, b'E', b'L', b'F', elf::ELFCLASS64] => read_as::<elf::FileHeader64<Endianness>, R>(data),
            [0x7f, b'E', b'L', b'F', elf::ELFCLASS32] => read_as::<elf::FileHeader32<Endianness>, R>(data),
            _ => Err(ElfError::NoHeader),
        }
    }
}

fn read_as<'data, H, R>(data: R) -> Result<Elf, ElfError>
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let header = H::parse(data).map_err(|_| ElfError::NoHeader)?;
    let endian = header.endian().map_err(|_| ElfError::NoHeader)?;
    let programs = header.program_headers(endian, data).map_err(|_| ElfError::ProgramHeaders)?;
    let segments = segments::<H>(endian, programs)?;
    let sections = header.section_headers(endian, data).unwrap_or_default();
    let build_ids = build_ids::<H, R>(endian, data, programs, sections);
    let (symbols, has_go_sections) = symbol_sections::<H, R>(endian, data, header);
    let go_table = go_table::<H, R>(endian, data, header);
    Ok(Elf { segments, is_go: has_go_sections || build_ids.go.is_some(), build_ids, symbols, go_table })
}

/// Words of Go's module data. Source: Go 1.26: src/runtime/symtab.go, `moduledata`.
const MODULE_TEXT: usize = 22;
const MODULE_GOFUNC: usize = 40;
const MODULE_WORDS: usize = 41;

/// Go's table by its section. Go 1.26 has a section for the module's data too, which says where the code begins, that of
/// C in front of it left out; before, the table says it, or it is the whole `.text`.
fn go_table<'data, H, R>(endian: Endianness, data: R, header: &H) -> Option<GoTable>
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let sections = header.sections(endian, data).ok()?;
    let named = |name: &[u8]| sections.section_by_name(endian, name).map(|(_, section)| section);
    let table = named(b".gopclntab").or_else(|| named(b".data.rel.ro.gopclntab"))?;
    let (offset, bytes) = table.file_range(endian)?;
    let range = offset..offset.checked_add(bytes)?;
    let table_addr: u64 = table.sh_addr(endian).into();
    let text = named(b".text").map_or(0, |text| text.sh_addr(endian).into());
    let module =
        named(b".go.module").and_then(|module| module_words(endian, data, module.file_range(endian)?));
    // Relocations may be what fills it.
    let Some(module) = module.filter(|words| words.first() == Some(&table_addr)) else {
        return Some(GoTable { range, text: ElfAddr(text), trees_at: None });
    };
    let text = module.get(MODULE_TEXT).copied().unwrap_or(text);
    let trees_at = module.get(MODULE_GOFUNC).and_then(|gofunc| gofunc.checked_sub(table_addr));
    Some(GoTable { range, text: ElfAddr(text), trees_at: trees_at.filter(|&at| at < bytes) })
}

/// The first words of a section of 64-bit ones.
fn module_words<'data, R: ReadRef<'data>>(
    endian: Endianness,
    data: R,
    range: (u64, u64),
) -> Option<Vec<u64>> {
    let bytes = data.read_bytes_at(range.0, (MODULE_WORDS as u64 * 8).min(range.1)).ok()?;
    let (words, _) = bytes.as_chunks::<8>();
    Some(words.iter().map(|&word| endian.read_u64_bytes(word)).collect())
}

fn segments<H: FileHeader<Endian = Endianness>>(
    endian: Endianness,
    programs: &[H::ProgramHeader],
) -> Result<Segments, ElfError> {
    let loads: Box<[Segment]> = programs
        .iter()
        .filter(|program| program.p_type(endian) == elf::PT_LOAD)
        .take(SEGMENTS_MAX)
        .map(|program| Segment {
            file_offset: program.p_offset(endian).into(),
            file_bytes: program.p_filesz(endian).into(),
            elf_addr: program.p_vaddr(endian).into(),
            executable: program.p_flags(endian) & elf::PF_X != 0,
        })
        .collect();
    if loads.is_empty() { Err(ElfError::NoLoadSegment) } else { Ok(Segments(loads)) }
}

/// Sizes by section, and whether a section only Go's linker writes is there.
fn symbol_sections<'data, H, R>(endian: Endianness, data: R, header: &H) -> (SymbolSections, bool)
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let mut sizes = SymbolSections::default();
    let mut is_go = false;
    let Ok(table) = header.sections(endian, data) else { return (sizes, is_go) };
    for section in table.iter() {
        let name = table.section_name(endian, section).unwrap_or_default();
        let on_file: u64 = section.file_range(endian).map_or(0, |(_, bytes)| bytes);
        match section.sh_type(endian) {
            elf::SHT_SYMTAB | elf::SHT_DYNSYM | elf::SHT_STRTAB => {
                sizes.symbol_bytes = sizes.symbol_bytes.saturating_add(on_file);
                sizes.tables.extend(symbol_table::<H, R>(endian, &table, section));
            }
            _ if name.starts_with(b".debug_") || name.starts_with(b".zdebug_") => {
                sizes.add_debug::<H, R>(endian, data, section, name, on_file);
            }
            _ => {}
        }
        match name {
            b".debug_info" | b".zdebug_info" => sizes.has_debug_info |= on_file > 0,
            b".gnu_debuglink" | b".gnu_debugaltlink" | b".debug_sup" => sizes.names_other_file = true,
            _ => {}
        }
        if name == b".gnu_debuglink" {
            sizes.debug_link = debug_link::<H, R>(endian, data, section);
        }
        if name == b".gnu_debugdata" {
            let range =
                section.file_range(endian).and_then(|(start, bytes)| Some(start..start.checked_add(bytes)?));
            sizes.mini = range.filter(|range| !range.is_empty());
        }
        match name {
            b".gopclntab" | b".go.buildinfo" => is_go = true,
            _ => {}
        }
    }
    (sizes, is_go)
}

fn symbol_table<'data, H, R>(
    endian: Endianness,
    sections: &SectionTable<'data, H, R>,
    section: &H::SectionHeader,
) -> Option<SymbolTable>
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let kind = section.sh_type(endian);
    let is_table = kind == elf::SHT_SYMTAB || kind == elf::SHT_DYNSYM;
    if !is_table || size_of::<H::Sym>() != size_of::<elf::Sym64<Endianness>>() || endian != Endianness::Little
    {
        return None;
    }
    let range = |section: &H::SectionHeader| {
        let (start, bytes) = section.file_range(endian)?;
        Some(start..start.checked_add(bytes)?)
    };
    let strings = sections.section(section.link(endian)).ok()?;
    Some(SymbolTable {
        symbols: range(section)?,
        strings: range(strings)?,
        is_dynamic: kind == elf::SHT_DYNSYM,
    })
}

/// Source: GDB manual, "Debugging Information in Separate Files": a name, a zero byte, padding, a CRC.
fn debug_link<'data, H, R>(endian: Endianness, data: R, section: &H::SectionHeader) -> Option<Box<str>>
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
{
    let (start, bytes) = section.file_range(endian)?;
    let bytes = data.read_bytes_at(start, bytes.min(DEBUG_LINK_BYTES_MAX)).ok()?;
    let name = bytes.split(|&byte| byte == 0).next()?;
    str::from_utf8(name).ok().filter(|name| !name.is_empty()).map(Into::into)
}

impl SymbolSections {
    fn add_debug<'data, H, R>(
        &mut self,
        endian: Endianness,
        data: R,
        section: &H::SectionHeader,
        name: &[u8],
        on_file: u64,
    ) where
        H: FileHeader<Endian = Endianness>,
        R: ReadRef<'data>,
    {
        let compressed = match section.compression(endian, data) {
            Ok(Some((header, offset, bytes))) => Some(CompressedSection {
                file_range: offset..offset.saturating_add(bytes),
                format: header.ch_type(endian),
                inflated_bytes: header.ch_size(endian).into(),
            }),
            Ok(None) => None,
            Err(_) => Some(CompressedSection { file_range: 0..0, format: 0, inflated_bytes: u64::MAX }),
        };
        let inflated = compressed.as_ref().map_or(0, |section| section.inflated_bytes);
        self.inflated_bytes = self.inflated_bytes.saturating_add(inflated);
        self.debug_bytes =
            self.debug_bytes.saturating_add(if compressed.is_some() { inflated } else { on_file });
        self.compressed.extend(compressed.clone());
        let start = section.file_range(endian).map_or(0, |(start, _)| start);
        let plain = SectionBytes::Plain(start..start.saturating_add(on_file));
        let bytes = compressed.map_or(plain, SectionBytes::Compressed);
        match name {
            b".debug_info" => self.info.push(bytes),
            b".debug_abbrev" => self.abbreviations.push(bytes),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn own() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    /// Bytes up to the end of the program headers of a 64-bit file.
    fn headers_end(bytes: &[u8]) -> usize {
        let header = elf::FileHeader64::<Endianness>::parse(bytes).unwrap();
        let endian = header.endian().unwrap();
        header.e_phoff(endian) as usize + usize::from(header.e_phnum(endian)) * 56
    }

    fn segment(file_offset: u64, file_bytes: u64, elf_addr: u64, executable: bool) -> Segment {
        Segment { file_offset, file_bytes, elf_addr, executable }
    }

    #[track_caller]
    fn check(segments: &[Segment], offset: u64, expect: Option<u64>) {
        check_with(4 << 10, segments, offset, expect);
    }

    #[track_caller]
    fn check_with(page_bytes: u64, segments: &[Segment], offset: u64, expect: Option<u64>) {
        let found = Segments(segments.into()).elf_addr_with(FileOffset(offset), page_bytes);
        assert_eq!(found, expect.map(ElfAddr), "offset {offset:#x}");
    }

    #[test]
    fn file_offsets_become_addresses_by_the_segment_that_maps_them() {
        // As lld lays out: every segment one page further from its offset than the one before.
        let lld = [segment(0, 0x5c8, 0x20_0000, false), segment(0x5d0, 0x100, 0x20_15d0, true)];
        check(&lld, 0x5d0, Some(0x20_15d0));
        check(&lld, 0x6cf, Some(0x20_16cf));
        // The page is mapped as code from its start: the mapping's own offset has an address too.
        check(&lld, 0, Some(0x20_1000));
        check(&lld, 0x1000, None);
        check(&[segment(0x1000, 0x10, 0x1000, true)], 0xfff, None);
        check(&[segment(0, 0x10, 0x4000, false)], 0x8, Some(0x4008));
        check(&[segment(u64::MAX, u64::MAX, u64::MAX, true)], 0, None);
    }

    #[test]
    fn larger_pages_map_more_around_a_segment() {
        // As linkers for aarch64 lay out, whose pages may have 64 KiB.
        let code = [segment(0x1_5000, 0x100, 0x41_5000, true)];
        check(&code, 0x1_0000, None);
        check_with(64 << 10, &code, 0x1_0000, Some(0x41_0000));
        check_with(64 << 10, &code, 0x1_ffff, Some(0x41_ffff));
        check_with(64 << 10, &code, 0x2_0000, None);
    }

    #[test]
    fn a_file_cut_at_every_byte_of_its_headers_is_an_error_and_no_panic() {
        let bytes = own();
        let end = headers_end(&bytes);
        for cut in 0..end {
            assert!(Elf::read(&bytes[..cut]).is_err(), "cut at {cut} of {end}");
        }
        let whole = Elf::read(&bytes[..end]).unwrap();
        assert_eq!(whole.build_ids, BuildIds::default());
        assert_eq!(whole.symbols, SymbolSections::default());
    }

    #[test]
    fn the_test_binary_says_what_it_holds() {
        let elf = Elf::read(own().as_slice()).unwrap();
        assert!(!elf.is_go);
        assert!(elf.symbols.has_debug_info, "{:?}", elf.symbols);
        assert!(elf.symbols.symbol_bytes > 0 && elf.symbols.inflated_bytes == 0, "{:?}", elf.symbols);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let _ = Elf::read(bytes.as_slice());
        }

        #[test]
        fn no_flipped_header_byte_makes_the_reader_panic(
            at in 0..4096usize, with in any::<u8>(), more_at in 0..64usize, more in any::<u8>()
        ) {
            let mut bytes = std::fs::read("/proc/self/exe").unwrap();
            bytes.truncate(1 << 20);
            for (at, with) in [(at, with), (more_at, more)] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = with;
                }
            }
            if let Ok(elf) = Elf::read(bytes.as_slice()) {
                let _ = elf.segments.elf_addr(FileOffset(u64::from(with) << 56));
            }
        }
    }
}
