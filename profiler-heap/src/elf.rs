//! The allocator in an ELF file: its functions by name, their code, their attach points.

use std::collections::{BTreeMap, HashMap};

use object::{
    LittleEndian, elf,
    read::elf::{
        ElfFile64, FileHeader as _, ProgramHeader as _, Rela as _, SectionHeader as _, Sym as _, SymbolTable,
    },
};
use profiler_common::heap::{Call, POINT_NESTS};

use crate::{
    names::{call_of, is_standard},
    point::{AttachPoint, Refusal, find_point, stub_slot},
};

/// Symbols looked at, of one table.
const SYMBOLS_MAX: usize = 4 << 20;
/// Functions of one allocator. With all operators of C++ and aliases there are about 60.
const FUNCTIONS_MAX: usize = 256;
/// Bytes of a function whose symbol does not say.
const UNSIZED_BYTES: u64 = 4096;

type Header = elf::FileHeader64<LittleEndian>;

/// Why no allocator was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// Not a 64-bit little-endian ELF file of x86-64.
    #[error("not an x86-64 ELF file")]
    Format,
    /// It defines no `malloc`.
    #[error("no function malloc")]
    NoMalloc,
    /// It does, but neither allocating nor freeing functions can be probed as they must.
    #[error("{function}: {refusal}")]
    Refused {
        /// The function without which nothing can be told.
        function: &'static str,
        /// Why it cannot be probed.
        refusal: Refusal,
    },
}

/// A function to probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// A name of it.
    pub name: String,
    /// What it does with its arguments.
    pub call: Call,
    /// Byte in the file of the instruction to probe.
    pub offset: u64,
    /// Registers that hold the arguments there; see `profiler_common::heap::Point::arguments`.
    pub arguments: u16,
    /// `profiler_common::heap::POINT_NESTS`, or 0.
    pub flags: u8,
    /// Whether one of its names is that of the C library or of C++: then it is called only if no object ahead of this one
    /// in the order of symbol look-up defines them.
    pub is_standard: bool,
}

impl Allocator {
    /// Whether it is the one behind the C library's names where no other is ahead of it.
    #[must_use]
    pub fn is_standard(&self) -> bool {
        self.points.iter().any(|function| function.is_standard && function.call == Call::Allocate)
    }
}

/// The functions of an allocator that can be probed, and those that cannot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocator {
    /// By file offset; no two at one.
    pub points: Vec<Function>,
    /// By name.
    pub refused: Vec<(String, Refusal)>,
}

/// Finds the functions of the allocator that an ELF file defines.
///
/// Names are taken from the dynamic symbols; a file that defines no `malloc` there is taken to be static and asked for its
/// symbol table.
///
/// # Errors
/// See [`ScanError`]. `malloc` and `free` must both be probed, or nothing is.
pub fn scan(file: &[u8]) -> Result<Allocator, ScanError> {
    let file = ElfFile64::<LittleEndian>::parse(file).map_err(|_| ScanError::Format)?;
    if file.elf_header().e_machine(LittleEndian) != elf::EM_X86_64 {
        return Err(ScanError::Format);
    }
    let dynamic = functions(&file, file.elf_dynamic_symbol_table());
    let by_address = match has_malloc(&dynamic) {
        true => dynamic,
        false => functions(&file, file.elf_symbol_table()),
    };
    if !has_malloc(&by_address) {
        return Err(ScanError::NoMalloc);
    }
    probe_all(&Code { slots: slots(&file), by_address, file: &file })
}

/// A function and its code.
struct Named<'data> {
    /// The shortest of its names.
    name: &'data str,
    is_malloc: bool,
    is_standard: bool,
    call: Call,
    offset: u64,
    code: &'data [u8],
}

/// Functions of allocators by address: one may have several names.
type ByAddress<'data> = BTreeMap<u64, Named<'data>>;

fn has_malloc(functions: &ByAddress<'_>) -> bool {
    functions.values().any(|function| function.is_malloc)
}

/// What a file says of its allocator.
struct Code<'a, 'data> {
    file: &'a ElfFile64<'data, LittleEndian>,
    by_address: ByAddress<'data>,
    /// Words that the dynamic linker fills with the address of an allocator's function.
    slots: HashMap<u64, Call>,
}

impl Code<'_, '_> {
    /// What the functions do that a probed one calls, itself or through a stub or a word of memory.
    fn callees(&self, point: &AttachPoint) -> impl Iterator<Item = Call> {
        const STUB_BYTES: u64 = 16;
        let direct = point.callees.iter().filter_map(|&callee| {
            if let Some(function) = self.by_address.get(&callee) {
                return Some(function.call);
            }
            let (_, stub) = code(self.file, callee, STUB_BYTES)?;
            self.slots.get(&stub_slot(stub, callee)?).copied()
        });
        direct.chain(point.slots.iter().filter_map(|slot| self.slots.get(slot).copied()))
    }
}

fn slots(file: &ElfFile64<'_, LittleEndian>) -> HashMap<u64, Call> {
    let symbols = file.elf_dynamic_symbol_table();
    let sections = file.elf_section_table();
    let relocations = sections.iter().filter_map(|section| section.rela(LittleEndian, file.data()).ok()?);
    let mut slots = HashMap::new();
    for relocation in relocations.flat_map(|(relocations, _)| relocations).take(SYMBOLS_MAX) {
        let symbol = relocation.symbol(LittleEndian, false);
        let call = symbol
            .and_then(|index| symbols.symbol(index).ok())
            .and_then(|symbol| symbol.name(LittleEndian, symbols.strings()).ok())
            .and_then(|name| call_of(std::str::from_utf8(name).ok()?));
        if let Some(call) = call
            && slots.len() < FUNCTIONS_MAX
        {
            slots.insert(relocation.r_offset(LittleEndian), call);
        }
    }
    slots
}

fn functions<'data>(
    file: &ElfFile64<'data, LittleEndian>,
    symbols: &SymbolTable<'data, Header>,
) -> ByAddress<'data> {
    let mut found = ByAddress::new();
    for symbol in symbols.iter().take(SYMBOLS_MAX) {
        let is_function =
            symbol.st_type() == elf::STT_FUNC && symbol.st_shndx(LittleEndian) != elf::SHN_UNDEF;
        if !is_function || found.len() >= FUNCTIONS_MAX {
            continue;
        }
        let name = symbol.name(LittleEndian, symbols.strings()).ok();
        let Some(name) = name.and_then(|name| std::str::from_utf8(name).ok()) else { continue };
        let Some(call) = call_of(name) else { continue };
        let address = symbol.st_value(LittleEndian);
        if let Some((offset, code)) = code(file, address, symbol.st_size(LittleEndian)) {
            let function = found.entry(address).or_insert(Named {
                name,
                is_malloc: false,
                is_standard: false,
                call,
                offset,
                code,
            });
            function.is_malloc |= name.ends_with("malloc");
            function.is_standard |= is_standard(name);
            if name.len() < function.name.len() {
                function.name = name;
            }
        }
    }
    found
}

/// Where a function lies in the file, and its bytes.
fn code<'data>(file: &ElfFile64<'data, LittleEndian>, address: u64, size: u64) -> Option<(u64, &'data [u8])> {
    let size = if size == 0 { UNSIZED_BYTES } else { size };
    file.elf_program_headers().iter().find_map(|segment| {
        let is_code =
            segment.p_type(LittleEndian) == elf::PT_LOAD && segment.p_flags(LittleEndian) & elf::PF_X != 0;
        let into = address.checked_sub(segment.p_vaddr(LittleEndian))?;
        let rest = segment.p_filesz(LittleEndian).checked_sub(into).filter(|&rest| is_code && rest > 0)?;
        let offset = segment.p_offset(LittleEndian).checked_add(into)?;
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size.min(rest)).ok()?)?;
        Some((offset, file.data().get(start..end)?))
    })
}

fn probe_all(code_of: &Code<'_, '_>) -> Result<Allocator, ScanError> {
    let mut allocator = Allocator::default();
    let mut points: BTreeMap<u64, Function> = BTreeMap::new();
    for (&address, function) in &code_of.by_address {
        let &Named { name, is_malloc: _, is_standard, call, offset, code } = function;
        match find_point(code, address, call) {
            Ok(point) if delegates(&point, call, name, code_of) => {}
            Ok(point) => {
                let function = Function {
                    name: name.to_owned(),
                    call,
                    offset: offset + (point.address - address),
                    arguments: point.arguments,
                    flags: if nests(&point, call, name, code_of) { POINT_NESTS } else { 0 },
                    is_standard,
                };
                points.insert(function.offset, function);
            }
            Err(refusal) => allocator.refused.push((name.to_owned(), refusal)),
        }
    }
    allocator.points = points.into_values().collect();
    allocator.refused.sort();
    for (function, call) in [("malloc", Call::Allocate), ("free", Call::Free)] {
        let refused = allocator
            .refused
            .iter()
            .find(|(name, _)| call_of(name) == Some(call) && name.ends_with(function));
        if let Some(&(_, refusal)) = refused {
            return Err(ScanError::Refused { function, refusal });
        }
    }
    Ok(allocator)
}

/// An operator of C++ that hands on to `malloc` or `free` of the same file: these are probed, which is enough.
fn delegates(point: &AttachPoint, call: Call, name: &str, code: &Code<'_, '_>) -> bool {
    name.starts_with("_Z") && code.callees(point).any(|callee| callee == call)
}

/// Whether a call of the function may go through another probed one, which then must not count.
///
/// Those that give memory back and those with an alignment are always taken to: `realloc(NULL, n)` and small alignments end
/// in `malloc` in most allocators, on ways that need not be direct. They are rare.
fn nests(point: &AttachPoint, call: Call, name: &str, code: &Code<'_, '_>) -> bool {
    match call {
        Call::Free => false,
        Call::Allocate | Call::AllocateArray => {
            name.ends_with("valloc") || code.callees(point).any(|callee| callee != Call::Free)
        }
        Call::Reallocate | Call::ReallocateArray | Call::AllocateAligned | Call::AllocateInto => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert_eq!(scan(b"").expect_err("empty"), ScanError::Format);
        assert_eq!(scan(b"#!/bin/sh\n").expect_err("text"), ScanError::Format);
    }

    #[test]
    fn a_program_without_an_allocator_has_none() {
        let shell = std::fs::read("/bin/sh").expect("every host has a shell");
        assert_eq!(scan(&shell).expect_err("it uses libc's"), ScanError::NoMalloc);
    }

    proptest! {
        #[test]
        fn no_damage_to_a_file_makes_the_scan_panic(
            at in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..20),
        ) {
            let mut file = std::fs::read("/bin/true").expect("every host has it");
            for (index, byte) in at {
                // Headers and tables lie in the first bytes.
                let index = index.index(8192);
                file[index] = byte;
            }
            let _ = scan(&file);
        }
    }
}
