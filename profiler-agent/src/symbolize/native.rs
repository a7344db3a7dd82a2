//! Addresses of ELF files by their symbols and DWARF, through blazesym.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blazesym::symbolize::source::{Elf as ElfSource, Source};
use blazesym::symbolize::{self, CodeInfo, Input, Sym, Symbolized, Symbolizer};
use rustix::fs::{Mode, OFlags};

use super::debuginfod::DebugInfod;
use super::demangle::{cut, demangle, is_mangled};
use super::inflate::is_honest;
use super::mini::{self, MiniSymbols};
use super::names::{Names, NamesKey};
use super::store::NameStore;
use super::symtab::Ranges;
use super::unpack::unpack;
use super::{NewFrame, Reason, go, nesting};
use crate::executable::{BuildId, Elf, Executable, ExecutableCache, ExecutableId, SymbolSections};
use crate::sys::{file_pages, heap, sigbus};

/// Files whose symbols are loaded at a time, per thread. Their pages are the page cache's; the index over them, sections
/// that are compressed in the file, and the DWARF of units that were asked for are our own: 26 MB after 2000 addresses
/// all over a 48 MB Rust program.
const LOADED_MAX: usize = 32;

/// Symbols of a file are released when nothing new was asked of it for so long: by then its locations are remembered.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Large ones are released sooner, when so many bytes have been idle for a second, or half as many for two. A file of 10 MB
/// takes some 50 ms to load again.
const IDLE_BYTE_SECONDS_MAX: u64 = 64 << 20;

/// Bytes that the files of a thread take, where nobody says another bound.
const LOADED_BYTES_MAX: usize = 8 << 20;

/// New names of a file that is asked for more all the time are saved this often.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);

/// Symbol and string tables larger than this are not read.
const SYMBOL_BYTES_MAX: u64 = 1 << 30;

/// DWARF larger than this is not read; the file's symbols still are.
const DEBUG_BYTES_MAX: u64 = 4 << 30;

/// DWARF that a compressed file may unfold to in our own memory.
const INFLATED_BYTES_MAX: u64 = 256 << 20;

/// Debug files are unpacked on disk when they unfold to so much, and kept up to so much of all.
const UNPACKED_BYTES_MIN: u64 = 1 << 20;
const UNPACKED_BYTES_MAX: u64 = 512 << 20;

/// Frames of one location; inlining deeper than this is cut at the outer end.
const FRAMES_MAX: usize = 128;

/// Functions remembered per loaded file.
const FUNCTIONS_MAX: usize = 16 << 10;

/// Where distributions put debug information by build id. Only root writes there.
const DEBUG_DIR: &str = "/usr/lib/debug";

/// A way to name a file's addresses, the best first.
#[derive(Debug)]
enum Symbols {
    /// Another file with the same build id.
    DebugFile(DebugFile),
    /// DWARF in the executable itself.
    OwnDebug,
    /// The compressed table of a stripped file, and the dynamic one.
    Mini(MiniSymbols),
    /// The symbol table, or the dynamic one.
    OwnTable,
}

/// A separate file with an executable's debug information.
#[derive(Debug)]
struct DebugFile {
    file: File,
    origin: Origin,
}

/// Who gave a debug file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The distribution. It may name further files: its author is trusted.
    Distribution,
    /// A server, which is asked for names only: its file is read as that of an author nobody vouches for.
    Server,
}

impl DebugFile {
    fn is_usable(&self) -> bool {
        let Self { file, origin } = self;
        Elf::of(file).is_ok_and(|elf| match origin {
            Origin::Distribution => fits(file, &elf.symbols),
            Origin::Server => !elf.symbols.names_other_file && is_safe(file, &elf.symbols),
        })
    }

    /// What tells versions apart. The time of a server's file is that of its last use.
    fn version(&self) -> String {
        let Ok(metadata) = self.file.metadata() else { return String::new() };
        let (inode, bytes) = (metadata.ino(), metadata.len());
        match self.origin {
            Origin::Distribution => {
                format!("{inode}:{bytes}:{}.{}", metadata.mtime(), metadata.mtime_nsec())
            }
            Origin::Server => format!("server:{inode}:{bytes}"),
        }
    }
}

/// The ways that are worth trying for a file, the best last, so that the last is taken first.
///
/// An executable that names another file for its debug information is never followed: the name would be looked up with
/// the agent's rights, in the agent's mount namespace, and opening it may block.
fn ways(executable: &Executable, debug_file: Option<DebugFile>, unpacked: &mut Unpacked) -> Vec<Symbols> {
    let mut ways = Vec::with_capacity(3);
    let symbols = executable.symbols();
    if symbols.symbol_bytes <= SYMBOL_BYTES_MAX {
        ways.push(Symbols::OwnTable);
    }
    // Unfolded only where nothing better is there: it takes memory of ours.
    let is_stripped = !symbols.has_debug_info && debug_file.is_none();
    let mini = symbols.mini.as_ref().filter(|_| is_stripped);
    if let Some(symbols) = mini.and_then(|section| mini::unfold(executable.file(), section)) {
        ways.push(Symbols::Mini(symbols));
    }
    let has_own_debug = symbols.has_debug_info && !symbols.names_other_file;
    if has_own_debug && executable.debug_is_safe(|| is_safe(executable.file(), symbols)) {
        ways.push(Symbols::OwnDebug);
    }
    if let Some(file) = debug_file
        && executable.debug_file_is_usable(file.version(), || file.is_usable())
    {
        ways.push(Symbols::DebugFile(unpacked.of(file)));
    }
    ways
}

/// Debug files that were compressed, unpacked on disk for as long as the agent runs.
struct Unpacked {
    /// `None`: there is no place for them, and blazesym unpacks them on the heap.
    directory: Option<PathBuf>,
    /// Those that unfold to less are left to blazesym.
    bytes_min: u64,
    /// By version, the longest unused first.
    files: VecDeque<(String, File, u64)>,
}

impl Unpacked {
    /// The same file, unpacked where that is worth it and can be done.
    fn of(&mut self, debug: DebugFile) -> DebugFile {
        let Some(directory) = &self.directory else { return debug };
        let Ok(elf) = Elf::of(&debug.file) else { return debug };
        // Another file is looked for beside the one that names it.
        if elf.symbols.inflated_bytes < self.bytes_min || elf.symbols.names_other_file {
            return debug;
        }
        let version = debug.version();
        let known = self.files.iter().position(|(known, ..)| *known == version);
        let known = known.and_then(|at| self.files.remove(at));
        let entry = known.or_else(|| {
            let file = unpack(&debug.file, directory).ok()?;
            let bytes = file.metadata().ok()?.len();
            Some((version, file, bytes))
        });
        let Some(entry) = entry else { return debug };
        let file = entry.1.try_clone();
        self.files.push_back(entry);
        while self.files.iter().map(|(.., bytes)| bytes).sum::<u64>() > UNPACKED_BYTES_MAX {
            self.files.pop_front();
        }
        match file {
            Ok(file) => DebugFile { file, origin: debug.origin },
            Err(_too_many_descriptors) => debug,
        }
    }
}

/// Whether DWARF of an author nobody vouches for can be given to blazesym.
fn is_safe(file: &File, symbols: &SymbolSections) -> bool {
    fits(file, symbols) && nesting::is_bounded(file, symbols)
}

/// Whether DWARF can be read within the bounds. Unfolds what is compressed once.
fn fits(file: &File, symbols: &SymbolSections) -> bool {
    symbols.debug_bytes <= DEBUG_BYTES_MAX
        && symbols.inflated_bytes <= INFLATED_BYTES_MAX
        && symbols.symbol_bytes <= SYMBOL_BYTES_MAX
        && symbols.compressed.iter().all(|section| is_honest(file, section))
}

/// The file of the distribution with an executable's debug information, if it has none itself: by its build id, else by
/// the name that it gives, and in both cases only with the same build id inside.
///
/// ```text
/// <debug dir>/.build-id/ab/cdef.debug     <debug dir>/<directory of the executable>/<name>
/// ```
/// Never from the root of a process: one file is named once for all who run it, and a container that runs the same libc as
/// everybody must not say what everybody's functions are called. Source: GDB manual, "Debugging Information in Separate
/// Files".
fn debug_file(executable: &Executable, debug_dir: &Path) -> Option<File> {
    if executable.symbols().has_debug_info {
        return None;
    }
    let build_id = executable.identity().build_ids.gnu.as_ref()?;
    let hex = build_id.to_string();
    let (first, rest) = hex.split_at_checked(2).filter(|(_, rest)| rest.len() >= 6)?;
    let by_id = debug_dir.join(".build-id").join(first).join(format!("{rest}.debug"));
    open_debug_file(&by_id, build_id)
        .or_else(|| open_debug_file(&linked_path(executable, debug_dir)?, build_id))
}

/// Where the debug link of an executable leads below `debug_dir`. A path that does not stay below names nothing.
fn linked_path(executable: &Executable, debug_dir: &Path) -> Option<PathBuf> {
    let name = Path::new(executable.symbols().debug_link.as_deref()?);
    let directory = executable.path().parent()?.strip_prefix("/").ok()?;
    let is_plain = |part| matches!(part, Component::Normal(_));
    let stays = directory.components().all(is_plain) && name.components().all(is_plain);
    stays.then(|| debug_dir.join(directory).join(name))
}

fn open_debug_file(path: &Path, build_id: &BuildId) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let elf = Elf::of(&file).ok()?;
    (elf.build_ids.gnu.as_ref() == Some(build_id)).then_some(file)
}

/// What is known of a function beside what an address in it gives.
#[derive(Clone, Debug, Default)]
struct Function {
    /// Line of the first instruction; 0 when that is of a callee inlined there.
    start_line: u32,
    /// The linker's name, where DWARF has only the plain one (`-g1`, Rust's `line-tables-only`).
    linkage_name: Option<Box<str>>,
}

/// A file, loaded one way.
enum Loaded {
    /// By its symbol tables.
    Tables(Arc<Executable>, Ranges),
    Blazesym(Box<Blazesym>),
}

/// The file as a whole is of no use this way.
enum LoadedError {
    Failed,
    Shrank,
}

impl Loaded {
    fn new(executable: &Arc<Executable>, way: Symbols) -> Self {
        match way {
            Symbols::OwnTable if !executable.symbols().tables.is_empty() => {
                Self::Tables(Arc::clone(executable), Ranges::default())
            }
            way => Self::Blazesym(Box::new(Blazesym::new(executable, way))),
        }
    }

    /// Bytes of our own memory, beside the heap, that symbols which were unfolded lie in.
    fn unfolded_bytes(&self) -> usize {
        match self {
            Self::Tables(..) => 0,
            Self::Blazesym(blazesym) => usize::try_from(blazesym.memory_bytes).unwrap_or(usize::MAX),
        }
    }

    /// One answer per address.
    fn symbolize(&mut self, addrs: &[u64]) -> Result<Vec<Result<Vec<NewFrame>, Reason>>, LoadedError> {
        match self {
            Self::Tables(executable, ranges) => by_tables(executable, ranges, addrs),
            Self::Blazesym(blazesym) => blazesym.symbolize(addrs).map_err(|_error| LoadedError::Failed),
        }
    }
}

fn by_tables(
    executable: &Executable,
    ranges: &mut Ranges,
    addrs: &[u64],
) -> Result<Vec<Result<Vec<NewFrame>, Reason>>, LoadedError> {
    let tables = &executable.symbols().tables;
    let found = ranges.find(executable.file(), tables, addrs).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => LoadedError::Shrank,
        _ => LoadedError::Failed,
    })?;
    let is_stripped = tables.iter().all(|table| table.is_dynamic);
    let missing = if is_stripped { Reason::NoSymbols } else { Reason::NotInSymbols };
    let frames = |name: Arc<str>| vec![frame(&name, None)];
    Ok(found.into_iter().map(|name| name.map(frames).ok_or(missing)).collect())
}

/// blazesym's view of one file. It keeps files by path; here the path is a descriptor's, which names another file once
/// it was closed. So each file has a `Symbolizer` of its own, which lives no longer than the descriptor.
struct Blazesym {
    symbolizer: Symbolizer,
    source: Source<'static>,
    /// The same file without its DWARF; `None` when `source` is that already.
    table: Option<Source<'static>>,
    /// What names the addresses that `source` does not.
    rest: Option<Source<'static>>,
    /// Bytes of our own memory that `source` lies in.
    memory_bytes: u64,
    /// By the function's address.
    functions: HashMap<u64, Function>,
    _file: Option<File>,
}

impl Blazesym {
    fn new(executable: &Executable, way: Symbols) -> Self {
        let own = executable.file().as_raw_fd();
        let (fd, file, has_lines, memory_bytes) = match way {
            Symbols::DebugFile(DebugFile { file, origin: _ }) => (file.as_raw_fd(), Some(file), true, 0),
            Symbols::OwnDebug => (own, None, true, 0),
            Symbols::Mini(MiniSymbols { file, bytes }) => (file.as_raw_fd(), Some(file), false, bytes),
            Symbols::OwnTable => (own, None, false, 0),
        };
        let symbolizer = Symbolizer::builder()
            .enable_auto_reload(false)
            .enable_code_info(true)
            .enable_inlined_fns(true)
            .enable_demangling(false)
            .set_debug_dirs(Some([DEBUG_DIR]))
            .build();
        let source = |fd, debug_syms| {
            let mut source = ElfSource::new(format!("/proc/self/fd/{fd}"));
            source.debug_syms = debug_syms;
            Source::Elf(source)
        };
        Self {
            symbolizer,
            source: source(fd, has_lines),
            table: has_lines.then(|| source(fd, false)),
            rest: (memory_bytes > 0).then(|| source(own, false)),
            memory_bytes,
            functions: HashMap::new(),
            _file: file,
        }
    }

    /// One answer per address; an error means that the file as a whole is of no use this way.
    fn symbolize(&mut self, addrs: &[u64]) -> Result<Vec<Result<Vec<NewFrame>, Reason>>, blazesym::Error> {
        let found = self.symbolizer.symbolize(&self.source, Input::VirtOffset(addrs))?;
        let mut functions = std::mem::take(&mut self.functions);
        let frames = found
            .iter()
            .map(|symbolized| match symbolized {
                Symbolized::Sym(sym) => Ok(frames(sym, self.function(sym, &mut functions))),
                Symbolized::Unknown(reason) => Err(reason_of(*reason)),
            })
            .zip(addrs)
            .map(|(found, &addr)| found.or_else(|reason| self.look_in_rest(addr).ok_or(reason)))
            .collect();
        self.functions = functions;
        Ok(frames)
    }

    fn look_in_rest(&self, addr: u64) -> Option<Vec<NewFrame>> {
        match self.symbolizer.symbolize_single(self.rest.as_ref()?, Input::VirtOffset(addr)) {
            Ok(Symbolized::Sym(sym)) => Some(frames(&sym, &Function::default())),
            _ => None,
        }
    }

    fn function<'k>(&self, sym: &Sym<'_>, known: &'k mut HashMap<u64, Function>) -> &'k Function {
        if known.len() >= FUNCTIONS_MAX {
            known.clear();
        }
        known.entry(sym.addr).or_insert_with(|| {
            self.table.as_ref().map_or_else(Function::default, |table| Function {
                start_line: self.start_line(sym.addr),
                linkage_name: self.linkage_name(sym, table),
            })
        })
    }

    fn start_line(&self, start: u64) -> u32 {
        match self.symbolizer.symbolize_single(&self.source, Input::VirtOffset(start)) {
            Ok(Symbolized::Sym(sym)) if sym.inlined.is_empty() => line(sym.code_info.as_deref()),
            _ => 0,
        }
    }

    /// The mangled name of the symbol that begins where the function does.
    fn linkage_name(&self, sym: &Sym<'_>, table: &Source<'_>) -> Option<Box<str>> {
        if is_mangled(&sym.name) {
            return None;
        }
        match self.symbolizer.symbolize_single(table, Input::VirtOffset(sym.addr)) {
            Ok(Symbolized::Sym(linked)) if linked.offset == 0 && is_mangled(&linked.name) => {
                Some(linked.name.into())
            }
            _ => None,
        }
    }
}

fn reason_of(reason: symbolize::Reason) -> Reason {
    match reason {
        symbolize::Reason::MissingSyms => Reason::NoSymbols,
        symbolize::Reason::IgnoredError => Reason::Malformed,
        _ => Reason::NotInSymbols,
    }
}

/// blazesym lists inlined calls outermost first; a stack is innermost first.
fn frames(sym: &Sym<'_>, function: &Function) -> Vec<NewFrame> {
    let inlined = sym.inlined.iter().rev().map(|inlined| frame(&inlined.name, inlined.code_info.as_ref()));
    let outer = NewFrame {
        start_line: function.start_line,
        ..frame(function.linkage_name.as_deref().unwrap_or(&sym.name), sym.code_info.as_deref())
    };
    inlined.take(FRAMES_MAX - 1).chain([outer]).collect()
}

fn frame(name: &str, code: Option<&CodeInfo<'_>>) -> NewFrame {
    NewFrame {
        function: demangle(name).into_owned(),
        system_name: cut(name).into_owned(),
        file: code.map(|code| cut(&path(code)).into_owned()).unwrap_or_default(),
        line: line(code),
        ..NewFrame::default()
    }
}

fn path(code: &CodeInfo<'_>) -> String {
    match code.to_path() {
        Cow::Borrowed(path) => path.to_string_lossy().into_owned(),
        Cow::Owned(path) => path.to_string_lossy().into_owned(),
    }
}

fn line(code: Option<&CodeInfo<'_>>) -> u32 {
    code.and_then(|code| code.line).unwrap_or(0)
}

/// The symbols of one executable: what is known of it, then loaded one way, with the ways left should that fail.
struct Entry {
    executable: Arc<Executable>,
    /// From the store and for it.
    names: Names,
    /// `None`: nothing vouches for its content, so its names are not kept.
    key: Option<NamesKey>,
    /// When the first names came that the store does not have.
    changed_at: Option<Instant>,
    loaded: Option<Loaded>,
    ways: Ways,
    used_at: Instant,
    /// Bytes of the heap that all of this takes, as counted.
    bytes: usize,
}

/// Looking for ways may unfold compressed sections: it is put off until a name is not known.
enum Ways {
    NotLookedFor { debug_file: Option<DebugFile> },
    Left(Vec<Symbols>),
}

impl Entry {
    fn unfolded_bytes(&self) -> usize {
        self.loaded.as_ref().map_or(0, Loaded::unfolded_bytes)
    }

    fn new(
        executable: &Arc<Executable>,
        now: Instant,
        debug_file: Option<DebugFile>,
        store: Option<&NameStore>,
    ) -> Self {
        let version = debug_file.as_ref().map(DebugFile::version).unwrap_or_default();
        let key = store.and_then(|_| executable.content());
        let key = key.map(|content| NamesKey::new(executable.identity(), content, &version));
        Self {
            executable: Arc::clone(executable),
            names: store.zip(key).map(|(store, key)| store.load(key)).unwrap_or_default(),
            key,
            changed_at: None,
            loaded: None,
            ways: Ways::NotLookedFor { debug_file },
            used_at: now,
            bytes: 0,
        }
    }

    /// Whether it is likely enough to be asked for again, for what it takes.
    fn is_worth_its_memory(&self, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.used_at);
        let bytes = u32::try_from(self.bytes).unwrap_or(u32::MAX);
        idle < IDLE_MAX && idle.saturating_mul(bytes) < Duration::from_secs(IDLE_BYTE_SECONDS_MAX)
    }

    /// Goes on to the next way; false when there is none.
    fn load_next(&mut self, unpacked: &mut Unpacked) -> bool {
        self.loaded = None;
        if let Ways::NotLookedFor { debug_file } = &mut self.ways {
            let debug_file = debug_file.take();
            // A decoder that panics over compressed sections costs the file, not the thread.
            let found = catch_unwind(AssertUnwindSafe(|| ways(&self.executable, debug_file, unpacked)));
            self.ways = Ways::Left(found.unwrap_or_default());
        }
        let Ways::Left(ways) = &mut self.ways else { return false };
        self.loaded = ways.pop().map(|way| Loaded::new(&self.executable, way));
        self.loaded.is_some()
    }

    /// Keeps what was found for the next run of the agent.
    fn remember(&mut self, addrs: &[u64], found: &[Result<Vec<NewFrame>, Reason>], now: Instant) {
        for (&addr, found) in addrs.iter().zip(found) {
            if let Ok(frames) = found
                && self.names.insert(addr, frames)
            {
                self.changed_at.get_or_insert(now);
            }
        }
    }

    fn save(&mut self, store: &NameStore) {
        if self.changed_at.take().is_some()
            && let Some(key) = self.key
        {
            store.save(key, &self.names);
        }
    }
}

/// The symbols of the files asked for last. One thread's own: blazesym shares nothing between threads.
pub(super) struct NativeSymbols {
    entries: HashMap<ExecutableId, Entry>,
    /// Bytes of all entries; one alone may be larger, until its batch is done.
    bytes_max: usize,
    debug_dir: PathBuf,
    unpacked: Unpacked,
    /// `None`: names are not kept on disk.
    store: Option<Arc<NameStore>>,
    /// `None`: no server is asked.
    debuginfod: Option<Arc<DebugInfod>>,
    /// `None`: no copies are looked for.
    executables: Option<Arc<ExecutableCache>>,
    panics: u64,
}

impl NativeSymbols {
    pub(super) fn new(store: Option<Arc<NameStore>>, debuginfod: Option<Arc<DebugInfod>>) -> Self {
        Self {
            entries: HashMap::new(),
            bytes_max: LOADED_BYTES_MAX,
            debug_dir: DEBUG_DIR.into(),
            unpacked: Unpacked {
                directory: store.as_ref().map(|store| store.directory().to_owned()),
                bytes_min: UNPACKED_BYTES_MIN,
                files: VecDeque::new(),
            },
            store,
            debuginfod,
            executables: None,
            panics: 0,
        }
    }

    /// Copies of one of these executables have the names of that.
    pub(super) fn with_executables(mut self, executables: Option<Arc<ExecutableCache>>) -> Self {
        self.executables = executables;
        self
    }

    /// With another bound of the bytes that all files take.
    pub(super) fn with_bytes_max(mut self, bytes_max: usize) -> Self {
        self.bytes_max = bytes_max;
        self
    }

    /// The distribution's, else a server's.
    fn debug_file(&self, executable: &Arc<Executable>) -> Option<DebugFile> {
        if let Some(file) = debug_file(executable, &self.debug_dir) {
            return Some(DebugFile { file, origin: Origin::Distribution });
        }
        let debuginfod = self.debuginfod.as_ref().filter(|_| !executable.symbols().has_debug_info)?;
        Some(DebugFile { file: debuginfod.find(executable)?, origin: Origin::Server })
    }

    /// Forgets how an executable is symbolized: with the next address it is looked at anew.
    pub(super) fn reload(&mut self, executable: &Executable) {
        let _unmapping = file_pages::mapping_files();
        if let Some(mut entry) = self.entries.remove(&executable.id())
            && let Some(store) = self.store.as_deref()
        {
            entry.save(store);
        }
    }

    /// One answer per address of `executable`, in their order. Reads the file, so this may take seconds.
    ///
    /// A file that is written to while it is read, or that was found to be another than it was, gives no names: they would be
    /// those of all copies of what it was.
    pub(super) fn symbolize(
        &mut self,
        executable: &Arc<Executable>,
        addrs: &[u64],
    ) -> Vec<Result<Vec<NewFrame>, Reason>> {
        let executable = match &self.executables {
            Some(executables) => executables.settle(executable),
            None => Arc::clone(executable),
        };
        let before = executable.version();
        if self.executables.is_some() || self.store.is_some() {
            // Asked each time: what it says first may hold no longer.
            let _ = executable.content();
        }
        if !executable.has_changed() {
            let found = self.symbolize_unchanged(&executable, addrs);
            if executable.version() == before {
                return found;
            }
        }
        // What was remembered of it may be of a moment in between.
        self.entries.remove(&executable.id());
        vec![Err(Reason::FileChanged); addrs.len()]
    }

    /// Go's own table comes first; what it does not have, such as C, and all other programs have symbols and DWARF.
    fn symbolize_unchanged(
        &mut self,
        executable: &Arc<Executable>,
        addrs: &[u64],
    ) -> Vec<Result<Vec<NewFrame>, Reason>> {
        let Some(table) = go::table(executable) else { return self.symbolize_elf(executable, addrs) };
        let of_go: Vec<_> = addrs.iter().map(|&addr| go::frames(&table, addr)).collect();
        let is_missing = |&(_, frames): &(&u64, &Option<_>)| frames.is_none();
        let missing: Vec<u64> = addrs.iter().zip(&of_go).filter(is_missing).map(|(&addr, _)| addr).collect();
        if missing.is_empty() {
            return of_go.into_iter().flatten().map(Ok).collect();
        }
        let mut others = self.symbolize_elf(executable, &missing).into_iter();
        let other =
            |frames: Option<_>| frames.map(Ok).or_else(|| others.next()).unwrap_or(Err(Reason::Malformed));
        of_go.into_iter().map(other).collect()
    }

    /// Counts what the file takes by then, and makes room for it by forgetting others, the longest unused first.
    fn symbolize_elf(
        &mut self,
        executable: &Arc<Executable>,
        addrs: &[u64],
    ) -> Vec<Result<Vec<NewFrame>, Reason>> {
        let _mapping = file_pages::mapping_files();
        self.make_room(executable.id());
        let before = heap::held_bytes();
        let found = self.symbolize_named(executable, addrs);
        let held = heap::held_bytes() - before - bytes_of(&found).cast_signed();
        if let Some(entry) = self.entries.get_mut(&executable.id()) {
            entry.bytes = entry.bytes.saturating_add_signed(held);
        }
        while self.bytes() > self.bytes_max && self.forget_longest_unused(executable.id()) {}
        found
    }

    /// By what is known from the store, then by symbols and DWARF.
    fn symbolize_named(
        &mut self,
        executable: &Arc<Executable>,
        addrs: &[u64],
    ) -> Vec<Result<Vec<NewFrame>, Reason>> {
        let now = Instant::now();
        if !self.entries.contains_key(&executable.id()) {
            let entry = Entry::new(executable, now, self.debug_file(executable), self.store.as_deref());
            self.entries.insert(executable.id(), entry);
        }
        let entry = self.entries.get_mut(&executable.id()).expect("it was there or was inserted");
        entry.used_at = now;
        let Some(store) = self.store.as_deref() else { return self.load_and_symbolize(executable, addrs) };
        let known: Vec<_> = addrs.iter().map(|&addr| entry.names.get(addr)).collect();
        let is_missing = |&(_, frames): &(&u64, &Option<_>)| frames.is_none();
        let missing: Vec<u64> = addrs.iter().zip(&known).filter(is_missing).map(|(&addr, _)| addr).collect();
        store.count_look_ups((addrs.len() - missing.len()) as u64, missing.len() as u64);
        if missing.is_empty() {
            return known.into_iter().flatten().map(Ok).collect();
        }
        let found = self.load_and_symbolize(executable, &missing);
        if let Some(entry) = self.entries.get_mut(&executable.id()) {
            entry.remember(&missing, &found, now);
        }
        let mut found = found.into_iter();
        let other =
            |frames: Option<_>| frames.map(Ok).or_else(|| found.next()).unwrap_or(Err(Reason::Malformed));
        known.into_iter().map(other).collect()
    }

    /// A file that makes the parser fail or panic is tried the next simpler way, and at last is [`Reason::Malformed`].
    fn load_and_symbolize(
        &mut self,
        executable: &Arc<Executable>,
        addrs: &[u64],
    ) -> Vec<Result<Vec<NewFrame>, Reason>> {
        let Some(entry) = self.entries.get_mut(&executable.id()) else {
            return vec![Err(Reason::Malformed); addrs.len()];
        };
        let mut usable = entry.loaded.is_some() || entry.load_next(&mut self.unpacked);
        while usable {
            match attempt(entry.loaded.as_mut().expect("a way was loaded"), addrs) {
                Attempt::Found(found) => return found,
                Attempt::Shrank => {
                    self.entries.remove(&executable.id());
                    return vec![Err(Reason::FileChanged); addrs.len()];
                }
                Attempt::Panicked => self.panics += 1,
                Attempt::Failed => {}
            }
            usable = entry.load_next(&mut self.unpacked);
        }
        vec![Err(Reason::Malformed); addrs.len()]
    }

    /// Releases the symbols of files that nothing was asked of for a while, and saves names that wait for it.
    pub(super) fn release_idle(&mut self, now: Instant) {
        let _unmapping = file_pages::mapping_files();
        let store = self.store.as_deref();
        self.entries.retain(|_, entry| {
            let stays = entry.is_worth_its_memory(now);
            let is_due =
                entry.changed_at.is_some_and(|at| now.saturating_duration_since(at) >= SAVE_INTERVAL);
            if let Some(store) = store
                && (is_due || !stays)
            {
                entry.save(store);
            }
            stays
        });
    }

    /// Saves what the store does not have yet.
    pub(super) fn save(&mut self) {
        if let Some(store) = self.store.as_deref() {
            self.entries.values_mut().for_each(|entry| entry.save(store));
        }
    }

    /// How often a parser panicked since this was asked last.
    pub(super) fn take_panics(&mut self) -> u64 {
        std::mem::take(&mut self.panics)
    }

    fn make_room(&mut self, for_id: ExecutableId) {
        if self.entries.len() < LOADED_MAX || self.entries.contains_key(&for_id) {
            return;
        }
        self.forget_longest_unused(for_id);
    }

    /// False when there is no other.
    fn forget_longest_unused(&mut self, but: ExecutableId) -> bool {
        let others = self.entries.iter().filter(|(id, _)| **id != but);
        let longest_unused = others.min_by_key(|(_, entry)| entry.used_at).map(|(&id, _)| id);
        let Some(mut entry) = longest_unused.and_then(|id| self.entries.remove(&id)) else { return false };
        if let Some(store) = self.store.as_deref() {
            entry.save(store);
        }
        true
    }

    /// Bytes that all files take: of the heap, and of the memory that symbols which were unfolded lie in.
    pub(super) fn bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.bytes + entry.unfolded_bytes()).sum()
    }
}

/// Bytes of the heap that answers take.
fn bytes_of(found: &[Result<Vec<NewFrame>, Reason>]) -> usize {
    let of_frame = |frame: &NewFrame| {
        let NewFrame { function, system_name, module, file, .. } = frame;
        [function, system_name, module, file].map(String::capacity).iter().sum::<usize>()
    };
    let of_frames = |frames: &Vec<NewFrame>| {
        frames.capacity() * size_of::<NewFrame>() + frames.iter().map(of_frame).sum::<usize>()
    };
    size_of_val(found) + found.iter().flatten().map(of_frames).sum::<usize>()
}

impl Drop for NativeSymbols {
    fn drop(&mut self) {
        let _unmapping = file_pages::mapping_files();
        self.entries.clear();
    }
}

enum Attempt {
    Found(Vec<Result<Vec<NewFrame>, Reason>>),
    Failed,
    Panicked,
    Shrank,
}

/// One call of blazesym over bytes that nobody vouches for. A panic leaves `loaded` in an unknown state: drop it.
fn attempt(loaded: &mut Loaded, addrs: &[u64]) -> Attempt {
    let symbolize = || catch_unwind(AssertUnwindSafe(|| loaded.symbolize(addrs)));
    match file_pages::bounded(|| sigbus::guard(symbolize)) {
        Err(sigbus::FileShrank) => Attempt::Shrank,
        Ok(Err(_panic)) => Attempt::Panicked,
        Ok(Ok(Err(LoadedError::Shrank))) => Attempt::Shrank,
        Ok(Ok(Err(LoadedError::Failed))) => Attempt::Failed,
        Ok(Ok(Ok(found))) => Attempt::Found(found),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use proptest::test_runner::Config;

    use super::*;
    use crate::executable::testing::{at, compile, read, run};
    use crate::executable::{ExecutableCache, ExecutableError};

    pub(in crate::symbolize) const PROGRAM: &str = "
        static inline __attribute__((always_inline)) int inlined(int x) {
            __asm__ volatile (\"nop; nop; nop; nop; nop; nop; nop; nop\");
            return x * 3;
        }
        __attribute__((noinline)) int hot(int x) { __asm__ volatile (\"nop\");
            x = x + 1;
            return inlined(x);
        }
        int main(int argc, char **argv) { return hot(argc); }
    ";

    /// A program whose `main` has two million inlined calls in each other.
    const DEEP: &str = r#"
        .text
        .globl main
        .type main,%function
        .file 1 "deep.c"
        main:
        .loc 1 5 0
        .Lbegin:
        .byte 0,0,0,0,0,0,0,0
        .Lend:
        .size main,.-main
        .section .debug_abbrev,"",%progbits
        .byte 1,0x11,1, 0x11,1, 0x12,7, 0x10,0x17, 0,0
        .byte 2,0x2e,1, 0x11,1, 0x12,7, 0,0
        .byte 3,0x1d,1, 0,0, 0
        .section .debug_info,"",%progbits
        .4byte .Lunit_end-.Lunit
        .Lunit:
        .2byte 4
        .4byte 0
        .byte 8
        .byte 1
        .8byte .Lbegin
        .8byte .Lend-.Lbegin
        .4byte 0
        .byte 2
        .8byte .Lbegin
        .8byte .Lend-.Lbegin
        .fill 2000000,1,3
        .fill 2000002,1,0
        .Lunit_end:
        .section .note.GNU-stack,"",%progbits
    "#;

    /// Lines of `PROGRAM`.
    const ASM_LINE: u32 = 3;
    const HOT_LINE: u32 = 6;
    const CALL_LINE: u32 = 8;

    /// Eight bytes of `nop`, x86-64, or two instructions of them, aarch64, show where `inlined` is.
    pub(in crate::symbolize) fn asm_addr(path: &Path) -> u64 {
        let elf = fs::read(path).unwrap();
        let nop: &[u8] =
            if cfg!(target_arch = "x86_64") { &[0x90; 8] } else { &[0x1f, 0x20, 0x03, 0xd5].repeat(2) };
        let offset = elf.windows(8).position(|window| window == nop).unwrap();
        let executable = read(path).unwrap();
        executable.elf_addr(crate::addr::FileOffset(offset as u64 + 4)).unwrap().0
    }

    #[test]
    fn functions_of_a_stripped_program_have_the_names_of_its_mini_debug_information() {
        let dir = tempfile::tempdir().unwrap();
        // In the symbol table, and not in the dynamic one.
        let hidden = PROGRAM.replace("((noinline)) int hot", "((noinline, visibility(\"hidden\"))) int hot");
        let path = compile(dir.path(), "mini", &hidden, &["-rdynamic"]);
        let addr = asm_addr(&path);
        let elf = blazesym::inspect::source::Source::Elf(blazesym::inspect::source::Elf::new(&path));
        let main = blazesym::inspect::Inspector::new().lookup(&elf, &["main"]).unwrap()[0][0].addr;
        let stripped = dir.path().join("stripped");
        fs::copy(&path, &stripped).unwrap();
        run(Command::new("strip").arg(&stripped));
        mini::tests::strip_to_mini(&path);
        let (executable, stripped) = (read(&path).unwrap(), read(&stripped).unwrap());
        let mut symbols = NativeSymbols::new(None, None);
        assert!(!one(&mut symbols, &stripped, addr).is_ok_and(|frames| frames[0].function == "hot"));
        check(one(&mut symbols, &executable, addr), &["hot"]);
        assert!(symbols.entries.values().any(|entry| entry.unfolded_bytes() > 0));
        // What is in the dynamic table is named by that.
        check(one(&mut symbols, &executable, main), &["main"]);
    }

    fn one(
        symbols: &mut NativeSymbols,
        executable: &Arc<Executable>,
        addr: u64,
    ) -> Result<Vec<NewFrame>, Reason> {
        let found: [_; 1] = symbols.symbolize(executable, &[addr]).try_into().unwrap();
        let [found] = found;
        found
    }

    #[track_caller]
    fn check(found: Result<Vec<NewFrame>, Reason>, names: &[&str]) {
        let found: Vec<String> = found.unwrap().into_iter().map(|frame| frame.function).collect();
        assert_eq!(found, names);
    }

    #[inline(always)]
    fn inlined_callee() -> u64 {
        let pc: u64;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: reads the instruction pointer, nothing else.
        unsafe {
            std::arch::asm!("lea {}, [rip]", out(reg) pc, options(nomem, nostack));
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: reads the instruction pointer, nothing else.
        unsafe {
            std::arch::asm!("adr {}, .", out(reg) pc, options(nomem, nostack));
        }
        pc
    }

    #[inline(never)]
    fn caller_of_inlined() -> u64 {
        std::hint::black_box(inlined_callee())
    }

    #[test]
    fn a_function_of_this_program_is_found_with_what_is_inlined_into_it() {
        let cache = ExecutableCache::new(4);
        let (executable, addr) = at(&cache, caller_of_inlined() - 1);
        let frames = one(&mut NativeSymbols::new(None, None), &executable, addr.0).unwrap();
        let [inner, outer] = frames.as_slice() else { panic!("{frames:?}") };
        // `line-tables-only` has no more of an inlined function than its last name.
        assert!(inner.function.ends_with("inlined_callee"), "{frames:?}");
        assert!(outer.function.ends_with("native::tests::caller_of_inlined"), "{frames:?}");
        assert!(outer.system_name.starts_with("_R") || outer.system_name.starts_with("_ZN"), "{frames:?}");
        assert!(frames.iter().all(|frame| frame.file.ends_with("native.rs") && frame.line > 0), "{frames:?}");
    }

    #[test]
    fn a_c_program_gives_files_call_lines_and_start_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let executable = read(&path).unwrap();
        let frames = one(&mut NativeSymbols::new(None, None), &executable, asm_addr(&path)).unwrap();
        let [inner, outer] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!((inner.function.as_str(), inner.line, inner.start_line), ("inlined", ASM_LINE, 0));
        assert_eq!((outer.function.as_str(), outer.line, outer.start_line), ("hot", CALL_LINE, HOT_LINE));
        assert_eq!(outer.file, dir.path().join("program.c").to_str().unwrap());
    }

    #[test]
    fn libc_is_named_by_its_dynamic_symbols() {
        let cache = ExecutableCache::new(4);
        let (executable, addr) = at(&cache, libc::qsort as *const () as u64);
        let frames = one(&mut NativeSymbols::new(None, None), &executable, addr.0 + 1).unwrap();
        let [frame] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!(frame.function, "qsort");
    }

    #[test]
    fn a_deleted_and_a_replaced_file_keep_their_own_symbols() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let (addr, executable) = (asm_addr(&path), read(&path).unwrap());
        fs::remove_file(&path).unwrap();
        check(one(&mut NativeSymbols::new(None, None), &executable, addr), &["inlined", "hot"]);
        compile(dir.path(), "program", &PROGRAM.replace("hot", "other"), &[]);
        check(one(&mut NativeSymbols::new(None, None), &executable, addr), &["inlined", "hot"]);
    }

    #[test]
    fn a_descriptor_used_again_never_gives_the_symbols_of_the_file_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut symbols = NativeSymbols::new(None, None);
        for name in ["first", "second", "third"] {
            let path = compile(dir.path(), name, &PROGRAM.replace("hot", name), &[]);
            let addr = asm_addr(&path);
            let executable = read(&path).unwrap();
            check(one(&mut symbols, &executable, addr), &["inlined", name]);
            symbols.release_idle(Instant::now() + IDLE_MAX);
            assert_eq!(Arc::strong_count(&executable), 1, "released symbols hold no file");
        }
    }

    #[test]
    fn at_most_so_many_files_are_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let addr = asm_addr(&path);
        let mut symbols = NativeSymbols::new(None, None);
        let executables: Vec<_> = (0..LOADED_MAX + 3).map(|_| read(&path).unwrap()).collect();
        for executable in &executables {
            check(one(&mut symbols, executable, addr), &["inlined", "hot"]);
        }
        assert_eq!(symbols.entries.len(), LOADED_MAX);
    }

    #[test]
    fn a_compressed_debug_file_is_unpacked_once_and_names_as_before() {
        let dir = tempfile::tempdir().unwrap();
        // So much debug information that unpacking is worth it.
        let many: String =
            (0..6000).map(|at| format!("struct s{at} {{ int member_{at}_of_a_struct; }} v{at};\n")).collect();
        let path = compile(
            dir.path(),
            "program",
            &format!("{many}{PROGRAM}"),
            &["-static", "-fno-eliminate-unused-debug-types"],
        );
        let addr = asm_addr(&path);
        let build_id = read(&path).unwrap().build_id().unwrap().to_string();
        let debug =
            dir.path().join(".build-id").join(&build_id[..2]).join(format!("{}.debug", &build_id[2..]));
        fs::create_dir_all(debug.parent().unwrap()).unwrap();
        run(Command::new("objcopy")
            .args(["--only-keep-debug", "--compress-debug-sections=zlib"])
            .args([&path, &debug]));
        let stripped = dir.path().join("stripped");
        run(Command::new("objcopy").arg("--strip-all").args([&path, &stripped]));
        let mut packed = with_debug_dir(dir.path());
        let expect = one(&mut packed, &read(&stripped).unwrap(), addr);
        assert!(packed.unpacked.files.is_empty());

        let mut symbols = with_debug_dir(dir.path());
        symbols.unpacked.directory = Some(dir.path().into());
        symbols.unpacked.bytes_min = 100 << 10;
        for _ in 0..2 {
            let executable = read(&stripped).unwrap();
            assert_eq!(one(&mut symbols, &executable, addr), expect);
            assert_eq!(symbols.unpacked.files.len(), 1);
            assert!(symbols.bytes() < packed.bytes() / 2, "{} of {}", symbols.bytes(), packed.bytes());
            symbols.reload(&executable);
        }
    }

    #[test]
    fn the_bytes_of_loaded_files_are_counted_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &["-static"]);
        let addr = asm_addr(&path);
        let mut symbols = NativeSymbols::new(None, None);
        let before = heap::held_bytes();
        let executables: Vec<_> = (0..3).map(|_| read(&path).unwrap()).collect();
        let opened = heap::held_bytes();
        check(one(&mut symbols, &executables[0], addr), &["inlined", "hot"]);
        let (bytes, held) = (symbols.bytes(), heap::held_bytes() - opened);
        // What is counted is what is held, but for the table that holds the entries.
        assert!(bytes > 10_000 && held.abs_diff(bytes.cast_signed()) < bytes / 5, "{bytes}, held {held}");

        symbols.bytes_max = bytes * 5 / 2;
        for executable in &executables {
            check(one(&mut symbols, executable, addr), &["inlined", "hot"]);
        }
        assert!(!symbols.entries.contains_key(&executables[0].id()) && symbols.entries.len() == 2);
        symbols.bytes_max = 1;
        check(one(&mut symbols, &executables[0], addr), &["inlined", "hot"]);
        assert_eq!(symbols.entries.len(), 1, "what was asked for last stays until it is idle");
        symbols.release_idle(Instant::now() + IDLE_MAX);
        drop(executables);
        assert_eq!(symbols.bytes(), 0);
        assert!(heap::held_bytes() - before < 20_000, "{}", heap::held_bytes() - before);
    }

    #[test]
    fn what_takes_more_memory_is_released_sooner() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let executable = read(&path).unwrap();
        let mut symbols = NativeSymbols::new(None, None);
        check(one(&mut symbols, &executable, asm_addr(&path)), &["inlined", "hot"]);
        let entry = symbols.entries.get_mut(&executable.id()).unwrap();
        let at = |seconds| entry.used_at + Duration::from_secs(seconds);
        assert!(entry.is_worth_its_memory(at(29)) && !entry.is_worth_its_memory(at(30)));
        entry.bytes = 8 << 20;
        let at = |seconds| entry.used_at + Duration::from_secs(seconds);
        assert!(entry.is_worth_its_memory(at(7)) && !entry.is_worth_its_memory(at(8)));
    }

    #[test]
    fn a_stripped_file_has_no_symbols_and_finds_those_of_its_build_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &["-static"]);
        let addr = asm_addr(&path);
        let build_id = read(&path).unwrap().build_id().unwrap().to_string();
        let debug =
            dir.path().join(".build-id").join(&build_id[..2]).join(format!("{}.debug", &build_id[2..]));
        fs::create_dir_all(debug.parent().unwrap()).unwrap();
        let stripped = dir.path().join("stripped");
        run(Command::new("objcopy").arg("--strip-all").args([&path, &stripped]));
        let executable = read(&stripped).unwrap();
        assert_eq!(one(&mut NativeSymbols::new(None, None), &executable, addr), Err(Reason::NoSymbols));

        run(Command::new("objcopy").arg("--only-keep-debug").args([&path, &debug]));
        let mut symbols = with_debug_dir(dir.path());
        let frames = one(&mut symbols, &executable, addr).unwrap();
        assert_eq!((frames[0].line, frames[1].function.as_str()), (ASM_LINE, "hot"));

        // Another program's debug information under this build id is not taken.
        let other = compile(dir.path(), "other", &PROGRAM.replace("hot", "other"), &["-static"]);
        fs::copy(other, &debug).unwrap();
        let mut symbols = with_debug_dir(dir.path());
        assert_eq!(one(&mut symbols, &executable, addr), Err(Reason::NoSymbols));
    }

    /// With another place for debug files than the distribution's.
    fn with_debug_dir(dir: &Path) -> NativeSymbols {
        let mut symbols = NativeSymbols::new(None, None);
        symbols.debug_dir = dir.into();
        symbols
    }

    #[test]
    fn a_debug_link_leads_to_a_file_of_the_distribution_with_the_same_build_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &["-static"]);
        let addr = asm_addr(&path);
        let debug_dir = tempfile::tempdir().unwrap();
        let debug = debug_dir.path().join(dir.path().strip_prefix("/").unwrap()).join("program.debug");
        fs::create_dir_all(debug.parent().unwrap()).unwrap();
        run(Command::new("objcopy").arg("--only-keep-debug").args([&path, &debug]));
        let stripped = dir.path().join("stripped");
        run(Command::new("objcopy")
            .arg("--strip-all")
            .arg(format!("--add-gnu-debuglink={}", debug.display()))
            .args([&path, &stripped]));
        let executable = read(&stripped).unwrap();
        let symbols = || with_debug_dir(debug_dir.path());
        check(one(&mut symbols(), &executable, addr), &["inlined", "hot"]);

        let other = compile(dir.path(), "other", &PROGRAM.replace("hot", "other"), &["-static"]);
        fs::copy(other, &debug).unwrap();
        assert_eq!(one(&mut symbols(), &executable, addr), Err(Reason::NoSymbols));
    }

    #[test]
    fn a_debug_link_never_leads_out_of_the_directory_of_debug_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let mut outside = (*read(&path).unwrap()).elf_with_debug_link("../../../etc/passwd");
        assert_eq!(linked_path(&outside, Path::new("/d")), None);
        outside = outside.elf_with_debug_link("/etc/passwd");
        assert_eq!(linked_path(&outside, Path::new("/d")), None);
        let inside = outside.elf_with_debug_link("program.debug");
        let expect = Path::new("/d").join(dir.path().strip_prefix("/").unwrap()).join("program.debug");
        assert_eq!(linked_path(&inside, Path::new("/d")), Some(expect));
    }

    #[test]
    fn a_restart_names_what_was_named_before_without_loading_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let addr = asm_addr(&path);
        let store = || Some(Arc::new(NameStore::open(dir.path().join("names")).unwrap()));
        let mut symbols = NativeSymbols::new(store(), None);
        let executable = read(&path).unwrap();
        let before = one(&mut symbols, &executable, addr);
        symbols.save();

        let mut symbols = NativeSymbols::new(store(), None);
        let executable = read(&path).unwrap();
        assert_eq!(one(&mut symbols, &executable, addr), before);
        assert!(symbols.entries[&executable.id()].loaded.is_none());
        // What is not known is looked up as ever.
        check(one(&mut symbols, &executable, addr + 1), &["inlined", "hot"]);
        assert!(symbols.entries[&executable.id()].loaded.is_some());

        // Another program at the same path has names of its own.
        compile(dir.path(), "program", &PROGRAM.replace("hot", "other"), &[]);
        check(
            one(&mut NativeSymbols::new(store(), None), &read(&path).unwrap(), addr),
            &["inlined", "other"],
        );
    }

    #[test]
    fn programs_that_claim_one_build_id_are_named_by_their_own_content() {
        let dir = tempfile::tempdir().unwrap();
        let store = || Some(Arc::new(NameStore::open(dir.path().join("names")).unwrap()));
        let claimed = "-Wl,--build-id=0x0123456789abcdef0123456789abcdef01234567";
        let real = compile(dir.path(), "real", PROGRAM, &[claimed]);
        let doctored = compile(dir.path(), "fake", &PROGRAM.replace("hot", "bad"), &[claimed]);
        let addr = asm_addr(&real);
        assert_eq!(asm_addr(&doctored), addr);
        assert_eq!(read(&doctored).unwrap().build_id(), read(&real).unwrap().build_id());
        // The forger comes first; the second turn has what the first has left on disk.
        for _ in 0..2 {
            let mut symbols = NativeSymbols::new(store(), None);
            check(one(&mut symbols, &read(&doctored).unwrap(), addr), &["inlined", "bad"]);
            check(one(&mut symbols, &read(&real).unwrap(), addr), &["inlined", "hot"]);
            symbols.save();
        }
    }

    /// A program that is the same at both ends whatever its function is called: symbols and DWARF lie between two mebibytes of
    /// data and one of zeros.
    fn large(dir: &Path, name: &str, function: &str) -> PathBuf {
        let claimed = "-Wl,--build-id=0x0123456789abcdef0123456789abcdef01234567";
        let source = format!("char data[2 << 20] = {{1}};\n{}", PROGRAM.replace("hot", function));
        let built = compile(dir, "program", &source, &[claimed]);
        let path = dir.join(name);
        let bytes = [fs::read(built).unwrap(), vec![0; 1 << 20]].concat();
        fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn a_forged_middle_poisons_no_names_of_the_original_on_disk_or_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let (real, forged) = (large(dir.path(), "real", "hot"), large(dir.path(), "forged", "bad"));
        let addr = asm_addr(&real);
        assert_eq!(asm_addr(&forged), addr);
        let cache = Arc::new(ExecutableCache::of_new_files(4));
        let store = || Some(Arc::new(NameStore::open(dir.path().join("names")).unwrap()));
        // The second turn has what the first has left on disk.
        for _ in 0..2 {
            let (forged, real) = (read(&forged).unwrap(), read(&real).unwrap());
            let ends = |executable: &Executable| {
                let identity = executable.identity();
                (identity.build_ids.clone(), identity.file_bytes, identity.content_hash)
            };
            assert_eq!(ends(&forged), ends(&real), "else the test forges nothing");
            let mut symbols = NativeSymbols::new(store(), None).with_executables(Some(Arc::clone(&cache)));
            check(one(&mut symbols, &forged, addr), &["inlined", "bad"]);
            check(one(&mut symbols, &real, addr), &["inlined", "hot"]);
            symbols.save();
        }
    }

    #[test]
    fn a_file_that_is_written_to_after_it_was_hashed_gives_no_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = large(dir.path(), "real", "hot");
        let (addr, executable) = (asm_addr(&path), read(&path).unwrap());
        let store = Arc::new(NameStore::open(dir.path().join("names")).unwrap());
        let mut symbols = NativeSymbols::new(Some(store), None);
        check(one(&mut symbols, &executable, addr), &["inlined", "hot"]);
        fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[7], 1 << 20).unwrap();
        assert_eq!(one(&mut symbols, &executable, addr), Err(Reason::FileChanged));
    }

    #[test]
    fn names_are_saved_when_a_file_is_released_or_asked_for_all_the_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let addr = asm_addr(&path);
        let store = Arc::new(NameStore::open(dir.path().join("names")).unwrap());
        let saved = || store.counts().saved.load(std::sync::atomic::Ordering::Relaxed);
        let mut symbols = NativeSymbols::new(Some(Arc::clone(&store)), None);
        let executable = read(&path).unwrap();
        check(one(&mut symbols, &executable, addr), &["inlined", "hot"]);
        symbols.release_idle(Instant::now());
        assert_eq!(saved(), 0);
        let later = Instant::now() + SAVE_INTERVAL;
        symbols.entries.get_mut(&executable.id()).unwrap().used_at = later;
        symbols.release_idle(later);
        assert_eq!((saved(), symbols.entries.len()), (1, 1));
        symbols.release_idle(later + IDLE_MAX);
        assert_eq!((saved(), symbols.entries.len()), (1, 0), "nothing new to save");
    }

    #[test]
    fn a_debug_link_is_not_followed_even_when_opening_it_would_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let debug = dir.path().join("link.debug");
        fs::copy(&path, &debug).unwrap();
        run(Command::new("objcopy").arg("--add-gnu-debuglink").arg(&debug).arg(&path));
        fs::remove_file(&debug).unwrap();
        run(Command::new("mkfifo").arg(&debug));
        check(one(&mut NativeSymbols::new(None, None), &read(&path).unwrap(), asm_addr(&path)), &["hot"]);
    }

    #[test]
    fn compressed_debug_information_is_read_and_a_bomb_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let addr = asm_addr(&path);
        let compressed = dir.path().join("compressed");
        run(Command::new("objcopy").arg("--compress-debug-sections=zlib").args([&path, &compressed]));
        let executable = read(&compressed).unwrap();
        assert!(executable.symbols().inflated_bytes > 0);
        check(one(&mut NativeSymbols::new(None, None), &executable, addr), &["inlined", "hot"]);

        // One byte less in a header than what unfolds.
        let section =
            executable.symbols().compressed.iter().max_by_key(|section| section.inflated_bytes).unwrap();
        let size_at = section.file_range.start - 16;
        let file = fs::OpenOptions::new().write(true).open(&compressed).unwrap();
        file.write_all_at(&(section.inflated_bytes - 1).to_le_bytes(), size_at).unwrap();
        check(one(&mut NativeSymbols::new(None, None), &read(&compressed).unwrap(), addr), &["hot"]);
    }

    /// blazesym would recurse into each inlined call and overflow its stack, which ends the process.
    #[test]
    fn debug_information_without_end_of_nesting_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("deep.s");
        fs::write(&source, DEEP).unwrap();
        let path = dir.path().join("deep");
        run(Command::new("cc").arg("-no-pie").arg("-o").arg(&path).arg(&source));
        let executable = read(&path).unwrap();
        assert!(executable.symbols().has_debug_info);
        let elf = blazesym::inspect::Inspector::new();
        let elf_source = blazesym::inspect::source::Source::Elf(blazesym::inspect::source::Elf::new(&path));
        let main = elf.lookup(&elf_source, &["main"]).unwrap()[0][0].addr;
        check(one(&mut NativeSymbols::new(None, None), &executable, main), &["main"]);
    }

    #[test]
    fn a_file_that_shrinks_while_it_is_loaded_is_said_to_have_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &["-static"]);
        let (addr, executable) = (asm_addr(&path), read(&path).unwrap());
        let mut symbols = NativeSymbols::new(None, None);
        sigbus::install().unwrap();
        check(one(&mut symbols, &executable, addr), &["inlined", "hot"]);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        // Another function, in a unit that was not read yet.
        let found = symbols.symbolize(&executable, &[addr - 64, addr + 4096, addr + 65536]);
        assert!(found.contains(&Err(Reason::FileChanged)), "{found:?}");
    }

    #[test]
    fn a_file_cut_anywhere_gives_an_error_or_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &[]);
        let (addr, whole) = (asm_addr(&path), fs::read(&path).unwrap());
        let cut = dir.path().join("cut");
        for bytes in (0..whole.len()).step_by(61) {
            fs::write(&cut, &whole[..bytes]).unwrap();
            match read(&cut) {
                Ok(executable) => drop(one(&mut NativeSymbols::new(None, None), &executable, addr)),
                Err(error) => assert!(matches!(error, ExecutableError::Elf { .. }), "{error} at {bytes}"),
            }
        }
    }

    /// CPU time of this thread, in nanoseconds.
    fn cpu_ns() -> u64 {
        let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    }

    /// Nanoseconds an address that was not asked for before, of code that was: its file and its units are loaded.
    fn warm_ns(function: u64) -> u64 {
        const ADDRS: u64 = 8192;
        // Odd, so that addresses fall anywhere in functions and lines.
        const STEP: u64 = 61;
        let (executable, first) = at(&ExecutableCache::new(4), function);
        let (loading, measured): (Vec<u64>, Vec<u64>) =
            (0..ADDRS / 2).map(|at| first.0 + at * 2 * STEP).map(|addr| (addr, addr + STEP)).unzip();
        let mut symbols = NativeSymbols::new(None, None);
        symbols.symbolize(&executable, &loading);
        let start = cpu_ns();
        // In batches, as the symbolizer threads ask.
        let named: usize = measured
            .chunks(64)
            .map(|addrs| symbols.symbolize(&executable, addrs).iter().filter(|found| found.is_ok()).count())
            .sum();
        let ns = cpu_ns() - start;
        assert!(named * 10 > measured.len() * 9, "{named} of {} have names", measured.len());
        ns / measured.len() as u64
    }

    #[test]
    #[ignore = "a measurement, by cargo xtask bench unwind"]
    fn measure_a_warm_address() {
        let with_lines = warm_ns(measure_a_warm_address as *const () as u64);
        let by_symbols = warm_ns(libc::qsort as *const () as u64);
        println!("\nMEASURED {{\"with_lines_ns\": {with_lines}, \"by_symbols_ns\": {by_symbols}}}");
    }

    proptest! {
        #![proptest_config(Config { cases: 512, ..Config::default() })]

        #[test]
        fn a_file_with_wrong_bytes_gives_an_error_or_an_answer(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..200)
        ) {
            static COMPILED: LazyLock<(u64, Vec<u8>)> = LazyLock::new(|| {
                let dir = tempfile::tempdir().unwrap();
                let path = compile(dir.path(), "program", PROGRAM, &[]);
                (asm_addr(&path), fs::read(&path).unwrap())
            });
            let (addr, mut bytes) = COMPILED.clone();
            for (at, with) in changes {
                let at = at.index(bytes.len());
                bytes[at] = with;
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), &bytes).unwrap();
            if let Ok(executable) = read(file.path()) {
                let mut symbols = NativeSymbols::new(None, None);
                let _ = symbols.symbolize(&executable, &[addr, addr - 4, 0, u64::MAX]);
                prop_assert!(symbols.entries.len() <= 1);
            }
        }
    }
}
