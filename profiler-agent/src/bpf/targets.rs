//! The map of targets.

use std::path::Path;

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use profiler_common::targets::Targets as WireList;
use tracing::warn;

use super::{load::BpfError, value::Value};
use crate::{sys::cgroup::WholeV2, targets::Targets};

const MAP: &str = "TARGETS";
const FAMILIES: &str = "FAMILY";

/// The map, and what is to be in it.
pub(super) struct TargetMap {
    map: Array<MapData, Value<WireList>>,
    families: HashMap<MapData, u32, u32>,
    wanted: Targets,
    written: Box<WireList>,
    hierarchy: Option<WholeV2>,
}

fn take_families(ebpf: &mut Ebpf) -> Result<HashMap<MapData, u32, u32>, BpfError> {
    let map = ebpf.take_map(FAMILIES).ok_or(BpfError::Missing { what: FAMILIES })?;
    map.try_into().map_err(|source| BpfError::Map { map: FAMILIES, source })
}

/// Refuses targets that could never match. Cgroups may be made later, and names may be wrong: these are told.
fn check_cgroups(wanted: &Targets, hierarchy: Option<&Path>) -> Result<(), BpfError> {
    let Some(hierarchy) = hierarchy else {
        return wanted.cgroups().next().map_or(Ok(()), |cgroup| Err(BpfError::NoCgroup2(cgroup.into())));
    };
    for cgroup in wanted.missing_cgroups(hierarchy) {
        warn!(
            cgroup = %cgroup.display(),
            below = %hierarchy.display(),
            "a target's cgroup is not there: nothing matches until it is"
        );
    }
    Ok(())
}

impl TargetMap {
    /// Takes the map and writes the targets to it.
    pub(super) fn new(ebpf: &mut Ebpf, wanted: Targets) -> Result<Self, BpfError> {
        let map = ebpf.take_map(MAP).ok_or(BpfError::Missing { what: MAP })?;
        let map = map.try_into().map_err(|source| BpfError::Map { map: MAP, source })?;
        let hierarchy = WholeV2::find("/proc".as_ref());
        let root = hierarchy.as_ref().map(WholeV2::path);
        check_cgroups(&wanted, root)?;
        let written = wanted.to_wire(root);
        let families = take_families(ebpf)?;
        let mut targets = Self { map, families, wanted, written, hierarchy };
        targets.write()?;
        Ok(targets)
    }

    /// Other targets from now on. Where they cannot be written, the old ones stay.
    pub(super) fn set(&mut self, wanted: Targets) -> Result<(), BpfError> {
        check_cgroups(&wanted, self.hierarchy.as_ref().map(WholeV2::path))?;
        let before = std::mem::replace(&mut self.wanted, wanted);
        let written = self.follow_cgroups();
        if written.is_err() {
            self.wanted = before;
        }
        written
    }

    /// Writes the targets when they, or the cgroups they name, have changed.
    pub(super) fn follow_cgroups(&mut self) -> Result<(), BpfError> {
        let wanted = self.wanted.to_wire(self.hierarchy.as_ref().map(WholeV2::path));
        if wanted == self.written {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.written, wanted);
        let written = self.write();
        if written.is_err() {
            self.written = before;
        }
        written
    }

    fn write(&mut self) -> Result<(), BpfError> {
        for pid in self.wanted.families() {
            let written = self.families.insert(pid, 1, 0);
            written.map_err(|source| BpfError::Map { map: FAMILIES, source })?;
        }
        let written = self.map.set(0, Value(*self.written), 0);
        written.map_err(|source| BpfError::Map { map: MAP, source })
    }
}
