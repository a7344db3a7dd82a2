//! Pages of the files that the symbolizer maps: given back while it reads, and after.
//!
//! blazesym maps a file whole and walks through all of its units to find one. With each page that is read, the kernel maps
//! those around it that are in the page cache (64 KiB, `fault_around_bytes`), so that a file's debug information is resident
//! as a whole when the first name of it is known. Dropping pages of a shared mapping costs nothing but the next fault. But it
//! must be a mapping of such a file still: what another thread has mapped in its place would lose its content. So pages are
//! given back by who has the files mapped, in a signal that comes every millisecond, or by whoever finds that nobody maps or
//! unmaps any.

use std::{
    cell::{Cell, OnceCell},
    ffi::CStr,
    fs::File,
    hint,
    io::{self, Read as _},
    marker::PhantomData,
    mem::MaybeUninit,
    ptr,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};

use super::page::page_bytes;

/// Time between two looks of a thread at how much is resident. Not its CPU time, which timers go by only with the
/// kernel's tick, of up to 10 ms.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Pages, in bytes, that may come to be resident before they are given back: finding the mappings takes 0.1 ms.
const GROWTH_MAX: u64 = 4 << 20;
/// Files smaller than this stay mapped as they are.
const FILE_BYTES_MIN: u64 = 1 << 20;

/// Threads that map or unmap files now, or [`RELEASING`] and one of them, or none, which gives pages back.
static FILES: AtomicU32 = AtomicU32::new(0);
const RELEASING: u32 = 1 << 31;

/// A thread in the midst of a file has pages to give back, which it may not while others map files, too.
static WANTED: AtomicBool = AtomicBool::new(false);
/// How long others wait for it between two of their files: it looks every [`LOOK_INTERVAL`].
const WANTED_MAX: Duration = Duration::from_millis(5);

/// Where [`file_bytes`] stood after pages were given back last.
static SETTLED_BYTES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// How often this thread counts in [`FILES`].
    static HELD: Cell<u32> = const { Cell::new(0) };
    /// What interrupts this thread; `None` where it cannot be had.
    static TIMER: OnceCell<Option<Timer>> = const { OnceCell::new() };
}

/// Somebody maps or unmaps files shared, whole and for reading, as blazesym does. Of the thread that made it.
pub(crate) struct MappingFiles {
    _of_this_thread: PhantomData<*const ()>,
}

/// To be held by those who do.
pub(crate) fn mapping_files() -> MappingFiles {
    if HELD.get() == 0 && WANTED.load(Relaxed) {
        let end = Instant::now() + WANTED_MAX;
        while WANTED.load(Relaxed) && Instant::now() < end {
            thread::sleep(LOOK_INTERVAL / 4);
        }
    }
    while FILES.fetch_update(Acquire, Relaxed, |files| (files & RELEASING == 0).then_some(files + 1)).is_err()
    {
        // For as long as some calls of madvise take.
        thread::yield_now();
    }
    HELD.set(HELD.get() + 1);
    MappingFiles { _of_this_thread: PhantomData }
}

impl Drop for MappingFiles {
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
        FILES.fetch_sub(1, Release);
    }
}

/// Runs `read`, which maps files and reads them on this thread, and gives pages back meanwhile when there are many.
pub(crate) fn bounded<T>(read: impl FnOnce() -> T) -> T {
    let _files = mapping_files();
    TIMER.with(|timer| {
        let timer = timer.get_or_init(|| Timer::new().ok());
        let _armed = timer.as_ref().map(Timer::arm);
        hint::black_box(read())
    })
}

/// Resident pages of files, this program's own among them, in bytes. Source: proc_pid_statm(5), `shared`.
pub(crate) fn file_bytes() -> u64 {
    let mut text = [0; 128];
    let read = open_own(c"/proc/self/statm").and_then(|mut file| file.read(&mut text));
    let mut numbers = text.get(..read.unwrap_or_default()).unwrap_or_default().split(|&byte| byte == b' ');
    numbers.nth(2).and_then(|pages| number(pages, 10)).unwrap_or_default() * page_bytes()
}

/// Unmaps the pages of files that are mapped shared, whole and for reading: those that blazesym reads. The mappings stay,
/// and a page that is read again comes from the page cache for the price of a fault. `false`, and nothing done, while such a
/// mapping may come or go.
pub(crate) fn release_file_pages() -> bool {
    if FILES.compare_exchange(0, RELEASING, Acquire, Relaxed).is_err() {
        return false;
    }
    release_pages();
    FILES.store(0, Release);
    true
}

/// To be called by who has made [`FILES`] say that it alone may.
fn release_pages() {
    // Where the list cannot be read to its end, the rest stays.
    let _ = each_mapping(|start, end| {
        // SAFETY: the pages are those of a file mapped shared and for reading: what is dropped here is read back as it is in
        // the file. The mapping is still there, since those who unmap such are kept out, or are this thread, which does not.
        unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
    });
    SETTLED_BYTES.store(file_bytes(), Relaxed);
}

/// Start and end of each large mapping of a file that is shared and for reading. Takes no memory but its stack's.
fn each_mapping(mut each: impl FnMut(u64, u64)) -> io::Result<()> {
    let mut file = open_own(c"/proc/self/maps")?;
    let (mut buffer, mut filled) = ([0_u8; 8192], 0);
    loop {
        let read = file.read(buffer.get_mut(filled..).unwrap_or_default())?;
        if read == 0 {
            // The end, or a line that is longer than any path may be.
            return Ok(());
        }
        filled += read;
        let lines = buffer.get(..filled).unwrap_or_default();
        let whole = lines.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let of_files = lines.get(..whole).unwrap_or_default().split(|&byte| byte == b'\n');
        of_files.filter_map(shared_file).for_each(|(start, end)| each(start, end));
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Start and end of a mapping that is shared, for reading, and of a large file from its start. Neither a segment of a program
/// is one, which is private, nor memory shared with the kernel or a device, whose pages would not come again.
fn shared_file(line: &[u8]) -> Option<(u64, u64)> {
    let mut fields = line.split(|&byte| byte == b' ').filter(|field| !field.is_empty());
    let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let path = fields.nth(2)?;
    let mut ends = range.split(|&byte| byte == b'-').map(|end| number(end, 16));
    let (start, end) = (ends.next()??, ends.next()??);
    let is_file = path.starts_with(b"/") && !path.starts_with(b"/dev/");
    let is_wanted = is_file && permissions == b"r--s" && number(offset, 16) == Some(0);
    (is_wanted && end.checked_sub(start)? >= FILE_BYTES_MIN).then_some((start, end))
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}

/// Opens a file of `/proc` for reading. One system call and no memory, as a signal handler may.
fn open_own(path: &CStr) -> io::Result<File> {
    Ok(File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
}

/// A timer, and the signal that it sends to this thread.
struct Timer(libc::timer_t);

impl Timer {
    fn new() -> io::Result<Self> {
        install()?;
        // SAFETY: all fields are integers and pointers, for which zeros are values.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        // SAFETY: only returns a number.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = ptr::null_mut();
        // SAFETY: both pointers are to values of this frame that have the types asked for.
        let made = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        if made == 0 { Ok(Self(timer)) } else { Err(io::Error::last_os_error()) }
    }

    /// Has it send signals until the value that is returned is dropped.
    fn arm(&self) -> Armed<'_> {
        self.set(LOOK_INTERVAL);
        Armed(self)
    }

    fn set(&self, interval: Duration) {
        let interval = libc::timespec {
            tv_sec: interval.as_secs().try_into().unwrap_or_default(),
            tv_nsec: interval.subsec_nanos().into(),
        };
        let times = libc::itimerspec { it_interval: interval, it_value: interval };
        // SAFETY: the timer is there until this value is dropped, and the times are of this frame. Where it fails, pages are
        // given back later.
        unsafe { libc::timer_settime(self.0, 0, &raw const times, ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: timer_create gave it, and it is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

struct Armed<'a>(&'a Timer);

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.0.set(Duration::ZERO);
        WANTED.store(false, Relaxed);
    }
}

/// Nobody else in this program takes one of the real-time signals.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

/// Installs the handler for the whole process, once.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: all fields are integers and pointers, for which zeros are values: an empty mask among them.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = on_tick as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler's type is that of one without SA_SIGINFO, and what it calls is named there.
        let done = unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// Runs in between two instructions of a thread that reads mapped files: so that thread is not about to unmap one. It makes
/// bare system calls and takes no memory; signal-safety(7).
extern "C" fn on_tick(_signal: libc::c_int) {
    // SAFETY: only gives a place, which is this thread's own.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: it is there for as long as the thread. What was interrupted may be about to look at it.
    let errno = unsafe { place.read() };
    let held = HELD.get();
    if held > 0 && file_bytes() >= SETTLED_BYTES.load(Relaxed).saturating_add(GROWTH_MAX) {
        let is_alone = FILES.compare_exchange(held, held | RELEASING, Acquire, Relaxed).is_ok();
        if is_alone {
            release_pages();
            FILES.store(held, Release);
        }
        WANTED.store(!is_alone, Relaxed);
    }
    // SAFETY: as above.
    unsafe { place.write(errno) };
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, os::fd::AsRawFd as _};

    use super::*;

    const BYTES: usize = 16 << 20;

    /// A file of [`BYTES`] bytes, mapped whole, and what it holds.
    fn map() -> (&'static [u8], Vec<u8>) {
        let content: Vec<u8> = (0..BYTES).map(|at| (at / 4096) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&content).expect("room for it");
        let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), BYTES, prot, flags, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping is never unmapped, and the file neither changed nor made shorter.
        (unsafe { std::slice::from_raw_parts(start.cast(), BYTES) }, content)
    }

    fn resident_pages(map: &[u8]) -> usize {
        let maps = fs::read_to_string("/proc/self/smaps").expect("own mappings");
        let head = format!("{:x}-", map.as_ptr() as usize);
        let rss = maps
            .lines()
            .skip_while(|line| !line.starts_with(&head))
            .find_map(|line| line.strip_prefix("Rss:"));
        rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok()).expect("its size")
            / 4
    }

    #[test]
    fn pages_of_a_file_that_was_read_are_given_back_and_come_again() {
        let (map, content) = map();
        let mapping = mapping_files();
        assert!(map == content);
        assert_eq!(resident_pages(map), BYTES / 4096);
        assert!(!release_file_pages());
        drop(mapping);
        // Other tests map files, too.
        while !release_file_pages() {
            thread::yield_now();
        }
        assert_eq!(resident_pages(map), 0);
        assert!(map == content);
    }

    #[test]
    fn who_reads_for_long_gives_pages_back_meanwhile() {
        let (map, content) = map();
        let end = Instant::now() + Duration::from_secs(60);
        bounded(|| {
            loop {
                assert!(map == content);
                if resident_pages(map) < BYTES / 4096 {
                    break;
                }
                assert!(Instant::now() < end, "all of it stays");
            }
        });
        assert_eq!(HELD.get(), 0);
    }

    #[test]
    fn nothing_is_given_back_while_another_thread_maps_files() {
        let (map, content) = map();
        let (told, done) = std::sync::mpsc::channel::<()>();
        let (tell, other) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                let _mapping = mapping_files();
                tell.send(()).expect("somebody waits");
                let _ = done.recv();
            });
            other.recv().expect("it maps");
            bounded(|| {
                for _ in 0..20 {
                    assert!(map == content);
                    on_tick(signal());
                }
            });
            assert_eq!(resident_pages(map), BYTES / 4096);
            drop(told);
        });
    }

    #[test]
    fn only_large_files_mapped_shared_and_for_reading_are_meant() {
        let range = |line: &str| shared_file(line.as_bytes());
        let line = "7f0000000000-7f0000200000 r--s 00000000 fe:00 7    /usr/lib/debug/with space";
        assert_eq!(range(line), Some((0x7f00_0000_0000, 0x7f00_0020_0000)));
        assert_eq!(range(&line.replace("/usr/lib/debug", "/memfd:x (deleted)")), range(line));
        for (from, to) in [
            ("r--s", "r--p"),
            ("r--s", "rw-s"),
            ("00000000 fe", "00001000 fe"),
            ("200000", "080000"),
            ("/usr/lib/debug/with space", "anon_inode:bpf-map"),
            ("/usr/lib/debug/with space", "/dev/mem"),
            ("/usr/lib/debug/with space", ""),
        ] {
            assert_eq!(range(&line.replace(from, to)), None, "{to:?}");
        }
        assert_eq!(range(""), None);
    }
}
