//! The maps that unwinding by tables reads.

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use profiler_common::unwind::{
    Directory, Leaf, UnwindRule,
    mappings::{MappingChunk, ProcessEntry},
};

use super::load::BpfError;

/// The five maps, for writing. Dropping it leaves them to the programs.
pub(crate) struct UnwindMaps {
    processes: HashMap<MapData, u32, Value<ProcessEntry>>,
    chunks: Array<MapData, Value<MappingChunk>>,
    directories: Array<MapData, Value<Directory>>,
    leaves: Array<MapData, Value<Leaf>>,
    rules: Array<MapData, Value<UnwindRule>>,
}

/// A map value of integers without padding.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Value<T>(T);

/// Types that `profiler_common` lays out for the kernel: integers only, no implicit padding, sizes asserted there.
trait Shared: Copy + 'static {}
impl Shared for ProcessEntry {}
impl Shared for MappingChunk {}
impl Shared for Directory {}
impl Shared for Leaf {}
impl Shared for UnwindRule {}

// SAFETY: every `Shared` type consists of integers without padding, so that all of its bytes may be copied out, and any
// bytes are a value.
unsafe impl<T: Shared> Pod for Value<T> {}

impl UnwindMaps {
    pub(super) fn new(mut take: impl FnMut(&'static str) -> Result<Map, BpfError>) -> Result<Self, BpfError> {
        let failed = |map| move |source| BpfError::Map { map, source };
        Ok(Self {
            processes: take("PROCESSES")?.try_into().map_err(failed("PROCESSES"))?,
            chunks: take("CHUNKS")?.try_into().map_err(failed("CHUNKS"))?,
            directories: take("DIRECTORIES")?.try_into().map_err(failed("DIRECTORIES"))?,
            leaves: take("LEAVES")?.try_into().map_err(failed("LEAVES"))?,
            rules: take("RULES")?.try_into().map_err(failed("RULES"))?,
        })
    }

    pub(crate) fn set_rule(&mut self, id: u16, rule: UnwindRule) -> Result<(), MapError> {
        self.rules.set(id.into(), Value(rule), 0)
    }

    pub(crate) fn set_leaf(&mut self, id: u32, leaf: &Leaf) -> Result<(), MapError> {
        self.leaves.set(id, Value(*leaf), 0)
    }

    pub(crate) fn set_directory(&mut self, id: u32, directory: &Directory) -> Result<(), MapError> {
        self.directories.set(id, Value(*directory), 0)
    }

    pub(crate) fn set_chunk(&mut self, id: u32, chunk: &MappingChunk) -> Result<(), MapError> {
        self.chunks.set(id, Value(*chunk), 0)
    }

    /// Makes a chunk the process's own, in one step.
    pub(crate) fn publish(&mut self, pid: u32, entry: ProcessEntry) -> Result<(), MapError> {
        self.processes.insert(pid, Value(entry), 0)
    }

    /// Sends the process back to frame pointers.
    pub(crate) fn withdraw(&mut self, pid: u32) -> Result<(), MapError> {
        match self.processes.remove(&pid) {
            // The kernel side deletes entries too, at exec.
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            result => result,
        }
    }
}
