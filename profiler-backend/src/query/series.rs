//! Totals over time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use profiler_pprof::push::Temporality;
use serde::Serialize;

use super::{
    QueryError,
    params::{Params, Steps},
    select::{Labels, Selection},
};
use crate::store::{Row, Snapshot};

/// Groups in an answer: the largest ones.
const GROUPS_SHOWN: usize = 100;
/// Most values, of all groups, that are summed before the largest groups are known: 64 MB.
const VALUES_MAX: usize = 8 << 20;

/// Answer of `series`.
#[derive(Debug, Serialize)]
pub(crate) struct SeriesAnswer {
    unit: Arc<str>,
    step_ms: i64,
    start_ms: i64,
    series: Vec<Group>,
    /// There are more groups than shown.
    truncated: bool,
}

#[derive(Debug, Serialize)]
struct Group {
    labels: BTreeMap<String, String>,
    /// One per step.
    values: Vec<i64>,
}

/// Totals per step, of everything or per value of a label. A profile counts where its window starts.
pub(crate) fn series(snapshot: &Snapshot, params: &Params) -> Result<SeriesAnswer, QueryError> {
    let steps = params.steps(&params.range_ms()?)?;
    let selection = Selection::from_params(snapshot, params)?;
    let value_type = selection.value_type(params.sample_type())?;
    let group_by = params.group_by();
    let mut totals = Totals { steps, groups: HashMap::new(), newest: HashMap::new() };
    if group_by.is_none() {
        totals.groups.insert(String::new(), vec![0; steps.count]);
    }
    let mut unit = Arc::from("");
    if let Some(value_type) = value_type {
        let wanted = (&*value_type.name, &*value_type.unit);
        totals.add_all(snapshot, &selection, wanted, group_by)?;
        unit = value_type.unit;
    }
    let (series, truncated) = totals.largest(group_by);
    Ok(SeriesAnswer { unit, step_ms: steps.step_ms, start_ms: steps.start_ms, series, truncated })
}

struct Totals {
    steps: Steps,
    groups: HashMap<String, Vec<i64>>,
    /// Snapshots: start of the newest profile by series and step.
    newest: HashMap<(u32, usize), i64>,
}

impl Totals {
    fn add_all(
        &mut self,
        snapshot: &Snapshot,
        selection: &Selection,
        wanted: (&str, &str),
        group_by: Option<&str>,
    ) -> Result<(), QueryError> {
        let scan = selection.scan(Labels::One(group_by));
        let meant =
            |row: &Row<'_>| (row.type_name, row.type_unit) == wanted && selection.accepts_any_time(row);
        let snapshots = selection.temporality() == Temporality::Snapshot;
        if snapshots {
            snapshot.samples(&scan, |row| {
                if let (true, Some(step)) = (meant(row), self.steps.index(row.start_us)) {
                    let newest = self.newest.entry((row.series, step)).or_insert(row.start_us);
                    *newest = row.start_us.max(*newest);
                }
            });
        }
        let mut fits = Ok(());
        snapshot.samples(&scan, |row| {
            let Some(step) = self.steps.index(row.start_us).filter(|_| fits.is_ok() && meant(row)) else {
                return;
            };
            if !snapshots || self.newest.get(&(row.series, step)) == Some(&row.start_us) {
                let group = group_by.map(|name| selection.label(row, name)).unwrap_or_default();
                fits = self.add(&group, step, row.value);
            }
        });
        fits
    }

    fn add(&mut self, group: &str, step: usize, value: i64) -> Result<(), QueryError> {
        if !self.groups.contains_key(group) {
            let max = VALUES_MAX / self.steps.count;
            if self.groups.len() >= max {
                return Err(QueryError::TooLarge { what: "groups", max });
            }
            self.groups.insert(group.to_owned(), vec![0; self.steps.count]);
        }
        if let Some(total) = self.groups.get_mut(group).and_then(|values| values.get_mut(step)) {
            *total = total.saturating_add(value);
        }
        Ok(())
    }

    fn largest(self, group_by: Option<&str>) -> (Vec<Group>, bool) {
        let mut groups: Vec<_> = self.groups.into_iter().collect();
        let total = |values: &[i64]| values.iter().fold(0i64, |sum, value| sum.saturating_add(*value));
        groups.sort_by(|a, b| (total(&b.1), &a.0).cmp(&(total(&a.1), &b.0)));
        let truncated = groups.len() > GROUPS_SHOWN;
        groups.truncate(GROUPS_SHOWN);
        let labels = |value: String| group_by.map(|name| (name.to_owned(), value)).into_iter().collect();
        let groups = groups.into_iter().map(|(value, values)| Group { labels: labels(value), values });
        (groups.collect(), truncated)
    }
}
