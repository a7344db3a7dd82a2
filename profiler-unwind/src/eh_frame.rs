//! Call frame information: `.eh_frame` and `.debug_frame`.
//!
//! Source: DWARF 5 §6.4; Linux Standard Base Core 5.0 §10.6 for `.eh_frame` and `.eh_frame_hdr`.

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CieOrFde, CommonInformationEntry, DebugFrame, EhFrame, EhFrameHdr, EndianSlice,
    FrameDescriptionEntry, LittleEndian, UnwindContext, UnwindOffset, UnwindSection, Vendor,
};
use object::elf::PT_GNU_EH_FRAME;

use crate::elf::{Architecture, Elf, Part, Steps};
use crate::rule;
use crate::table::{Builder, Source};
use crate::{UnwindError, go, limits};

pub(crate) type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// Address size of the supported files, in bytes.
const ADDRESS_BYTES: u8 = 8;

/// Adds the rows of the first source that has any.
pub(crate) fn collect(
    elf: &Elf<'_>,
    builder: &mut Builder,
    steps: &mut Steps<'_>,
) -> Result<Option<Source>, UnwindError> {
    if let Some(part) = elf.section(".eh_frame") {
        collect_eh_frame(elf, part, BaseAddresses::default(), builder, steps)?;
        if builder.has_fdes() {
            return Ok(Some(Source::EhFrame));
        }
    } else if let Some((part, bases)) = eh_frame_by_header(elf) {
        collect_eh_frame(elf, part, bases, builder, steps)?;
        if builder.has_fdes() {
            return Ok(Some(Source::EhFrameHdr));
        }
    }
    // Go describes its functions in .debug_frame without their saved frame pointers, which the C frames below need.
    if let Some(part) = elf.section(".debug_frame").filter(|_| !go::is_go(elf)) {
        let mut section = DebugFrame::new(part.bytes, LittleEndian);
        section.set_address_size(ADDRESS_BYTES);
        section.set_vendor(vendor(elf.architecture));
        collect_section(&section, ".debug_frame", &BaseAddresses::default(), builder, steps)?;
        if builder.has_fdes() {
            return Ok(Some(Source::DebugFrame));
        }
    }
    Ok(None)
}

/// `.eh_frame` as PT_GNU_EH_FRAME points at it; it ends at its terminator, at the latest with its segment.
fn eh_frame_by_header<'a>(elf: &Elf<'a>) -> Option<(Part<'a>, BaseAddresses)> {
    let header = elf.segment(PT_GNU_EH_FRAME)?;
    let bases = BaseAddresses::default().set_eh_frame_hdr(header.address);
    let parsed = EhFrameHdr::new(header.bytes, LittleEndian).parse(&bases, ADDRESS_BYTES).ok()?;
    let address = parsed.eh_frame_ptr().direct().ok()?;
    Some((elf.loaded_from(address)?, bases))
}

fn collect_eh_frame(
    elf: &Elf<'_>,
    part: Part<'_>,
    bases: BaseAddresses,
    builder: &mut Builder,
    steps: &mut Steps<'_>,
) -> Result<(), UnwindError> {
    let mut bases = bases.set_eh_frame(part.address);
    if let Some(text) = elf.section(".text") {
        bases = bases.set_text(text.address);
    }
    let mut section = EhFrame::new(part.bytes, LittleEndian);
    section.set_address_size(ADDRESS_BYTES);
    section.set_vendor(vendor(elf.architecture));
    collect_section(&section, ".eh_frame", &bases, builder, steps)
}

fn vendor(architecture: Architecture) -> Vendor {
    match architecture {
        Architecture::X86_64 => Vendor::Default,
        Architecture::Aarch64 => Vendor::AArch64,
    }
}

fn collect_section<'a, S>(
    section: &S,
    name: &'static str,
    bases: &BaseAddresses,
    builder: &mut Builder,
    steps: &mut Steps<'_>,
) -> Result<(), UnwindError>
where
    S: UnwindSection<Bytes<'a>>,
    S::Offset: UnwindOffset<usize>,
{
    let mut cies = Cies::default();
    let mut functions = functions(section, name, bases, &mut cies, (builder, steps))?;
    functions.sort_by_key(|function| function.start);
    let mut context = UnwindContext::new();
    for Function { start: _, offset } in functions {
        let offset = S::Offset::from(offset as usize);
        let fde = section.fde_from_offset(bases, offset, |section, bases, offset| {
            cies.get(section, bases, offset, &mut Work::default())
        });
        steps.count();
        // It could be read before.
        if let Ok(fde) = fde {
            collect_fde(section, bases, &mut context, &fde, builder)?;
        }
    }
    Ok(())
}

/// Where a function begins, and its FDE.
struct Function {
    start: u64,
    /// In the section.
    offset: u32,
}

/// The functions that are alive, in the order of their FDEs.
fn functions<'a, S>(
    section: &S,
    name: &'static str,
    bases: &BaseAddresses,
    cies: &mut Cies<'a>,
    (builder, steps): (&mut Builder, &mut Steps<'_>),
) -> Result<Vec<Function>, UnwindError>
where
    S: UnwindSection<Bytes<'a>>,
    S::Offset: UnwindOffset<usize>,
{
    let mut found = Vec::new();
    let mut work = Work::default();
    let mut entries = section.entries(bases);
    loop {
        let entry = entries.next().map_err(|source| UnwindError::Malformed { section: name, source })?;
        let partial = match entry {
            None => return Ok(found),
            Some(CieOrFde::Cie(_)) => continue,
            Some(CieOrFde::Fde(partial)) => partial,
        };
        builder.count_fde()?;
        steps.count();
        let fde = partial.parse(|section, bases, offset| cies.get(section, bases, offset, &mut work));
        work.check()?;
        match fde {
            Ok(fde) => {
                work.spend(fde.entry_len())?;
                work.spend(fde.cie().entry_len())?;
                let (start, bytes) = (fde.initial_address(), fde.len());
                // Beyond 4 GiB nothing is read: no file is that large.
                if let Ok(offset) = u32::try_from(fde.offset())
                    && builder.is_alive(start, bytes)
                {
                    found.push(Function { start, offset });
                }
            }
            Err(_) => builder.count_malformed_fde(),
        }
    }
}

fn collect_fde<'a, S>(
    section: &S,
    bases: &BaseAddresses,
    context: &mut UnwindContext<usize>,
    fde: &FrameDescriptionEntry<Bytes<'a>>,
    builder: &mut Builder,
) -> Result<(), UnwindError>
where
    S: UnwindSection<Bytes<'a>>,
{
    let Some(mut block) = builder.begin(fde.initial_address(), fde.len()) else { return Ok(()) };
    let Ok(mut rows) = fde.rows(section, bases, context) else {
        block.invalidate();
        return Ok(());
    };
    loop {
        match rows.next_row() {
            Ok(Some(row)) => {
                let rule = rule::from_row(block.architecture(), row, section, fde.cie());
                if !block.push(row.start_address(), rule)? {
                    return Ok(());
                }
            }
            Ok(None) => return Ok(()),
            Err(_) => {
                block.invalidate();
                return Ok(());
            }
        }
    }
}

/// CIEs by offset.
#[derive(Default)]
struct Cies<'a> {
    by_offset: HashMap<usize, CommonInformationEntry<Bytes<'a>>>,
}

impl<'a> Cies<'a> {
    fn get<S>(
        &mut self,
        section: &S,
        bases: &BaseAddresses,
        offset: S::Offset,
        work: &mut Work,
    ) -> gimli::Result<CommonInformationEntry<Bytes<'a>>>
    where
        S: UnwindSection<Bytes<'a>>,
        S::Offset: UnwindOffset<usize>,
    {
        let key = UnwindOffset::into(offset);
        if let Some(cie) = self.by_offset.get(&key) {
            return Ok(cie.clone());
        }
        let cie = section.cie_from_offset(bases, offset)?;
        work.left = work.left.saturating_sub(cie.entry_len() as u64);
        if self.by_offset.len() < limits::CIES_MAX {
            self.by_offset.insert(key, cie.clone());
        }
        Ok(cie)
    }
}

/// Bytes of entries that may still be evaluated. Without it, a file of n bytes could cost n² steps: each of many FDEs
/// repeats the instructions of its CIE.
struct Work {
    left: u64,
}

impl Default for Work {
    fn default() -> Self {
        Self { left: limits::WORK_BYTES_MAX }
    }
}

impl Work {
    fn spend(&mut self, bytes: usize) -> Result<(), UnwindError> {
        self.left = self.left.saturating_sub(bytes as u64);
        self.check()
    }

    fn check(&self) -> Result<(), UnwindError> {
        if self.left == 0 {
            return Err(UnwindError::TooMuchWork { max: limits::WORK_BYTES_MAX });
        }
        Ok(())
    }
}
