//! The maps that unwinding by tables reads.

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError};
use profiler_common::{
    limits::UNWIND_SHARD_LEAVES,
    unwind::{
        Directory, Leaf, UnwindRule,
        mappings::{MappingChunk, ProcessEntry},
    },
};

use super::{load::BpfError, value::Value};

/// The maps, for writing. Dropping it leaves them to the programs.
pub(crate) struct UnwindMaps {
    processes: HashMap<MapData, u32, Value<ProcessEntry>>,
    chunks: Array<MapData, Value<MappingChunk>>,
    generations: Array<MapData, u32>,
    directories: Array<MapData, Value<Directory>>,
    leaves: LeafShards,
    rules: Array<MapData, Value<UnwindRule>>,
}

type LeafShard = Array<MapData, Value<Leaf>>;

/// The leaves' map of maps. A shard is made when the first leaf is put in it, and stays: numbers are used again.
struct LeafShards {
    outer: ArrayOfMaps<MapData, LeafShard>,
    shards: Vec<LeafShard>,
}

impl LeafShards {
    fn set(&mut self, id: u32, leaf: &Leaf) -> Result<(), MapError> {
        let (shard, at) = (id / UNWIND_SHARD_LEAVES, id % UNWIND_SHARD_LEAVES);
        while self.shards.len() <= shard as usize {
            let new = LeafShard::create(UNWIND_SHARD_LEAVES, 0)?;
            let next = u32::try_from(self.shards.len()).expect("no more than `shard`");
            self.outer.set(next, &new, 0)?;
            self.shards.push(new);
        }
        self.shards[shard as usize].set(at, Value(*leaf), 0)
    }
}

impl UnwindMaps {
    pub(super) fn new(mut take: impl FnMut(&'static str) -> Result<Map, BpfError>) -> Result<Self, BpfError> {
        let failed = |map| move |source| BpfError::Map { map, source };
        Ok(Self {
            processes: take("PROCESSES")?.try_into().map_err(failed("PROCESSES"))?,
            chunks: take("CHUNKS")?.try_into().map_err(failed("CHUNKS"))?,
            generations: take("GENERATIONS")?.try_into().map_err(failed("GENERATIONS"))?,
            directories: take("DIRECTORIES")?.try_into().map_err(failed("DIRECTORIES"))?,
            leaves: LeafShards {
                outer: take("LEAVES")?.try_into().map_err(failed("LEAVES"))?,
                shards: Vec::new(),
            },
            rules: take("RULES")?.try_into().map_err(failed("RULES"))?,
        })
    }

    pub(crate) fn set_rule(&mut self, id: u16, rule: UnwindRule) -> Result<(), MapError> {
        self.rules.set(id.into(), Value(rule), 0)
    }

    pub(crate) fn set_leaf(&mut self, id: u32, leaf: &Leaf) -> Result<(), MapError> {
        self.leaves.set(id, leaf)
    }

    pub(crate) fn set_directory(&mut self, id: u32, directory: &Directory) -> Result<(), MapError> {
        self.directories.set(id, Value(*directory), 0)
    }

    pub(crate) fn set_chunk(&mut self, id: u32, chunk: &MappingChunk) -> Result<(), MapError> {
        self.chunks.set(id, Value(*chunk), 0)
    }

    /// Ends every entry that was made when the chunk was of another generation.
    pub(crate) fn set_generation(&mut self, chunk: u32, generation: u32) -> Result<(), MapError> {
        self.generations.set(chunk, generation, 0)
    }

    /// What the kernel side knows of a process.
    pub(crate) fn entry(&self, pid: u32) -> Result<Option<ProcessEntry>, MapError> {
        match self.processes.get(&pid, 0) {
            Ok(Value(entry)) => Ok(Some(entry)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every process that the kernel side knows.
    pub(crate) fn known(&self) -> impl Iterator<Item = u32> {
        self.processes.keys().flatten()
    }

    /// Makes a chunk the process's own, in one step.
    pub(crate) fn publish(&mut self, pid: u32, entry: ProcessEntry) -> Result<(), MapError> {
        self.processes.insert(pid, Value(entry), 0)
    }

    /// The kernel side knows the process no more.
    pub(crate) fn forget(&mut self, pid: u32) -> Result<(), MapError> {
        match self.processes.remove(&pid) {
            // The kernel side deletes entries too, at exec and exit.
            Err(error) if is_not_found(&error) => Ok(()),
            result => result,
        }
    }
}

fn is_not_found(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}
