//! Functions by the symbol tables of a file, which are read from its start to its end for each batch of addresses.
//!
//! Nothing is kept and nothing mapped: an index of a compiler's library, with 250,000 symbols, takes 2 MB and 30 ms to
//! make, reading the symbols takes 4 ms.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use object::elf::{SHN_UNDEF, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE};

use crate::executable::SymbolTable;

/// An entry of a 64-bit symbol table. Source: elf(5), `Elf64_Sym`.
const ENTRY_BYTES: usize = 24;

/// Entries read at once.
const CHUNK_ENTRIES: usize = 2048;

/// A name is cut here. Nearly all end within the first read.
const NAME_BYTES_MAX: usize = 16 << 10;
const NAME_BYTES: usize = 256;

/// A function at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Symbol {
    /// As the linker has it.
    pub(super) name: String,
}

/// One answer per address.
///
/// A symbol covers its bytes. Of several, the one that begins last counts, and of those the largest. One without a size
/// covers what is before the next symbol, in the dynamic table, which lacks most functions, only its first byte.
///
/// # Errors
/// The file cannot be read, or is shorter than it was.
pub(super) fn find(file: &File, tables: &[SymbolTable], addrs: &[u64]) -> io::Result<Vec<Option<Symbol>>> {
    let mut found = vec![None; addrs.len()];
    let (dynamic, own): (Vec<_>, Vec<_>) = tables.iter().partition(|table| table.is_dynamic);
    for table in own.into_iter().chain(dynamic) {
        let mut wanted =
            Wanted::new(addrs.iter().zip(&found).map(|(&addr, found)| found.is_none().then_some(addr)));
        if wanted.addrs.is_empty() {
            break;
        }
        each_function(file, table, |function| wanted.see(function, table.is_dynamic))?;
        for (index, name_at) in wanted.finish() {
            found[index] = name(file, table, name_at)?.map(|name| Symbol { name });
        }
    }
    Ok(found)
}

/// A function of the table.
#[derive(Clone, Copy, Debug)]
struct Function {
    start: u64,
    bytes: u64,
    /// In the table of strings.
    name_at: u32,
}

impl Function {
    /// Whether this one rather than another counts, where both cover an address.
    fn is_nearer(&self, other: &Option<Self>) -> bool {
        other.is_none_or(|other| (self.start, self.bytes) > (other.start, other.bytes))
    }
}

/// The addresses that are looked for, and what is known by now.
struct Wanted {
    /// Sorted, with their positions in what was asked.
    addrs: Vec<(u64, usize)>,
    /// Of each address, the nearest function that covers it by its size.
    sized: Vec<Option<Function>>,
    /// The nearest function without a size in front of each address but not of the one before it.
    unsized_behind: Vec<Option<Function>>,
    /// The start of the last symbol there.
    starts: Vec<u64>,
}

impl Wanted {
    fn new(addrs: impl Iterator<Item = Option<u64>>) -> Self {
        let mut addrs: Vec<_> = addrs.enumerate().filter_map(|(at, addr)| Some((addr?, at))).collect();
        addrs.sort_unstable();
        let len = addrs.len();
        Self { addrs, sized: vec![None; len], unsized_behind: vec![None; len], starts: vec![0; len] }
    }

    fn see(&mut self, function: Function, is_dynamic: bool) {
        let first = self.addrs.partition_point(|&(addr, _)| addr < function.start);
        if first == self.addrs.len() {
            return;
        }
        self.starts[first] = self.starts[first].max(function.start);
        let bytes = if function.bytes == 0 && is_dynamic { 1 } else { function.bytes };
        if bytes == 0 {
            if function.is_nearer(&self.unsized_behind[first]) {
                self.unsized_behind[first] = Some(function);
            }
            return;
        }
        let covered =
            self.addrs[first..].iter().take_while(|(addr, _)| addr - function.start < bytes).count();
        for sized in &mut self.sized[first..first + covered] {
            if function.is_nearer(sized) {
                *sized = Some(function);
            }
        }
    }

    /// Position of each address that was found, and where its name is.
    fn finish(self) -> Vec<(usize, u32)> {
        let Self { addrs, sized, unsized_behind, starts } = self;
        let (mut found, mut last_unsized, mut last_start) = (Vec::new(), None::<Function>, 0);
        for ((((_, index), sized), behind), start) in
            addrs.into_iter().zip(sized).zip(unsized_behind).zip(starts)
        {
            last_start = last_start.max(start);
            last_unsized = behind.filter(|function| function.is_nearer(&last_unsized)).or(last_unsized);
            // Up to the next symbol, whatever that is.
            let to_the_next = last_unsized.filter(|function| function.start == last_start);
            let nearest = to_the_next.filter(|function| function.is_nearer(&sized)).or(sized);
            found.extend(nearest.map(|function| (index, function.name_at)));
        }
        found
    }
}

/// Shows every function that is defined, and labels, which assembly has in the place of functions.
fn each_function(file: &File, table: &SymbolTable, mut see: impl FnMut(Function)) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_ENTRIES * ENTRY_BYTES];
    let mut at = table.symbols.start;
    while let Some(left) = table.symbols.end.checked_sub(at).filter(|&left| left >= ENTRY_BYTES as u64) {
        let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len()) / ENTRY_BYTES * ENTRY_BYTES;
        let chunk = buffer.get_mut(..bytes).unwrap_or_default();
        file.read_exact_at(chunk, at)?;
        at += bytes as u64;
        let (entries, _) = chunk.as_chunks::<ENTRY_BYTES>();
        entries.iter().filter_map(function).for_each(&mut see);
    }
    Ok(())
}

fn function(entry: &[u8; ENTRY_BYTES]) -> Option<Function> {
    let [n0, n1, n2, n3, info, _other, s0, s1, rest @ ..] = *entry;
    let [start, bytes] =
        [rest.first_chunk(), rest.last_chunk()].map(|word| word.copied().map(u64::from_le_bytes));
    let is_code = matches!(info & 15, STT_FUNC | STT_GNU_IFUNC | STT_NOTYPE);
    let is_defined = u16::from_le_bytes([s0, s1]) != SHN_UNDEF;
    let function = Function { start: start?, bytes: bytes?, name_at: u32::from_le_bytes([n0, n1, n2, n3]) };
    (is_code && is_defined && function.start > 0 && function.name_at > 0).then_some(function)
}

/// `None` for one that is no text or lies outside of its table.
fn name(file: &File, table: &SymbolTable, name_at: u32) -> io::Result<Option<String>> {
    let start = table.strings.start.saturating_add(name_at.into());
    let left = usize::try_from(table.strings.end.saturating_sub(start)).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    for bytes_max in [NAME_BYTES, NAME_BYTES_MAX] {
        bytes.resize(bytes_max.min(left), 0);
        file.read_exact_at(&mut bytes, start)?;
        if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
            bytes.truncate(end);
            break;
        }
    }
    Ok(String::from_utf8(bytes).ok().filter(|name| !name.is_empty()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Name, start, size and type.
    type Entry = (&'static str, u64, u64, u8);

    /// Tables in a file, `.symtab` first.
    fn tables(entries: [&[Entry]; 2]) -> (File, Vec<SymbolTable>) {
        let (mut bytes, mut tables) = (Vec::new(), Vec::new());
        for (entries, is_dynamic) in entries.into_iter().zip([false, true]) {
            let (mut strings, start) = (vec![0], bytes.len() as u64);
            for &(name, value, size, kind) in entries {
                bytes.extend((strings.len() as u32).to_le_bytes());
                bytes.extend([kind, 0, 1, 0]);
                bytes.extend(value.to_le_bytes());
                bytes.extend(size.to_le_bytes());
                strings.extend(name.bytes().chain([0]));
            }
            let end = bytes.len() as u64;
            bytes.extend(strings);
            tables.push(SymbolTable { symbols: start..end, strings: end..bytes.len() as u64, is_dynamic });
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, tables)
    }

    #[track_caller]
    fn check(own: &[Entry], dynamic: &[Entry], expect: &[(u64, Option<&str>)]) {
        let (file, tables) = tables([own, dynamic]);
        let addrs: Vec<u64> = expect.iter().map(|&(addr, _)| addr).collect();
        let found = find(&file, &tables, &addrs).unwrap();
        let found: Vec<_> =
            found.iter().map(|found| found.as_ref().map(|symbol| symbol.name.as_str())).collect();
        let expect: Vec<_> = expect.iter().map(|&(_, name)| name).collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn a_function_covers_its_bytes_and_one_in_it_comes_first() {
        let own = [
            ("outer", 0x100, 0x100, STT_FUNC),
            ("inner", 0x140, 0x10, STT_FUNC),
            ("alias", 0x140, 0x8, STT_FUNC),
            ("data", 0x148, 8, 1),
        ];
        let expect = [
            (0x1ff, Some("outer")),
            (0x100, Some("outer")),
            (0x144, Some("inner")),
            (0x150, Some("outer")),
            (0xff, None),
            (0x200, None),
        ];
        check(&own, &[], &expect);
    }

    #[test]
    fn what_has_no_size_reaches_to_the_next_symbol() {
        let own = [("label", 0x100, 0, STT_NOTYPE), ("sized", 0x180, 0x10, STT_FUNC)];
        let expect = [(0x100, Some("label")), (0x17f, Some("label")), (0x188, Some("sized")), (0x190, None)];
        check(&own, &[], &expect);
        let own = [("around", 0x100, 0x100, STT_FUNC), ("label", 0x180, 0, STT_NOTYPE)];
        check(&own, &[], &[(0x17f, Some("around")), (0x180, Some("label")), (0x1ff, Some("label"))]);
    }

    #[test]
    fn the_dynamic_table_is_asked_for_what_the_other_does_not_have() {
        let own = [("static", 0x100, 0x10, STT_FUNC)];
        let dynamic = [
            ("exported", 0x100, 0x10, STT_FUNC),
            ("more", 0x200, 0x10, STT_GNU_IFUNC),
            ("point", 0x300, 0, STT_FUNC),
        ];
        let expect = [(0x108, Some("static")), (0x208, Some("more")), (0x300, Some("point")), (0x301, None)];
        check(&own, &dynamic, &expect);
    }

    #[test]
    fn names_are_found_behind_many_symbols_and_long_ones_are_cut() {
        let long: &'static str = "x".repeat(2 * NAME_BYTES_MAX).leak();
        let mut own: Vec<Entry> = (1..10_000).map(|at| ("some", at * 16, 16, STT_FUNC)).collect();
        own.push(("last", 160_000, 16, STT_FUNC));
        own.push((long, 160_016, 16, STT_FUNC));
        check(
            &own,
            &[],
            &[(160_015, Some("last")), (17, Some("some")), (160_016, Some(&long[..NAME_BYTES_MAX]))],
        );
    }

    #[test]
    fn a_file_that_is_shorter_than_its_tables_is_an_error() {
        let (file, tables) = tables([&[("f", 16, 16, STT_FUNC)], &[]]);
        file.set_len(20).unwrap();
        let error = find(&file, &tables, &[20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
