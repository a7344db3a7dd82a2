//! Functions by the symbol tables of a file, which are read from its start to its end for each batch of addresses.
//!
//! Nothing is mapped, and what is kept are the ranges of addresses that were asked for: an index of a compiler's library,
//! with 250,000 symbols, takes 2 MB and 30 ms to make, reading the symbols takes 4 ms.
//!
//! ```text
//! symbols      |--- outer ------------------|
//!                    |- inner -|
//! ranges     .  |----|---------|------------|  ....   the answer is one and the same within each, also where it is "none"
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use object::elf::{SHN_UNDEF, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE};

use crate::executable::SymbolTable;

/// An entry of a 64-bit symbol table. Source: elf(5), `Elf64_Sym`.
const ENTRY_BYTES: usize = 24;

/// Entries read at once.
const CHUNK_ENTRIES: usize = 2048;

/// A name is cut here. Nearly all end within the first read.
const NAME_BYTES_MAX: usize = 16 << 10;
const NAME_BYTES: usize = 256;

/// Ranges remembered per file.
const RANGES_MAX: usize = 16 << 10;

/// The ranges of a file that were asked for, by their first address: the first address behind, and the linker's name of
/// the function there.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, (u64, Option<Arc<str>>)>);

impl Ranges {
    /// The function at each address; reads the tables when there is one whose range was not asked for yet.
    ///
    /// # Errors
    /// The file cannot be read, or is shorter than it was.
    pub(super) fn find(
        &mut self,
        file: &File,
        tables: &[SymbolTable],
        addrs: &[u64],
    ) -> io::Result<Vec<Option<Arc<str>>>> {
        let known: Vec<_> = addrs.iter().map(|&addr| self.get(addr).cloned()).collect();
        let missing = addrs.iter().zip(&known).filter(|(_, known)| known.is_none());
        let missing: Vec<u64> = missing.map(|(&addr, _)| addr).collect();
        let mut found = Vec::new();
        if !missing.is_empty() {
            found = find(file, tables, &missing)?;
        }
        if self.0.len() + found.len() > RANGES_MAX {
            self.0.clear();
        }
        let mut found = found.into_iter().map(|Found { name, range }| {
            self.0.insert(range.start, (range.end, name.clone()));
            name
        });
        Ok(known.into_iter().map(|known| known.unwrap_or_else(|| found.next().flatten())).collect())
    }

    fn get(&self, addr: u64) -> Option<&Option<Arc<str>>> {
        let (_, (end, name)) = self.0.range(..=addr).next_back()?;
        (addr < *end).then_some(name)
    }
}

/// What is at an address, and at all others of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    /// As the linker has it.
    name: Option<Arc<str>>,
    range: Range<u64>,
}

/// One answer per address.
///
/// A symbol covers its bytes. Of several, the one that begins last counts, and of those the largest. One without a size
/// covers what is before the next symbol, in the dynamic table, which lacks most functions, only its first byte.
fn find(file: &File, tables: &[SymbolTable], addrs: &[u64]) -> io::Result<Vec<Found>> {
    let mut found = vec![Found { name: None, range: 0..u64::MAX }; addrs.len()];
    let (dynamic, own): (Vec<_>, Vec<_>) = tables.iter().partition(|table| table.is_dynamic);
    for table in own.into_iter().chain(dynamic) {
        let asked = addrs.iter().zip(&found).map(|(&addr, found)| found.name.is_none().then_some(addr));
        let mut wanted = Wanted::new(asked);
        if wanted.addrs.is_empty() {
            break;
        }
        each_function(file, table, |function| wanted.see(function, table.is_dynamic))?;
        for Place { index, name_at, range } in wanted.finish() {
            let Found { name: known, range: of_all } = &mut found[index];
            *of_all = of_all.start.max(range.start)..of_all.end.min(range.end);
            *known = name_at.map(|name_at| name(file, table, name_at)).transpose()?.flatten();
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
    /// The last boundary of a symbol there, as for starts.
    below: Vec<u64>,
    /// The first boundary behind each address and not behind the next one.
    above: Vec<u64>,
}

/// What a table says of an address that was looked for.
struct Place {
    index: usize,
    name_at: Option<u32>,
    range: Range<u64>,
}

impl Wanted {
    fn new(addrs: impl Iterator<Item = Option<u64>>) -> Self {
        let mut addrs: Vec<_> = addrs.enumerate().filter_map(|(at, addr)| Some((addr?, at))).collect();
        addrs.sort_unstable();
        let len = addrs.len();
        let (sized, unsized_behind) = (vec![None; len], vec![None; len]);
        let (starts, below, above) = (vec![0; len], vec![0; len], vec![u64::MAX; len]);
        Self { addrs, sized, unsized_behind, starts, below, above }
    }

    fn see(&mut self, function: Function, is_dynamic: bool) {
        let first = self.addrs.partition_point(|&(addr, _)| addr < function.start);
        self.bound(function.start, first);
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
        self.bound(function.start.saturating_add(bytes), first + covered);
        for sized in &mut self.sized[first..first + covered] {
            if function.is_nearer(sized) {
                *sized = Some(function);
            }
        }
    }

    /// A symbol begins or ends here, with so many of the addresses in front of it.
    fn bound(&mut self, at: u64, in_front: usize) {
        if let Some(below) = self.below.get_mut(in_front) {
            *below = at.max(*below);
        }
        if let Some(above) = in_front.checked_sub(1).and_then(|last| self.above.get_mut(last)) {
            *above = at.min(*above);
        }
    }

    fn finish(self) -> Vec<Place> {
        let Self { addrs, sized, unsized_behind, starts, mut below, mut above } = self;
        for at in 1..addrs.len() {
            below[at] = below[at].max(below[at - 1]);
        }
        for at in (1..addrs.len()).rev() {
            above[at - 1] = above[at - 1].min(above[at]);
        }
        let ranges = below.into_iter().zip(above).map(|(below, above)| below..above);
        let (mut places, mut last_unsized, mut last_start) = (Vec::new(), None::<Function>, 0);
        for (((((_, index), sized), behind), start), range) in
            addrs.into_iter().zip(sized).zip(unsized_behind).zip(starts).zip(ranges)
        {
            last_start = last_start.max(start);
            last_unsized = behind.filter(|function| function.is_nearer(&last_unsized)).or(last_unsized);
            // Up to the next symbol, whatever that is.
            let to_the_next = last_unsized.filter(|function| function.start == last_start);
            let nearest = to_the_next.filter(|function| function.is_nearer(&sized)).or(sized);
            places.push(Place { index, name_at: nearest.map(|function| function.name_at), range });
        }
        places
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
fn name(file: &File, table: &SymbolTable, name_at: u32) -> io::Result<Option<Arc<str>>> {
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
    Ok(String::from_utf8(bytes).ok().filter(|name| !name.is_empty()).map(Into::into))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

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
        let names: Vec<_> = found.iter().map(|found| found.name.as_deref()).collect();
        let expect: Vec<_> = expect.iter().map(|&(_, name)| name).collect();
        assert_eq!(names, expect);
        for (Found { name, range }, addr) in found.iter().zip(&addrs) {
            assert!(range.contains(addr), "{addr:x} in {range:x?}");
            for other in [range.start, range.end - 1] {
                assert_eq!(find(&file, &tables, &[other]).unwrap()[0].name, *name, "{other:x} as {addr:x}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_remembered_of_ranges_is_what_the_tables_say(
            symbols in prop::collection::vec((1_u64..60, 0_u64..20, any::<bool>()), 0..12),
            addrs in prop::collection::vec(prop::collection::vec(0_u64..80, 0..6), 0..8),
        ) {
            let name = |at: usize| -> &'static str { ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"][at] };
            let mut of = [Vec::new(), Vec::new()];
            for (at, &(start, bytes, is_dynamic)) in symbols.iter().enumerate() {
                of[usize::from(is_dynamic)].push((name(at), start, bytes, STT_FUNC));
            }
            let (file, tables) = tables([&of[0], &of[1]]);
            let mut ranges = Ranges::default();
            for addrs in addrs {
                let expect = addrs.iter().map(|&addr| find(&file, &tables, &[addr]).unwrap().remove(0).name);
                let expect: Vec<_> = expect.collect();
                prop_assert_eq!(ranges.find(&file, &tables, &addrs).unwrap(), expect, "{:?}", addrs);
            }
        }
    }

    #[test]
    fn a_range_that_is_known_needs_no_tables() {
        let (file, tables) = tables([&[("f", 0x100, 0x10, STT_FUNC)], &[]]);
        let mut ranges = Ranges::default();
        assert_eq!(ranges.find(&file, &tables, &[0x104, 0x50]).unwrap(), [Some("f".into()), None]);
        file.set_len(0).unwrap();
        assert_eq!(ranges.find(&file, &tables, &[0xff, 0x10f]).unwrap(), [None, Some("f".into())]);
        assert!(ranges.find(&file, &tables, &[0x110]).is_err());
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
