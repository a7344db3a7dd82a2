//! Go's table of functions, files and lines, which stripping keeps because the runtime needs it.
//!
//! ```text
//! header   magic u32, 0 u16, quantum u8, word size u8, functions, files, [text], names, units, files, pcs, functions
//! functab  per function: entry, offset of its record; sorted; a last entry holds the end          (functions +)
//! record   entry, name, args, deferreturn, pcsp, pcfile, pcln, pcdata count, unit, [start line], ..  (functions +)
//! pcs      runs of (zigzag value delta, pc delta / quantum), varints, up to a value delta of 0           (pcs +)
//! ```
//! Source: Go 1.16 to 1.26: src/runtime/symtab.go, src/internal/abi/symtab.go, src/cmd/link/internal/ld/pcln.go. Go 1.15
//! and earlier have another layout, which is refused. This file stands alone: it is fuzzed as it is.

/// Longest name or path taken, in bytes.
const NAME_BYTES_MAX: usize = 4096;

/// Bytes of one pc-value run: the largest functions of the Go tree take about 60 KiB.
const RUN_BYTES_MAX: usize = 256 << 10;

/// Bytes read of a run at a time.
const RUN_CHUNK: usize = 256;

/// Functions of a table; the largest Go programs have about 500,000.
const FUNCTIONS_MAX: u64 = 1 << 24;

/// Index of the run that says which inlined call an address is of. Source: src/internal/abi/symtab.go.
const PCDATA_INLINE_INDEX: u64 = 2;

/// Index of a function's tree of inlined calls.
const FUNCDATA_INLINE_TREE: u64 = 3;

/// Bytes of an inlined call in that tree: function kind and padding u32, name i32, address of the call i32, first line i32.
/// Source: Go 1.20 and later: src/runtime/symtabinl.go, `inlinedCall`.
const INLINED_CALL_BYTES: u64 = 16;

/// Functions at one address; inlining deeper than this is cut at the outer end.
const FUNCTIONS_AT_ADDR_MAX: usize = 64;

/// Where the bytes of a table come from: at most so many as `buffer` holds, fewer only at the end.
pub(crate) trait ReadAt {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Option<usize>;
}

impl ReadAt for &[u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        let behind = self.get(usize::try_from(offset).ok()?..)?;
        let bytes = behind.len().min(buffer.len());
        buffer.get_mut(..bytes)?.copy_from_slice(behind.get(..bytes)?);
        Some(bytes)
    }
}

/// How entries and records are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Go 1.16 and 1.17: addresses of a word each.
    Absolute,
    /// Go 1.18 and 1.19: 32-bit offsets from the text.
    Relative,
    /// From Go 1.20: the same, and records have the function's first line.
    WithStartLine,
}

/// A table whose header is sound.
#[derive(Debug)]
pub(crate) struct Pclntab<R> {
    bytes: R,
    layout: Layout,
    big_endian: bool,
    word: u64,
    quantum: u64,
    functions: u64,
    /// Address of the first code, as the header has it; 0 when it does not.
    text: u64,
    names_at: u64,
    units_at: u64,
    files_at: u64,
    pcs_at: u64,
    functab_at: u64,
    /// Where the trees of inlined calls are, when that is known.
    trees_at: Option<u64>,
}

/// What the linker says outside of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Module {
    /// Address of the first Go code, for tables that do not say it (from Go 1.26, and position-independent ones).
    pub(crate) text: u64,
    /// `go:func.*`, counted from the start of the table: where functions have their trees of inlined calls.
    pub(crate) trees_at: Option<u64>,
}

/// A function at an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GoFunction {
    pub(crate) name: String,
    /// First address.
    pub(crate) entry: u64,
    /// Empty when unknown, or when the address is of an inlined call whose function is not known.
    pub(crate) file: String,
    /// 0 when `file` is empty.
    pub(crate) line: u32,
    /// Of the `func` keyword; 0 when unknown.
    pub(crate) start_line: u32,
}

struct Record {
    entry: u64,
    name: u64,
    pcfile: u64,
    pcln: u64,
    unit: u64,
    start_line: u32,
    /// The run of inline indices; `None` when nothing is inlined.
    inlined: Option<u64>,
    /// Where the tree of inlined calls is.
    tree: Option<u64>,
}

impl<R: ReadAt> Pclntab<R> {
    /// Reads the header. `None` when this is no table of a known layout.
    pub(crate) fn new(bytes: R, module: Module) -> Option<Self> {
        let mut header = [0; 8];
        read_exact(&bytes, 0, &mut header)?;
        let [a, b, c, d, 0, 0, quantum, word] = header else { return None };
        let magic = |bytes| match bytes {
            0xffff_fffa_u32 => Some(Layout::Absolute),
            0xffff_fff0 => Some(Layout::Relative),
            0xffff_fff1 => Some(Layout::WithStartLine),
            _ => None,
        };
        let little = magic(u32::from_le_bytes([a, b, c, d])).map(|layout| (layout, false));
        let (layout, big_endian) =
            little.or_else(|| magic(u32::from_be_bytes([a, b, c, d])).map(|layout| (layout, true)))?;
        if !matches!(quantum, 1 | 2 | 4) || !matches!(word, 4 | 8) {
            return None;
        }
        let mut table = Self {
            bytes,
            layout,
            big_endian,
            word: word.into(),
            quantum: quantum.into(),
            functions: 0,
            text: module.text,
            names_at: 0,
            units_at: 0,
            files_at: 0,
            pcs_at: 0,
            functab_at: 0,
            trees_at: module.trees_at.filter(|_| layout == Layout::WithStartLine),
        };
        table.read_offsets()?;
        Some(table)
    }

    fn read_offsets(&mut self) -> Option<()> {
        let field = |table: &Self, index: u64| table.uint(8 + index * table.word, table.word);
        let has_text = self.layout != Layout::Absolute;
        let first = if has_text { 3 } else { 2 };
        self.functions = field(self, 0).filter(|&functions| functions <= FUNCTIONS_MAX)?;
        if has_text {
            let text = field(self, 2)?;
            self.text = if text == 0 { self.text } else { text };
        } else {
            self.text = 0;
        }
        self.names_at = field(self, first)?;
        self.units_at = field(self, first + 1)?;
        self.files_at = field(self, first + 2)?;
        self.pcs_at = field(self, first + 3)?;
        self.functab_at = field(self, first + 4)?;
        Some(())
    }

    /// The functions at an address, innermost first, with their files and lines there; none where no function is.
    ///
    /// At most `log2(functions)` + 10 reads, and for each function the parts of three runs that lead to the address.
    pub(crate) fn find(&self, addr: u64) -> Vec<GoFunction> {
        let Some(record) = self.index_of(addr).and_then(|index| self.record(index)) else {
            return Vec::new();
        };
        let mut functions = Vec::new();
        let mut at = addr;
        while let Some(index) = self.inlined_call(&record, at) {
            let call =
                (functions.len() + 1 < FUNCTIONS_AT_ADDR_MAX).then(|| self.inlined(&record, index, at));
            let Some((inlined, called_from)) = call.flatten() else {
                // What is inlined there is not known, so nor is the function's own line.
                functions.extend(self.function(&record, None));
                return functions;
            };
            functions.push(inlined);
            at = called_from;
        }
        functions.extend(self.function(&record, Some(at)));
        functions
    }

    /// Which inlined call an address is of.
    fn inlined_call(&self, record: &Record, addr: u64) -> Option<u64> {
        let index = self.value(record.inlined?, record.entry, addr)?;
        u64::try_from(index).ok()
    }

    /// An inlined function, and the address that it was called from.
    fn inlined(&self, record: &Record, index: u64, addr: u64) -> Option<(GoFunction, u64)> {
        let call_at = record.tree?.checked_add(index.checked_mul(INLINED_CALL_BYTES)?)?;
        let name = self.uint(call_at.checked_add(4)?, 4)?;
        let parent = self.uint(call_at.checked_add(8)?, 4)?;
        let start_line = u32::try_from(self.uint(call_at.checked_add(12)?, 4)?).ok()?;
        let name = self.text_at(self.names_at.checked_add(name)?)?;
        let (file, line) = self.place(record, addr).unwrap_or_default();
        let function = GoFunction { name, entry: record.entry, file, line, start_line };
        Some((function, record.entry.checked_add(parent)?))
    }

    /// The function whose code it is, and where in it an address is.
    fn function(&self, record: &Record, addr: Option<u64>) -> Option<GoFunction> {
        let name = self.text_at(self.names_at.checked_add(record.name)?)?;
        let (file, line) = addr.and_then(|addr| self.place(record, addr)).unwrap_or_default();
        Some(GoFunction { name, entry: record.entry, file, line, start_line: record.start_line })
    }

    fn place(&self, record: &Record, addr: u64) -> Option<(String, u32)> {
        let file = u64::try_from(self.value(record.pcfile, record.entry, addr)?).ok()?;
        let line = u32::try_from(self.value(record.pcln, record.entry, addr)?).ok()?;
        let unit = record.unit.checked_add(file)?;
        let file_at = self.uint(self.units_at.checked_add(unit.checked_mul(4)?)?, 4)?;
        if file_at == u64::from(u32::MAX) {
            return None;
        }
        Some((self.text_at(self.files_at.checked_add(file_at)?)?, line))
    }

    /// The last function that begins at or before an address, unless that is behind the last one's end.
    fn index_of(&self, addr: u64) -> Option<u64> {
        let (mut low, mut high) = (0, self.functions);
        while low < high {
            let middle = low.midpoint(high);
            if self.entry(middle)? <= addr { low = middle + 1 } else { high = middle }
        }
        let index = low.checked_sub(1)?;
        (addr < self.entry(index + 1)?).then_some(index)
    }

    /// Bytes of one field of the table of functions.
    fn field_bytes(&self) -> u64 {
        if self.layout == Layout::Absolute { self.word } else { 4 }
    }

    fn entry(&self, index: u64) -> Option<u64> {
        let at = self.functab_at.checked_add(index.checked_mul(2 * self.field_bytes())?)?;
        self.uint(at, self.field_bytes())?.checked_add(self.text)
    }

    fn record(&self, index: u64) -> Option<Record> {
        let field = self.field_bytes();
        let offset_at = self.functab_at.checked_add(index * 2 * field + field)?;
        let at = self.functab_at.checked_add(self.uint(offset_at, field)?)?;
        // The entry is the only field of the record whose size differs.
        let behind_entry = at.checked_add(field)?;
        let u32_at = |index: u64| self.uint(behind_entry.checked_add(index * 4)?, 4);
        let runs = u32_at(6)?;
        let has_start_line = self.layout == Layout::WithStartLine;
        let first_run = if has_start_line { 10 } else { 9 };
        let inlined = if runs > PCDATA_INLINE_INDEX {
            u32_at(first_run + PCDATA_INLINE_INDEX).filter(|&run| run != 0)
        } else {
            None
        };
        // The last byte in front of the runs says how many offsets of further data are behind them.
        let mut data = [0];
        read_exact(&self.bytes, behind_entry.checked_add(first_run * 4 - 1)?, &mut data)?;
        let tree = if u64::from(u8::from_le_bytes(data)) > FUNCDATA_INLINE_TREE {
            let offset = u32_at(first_run + runs + FUNCDATA_INLINE_TREE)?;
            self.trees_at.filter(|_| offset != u64::from(u32::MAX)).and_then(|at| at.checked_add(offset))
        } else {
            None
        };
        Some(Record {
            entry: self.uint(at, field)?.checked_add(self.text)?,
            name: u32_at(0)?,
            pcfile: u32_at(4)?,
            pcln: u32_at(5)?,
            unit: u32_at(7)?,
            start_line: if has_start_line { u32::try_from(u32_at(8)?).ok()? } else { 0 },
            inlined,
            tree,
        })
    }

    /// The value of a run at an address of a function that begins at `entry`.
    fn value(&self, run: u64, entry: u64, addr: u64) -> Option<i64> {
        let mut bytes =
            Bytes { table: self, at: self.pcs_at.checked_add(run)?, taken: 0, chunk: Vec::new(), next: 0 };
        let (mut value, mut pc) = (-1_i32, entry);
        for step in 0.. {
            let delta = bytes.varint()?;
            if delta == 0 && step > 0 {
                return None;
            }
            value = value.wrapping_add(((delta >> 1) as i32) ^ -((delta & 1) as i32));
            pc = pc.checked_add(u64::from(bytes.varint()?).checked_mul(self.quantum)?)?;
            if addr < pc {
                return Some(value.into());
            }
        }
        None
    }

    /// Text up to a zero byte.
    fn text_at(&self, at: u64) -> Option<String> {
        let mut text = Vec::new();
        let mut chunk = [0; 128];
        while text.len() < NAME_BYTES_MAX {
            let read = self.bytes.read_at(at.checked_add(text.len() as u64)?, &mut chunk)?;
            let part = chunk.get(..read)?;
            if let Some(end) = part.iter().position(|&byte| byte == 0) {
                text.extend_from_slice(part.get(..end)?);
                return Some(String::from_utf8_lossy(&text).into_owned());
            }
            if read == 0 {
                return None;
            }
            text.extend_from_slice(part);
        }
        None
    }

    /// An integer of 4 or 8 bytes.
    fn uint(&self, at: u64, bytes: u64) -> Option<u64> {
        let mut raw = [0; 8];
        if bytes == 4 {
            let [a, b, c, d, ..] = &mut raw;
            let mut half = [*a, *b, *c, *d];
            read_exact(&self.bytes, at, &mut half)?;
            let value = if self.big_endian { u32::from_be_bytes(half) } else { u32::from_le_bytes(half) };
            return Some(value.into());
        }
        read_exact(&self.bytes, at, &mut raw)?;
        Some(if self.big_endian { u64::from_be_bytes(raw) } else { u64::from_le_bytes(raw) })
    }
}

fn read_exact(bytes: &impl ReadAt, at: u64, buffer: &mut [u8]) -> Option<()> {
    (bytes.read_at(at, buffer)? == buffer.len()).then_some(())
}

/// The bytes of a run, in chunks.
struct Bytes<'t, R> {
    table: &'t Pclntab<R>,
    at: u64,
    taken: usize,
    chunk: Vec<u8>,
    next: usize,
}

impl<R: ReadAt> Bytes<'_, R> {
    fn byte(&mut self) -> Option<u8> {
        if self.next == self.chunk.len() {
            if self.taken >= RUN_BYTES_MAX {
                return None;
            }
            self.chunk.resize(RUN_CHUNK, 0);
            let read = self.table.bytes.read_at(self.at.checked_add(self.taken as u64)?, &mut self.chunk)?;
            self.chunk.truncate(read);
            self.taken += read;
            self.next = 0;
        }
        let byte = *self.chunk.get(self.next)?;
        self.next += 1;
        Some(byte)
    }

    /// LEB128 of at most 32 bits.
    fn varint(&mut self) -> Option<u32> {
        let mut value = 0;
        for shift in (0..35).step_by(7) {
            let byte = self.byte()?;
            value |= u32::from(byte & 0x7f).wrapping_shl(shift);
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A table of two functions: `a` at 0x1000 with lines 10 and 12, `b` at 0x1020, to 0x1030.
    fn table(layout: Layout) -> Vec<u8> {
        let names: &[u8] = b"\0main.a\0main.b\0";
        let files: &[u8] = b"/a.go\0";
        // Value -1 + 1 = 0 for 0x20 bytes; line -1 + 11 = 10 for 0x10, + 2 for 0x10.
        let pcs: &[u8] = &[0xff, 2, 0x20, 0, 22, 0x10, 4, 0x10, 0];
        let (file_run, line_run) = (1, 4);
        let absolute = layout == Layout::Absolute;
        let field = |value: u64| {
            if absolute {
                (value + 0x1000).to_le_bytes().to_vec()
            } else {
                (value as u32).to_le_bytes().to_vec()
            }
        };
        let offset = |value: u64| {
            if absolute { value.to_le_bytes().to_vec() } else { (value as u32).to_le_bytes().to_vec() }
        };
        let record = |entry: u64, name: u32| {
            let mut record = field(entry);
            for value in [name, 0, 0, 0, file_run, line_run, 0, 0] {
                record.extend(value.to_le_bytes());
            }
            if layout == Layout::WithStartLine {
                record.extend(9_u32.to_le_bytes());
            }
            record.extend([0; 4]);
            record
        };
        let records = [record(0, 1), record(0x20, 8)];
        let functab_bytes = (field(0).len() * 5) as u64;
        let mut functions = Vec::new();
        functions.extend(field(0));
        functions.extend(offset(functab_bytes));
        functions.extend(field(0x20));
        functions.extend(offset(functab_bytes + records[0].len() as u64));
        functions.extend(field(0x30));
        functions.extend(records.concat());

        let magic: u32 = match layout {
            Layout::Absolute => 0xffff_fffa,
            Layout::Relative => 0xffff_fff0,
            Layout::WithStartLine => 0xffff_fff1,
        };
        let mut bytes = [&magic.to_le_bytes()[..], &[0, 0, 1, 8]].concat();
        let header = 8 + 8 * if absolute { 7 } else { 8 };
        let parts = [names, &[0; 4], files, pcs, &functions];
        let mut words = vec![2, 1];
        if !absolute {
            words.push(0x1000);
        }
        let mut at = header;
        for part in parts {
            words.push(at);
            at += part.len() as u64;
        }
        bytes.extend(words.into_iter().flat_map(u64::to_le_bytes));
        bytes.extend(parts.concat());
        bytes
    }

    const LAYOUTS: [Layout; 3] = [Layout::Absolute, Layout::Relative, Layout::WithStartLine];

    #[test]
    fn every_layout_gives_names_files_and_lines() {
        for layout in LAYOUTS {
            let bytes = table(layout);
            let table = Pclntab::new(bytes.as_slice(), Module::default()).expect("a header");
            let start_line = if layout == Layout::WithStartLine { 9 } else { 0 };
            let check = |addr, name: &str, entry, line| {
                let file = "/a.go".to_owned();
                let expect = GoFunction { name: name.to_owned(), entry, file, line, start_line };
                assert_eq!(table.find(addr), [expect], "{layout:?} {addr:#x}");
            };
            check(0x1000, "main.a", 0x1000, 10);
            check(0x100f, "main.a", 0x1000, 10);
            check(0x1010, "main.a", 0x1000, 12);
            check(0x1020, "main.b", 0x1020, 10);
            assert_eq!(table.find(0xfff), []);
            assert_eq!(table.find(0x1030), []);
        }
    }

    #[test]
    fn a_table_cut_anywhere_gives_no_more_than_it_has() {
        for layout in LAYOUTS {
            let whole = table(layout);
            for cut in 0..whole.len() {
                if let Some(table) = Pclntab::new(&whole[..cut], Module::default()) {
                    table.find(0x1015);
                }
            }
        }
    }

    #[test]
    fn other_bytes_are_no_table() {
        assert!(Pclntab::new(&[0_u8; 100][..], Module::default()).is_none());
        let mut go_1_2 = table(Layout::WithStartLine);
        go_1_2[0] = 0xfb;
        assert!(Pclntab::new(go_1_2.as_slice(), Module::default()).is_none());
    }

    proptest! {
        #[test]
        fn wrong_bytes_give_an_answer_or_none(
            layout in prop::sample::select(&LAYOUTS[..]),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
            addr in 0xff0..0x1040_u64,
        ) {
            let mut bytes = table(layout);
            for (at, with) in changes {
                let at = at.index(bytes.len());
                bytes[at] = with;
            }
            if let Some(table) = Pclntab::new(bytes.as_slice(), Module { text: 0x1000, trees_at: Some(64) }) {
                table.find(addr);
            }
        }
    }
}
