//! Which executables have tables in the kernel, and where.

use std::{collections::HashMap, sync::Arc, time::Instant};

use profiler_common::unwind::{Directory, Leaf, UNUSED_LEAF, UnwindRule};
use profiler_unwind::{Architecture, RuleIds, RuleSet, UnwindTable};

use super::{
    chunk::Part,
    ids::{Ids, Quarantine},
};
use crate::executable::ExecutableId;

/// What a table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    Executable(ExecutableId),
    /// All processes have the same.
    Vdso,
}

/// One value for the kernel's maps.
#[derive(Debug)]
pub(super) enum Write<'a> {
    Rule(u16, UnwindRule),
    Leaf(u32, &'a Leaf),
    Directory(u32, &'a Directory),
}

/// Why a table has no place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PlaceError<E> {
    /// Too few leaves, directories or rules, even without the tables that no process uses.
    NoRoom,
    /// More leaves or directories than there are in all.
    TooLarge,
    /// A map would not be written.
    Write(E),
}

/// The tables in the kernel. Those that no process uses stay until their room is needed, the longest unused go first.
#[derive(Debug)]
pub(super) struct Tables {
    rules: RuleSet,
    resting_rules: Quarantine<Vec<u16>>,
    leaves: Ids,
    leaves_used: usize,
    directories: Ids,
    placed: HashMap<Owner, Placed>,
}

#[derive(Debug)]
struct Placed {
    parts: Arc<[Part]>,
    space: Space,
    /// Processes that use it.
    users: u32,
    last_used: Instant,
}

/// What a table takes in the kernel.
#[derive(Debug)]
struct Space {
    leaves: Vec<u32>,
    directories: Vec<u32>,
    rules: RuleIds,
}

impl Tables {
    /// No tables, in maps of these sizes.
    pub(super) fn new(architecture: Architecture, leaves_max: u32, directories_max: u32) -> Self {
        Self {
            rules: RuleSet::new(architecture),
            resting_rules: Quarantine::new(),
            leaves: Ids::new(leaves_max),
            leaves_used: 0,
            directories: Ids::new(directories_max),
            placed: HashMap::new(),
        }
    }

    /// Tables in the kernel.
    pub(super) fn len(&self) -> usize {
        self.placed.len()
    }

    /// Leaves they take.
    pub(super) fn leaves_used(&self) -> usize {
        self.leaves_used
    }

    /// Where a table lies; `None` when there is none.
    pub(super) fn parts(&mut self, owner: Owner, now: Instant) -> Option<Arc<[Part]>> {
        let placed = self.placed.get_mut(&owner)?;
        placed.last_used = now;
        Some(Arc::clone(&placed.parts))
    }

    /// A process uses a table that is there: it will stay.
    pub(super) fn hold(&mut self, owner: Owner) {
        let placed = self.placed.get_mut(&owner).expect("a table is held by those who have just seen it");
        placed.users += 1;
    }

    /// A process no longer uses a table it held.
    pub(super) fn release(&mut self, owner: Owner, now: Instant) {
        let placed = self.placed.get_mut(&owner).expect("a table stays while it is held");
        placed.users -= 1;
        placed.last_used = now;
    }

    /// Puts a table into the kernel, rules first and directories last.
    pub(super) fn place<E>(
        &mut self,
        owner: Owner,
        table: &UnwindTable,
        now: Instant,
        mut write: impl FnMut(Write<'_>) -> Result<(), E>,
    ) -> Result<Arc<[Part]>, PlaceError<E>> {
        if !self.leaves.has_as_many(table.leaves().len())
            || !self.directories.has_as_many(table.directories().len())
        {
            return Err(PlaceError::TooLarge);
        }
        let space = self.take_space(table, now).ok_or(PlaceError::NoRoom)?;
        if let Err(error) = write_table(table, &space, &mut write) {
            self.give_back(space, now);
            return Err(PlaceError::Write(error));
        }
        let ids = space.directories.iter().zip(table.directories());
        let parts: Arc<[Part]> =
            ids.map(|(&directory, of)| Part { addresses: of.addresses.clone(), directory }).collect();
        self.placed.insert(owner, Placed { parts: Arc::clone(&parts), space, users: 0, last_used: now });
        Ok(parts)
    }

    /// Room for a table. Tables that nobody uses make way; their room can be had after its quarantine.
    fn take_space(&mut self, table: &UnwindTable, now: Instant) -> Option<Space> {
        while let Some(rested) = self.resting_rules.take_rested(now) {
            self.rules.recycle(rested);
        }
        let space = self.try_take_space(table, now);
        if space.is_none() {
            self.evict(table.leaves().len(), now);
        }
        space
    }

    fn try_take_space(&mut self, table: &UnwindTable, now: Instant) -> Option<Space> {
        let rules = self.rules.acquire(table.rules()).ok()?;
        let leaves = self.leaves.take(table.leaves().len(), now).unwrap_or_default();
        let directories = self.directories.take(table.directories().len(), now).unwrap_or_default();
        self.leaves_used += leaves.len();
        let is_enough =
            leaves.len() == table.leaves().len() && directories.len() == table.directories().len();
        let space = Space { leaves, directories, rules };
        if !is_enough {
            self.give_back(space, now);
            return None;
        }
        Some(space)
    }

    /// Drops unused tables until so many leaves are free or none is left to drop, at least one.
    fn evict(&mut self, leaves: usize, now: Instant) {
        let mut freed = 0;
        while freed < leaves.max(1) {
            let unused = self.placed.iter().filter(|(_, placed)| placed.users == 0);
            let Some((&owner, _)) = unused.min_by_key(|(_, placed)| placed.last_used) else { return };
            let Some(Placed { space, .. }) = self.placed.remove(&owner) else { return };
            freed += space.leaves.len().max(1);
            self.give_back(space, now);
        }
    }

    fn give_back(&mut self, space: Space, now: Instant) {
        let Space { leaves, directories, rules } = space;
        self.leaves_used -= leaves.len();
        self.leaves.give_back(leaves, now);
        self.directories.give_back(directories, now);
        let unused = self.rules.release(rules);
        self.resting_rules.put(now, unused);
    }
}

fn write_table<E>(
    table: &UnwindTable,
    space: &Space,
    write: &mut impl FnMut(Write<'_>) -> Result<(), E>,
) -> Result<(), E> {
    for (&id, &rule) in space.rules.as_slice().iter().zip(table.rules()) {
        write(Write::Rule(id, rule))?;
    }
    for (&id, leaf) in space.leaves.iter().zip(table.leaves()) {
        write(Write::Leaf(id, &space.rules.renumber(leaf)))?;
    }
    for (&id, of) in space.directories.iter().zip(table.directories()) {
        let mut directory = of.directory.clone();
        for leaf in &mut directory.leaves {
            *leaf = space.leaves.get(*leaf as usize).copied().unwrap_or(UNUSED_LEAF);
        }
        write(Write::Directory(id, &directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use profiler_common::unwind::{DirectoryLeaves, find_row};

    use super::*;
    use crate::unwind::ARCHITECTURE;

    /// What the kernel's maps would hold.
    #[derive(Default)]
    struct Maps {
        rules: HashMap<u16, UnwindRule>,
        leaves: HashMap<u32, Leaf>,
        directories: HashMap<u32, Directory>,
    }

    impl Maps {
        fn write(&mut self, write: Write<'_>) -> Result<(), Infallible> {
            match write {
                Write::Rule(id, rule) => drop(self.rules.insert(id, rule)),
                Write::Leaf(id, leaf) => drop(self.leaves.insert(id, *leaf)),
                Write::Directory(id, directory) => drop(self.directories.insert(id, *directory)),
            }
            Ok(())
        }

        /// The rule for an ELF address, by the maps alone.
        fn find(&self, parts: &[Part], address: u64) -> Option<UnwindRule> {
            let part = parts.iter().find(|part| part.addresses.contains(&address))?;
            let mut leaves = vec![Leaf::EMPTY; 1 + *self.leaves.keys().max()? as usize];
            for (&id, leaf) in &self.leaves {
                leaves[id as usize] = *leaf;
            }
            let table = DirectoryLeaves { directory: &self.directories[&part.directory], leaves: &leaves };
            let rule = find_row(&table, address - part.addresses.start, 0)?;
            self.rules.get(&rule).copied()
        }
    }

    fn table() -> UnwindTable {
        let own = std::fs::read("/proc/self/exe").expect("a test has a file");
        profiler_unwind::from_elf(&own).expect("it has unwind information")
    }

    fn owner(id: u32) -> Owner {
        Owner::Executable(ExecutableId(id))
    }

    fn sizes(table: &UnwindTable) -> (u32, u32) {
        (table.leaves().len() as u32, table.directories().len() as u32)
    }

    #[test]
    fn what_lies_in_the_maps_is_the_table() {
        let (table, mut maps) = (table(), Maps::default());
        let (leaves, directories) = sizes(&table);
        let mut tables = Tables::new(ARCHITECTURE, 3 * leaves, 3 * directories);
        for id in 0..2 {
            let parts = tables.place(owner(id), &table, Instant::now(), |write| maps.write(write));
            let parts = parts.expect("there is room");
            for (address, rule) in table.rows().step_by(101) {
                assert_eq!(maps.find(&parts, address), Some(rule), "{address:#x}");
            }
        }
        assert_eq!(tables.leaves_used(), 2 * leaves as usize);
        assert_eq!(tables.len(), 2);
    }

    #[test]
    fn the_longest_unused_table_makes_way_and_one_in_use_never_does() {
        let (table, mut maps) = (table(), Maps::default());
        let (leaves, directories) = sizes(&table);
        let mut tables = Tables::new(ARCHITECTURE, 2 * leaves, 2 * directories);
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut place =
            |tables: &mut Tables, id, at| tables.place(owner(id), &table, at, |write| maps.write(write));
        place(&mut tables, 0, start).expect("room");
        tables.hold(owner(0));
        place(&mut tables, 1, later(1)).expect("room");
        assert_eq!(place(&mut tables, 2, later(2)), Err(PlaceError::NoRoom), "what 1 had rests");
        assert!(tables.parts(owner(1), later(2)).is_none(), "1 made way");
        place(&mut tables, 2, later(3)).expect("the room of 1");
        tables.hold(owner(2));
        assert_eq!(place(&mut tables, 3, later(9)), Err(PlaceError::NoRoom), "all are in use");
        assert!(tables.parts(owner(0), later(9)).is_some());
        tables.release(owner(0), later(10));
        assert_eq!(place(&mut tables, 3, later(11)), Err(PlaceError::NoRoom), "what 0 had rests");
        place(&mut tables, 3, later(12)).expect("the room of 0");
        assert!(tables.parts(owner(0), later(12)).is_none());
    }

    #[test]
    fn a_table_larger_than_the_maps_drives_nobody_out() {
        let (table, now) = (table(), Instant::now());
        let (leaves, directories) = sizes(&table);
        let mut tables = Tables::new(ARCHITECTURE, leaves - 1, directories);
        let refused = tables.place(owner(0), &table, now, |_| Ok::<_, Infallible>(()));
        assert_eq!(refused, Err(PlaceError::TooLarge));
    }

    #[test]
    fn a_table_that_cannot_be_written_leaves_nothing_behind() {
        let table = table();
        let (leaves, directories) = sizes(&table);
        let mut tables = Tables::new(ARCHITECTURE, leaves, directories);
        let start = Instant::now();
        let refused = tables.place(owner(0), &table, start, |write| match write {
            Write::Directory(..) => Err("no"),
            _ => Ok(()),
        });
        assert_eq!(refused, Err(PlaceError::Write("no")));
        assert_eq!((tables.len(), tables.leaves_used()), (0, 0));
        let again =
            tables.place(owner(0), &table, start + Duration::from_secs(1), |_| Ok::<_, Infallible>(()));
        assert!(again.is_ok());
    }
}
