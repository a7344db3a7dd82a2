//! Who runs in a cgroup, by its id: learnt while the cgroup is there, known for a while after.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Owner, cgroup::owner_of_path};
use crate::sys::cgroup::{Hierarchy, Version};

/// Cgroups remembered, about 300 bytes each. A node of 250 pods has some 1,500.
const CGROUPS_MAX: usize = 8192;
/// A cgroup that nobody asked for this long is forgotten; while it is there, it can be learnt again.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// What is forgotten at once when there is no room: looking for the longest unused costs a look at all.
const EVICTED_AT_ONCE: usize = CGROUPS_MAX / 8;

/// One cgroup.
#[derive(Debug)]
struct Known {
    /// What its path says; `None` when it could not be found.
    by_path: Option<Arc<Owner>>,
    /// What `/proc/<pid>/cgroup` of a process in it said.
    by_process: Option<Arc<Owner>>,
    /// Processes in it had different owners: a runtime makes cgroups in other hierarchies only.
    is_shared: bool,
    used: Instant,
}

/// What was met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NameCounts {
    /// Cgroups known now.
    pub(crate) known: u64,
    /// Forgotten to make room.
    pub(crate) evicted: u64,
    /// Gone before they were found, or not to be found for lack of privileges.
    pub(crate) unknown: u64,
}

/// The cgroups of samples.
#[derive(Debug)]
pub(crate) struct CgroupNames {
    hierarchy: Option<Hierarchy>,
    by_id: HashMap<u64, Known>,
    counts: NameCounts,
}

impl CgroupNames {
    /// Knows nothing yet. Without a hierarchy it never learns by itself.
    pub(crate) fn new(hierarchy: Option<Hierarchy>) -> Self {
        Self { hierarchy, by_id: HashMap::new(), counts: NameCounts::default() }
    }

    /// The path of a cgroup says all there is: it is in the machine's only hierarchy.
    fn is_exact(&self) -> bool {
        self.hierarchy.as_ref().is_some_and(|hierarchy| hierarchy.version() == Version::V2)
    }

    /// Learns a cgroup's name while it is there. 0 is no id.
    pub(crate) fn learn(&mut self, id: u64) {
        self.at(id);
    }

    /// Who runs in a cgroup, when its id alone tells.
    pub(crate) fn exact(&mut self, id: u64) -> Option<Arc<Owner>> {
        if !self.is_exact() {
            return None;
        }
        self.at(id)?.by_path.clone()
    }

    /// Notes who a process in a cgroup belongs to.
    pub(crate) fn note(&mut self, id: u64, owner: &Arc<Owner>) {
        let Some(known) = self.at(id) else { return };
        match &known.by_process {
            Some(noted) if noted == owner => {}
            Some(_) => known.is_shared = true,
            None => known.by_process = Some(Arc::clone(owner)),
        }
    }

    /// Who ran in a cgroup, for a process that cannot be asked any more.
    pub(crate) fn of_gone(&mut self, id: u64) -> Option<Arc<Owner>> {
        let known = self.at(id)?;
        if known.is_shared {
            // One that is seen on its way into a container, hierarchy by hierarchy, has another owner for a moment.
            return known.by_path.clone().filter(|owner| owner.container_id.is_some());
        }
        known.by_process.clone().or_else(|| known.by_path.clone())
    }

    /// Forgets cgroups that nobody asked for of late.
    pub(crate) fn forget_idle(&mut self) {
        self.by_id.retain(|_, known| known.used.elapsed() < IDLE_MAX);
    }

    /// What was met so far.
    pub(crate) fn counts(&self) -> NameCounts {
        NameCounts { known: self.by_id.len() as u64, ..self.counts }
    }

    fn at(&mut self, id: u64) -> Option<&mut Known> {
        if id == 0 {
            return None;
        }
        if !self.by_id.contains_key(&id) {
            self.make_room();
            let by_path = self.read(id);
            self.counts.unknown += u64::from(by_path.is_none());
            let known = Known { by_path, by_process: None, is_shared: false, used: Instant::now() };
            self.by_id.insert(id, known);
        }
        let known = self.by_id.get_mut(&id)?;
        known.used = Instant::now();
        Some(known)
    }

    fn read(&self, id: u64) -> Option<Arc<Owner>> {
        let path = self.hierarchy.as_ref()?.path(id).ok()?;
        Some(Arc::new(owner_of_path(&path)))
    }

    fn make_room(&mut self) {
        if self.by_id.len() < CGROUPS_MAX {
            return;
        }
        let mut used: Vec<_> = self.by_id.iter().map(|(&id, known)| (known.used, id)).collect();
        used.select_nth_unstable(EVICTED_AT_ONCE);
        for &(_, id) in &used[..EVICTED_AT_ONCE] {
            self.by_id.remove(&id);
        }
        self.counts.evicted += EVICTED_AT_ONCE as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str) -> Arc<Owner> {
        Arc::new(Owner { unit: Some(name.to_owned()), ..Owner::default() })
    }

    #[test]
    fn a_process_that_is_gone_has_the_owner_of_others_in_its_cgroup() {
        let mut names = CgroupNames::new(None);
        assert_eq!(names.of_gone(7), None);
        names.note(7, &unit("a.service"));
        names.note(7, &unit("a.service"));
        assert_eq!(names.of_gone(7), Some(unit("a.service")));
        assert_eq!(names.of_gone(8), None);
    }

    #[test]
    fn a_cgroup_with_several_owners_says_nothing_of_those_who_are_gone() {
        let mut names = CgroupNames::new(None);
        names.note(7, &unit("a.service"));
        names.note(7, &unit("b.service"));
        assert_eq!(names.of_gone(7), None);
    }

    #[test]
    fn a_cgroup_that_is_a_containers_stays_its_when_several_owners_were_seen() {
        let mut names = CgroupNames::new(None);
        names.note(7, &unit("containerd.service"));
        let container = Arc::new(Owner { container_id: Some("c".to_owned()), ..Owner::default() });
        names.note(7, &container);
        assert_eq!(names.of_gone(7), None);
        names.by_id.get_mut(&7).expect("it is known").by_path = Some(Arc::clone(&container));
        assert_eq!(names.of_gone(7), Some(container));
    }

    #[test]
    fn without_an_id_nothing_is_remembered() {
        let mut names = CgroupNames::new(None);
        names.note(0, &unit("a.service"));
        assert_eq!((names.of_gone(0), names.counts()), (None, NameCounts::default()));
    }

    #[test]
    fn the_longest_unused_are_forgotten_when_there_is_no_room() {
        let mut names = CgroupNames::new(None);
        let all = CGROUPS_MAX as u64 + 1;
        for id in 1..=all {
            names.note(id, &unit("a.service"));
        }
        let NameCounts { known, evicted, .. } = names.counts();
        assert_eq!((known, evicted), (all - EVICTED_AT_ONCE as u64, EVICTED_AT_ONCE as u64));
        assert_eq!(names.of_gone(all), Some(unit("a.service")));
        assert_eq!(names.of_gone(1), None, "the first one that was used");
    }
}
