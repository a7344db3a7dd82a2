//! All selected stacks as one tree.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use serde::Serialize;

use super::{
    QueryError,
    params::Params,
    select::{Labels, Selection},
};
use crate::{
    flamegraph::{Rows, Tree},
    model::ContentId,
    stack::Stack,
    store::{Row, Snapshot},
};

/// Most distinct pairs of group and stack: about 300 MB while they are summed.
const STACKS_MAX: usize = 4 << 20;
/// Most groups at the first level.
const GROUPS_MAX: usize = 10_000;

/// Answer of `merge?format=json`.
#[derive(Debug, Serialize)]
pub(crate) struct Merged {
    r#type: String,
    sample_type: Arc<str>,
    unit: Arc<str>,
    temporality: &'static str,
    from_ms: i64,
    to_ms: i64,
    profiles: usize,
    duration_ms: i64,
    comments: Vec<Arc<str>>,
    #[serde(flatten)]
    rows: Rows,
}

/// Sums the selected stacks into a tree; with `group_by`, the values of a label are its first level.
pub(crate) fn merge(snapshot: &Snapshot, params: &Params) -> Result<Merged, QueryError> {
    let range_ms = params.range_ms()?;
    let nodes_max = params.nodes_max()?;
    let selection = Selection::from_params(snapshot, params)?;
    let value_type = selection.value_type(params.sample_type())?;
    let (sample_type, unit) = match &value_type {
        Some(value_type) => (Arc::clone(&value_type.name), Arc::clone(&value_type.unit)),
        None => (params.sample_type().unwrap_or("").into(), "".into()),
    };
    let mut sums = Sums::default();
    if value_type.is_some() {
        sums.add_all(snapshot, &selection, (&sample_type, &unit), params.group_by())?;
    }
    Ok(Merged {
        r#type: params.profile_type().to_owned(),
        sample_type,
        unit,
        temporality: selection.temporality().name(),
        from_ms: range_ms.start,
        to_ms: range_ms.end,
        profiles: selection.profiles,
        duration_ms: selection.covered_us() / 1000,
        rows: sums.tree(snapshot, &selection, params.group_by()).rows(nodes_max),
        comments: selection.comments(snapshot),
    })
}

/// Values by group and stack.
#[derive(Default)]
pub(super) struct Sums {
    values: HashMap<(u32, ContentId), i64>,
    groups: Vec<String>,
    group_numbers: HashMap<String, u32>,
}

impl Sums {
    pub(super) fn add_all(
        &mut self,
        snapshot: &Snapshot,
        selection: &Selection,
        value_type: (&str, &str),
        group_by: Option<&str>,
    ) -> Result<(), QueryError> {
        let scan = selection.scan(Labels::One(group_by));
        let mut fits = Ok(());
        snapshot.samples(&scan, |row| {
            if fits.is_ok() && (row.type_name, row.type_unit) == value_type && selection.accepts(row) {
                fits = self.add(selection, row, group_by);
            }
        });
        fits
    }

    fn add(
        &mut self,
        selection: &Selection,
        row: &Row<'_>,
        group_by: Option<&str>,
    ) -> Result<(), QueryError> {
        let group = match group_by {
            Some(name) => self.group(&selection.label(row, name))?,
            None => 0,
        };
        let known = self.values.len();
        match self.values.entry((group, row.stack)) {
            Entry::Occupied(mut sum) => *sum.get_mut() = sum.get().saturating_add(row.value),
            Entry::Vacant(_) if known >= STACKS_MAX => {
                return Err(QueryError::TooLarge { what: "stacks", max: STACKS_MAX });
            }
            Entry::Vacant(sum) => drop(sum.insert(row.value)),
        }
        Ok(())
    }

    fn group(&mut self, value: &str) -> Result<u32, QueryError> {
        if let Some(&number) = self.group_numbers.get(value) {
            return Ok(number);
        }
        if self.groups.len() >= GROUPS_MAX {
            return Err(QueryError::TooLarge { what: "groups", max: GROUPS_MAX });
        }
        let number = self.groups.len() as u32;
        self.groups.push(value.to_owned());
        self.group_numbers.insert(value.to_owned(), number);
        Ok(number)
    }

    /// Each stack with its value, whatever its group.
    pub(super) fn for_each_stack(
        self,
        snapshot: &Snapshot,
        selection: &Selection,
        mut each: impl FnMut(&Stack, i64),
    ) {
        let stacks = snapshot.stacks(&selection.range_us, self.values.keys().map(|(_, stack)| *stack));
        for ((_, stack), value) in self.values {
            if let Some(stack) = stacks.get(&stack) {
                each(stack, value);
            }
        }
    }

    fn tree(self, snapshot: &Snapshot, selection: &Selection, group_by: Option<&str>) -> Tree {
        let ids = self.values.keys().map(|(_, stack)| *stack);
        let stacks = snapshot.stacks(&selection.range_us, ids);
        let names: Vec<String> = self.groups.iter().map(|value| group_name(group_by, value)).collect();
        // In the order of content, so that equal data gives equal bytes.
        let mut values: Vec<_> = self.values.into_iter().collect();
        values.sort_unstable_by_key(|((group, stack), _)| (names.get(*group as usize), *stack));
        let mut tree = Tree::new();
        for ((group, stack), value) in values {
            let group = group_by.and(names.get(group as usize)).map(String::as_str);
            if let Some(stack) = stacks.get(&stack) {
                tree.add(group, stack, value);
            }
        }
        tree
    }
}

fn group_name(group_by: Option<&str>, value: &str) -> String {
    match value {
        "" => format!("[no {}]", group_by.unwrap_or("group")),
        value => value.to_owned(),
    }
}
