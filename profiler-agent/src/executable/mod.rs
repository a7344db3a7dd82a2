//! Files that processes run code from: opened safely, told apart by content, kept open while anybody needs them.

mod bounded;
mod build_id;
mod cache;
mod content;
mod elf;
mod identity;
mod open;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, io};

pub(crate) use build_id::BuildId;
pub(crate) use cache::ExecutableCache;
pub(crate) use content::{ContentHash, FileKey};
pub(crate) use elf::{CompressedSection, Elf, ElfError, GoTable, SectionBytes, SymbolSections, SymbolTable};
pub(crate) use identity::Identity;
pub(crate) use open::{MappedFile, open_in_root};

use crate::addr::{ElfAddr, FileOffset};
use content::Content;

/// Number of an executable within one run of the agent; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ExecutableId(pub(crate) u32);

/// A file with code, open for as long as this value lives: its bytes can be read after the process has exited and
/// the file was deleted or replaced.
#[derive(Debug)]
pub(crate) struct Executable {
    id: ExecutableId,
    path: PathBuf,
    identity: Identity,
    file: File,
    elf: Elf,
    debug_is_safe: OnceLock<bool>,
    content: Content,
    /// The one that stands for all with this content, where that is another.
    settled: OnceLock<Arc<Executable>>,
    /// The version of its separate debug file, and whether it can be used.
    debug_file_is_usable: OnceLock<(String, bool)>,
}

impl Executable {
    pub(crate) fn id(&self) -> ExecutableId {
        self.id
    }

    /// The path as the first process seen with it names it; a hint, since other mount namespaces name it otherwise.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The last part of the path, for a frame without a symbol: `binary+0xADDR`.
    pub(crate) fn name(&self) -> std::borrow::Cow<'_, str> {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy()
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The linker's id, as tools print it; `None` if it wrote none.
    pub(crate) fn build_id(&self) -> Option<&BuildId> {
        self.identity.build_ids.preferred()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The address that the ELF gives to a byte of the file; `None` when nothing is mapped from there.
    pub(crate) fn elf_addr(&self, offset: FileOffset) -> Option<ElfAddr> {
        self.elf.segments.elf_addr(offset)
    }

    /// From the first code address to the end of the last, and where the first lies in the file.
    pub(crate) fn code_range(&self) -> Option<(Range<ElfAddr>, FileOffset)> {
        self.elf.segments.code_range()
    }

    pub(crate) fn symbols(&self) -> &SymbolSections {
        &self.elf.symbols
    }

    /// What `check` said of the file's DWARF when it was asked first.
    pub(crate) fn debug_is_safe(&self, check: impl FnOnce() -> bool) -> bool {
        *self.debug_is_safe.get_or_init(check)
    }

    /// What `check` said of this version of the executable's debug file when it was asked first.
    pub(crate) fn debug_file_is_usable(&self, version: String, check: impl Fn() -> bool) -> bool {
        let (known, is_usable) = self.debug_file_is_usable.get_or_init(|| (version.clone(), check()));
        if *known == version { *is_usable } else { check() }
    }

    pub(crate) fn is_go(&self) -> bool {
        self.elf.is_go
    }

    pub(crate) fn go_table(&self) -> Option<&GoTable> {
        self.elf.go_table.as_ref()
    }

    /// The hash of all bytes: what names on disk are known by, and what makes two files one executable. Reads all of a large
    /// file the first time (0.9 s a GB), so never on the way of samples.
    ///
    /// `None` where a hash would vouch for nothing: the file has another content than when it was asked for first, was
    /// changed a moment ago, is served by a program (FUSE), is larger than 2 GiB, or cannot be read.
    pub(crate) fn content(&self) -> Option<ContentHash> {
        self.content.hash(&self.file)
    }

    /// Whether the file was found to have another content than it had.
    pub(crate) fn has_changed(&self) -> bool {
        self.content.has_changed()
    }

    /// The version of the file now; `None` when the file system does not say.
    pub(crate) fn version(&self) -> Option<FileKey> {
        FileKey::of(&self.file).ok()
    }

    /// The executable that stands for all with the same content, as far as that is known.
    pub(crate) fn settled(self: &Arc<Self>) -> &Arc<Self> {
        self.settled.get().filter(|other| !other.has_changed()).unwrap_or(self)
    }

    /// Reads the headers of an open regular file. `age_min`: how long ago it must have been changed to be vouched for.
    fn read(
        id: ExecutableId,
        path: &Path,
        file: File,
        key: FileKey,
        age_min: Duration,
    ) -> Result<Self, ExecutableError> {
        let read_error = |source| ExecutableError::Read { path: path.into(), source };
        let file_bytes = file.metadata().map_err(read_error)?.len();
        let elf = Elf::of(&file).map_err(|source| ExecutableError::Elf { path: path.into(), source })?;
        let is_settled = key.is_settled(age_min);
        let identity = Identity::read(&file, key, is_settled, file_bytes, elf.build_ids.clone());
        let identity = identity.map_err(read_error)?;
        let content = match identity.file {
            None => Content::known(key, identity.content_hash, age_min),
            Some(_) => Content::unknown(age_min),
        };
        let (debug_is_safe, debug_file_is_usable, settled) = Default::default();
        Ok(Self {
            id,
            path: path.into(),
            identity,
            file,
            elf,
            debug_is_safe,
            debug_file_is_usable,
            content,
            settled,
        })
    }
}

impl fmt::Display for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

/// Why a mapping's file is not an executable to the agent. One bad file never stops the rest: frames in it stay
/// raw addresses.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecutableError {
    /// The process or the file is gone, or the agent may not read it.
    #[error("open {path} of pid {pid}")]
    Open {
        pid: u32,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A device, pipe or directory: never opened for reading.
    #[error("{path} of pid {pid} is not a regular file")]
    NotRegular { pid: u32, path: PathBuf },
    /// The path names another file by now than the one mapped.
    #[error("{path} of pid {pid} was replaced: inode {found}, mapped is {mapped}")]
    Replaced { pid: u32, path: PathBuf, mapped: u64, found: u64 },
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path}")]
    Elf {
        path: PathBuf,
        #[source]
        source: ElfError,
    },
    /// All places are held by executables in use.
    #[error("{path}: {max} executables are in use, none can be closed")]
    Full { path: PathBuf, max: usize },
}

#[cfg(test)]
impl Executable {
    /// The same file, as if it had this debug link.
    pub(crate) fn elf_with_debug_link(&self, name: &str) -> Self {
        let mut elf = self.elf.clone();
        elf.symbols.debug_link = Some(name.into());
        let file = self.file.try_clone().expect("a descriptor");
        let (path, identity) = (self.path.clone(), self.identity.clone());
        let content = Content::unknown(Duration::ZERO);
        let (debug_is_safe, debug_file_is_usable, settled) = Default::default();
        Self { id: self.id, path, identity, file, elf, debug_is_safe, debug_file_is_usable, content, settled }
    }
}

/// Real executables for the tests of other modules.
#[cfg(test)]
pub(crate) mod testing {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::{Executable, ExecutableCache, ExecutableError, ExecutableId, FileKey, MappedFile};
    use crate::addr::{Addr, ElfAddr, FileOffset};

    /// Opens a file that nobody has mapped; each call gives a new id.
    pub(crate) fn read(path: &Path) -> Result<Arc<Executable>, ExecutableError> {
        static NEXT: AtomicU32 = AtomicU32::new(1 << 31);
        let id = ExecutableId(NEXT.fetch_add(1, Ordering::Relaxed));
        let file = fs::File::open(path).unwrap();
        let key = FileKey::of(&file).unwrap();
        Executable::read(id, path, file, key, Duration::ZERO).map(Arc::new)
    }

    /// The file mapped at an address of this process, and the address as the file states it.
    pub(crate) fn at(cache: &ExecutableCache, addr: u64) -> (Arc<Executable>, ElfAddr) {
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [range, _, offset, _, _, path] = fields.as_slice() else { continue };
            let (start, end) = range.split_once('-').unwrap();
            let range = hex(start)..hex(end);
            if range.contains(&addr) {
                let path = Path::new(path);
                let inode = fs::metadata(path).unwrap().ino();
                let mapped = MappedFile {
                    pid: std::process::id(),
                    range: Addr(range.start)..Addr(range.end),
                    device: (0, 0),
                    inode,
                    path,
                };
                let executable = cache.open(Path::new("/proc"), &mapped).unwrap();
                let elf_addr = executable.elf_addr(FileOffset(addr - range.start + hex(offset))).unwrap();
                return (executable, elf_addr);
            }
        }
        panic!("nothing is mapped at {addr:#x}");
    }

    /// Compiles C source to `dir/name` with debug information.
    pub(crate) fn compile(dir: &Path, name: &str, source: &str, flags: &[&str]) -> std::path::PathBuf {
        let input = dir.join(format!("{name}.c"));
        let output = dir.join(name);
        fs::write(&input, source).unwrap();
        run(Command::new("cc")
            .args(["-g", "-O1", "-Wl,--build-id"])
            .args(flags)
            .arg("-o")
            .arg(&output)
            .arg(&input));
        output
    }

    #[track_caller]
    pub(crate) fn run(command: &mut Command) {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::testing::read;
    use crate::{memory, sys::heap};

    #[test]
    fn an_executable_takes_what_the_memory_plan_gives_it() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let files: std::collections::BTreeSet<_> =
            maps.lines().filter_map(|line| Some(&line[line.find('/')?..])).collect();
        let before = heap::held_bytes();
        let open: Vec<_> = files.iter().filter_map(|path| read(path.as_ref()).ok()).collect();
        let held = usize::try_from(heap::held_bytes() - before).unwrap();
        assert!(open.len() > 2 && held / open.len() < memory::EXECUTABLE_BYTES, "{held} of {}", open.len());
        assert!(open.iter().all(|executable| Arc::strong_count(executable) == 1));
    }
}
