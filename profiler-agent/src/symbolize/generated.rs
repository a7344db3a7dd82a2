//! Addresses of generated code by the perf maps of their processes.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::demangle::demangle;
use super::perf_map::{PerfMap, readable};
use super::{NewFrame, Reason};
use crate::addr::Addr;
use crate::process::{GeneratedCode, PerfMapError};

/// Time between two looks at one perf map.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A map that nothing was asked of for so long is released: by then its functions are remembered.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Processes whose generated code is looked up at a time.
const MAPS_MAX: usize = 256;

/// Ranges of all maps together; 40 bytes each.
const ALL_RANGES_MAX: usize = 256 << 10;

/// Bytes read of one map.
const MAP_BYTES_MAX: u64 = 64 << 20;

/// Bytes read in one look; what is behind them waits for the next.
const LOOK_BYTES_MAX: u64 = 16 << 20;

const CHUNK_BYTES: usize = 64 << 10;

/// Bytes in front of the end that are compared to tell a file that has grown from one that was written anew.
const TAIL_BYTES: usize = 64;

/// What was read of perf maps since the counts were taken last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PerfMapCounts {
    pub(super) bytes: u64,
    pub(super) lines_left_out: u64,
}

/// The perf maps that were asked last. One thread's own.
pub(super) struct GeneratedSymbols {
    proc_root: PathBuf,
    /// By the id of the code.
    known: HashMap<u32, Known>,
    counts: PerfMapCounts,
}

/// What is known of one process's generated code.
struct Known {
    file: Result<Reading, Reason>,
    looked_at: Option<Instant>,
    used_at: Instant,
}

/// A perf map as far as it was read.
struct Reading {
    file: File,
    inode: u64,
    map: PerfMap,
    /// Bytes taken from its start.
    taken: u64,
    tail: Vec<u8>,
}

impl GeneratedSymbols {
    pub(super) fn new(proc_root: &Path) -> Self {
        Self { proc_root: proc_root.into(), known: HashMap::new(), counts: PerfMapCounts::default() }
    }

    /// One answer per address, in their order. Reads what the process has written since the last look, unless that was
    /// within [`LOOK_INTERVAL`].
    pub(super) fn symbolize(
        &mut self,
        code: &Arc<GeneratedCode>,
        addrs: &[u64],
        now: Instant,
    ) -> Vec<Result<Vec<NewFrame>, Reason>> {
        self.make_room(code.id());
        let known = self.known.entry(code.id()).or_insert_with(|| Known {
            file: Err(Reason::NoPerfMap),
            looked_at: None,
            used_at: now,
        });
        known.used_at = now;
        if known.looked_at.is_none_or(|looked_at| now.duration_since(looked_at) >= LOOK_INTERVAL) {
            known.looked_at = Some(now);
            let read = known.look(code, &self.proc_root);
            self.counts.bytes += read.bytes;
            self.counts.lines_left_out += read.lines_left_out;
            if read.bytes > 0 {
                code.take_new_version();
            }
        }
        addrs.iter().map(|&addr| known.frames(Addr(addr))).collect()
    }

    /// Releases the maps that nothing was asked of for a while.
    pub(super) fn release_idle(&mut self, now: Instant) {
        self.known.retain(|_, known| now.saturating_duration_since(known.used_at) < IDLE_MAX);
    }

    pub(super) fn take_counts(&mut self) -> PerfMapCounts {
        std::mem::take(&mut self.counts)
    }

    fn make_room(&mut self, for_id: u32) {
        let ranges = |known: &Known| known.file.as_ref().map_or(0, |reading| reading.map.len());
        let is_full = |all: &HashMap<u32, Known>| {
            let is_new = !all.contains_key(&for_id);
            let ranges: usize = all.values().map(ranges).sum();
            (is_new && all.len() >= MAPS_MAX) || ranges > ALL_RANGES_MAX
        };
        while is_full(&self.known) {
            let others = self.known.iter().filter(|&(&id, _)| id != for_id);
            let Some(id) = others.min_by_key(|(_, known)| known.used_at).map(|(&id, _)| id) else { return };
            self.known.remove(&id);
        }
    }
}

impl Known {
    /// Opens the map, or goes on with the one that is open: it stays readable when the process has gone.
    fn look(&mut self, code: &GeneratedCode, proc_root: &Path) -> PerfMapCounts {
        match (code.open_perf_map(proc_root), &mut self.file) {
            (Ok(file), Ok(reading)) if reading.goes_on_in(&file) => {}
            (Ok(file), known) => *known = Reading::new(file),
            (Err(_), Ok(_)) => {}
            (Err(error), known) => *known = Err(reason_of(&error)),
        }
        let Ok(reading) = &mut self.file else { return PerfMapCounts::default() };
        let before = reading.map.left_out();
        // What cannot be read now may be at the next look; until then the process has the names that it has.
        let bytes = reading.read_on().unwrap_or(0);
        PerfMapCounts { bytes, lines_left_out: reading.map.left_out() - before }
    }

    fn frames(&self, addr: Addr) -> Result<Vec<NewFrame>, Reason> {
        self.file.as_ref().map_err(|&reason| reason)?.frames(addr)
    }
}

impl Reading {
    fn new(file: File) -> Result<Self, Reason> {
        let inode = file.metadata().map_err(|_| Reason::PerfMapRefused)?.ino();
        Ok(Self { file, inode, map: PerfMap::default(), taken: 0, tail: Vec::new() })
    }

    /// Whether what was read is the beginning of this file.
    fn goes_on_in(&self, file: &File) -> bool {
        let Ok(metadata) = file.metadata() else { return false };
        let mut tail = vec![0; self.tail.len()];
        let tail_at = self.taken - self.tail.len() as u64;
        metadata.ino() == self.inode
            && metadata.len() >= self.taken
            && file.read_exact_at(&mut tail, tail_at).is_ok()
            && tail == self.tail
    }

    /// Takes the lines that have come since. Gives how many bytes they are.
    fn read_on(&mut self) -> io::Result<u64> {
        let start = self.taken;
        let end = (start + LOOK_BYTES_MAX).min(MAP_BYTES_MAX);
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.taken < end {
            let read = self.file.read_at(&mut chunk, self.taken)?;
            let text = chunk.get(..read).unwrap_or_default();
            let offset = u32::try_from(self.taken).map_err(|_| io::ErrorKind::FileTooLarge)?;
            let mut taken = self.map.take(text, offset);
            if taken == 0 {
                if read < CHUNK_BYTES {
                    break;
                }
                self.map.leave_out();
                taken = read;
            }
            let tail = text.get(taken.saturating_sub(TAIL_BYTES)..taken).unwrap_or_default();
            self.tail = tail.to_vec();
            self.taken += taken as u64;
        }
        Ok(self.taken - start)
    }

    fn frames(&self, addr: Addr) -> Result<Vec<NewFrame>, Reason> {
        let at = self.map.find(addr.0).ok_or(Reason::NotInPerfMap)?;
        let mut name = vec![0; usize::from(at.bytes)];
        self.file.read_exact_at(&mut name, at.offset.into()).map_err(|_| Reason::FileChanged)?;
        let name = String::from_utf8_lossy(&name);
        let parts = readable(&name);
        Ok(vec![NewFrame {
            function: demangle(parts.function).into_owned(),
            system_name: name.clone().into_owned(),
            file: parts.file.to_owned(),
            start_line: parts.start_line,
            ..NewFrame::default()
        }])
    }
}

fn reason_of(error: &PerfMapError) -> Reason {
    match error {
        PerfMapError::Open(_) => Reason::NoPerfMap,
        PerfMapError::NotRegular | PerfMapError::Foreign | PerfMapError::Stale => Reason::PerfMapRefused,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;

    /// A `/proc` with a process whose perf map can be written.
    struct Fixture {
        proc_root: tempfile::TempDir,
        symbols: GeneratedSymbols,
        code: Arc<GeneratedCode>,
        now: Instant,
    }

    impl Fixture {
        fn new() -> Self {
            let proc_root = tempfile::tempdir().unwrap();
            fs::create_dir_all(proc_root.path().join("70/root/tmp")).unwrap();
            fs::write(proc_root.path().join("70/status"), "NSpid:\t70\n").unwrap();
            let symbols = GeneratedSymbols::new(proc_root.path());
            let code = Arc::new(GeneratedCode::new(70, 0, "node"));
            Self { proc_root, symbols, code, now: Instant::now() }
        }

        fn map(&self) -> PathBuf {
            self.proc_root.path().join("70/root/tmp/perf-70.map")
        }

        fn append(&self, text: &str) {
            let mut file = File::options().append(true).create(true).open(self.map()).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        fn name(&mut self, addr: u64) -> Result<String, Reason> {
            let [found] = self.symbols.symbolize(&self.code, &[addr], self.now).try_into().unwrap();
            found.map(|frames| frames[0].function.clone())
        }

        fn later(&mut self) -> &mut Self {
            self.now += LOOK_INTERVAL;
            self
        }
    }

    #[test]
    fn a_map_that_has_grown_is_read_on_but_not_more_than_once_a_second() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.name(0x1000), Err(Reason::NoPerfMap));
        fixture.append("1000 10 first\n2000 10 sec");
        assert_eq!(fixture.name(0x1000), Err(Reason::NoPerfMap), "too soon");
        let before = fixture.code.version();
        assert_eq!(fixture.later().name(0x1000), Ok("first".into()));
        assert_ne!(fixture.code.version(), before);
        assert_eq!(fixture.name(0x2000), Err(Reason::NotInPerfMap));
        fixture.append("ond\n1000 10 moved\n");
        assert_eq!(fixture.later().name(0x2000), Ok("second".into()));
        assert_eq!(fixture.name(0x1000), Ok("moved".into()));
        let version = fixture.code.version();
        fixture.later().name(0x1000).unwrap();
        assert_eq!(fixture.code.version(), version, "nothing has come");
    }

    #[test]
    fn a_map_written_anew_replaces_what_was_read() {
        let mut fixture = Fixture::new();
        fixture.append("1000 10 a\n2000 10 b\n");
        assert_eq!(fixture.name(0x1000), Ok("a".into()));
        fs::write(fixture.map(), "1000 10 x\n3000 10 longer than before\n").unwrap();
        assert_eq!(fixture.later().name(0x1000), Ok("x".into()));
        assert_eq!(fixture.name(0x2000), Err(Reason::NotInPerfMap));
        fs::remove_file(fixture.map()).unwrap();
        fs::write(fixture.map(), "1000 10 y\n").unwrap();
        assert_eq!(fixture.later().name(0x1000), Ok("y".into()));
    }

    #[test]
    fn names_outlive_the_process() {
        let mut fixture = Fixture::new();
        fixture.append("1000 10 a\n2000 10 b\n");
        assert_eq!(fixture.name(0x1000), Ok("a".into()));
        fs::remove_dir_all(fixture.proc_root.path().join("70")).unwrap();
        assert_eq!(fixture.later().name(0x2000), Ok("b".into()));
    }

    #[test]
    fn a_line_without_end_costs_what_it_is_and_no_more() {
        let mut fixture = Fixture::new();
        fixture.append(&"x".repeat(3 * CHUNK_BYTES));
        fixture.append("\n1000 10 behind\n");
        assert_eq!(fixture.name(0x1000), Ok("behind".into()));
        assert!(fixture.symbols.take_counts().lines_left_out >= 3);
    }

    #[test]
    fn at_most_so_many_maps_are_known() {
        let mut fixture = Fixture::new();
        for _ in 0..MAPS_MAX + 5 {
            fixture.code = Arc::new(GeneratedCode::new(70, 0, "node"));
            fixture.now += Duration::from_millis(1);
            assert_eq!(fixture.name(1), Err(Reason::NoPerfMap));
        }
        assert_eq!(fixture.symbols.known.len(), MAPS_MAX);
        fixture.symbols.release_idle(fixture.now + IDLE_MAX);
        assert!(fixture.symbols.known.is_empty());
    }
}
