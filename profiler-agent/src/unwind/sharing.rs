//! Chunks and the processes that use them: a child uses its parent's until one of them changes its mappings.
//!
//! The kernel side copies entries at a fork before anybody here knows of it, so a chunk may be named by entries that are
//! not counted. Each entry holds the chunk's generation; giving a chunk up begins a new one, which ends them all.

use std::{collections::HashSet, time::Instant};

use super::{chunk::Record, ids::Ids, tables::Owner};

/// A chunk in use.
#[derive(Debug)]
struct Shared {
    records: Vec<Record>,
    /// The tables it names, held for as long as it is used.
    owners: HashSet<Owner>,
    users: u32,
}

/// A chunk of a generation: what an entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ChunkRef {
    pub(super) chunk: u32,
    pub(super) generation: u32,
}

/// A chunk that its last user has left.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GivenUp {
    /// The chunk, of its new generation, which the kernel side has yet to learn.
    pub(super) now: ChunkRef,
    /// Tables that were held for it.
    pub(super) owners: HashSet<Owner>,
}

/// All chunks.
#[derive(Debug)]
pub(super) struct Chunks {
    ids: Ids,
    /// By chunk.
    shared: Vec<Option<Shared>>,
    /// By chunk, as in the kernel's map.
    generations: Vec<u32>,
}

impl Chunks {
    /// Numbers below `max`, all unused and of generation 0.
    pub(super) fn new(max: u32) -> Self {
        let shared = (0..max).map(|_| None).collect();
        Self { ids: Ids::new(max), shared, generations: vec![0; max as usize] }
    }

    /// A chunk that no program holds, for one user; nothing may be written to it by others. `owners` comes back where
    /// there is none.
    pub(super) fn take(
        &mut self,
        records: Vec<Record>,
        owners: HashSet<Owner>,
        now: Instant,
    ) -> Result<ChunkRef, HashSet<Owner>> {
        let Some(chunk) = self.ids.take(1, now).and_then(|ids| ids.first().copied()) else {
            return Err(owners);
        };
        self.shared[chunk as usize] = Some(Shared { records, owners, users: 1 });
        Ok(ChunkRef { chunk, generation: self.generations[chunk as usize] })
    }

    /// One more user of a chunk, by an entry that was copied; `false` where it is of an earlier generation.
    pub(super) fn join(&mut self, of: ChunkRef) -> bool {
        let Some(shared) = self.get_mut(of) else { return false };
        shared.users += 1;
        true
    }

    /// One user less. After the last one the chunk rests, and is of a new generation.
    pub(super) fn leave(&mut self, of: ChunkRef, now: Instant) -> Option<GivenUp> {
        let shared = self.get_mut(of)?;
        shared.users -= 1;
        if shared.users > 0 {
            return None;
        }
        let index = of.chunk as usize;
        let Shared { owners, .. } = self.shared[index].take()?;
        self.generations[index] = self.generations[index].wrapping_add(1);
        self.ids.give_back(vec![of.chunk], now);
        Some(GivenUp { now: ChunkRef { generation: self.generations[index], ..of }, owners })
    }

    /// What a chunk in use holds.
    pub(super) fn records(&self, of: ChunkRef) -> Option<&[Record]> {
        self.content(of).map(|(records, _)| records)
    }

    /// The same, with the tables that are held for it.
    pub(super) fn content(&self, of: ChunkRef) -> Option<(&[Record], &HashSet<Owner>)> {
        let is_current = self.generations.get(of.chunk as usize) == Some(&of.generation);
        let shared = self.shared.get(of.chunk as usize)?.as_ref().filter(|_| is_current)?;
        Some((&shared.records, &shared.owners))
    }

    fn get_mut(&mut self, of: ChunkRef) -> Option<&mut Shared> {
        let is_current = self.generations.get(of.chunk as usize) == Some(&of.generation);
        self.shared.get_mut(of.chunk as usize)?.as_mut().filter(|_| is_current)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use profiler_common::unwind::mappings::NO_CHUNK;

    use super::*;

    fn take(chunks: &mut Chunks, now: Instant) -> ChunkRef {
        chunks.take(Vec::new(), HashSet::from([Owner::Vdso]), now).expect("a free chunk")
    }

    #[test]
    fn a_chunk_is_given_up_by_the_last_of_its_users() {
        let (mut chunks, now) = (Chunks::new(1), Instant::now());
        let chunk = take(&mut chunks, now);
        assert!(chunks.join(chunk));
        assert_eq!(chunks.leave(chunk, now), None, "the child uses it");
        assert!(chunks.records(chunk).is_some());
        let given_up = chunks.leave(chunk, now).expect("the last one");
        assert_eq!(given_up.owners, HashSet::from([Owner::Vdso]));
        assert_eq!(given_up.now, ChunkRef { chunk: chunk.chunk, generation: chunk.generation + 1 });
        assert_eq!(chunks.records(chunk), None);
    }

    #[test]
    fn an_entry_copied_before_its_chunk_was_given_up_cannot_join_the_next_user() {
        let (mut chunks, start) = (Chunks::new(1), Instant::now());
        let parents = take(&mut chunks, start);
        chunks.leave(parents, start).expect("the last one");
        assert!(!chunks.join(parents), "nobody uses it");
        let later = start + Duration::from_secs(2);
        let anothers = take(&mut chunks, later);
        assert_eq!(anothers.chunk, parents.chunk);
        assert!(!chunks.join(parents), "it is of another generation");
        assert_eq!(chunks.leave(parents, later), None);
        assert_eq!(chunks.records(parents), None);
        assert!(chunks.records(anothers).is_some(), "its own user is left alone");
    }

    #[test]
    fn a_chunk_rests_before_it_is_used_again() {
        let (mut chunks, start) = (Chunks::new(1), Instant::now());
        let chunk = take(&mut chunks, start);
        assert!(chunks.take(Vec::new(), HashSet::new(), start).is_err(), "it is in use");
        chunks.leave(chunk, start).expect("the last one");
        assert!(chunks.take(Vec::new(), HashSet::new(), start).is_err(), "programs may still hold it");
        take(&mut chunks, start + Duration::from_secs(2));
    }

    #[test]
    fn an_entry_without_a_chunk_joins_none() {
        let mut chunks = Chunks::new(1);
        assert!(!chunks.join(ChunkRef { chunk: NO_CHUNK, generation: 0 }));
    }
}
