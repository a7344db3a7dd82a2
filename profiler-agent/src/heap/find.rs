//! The allocators of a process, and where to probe them.

use std::{collections::HashMap, os::fd::AsRawFd as _, path::PathBuf, sync::Arc};

use profiler_heap::{Allocator, Function, ScanError};

use super::{HeapError, link_map, link_map::Objects};
use crate::{
    addr::FileOffset,
    executable::{Executable, ExecutableId},
    process::{Backing, ImageReader, Mapping},
    sys::file_map::FileMap,
};

/// Bytes of a file whose symbols are read.
const FILE_BYTES_MAX: u64 = 4 << 30;
/// Files whose attach points are remembered.
const FILES_MAX: usize = 1024;

/// An allocator of a process: functions of one of its files.
pub(super) struct Found {
    pub(super) executable: Arc<Executable>,
    /// Each with the address of its probe in the process.
    pub(super) functions: Vec<(Function, u64)>,
}

impl Found {
    /// Names the open file, whatever has become of its path.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.executable.file().as_raw_fd()))
    }
}

/// Looks into files, and remembers what it found.
pub(super) struct Finder {
    images: ImageReader,
    files: HashMap<ExecutableId, Arc<Result<Allocator, ScanError>>>,
}

impl Finder {
    pub(super) fn new(images: ImageReader) -> Self {
        Self { images, files: HashMap::new() }
    }

    pub(super) fn images(&mut self) -> &mut ImageReader {
        &mut self.images
    }

    /// What the process has loaded.
    pub(super) fn objects(&self, pid: u32) -> Result<Objects, HeapError> {
        match link_map::objects(&self.images.directory(pid)) {
            None => Err(HeapError::Objects),
            Some(Objects::NotReady) => Err(HeapError::NotReady),
            Some(objects) => Ok(objects),
        }
    }

    /// Of the objects in the order of symbol look-up: the first that defines `malloc`, and each that has functions under names
    /// of its own.
    pub(super) fn allocators(&mut self, pid: u32, objects: &Objects) -> Result<Vec<Found>, HeapError> {
        let mappings = self.images.mappings(pid);
        let candidates: Vec<Arc<Executable>> = match objects {
            Objects::NotReady => return Err(HeapError::NotReady),
            Objects::Static => executables(&mappings).take(1).map(|(executable, _)| executable).collect(),
            Objects::Dynamic(loads) => {
                let at = |load| executables(&mappings).find(|(_, found)| *found == load);
                loads.iter().filter_map(|&load| at(load)).map(|(executable, _)| executable).collect()
            }
        };
        let mut found = Vec::new();
        let mut has_standard = false;
        for executable in candidates {
            match &*self.scan_file(&executable) {
                Ok(allocator) => {
                    let is_called = |function: &&Function| !(has_standard && function.is_standard);
                    let functions = allocator.points.iter().filter(is_called);
                    let functions: Vec<_> = functions
                        .filter_map(|function| {
                            Some((function.clone(), address(&mappings, &executable, function.offset)?))
                        })
                        .collect();
                    if !functions.is_empty() {
                        found.push(Found { executable, functions });
                    }
                    has_standard |= allocator.is_standard();
                }
                // One that nobody calls by the standard names is no loss.
                Err(ScanError::NoMalloc | ScanError::Format) => {}
                Err(_) if has_standard => {}
                Err(source) => {
                    return Err(HeapError::Scan { file: executable.to_string(), source: *source });
                }
            }
        }
        if found.is_empty() { Err(HeapError::NoAllocator) } else { Ok(found) }
    }

    fn scan_file(&mut self, executable: &Executable) -> Arc<Result<Allocator, ScanError>> {
        if let Some(known) = self.files.get(&executable.id()) {
            return Arc::clone(known);
        }
        let scan = Arc::new(scan(executable).unwrap_or(Err(ScanError::Format)));
        if self.files.len() >= FILES_MAX {
            self.files.clear();
        }
        self.files.insert(executable.id(), Arc::clone(&scan));
        scan
    }
}

/// The address of a byte of a file in the process.
fn address(mappings: &[Mapping], wanted: &Executable, offset: u64) -> Option<u64> {
    mappings.iter().find_map(|mapping| {
        let Backing::Executable(executable) = &mapping.backing else { return None };
        let range = mapping.range();
        let into = offset.checked_sub(mapping.offset().0)?;
        let address = range.start.0.checked_add(into)?;
        (executable.id() == wanted.id() && address < range.end.0).then_some(address)
    })
}

/// Each executable that is mapped, with how far from where its file says.
fn executables(mappings: &[Mapping]) -> impl Iterator<Item = (Arc<Executable>, u64)> {
    mappings.iter().filter_map(|mapping| {
        let Backing::Executable(executable) = &mapping.backing else { return None };
        let FileOffset(offset) = mapping.offset();
        let stated = executable.elf_addr(FileOffset(offset))?;
        Some((Arc::clone(executable), mapping.range().start.0.wrapping_sub(stated.0)))
    })
}

fn scan(executable: &Executable) -> Option<Result<Allocator, ScanError>> {
    let file = executable.file();
    let bytes = file.metadata().ok()?.len();
    let bytes = usize::try_from(bytes).ok().filter(|&bytes| bytes > 0 && bytes as u64 <= FILE_BYTES_MAX)?;
    let map = FileMap::new(file, bytes).ok()?;
    map.read(profiler_heap::scan).ok()
}
