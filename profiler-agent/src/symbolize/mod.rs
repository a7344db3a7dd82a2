//! Addresses to functions, files and lines, off the drain path.

mod cache;
mod debug_store;
mod debuginfod;
mod demangle;
mod generated;
mod go;
mod inflate;
mod kernel;
mod mini;
mod names;
mod native;
mod nesting;
mod packed;
mod pclntab;
mod perf_map;
mod queue;
mod store;
mod symtab;
mod unpack;

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use crate::addr::{Addr, ElfAddr};
use crate::background::{Background, Payer, Task};
use crate::executable::{Executable, ExecutableCache, ExecutableId};
use crate::memory::MemoryPlan;
use crate::process::GeneratedCode;
use crate::sys::{file_pages, memory, sigbus};
pub(crate) use debuginfod::{DebugInfod, DebugInfodCounts, Fetcher};
use generated::GeneratedSymbols;
pub(crate) use kernel::BUILT_IN as KERNEL;
use kernel::KernelSymbols;
use native::NativeSymbols;
use queue::{Lane, Queue, Source, Work};
pub(crate) use store::{NameStore, StoreCounts};

/// Stack of a symbolizer thread: DWARF nests as deep as calls were inlined, and the parser recurses with it. Only
/// touched pages cost memory.
const STACK_BYTES: usize = 64 << 20;

/// How long a thread waits for work before it looks for symbols to release.
const IDLE: Duration = Duration::from_secs(5);

/// A thread that has read files gives their pages and its free memory back this often.
const RELEASE_INTERVAL: Duration = Duration::from_secs(5);

/// It does so at once when there are so many pages of files.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A batch that is done sooner has read little.
const MUCH_WORK: Duration = Duration::from_millis(1);

/// A code address, at the look-up position: one was subtracted from return addresses already.
///
/// Equal and hashed as its [`LocationId`].
#[derive(Clone, Debug)]
pub(crate) enum LocationKey {
    /// In a file; holding the key keeps the file open.
    Native { executable: Arc<Executable>, addr: ElfAddr },
    /// In code that a process has generated, as it was known by this version of it.
    Generated { code: Arc<GeneratedCode>, version: u32, addr: Addr },
    /// In the kernel, a module or a BPF program.
    Kernel(Addr),
}

/// The identity of a [`LocationKey`], without the hold on its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LocationId {
    Native(ExecutableId, ElfAddr),
    /// By the version of the code, which tells processes apart too.
    Generated(u32, Addr),
    Kernel(Addr),
}

impl LocationKey {
    pub(crate) fn id(&self) -> LocationId {
        match self {
            Self::Native { executable, addr } => LocationId::Native(executable.id(), *addr),
            Self::Generated { code: _, version, addr } => LocationId::Generated(*version, *addr),
            Self::Kernel(addr) => LocationId::Kernel(*addr),
        }
    }
}

impl PartialEq for LocationKey {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for LocationKey {}

impl Hash for LocationKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id().hash(state);
    }
}

/// What is known about an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// At least one frame, innermost (most deeply inlined) first.
    Resolved(Arc<[Frame]>),
    Unresolved(Reason),
}

/// A function at an address: the one whose code it is, or one inlined into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Readable name.
    pub(crate) function: Arc<str>,
    /// Name as the linker or the kernel has it.
    pub(crate) system_name: Arc<str>,
    /// Kernel frames: `kernel`, the module, or `bpf`; else empty.
    pub(crate) module: Arc<str>,
    /// Source file; empty when unknown.
    pub(crate) file: Arc<str>,
    /// Line of the instruction, or of the call that was inlined; 0 when unknown.
    pub(crate) line: u32,
    /// Line of the function's first instruction, which is where its body begins; 0 when unknown, as for inlined ones.
    pub(crate) start_line: u32,
    /// Kernel frames: bytes from the start of the module's code, or of the program's for BPF; else 0.
    pub(crate) module_offset: u64,
}

/// A [`Frame`] whose strings are not shared yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct NewFrame {
    function: String,
    system_name: String,
    module: String,
    file: String,
    line: u32,
    start_line: u32,
    module_offset: u64,
}

/// Why an address leaves without a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reason {
    /// The file, or the kernel, has no symbols: it was stripped.
    NoSymbols,
    /// The symbols there are do not cover the address.
    NotInSymbols,
    /// The file cannot be read as ELF or DWARF, or would take more memory than it may.
    Malformed,
    /// The file was shortened while it was read.
    FileChanged,
    /// The process has no perf map: nobody told its runtime to write one.
    NoPerfMap,
    /// Its perf map is no regular file, another user's, or an earlier process's.
    PerfMapRefused,
    /// The perf map does not have the address.
    NotInPerfMap,
    /// The kernel shows no addresses: CAP_SYSLOG is missing, or kernel.kptr_restrict is 2.
    KallsymsHidden,
    /// Not ready when the window had to leave; it will be for the next.
    Late,
    /// Not asked for, since too many others wait.
    QueueFull,
}

impl Reason {
    /// Every reason, in the order of [`Counts::unresolved`].
    pub(crate) const ALL: [Self; 10] = [
        Self::NoSymbols,
        Self::NotInSymbols,
        Self::Malformed,
        Self::FileChanged,
        Self::NoPerfMap,
        Self::PerfMapRefused,
        Self::NotInPerfMap,
        Self::KallsymsHidden,
        Self::Late,
        Self::QueueFull,
    ];

    /// The reason as a metric's label value.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::NoSymbols => "no_symbols",
            Self::NotInSymbols => "not_in_symbols",
            Self::Malformed => "malformed",
            Self::FileChanged => "file_changed",
            Self::NoPerfMap => "no_perf_map",
            Self::PerfMapRefused => "perf_map_refused",
            Self::NotInPerfMap => "not_in_perf_map",
            Self::KallsymsHidden => "kallsyms_hidden",
            Self::Late => "late",
            Self::QueueFull => "queue_full",
        }
    }
}

/// What happened since the start, in locations; `cache_bytes` and the two after it are of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Look-ups answered at once, when a window closed.
    pub(crate) hits: u64,
    /// Look-ups that had to wait, when a window closed.
    pub(crate) misses: u64,
    /// Locations symbolized, with or without success.
    pub(crate) symbolized: u64,
    /// Locations dropped to keep the cache within its bound.
    pub(crate) evictions: u64,
    /// Prefetches not taken because the queue was full; the window's close asks again.
    pub(crate) prefetch_refused: u64,
    /// By [`Reason::ALL`]. `Late` and `QueueFull` count look-ups; the others what was symbolized.
    pub(crate) unresolved: [u64; Reason::ALL.len()],
    /// Panics of a parser that were caught.
    pub(crate) parser_panics: u64,
    /// Bytes read of perf maps.
    pub(crate) perf_map_bytes: u64,
    /// Lines of perf maps that were left out: not as documented, too long, or too many.
    pub(crate) perf_map_lines_left_out: u64,
    pub(crate) cache_bytes: u64,
    pub(crate) cached: u64,
    pub(crate) waiting: u64,
}

/// Symbolizes each location once and remembers it within a bound.
///
/// Two threads do the work: one for files with large symbols, whose first look-up may take a second, and one for all
/// others and the kernel, which therefore never wait behind those. Dropping ends both after the batch in hand.
#[derive(Debug)]
pub(crate) struct Symbols {
    queue: Arc<Queue>,
    /// Empty once they were handed out to be joined.
    threads: Mutex<Vec<JoinHandle<()>>>,
    store: Option<Arc<NameStore>>,
    debuginfod: Option<Arc<DebugInfod>>,
}

/// Where names come from beside the files and the kernel of this machine, and when.
#[derive(Default)]
pub(crate) struct Sources {
    /// Keeps names of executables on disk.
    pub(crate) store: Option<Arc<NameStore>>,
    /// Asks servers for debug information.
    pub(crate) fetcher: Option<Fetcher>,
    /// Finds copies of one executable.
    pub(crate) executables: Option<Arc<ExecutableCache>>,
    /// What no window waits for yet is gathered for so long: a file whose tables are read for each batch is read once for all
    /// of it.
    pub(crate) gather: Duration,
}

impl Symbols {
    /// Starts the threads. `proc_root` is `/proc`; `plan` bounds what is remembered and what is loaded.
    ///
    /// # Errors
    /// A thread or the signal handler that guards it cannot be had.
    pub(crate) fn start(
        proc_root: &Path,
        plan: &MemoryPlan,
        sources: Sources,
        background: &Arc<Background>,
    ) -> io::Result<Self> {
        sigbus::install()?;
        let Sources { store, fetcher, executables, gather } = sources;
        let queue = Arc::new(Queue::new(gather, plan.symbols_bytes));
        let loaded_bytes_max = plan.symbol_files_bytes / Lane::ALL.len();
        let debuginfod = fetcher.as_ref().map(Fetcher::debuginfod);
        let symbols = Self { queue, threads: Mutex::default(), store, debuginfod };
        if let Some(fetcher) = fetcher {
            let thread = fetcher.start(Arc::clone(&symbols.queue))?;
            symbols.threads().push(thread);
        }
        for (lane, name) in Lane::ALL {
            let queue = Arc::clone(&symbols.queue);
            let kernel = KernelSymbols::new(proc_root);
            let generated = GeneratedSymbols::new(proc_root);
            let (store, debuginfod) = (symbols.store.clone(), symbols.debuginfod.clone());
            let executables = executables.clone();
            let payer = Payer::new(background, Task::Names);
            let thread =
                thread::Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(move || {
                    let native = NativeSymbols::new(store, debuginfod)
                        .with_executables(executables)
                        .with_bytes_max(loaded_bytes_max);
                    work(&queue, lane, payer, kernel, generated, native);
                })?;
            symbols.threads().push(thread);
        }
        Ok(symbols)
    }

    /// Asks for a location ahead of time. Never waits for a file: a full queue is counted, and the location is asked for
    /// again when its window closes.
    pub(crate) fn prefetch(&self, key: LocationKey) {
        self.queue.prefetch(key);
    }

    /// What is known of each key by `deadline`; each key gets an answer. What is late is symbolized all the same, for
    /// the next window.
    pub(crate) fn resolve(
        &self,
        keys: impl IntoIterator<Item = LocationKey>,
        deadline: Instant,
    ) -> HashMap<LocationId, Location> {
        self.queue.resolve(keys, deadline)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.queue.counts()
    }

    /// Of the names kept on disk, if they are.
    pub(crate) fn store_counts(&self) -> Option<&StoreCounts> {
        self.store.as_deref().map(NameStore::counts)
    }

    /// The servers for debug information, if any are asked.
    pub(crate) fn debuginfod(&self) -> Option<&DebugInfod> {
        self.debuginfod.as_deref()
    }
}

impl Symbols {
    /// A symbolizer that has ended by itself, which none does but by a panic.
    pub(crate) fn dead_thread(&self) -> Option<&'static str> {
        self.threads().iter().any(JoinHandle::is_finished).then_some("symbolize")
    }

    /// Ends the threads after the batch in hand; they save the names that are not on disk yet. For the caller to join.
    pub(crate) fn close(&self) -> Vec<JoinHandle<()>> {
        self.queue.close();
        if let Some(debuginfod) = &self.debuginfod {
            debuginfod.close();
        }
        std::mem::take(&mut *self.threads())
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Symbols {
    fn drop(&mut self) {
        for thread in self.close() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

/// The life of a symbolizer thread.
fn work(
    queue: &Queue,
    lane: Lane,
    mut payer: Payer,
    mut kernel: KernelSymbols,
    mut generated: GeneratedSymbols,
    mut native: NativeSymbols,
) {
    let mut releases = Releases::new();
    payer.begin();
    loop {
        releases.release_if_due();
        let Work { source, addrs } = match queue.take(lane, IDLE) {
            queue::Next::Work(work) => work,
            queue::Next::Idle => {
                native.release_idle(Instant::now());
                generated.release_idle(Instant::now());
                continue;
            }
            queue::Next::Closed => return native.save(),
        };
        payer.pay();
        while let Some(wait) = payer.wait(Instant::now()) {
            native.release_idle(Instant::now());
            generated.release_idle(Instant::now());
            if queue.rest(wait) {
                return native.save();
            }
        }
        let (began, id) = (Instant::now(), source.id());
        match source {
            Source::File(executable) => {
                let ids = addrs.iter().map(|&addr| LocationId::Native(executable.id(), ElfAddr(addr)));
                let found = native.symbolize(&executable, &addrs);
                queue.finish(ids.zip(found), native.take_panics());
            }
            Source::Reload(executable) => {
                native.reload(&executable);
                queue.forget_executable(executable.id());
            }
            Source::Generated { code, version } => {
                let found = generated.symbolize(&code, &addrs, Instant::now());
                let ids = addrs.iter().map(|&addr| LocationId::Generated(version, Addr(addr)));
                queue.finish(ids.zip(found), 0);
                queue.count_perf_maps(generated.take_counts());
            }
            Source::Kernel => {
                let addrs: Vec<Addr> = addrs.into_iter().map(Addr).collect();
                // An unreadable kallsyms shows in the counts: every kernel frame is without a symbol.
                if kernel.refresh(&addrs, Instant::now()).unwrap_or(false) {
                    queue.forget_kernel();
                }
                queue.finish(addrs.iter().map(|&addr| (LocationId::Kernel(addr), kernel.frames(addr))), 0);
            }
        }
        let took = began.elapsed();
        releases.has_worked |= took >= MUCH_WORK;
        queue.took(lane, id, took);
        native.release_idle(Instant::now());
        generated.release_idle(Instant::now());
    }
}

/// When a thread gives back what it no longer needs.
struct Releases {
    at: Instant,
    has_worked: bool,
    /// Pages of files, in bytes, that stayed at the last time: those of this program.
    file_bytes: u64,
}

impl Releases {
    fn new() -> Self {
        Self { at: Instant::now(), has_worked: false, file_bytes: file_pages::file_bytes() }
    }

    fn release_if_due(&mut self) {
        if !self.has_worked {
            return;
        }
        let is_late = self.at.elapsed() >= RELEASE_INTERVAL;
        if !is_late && file_pages::file_bytes() < self.file_bytes + FILE_BYTES_MAX {
            return;
        }
        if is_late {
            memory::release_free();
        }
        if file_pages::release_file_pages() {
            self.file_bytes = file_pages::file_bytes();
            if is_late {
                (self.at, self.has_worked) = (Instant::now(), false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executable::ExecutableCache;
    use crate::executable::testing::at;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn names(location: &Location) -> Vec<&str> {
        match location {
            Location::Resolved(frames) => frames.iter().map(|frame| &*frame.function).collect(),
            Location::Unresolved(reason) => panic!("{reason:?}"),
        }
    }

    /// A function's line of kallsyms, as the kernel shows it to this process.
    fn line_of_kallsyms(name: &str) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/kallsyms").unwrap();
        let mut lines = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let line = lines.find(|fields| matches!(fields.as_slice(), [_, "T", found] if *found == name));
        line.and_then(|fields| u64::from_str_radix(fields[0], 16).ok())
    }

    #[test]
    fn one_call_names_a_program_a_library_and_the_kernel() {
        let cache = ExecutableCache::new(4);
        let (executable, addr) = at(&cache, soon as *const () as u64);
        let own = LocationKey::Native { executable, addr };
        let (executable, addr) = at(&cache, libc::qsort as *const () as u64);
        let library = LocationKey::Native { executable, addr };
        let kernel_addr = line_of_kallsyms("vfs_read").expect("every kernel has vfs_read");
        let kernel = LocationKey::Kernel(Addr(kernel_addr + 1));
        let background = Arc::new(Background::new(crate::budget::TERM, Instant::now()));
        let plan = MemoryPlan::for_limit(64 << 20, false).unwrap();
        let symbols = Symbols::start(Path::new("/proc"), &plan, Sources::default(), &background).unwrap();
        symbols.prefetch(own.clone());

        let found = symbols.resolve([own.clone(), library.clone(), kernel.clone()], soon());

        let own = names(&found[&own.id()]);
        assert!(own.last().unwrap().ends_with("symbolize::tests::soon"), "{own:?}");
        assert_eq!(names(&found[&library.id()]), ["qsort"]);
        match &found[&kernel.id()] {
            Location::Resolved(frames) => {
                let [frame] = &**frames else { panic!("{frames:?}") };
                let start = line_of_kallsyms("_stext").expect("every kernel has _stext");
                let expect = ("kernel", "vfs_read", kernel_addr + 1 - start);
                assert_eq!((&*frame.module, &*frame.function, frame.module_offset), expect);
            }
            Location::Unresolved(reason) => {
                assert_eq!((*reason, kernel_addr), (Reason::KallsymsHidden, 0));
            }
        }
        let counts = symbols.counts();
        assert_eq!((counts.symbolized, counts.cached, counts.waiting), (3, 3, 0), "{counts:?}");
    }

    #[test]
    fn keys_are_equal_by_executable_and_address() {
        let cache = ExecutableCache::new(4);
        let (executable, addr) = at(&cache, soon as *const () as u64);
        let key = |addr| LocationKey::Native { executable: Arc::clone(&executable), addr };
        assert_eq!(key(addr), key(addr));
        assert_ne!(key(addr), key(ElfAddr(addr.0 + 1)));
    }
}
