//! What queries read.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use super::{
    Shared,
    part::{Part, PartError},
    read::{Row, RowLabels, Scan},
};
use crate::{
    model::{ContentId, Profile, ProfileHead, Sample, ValueType},
    stack::Stack,
};

/// Memory and parts as they stood at one moment.
///
/// A part that cannot be read is left out, counted and logged once: one damaged file must not hide all others.
pub(crate) struct Snapshot {
    pub(super) memory: Vec<Arc<Profile>>,
    pub(super) parts: Vec<Arc<Part>>,
    pub(super) shared: Arc<Shared>,
}

impl Snapshot {
    /// Hands each profile that starts in `range_us` and is of `profile_type`, if one is given, to `visit`.
    pub(crate) fn profiles(
        &self,
        range_us: &Range<i64>,
        profile_type: Option<&str>,
        mut visit: impl FnMut(&ProfileHead),
    ) {
        for profile in self.memory.iter().map(|profile| &profile.head) {
            let of_type = profile_type.is_none_or(|wanted| wanted == &*profile.series.profile_type);
            if of_type && range_us.contains(&profile.start_us) {
                visit(profile);
            }
        }
        for part in self.parts_in(range_us) {
            let read = part.profiles(range_us, profile_type, |profile, _| visit(profile));
            self.note(part, read);
        }
    }

    /// Hands each sample that `scan` selects to `visit`.
    pub(crate) fn samples(&self, scan: &Scan, mut visit: impl FnMut(&Row<'_>)) {
        for profile in &self.memory {
            let ProfileHead { series, start_us, sample_types, .. } = &profile.head;
            let Some(&series) = scan.series.get(&series.id) else { continue };
            if scan.range_us.contains(start_us) {
                visit_memory(profile, series, sample_types, &mut visit);
            }
        }
        for part in self.parts_in(&scan.range_us).filter(|_| !scan.series.is_empty()) {
            self.note(part, part.samples(scan, &mut visit));
        }
    }

    /// The stacks with these ids; every id that a scan of this snapshot over `range_us` gave is found, unless its part
    /// is damaged.
    pub(crate) fn stacks(
        &self,
        range_us: &Range<i64>,
        ids: impl Iterator<Item = ContentId>,
    ) -> HashMap<ContentId, Arc<Stack>> {
        let mut found = HashMap::new();
        let mut missing = HashSet::new();
        for id in ids {
            match self.shared.stacks.known_stack(&id) {
                Some(stack) => drop(found.insert(id, stack)),
                None => drop(missing.insert(id)),
            }
        }
        for Sample { stack, .. } in self.memory.iter().flat_map(|profile| &profile.samples) {
            if missing.is_empty() {
                break;
            }
            if missing.remove(&stack.id) {
                found.insert(stack.id, Arc::clone(stack));
            }
        }
        for part in self.parts_in(range_us) {
            if missing.is_empty() {
                break;
            }
            let mut loaded = Vec::new();
            let wanted = |id: &ContentId| missing.contains(id);
            self.note(part, part.stacks(&self.shared.stacks, wanted, |stack| loaded.push(stack)));
            for stack in loaded {
                missing.remove(&stack.id);
                found.insert(stack.id, stack);
            }
        }
        found
    }

    /// How many parts in `range_us` turned out to be unreadable.
    pub(crate) fn unreadable_parts(&self, range_us: &Range<i64>) -> usize {
        self.parts_in(range_us).filter(|part| part.is_unreadable()).count()
    }

    fn note(&self, part: &Part, read: Result<(), PartError>) {
        if let Err(error) = read
            && part.mark_unreadable()
        {
            self.shared.metrics.parts_unreadable.add(1);
            tracing::error!("answers lack a part: {}", crate::describe(&error));
        }
    }

    fn parts_in<'a>(&'a self, range_us: &Range<i64>) -> impl Iterator<Item = &'a Arc<Part>> + use<'a> {
        let Range { start, end } = *range_us;
        self.parts.iter().filter(move |part| part.ts_min_us < end && part.ts_max_us >= start)
    }
}

fn visit_memory(profile: &Profile, series: u32, types: &[ValueType], visit: &mut impl FnMut(&Row<'_>)) {
    for sample in &profile.samples {
        for (value_type, &value) in types.iter().zip(&sample.values).filter(|(_, value)| **value != 0) {
            visit(&Row {
                series,
                start_us: profile.head.start_us,
                duration_ms: profile.head.duration_ns / 1_000_000,
                type_name: &value_type.name,
                type_unit: &value_type.unit,
                stack: sample.stack.id,
                value,
                labels: RowLabels::Memory(&sample.labels),
            });
        }
    }
}
