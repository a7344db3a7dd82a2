//! Kernel addresses by `/proc/kallsyms`.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::packed::PackedNames;
use super::{NewFrame, Reason};
use crate::addr::Addr;

/// How often the list of modules is compared, since a change means new symbols.
const MODULES_CHECK_EVERY: Duration = Duration::from_secs(10);

/// How often the symbols may be read again for what no list announces: BPF programs. Reading costs about 100 ms.
const RELOAD_EVERY: Duration = Duration::from_secs(60);

/// Bytes of kallsyms that are read; a kernel with everything built in has about 20 MB.
const KALLSYMS_BYTES_MAX: u64 = 256 << 20;

/// Bytes of one line: a symbol has at most 511 (KSYM_NAME_LEN), a module's name 55.
const LINE_BYTES_MAX: u64 = 1024;

/// An address further behind its symbol than any function is long is in no function: past the end of a module.
const FUNCTION_BYTES_MAX: u64 = 1 << 20;

/// Code of the kernel or of one module spans no more than this (arch/x86/include/asm/page_64_types.h: KERNEL_IMAGE_SIZE);
/// what lies farther from its start was put there at run time.
const MODULE_BYTES_MAX: u64 = 1 << 30;

/// The name given to what is built in; modules have their own, BPF programs [`BPF`].
pub(crate) const BUILT_IN: &str = "kernel";

/// The module of all BPF programs. Each lies by itself, somewhere.
const BPF: &str = "bpf";

/// The kernel's functions, sorted by address: kernels have 60 to 300 thousand of them.
#[derive(Debug, Default)]
struct Table {
    addrs: Vec<u64>,
    /// Of each function, in `modules`.
    module_of: Vec<u16>,
    /// Of each function.
    names: PackedNames,
    modules: Vec<Module>,
    /// Lines with an address of 0, which is what kptr_restrict shows.
    hidden: usize,
}

/// The functions as they are listed.
#[derive(Default)]
struct Listed {
    functions: Vec<Function>,
    /// Each ended by a NUL.
    names: String,
}

#[derive(Debug)]
struct Module {
    name: Box<str>,
    /// Where its code begins: at `_stext` for what is built in, else at its first function.
    start: u64,
}

#[derive(Clone, Copy, Debug)]
struct Function {
    addr: u64,
    /// In `Listed::names`.
    name_at: u32,
    module: u16,
    rank: Rank,
}

/// Which of several names at one address is shown: the most public, then the first listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Global,
    Local,
    Weak,
}

/// A function by its number, and how far behind its start and behind that of its module the address lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found<'a> {
    module: &'a str,
    function: usize,
    offset: u64,
    module_offset: u64,
}

/// One line of kallsyms.
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    addr: u64,
    kind: u8,
    name: &'a str,
    module: Option<&'a str>,
}

impl<'a> Line<'a> {
    /// `ffffffff81000000 T _stext` or `ffffffffc0123450 t nft_do_chain\t[nf_tables]`; `None` for anything else.
    fn parse(line: &'a str) -> Option<Self> {
        let (addr, rest) = line.trim_end().split_once(' ')?;
        let (kind, rest) = rest.split_once(' ')?;
        let (name, module) = match rest.split_once('\t') {
            Some((name, module)) => (name, Some(module.strip_prefix('[')?.strip_suffix(']')?)),
            None => (rest, None),
        };
        let &[kind] = kind.as_bytes() else { return None };
        Some(Self { addr: u64::from_str_radix(addr, 16).ok()?, kind, name, module })
    }

    /// Source: nm(1); `i` and `a` are not code.
    fn rank(&self) -> Option<Rank> {
        match self.kind {
            b'T' => Some(Rank::Global),
            b't' => Some(Rank::Local),
            b'W' | b'w' => Some(Rank::Weak),
            _ => None,
        }
    }
}

impl Table {
    fn read(kallsyms: impl BufRead) -> io::Result<Self> {
        let (mut table, mut listed) = (Self::default(), Listed::default());
        let mut modules = HashMap::new();
        let mut kallsyms = kallsyms.take(KALLSYMS_BYTES_MAX);
        let mut line = Vec::with_capacity(256);
        while read_line(&mut kallsyms, &mut line)? {
            if let Some(parsed) = str::from_utf8(&line).ok().and_then(Line::parse) {
                table.add(&parsed, &mut listed, &mut modules);
            }
        }
        // Stable, so that of two equal names the first listed stays.
        let Listed { mut functions, names } = listed;
        functions.sort_by_key(|function| (function.addr, function.rank));
        functions.dedup_by_key(|function| function.addr);
        table.addrs = functions.iter().map(|function| function.addr).collect();
        table.module_of = functions.iter().map(|function| function.module).collect();
        let name = |function: &Function| names.get(function.name_at as usize..).unwrap_or_default();
        table.names = PackedNames::new(functions.iter().map(name))?;
        Ok(table)
    }

    fn add(&mut self, line: &Line<'_>, listed: &mut Listed, modules: &mut HashMap<Box<str>, u16>) {
        let Some(rank) = line.rank() else { return };
        if line.addr == 0 {
            self.hidden += 1;
            return;
        }
        let name = line.module.unwrap_or(BUILT_IN);
        let next = u16::try_from(self.modules.len());
        let number = match (modules.get(name), next) {
            (Some(&known), _) => known,
            (None, Ok(next)) => {
                self.modules.push(Module { name: name.into(), start: u64::MAX });
                modules.insert(name.into(), next);
                next
            }
            (None, Err(_)) => return,
        };
        if let Some(module) = self.modules.get_mut(usize::from(number)) {
            let begins_here = name != BUILT_IN || line.name == "_stext";
            module.start = if begins_here { module.start.min(line.addr) } else { module.start };
        }
        let Ok(name_at) = u32::try_from(listed.names.len()) else { return };
        listed.names.push_str(line.name);
        listed.names.push('\0');
        listed.functions.push(Function { addr: line.addr, name_at, module: number, rank });
    }

    fn find(&self, addr: Addr) -> Result<Found<'_>, Reason> {
        if self.addrs.is_empty() {
            return Err(if self.hidden > 0 { Reason::KallsymsHidden } else { Reason::NoSymbols });
        }
        let behind = self.addrs.partition_point(|&start| start <= addr.0);
        let function = behind.checked_sub(1).ok_or(Reason::NotInSymbols)?;
        let (Some(start), Some(&module)) = (self.addrs.get(function), self.module_of.get(function)) else {
            return Err(Reason::NotInSymbols);
        };
        let offset = addr.0 - start;
        if offset >= FUNCTION_BYTES_MAX {
            return Err(Reason::NotInSymbols);
        }
        let module = self.modules.get(usize::from(module)).ok_or(Reason::NotInSymbols)?;
        Ok(Found {
            module: &module.name,
            function,
            offset,
            module_offset: module.offset(addr).unwrap_or(offset),
        })
    }
}

impl Module {
    /// `None` for what the module's start says nothing of. The distance between two places that the kernel chose at random
    /// would tell of both.
    fn offset(&self, addr: Addr) -> Option<u64> {
        let offset = addr.0.checked_sub(self.start)?;
        (&*self.name != BPF && offset < MODULE_BYTES_MAX).then_some(offset)
    }
}

/// Reads one line, or the next piece of one that is too long; false at the end.
fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    from.take(LINE_BYTES_MAX).read_until(b'\n', line)?;
    Ok(!line.is_empty())
}

/// The kernel's symbols, kept up to date.
///
/// They are read at the first look-up, again when a module came or went, and at most once a minute for an address that
/// is unknown or in a BPF program. Without CAP_SYSLOG or with kernel.kptr_restrict = 2 the kernel shows every address as
/// 0: each look-up then is [`Reason::KallsymsHidden`].
#[derive(Debug)]
pub(super) struct KernelSymbols {
    proc_root: PathBuf,
    table: Table,
    read_at: Option<Instant>,
    modules_checked_at: Option<Instant>,
    modules_hash: u64,
}

impl KernelSymbols {
    pub(super) fn new(proc_root: &Path) -> Self {
        Self {
            proc_root: proc_root.into(),
            table: Table::default(),
            read_at: None,
            modules_checked_at: None,
            modules_hash: 0,
        }
    }

    /// Brings the symbols up to date for these addresses; true when they were read again, so that what was looked up
    /// before is void.
    ///
    /// # Errors
    /// kallsyms cannot be read; the symbols stay as they were.
    pub(super) fn refresh(&mut self, addrs: &[Addr], now: Instant) -> io::Result<bool> {
        let modules_changed = self.modules_changed(now);
        let due = self.read_at.is_none_or(|read_at| now.saturating_duration_since(read_at) >= RELOAD_EVERY);
        let stale = modules_changed
            || self.read_at.is_none()
            || (due && addrs.iter().any(|&addr| self.doubtful(addr)));
        if stale {
            self.read_at = Some(now);
            self.table = Table::read(BufReader::with_capacity(
                64 << 10,
                File::open(self.proc_root.join("kallsyms"))?,
            ))?;
        }
        Ok(stale)
    }

    /// The function at an address: one frame, with its module and the offset in that.
    pub(super) fn frames(&self, addr: Addr) -> Result<Vec<NewFrame>, Reason> {
        let Found { module, function, offset: _, module_offset } = self.table.find(addr)?;
        let name = self.table.names.get(function).ok_or(Reason::NotInSymbols)?;
        Ok(vec![NewFrame {
            function: name.clone(),
            system_name: name,
            module: module.into(),
            module_offset,
            ..NewFrame::default()
        }])
    }

    fn doubtful(&self, addr: Addr) -> bool {
        self.table.find(addr).is_ok_and(|found| found.module == BPF)
            || self.table.find(addr) == Err(Reason::NotInSymbols)
    }

    fn modules_changed(&mut self, now: Instant) -> bool {
        let checked_at = self.modules_checked_at;
        if checked_at.is_some_and(|at| now.saturating_duration_since(at) < MODULES_CHECK_EVERY) {
            return false;
        }
        self.modules_checked_at = Some(now);
        let mut text = String::new();
        // A kernel without modules has no such file: it never changes.
        let read = File::open(self.proc_root.join("modules"))
            .and_then(|file| file.take(KALLSYMS_BYTES_MAX).read_to_string(&mut text));
        let hash = modules_hash(if read.is_ok() { &text } else { "" });
        checked_at.is_some() & (std::mem::replace(&mut self.modules_hash, hash) != hash)
    }
}

/// Changes when a module is loaded or unloaded, not when its use count changes.
///
/// Source: proc_modules(5): `nf_tables 323584 2 nft_chain_nat, Live 0xffffffffc0a00000`.
fn modules_hash(modules: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    for line in modules.lines() {
        let mut words = line.split_ascii_whitespace();
        (words.next(), words.find(|word| word.starts_with("0x"))).hash(&mut hasher);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KALLSYMS: &str = "\
0000000000001000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000100 w weak_name
ffffffff81000100 t local_name
ffffffff81000100 T public_name
ffffffff81000180 D data
ffffffff81000200 t last
ffffffffc0000000 t nft_init\t[nf_tables]
ffffffffc0000040 t nft_do_chain\t[nf_tables]
ffffffffc1000000 t bpf_prog_6deef7357e7b4530\t[bpf]
";

    #[track_caller]
    fn check(addr: u64, expect: Result<(&str, &str, u64), Reason>) {
        let table = Table::read(KALLSYMS.as_bytes()).unwrap();
        let found = table.find(Addr(addr));
        let name = found.ok().and_then(|found| table.names.get(found.function)).unwrap_or_default();
        let found = found.map(|found| (found.module, &*name, found.offset));
        assert_eq!(found, expect, "{addr:#x}");
    }

    #[test]
    fn addresses_are_found_with_module_and_offset() {
        check(0xffff_ffff_8100_0000, Ok(("kernel", "_stext", 0)));
        check(0xffff_ffff_8100_00ff, Ok(("kernel", "_stext", 0xff)));
        check(0xffff_ffff_8100_0101, Ok(("kernel", "public_name", 1)));
        check(0xffff_ffff_8100_0190, Ok(("kernel", "public_name", 0x90)));
        check(0xffff_ffff_c000_0050, Ok(("nf_tables", "nft_do_chain", 0x10)));
        check(0xffff_ffff_c100_0000, Ok(("bpf", "bpf_prog_6deef7357e7b4530", 0)));
        check(0x1000, Err(Reason::NotInSymbols));
        check(0xffff_ffff_8110_0200, Err(Reason::NotInSymbols));
        check(u64::MAX, Err(Reason::NotInSymbols));
    }

    #[test]
    fn an_address_is_told_by_its_distance_from_what_it_was_loaded_with() {
        let far = format!("{KALLSYMS}fffffe0000000000 T entry_trampoline\n");
        let table = Table::read(far.as_bytes()).unwrap();
        let check =
            |addr, expect| assert_eq!(table.find(Addr(addr)).unwrap().module_offset, expect, "{addr:#x}");
        check(0xffff_ffff_8100_0190, 0x190);
        check(0xffff_ffff_c000_0050, 0x50);
        check(0xffff_ffff_c100_0010, 0x10);
        check(0xffff_fe00_0000_0004, 4);
        let without_start = Table::read("ffffffff81000000 T vfs_read\n".as_bytes()).unwrap();
        assert_eq!(without_start.find(Addr(0xffff_ffff_8100_0003)).unwrap().module_offset, 3);
    }

    #[test]
    fn hidden_addresses_are_told_from_a_missing_table() {
        let hidden =
            Table::read("0000000000000000 T _stext\n0000000000000000 t f\t[m]\n".as_bytes()).unwrap();
        assert_eq!(hidden.find(Addr(0xffff_ffff_8100_0000)), Err(Reason::KallsymsHidden));
        assert_eq!(Table::default().find(Addr(1)), Err(Reason::NoSymbols));
    }

    #[test]
    fn lines_that_are_none_are_skipped() {
        for line in ["", " ", "x T f", "1 TT f", "1 T", "1 T f\tm", "1 T f\t[m", "10000000000000000 T f"] {
            assert_eq!(Line::parse(line), None, "{line:?}");
        }
        let long = format!("{}\nffffffff81000000 T kept\n", "ffffffff81000000 T ".repeat(200));
        let table = Table::read(long.as_bytes()).unwrap();
        assert_eq!(table.find(Addr(0xffff_ffff_8100_0001)).map(|found| found.offset), Ok(1));
    }

    #[test]
    fn symbols_are_read_again_when_a_module_comes_and_not_when_its_use_count_changes() {
        let proc_root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(proc_root.path().join(name), text).unwrap();
        let addr = Addr(0xffff_ffff_c000_0010);
        write("kallsyms", "ffffffff81000000 T _stext\n");
        write("modules", "overlay 200704 0 - Live 0xffffffffc0100000\n");
        let mut symbols = KernelSymbols::new(proc_root.path());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);

        assert!(symbols.refresh(&[addr], at(0)).unwrap(), "the first look-up reads");
        assert_eq!(symbols.frames(addr).unwrap_err(), Reason::NotInSymbols);
        write("kallsyms", KALLSYMS);
        write("modules", "overlay 200704 7 a,b Live 0xffffffffc0100000\n");
        assert!(!symbols.refresh(&[addr], at(20)).unwrap());
        write("modules", "nf_tables 323584 0 - Live 0xffffffffc0000000\n");
        assert!(!symbols.refresh(&[addr], at(21)).unwrap(), "modules are compared every 10 s");
        assert!(symbols.refresh(&[addr], at(40)).unwrap());
        assert_eq!(symbols.frames(addr).unwrap()[0].module, "nf_tables");
        assert!(!symbols.refresh(&[Addr(1)], at(90)).unwrap(), "an unknown address waits for its minute");
        assert!(symbols.refresh(&[Addr(1)], at(101)).unwrap());
        assert!(!symbols.refresh(&[addr], at(300)).unwrap(), "known addresses never cause a reading");
    }

    #[test]
    fn a_missing_kallsyms_is_an_error() {
        let mut symbols = KernelSymbols::new(Path::new("/nonexistent"));
        assert!(symbols.refresh(&[], Instant::now()).is_err());
        assert_eq!(symbols.frames(Addr(1)), Err(Reason::NoSymbols));
    }

    proptest! {
        #[test]
        fn no_table_makes_the_reader_panic(text in "([0-9a-f]{0,17} ?[TtWD]? ?\\PC{0,8}\t?\\[?[a-z]{0,3}\\]?\n?){0,20}",
                                           addr in any::<u64>()) {
            let _ = Table::read(text.as_bytes()).unwrap().find(Addr(addr));
        }
    }
}
