//! The few parts of an ELF file that unwind tables come from.

use std::ops::Range;

use object::LittleEndian;
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, SectionTable, Sym as _};

use profiler_common::unwind::UnwindRule;

use crate::table::{Builder, Source, UnwindTable};
use crate::{UnwindError, eh_frame, go, known_code, limits};

/// Instruction sets with rules of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// AMD64, Intel 64.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

type Header = FileHeader64<LittleEndian>;

/// Makes the unwind table of an executable or a shared library.
///
/// Sources, in this order: `.eh_frame` by its section, `.eh_frame` by PT_GNU_EH_FRAME, `.debug_frame`; code of the Go
/// runtime has frame pointers. Entry points and PLT stubs need no source.
///
/// # Errors
///
/// Files that are no ELF files of a known architecture, have no unwind information, or lie.
pub fn from_elf(bytes: &[u8]) -> Result<UnwindTable, UnwindError> {
    from_elf_in_steps(bytes, &mut || {})
}

/// The same, calling `step` whenever about a megabyte of unwind information was read. What was read before is hardly looked
/// at again: who has mapped the file can give its pages back.
///
/// # Errors
///
/// As [`from_elf`].
pub fn from_elf_in_steps(bytes: &[u8], step: &mut dyn FnMut()) -> Result<UnwindTable, UnwindError> {
    let elf = Elf::parse(bytes)?;
    let is_go = go::is_go(&elf);
    let (gap, known) = match is_go {
        true => (go::gap(elf.architecture), Vec::new()),
        false => (UnwindRule::GAP, known_code::known_code(&elf)),
    };
    let mut builder = Builder::new(elf.architecture, &elf.code, gap, &known);
    let source = eh_frame::collect(&elf, &mut builder, &mut Steps::new(step))?;
    let source = if is_go { Some(Source::Go) } else { source };
    Ok(builder.finish(source.ok_or(UnwindError::NoUnwindInformation)?))
}

/// Counts entries of unwind information until it is time for a step.
pub(crate) struct Steps<'a> {
    step: &'a mut dyn FnMut(),
    entries: u32,
}

impl<'a> Steps<'a> {
    /// Entries take 20 to 100 bytes.
    const ENTRIES: u32 = 16 << 10;

    fn new(step: &'a mut dyn FnMut()) -> Self {
        Self { step, entries: 0 }
    }

    /// One more entry was read.
    pub(crate) fn count(&mut self) {
        self.entries += 1;
        if self.entries == Self::ENTRIES {
            self.entries = 0;
            (self.step)();
        }
    }
}

/// A section's or segment's bytes and where they are loaded.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) address: u64,
    pub(crate) bytes: &'a [u8],
}

pub(crate) struct Elf<'a> {
    pub(crate) architecture: Architecture,
    /// Addresses of executable segments, sorted; at least one.
    pub(crate) code: Vec<Range<u64>>,
    /// Address of the first instruction; 0 in libraries.
    pub(crate) entry: u64,
    bytes: &'a [u8],
    segments: &'a [ProgramHeader64<LittleEndian>],
    sections: SectionTable<'a, Header>,
}

impl<'a> Elf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, UnwindError> {
        let header = Header::parse(bytes).map_err(UnwindError::Headers)?;
        let endian = header.endian().map_err(UnwindError::Headers)?;
        let segments = header.program_headers(endian, bytes).map_err(UnwindError::Headers)?;
        let architecture = match header.e_machine(endian) {
            elf::EM_X86_64 => Architecture::X86_64,
            elf::EM_AARCH64 => Architecture::Aarch64,
            machine => return Err(UnwindError::Machine { machine }),
        };
        // A file may lack its section table, a vDSO's memory may cut it off; segments say enough.
        let sections = header.sections(endian, bytes).unwrap_or_default();
        let entry = header.e_entry(endian);
        Ok(Self { architecture, code: code_ranges(segments)?, entry, bytes, segments, sections })
    }

    pub(crate) fn has_section(&self, name: &str) -> bool {
        self.sections.section_by_name(LittleEndian, name.as_bytes()).is_some()
    }

    /// A section that has bytes in the file, as they are used.
    pub(crate) fn section(&self, name: &str) -> Option<Part<'a>> {
        let (_, section) = self.sections.section_by_name(LittleEndian, name.as_bytes())?;
        if section.sh_flags(LittleEndian) & u64::from(elf::SHF_COMPRESSED) != 0 {
            return None;
        }
        let bytes = section.data(LittleEndian, self.bytes).ok()?;
        (!bytes.is_empty()).then(|| Part { address: section.sh_addr(LittleEndian), bytes })
    }

    /// The first segment of a type.
    pub(crate) fn segment(&self, p_type: u32) -> Option<Part<'a>> {
        let segment = self.segments.iter().find(|segment| segment.p_type(LittleEndian) == p_type)?;
        self.segment_part(segment)
    }

    /// The loaded bytes from an address to the end of its segment.
    pub(crate) fn loaded_from(&self, address: u64) -> Option<Part<'a>> {
        let loads = self.segments.iter().filter(|segment| segment.p_type(LittleEndian) == elf::PT_LOAD);
        loads.filter_map(|segment| self.segment_part(segment)).find_map(|part| {
            let skip = usize::try_from(address.checked_sub(part.address)?).ok()?;
            let bytes = part.bytes.get(skip..)?;
            (!bytes.is_empty()).then_some(Part { address, bytes })
        })
    }

    /// Shows the functions of `.symtab` that have at most so many bytes, of its first `symbols` entries, by name and
    /// addresses.
    pub(crate) fn each_function(
        &self,
        symbols: usize,
        bytes_max: u64,
        mut each: impl FnMut(&[u8], Range<u64>),
    ) {
        let Ok(table) = self.sections.symbols(LittleEndian, self.bytes, elf::SHT_SYMTAB) else { return };
        for symbol in table.iter().take(symbols) {
            let (start, bytes) = (symbol.st_value(LittleEndian), symbol.st_size(LittleEndian));
            if symbol.st_type() == elf::STT_FUNC
                && (1..=bytes_max).contains(&bytes)
                && let (Ok(name), Some(end)) =
                    (symbol.name(LittleEndian, table.strings()), start.checked_add(bytes))
            {
                each(name, start..end);
            }
        }
    }

    fn segment_part(&self, segment: &ProgramHeader64<LittleEndian>) -> Option<Part<'a>> {
        let bytes = segment.data(LittleEndian, self.bytes).ok()?;
        Some(Part { address: segment.p_vaddr(LittleEndian), bytes })
    }
}

fn code_ranges(segments: &[ProgramHeader64<LittleEndian>]) -> Result<Vec<Range<u64>>, UnwindError> {
    let is_code = |segment: &&ProgramHeader64<LittleEndian>| {
        segment.p_type(LittleEndian) == elf::PT_LOAD && segment.p_flags(LittleEndian) & elf::PF_X != 0
    };
    let mut ranges: Vec<Range<u64>> = segments
        .iter()
        .filter(is_code)
        .map(|segment| {
            let start = segment.p_vaddr(LittleEndian);
            start..start.saturating_add(segment.p_memsz(LittleEndian))
        })
        .filter(|range| !range.is_empty())
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let start = ranges.first().ok_or(UnwindError::NoCode)?.start;
    let end = ranges.iter().map(|range| range.end).max().unwrap_or(start);
    let bytes = end - start;
    if bytes > limits::CODE_BYTES_MAX {
        return Err(UnwindError::CodeTooLarge { bytes, max: limits::CODE_BYTES_MAX });
    }
    Ok(ranges)
}
