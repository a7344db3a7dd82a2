//! Rows of all functions to one sorted table, and the table to pages.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use profiler_common::unwind::{
    DIRECTORY_LEAVES, Directory, DirectoryLeaves, LEAF_OFFSET_MAX, LEAF_ROWS, Leaf, UNUSED_BASE, UNUSED_LEAF,
    UNUSED_OFFSET, UnwindRule, find_row,
};

use crate::elf::Architecture;
use crate::known_code::KnownCode;
use crate::rule::{self, DisplayRule, Inexpressible};
use crate::{UnwindError, limits};

/// Where the rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `.eh_frame`, by its section.
    EhFrame,
    /// `.eh_frame`, by PT_GNU_EH_FRAME: the section table is stripped.
    EhFrameHdr,
    /// `.debug_frame`.
    DebugFrame,
    /// Frame pointers of Go code, with `.eh_frame` for what C code there is.
    Go,
}

/// What a file held and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frame description entries.
    pub fdes: u64,
    /// FDEs of code that the linker dropped: empty, or outside of the executable segments.
    pub dead_fdes: u64,
    /// FDEs that cannot be read; their code counts as without unwind information.
    pub malformed_fdes: u64,
    /// FDEs with at least one row that has no rule.
    pub inexpressible_fdes: u64,
    /// Rows as the call frame instructions give them.
    pub raw_rows: u64,
    /// Rows without a rule, by [`Inexpressible`].
    pub inexpressible_rows: [u64; Inexpressible::ALL.len()],
    /// Rows of the table.
    pub rows: u64,
}

impl Counts {
    /// Rows without a rule, of all reasons.
    #[must_use]
    pub fn inexpressible_rows_total(&self) -> u64 {
        self.inexpressible_rows.iter().sum()
    }
}

/// The rules of all code of one executable, by address; see [`profiler_common::unwind`] for the shape.
///
/// Rows are sorted and disjoint, and cover everything from the first executable byte to the last.
#[derive(Debug)]
pub struct UnwindTable {
    architecture: Architecture,
    source: Source,
    counts: Counts,
    rules: Vec<UnwindRule>,
    directories: Vec<TableDirectory>,
    leaves: Vec<Leaf>,
}

/// A directory and the code it is for. A mapping that crosses the bounds of directories is to be split at them.
#[derive(Clone, Debug)]
pub struct TableDirectory {
    /// Addresses as the ELF file states them. The bases of the directory are relative to the start.
    pub addresses: Range<u64>,
    /// The directory; its leaves are positions in [`UnwindTable::leaves`].
    pub directory: Box<Directory>,
}

impl UnwindTable {
    /// The architecture of the code.
    #[must_use]
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Where the rows come from.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// What the file held.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// The distinct rules, at most [`limits::RULES_PER_FILE_MAX`]; leaves hold positions in here.
    #[must_use]
    pub fn rules(&self) -> &[UnwindRule] {
        &self.rules
    }

    /// The directories, sorted by address, each beginning where the one before ends.
    #[must_use]
    pub fn directories(&self) -> &[TableDirectory] {
        &self.directories
    }

    /// The leaves of all directories.
    #[must_use]
    pub fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    /// Memory of directories and leaves, in bytes: what the table costs in the kernel.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.directories.len() * size_of::<Directory>() + self.leaves.len() * size_of::<Leaf>()
    }

    /// The rule for an address as the ELF file states it, found as the kernel finds it; `None` outside of the code.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<&UnwindRule> {
        let at = self.directories.partition_point(|directory| directory.addresses.end <= address);
        let TableDirectory { addresses, directory } = self.directories.get(at)?;
        let relative = address.checked_sub(addresses.start)?;
        let table = DirectoryLeaves { directory, leaves: &self.leaves };
        let rule = find_row(&table, relative, rule::offset_shift(self.architecture))?;
        self.rules.get(usize::from(rule))
    }

    /// All rows in order: first address, rule. A row holds up to the next one.
    pub fn rows(&self) -> impl Iterator<Item = (u64, UnwindRule)> {
        let shift = rule::offset_shift(self.architecture);
        self.directories.iter().flat_map(move |TableDirectory { addresses, directory }| {
            let used =
                directory.bases.iter().zip(&directory.leaves).filter(|&(_, &leaf)| leaf != UNUSED_LEAF);
            used.flat_map(move |(&base, &leaf)| {
                let first = addresses.start + u64::from(base);
                self.leaf_rows(leaf).map(move |(offset, rule)| (first + (u64::from(offset) << shift), rule))
            })
        })
    }

    fn leaf_rows(&self, leaf: u32) -> impl Iterator<Item = (u16, UnwindRule)> {
        let leaf = self.leaves.get(leaf as usize).unwrap_or(&Leaf::EMPTY);
        let rows = leaf.offsets.iter().zip(&leaf.rules).filter(|&(&offset, _)| offset != UNUSED_OFFSET);
        rows.map(|(&offset, &id)| {
            (offset, self.rules.get(usize::from(id)).copied().unwrap_or(UnwindRule::INVALID))
        })
    }
}

/// One line a row: address and rule.
impl fmt::Display for UnwindTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (address, rule) in self.rows() {
            writeln!(f, "{address:8x} {}", DisplayRule(self.architecture, rule))?;
        }
        Ok(())
    }
}

/// Bytes after a function that its last row also covers: padding to the next function, and the return address of a call
/// that never returns.
const PADDING_BYTES_MAX: u32 = 15;

/// First address of a row, relative to the first byte of code, and its rule.
#[derive(Clone, Copy)]
struct Row {
    offset: u32,
    rule: u16,
}

/// Makes a table of functions that come in the order of their addresses. It holds the table, and of the rows before it no
/// more than one function's: a compiler's library has a million.
pub(crate) struct Builder {
    architecture: Architecture,
    code: Vec<Range<u64>>,
    origin: u64,
    /// Of the function that is being added.
    rows: Vec<Row>,
    has_functions: bool,
    rules: Interner,
    merged: Merged,
    counts: Counts,
}

impl Builder {
    /// `code` is sorted, not empty, and spans at most [`limits::CODE_BYTES_MAX`]. Code that no function covers has `gap` as
    /// its rule, except for `known` code.
    pub(crate) fn new(
        architecture: Architecture,
        code: &[Range<u64>],
        gap: UnwindRule,
        known: &[KnownCode],
    ) -> Self {
        let origin = code.first().map_or(0, |range| range.start);
        let code_end = code.iter().map(|range| range.end).max().unwrap_or(origin);
        let code_bytes = u32::try_from(code_end - origin).unwrap_or(u32::MAX - 1);
        let mut rules = Interner::new();
        let gap = rules.intern(gap).unwrap_or(Interner::INVALID);
        let pages = Pages::new(origin, rule::offset_shift(architecture));
        let mut builder = Self {
            architecture,
            code: code.to_vec(),
            origin,
            rows: Vec::new(),
            has_functions: false,
            rules,
            merged: Merged::new(code_bytes, gap, pages),
            counts: Counts::default(),
        };
        for KnownCode { addresses, rule } in known {
            if let Some((start, end)) = builder.locate_known(addresses)
                && let Ok(rule) = builder.rules.intern(*rule)
            {
                builder.merged.sink.known.push(Known { start, end, rule });
            }
        }
        builder.merged.sink.sort_known();
        builder
    }

    /// Any function so far is alive.
    pub(crate) fn has_fdes(&self) -> bool {
        self.has_functions
    }

    pub(crate) fn count_fde(&mut self) -> Result<(), UnwindError> {
        self.counts.fdes += 1;
        if self.counts.fdes > limits::FDES_MAX as u64 {
            return Err(UnwindError::TooManyFdes { max: limits::FDES_MAX });
        }
        Ok(())
    }

    pub(crate) fn count_malformed_fde(&mut self) {
        self.counts.malformed_fdes += 1;
    }

    /// Whether a function is in the code that runs; one that is not is counted.
    pub(crate) fn is_alive(&mut self, start: u64, bytes: u64) -> bool {
        let is_alive = self.locate(start, bytes).is_some();
        self.counts.dead_fdes += u64::from(!is_alive);
        is_alive
    }

    /// Begins a function, which does not begin before the one before it; `None` if it is dead.
    pub(crate) fn begin(&mut self, start: u64, bytes: u64) -> Option<FunctionRows<'_>> {
        let (start, end) = self.locate(start, bytes)?;
        let counts_before = self.counts;
        Some(FunctionRows { builder: self, start, end, counts_before, inexpressible: false })
    }

    /// Offsets of known code, up to the end of its segment.
    fn locate_known(&self, addresses: &Range<u64>) -> Option<(u32, u32)> {
        let code = self.code.iter().find(|code| code.contains(&addresses.start))?;
        let end = addresses.end.min(code.end);
        self.locate(addresses.start, end.checked_sub(addresses.start)?)
    }

    /// Offsets of a function that lies in one executable segment. Linkers leave the entries of functions they drop, with
    /// a start of 0 or near it.
    fn locate(&self, start: u64, bytes: u64) -> Option<(u32, u32)> {
        let end = start.checked_add(bytes)?;
        let alive = start != 0 && bytes != 0;
        let at = self.code.partition_point(|code| code.start <= start);
        let inside = self.code.get(at.wrapping_sub(1)).is_some_and(|code| end <= code.end);
        if !alive || !inside {
            return None;
        }
        let offset = |address: u64| u32::try_from(address - self.origin).ok();
        Some((offset(start)?, offset(end)?))
    }

    pub(crate) fn finish(mut self, source: Source) -> UnwindTable {
        let (directories, leaves, rows) = self.merged.finish();
        self.counts.rows = rows;
        UnwindTable {
            architecture: self.architecture,
            source,
            counts: self.counts,
            rules: self.rules.rules,
            directories,
            leaves,
        }
    }
}

/// A function whose rows are being added, in the order of their addresses.
pub(crate) struct FunctionRows<'a> {
    builder: &'a mut Builder,
    start: u32,
    end: u32,
    counts_before: Counts,
    inexpressible: bool,
}

impl FunctionRows<'_> {
    pub(crate) fn architecture(&self) -> Architecture {
        self.builder.architecture
    }

    /// Adds a row; false once its address is outside of the function, where no further row counts.
    pub(crate) fn push(
        &mut self,
        address: u64,
        rule: Result<UnwindRule, Inexpressible>,
    ) -> Result<bool, UnwindError> {
        let builder = &mut *self.builder;
        let offset = address.checked_sub(builder.origin).and_then(|offset| u32::try_from(offset).ok());
        let Some(offset) = offset.filter(|offset| (self.start..self.end).contains(offset)) else {
            return Ok(false);
        };
        if builder.counts.raw_rows == limits::ROWS_MAX as u64 {
            return Err(UnwindError::TooManyRows { max: limits::ROWS_MAX });
        }
        builder.counts.raw_rows += 1;
        let rule = match rule.and_then(|rule| builder.rules.intern(rule)) {
            Ok(rule) => rule,
            Err(reason) => {
                builder.counts.inexpressible_rows[reason as usize] += 1;
                self.inexpressible = true;
                Interner::INVALID
            }
        };
        let shift = rule::offset_shift(builder.architecture);
        builder.rows.push(Row { offset: (offset >> shift) << shift, rule });
        Ok(true)
    }

    /// Marks the whole function: its instructions are wrong, so that none of its rows can be believed.
    pub(crate) fn invalidate(&mut self) {
        let builder = &mut *self.builder;
        builder.rows.clear();
        builder.counts = self.counts_before;
        builder.rows.push(Row { offset: self.start, rule: Interner::INVALID });
        builder.counts.raw_rows += 1;
        builder.counts.inexpressible_rows[Inexpressible::Instructions as usize] += 1;
        self.inexpressible = true;
    }
}

/// Ends the function.
impl Drop for FunctionRows<'_> {
    fn drop(&mut self) {
        let Builder { architecture, rows, merged, counts, has_functions, .. } = &mut *self.builder;
        counts.inexpressible_fdes += u64::from(self.inexpressible);
        *has_functions = true;
        merged.add(self.start, self.end, rule::offset_shift(*architecture), rows);
        rows.clear();
    }
}

/// Rules by number, in the order they were met.
struct Interner {
    ids: HashMap<UnwindRule, u16>,
    rules: Vec<UnwindRule>,
    /// The two met last: nearly every row is like one of them.
    recent: [(UnwindRule, u16); 2],
}

impl Interner {
    const INVALID: u16 = 0;

    fn new() -> Self {
        let invalid = (UnwindRule::INVALID, Self::INVALID);
        Self { ids: HashMap::from([invalid]), rules: vec![UnwindRule::INVALID], recent: [invalid; 2] }
    }

    fn intern(&mut self, rule: UnwindRule) -> Result<u16, Inexpressible> {
        if let Some(&(_, id)) = self.recent.iter().find(|(recent, _)| *recent == rule) {
            return Ok(id);
        }
        let id = match self.ids.get(&rule) {
            Some(&id) => id,
            None => self.add(rule)?,
        };
        self.recent = [(rule, id), self.recent[0]];
        Ok(id)
    }

    fn add(&mut self, rule: UnwindRule) -> Result<u16, Inexpressible> {
        if self.rules.len() == limits::RULES_PER_FILE_MAX {
            return Err(Inexpressible::TooManyRules);
        }
        let id = u16::try_from(self.rules.len()).map_err(|_| Inexpressible::TooManyRules)?;
        self.rules.push(rule);
        self.ids.insert(rule, id);
        Ok(id)
    }
}

/// Functions in the order of their starts, as one list of rows. Where functions overlap, the one that begins later wins.
struct Merged {
    /// Relative to the first byte of code, the end of the last function.
    covered: Option<u32>,
    /// Rows that the next function may still replace, and one before them.
    pending: Vec<Row>,
    sink: Sink,
}

impl Merged {
    fn new(code_bytes: u32, gap: u16, pages: Pages) -> Self {
        let sink = Sink {
            gap,
            code_bytes,
            known: Vec::new(),
            next_known: 0,
            last: None,
            rule: None,
            rows: 0,
            pages,
        };
        Self { covered: None, pending: vec![Row { offset: 0, rule: gap }], sink }
    }

    fn add(&mut self, start: u32, end: u32, shift: u32, rows: &[Row]) {
        let gap_start = self.covered.filter(|&covered| start.saturating_sub(covered) > PADDING_BYTES_MAX);
        if let Some(offset) = gap_start {
            self.push(Row { offset, rule: self.sink.gap });
        }
        self.settle((start >> shift) << shift);
        for &row in rows {
            self.push(row);
        }
        self.covered = Some(end);
    }

    /// Adds a row, over those that do not lie before it; not at all if it repeats the rule before it.
    fn push(&mut self, row: Row) {
        while self.pending.last().is_some_and(|last| last.offset >= row.offset) {
            self.pending.pop();
        }
        if self.pending.last().is_none_or(|last| last.rule != row.rule) {
            self.pending.push(row);
        }
    }

    /// Nothing will be pushed in front of this offset.
    fn settle(&mut self, offset: u32) {
        let before = self.pending.partition_point(|row| row.offset < offset);
        // The last one says whether the next repeats it.
        for row in self.pending.drain(..before.saturating_sub(1)) {
            self.sink.put(row);
        }
    }

    /// The pages, and the number of rows in them.
    fn finish(mut self) -> (Vec<TableDirectory>, Vec<Leaf>, u64) {
        let (gap, code_bytes) = (self.sink.gap, self.sink.code_bytes);
        if let Some(offset) = self.covered.filter(|&covered| covered < code_bytes) {
            self.push(Row { offset, rule: gap });
        }
        let Self { pending, mut sink, .. } = self;
        for row in pending {
            sink.put(row);
        }
        sink.finish()
    }
}

/// Code whose rule is known where no function covers it.
struct Known {
    start: u32,
    end: u32,
    rule: u16,
}

/// Takes rows that will not change, fills gaps with what is known, and writes pages.
struct Sink {
    gap: u16,
    code_bytes: u32,
    /// Sorted and disjoint.
    known: Vec<Known>,
    /// The first that may lie in a gap to come.
    next_known: usize,
    last: Option<Row>,
    /// Of the last row in the pages.
    rule: Option<u16>,
    rows: u64,
    pages: Pages,
}

impl Sink {
    /// Where two overlap, the one that begins later wins, of those that begin together the first.
    fn sort_known(&mut self) {
        self.known.sort_by_key(|known| known.start);
        self.known.dedup_by_key(|known| known.start);
        for at in 1..self.known.len() {
            let start = self.known[at].start;
            let before = &mut self.known[at - 1];
            before.end = before.end.min(start);
        }
    }

    fn put(&mut self, row: Row) {
        if let Some(last) = self.last.replace(row) {
            self.settle(last, row.offset);
        }
    }

    fn finish(mut self) -> (Vec<TableDirectory>, Vec<Leaf>, u64) {
        if let Some(last) = self.last.take() {
            self.settle(last, self.code_bytes);
        }
        let (directories, leaves) = self.pages.finish(self.code_bytes);
        (directories, leaves, self.rows)
    }

    /// Writes a row that holds up to `end`, and in its place, where it is a gap, what is known of its code.
    fn settle(&mut self, row: Row, end: u32) {
        if row.rule != self.gap {
            return self.write(row);
        }
        let mut gap_start = row.offset;
        while let Some(&Known { start, end: known_end, rule }) =
            self.known.get(self.next_known).filter(|known| known.start < end)
        {
            self.next_known += 1;
            // What begins in code that has rules fills no gap behind it.
            if start < gap_start {
                continue;
            }
            if gap_start < start {
                self.write(Row { offset: gap_start, rule: self.gap });
            }
            self.write(Row { offset: start, rule });
            gap_start = known_end.min(end);
        }
        if gap_start < end || self.rows == 0 {
            self.write(Row { offset: gap_start, rule: self.gap });
        }
    }

    /// Writes a row unless it repeats the rule before it.
    fn write(&mut self, row: Row) {
        if self.rule.replace(row.rule) != Some(row.rule) {
            self.rows += 1;
            self.pages.push(&row);
        }
    }
}

/// Cuts sorted rows into leaves and directories.
struct Pages {
    origin: u64,
    shift: u32,
    directories: Vec<TableDirectory>,
    leaves: Vec<Leaf>,
    /// Leaves of the last directory.
    directory_leaves: usize,
    /// Rows of the last leaf, and its first address relative to the origin.
    leaf_rows: usize,
    leaf_base: u32,
}

impl Pages {
    fn new(origin: u64, shift: u32) -> Self {
        Self {
            origin,
            shift,
            directories: Vec::new(),
            leaves: Vec::new(),
            // Full, so that the first row opens the first ones.
            directory_leaves: DIRECTORY_LEAVES,
            leaf_rows: LEAF_ROWS,
            leaf_base: 0,
        }
    }

    fn push(&mut self, row: &Row) {
        let mut offset = row.offset.wrapping_sub(self.leaf_base) >> self.shift;
        if self.leaf_rows == LEAF_ROWS || u64::from(offset) > LEAF_OFFSET_MAX {
            self.open_leaf(row.offset);
            offset = 0;
        }
        let at = self.leaf_rows;
        let leaf = self.leaves.last_mut().expect("open_leaf has pushed one");
        leaf.offsets[at] = u16::try_from(offset).expect("not above LEAF_OFFSET_MAX");
        leaf.rules[at] = row.rule;
        self.leaf_rows += 1;
    }

    fn open_leaf(&mut self, offset: u32) {
        let first = self.origin + u64::from(offset);
        if self.directory_leaves == DIRECTORY_LEAVES {
            self.open_directory(first);
        }
        let TableDirectory { addresses, directory } =
            self.directories.last_mut().expect("open_directory has pushed one");
        let base = u32::try_from(first - addresses.start).unwrap_or(UNUSED_BASE);
        directory.bases[self.directory_leaves] = base;
        directory.leaves[self.directory_leaves] =
            u32::try_from(self.leaves.len()).expect("rows are bounded by ROWS_MAX");
        self.directory_leaves += 1;
        self.leaves.push(Leaf::EMPTY);
        self.leaf_rows = 0;
        self.leaf_base = offset;
    }

    fn open_directory(&mut self, first: u64) {
        if let Some(last) = self.directories.last_mut() {
            last.addresses.end = first;
        }
        self.directories
            .push(TableDirectory { addresses: first..first, directory: Box::new(Directory::EMPTY) });
        self.directory_leaves = 0;
    }

    fn finish(mut self, code_bytes: u32) -> (Vec<TableDirectory>, Vec<Leaf>) {
        if let Some(last) = self.directories.last_mut() {
            last.addresses.end = self.origin + u64::from(code_bytes);
        }
        (self.directories, self.leaves)
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    const CODE: Range<u64> = 0x1000..0x40_0000;

    fn rule(cfa_offset: i32) -> UnwindRule {
        UnwindRule { cfa_offset, ..profiler_common::unwind::x86_64::FRAME_POINTER }
    }

    /// Start, end, `(address, CFA offset)` of each row.
    type Function<'a> = (u64, u64, &'a [(u64, i32)]);

    fn builder(known: &[KnownCode]) -> Builder {
        Builder::new(Architecture::X86_64, slice::from_ref(&CODE), UnwindRule::GAP, known)
    }

    fn table(functions: &[Function<'_>]) -> UnwindTable {
        let mut builder = builder(&[]);
        for &(start, end, rows) in functions {
            let Some(mut function) = builder.begin(start, end - start) else { continue };
            for &(address, cfa_offset) in rows {
                function.push(address, Ok(rule(cfa_offset))).unwrap();
            }
        }
        builder.finish(Source::EhFrame)
    }

    /// The rows but the gap that begins the code, as `(address, CFA offset)`, 0 for a gap.
    #[track_caller]
    fn check(functions: &[Function<'_>], expect: &[(u64, i32)]) {
        let table = table(functions);
        let rows: Vec<_> = table.rows().map(|(address, rule)| (address, rule.cfa_offset)).collect();
        assert_eq!(rows.first(), Some(&(CODE.start, 0)));
        assert_eq!(&rows[1..], expect);
    }

    #[test]
    fn padding_belongs_to_the_function_before_it_and_more_is_a_gap() {
        check(
            &[
                (0x2000, 0x2001, &[(0x2000, 8)]),
                (0x2010, 0x2020, &[(0x2010, 16)]),
                (0x2030, 0x2040, &[(0x2030, 24)]),
            ],
            &[(0x2000, 8), (0x2010, 16), (0x2020, 0), (0x2030, 24), (0x2040, 0)],
        );
    }

    #[test]
    fn equal_neighbors_are_one_row() {
        check(
            &[(0x2000, 0x2010, &[(0x2000, 8), (0x2004, 8)]), (0x2010, 0x2020, &[(0x2010, 8)])],
            &[(0x2000, 8), (0x2020, 0)],
        );
    }

    #[test]
    fn the_later_row_of_one_address_wins() {
        check(
            &[(0x2000, 0x2010, &[(0x2000, 8), (0x2004, 16), (0x2004, 24)])],
            &[(0x2000, 8), (0x2004, 24), (0x2010, 0)],
        );
        check(&[(0x2000, 0x2010, &[(0x2000, 8), (0x2004, 16), (0x2004, 8)])], &[(0x2000, 8), (0x2010, 0)]);
    }

    #[test]
    fn of_overlapping_functions_the_later_start_wins() {
        check(
            &[
                (0x2000, 0x2100, &[(0x2000, 8), (0x2030, 16), (0x2080, 24)]),
                (0x2020, 0x2040, &[(0x2020, 32)]),
            ],
            &[(0x2000, 8), (0x2020, 32), (0x2040, 0)],
        );
    }

    #[test]
    fn dropped_functions_are_counted_and_leave_no_rows() {
        let code = 0..0x1000;
        let mut builder = Builder::new(Architecture::X86_64, slice::from_ref(&code), UnwindRule::GAP, &[]);
        for (start, bytes) in [(0, 16), (0x800, 0), (0xff8, 16), (u64::MAX - 4, 16)] {
            assert!(!builder.is_alive(start, bytes), "{start:#x}");
            assert!(builder.begin(start, bytes).is_none(), "{start:#x}");
        }
        assert_eq!(builder.counts.dead_fdes, 4);
        assert!(!builder.has_fdes());
    }

    #[test]
    fn a_function_with_wrong_instructions_is_invalid_as_a_whole() {
        let mut builder = builder(&[]);
        let mut function = builder.begin(0x2000, 0x100).unwrap();
        function.push(0x2000, Ok(rule(8))).unwrap();
        function.push(0x2004, Err(Inexpressible::Offset)).unwrap();
        function.invalidate();
        drop(function);
        let table = builder.finish(Source::EhFrame);
        assert_eq!(table.find(0x20ff), Some(&UnwindRule::INVALID));
        assert_eq!(table.find(0x2100), Some(&UnwindRule::GAP));
        assert_eq!((table.counts.inexpressible_fdes, table.counts.inexpressible_rows_total()), (1, 1));
    }

    #[test]
    fn rules_beyond_the_bound_are_invalid_and_counted() {
        let mut builder = builder(&[]);
        let mut function = builder.begin(0x2000, 0x10_0000).unwrap();
        // Two have their place already: that of the gap, and the invalid one.
        for at in 0..limits::RULES_PER_FILE_MAX as i32 - 1 {
            function.push(0x2000 + at as u64, Ok(rule(at * 8))).unwrap();
        }
        drop(function);
        assert_eq!(builder.counts.inexpressible_rows[Inexpressible::TooManyRules as usize], 1);
    }

    #[test]
    fn known_code_fills_gaps_and_gives_way_to_functions() {
        let known =
            |start: u64, end: u64, cfa_offset| KnownCode { addresses: start..end, rule: rule(cfa_offset) };
        let known = [
            known(0x1000, 0x1008, 24),
            known(0x1008, 0x1010, 24),
            known(0x2080, 0x2180, 32),
            known(0x2100, 0x2140, 40),
            known(0x2180, 0x2280, 48),
            known(0x3f_fff0, 0x40_0010, 56),
        ];
        let mut builder = builder(&known);
        builder.begin(0x2000, 0x100).unwrap().push(0x2000, Ok(rule(8))).unwrap();
        builder.begin(0x2200, 0x100).unwrap().push(0x2200, Ok(rule(16))).unwrap();
        let table = builder.finish(Source::EhFrame);
        let rows: Vec<_> = table.rows().map(|(address, rule)| (address, rule.cfa_offset)).collect();
        let before = [(0x1000, 24), (0x1010, 0), (0x2000, 8), (0x2100, 40), (0x2140, 0)];
        let behind = [(0x2180, 48), (0x2200, 16), (0x2300, 0), (0x3f_fff0, 56)];
        let expect: Vec<_> = before.into_iter().chain(behind).collect();
        assert_eq!(rows, expect, "{rows:x?}");
    }

    #[test]
    fn of_overlapping_known_code_the_later_start_wins() {
        let known =
            |start: u64, end: u64, cfa_offset| KnownCode { addresses: start..end, rule: rule(cfa_offset) };
        let table =
            builder(&[known(0x20ff, 0x2110, 8), known(0x2000, 0x2100, 16), known(0x2000, 0x3000, 24)])
                .finish(Source::EhFrame);
        let rows: Vec<_> = table.rows().map(|(address, rule)| (address, rule.cfa_offset)).collect();
        assert_eq!(rows, [(0x1000, 0), (0x2000, 16), (0x20ff, 8), (0x2110, 0)], "{rows:x?}");
    }

    #[test]
    fn distant_rows_and_many_rows_open_new_leaves() {
        let far: &[(u64, i32)] = &[(0x2000, 8), (0x2000 + 0xfffd, 16), (0x2000 + 0x2_0000, 24)];
        let table = table(&[(0x2000, 0x10_0000, far)]);
        // The last one is for the gap behind the function.
        assert_eq!(table.leaves().len(), 4);
        for (address, expect) in [(0x1000, 0), (0x1fff, 0), (0x2000, 8), (0x11ffc, 8), (0x11ffd, 16)] {
            assert_eq!(table.find(address).unwrap().cfa_offset, expect, "{address:#x}");
        }
        assert_eq!(table.find(0x21fff).unwrap().cfa_offset, 16);
        assert_eq!(table.find(0x22000).unwrap().cfa_offset, 24);
        assert_eq!(table.find(CODE.end - 1), Some(&UnwindRule::GAP));
        assert_eq!((table.find(CODE.end), table.find(CODE.start - 1)), (None, None));
    }

    #[test]
    fn more_leaves_than_a_directory_holds_open_a_new_one() {
        let rows: Vec<(u64, i32)> = (0..(LEAF_ROWS * DIRECTORY_LEAVES + 10) as u64)
            .map(|at| (0x2000 + at * 2, (at as i32 & 1) * 8 + 8))
            .collect();
        let table = table(&[(0x2000, 0x30_0000, &rows)]);
        let [first, second] = table.directories() else {
            panic!("{} directories", table.directories().len())
        };
        assert_eq!(first.addresses.end, second.addresses.start);
        for &(address, expect) in &rows {
            assert_eq!(table.find(address).unwrap().cfa_offset, expect, "{address:#x}");
            assert_eq!(table.find(address + 1).unwrap().cfa_offset, expect, "{address:#x}");
        }
    }
}
